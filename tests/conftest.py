"""One thread per process: tests run many small models side by side, and repeat bit for bit."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
