"""What calculators return in place of numbers, and why labels are rejected: the right value, or a line that says it."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.calculators.emt import EMT

from ubmd.errors import LabelError, SettingsError, describe, one_line
from ubmd.learning.work.inside import guarded
from ubmd.references import label
from ubmd.references.results import as_numbers
from ubmd.settings import ReferenceSettings

NONE = object()  # in place of a result that is not there at all
CELL = bulk("Cu", cubic=True)
CELL.rattle(0.05, seed=2)


def reference(kind: type, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> ReferenceSettings:
    """Settings of a calculator class."""
    module = ModuleType(f"results_{id(kind)}")
    setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return ReferenceSettings(calculator=f"{module.__name__}:{kind.__name__}", **settings)


def returning(**wrong: Any) -> type:
    """EMT that returns something else for some of its results; functions get the right value."""

    class Changed(EMT):
        def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
            super().calculate(atoms, properties, system_changes)
            for name, value in wrong.items():
                self.results[name] = value(self.results[name]) if callable(value) else value
            self.results = {name: value for name, value in self.results.items() if value is not NONE}

    return Changed


def expected() -> dict[str, Any]:
    atoms = CELL.copy()
    atoms.calc = EMT()
    return {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(), "stress": atoms.get_stress()}


def tensor(stress: np.ndarray) -> np.ndarray:
    xx, yy, zz, yz, xz, xy = stress
    return np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])


@pytest.mark.parametrize(
    "wrong",
    [
        {"energy": lambda e: np.array([e]), "free_energy": lambda e: np.array([e])},
        {"energy": lambda e: np.array(e), "free_energy": lambda e: np.array(e)},
        {"energy": lambda e: [[e]], "free_energy": None},
        {"free_energy": NONE},
        {"forces": lambda f: f.tolist()},
        {"forces": lambda f: f.astype(object)},
        {"forces": lambda f: [[np.array(x) for x in row] for row in f]},
        {"forces": lambda f: np.ma.masked_array(f)},
        {"stress": tensor},
        {"stress": lambda s: tensor(s).tolist()},
        {"stress": lambda s: tensor(s).ravel()},
        {"stress": lambda s: s.astype(object)},
    ],
    ids=lambda wrong: "-".join(wrong),
)
def test_numbers_in_other_wrappings_are_these_numbers(wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    labelled = label(CELL, reference(returning(**wrong), monkeypatch), Path())
    for name, value in expected().items():
        found = labelled.calc.results[name]
        assert np.asarray(found).dtype == float
        np.testing.assert_allclose(found, value, rtol=1e-14, atol=1e-14)


def test_single_precision_stays_close(monkeypatch: pytest.MonkeyPatch) -> None:
    labelled = label(CELL, reference(returning(forces=np.float32), monkeypatch), Path())
    assert labelled.calc.results["forces"].dtype == np.float64
    np.testing.assert_allclose(labelled.get_forces(), expected()["forces"], atol=1e-6)


def raising(error: BaseException) -> type:
    class NoStress(EMT):
        def get_stress(self, atoms=None):
            raise error

    return NoStress


class Plain:
    """A calculator as people write them: methods, no base class, no stress, no ``force_consistent``."""

    def get_potential_energy(self, atoms=None):
        return float(np.sum(atoms.positions**2))

    def get_forces(self, atoms=None):
        return -2.0 * atoms.positions


@pytest.mark.parametrize(
    "kind",
    [
        returning(stress=None),
        returning(stress=NONE),
        returning(stress=np.zeros(6)),
        returning(stress=np.zeros((3, 3))),
        raising(NotImplementedError()),
        raising(PropertyNotImplementedError("stress")),
    ],
    ids=["None", "absent", "zeros", "zeros 3x3", "NotImplementedError", "PropertyNotImplementedError"],
)
def test_many_ways_to_have_no_stress(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    results = label(CELL, reference(kind, monkeypatch), Path()).calc.results
    assert set(results) == {"energy", "forces"}
    np.testing.assert_array_equal(results["forces"], expected()["forces"])


def test_a_calculator_without_any_base_class(monkeypatch: pytest.MonkeyPatch) -> None:
    labelled = label(CELL, reference(Plain, monkeypatch, force_limit=100.0), Path())
    assert labelled.get_potential_energy() == pytest.approx(float(np.sum(CELL.positions**2)), rel=1e-15)
    np.testing.assert_array_equal(labelled.get_forces(), -2.0 * CELL.positions)
    assert set(labelled.calc.results) == {"energy", "forces"}


def test_zero_stress_beside_zero_forces_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Atoms that do not interact: nothing says that this is a placeholder."""
    kind = returning(forces=np.zeros_like, stress=np.zeros_like)
    np.testing.assert_array_equal(label(CELL, reference(kind, monkeypatch), Path()).get_stress(), np.zeros(6))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"forces": None}, r"returned no forces \(None\)"),
        ({"forces": NONE}, "computes no forces"),
        ({"energy": None, "free_energy": None}, r"returned no energy \(None\)"),
        ({"energy": 1.0 + 0.5j, "free_energy": None}, "energy with complex numbers"),
        ({"free_energy": np.ones(4)}, r"energy of shape \(4,\), not one number"),
        ({"free_energy": "-3.5"}, r"energy with values that are not numbers \(str\)"),
        ({"free_energy": True}, "not numbers"),
        ({"free_energy": np.nan}, r"not finite \(energy\)"),
        ({"forces": lambda f: f.astype(complex)}, "forces with complex numbers"),
        ({"forces": lambda f: [None] * len(f)}, r"forces with values that are not numbers \(NoneType\)"),
        ({"forces": lambda f: [[str(x) for x in row] for row in f]}, "not numbers"),
        ({"forces": lambda f: [[1.0], *f.tolist()[1:]]}, "not an array of numbers"),
        ({"forces": lambda f: np.ma.masked_array(f, np.abs(f) > 1e-9)}, "masked"),
        ({"forces": lambda f: f.ravel()}, r"forces of shape \(12,\) for 4 atoms instead of \(4, 3\)"),
        ({"forces": lambda f: f[:3]}, r"forces of shape \(3, 3\) for 4 atoms instead of \(4, 3\)"),
        ({"forces": lambda f: f.T}, r"forces of shape \(3, 4\) for 4 atoms"),
        ({"stress": lambda s: s[:3]}, r"stress of shape \(3,\) instead of \(6,\) or \(3, 3\)"),
        ({"stress": lambda s: s * np.inf}, r"not finite \(stress\)"),
    ],
    ids=range(18),
)
def test_what_is_no_label_is_rejected_with_what_it_is(
    wrong: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LabelError, match=message):
        label(CELL, reference(returning(**wrong), monkeypatch), Path())


def test_results_are_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """A calculator may reuse its arrays for the next structure."""
    buffer = np.zeros((4, 3))

    class Reusing(Plain):
        def get_forces(self, atoms=None):
            buffer[:] = -2.0 * atoms.positions
            return buffer

    settings = reference(Reusing, monkeypatch, force_limit=100.0)
    first = label(CELL, settings, Path())
    moved = CELL.copy()
    moved.positions += 0.1
    label(moved, settings, Path())
    np.testing.assert_array_equal(first.get_forces(), -2.0 * CELL.positions)
    assert as_numbers("forces", buffer) is not buffer


def test_a_numpy_bool_can_say_that_nothing_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unconverged(EMT):
        converged = np.bool_(False)

    class Unsure(EMT):
        converged = None

    with pytest.raises(LabelError, match="did not converge"):
        label(CELL, reference(Unconverged, monkeypatch), Path())
    label(CELL, reference(Unsure, monkeypatch), Path())


# --- reasons ------------------------------------------------------------------------------------------------------


class Speechless(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("\x1b[1;31mError:\x1b[0m the \x1b[4mSCF\x1b[K\r\n\n  stopped\tat\x00 5", "Error: the SCF stopped at 5"),
        ("\x1b]0;title\x07 a\x08b \u202ec\u200b", "ab c"),
        ("\x1b(Bplain\x1b7", "plain"),
        ("half a pair \ud800", "half a pair"),
        ("", ""),
        ("Bâtiment é, 中文, μ = 3 Å²", "Bâtiment é, 中文, μ = 3 Å²"),
    ],
)
def test_one_line(text: str, line: str) -> None:
    assert one_line(text) == line


def test_long_texts_are_cut_and_say_so() -> None:
    assert one_line("x" * 500) == "x" * 500
    cut = one_line("word " * 10_000_000)
    assert cut.startswith("word word")
    assert cut.endswith("… (cut: 50,000,000 characters)")
    assert len(cut) < 560
    assert one_line(" " * 20_000 + "far away") == "… (cut: 20,008 characters)"


def test_description_of_errors() -> None:
    assert describe(RuntimeError()) == "RuntimeError"
    assert describe(ValueError("a\nb")) == "ValueError: a b"
    assert describe(Speechless()) == "Speechless: (its message cannot be shown)"


def failing(error: BaseException) -> type:
    class Failing(Calculator):
        implemented_properties = ["energy", "forces"]  # noqa: RUF012

        def calculate(self, *_: Any, **__: Any) -> None:
            raise error

    return Failing


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("\x1b[31mbad\x1b[0m\nbasis"), r"^The reference failed \(RuntimeError: bad basis\)\.$"),
        (RuntimeError(), r"^The reference failed \(RuntimeError\)\.$"),
        (Speechless(), r"^The reference failed \(Speechless: \(its message cannot be shown\)\)\.$"),
        (SystemExit("licence expired"), r"^The reference failed \(SystemExit: licence expired\)\.$"),
        (SystemExit(), r"^The reference failed \(SystemExit\)\.$"),
        (RuntimeError("SCF did not\nconverge"), "^The reference failed|did not converge"),
        (
            RuntimeError("y" * 52_000_000),
            r"^The reference failed \(RuntimeError: y+ … \(cut: 52,000,000 characters\)\)\.$",
        ),
        (NotImplementedError("No potential for Xe"), r"failed \(NotImplementedError: No potential for Xe\)"),
    ],
    ids=["colours", "empty", "speechless", "exit", "exit empty", "scf", "huge", "not implemented"],
)
def test_reasons_are_one_short_line(error: BaseException, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LabelError, match=message) as caught:
        label(CELL, reference(failing(error), monkeypatch), Path())
    assert len(str(caught.value)) < 700
    assert str(caught.value).isprintable()


def test_ctrl_c_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        label(CELL, reference(failing(KeyboardInterrupt()), monkeypatch), Path())


@pytest.mark.parametrize("kind", [LabelError, SettingsError, RuntimeError, OSError, SystemExit])
def test_replies_of_workers_are_small_whatever_a_task_raises(kind: type[BaseException]) -> None:
    def task(message: str) -> None:
        raise kind(message)

    _, name, reason, details = guarded(task, "\x1b[31mz\n" * 1_000_000)
    assert name == (kind.__name__ if kind in (LabelError, SettingsError) else "TaskFailed")
    assert reason.isprintable()
    assert len(reason) + len(details) < 30_000
    _, _, reason, _ = guarded(task, "")
    assert reason == kind.__name__  # an empty reason would count as a success


def test_objects_name_their_type() -> None:
    class Quantity:
        pass

    with pytest.raises(LabelError, match=r"energy with values that are not numbers \(Quantity\)"):
        as_numbers("energy", Quantity())
