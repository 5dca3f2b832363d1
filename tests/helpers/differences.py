"""What the tests against central differences share."""

from __future__ import annotations

import numpy as np

FORCES = """
dump d all custom 1 dump.test id fx fy fz f_b[2] f_b[3] f_b[4] f_n[1] f_n[2] f_n[3]
dump_modify d sort id format float %.17g
"""


def columns(frame, names):
    return np.stack([frame[name] for name in names], 1)


def deviation(value, expected):
    """Largest difference, relative to the largest component."""
    return np.abs(np.asarray(value) - expected).max() / np.abs(expected).max()


def bias_gradients(lammps, h):
    """(as fix b with force 0.25 has them, by central differences of f_b[1] for every atom and axis), both [n, 3].

    The first has the scale taken out that the fix reports; ``h``: step, Å.
    """
    count = lammps.get_natoms()
    order = np.argsort(lammps.numpy.extract_atom("id")[:count])
    scale = lammps.extract_fix("b", 0, 1, 3)
    analytic = lammps.numpy.extract_fix("b", 1, 2)[order][:, 1:4] / (0.25 * scale)
    x = lammps.numpy.extract_atom("x")[:count][order].copy()
    numerical = np.zeros_like(analytic)
    for atom, axis in np.ndindex(count, 3):
        values = []
        for sign in (1, -1):
            moved = x.copy()
            moved[atom, axis] += sign * h
            lammps.scatter_atoms("x", 1, 3, np.ctypeslib.as_ctypes(moved.ravel()))
            lammps.command("run 0")
            values.append(lammps.extract_fix("b", 0, 1, 0))
        numerical[atom, axis] = (values[0] - values[1]) / (2 * h)
    return analytic, numerical
