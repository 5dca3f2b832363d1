"""ubmd from Python: the examples of the page and of the docstrings, calculators as objects, typed events, scripts."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc100
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.constraints import FixAtoms
from system import cluster

import ubmd
from ubmd.data.labels import labels_of
from ubmd.references.pickled import pack

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "lammps_examples" / "python"
SMALL = {
    "run_dir": "run",
    "loop": {"labels": 10, "threshold": 5.0, "warm_epochs": 2},
    "start": {"count": 6},
    "md": {"steps": 40, "replicas": 1, "frames_every": 20},
    "selection": {"batch": 4},
    "model": {"hidden": [8, 8], "n_radial": 2, "n_basis": 4},
    "training": {"epochs": 4, "threads": 1},
    "uncertainty": {"projections": 16, "references": 8},
}


class Shifted(EMT):
    """A calculator of the user's own, whose energies differ from EMT's by a parameter."""

    default_parameters: ClassVar = {**EMT.default_parameters, "shift": 0.0}

    def calculate(self, *arguments, **options) -> None:
        super().calculate(*arguments, **options)
        for name in ("energy", "free_energy"):
            self.results[name] += self.parameters["shift"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def copper() -> Atoms:
    return bulk("Cu", cubic=True)


# ------------------------------------------------------------------------------------------ examples


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the examples of the page were run."""
    folder = tmp_path_factory.mktemp("page")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "python" / "API.md").read_text(), re.MULTILINE | re.DOTALL)
    (folder / "page.py").write_text("\n".join(blocks))
    found = run_script(folder / "page.py", folder)
    (folder / "printed").write_text(found)
    return folder


def run_script(script: Path, folder: Path, *arguments: str) -> str:
    """What a script prints that is run in a folder, as a user would."""
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", str(script), *arguments]
    found = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout


def test_the_examples_of_the_page_run(page: Path) -> None:
    printed = (page / "printed").read_text()
    shown = re.findall(r"print\(\w+\)  # (.*)", (ROOT / "python" / "API.md").read_text())
    assert len(shown) == 2
    for line in shown:  # the number of iterations may differ between processors
        assert re.sub(r"\d+ iterations", "# iterations", line) in re.sub(r"\d+ iterations?", "# iterations", printed)
    assert "step limit" in printed


@pytest.mark.parametrize("name", [name for name in ubmd.__all__ if name[0].islower()] + ["Calculator", "Model", "Run"])
def test_the_examples_of_the_docstrings_hold(name: str, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(page)
    thing = getattr(ubmd, name)
    if name in ("errors", "events", "load_settings", "evaluate"):  # no functions, or tested with files of its own
        return
    finder = doctest.DocTestFinder(recurse=name == "Run")
    tests = [test for test in finder.find(thing, name, globs={"ubmd": ubmd}) if test.examples]
    assert tests, f"ubmd.{name} has no example"
    namespace = {"ubmd": ubmd, "run": ubmd.Run("copper")}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in tests:
        test.globs = dict(namespace)
        said: list[str] = []
        runner.run(test, out=said.append)
        assert not runner.failures, "".join(said)


@pytest.mark.parametrize("name", ["watch", "train", "evaluate", "ase_md", "lammps_md"])
def test_the_scripts_run(name: str, scripts_folder: Path) -> None:
    assert run_script(SCRIPTS / f"{name}.py", scripts_folder)


@pytest.fixture(scope="module")
def scripts_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where scripts run, with the model of train.py."""
    folder = tmp_path_factory.mktemp("scripts")
    run_script(SCRIPTS / "train.py", folder)
    return folder


@pytest.mark.quick
def test_every_script_is_on_their_page() -> None:
    page = (SCRIPTS / "README.md").read_text()
    assert sorted(set(re.findall(r"\((\w+)\.py\)", page))) == sorted(path.stem for path in SCRIPTS.glob("*.py"))


def test_ethanol_from_ones_own_calculator_to_biased_md(here: Path) -> None:
    """The script of the page, with fewer labels and steps."""
    pytest.importorskip("tblite")
    script = (SCRIPTS / "ethanol.py").read_text()
    code = script.split('"""')[2]
    assert len([line for line in code.splitlines() if line]) <= 20
    small = '"start": {"count": 8}, "training": {"epochs": 40}, "md": {"steps": 200, "replicas": 2}'
    changed = code.replace('"labels": 48}', f'"labels": 12}}, {small}').replace('"steps": 4000', '"steps": 300')
    assert changed.count(small) == changed.count('"steps": 300') == 1
    Path("small.py").write_text(changed)
    run_script(here / "small.py", here)
    assert len(ubmd.Run("ethanol_run").dataset) == 12
    assert Path("ethanol.png").stat().st_size > 5000


# ------------------------------------------------------------------------------------------ ubmd.run


@pytest.mark.quick
def test_labels_are_those_of_the_calculator(here: Path, copper: Atoms) -> None:
    """An object with a parameter of its own, and results that it had before: none of these may become a label."""
    calculator = Shifted(shift=7.0)
    copper.calc = calculator
    copper.get_potential_energy()
    run = ubmd.run(SMALL, calculator, copper, progress=False)
    assert copper.calc is calculator
    for atoms in run.dataset:
        copy = atoms.copy()
        copy.calc = EMT()
        assert labels_of(atoms)["energy"] == pytest.approx(copy.get_potential_energy() + 7.0, abs=1e-9)
        np.testing.assert_allclose(labels_of(atoms)["forces"], copy.get_forces(), atol=1e-9)


def test_a_run_is_resumed_with_the_same_calculator_only(here: Path, copper: Atoms) -> None:
    first = ubmd.run(SMALL, Shifted(shift=1.0), copper, progress=False)
    before = Path("run/inputs/calculator.pickle").read_bytes()
    more = SMALL | {"loop": SMALL["loop"] | {"labels": 12}}
    run = ubmd.run(more, Shifted(shift=1.0), copper, progress=False)
    assert run.finished
    assert len(run.dataset) == 12
    assert Path("run/inputs/calculator.pickle").read_bytes() == before
    with pytest.raises(ubmd.errors.SettingsError, match=r"reference.arguments.parameters.*shift=1.0.*now.*shift=2.0"):
        ubmd.run(more, Shifted(shift=2.0), copper, progress=False)
    with pytest.raises(ubmd.errors.SettingsError, match=r"reference.arguments.name"):
        ubmd.run(more, EMT(), copper, progress=False)
    with pytest.raises(ubmd.errors.SettingsError, match="was started from other structures"):
        ubmd.run(more, Shifted(shift=1.0), bulk("Au", cubic=True), progress=False)
    assert len(first.dataset) == 12  # nothing was lost


def test_a_function_makes_what_cannot_be_copied(here: Path, copper: Atoms) -> None:
    calculator = EMT()
    calculator.handle = threading.Lock()
    with pytest.raises(ubmd.errors.SettingsError, match=r"EMT cannot be sent .*calculator=lambda: EMT\(\.\.\.\)"):
        ubmd.run(SMALL, calculator, copper, progress=False)
    assert not Path("run").exists()
    run = ubmd.run(SMALL, lambda: Shifted(shift=3.0), copper, progress=False)
    assert len(run.dataset) == 10


def test_a_class_of_a_script_can_be_the_calculator(here: Path) -> None:
    """Workers cannot import it: it goes to them by value; the script needs no guard."""
    lines = [
        "import ubmd",
        "from ase.build import bulk",
        "from ase.calculators.emt import EMT",
        "class Mine(EMT):",
        "    pass",
        f"print(len(ubmd.run({SMALL!r}, Mine(), bulk('Cu', cubic=True), progress=False).dataset))",
    ]
    Path("own.py").write_text("\n".join(lines))
    assert run_script(here / "own.py", here) == "10\n"


def test_fixed_atoms_and_state_reach_the_run(here: Path) -> None:
    slab = fcc100("Cu", (1, 1, 3), vacuum=6.0)
    slab.pbc = (True, True, False)
    slab.set_constraint(FixAtoms([0]))
    slab.info["charge"] = 1
    run = ubmd.run(SMALL, EMT(), slab, progress=False)
    assert all(atoms.info["charge"] == 1 for atoms in run.dataset)
    np.testing.assert_allclose([atoms.positions[0] for atoms in run.dataset], [slab.positions[0]] * 10, atol=1e-12)


def test_labelled_structures_begin_a_run(here: Path, copper: Atoms) -> None:
    frames = []
    for seed in range(6):
        atoms = copper.copy()
        atoms.rattle(0.1, seed=seed)
        atoms.calc = EMT()
        atoms.get_forces()
        frames.append(atoms)
    settings = {key: value for key, value in SMALL.items() if key != "start"}
    run = ubmd.run(settings, EMT(), frames, progress=False)
    assert [atoms.info.get("given", False) for atoms in run.dataset] == [True] * 6 + [False] * 4
    with pytest.raises(ubmd.errors.DataError, match=r"start.labels|reference"):
        ubmd.run(settings | {"run_dir": "other"}, Shifted(shift=1.0), frames, progress=False)


def test_a_listener_gets_objects_and_may_end_the_run(here: Path, copper: Atoms, capfd) -> None:
    class Enough(Exception):
        pass

    seen: list[ubmd.events.Event] = []

    def listen(event: ubmd.events.Event) -> None:
        seen.append(event)
        if isinstance(event, ubmd.events.LabelAppended) and event.label == 7:
            raise Enough

    with pytest.raises(Enough):
        ubmd.run(SMALL, EMT(), copper, listener=listen, progress=False)
    assert not ubmd.Run("run").finished
    run = ubmd.run(SMALL, EMT(), copper, listener=seen.append, progress=False)
    assert run.finished
    assert len(run.dataset) == 10
    kinds = {type(event) for event in seen}
    wanted = {"Epoch", "IterationDone", "LabelAppended", "LabelDone", "MDSteps", "ReplicaDone", "RunDone", "RunStarted"}
    assert wanted <= {kind.__name__ for kind in kinds}
    epoch = next(event for event in seen if isinstance(event, ubmd.events.Epoch))
    assert epoch.epochs == 4
    assert epoch.valid_force_rmse_eV_per_A > 0.0
    assert sorted(e.label for e in run.events() if isinstance(e, ubmd.events.LabelAppended)) == list(range(10))
    assert capfd.readouterr().out == ""


def test_progress_is_that_of_the_command(here: Path, copper: Atoms, capfd) -> None:
    ubmd.run(SMALL, EMT(), copper)
    out = capfd.readouterr().out
    assert "[  0] trained on 6 labels" in out
    assert "Done after" in out


def test_settings_may_be_a_file(here: Path, copper: Atoms) -> None:
    Path("sub").mkdir()
    copper.write("sub/start.extxyz")
    lines = [
        'run_dir = "run"',
        'start = {file = "start.extxyz", count = 6}',
        'reference = {calculator = "ase.calculators.emt:EMT"}',
        "loop = {labels = 6}",
        "training = {epochs = 2}",
    ]
    Path("sub/settings.toml").write_text("\n".join(lines))
    run = ubmd.run("sub/settings.toml", progress=False)
    assert len(run.dataset) == 6
    assert run.settings.training.epochs == 2
    assert not run.rejected
    assert run.test_set == []
    assert repr(run) == "Run('run'): 6 labels, 1 iteration, finished"
    assert run.report().is_file()
    again = ubmd.run(run.settings, progress=False) if Path("start.extxyz").exists() else run
    assert again.model == Path("run/model.pt")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (({"lop": {}}, EMT(), bulk("Cu")), "unknown key 'lop'; did you mean 'loop'"),
        (({}, None, bulk("Cu")), "nothing that labels"),
        (({}, EMT(), "Cu.xyz"), "type str is not a structure"),
        (({}, EMT(), []), "there is no structure"),
        (({}, 3, bulk("Cu")), "calculator is of type int"),
        (({"start": {"file": "a.xyz"}}, EMT(), bulk("Cu")), "structures or the setting start.file, not both"),
        (({"reference": {"calculator": "x:Y"}}, EMT(), bulk("Cu")), "calculator or the setting reference.calculator"),
        (({"start": 3}, EMT(), bulk("Cu")), "'start' is a table, got 3"),
        (({"run_dir": "run"},), "the key 'start' is missing"),
        (("none.toml",), "There is no settings file none.toml"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(here: Path, arguments, sentence: str) -> None:
    with pytest.raises(ubmd.errors.SettingsError, match=sentence):
        ubmd.run(*arguments, progress=False)
    assert list(here.iterdir()) == []


def test_a_calculator_that_fails_when_it_is_made_is_told(here: Path, copper: Atoms) -> None:
    def broken() -> EMT:
        raise RuntimeError("no licence")

    with pytest.raises(ubmd.errors.SettingsError, match=r"cannot be made: .*no licence"):
        ubmd.run(SMALL, broken, copper, progress=False)
    assert len(ubmd.run(SMALL, EMT(), copper, progress=False).dataset) == 10  # it can be mended in the same folder


@pytest.mark.quick
def test_packed_parameters_are_a_stable_text() -> None:
    first, second = (pack(LennardJones(sigma=2.0, ro=object())) for _ in range(2))
    assert first.parameters == second.parameters
    assert "sigma=2.0" in first.parameters
    assert "0x" not in first.parameters
    assert first.name == "ase.calculators.lj.LennardJones"


# ------------------------------------------------------------------------------------------ ubmd.train, ubmd.biased_md


def shaken(count: int) -> list[Atoms]:
    frames = []
    for seed in range(count):
        atoms = bulk("Cu", cubic=True)
        atoms.rattle(0.1, seed=seed)
        atoms.calc = EMT()
        atoms.get_forces(), atoms.get_stress()
        frames.append(atoms)
    return frames


TINY = {key: SMALL[key] for key in ("model", "training", "uncertainty")} | {"output_dir": "out"}


def test_training_on_objects_is_training_on_their_file(here: Path, capfd) -> None:
    frames = shaken(12)
    model = ubmd.train(frames, TINY, progress=False)
    assert capfd.readouterr().out == ""
    ubmd.train("out/training.extxyz", TINY | {"output_dir": "again"})
    assert "validation" in capfd.readouterr().out
    again = ubmd.Model("again/model.pt")
    assert [model.predict_one(atoms).energy for atoms in frames] == [
        again.predict_one(atoms).energy for atoms in frames
    ]
    assert str(model) == "Model('out/model.pt'): Cu, cutoff 5 Å"


def test_training_with_held_out_structures_and_from_a_model(here: Path) -> None:
    frames = shaken(14)
    ubmd.train(frames[:8], TINY, validation=frames[8:], progress=False)
    (record,) = [ubmd.Model("out/model.pt").metadata["uncertainty"]["forces"]]
    assert record["n_calibration"] > 0
    model = ubmd.train(frames, TINY | {"output_dir": "next"}, start="out", progress=False)
    assert Path("next/initial").is_dir()
    assert model.elements == ["Cu"]
    with pytest.raises(ubmd.errors.SettingsError, match="argument frames instead of the setting training_file"):
        ubmd.train(frames, TINY | {"training_file": "x"})
    with pytest.raises(ubmd.errors.DataError, match="no energy"):
        ubmd.train([bulk("Cu")] * 4, TINY | {"output_dir": "bare"}, progress=False)


def test_biased_md_is_that_of_a_replica(here: Path, model: Path) -> None:
    start = cluster()
    plain, same, biased = (
        ubmd.biased_md(model, start, md={"steps": 60, "frames_every": 8}, bias={"force": force, "window": 5})
        for force in (0.0, 0.0, 0.5)
    )
    np.testing.assert_array_equal(plain.frames[-1].positions, same.frames[-1].positions)
    assert np.abs(plain.frames[-1].positions - biased.frames[-1].positions).max() > 1e-6
    np.testing.assert_allclose(plain.time, 0.004 * np.arange(8), rtol=1e-12)
    found = ubmd.Model(model).predict(plain.frames)
    np.testing.assert_allclose(plain.max_u, [p.atomic_u.max() for p in found], rtol=1e-4)
    np.testing.assert_allclose(plain.u, [p.u for p in found], rtol=1e-4)
    ended = ubmd.biased_md(ubmd.Model(model), start, md={"steps": 60}, threshold=1e-9)
    assert ended.result.stopped == "threshold"
    with pytest.raises(ubmd.errors.SettingsError, match=r"unknown key 'md.step'; did you mean 'steps'"):
        ubmd.biased_md(model, start, md={"step": 60})
    with pytest.raises(ubmd.errors.SimulationError, match="element Al is not in model file"):
        ubmd.biased_md(model, bulk("Al", cubic=True))


@pytest.mark.quick
def test_names_are_listed() -> None:
    assert set(dir(ubmd)) == set(ubmd.__all__)
    assert all(hasattr(ubmd, name) for name in dir(ubmd))
