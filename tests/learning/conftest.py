"""Worker processes import the tests' own tasks from this folder: it goes into the path that they inherit."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
