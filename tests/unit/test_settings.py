"""Settings: every mistake is one sentence that names the key and what to write instead."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel, ValidationError

from ubmd.errors import SettingsError
from ubmd.runs.schedules import DYNAMIC, LOOP, schedule_of_file
from ubmd.settings import RunSettings, Table, TrainSettings, load_settings
from ubmd.settings.dynamic import DynamicRunSettings

EXAMPLES = Path(__file__).parents[2] / "lammps_examples"

RUN = """
run_dir = "my_run"
seed = 3
[start]
file = "start.extxyz"
[reference]
calculator = "openmm"
arguments = {pdb = "a.pdb", cmap = false}
[bias]
species = {H = 0.0}
[variables.torsions]
phi = [4, 6, 8, 14]
"""


@pytest.fixture
def run_file(tmp_path) -> Path:
    (tmp_path / "run.toml").write_text(RUN)
    return tmp_path / "run.toml"


def test_values_and_defaults_of_the_published_settings(run_file):
    settings = load_settings(run_file, RunSettings)
    assert settings.bias.species == {"H": 0.0}
    assert settings.reference.arguments == {"pdb": "a.pdb", "cmap": False}
    assert settings.variables.torsions == {"phi": (4, 6, 8, 14)}
    training = settings.training
    assert (training.energy_weight, training.force_weight, training.stress_weight) == (1.0, 4.0, 0.01)
    assert (training.learning_rate, training.learning_rate_radial) == (0.03, 0.02)
    assert (training.learning_rate_shift, training.learning_rate_scale) == (0.05, 0.001)
    assert (training.batch_size, training.epochs) == (5, 1000)
    with pytest.raises(ValidationError):
        settings.seed = 4


def test_overrides_are_toml_values_and_win(run_file):
    overrides = ["seed=9", "model.hidden=[8, 8]", "md.temperature = 600", "run_dir=other", "bias.species={H=1.0}"]
    settings = load_settings(run_file, RunSettings, [*overrides, "variables.torsions.psi=[6, 8, 14, 16]"])
    assert (settings.seed, settings.model.hidden, settings.md.temperature) == (9, (8, 8), 600.0)
    assert settings.run_dir == Path("other")
    assert settings.bias.species == {"H": 1.0}
    assert sorted(settings.variables.torsions) == ["phi", "psi"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("md.temprature=300", r"unknown key 'md\.temprature'; did you mean 'temperature'\?"),
        ("sed=1", r"unknown key 'sed'; did you mean 'seed'\?"),
        ("traning.epochs=1", r"unknown key 'traning'; did you mean 'training'\?"),
        ("test.sampling.fames=1", r"unknown key 'test\.sampling\.fames'; did you mean 'frames'\?"),
        ("md.timestep=-1", r"'md\.timestep': Input should be greater than 0 \(got -1\)\."),
        ("md.steps=many", r"'md\.steps': Input should be a valid integer.* \(got 'many'\)\."),
        ("model.size=huge", r"'model\.size': Input should be 'light' or 'paper' \(got 'huge'\)\."),
        ("loop.labels=4", r"loop\.labels = 4 is less than start\.count = 8\."),
        ("variables.torsions.phi=[1, 2]", r"'variables\.torsions\.phi' has too few values \(got \[1, 2\]\)\."),
        ("variables.torsions.phi=[1, 2, 3, 'x']", r"'variables\.torsions\.phi': Input should be a valid integer"),
        ("variables.torsion.phi=[1, 2, 3, 4]", r"unknown key 'variables\.torsion'; did you mean 'torsions'\?"),
        (
            "temperature=300",
            r"unknown key 'temperature'; did you mean 'md\.temperature' or .*'test\.sampling\.temperature",
        ),
        ("loop.batch=3", r"unknown key 'loop\.batch'; did you mean 'selection\.batch'\?"),
        ("md.tau=0.3", r"unknown key 'md\.tau'; did you mean '\w+'\?"),
        ("md=3", r"'md' is a table: write its keys below a line \[md\] \(got 3\)\."),
        ("md.pressures=[250.0, -250.0]", r": a pressure needs a barostat: set md\.ensemble = 'npt'\.$"),
        ("md.temperatures=[300.0, -1.0]", r": every value of md\.temperatures must be greater than 0, not -1\.$"),
        ("md.coupling=xy", r"'md\.coupling': Input should be 'iso', 'aniso' or 'tri'"),
        ("bias.stress=0.5", r": a bias stress needs a barostat: set md\.ensemble = 'npt', or bias\.stress = 0\.$"),
        ("bias.ramp.stress=[0.0, 0.5]", r": a bias stress needs a barostat"),
        ("bias.ramp.force=[0.1, -0.5]", r": every value of bias\.ramp\.force must be at least 0, not -0\.5\.$"),
        ("bias.ramp.force=[0.1]", r"'bias\.ramp\.force' has too few values"),
        ("bias.ramp.tau=[0.1, 0.2]", r"unknown key 'bias\.ramp\.tau'; did you mean '\w+'\?"),
        ("loop.label_budget=4", r"loop\.label_budget = 4 is less than start\.count = 8\."),
        ("loop.calibration_share=0.95", r"loop\.validation_share and loop\.calibration_share add up to 1\.05"),
        ("seed.x=1", r"--set seed\.x=1: 'seed' is a value, not a table\."),
        ("seed", r"--set needs key=value, got 'seed'\."),
        ("=1", r"--set needs key=value, got '=1'\."),
    ],
)
def test_mistakes_are_named(run_file, change, message):
    with pytest.raises(SettingsError, match=message) as caught:
        load_settings(run_file, RunSettings, [change])
    assert "\n" not in str(caught.value)


def test_no_threshold_is_plain_json_and_comes_back(run_file):
    settings = load_settings(run_file, RunSettings, ["loop.threshold=inf"])
    assert settings.loop.threshold == float("inf")
    text = json.dumps(settings.model_dump(mode="json"), allow_nan=False)
    assert RunSettings.model_validate(json.loads(text)) == settings


def test_a_list_and_a_ramp_exclude_each_other(run_file):
    changes = ["md.temperatures=[300.0, 600.0]", "md.ramp.temperature=[300.0, 600.0]"]
    with pytest.raises(SettingsError, match=r"md\.temperatures and md\.ramp\.temperature cannot both be set"):
        load_settings(run_file, RunSettings, changes)


@pytest.mark.parametrize(
    ("kind", "method", "wanted"),
    [("distance", "max_det", "max_dist"), ("distance", "max_dist", None), ("last-layer", "max_det", None)],
)
def test_selection_must_fit_the_uncertainty(run_file, kind, method, wanted):
    overrides = [f"uncertainty.kind={kind}", f"selection.method={method}"]
    if wanted is None:
        assert load_settings(run_file, RunSettings, overrides).selection.method == method
        return
    with pytest.raises(SettingsError, match=rf"'{method}' cannot be used with .*'{kind}'; use '{wanted}'"):
        load_settings(run_file, RunSettings, overrides)


def test_typo_of_a_required_key_is_reported_as_a_typo(tmp_path):
    (tmp_path / "t.toml").write_text('training_fil = "a.extxyz"\noutput_dir = "out"\n')
    with pytest.raises(SettingsError, match=r"unknown key 'training_fil'; did you mean 'training_file'\?"):
        load_settings(tmp_path / "t.toml", TrainSettings)
    (tmp_path / "t.toml").write_text('output_dir = "out"\n')
    with pytest.raises(
        SettingsError, match=r"t\.toml: the key 'training_file' is missing \(structures with labels: extxyz, .*\)\."
    ):
        load_settings(tmp_path / "t.toml", TrainSettings)
    (tmp_path / "t.toml").write_text('run_dir = "out"\n')
    with pytest.raises(SettingsError, match=r"the key 'start' is missing \(What the loop starts from\)\."):
        load_settings(tmp_path / "t.toml", RunSettings)
    (tmp_path / "t.toml").write_text('run_dir = "out"\nstart = {file = "a"}\n[reference]\n')
    with pytest.raises(SettingsError, match=r"the key 'reference\.calculator' is missing \('openmm'"):
        load_settings(tmp_path / "t.toml", RunSettings)


def test_files_that_are_no_settings(tmp_path):
    with pytest.raises(SettingsError, match=r"There is no settings file .*missing\.toml\."):
        load_settings(tmp_path / "missing.toml", RunSettings)
    (tmp_path / "bad.toml").write_text("seed = = 1\n")
    with pytest.raises(SettingsError, match=r"bad\.toml is not valid TOML: .*line 1"):
        load_settings(tmp_path / "bad.toml", RunSettings)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingsError, match=r"binary\.toml cannot be read as a settings file"):
        load_settings(tmp_path / "binary.toml", RunSettings)
    with pytest.raises(SettingsError, match="cannot be read as a settings file"):
        load_settings(tmp_path, RunSettings)


def test_a_byte_order_mark_is_no_part_of_the_settings(run_file):
    run_file.write_bytes(b"\xef\xbb\xbf" + run_file.read_bytes())
    assert load_settings(run_file, RunSettings).seed == 3
    assert schedule_of_file(run_file) is LOOP
    run_file.write_bytes(b"\xef\xbb\xbf[dynamic]\n")
    assert schedule_of_file(run_file) is DYNAMIC


def test_settings_survive_json(run_file):
    settings = load_settings(run_file, RunSettings)
    assert RunSettings.model_validate(json.loads(settings.model_dump_json())) == settings


def tables(kind: type[BaseModel]) -> set[type[BaseModel]]:
    found = {kind}
    for field in kind.model_fields.values():
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, Table):
                found |= tables(part)
    return found


@pytest.mark.parametrize("kind", [RunSettings, TrainSettings])
def test_every_key_is_described(kind):
    """A table, or a key with a description (where its unit is)."""
    undescribed = [
        f"{table.__name__}.{name}"
        for table in tables(kind)
        for name, field in table.model_fields.items()
        if not field.description and not any(issubclass(t, Table) for t in tables_of(field.annotation))
    ]
    assert not undescribed
    assert len(tables(kind)) >= 4


UNIT = re.compile(
    r"Å|eV|\bps\b|(, | )(fs|s|K|MPa|GPa)\b|\(no unit\)|"  # what is measured, or that there is nothing to measure
    r"\b(steps|epochs|labels|structures|frames|replicas|copies|iterations|evaluations|networks|members|neurons|threads|"
    r"functions|projections|features|trajectories|atom indices|tasks|processes|ranks|cores|nodes|models|times|often|"
    r"batches|seed)\b"  # what is counted
)


def numbers_in(annotation: object) -> set[object]:
    """int and float, wherever they stand in a type."""
    inner = [part for argument in get_args(annotation) for part in numbers_in(argument)]
    return {annotation} & {int, float} | set(inner)


@pytest.mark.parametrize("kind", [RunSettings, TrainSettings])
def test_every_number_names_its_unit(kind):
    """A unit, what it counts, or the words that it has none."""
    fields = [(table, name, field) for table in tables(kind) for name, field in table.model_fields.items()]
    numeric = [item for item in fields if numbers_in(item[2].annotation) and not tables_of(item[2].annotation)]
    silent = [
        f"{t.__name__}.{name}: {field.description}" for t, name, field in numeric if not UNIT.search(field.description)
    ]
    assert not silent
    assert len(numeric) > 20
    floats = [(t, name, f.description) for t, name, f in numeric if float in numbers_in(f.annotation)]
    uncounted = re.compile(UNIT.pattern.partition(r"|\b(steps")[0])
    assert not [item for item in floats if not uncounted.search(item[2])]


def test_schema_tells_editors_every_key():
    printed = subprocess.run(
        [sys.executable, "-c", "from ubmd.cli.main import app; app()", "schema"], capture_output=True, check=True
    )
    schema = json.loads(printed.stdout)
    assert schema_keys(schema) == {f"{t.__name__}.{name}" for t in tables(RunSettings) for name in t.model_fields}
    assert schema["$defs"]["ModelSettings"]["properties"]["r_min"]["description"] == "centre of the first Gaussian, Å"
    assert schema["additionalProperties"] is False


def schema_keys(schema: dict) -> set[str]:
    """Keys that a schema knows, by table."""
    named = {"RunSettings": schema, **schema["$defs"]}
    return {f"{table}.{key}" for table, part in named.items() for key in part["properties"]}


def tables_of(annotation: object) -> list[type]:
    parts = (annotation, *getattr(annotation, "__args__", ()))
    return [part for part in parts if isinstance(part, type) and issubclass(part, Table)]


CRYSTAL = """
training_file = "training.extxyz"
output_dir = "fit"
[crystal]
structure = "silicon.extxyz"
[crystal.cutoffs]
2 = 5.4
3 = 4.0
"""


@pytest.fixture
def crystal_file(tmp_path) -> Path:
    (tmp_path / "crystal.toml").write_text(CRYSTAL)
    return tmp_path / "crystal.toml"


def test_crystal_table(crystal_file):
    crystal = load_settings(crystal_file, TrainSettings, ["crystal.cutoffs.4=4", "uncertainty.alpha=0.1"]).crystal
    assert crystal.cutoffs == {2: 5.4, 3: 4.0, 4: 4.0}
    assert list(crystal.cutoffs) == [2, 3, 4]
    assert (crystal.max_displacement, crystal.energies, crystal.caution) == (None, False, 0.5)
    with pytest.raises(SettingsError, match=r"no file .*silicon.extxyz for crystal.structure"):
        crystal.structure_file(crystal_file.parent)
    (crystal_file.parent / "silicon.extxyz").touch()
    assert crystal.structure_file(crystal_file.parent) == crystal_file.parent / "silicon.extxyz"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["crystal.cutoffs.7=4"], "crystal.cutoffs has no order '7'; did you mean '6'?"),
        (["crystal.cutoffs.pairs=4"], "crystal.cutoffs has no order 'pairs'; did you mean '2'?"),
        (["crystal.cutoffs.5=4"], "crystal.cutoffs lacks order 4; give a cutoff in Å for every order"),
        (["crystal.cutoffs={}"], "crystal.cutoffs lacks order 2"),
        (["crystal.cutoffs.3=-1"], "crystal.cutoffs.3 must be a length above zero, Å, not -1"),
        (["crystal.cutoffs.3=nan"], "crystal.cutoffs.3 must be a length above zero, Å, not nan"),
        (["crystal.cutoff=5"], "unknown key 'crystal.cutoff'; did you mean 'cutoffs'?"),
        (["crystal.max_displacement=0"], "'crystal.max_displacement': Input should be greater than 0"),
        (["model.cutoff=4"], r"[model] is for networks and [crystal] trains a force-constant potential; remove one"),
        (["training.epochs=4"], r"[training] is for networks"),
        (["uncertainty.projections=4"], "uncertainty.projections has no effect on a force-constant potential"),
    ],
)
def test_mistakes_of_crystals_are_one_sentence(crystal_file, overrides, sentence):
    with pytest.raises(SettingsError, match=re.escape(sentence)) as error:
        load_settings(crystal_file, TrainSettings, overrides)
    assert str(error.value).count("\n") == 0


def test_a_crystal_needs_its_structure(crystal_file):
    crystal_file.write_text(CRYSTAL.replace("structure =", "# structure ="))
    with pytest.raises(SettingsError, match=r"the key 'crystal.structure' is missing \(file of the ideal crystal"):
        load_settings(crystal_file, TrainSettings)


def test_traces_meet_evaluations(run_file):
    assert load_settings(run_file, RunSettings).md.trace_every is None
    assert load_settings(run_file, RunSettings, ["md.trace_every=20", "bias.every=4"]).md.trace_every == 20
    with pytest.raises(SettingsError, match=r"md.trace_every = 10 must be a multiple of bias.every = 4"):
        load_settings(run_file, RunSettings, ["md.trace_every=10", "bias.every=4"])


@pytest.mark.parametrize(
    ("labels", "new", "wanted"),
    [(8, None, 300), (12, 4, 200), (48, 8, 167), (100, 10, 100), (1000, 10, 10), (5000, 10, 10)],
)
def test_epochs_fall_with_the_share_of_new_labels(run_file, labels, new, wanted):
    """A warm start takes loop.warm_epochs, or loop.warm_visits times the share of new labels, but at least 10."""
    settings = load_settings(run_file, RunSettings, ["training.epochs=300", "loop.warm_visits=1000"])
    assert settings.loop.warm_epochs == 200
    assert settings.epochs(labels, new) == wanted


def test_epochs_without_a_limit(run_file):
    settings = load_settings(run_file, RunSettings, ["loop.warm_visits=0"])
    assert settings.epochs(5000, 10) == settings.loop.warm_epochs


SETTINGS = sorted(path for path in EXAMPLES.glob("*/*.toml") if path.stem not in ("rows", "published"))


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_settings_of_the_examples_are_read(path: Path) -> None:
    kinds = {"final": TrainSettings, "train": TrainSettings, "dynamic": DynamicRunSettings}
    load_settings(path, kinds.get(path.stem.partition("_")[0], RunSettings))
