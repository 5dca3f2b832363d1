"""The clock of the benchmarks."""

import time

# Processor time of this process, all its threads: on an idle machine that is the wall-clock time of one thread. On a
# busy one the time that others take isn't counted (but what they do to caches and clock rates is).
now = time.process_time
