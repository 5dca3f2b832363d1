"""What a user could change after the first replicas, in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from ase import Atoms

from ubmd.lammps.engine import ReplicaResult
from ubmd.learning.proposal import displacement
from ubmd.settings import RunSettings

_SOON = 50  # steps: the frames until then hardly differ from the start
_FITS = (0.75, 2.5)  # ratio to the displacement that fits, outside of which it is to blame


def after_first_replicas(results: Sequence[ReplicaResult], settings: RunSettings, starts: Sequence[Atoms]) -> str:
    """A sentence if most replicas of the first model passed the threshold within few steps; empty otherwise.

    ``starts``: structures that the replicas started from.
    """
    steps = [result.steps for result in results]
    passed = sum(result.stopped == "threshold" for result in results)
    if 2 * passed <= len(results) or median(steps) >= _SOON:
        return ""
    fitting, given, threshold = displacement(starts), settings.start.displacement, settings.loop.threshold
    tries = [f"loop.threshold = {2.0 * threshold:g} (ubmd run --from 0)"]
    if not _FITS[0] * fitting <= given <= _FITS[1] * fitting:
        tries.insert(0, f"start.displacement = {fitting:g} instead of {given:g} Å (in a new run_dir)")
    else:
        tries.append(f"start.count = {2 * settings.start.count} (in a new run_dir)")
    return (
        f"{passed} of {len(results)} replicas of the first model passed loop.threshold = {threshold:g} eV/Å, half of "
        f"all within {median(steps):g} steps, and explored little. Try {' or '.join(tries)}."
    )


def rare_impulses(structures: Sequence[Atoms], settings: RunSettings) -> list[str]:
    """A remark if bias forces act too rarely for the vibrations of the biased atoms; the warning of fix ubmd."""
    bias, step = settings.bias, settings.md.timestep
    masses = [
        float(mass)
        for atoms in structures
        for mass, symbol in zip(atoms.get_masses(), atoms.symbols, strict=True)
        if bias.species.get(str(symbol), 1.0) != 0.0
    ]
    if bias.every == 1 or not bias.is_biased or not masses:
        return []
    lightest = min(masses)
    longest = (2.9 if lightest < 4.0 else 1.5) * lightest**0.5  # fs, a third of the fastest period
    if bias.every * step <= longest:
        return []
    return [
        f"bias.every = {bias.every} with md.timestep = {step:g} fs: bias forces act every {bias.every * step:g} fs, "
        f"too rarely for the vibrations of atoms of mass {lightest:.3g}, which they may heat: set bias.every = "
        f"{max(1, int(longest / step))}."
    ]
