"""ubmd from Python: `ubmd.run`, `ubmd.train`, `ubmd.biased_md`.

They stand above the command line, whose output they show.
"""

from ubmd.process import spin_briefly

spin_briefly()
