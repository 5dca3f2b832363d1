"""One thread per process: tests run many small models side by side, and repeat bit for bit.

What tests share is in `helpers`, and is imported from there by the name of its file, also by worker processes, which
inherit the path. Two more folders are in the path: `golden`, whose modules lie beside the scripts that made the golden
runs, and `slurm`, whose cluster is started by name.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / folder) for folder in ("helpers", "golden", "slurm")]

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
