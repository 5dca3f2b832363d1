"""The record of a model file is read without running the file, and is the only one that counts."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from ase.build import molecule
from hostile import RECORD, Talker, Victim, Waker, members, write_hostile
from small_model import ELEMENTS, SETTINGS, labelled
from typer.testing import CliRunner

from ubmd.calculator import Model
from ubmd.cli.train import register
from ubmd.errors import ModelError
from ubmd.potentials.file import load_model
from ubmd.potentials.gmnn.export import export_model
from ubmd.potentials.gmnn.model import GaussianMomentNetwork
from ubmd.potentials.record import read_record
from ubmd.settings import UncertaintySettings

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def info(*arguments: object) -> tuple[int, str, str]:
    """`ubmd info`: exit status, standard output, standard error."""
    app = typer.Typer()
    register(app)
    result = CliRunner().invoke(app, ["info", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict]]:
    """kind -> (model file as written today, what export_model said is in it)."""
    folder = tmp_path_factory.mktemp("made")
    structures = [labelled(molecule("CH3OH"), seed) for seed in range(4)]
    files = {}
    for kind in ("posterior", "last-layer", "distance", "ensemble"):
        settings = UncertaintySettings(kind=kind, projections=8, members=2)
        networks = [GaussianMomentNetwork(ELEMENTS, SETTINGS, seed=seed) for seed in range(settings.networks)]
        path = folder / f"{kind}.pt"
        files[kind] = (
            path,
            export_model(networks, structures[:2], structures[2:], settings, path, {"note": "Å \x1b[2J"}),
        )
    return files


def as_before(path: Path, target: Path) -> Path:
    """The file as earlier versions wrote it: without the extra file."""
    torch.jit.load(str(path)).save(str(target))
    assert not any("extra/" in name for name in members(target))
    return target


def rewritten(path: Path, target: Path, changes: dict[str, bytes | None]) -> Path:
    """A copy of an archive with members (below its folder) replaced, added or (None) left out."""
    content = members(path)
    top = next(iter(content)).partition("/")[0]
    content |= {f"{top}/{name}": text for name, text in changes.items()}  # type: ignore[dict-item]
    with zipfile.ZipFile(target, "w") as archive:
        for name, text in content.items():
            if text is not None:
                archive.writestr(name, text)
    return target


# ------------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("kind", ["posterior", "last-layer", "distance", "ensemble"])
def test_record_of_new_and_old_files(made, kind, tmp_path):
    path, said = made[kind]
    said = json.loads(json.dumps(said))
    assert json.loads(members(path)["archive/extra/ubmd.json"]) == said
    old = as_before(path, tmp_path / "old.pt")
    for file in (path, old):
        assert read_record(file) == said
        assert Model(file).metadata == said
        assert json.loads(load_model(file).metadata()) == said
    atoms = molecule("CH3OH")
    one, other = (Model(file, "double").predict_one(atoms).forces for file in (path, old))
    np.testing.assert_array_equal(one, other)


def test_the_record_that_lies_beside_the_code_is_the_one_that_is_read(made, tmp_path):
    path, said = made["posterior"]
    other = rewritten(path, tmp_path / "other.pt", {"extra/ubmd.json": json.dumps(said | {"note": "new"}).encode()})
    assert read_record(other)["note"] == "new"
    with pytest.raises(ModelError, match="is refused: its code gives another description than its record"):
        Model(other)


def test_reading_a_record_needs_no_torch(made, tmp_path):
    code = (
        "import sys; from ubmd.potentials.record import read_record; "
        "print(read_record(sys.argv[1])['model'], 'torch' in sys.modules)"
    )
    old = as_before(made["posterior"][0], tmp_path / "old.pt")
    for path in (made["posterior"][0], old):
        done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
        assert done.stdout == "gmnn False\n"


def test_info_prints_the_record_without_control_characters(made, tmp_path):
    for path in (made["posterior"][0], as_before(made["posterior"][0], tmp_path / "old.pt")):
        status, out, _ = info(path)
        assert status == 0
        assert "H C N O" in out
        assert "Å \\x1b[2J" in out
        assert "\x1b[2J" not in out
        assert json.loads(info(path, "--json")[1]) == read_record(path)


# ------------------------------------------------------------------------------------------ hostile files


@pytest.mark.parametrize("kind", [Talker, Waker])
@pytest.mark.parametrize("record", [None, RECORD])
def test_info_runs_nothing(kind, record, tmp_path):
    victim, path = Victim(tmp_path), tmp_path / "model.pt"
    write_hostile(path, victim, kind, record)
    status, out, err = info(path)
    assert not victim.harmed
    if kind is Waker and record is None:  # its state is no dictionary: no attribute has a name
        assert status == 1
        assert "has no record that can be read without running it" in err
    else:
        assert status == 0
        assert json.loads(info(path, "--json")[1]) == RECORD
        assert "cutoff" in out
    assert not victim.harmed
    torch.jit.load(str(path)).metadata()  # the attack is a real one
    assert victim.harmed


class Command:
    """A pickle that runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_pickles_of_old_files_call_nothing(made, tmp_path):
    old = as_before(made["posterior"][0], tmp_path / "old.pt")
    marker = tmp_path / "marker"
    command = Command(f"touch {marker}")
    pickle.loads(pickle.dumps(command))
    assert marker.exists()  # the attack is a real one
    marker.unlink()
    hidden = {"description": json.dumps(RECORD), "hidden": command}
    bomb = b"\x80\x02}r\xff\xff\xff\x7f."  # claims 2^31 objects
    deep = b"\x80\x02" + b"(" * 100_000 + b"l" * 100_000 + b"."
    scripts = (
        *(pickle.dumps(value, protocol) for value in (command, hidden, [command]) for protocol in (0, 2, 5)),
        f"cbuiltins\nexec\n(V__import__('pathlib').Path({str(marker)!r}).touch()\ntR.".encode(),
        f"(ios\nsystem\nVtouch {marker}\n.".encode(),
        f"c__torch__.a\nB\n)\x81}}(V__setstate__\ncos\nsystem\nubVtouch {marker}\nb.".encode(),
        bomb,
        deep,
        b"",
        b"no pickle",
    )
    for script in scripts:
        path = rewritten(old, tmp_path / "model.pt", {"data.pkl": script})
        status, _, err = info(path)
        assert status == 1
        assert re.fullmatch(r"Error: .*(is not a ubmd model file|has no record that can be read).*\n", err)
        assert not marker.exists()


def test_objects_of_old_files_are_left_out(made, tmp_path):
    """A description beside a hostile attribute: it is read, and nothing is called."""
    marker = tmp_path / "marker"
    head = b"\x80\x02c__torch__.a\nB\n)\x81}(X\x0b\x00\x00\x00description"
    text = json.dumps(RECORD).encode()
    script = head + b"X" + len(text).to_bytes(4, "little") + text
    script += f"V_hidden\ncos\nsystem\n(Vtouch {marker}\ntRub.".encode()
    old = as_before(made["posterior"][0], tmp_path / "old.pt")
    assert read_record(rewritten(old, tmp_path / "model.pt", {"data.pkl": script})) == RECORD
    assert not marker.exists()


def test_a_file_that_says_something_else_when_it_is_run_is_refused(tmp_path):
    victim, path = Victim(tmp_path), tmp_path / "model.pt"
    write_hostile(path, victim, Talker, RECORD | {"elements": ["Au"]})
    assert info(path)[0] == 0
    with pytest.raises(ModelError, match=r"model.pt is refused: its code gives another description"):
        load_model(path)


# ------------------------------------------------------------------------------------------ damaged files

DAMAGED = {
    "no JSON": (b"{", "is not a ubmd model file"),
    "empty": (b"", "is not a ubmd model file"),
    "no UTF-8": (b"\xff\xfe\xfa", "is not a ubmd model file"),
    "no table": (b"[1]", "is not a ubmd model file"),
    "deep": (b"[" * 200_000, "is not a ubmd model file"),
    "newer": ({"format": 99}, r"has format 99, but ubmd .* reads up to 4; upgrade"),
    "format": ({"format": "1"}, r"damaged \(format is not a number\)"),
    "cutoff as text": ({"cutoff": "4.0"}, r"damaged \(cutoff is not a positive length\)"),
    "no number": ({"cutoff": float("nan")}, r"damaged \(cutoff is not a positive length\)"),
    "infinite": ({"cutoff": float("inf")}, r"damaged \(cutoff is not a positive length\)"),
    "true": ({"cutoff": True}, r"damaged \(cutoff is not a positive length\)"),
    "negative": ({"cutoff": -1.0}, r"damaged \(cutoff is not a positive length\)"),
    "elements as text": ({"elements": "H"}, r"damaged \(elements is not a list of names\)"),
    "no elements": ({"elements": []}, r"damaged \(elements is not a list of names\)"),
    "numbers": ({"elements": [1]}, r"damaged \(elements is not a list of names\)"),
    "layers": ({"format": 2, "layers": 0}, r"damaged \(layers is not a positive integer\)"),
    "layers as text": ({"format": 2, "layers": "2"}, r"damaged \(layers is not a positive integer\)"),
    "fixed": ({"format": 2, "fixed_precision": 1}, r"damaged \(fixed_precision is not true or false\)"),
    "fixed to nothing": (
        {"format": 2, "fixed_precision": True, "precision": "half"},
        r"damaged \(precision is neither float32 nor float64\)",
    ),
    "layers in format 1": (
        {"format": 1, "layers": 2, "atom_scale": None},
        r"damaged \(layers and fixed_precision need format 2\)",
    ),
}


@pytest.mark.parametrize(("change", "expected"), DAMAGED.values(), ids=list(DAMAGED))
def test_damaged_records_are_one_sentence(made, tmp_path, change, expected):
    path, said = made["posterior"]
    text = change if isinstance(change, bytes) else json.dumps(said | change).encode()
    wrong = rewritten(path, tmp_path / "wrong.pt", {"extra/ubmd.json": text})
    for use in (read_record, load_model, Model):
        with pytest.raises(ModelError, match=expected):
            use(wrong)
    status, _, err = info(wrong)
    assert status == 1
    assert err.startswith("Error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["elements", "cutoff"])
def test_records_that_lack_something(made, tmp_path, name):
    path, said = made["posterior"]
    text = json.dumps({key: value for key, value in said.items() if key != name}).encode()
    with pytest.raises(ModelError, match=f"damaged \\({name} is no"):
        read_record(rewritten(path, tmp_path / "wrong.pt", {"extra/ubmd.json": text}))


def test_a_record_without_uncertainty_is_named_when_it_is_used(made, tmp_path):
    module = torch.jit.load(str(made["posterior"][0]))
    module.description = json.dumps(RECORD | {"elements": ELEMENTS, "uncertainty": {}})
    module.save(str(tmp_path / "model.pt"))
    with pytest.raises(ModelError, match=r"The record of model file .* is damaged \('energy' is missing\)"):
        Model(tmp_path / "model.pt")


def test_crystal_records_that_lack_something(made, tmp_path):
    path, said = made["posterior"]
    for wrong in ({"lattice": 3}, {"lattice": {"species": [0]}}, {"lattice": {"species": [7]}, "regression": {}}):
        text = json.dumps(said | wrong).encode()
        status, _, err = info(rewritten(path, tmp_path / "wrong.pt", {"extra/ubmd.json": text}))
        assert status == 1
        assert "is damaged" in err


@pytest.mark.parametrize("name", ["archive/extra/ubmd.json", "archive/extra/UBMD.json", "ARCHIVE/extra/ubmd.json"])
def test_two_records_are_none(made, tmp_path, name):
    """Programs that read archives differ in which of two they take."""
    path = tmp_path / "two.pt"
    path.write_bytes(made["posterior"][0].read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, json.dumps(RECORD))
    with pytest.raises(ModelError, match=r"damaged \(it occurs 2 times\)"):
        load_model(path)


def test_a_record_that_unpacks_to_far_too_much(made, tmp_path):
    path = tmp_path / "large.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/extra/ubmd.json", b" " * (65 << 20))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(ModelError, match=r"damaged \(it has 68157440 bytes\)"):
        read_record(path)


def test_what_is_no_model_file(made, tmp_path):
    text, half, other = tmp_path / "a.pt", tmp_path / "half.pt", tmp_path / "other.zip"
    text.write_text("nothing")
    half.write_bytes(made["posterior"][0].read_bytes()[:20_000])
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("some/thing", b"")
    for path in (text, half, other):
        with pytest.raises(ModelError, match=r"is not a ubmd model file \(or it is damaged\)"):
            read_record(path)
    with pytest.raises(ModelError, match=r"There is no model file .*absent.pt"):
        read_record(tmp_path / "absent.pt")


def test_another_program_s_network_has_no_record_but_runs(made, tmp_path):
    """The interface is that of the methods: a record that only metadata() knows counts when the file is run."""

    class Foreign(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.jit.load(str(made["posterior"][0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

        @torch.jit.export
        def metadata(self) -> str:
            return self.inner.metadata()

    path = tmp_path / "foreign.pt"
    torch.jit.script(Foreign()).save(str(path))
    assert read_record(path) is None
    assert "has no record that can be read without running it" in info(path)[2]
    assert Model(path).metadata == read_record(made["posterior"][0])


def test_deep_nesting_is_an_error_whatever_limit_a_library_has_set(made, tmp_path) -> None:
    """symfc raises Python's limit when it is imported; the parser's stack would overflow before."""
    path, _ = made["posterior"]
    wrong = rewritten(path, tmp_path / "wrong.pt", {"extra/ubmd.json": b"[" * 200_000})
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(100_000)
    try:
        with pytest.raises(ModelError):
            read_record(wrong)
        assert sys.getrecursionlimit() == 100_000
    finally:
        sys.setrecursionlimit(before)


def test_settings_of_other_networks_are_not_in_the_record(made) -> None:
    """A key that is added to [model] for another kind must not change files and checkpoints of this one."""
    network = made["posterior"][1]["network"]
    assert set(network) == {"size", "cutoff", "n_radial", "n_basis", "r_min", "hidden", "elements"}
