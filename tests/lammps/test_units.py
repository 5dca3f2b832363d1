"""`units real`: the same physics in kcal/mol, with thresholds and outputs in the run's units."""

from __future__ import annotations

import numpy as np
import pytest
from ase.io import read

from ubmd import _cpp

KCAL = 23.060549  # kcal/mol per eV, LAMMPS's own factor
ATMOSPHERE_PER_BAR = 1 / 1.01325
FACTORS = {"pe": KCAL, "f_b": KCAL, **{f"f_b[{k}]": KCAL for k in (1, 2, 3)}}

RUN = """
timestep {timestep}
fix integrate all nve
fix b all ubmd force 0.25 stress 0.2 window 3 save {save} {units}.extxyz
compute p all pressure NULL pair
compute q all pressure NULL fix
compute e all pe/atom
compute se all reduce sum c_e
thermo_style custom step pe c_p[1] c_q[1] c_se
dump d all custom 2 dump.{units} id x y z fx fy fz f_b[1] f_b[2] f_b[3] f_b[4]
dump_modify d sort id format float %.17g
run 6
"""


def close(values, expected, tolerance):
    return np.abs(np.array(values) - expected).max() <= tolerance * np.abs(expected).max()


def test_energy_unit():
    assert _cpp.energy_unit("metal") == (1.0, "eV")
    assert _cpp.energy_unit("real") == (KCAL, "kcal/mol")
    with pytest.raises(_cpp.Error, match="must be metal or real, not electron: put 'units metal'"):
        _cpp.energy_unit("electron")


@pytest.mark.parametrize("mode", ["energy", "atomic"])
def test_real_equals_metal(lab, structures, mode):
    """Six biased steps in both: positions, energies, forces, pressures, uncertainties, scales and saved frames."""
    atoms = structures["triclinic"]
    numbers, frames = {}, {}
    outputs = ["pe", "c_se", "f_b", *(f"f_b[{k}]" for k in range(1, 9)), "c_p[1]", "c_p[5]", "c_q[1]", "c_q[5]"]
    for units, timestep, save in (("metal", 0.0005, 0.01), ("real", 0.5, 0.01 * KCAL)):
        run = RUN.format(units=units, timestep=timestep, save=save).replace("window", f"uncertainty {mode} window")
        script = lab.head(atoms).replace("units metal", f"units {units}") + run + lab.report(*outputs)
        numbers[units] = lab.run(script).numbers
        frames[units] = lab.dump(f"dump.{units}")
    metal, real = numbers["metal"], numbers["real"]
    tolerance = 1e-6  # the two unit systems' own constants differ in the seventh digit: masses move differently
    for name in outputs:
        pressure = name.startswith(("c_p", "c_q"))
        factor = ATMOSPHERE_PER_BAR if pressure else KCAL if name == "c_se" else FACTORS.get(name, 1.0)
        assert real[name][0] == pytest.approx(factor * metal[name][0], rel=tolerance), name
    assert metal["f_b[6]"][0] > 0.1
    assert abs(metal["c_q[1]"][0]) > 1.0
    for one, other in zip(frames["metal"], frames["real"], strict=True):
        assert close([other[k] for k in "xyz"], [one[k] for k in "xyz"], tolerance)
        assert close([other[f"f{k}"] for k in "xyz"], [KCAL * one[f"f{k}"] for k in "xyz"], tolerance)
        assert close(other["f_b[1]"], KCAL * one["f_b[1]"], tolerance)
        assert np.allclose(other["f_b[3]"], KCAL * one["f_b[3]"], rtol=tolerance, atol=1e-6)
    saved = [read(f"{units}.extxyz", ":") for units in ("metal", "real")]
    assert len(saved[0]) == len(saved[1]) > 0
    assert saved[1][0].info["uncertainty"] == pytest.approx(KCAL * saved[0][0].info["uncertainty"], rel=tolerance)


def test_fix_pair_and_stop_in_real(lab, structures):
    """fix pair's uncertainties and the threshold of `stop` are in kcal/mol/Å."""
    script = lab.head(structures["molecule"]).replace("units metal", "units real")
    script += "fix u all pair 1 ubmd uncertainty 1\nfix b all ubmd\nrun 0\n"
    with lab.session(script) as lammps:
        largest = lammps.extract_fix("b", 0, 1, 1)
        assert lammps.numpy.extract_fix("u", 1, 1).max() == pytest.approx(largest, rel=1e-12)
        for share, stopped in ((1.01, 0.0), (0.99, 1.0)):
            lammps.commands_string(f"unfix b\nfix b all ubmd stop {share * largest}\nrun 0")
            assert lammps.extract_fix("b", 0, 1, 6) == stopped
        lammps.command("clear")
        lammps.commands_string(lab.head(structures["molecule"]) + "fix b all ubmd\nrun 0")
        assert lammps.extract_fix("b", 0, 1, 1) == pytest.approx(largest / KCAL, rel=1e-12)
