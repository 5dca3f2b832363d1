"""How many calibration structures a confidence needs, against the calibration itself."""

from __future__ import annotations

import numpy as np
import pytest

from ubmd.measure.confidence import promise, shortfall, structures_needed
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


def test_the_promise_is_kept_on_average_over_calibrations() -> None:
    """Its number is the expected share of new errors below u: here for any distribution, by drawing it."""
    generator = np.random.default_rng(0)
    n, alpha = 7, 0.2
    scale = conformal_scale(np.ones(n), np.ones(n), alpha)
    shares = []
    for _ in range(2000):
        calibration, new = generator.exponential(size=n), generator.exponential(size=200)
        shares.append(np.mean(new <= conformal_scale(calibration, np.ones(n), alpha).scale))
    assert np.mean(shares) >= scale.attainable - 0.01
    record = {"scale": 1.0, "attainable": scale.attainable, "n_calibration": n}
    assert promise({"energy": record, "forces": {**record, "n_calibration": 21}, "atoms_by": "atom"}) == (
        "Calibrated uncertainties (7 structures, 21 atoms): in new structures like these, on average at least 80 % of "
        "energies have an error below u, and about 80 % of atoms have a force error below u_i."
    )
    by_structure = promise({"energy": record, "forces": record, "atoms_by": "structure"})
    assert by_structure.endswith("and at least 80 % of structures have a largest force error below max u_i.")


def test_nothing_is_promised_without_a_calibration() -> None:
    nothing = {"scale": 1.0, "attainable": 0.0, "n_calibration": 0}
    forces = {"scale": 1.0, "attainable": 0.9, "n_calibration": 30}
    assert promise({"energy": nothing, "forces": nothing}) == ""
    assert promise({"energy": nothing, "forces": forces}) == (
        "Calibrated uncertainties (30 atoms): in new structures like these, on average about 90 % of atoms have a "
        "force error below u_i."
    )
