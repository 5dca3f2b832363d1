"""How many calibration structures a confidence needs, against the calibration itself."""

from __future__ import annotations

import numpy as np
import pytest

from ubmd.measure.confidence import shortfall, structures_needed
from ubmd.uncertainty.conformal import conformal_scale


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.01, 0.3, 0.5, 0.32, 0.045])
def test_the_number_is_the_smallest_that_attains_the_confidence(alpha: float) -> None:
    attained = {n: conformal_scale(np.ones(n), np.ones(n), alpha).attainable for n in range(1, 120)}
    first = next(n for n, share in attained.items() if share == pytest.approx(1.0 - alpha))
    assert structures_needed(alpha) == first
    for n, share in attained.items():
        assert (shortfall(share, 1.0 - alpha, alpha) == "") == (n >= first)


def test_the_sentence_names_count_and_what_it_gives() -> None:
    assert shortfall(0.75, 0.95, 0.05) == (
        "With 3 calibration structures, uncertainties of structures hold at 75 % confidence; 95 % (uncertainty.alpha "
        "= 0.05) needs 19 calibration structures."
    )
    assert (
        "With 1 calibration structure, uncertainties of structures hold at 50 % confidence, those of atoms at 75 %"
        in (shortfall(0.5, 0.75, 0.05))
    )
    assert shortfall(0.0, 0.95, 0.05) == ""  # not calibrated at all, as the energy of a crystal
