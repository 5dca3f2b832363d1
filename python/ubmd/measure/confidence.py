"""The confidence that few calibration structures can give, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

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


def promise(uncertainty: Mapping[str, Any]) -> str:
    """One sentence on what the calibration of a model file promises; empty if nothing was calibrated.

    Conformal prediction bounds the share of errors on average over calibration sets, for new data that are drawn like
    them. Atoms of one structure are not drawn one by one, hence "about".

    Args:
        uncertainty: this part of the record of a model file.
    """
    energy, forces = uncertainty["energy"], uncertainty["forces"]
    count, parts = energy["n_calibration"] or 0, []
    by_atom = uncertainty.get("atoms_by", "atom") == "atom"
    if count:
        parts.append(f"at least {_percent(energy['attainable'])} of energies have an error below u")
    if forces["n_calibration"]:
        share = _percent(forces["attainable"])
        parts.append(
            f"about {share} of atoms have a force error below u_i"
            if by_atom
            else f"at least {share} of structures have a largest force error below max u_i"
        )
    if not parts:
        return ""
    atoms = [counted(forces["n_calibration"], "atom")] if by_atom and forces["n_calibration"] else []
    data = ", ".join([*([counted(count, "structure")] if count else []), *atoms])
    where = f" ({data})" if data else ""
    return f"Calibrated uncertainties{where}: in new structures like these, on average {', and '.join(parts)}."


def _percent(share: float) -> str:
    return f"{100.0 * share:.3g} %"
