"""Which structures of a pool are worth a label: greedy batch selection in feature space."""

from ubmd.selection.greedy import METHODS, select

__all__ = ["METHODS", "select"]
