"""References: the calculators that label structures, and reference MD that makes test sets."""

from ubmd.references.calculators import make_calculator
from ubmd.references.labels import check_force, energy_jumps, label
from ubmd.references.sampling import sample, sample_trajectory

__all__ = ["check_force", "energy_jumps", "label", "make_calculator", "sample", "sample_trajectory"]
