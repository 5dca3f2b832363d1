"""Charge and spin of a calculation: from the settings, else from the structure; the two must not disagree."""

from __future__ import annotations

from typing import Any

from ase import Atoms

from ubmd.errors import LabelError

_TOLERANCE = 1e-3  # e or μ_B
_ROUNDING = 0.05  # e, of the sum of initial charges


def total_charge(atoms: Atoms, argument: float | None, *, whole: bool = True) -> float:
    """Total charge (e): ``reference.arguments.charge``, else ``info['charge']``, else the sum of the initial charges.

    A sum close to a whole number is that number: charges of atoms are rounded.

    Args:
        atoms: the structure.
        argument: what the settings say.
        whole: it must be a whole number (tblite gives invalid results for others).

    Raises:
        LabelError: two of them that differ (a sum of zero counts as not given), or a fraction of a charge.
    """
    total = float(atoms.get_initial_charges().sum())
    total = round(total) if abs(total - round(total)) < _ROUNDING else total
    given = {
        "reference.arguments.charge": argument,
        "its info['charge']": atoms.info.get("charge"),
        "the sum of its initial charges": total if abs(total) > _TOLERANCE else None,
    }
    charge = float(_agreed("charge", given) or 0.0)
    if whole and charge != round(charge):
        raise LabelError(f"The structure has a charge of {charge:g} e, but the reference needs a whole number.")
    return charge


def spin_multiplicity(atoms: Atoms, argument: int | None) -> int | None:
    """2 S + 1 by ``reference.arguments.multiplicity``, else ``info['multiplicity']``, else from the initial moments.

    None if it is not given.

    Raises:
        LabelError: two of them that differ; one that is not a positive whole number; non-collinear moments; or
            ``info['spin']`` alone, which is 2 S in one program, 2 S + 1 in another.
    """
    moments = atoms.get_initial_magnetic_moments().reshape(len(atoms), -1)
    if moments[:, :-1].any():
        raise LabelError("The structure has non-collinear magnetic moments, which the reference cannot compute.")
    moment = float(moments[:, -1].sum())
    given = {
        "reference.arguments.multiplicity": argument,
        "its info['multiplicity']": atoms.info.get("multiplicity"),
        "its initial magnetic moments": abs(round(moment)) + 1 if abs(moment) > _TOLERANCE else None,
    }
    agreed = _agreed("multiplicity", given)
    if agreed is None and atoms.info.get("spin") is not None:
        raise LabelError(
            f"The structure has spin = {atoms.info['spin']} in its info, which means 2 S in some programs and 2 S + 1 "
            "in others; give info['multiplicity'] (2 S + 1) or reference.arguments.multiplicity."
        )
    if agreed is not None and (agreed < 1.0 or agreed != round(agreed)):
        raise LabelError(
            f"The structure has a multiplicity of {agreed:g}; it is 2 S + 1, a whole number: 1 for a singlet, 2 for a "
            "doublet."
        )
    return None if agreed is None else round(agreed)


def _agreed(name: str, given: dict[str, Any]) -> float | None:
    """The value that all sources agree on; None if there is none."""
    said: list[tuple[str, float]] = []
    for source, value in given.items():
        if value is None:
            continue
        try:
            said.append((source, float(value)))
        except (TypeError, ValueError):
            raise LabelError(f"The {name} of the structure is not a number: {source} is {value!r}.") from None
    for source, value in said[1:]:
        if abs(value - said[0][1]) > _TOLERANCE:
            raise LabelError(
                f"The structure has two values for the {name}: {said[0][0]} is {said[0][1]:g}, but {source} "
                f"{'is' if source.startswith(('its info', 'the sum')) else 'say'} {value:g}."
            )
    return said[0][1] if said else None
