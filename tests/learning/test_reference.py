"""The reference of a run: looked at before anything is written, and named in the manifest; runs without labels."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import silicon
from command_line import ubmd
from system import cluster, make_settings, write_inputs

from ubmd.analysis.provenance import provenance_rows
from ubmd.cli.loop_progress import describe_event
from ubmd.data.extxyz import write_structures
from ubmd.errors import LabelError, SettingsError
from ubmd.files import read_json, write_json
from ubmd.learning import RunFolder, Workers, run
from ubmd.learning.dynamic.check import check as check_dynamic
from ubmd.learning.dynamic.engine import run as run_dynamic
from ubmd.learning.reference import look_at_reference, remarks
from ubmd.runs.event_records import read_event
from ubmd.runs.manifest import edited_files, open_run
from ubmd.settings import ReferenceSettings

SHORT = {"loop": {"labels": 4}, "training": {"epochs": 2}, "test": None}
OWN = """
from ase.calculators.emt import EMT

class Mine(EMT):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
"""


@pytest.fixture(scope="module")
def workers():
    with Workers(1) as pool:
        yield pool


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    write_structures(tmp_path / "start.extxyz", [cluster()])
    return RunFolder(tmp_path / "run")


def look(folder: RunFolder, workers: Workers, **reference: Any) -> dict[str, Any]:
    return look_at_reference(folder, ReferenceSettings(**reference), folder.path.parent, workers)


# --- before anything is written -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ({"calculator": "my_code:Calc"}, "there is no my_code.py in"),
        ({"calculator": "ase.calculators.emt:EMTT"}, "did you mean 'EMT'"),
        ({"calculator": "tblite", "arguments": {"methd": "GFN2-xTB"}}, "tblite"),
        ({"calculator": "openmm", "arguments": {"pdb": "none.pdb"}}, "There is no PDB file none.pdb"),
    ],
)
def test_a_run_that_cannot_label_writes_nothing(folder: RunFolder, reference: dict, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        run(make_settings(folder.path, reference=reference, test=None), folder.path.parent)
    assert not any(path for path in folder.path.iterdir() if not path.name.startswith("."))


BROKEN = {
    "exits": "import sys\nsys.exit('no licence')",
    "crashes": "import os, signal\nclass C:\n    def __init__(self): os.kill(os.getpid(), signal.SIGSEGV)\n",
    "hangs": "import time\nclass C:\n    def __init__(self): time.sleep(1000)\n",
    "ends": "import os\nclass C:\n    def __init__(self): os._exit(3)\n",
}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("exits", "SystemExit: no licence"),
        ("crashes", "'crashes:C' cannot be made: The worker process was killed by SIGSEGV"),
        ("hangs", "'hangs:C' cannot be made: It took longer than the limit of 2 s"),
        ("ends", "'ends:C' cannot be made: The worker process"),
    ],
)
def test_whatever_a_module_does_costs_only_a_worker(folder: RunFolder, workers: Workers, name: str, words: str) -> None:
    (folder.path.parent / f"{name}.py").write_text(BROKEN[name])
    with pytest.raises(SettingsError, match=words):
        look(folder, workers, calculator=f"{name}:C", timeout=2.0)
    assert look(folder, workers, calculator="ase.calculators.emt:EMT")["packages"]


def test_kept_labels_need_no_calculator(folder: RunFolder, workers: Workers) -> None:
    """A run can be repeated from the cache on a machine without the program."""
    kept = folder.path.parent / "labels" / "ab"
    settings = {"calculator": "no_such_code.ase:Code", "cache": "labels"}
    with pytest.raises(SettingsError, match="pip install no_such_code"):
        look(folder, workers, **settings)
    kept.mkdir(parents=True)
    (kept / "abcd.extxyz").write_text("a label")
    assert look(folder, workers, **settings) == {}


def test_a_run_with_labels_goes_on_without_its_reference(folder: RunFolder, workers: Workers) -> None:
    """It may have ended: its report, or a resume on another machine, needs none."""
    folder.path.mkdir()
    folder.dataset.write_text("a label")
    assert look(folder, workers, calculator="no_such_code:Code") == {}


# --- runs without labels ------------------------------------------------------------------------------------------


def begin(folder: RunFolder, inputs: str = "a", **tables: Any) -> dict[str, list[Any]]:
    folder.path.mkdir(exist_ok=True)
    return open_run(folder, make_settings(folder.path, **tables), {"start.file": inputs})[1]


def test_a_run_without_labels_takes_any_settings(folder: RunFolder) -> None:
    begin(folder, reference={"calculator": "my_code:Calc"})
    for path in (folder.events, folder.rejected, folder.path / "basis.npz"):
        path.write_text("old")
    changes = begin(folder, reference={"calculator": "ase.calculators.emt:EMT"}, md={"steps": 7})
    assert changes["reference.calculator"] == ["my_code:Calc", "ase.calculators.emt:EMT"]
    assert read_json(folder.manifest)["settings"]["md"]["steps"] == 7
    aside = {path.name.split(".")[0] for path in (folder.path / "aside").iterdir()}
    assert aside == {"manifest", "events", "rejected", "basis"}
    begin(folder, "b", md={"steps": 7})  # another start file
    assert read_json(folder.manifest)["inputs"] == {"start.file": "b"}
    # also one that a version of another format has begun, and fewer labels
    write_json(folder.manifest, read_json(folder.manifest) | {"format": 1})
    begin(folder, "b", loop={"labels": 5})
    assert read_json(folder.manifest)["format"] == 2
    # and one whose manifest is damaged
    for damage in ("", "{", '{"format": 2}'):
        folder.manifest.write_text(damage)
        begin(folder, "b", loop={"labels": 5})
        assert read_json(folder.manifest)["settings"]["loop"]["labels"] == 5
    # and one of dynamic training
    (folder.path.parent / "silicon.extxyz").touch()
    open_run(folder, silicon.make_settings(folder.path), {})
    assert "dynamic" in read_json(folder.manifest)["settings"]


def test_the_same_settings_keep_the_manifest_of_a_run_without_labels(folder: RunFolder) -> None:
    begin(folder)
    write_json(folder.manifest, read_json(folder.manifest) | {"created": "long ago"})
    begin(folder)
    assert read_json(folder.manifest)["created"] == "long ago"
    assert not (folder.path / "aside").exists()


@pytest.mark.parametrize(
    "label",
    [
        "dataset.extxyz",
        "start/label_002.extxyz",
        "iterations/iter_000/labels/label_000.extxyz",
        "rounds/round_0003/labels/label_000.extxyz",
        "test/trajectory_000.extxyz",
        "aside/start.2026-01-01/label_000.extxyz",
    ],
)
def test_one_label_settles_the_settings(folder: RunFolder, label: str) -> None:
    begin(folder)
    (folder.path / label).parent.mkdir(parents=True, exist_ok=True)
    (folder.path / label).write_text("a label")
    with pytest.raises(SettingsError, match=r"md.steps = 40, now it is 50"):
        begin(folder, md={"steps": 50})
    with pytest.raises(SettingsError, match=r"content of start.file has changed"):
        begin(folder, "b")


REMARK = "Remark: reference.arguments: passed on to own_code:Mine, which does not name them: fixed_cutof."


def test_a_start_without_any_label_can_be_mended_in_the_same_folder(folder: RunFolder) -> None:
    """All start structures are rejected; with another calculator the same folder gives the run of a fresh one."""
    base = folder.path.parent
    atoms = cluster()
    atoms.positions[:, 0] += 101.0 - atoms.positions[0, 0]
    write_structures(base / "start.extxyz", [atoms])
    with pytest.raises(LabelError, match="Only 0 of 4 start structures"):
        run(make_settings(folder.path, **SHORT, reference={"calculator": "unkind:UnkindEMT"}), base)
    (base / "own_code.py").write_text(OWN)
    right = make_settings(
        folder.path, **SHORT, reference={"calculator": "own_code:Mine", "arguments": {"fixed_cutof": True}}
    )
    events: list[dict] = []
    run(right, base, events.append)
    run(make_settings(base / "fresh", **SHORT), base)
    assert folder.dataset.read_bytes() == RunFolder(base / "fresh").dataset.read_bytes()
    assert not folder.rejected.exists()
    changes = [event["changes"] for event in events if event["event"] == "settings_changed"]
    assert [change["reference.calculator"] for change in changes] == [["unkind:UnkindEMT", "own_code:Mine"]]
    # what was passed on is said once, in the output of this run, and stays in its manifest
    run(right, base, events.append)
    assert [describe_event(read_event(event)) for event in events].count(REMARK) == 1
    rows = dict(map(tuple, provenance_rows(folder)))
    assert rows["reference calculator"] == f"own_code:Mine; ase {version('ase')}"
    assert rows["SHA-256 of own_code.py"] == hashlib.sha256(OWN.encode()).hexdigest()
    assert rows["arguments not in the signature of the calculator"] == "fixed_cutof"


# --- what labels --------------------------------------------------------------------------------------------------


def test_the_manifest_names_what_labels(folder: RunFolder, workers: Workers) -> None:
    base = folder.path.parent
    assert look(folder, workers, calculator="ase.calculators.emt:EMT") == {
        "packages": {"ase": version("ase")},
        "files": {},
        "programs": {},
        "unrecognised": [],
    }
    (base / "own_code.py").write_text(OWN)
    record = look(folder, workers, calculator="own_code:Mine", arguments={"fixed_cutof": True})
    assert record["files"] == {"own_code.py": hashlib.sha256(OWN.encode()).hexdigest()}
    assert record["unrecognised"] == ["fixed_cutof"]
    lammps = {"elements": ["Si"], "commands": ["pair_style sw", "pair_coeff * * Si.sw Si"]}
    assert look(folder, workers, calculator="lammps", arguments=lammps)["packages"]["lammps"] == version("lammps")
    (base / "pw.x").write_text("#!/bin/sh\n")
    (base / "pw.x").chmod(0o755)
    espresso = {"pseudopotentials": {}, "command": str(base / "pw.x")}
    assert look(folder, workers, calculator="espresso", arguments=espresso)["programs"] == {"pw.x": f"{base}/pw.x"}


def test_tblite_made_every_label_and_openmm_none(folder: RunFolder, workers: Workers) -> None:
    pytest.importorskip("tblite")
    record = look(folder, workers, calculator="tblite", arguments={"charge": 1})
    assert record["packages"]["tblite"] == version("tblite")
    settings = make_settings(folder.path, reference={"calculator": "tblite"})
    folder.path.mkdir()
    open_run(folder, settings, {}, reference=record)
    rows = dict(map(tuple, provenance_rows(folder)))
    assert rows["reference calculator"] == f"tblite; tblite {version('tblite')}"
    assert "openmm" not in str(rows).lower()


def test_weights_of_a_foundation_model_are_shown(folder: RunFolder) -> None:
    settings = make_settings(folder.path, reference={"calculator": "sevennet"})
    folder.path.mkdir()
    open_run(folder, settings, {}, reference={"packages": {"sevenn": "0.13.0"}, "model": "7net-0"})
    rows = dict(map(tuple, provenance_rows(folder)))
    assert rows["reference calculator"] == "sevennet; sevenn 0.13.0; model 7net-0"


def test_manifests_of_earlier_versions_are_shown(folder: RunFolder) -> None:
    begin(folder, reference={"calculator": "tblite"})
    manifest = read_json(folder.manifest)
    del manifest["reference"]
    manifest["packages"]["openmm"] = "8.1"
    write_json(folder.manifest, manifest)
    rows = dict(map(tuple, provenance_rows(folder)))
    assert rows["reference calculator"] == "tblite"
    assert "openmm" not in rows["packages"]
    manifest["settings"]["reference"]["calculator"] = "openmm"
    write_json(folder.manifest, manifest)
    assert "openmm 8.1" in dict(map(tuple, provenance_rows(folder)))["packages"]


def test_an_edited_module_of_the_reference_is_named(folder: RunFolder, workers: Workers) -> None:
    base, module = folder.path.parent, folder.path.parent / "my_calculator.py"
    module.write_text(OWN)
    record = look(folder, workers, calculator="my_calculator:Mine")
    folder.path.mkdir()
    open_run(folder, make_settings(folder.path, reference={"calculator": "my_calculator:Mine"}), {}, reference=record)
    assert list(edited_files(folder.read_manifest(), base)) == []
    module.write_text(OWN + "# edited\n")
    (text,) = edited_files(folder.read_manifest(), base)
    assert text.startswith("my_calculator.py (reference.calculator) has changed since the run was started")


def test_check_prints_remarks(tmp_path: Path) -> None:
    write_inputs(tmp_path, tmp_path / "run")
    (tmp_path / "own_code.py").write_text(OWN)
    changes = ["--set", "reference.calculator=own_code:Mine", "--set", "reference.arguments={fixed_cutof=true}"]
    checked = ubmd("check", "settings.toml", *changes, cwd=tmp_path)
    assert (checked.returncode, checked.stdout.count(f"{REMARK}\n")) == (0, 1), checked.stderr


def test_remarks() -> None:
    settings = ReferenceSettings(calculator="a:B")
    assert remarks({}, settings) == remarks({"unrecognised": []}, settings) == []
    assert "not name them: x, y." in remarks({"unrecognised": ["x", "y"]}, settings)[0]


# --- dynamic training ---------------------------------------------------------------------------------------------


def test_dynamic_runs_look_at_their_reference_too(tmp_path: Path) -> None:
    silicon.write_inputs(tmp_path, tmp_path / "run")
    wrong = silicon.make_settings(tmp_path / "run", reference={"calculator": "lamps"})
    for function in (run_dynamic, lambda *arguments: list(check_dynamic(*arguments))):
        with pytest.raises(SettingsError, match="did you mean 'lammps'"):
            function(wrong, tmp_path)
    assert not (tmp_path / "run" / "manifest.json").exists()
    emt = {"calculator": "ase.calculators.emt:EMT", "arguments": {"fixed_cutof": True}}
    lines = list(check_dynamic(silicon.make_settings(tmp_path / "run", reference=emt), tmp_path))
    assert lines[-1].startswith("Remark: reference.arguments: passed on to ase.calculators.emt:EMT")
