"""One sentence for everything that can be wrong with a crystal."""

from __future__ import annotations

import json

import pytest
import torch
from crystals import head


def message_of(lab, script):
    """The error that a script ends with."""
    with pytest.raises(Exception, match="ERROR") as caught, lab.session(script):
        pass
    text = str(caught.value)
    assert "Exception raised from" not in text
    assert "frame #" not in text
    return text


def shaken(crystals):
    return crystals["zincblende"], crystals["zincblende"].shaken((2, 2, 2))[0]


TAILS = {
    "npt": ("fix 1 all npt temp 300 300 0.1 iso 0 0 1\nrun 0\n", "fix 1 npt changes the box: remove it"),
    "deform": ("fix 1 all deform 1 x scale 1.1\nrun 0\n", "fix 1 deform changes the box"),
    "box/relax": ("fix 1 all box/relax iso 0.0\nminimize 0 0 1 1\n", "fix 1 box/relax changes the box"),
    "changed box": ("run 0\nchange_box all x scale 1.01 remap\nrun 0\n", "the box is not an integer multiple"),
    "vacancy": ("group one id 3\ndelete_atoms group one compress no\nrun 0\n", "has 15 atoms of the crystal but"),
    "interstitial": (
        "create_atoms 1 single 2.0 1.0 1.5\nrun 0\n",
        "has 17 atoms of the crystal but the crystal has 16",
    ),
    "later vacancy": (
        "run 0\ngroup one id 3\ndelete_atoms group one compress no\nrun 0\n",
        "start from a crystal without vacancies",
    ),
    "other elements": ("set atom 1 type 2\nrun 0\n", "differ from those of the crystal's sites: check the names"),
    "swapped atoms": ("set atom 1 type 2\nset atom 2 type 1\nrun 0\n", "the atoms don't lie on the sites"),
    "two atoms on a site": (
        "group one id 3\ngroup other id 5\ndisplace_atoms one move 3.38 0.0 0.0 units box\nrun 0\n",
        "the atoms don't lie on the sites of the crystal (",
    ),
    "far atom": (
        "group one id 3\ndisplace_atoms one move 0.0 1.1 0.0 units box\nrun 0\n",
        "away from its site, more than the model's 0.8 A): start from the ideal crystal",
    ),
    "guard": (
        "run 0\nvelocity all create 60000.0 4 dist gaussian\nfix 1 all nve\ntimestep 0.001\nrun 1000\n",
        "A away from its site, more than the displacement limit of the force-constant model, 0.800 A: use a lower",
    ),
    "atomic bias": ("fix b all ubmd force 0.1 uncertainty atomic\nrun 0\n", "use 'uncertainty energy'"),
    "stress bias": ("fix b all ubmd stress 0.1\nrun 0\n", "whose cell is fixed: remove 'stress'"),
    "changed type": (
        "run 0\nfix 1 all nve\nrun 1\nset atom 1 type 2\nrun 1 pre no\n",
        "atoms and types must not change during a run",
    ),
}


@pytest.mark.parametrize("problem", TAILS)
def test_sentences(crystal_lab, crystals, problem):
    tail, expected = TAILS[problem]
    if problem == "changed type":
        tail = tail.replace("run 1\nset", "run 1\nneigh_modify every 1 delay 0 check no\nset")
    assert expected in message_of(crystal_lab, head(*shaken(crystals)) + tail)


def test_guard_names_step_and_atom(crystal_lab, crystals):
    text = message_of(crystal_lab, head(*shaken(crystals)) + TAILS["guard"][0])
    words = text.split()
    assert int(words[words.index("step") + 1]) > 0
    assert 1 <= int(words[words.index("atom") + 1]) <= 16


def test_box_that_changes_during_a_run(crystal_lab, crystals):
    """By a command that no fix announces."""
    script = head(*shaken(crystals)) + "fix 1 all nve\nrun 0\n"
    script += 'run 4 every 2 "change_box all x scale 1.01 remap units box"\n'
    assert "the box is not an integer multiple" in message_of(crystal_lab, script)
    script = script.replace("run 4 every 2", "run 4 pre no every 2")
    assert "the box changed at step" in message_of(crystal_lab, script)


def test_not_periodic(crystal_lab, crystals):
    crystal, atoms = shaken(crystals)
    script = head(crystal, atoms).replace("boundary p p p", "boundary p p f") + "run 0\n"
    assert "use 'boundary p p p'" in message_of(crystal_lab, script)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"species": [0]}, "the lattice in the metadata of model file model.pt is damaged"),
        ({"max_displacement": 0.0}, "the lattice in the metadata of model file model.pt is damaged"),
        ({"sites": 3}, "are not a ubmd record"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wrong_lattice(crystal_lab, crystals, change, expected):
    script = head(*shaken(crystals)) + "run 0\n"
    module = torch.jit.load("model.pt")
    record = json.loads(module.metadata())
    record["lattice"] |= change
    module.description = json.dumps(record)
    module.save("model.pt")
    assert expected in message_of(crystal_lab, script)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_sites_out_of_reach(crystal_lab, crystals):
    """Ghosts that reach as far as the cutoff says always suffice: here the file has a site farther away."""
    script = head(*shaken(crystals)) + "run 0\n"
    module = torch.jit.load("model.pt")
    record = json.loads(module.metadata())
    record["lattice"]["sites"][1][-1] = [9, 0, 0, 0]
    module.description = json.dumps(record)
    module.save("model.pt")
    assert "use a larger 'comm_modify cutoff'" in message_of(crystal_lab, script)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_file_without_the_methods_of_a_crystal(crystal_lab, crystals):
    crystal, atoms = shaken(crystals)
    script = head(crystal, atoms)
    record = torch.jit.load("model.pt").metadata()

    class Other(torch.nn.Module):
        def __init__(self, record: str) -> None:
            super().__init__()
            self.record = record

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

        @torch.jit.export
        def metadata(self) -> str:
            return self.record

    torch.jit.save(torch.jit.script(Other(record)), "model.pt")
    assert "has no method evaluate" in message_of(crystal_lab, script)


def test_error_on_two_ranks_ends_with_words(crystal_lab, crystals):
    outcome = crystal_lab.run(head(*shaken(crystals)) + TAILS["vacancy"][0], ranks=2, check=False)
    assert outcome.status != 0
    assert "has 15 atoms of the crystal but" in outcome.text
