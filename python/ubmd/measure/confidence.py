"""The confidence that few calibration structures can give, in words."""

from __future__ import annotations

import math

from ubmd.texts import counted


def structures_needed(alpha: float) -> int:
    """Smallest number n of calibration structures for a confidence of 1 - alpha: n >= 1/alpha - 1."""
    return math.ceil(round(1.0 / alpha - 1.0, 9))


def shortfall(structures: float, atoms: float, alpha: float) -> str:
    """One sentence where calibration structures are too few for the confidence 1 - alpha; empty otherwise.

    Args:
        structures: confidence that uncertainties of structures attain, n/(n + 1) with n calibration structures.
        atoms: the same of atomic uncertainties.
        alpha: miscoverage that was asked for.
    """
    wanted = 1.0 - alpha
    if not 0.0 < structures < wanted - 1e-9:
        return ""
    count = round(structures / (1.0 - structures))
    held = f"uncertainties of structures hold at {_percent(structures)} confidence"
    if atoms < wanted - 1e-9:
        held += f", those of atoms at {_percent(atoms)}"
    return (
        f"With {counted(count, 'calibration structure')}, {held}; {_percent(wanted)} (uncertainty.alpha = {alpha:g}) "
        f"needs {structures_needed(alpha)} calibration structures."
    )


def _percent(share: float) -> str:
    return f"{100.0 * share:.3g} %"
