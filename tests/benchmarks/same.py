"""Do two versions of ubmd compute the same, bit for bit? Hashes of runs and trajectories, and their comparison.

python tests/benchmarks/same.py record OUT.json --folder SCRATCH [--only quickstart silicon npt]
python tests/benchmarks/same.py compare OLD.json NEW.json

`record` runs, with the ubmd that Python finds, the quickstart example cut at 24 labels, the silicon example cut at six,
and 300 steps of NPT in LAMMPS with a bias on forces and stress, all on one thread. `compare` prints what differs and
exits with 1 if anything does. Compare records of one machine only: other processors round differently.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
UBMD = "from ubmd.cli.entry import main; main()"
MEASURED = {"seconds", "ms_per_step", "fit_seconds", "time", "created", "run_dir", "output_dir", "training_file"}
"""Keys of records that clocks and folders decide."""
NPT_STEPS, NPT_EVERY = 300, 10
Record = dict[str, Any]


def main() -> None:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run everything and write hashes")
    recording.add_argument("out", type=Path)
    recording.add_argument("--folder", type=Path, required=True, help="for the runs; must not exist")
    recording.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    comparing = commands.add_parser("compare", help="exit status 1 if two records differ")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    options = parser.parse_args()
    if options.command == "record":
        write_record(options.out, options.folder.absolute(), options.only)
        return
    old, new = (json.loads(path.read_text()) for path in (options.old, options.new))
    raise SystemExit(0 if compare(old, new) else 1)


# ------------------------------------------------------------------------------------------ recording


def write_record(out: Path, folder: Path, parts: list[str]) -> None:
    """Run the parts in new folders and write what they came to."""
    folder.mkdir(parents=True)
    found: Record = {}
    for name in parts:
        print(f"{name} ...", flush=True)
        (folder / name).mkdir()
        found |= {f"{name}/{key}": value for key, value in PARTS[name](folder / name)}
    out.write_text(json.dumps({"made_with": versions(), "found": found}, indent=1, sort_keys=True) + "\n")
    print(f"{len(found)} entries in {out}")


def versions() -> Record:
    """What made a record; not compared."""
    import torch

    import ubmd

    return {"ubmd": ubmd.__version__, "torch": torch.__version__, "processor": processor()}


def processor() -> str:
    """Name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def ubmd_command(folder: Path, *words: str) -> None:
    """The ``ubmd`` command of the package that Python finds, in a folder; it has to succeed."""
    call([sys.executable, "-c", UBMD, *words], folder)


def call(command: list[str], folder: Path) -> str:
    """Standard output of a command that has to succeed."""
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def changes(*texts: str) -> list[str]:
    """Words that change settings."""
    return [word for text in texts for word in ("--set", text)]


def quickstart(folder: Path) -> Iterator[tuple[str, Any]]:
    """The README's example with 24 labels."""
    settings = ROOT / "lammps_examples/alanine_dipeptide/quickstart.toml"
    ubmd_command(folder, "run", str(settings), *changes("loop.labels=24", "training.threads=1"))
    yield from of_run(folder / "quickstart_run")


def silicon(folder: Path) -> Iterator[tuple[str, Any]]:
    """The silicon example with six labels: force constants that are trained along a trajectory."""
    settings = ROOT / "lammps_examples/silicon/dynamic.toml"
    few = ("dynamic.labels=6", "dynamic.steps=3000", "test.sampling.frames=5", "test.sampling.equilibration=100")
    ubmd_command(folder, "run", str(settings), *changes(*few))
    yield from of_run(folder / "silicon_run")


def npt(folder: Path) -> Iterator[tuple[str, Any]]:
    """Training on strained Cu3Au with EMT labels, then a biased NPT trajectory in LAMMPS."""
    write_alloy(folder)
    (folder / "train.toml").write_text(TRAIN)
    ubmd_command(folder, "train", "train.toml")
    for name in ("model.pt", "weights.pt"):
        yield from of_file(folder / "model" / name, name)
    (folder / "in.npt").write_text(NPT)
    text = call([str(Path(sys.executable).parent / "lmp"), "-in", "in.npt", "-log", "none", "-nocite"], folder)
    rows = [line for line in text.splitlines() if line.startswith("ROW ")]
    if len(rows) != NPT_STEPS // NPT_EVERY + 1:
        raise SystemExit(f"The trajectory has {len(rows)} rows:\n{text[-2000:]}")
    for row in rows:
        yield f"row/{row.split()[1]}", row
    frames = (folder / "dump.npt").read_text().split("ITEM: TIMESTEP\n")[1:]
    for frame in frames:
        yield f"frame/{frame.split()[0]}", hashed(frame.encode())
    yield "last frame", frames[-1]


TRAIN = """
training_file = "alloy.extxyz"
validation_share = 0.2
output_dir = "model"
seed = 3
[model]
cutoff = 4.5
hidden = [32, 32]
[training]
epochs = 30
batch_size = 4
threads = 1
[uncertainty]
projections = 64
"""
COLUMNS = "id x y z vx vy vz fx fy fz f_b[1] f_b[2] f_b[3] f_b[4]"
KEYWORDS = ("step", "pe", "ke", "press", "pxy", "lx", "ly", "lz", "xy", "xz", "yz", "f_b")
OUTPUTS = " ".join(f"$({name}:%.17g)" for name in (*KEYWORDS, *(f"f_b[{k}]" for k in range(1, 11))))
NPT = f"""
units metal
atom_style atomic
atom_modify map yes
newton on
boundary p p p
read_data alloy.data
pair_style ubmd precision double
pair_coeff * * model/model.pt Cu Au
neighbor 1.0 bin
neigh_modify every 1 delay 0 check yes
velocity all create 400.0 7 mom yes rot no
timestep 0.002
fix box all npt temp 400.0 400.0 0.1 tri 0.0 0.0 1.0
fix b all ubmd force 0.25 stress 0.25 every 2 window 5
dump d all custom {NPT_EVERY} dump.npt {COLUMNS}
dump_modify d sort id format float %.17g
fix rows all print {NPT_EVERY} "ROW {OUTPUTS}" screen yes
thermo {NPT_STEPS}
run {NPT_STEPS}
"""


def write_alloy(folder: Path) -> None:
    """Labelled structures alloy.extxyz, and a triclinic box alloy.data for LAMMPS."""
    import numpy as np
    from ase.build import bulk
    from ase.calculators.emt import EMT
    from ase.io import write

    ideal = bulk("Cu", a=3.75, cubic=True).repeat(2)
    ideal.symbols[::4] = "Au"
    rng = np.random.default_rng(11)
    frames = []
    for _ in range(15):
        atoms = ideal.copy()
        strain = rng.uniform(-0.03, 0.03, (3, 3))
        atoms.set_cell(atoms.cell[:] @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
        atoms.positions += rng.normal(0.0, 0.12, atoms.positions.shape)
        atoms.calc = EMT()
        atoms.get_stress()
        frames.append(atoms)
    write(folder / "alloy.extxyz", frames)
    write(folder / "alloy.data", ideal, format="lammps-data", masses=True, specorder=["Cu", "Au"], force_skew=True)


# ------------------------------------------------------------------------------------------ what is hashed


def of_run(run: Path) -> Iterator[tuple[str, Any]]:
    """Labels, history, weights, models and arrays of a run folder."""
    for name in ("dataset.extxyz", "test.extxyz"):
        yield name, hashed((run / name).read_bytes())
    for number, entry in enumerate(json.loads((run / "history.json").read_text())):
        yield f"history/{number}", without_measured(entry)
    for path in sorted(run.rglob("*")):
        if path.suffix in (".pt", ".npz") and path.is_file() and ".attempt" not in str(path):
            yield from of_file(path, str(path.relative_to(run)))


def of_file(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """Tensors and metadata of a model file, tensors and numbers of weights or a checkpoint, arrays of an npz file."""
    import numpy as np
    import torch

    import ubmd

    if path.suffix == ".npz":
        with np.load(path) as arrays:
            for key in arrays.files:
                yield f"{name}/{key}", of_array(arrays[key])
        return
    if not is_script(path):
        yield from of_value(torch.load(path, weights_only=True), name)
        return
    ubmd.Calculator(path)  # loads the compiled operators, which the file may call
    module = torch.jit.load(path)
    yield f"{name}/metadata", without_measured(json.loads(module.metadata()))
    for key, tensor in module.state_dict().items():
        yield f"{name}/{key}", of_array(tensor.numpy())
    # Also what is no parameter of a module; in sorted order, as names in the archive follow from those in the code.
    with zipfile.ZipFile(path) as archive:
        blobs = [archive.read(item) for item in archive.namelist() if "/data/" in item]
    yield f"{name}/data", sorted(map(hashed, blobs))


def is_script(path: Path) -> bool:
    """Whether this is a model file rather than weights."""
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def of_value(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Everything in nested dictionaries and lists, each tensor by its hash."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from of_value(item, f"{name}/{key}")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from of_value(item, f"{name}/{number}")
    elif hasattr(value, "numpy"):
        yield name, of_array(value.numpy())
    elif name.rpartition("/")[2] not in MEASURED:
        yield name, value if isinstance(value, (int, str, bool, type(None))) else repr(value)


def of_array(array: Any) -> str:
    """Kind, shape and hash of an array's bytes."""
    return f"{array.dtype} {list(array.shape)} {hashed(array.tobytes())}"


def hashed(content: bytes) -> str:
    """SHA-256."""
    return hashlib.sha256(content).hexdigest()


def without_measured(value: Any) -> Any:
    """A JSON value without what clocks and folders decide."""
    if isinstance(value, dict):
        return {key: without_measured(item) for key, item in value.items() if key not in MEASURED}
    return [without_measured(item) for item in value] if isinstance(value, list) else value


PARTS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    "quickstart": quickstart,
    "silicon": silicon,
    "npt": npt,
}


# ------------------------------------------------------------------------------------------ comparing


def compare(old: Record, new: Record) -> bool:
    """Print a table by part and what differs; whether nothing does."""
    if old["made_with"] != new["made_with"]:
        print(f"made with {old['made_with']} and {new['made_with']}")
    one, other = old["found"], new["found"]
    names = sorted(one.keys() | other.keys())
    # As text: NaN is equal to NaN.
    differ = [n for n in names if n not in one or n not in other or json.dumps(one[n]) != json.dumps(other[n])]
    print(f"{'':12s} {'entries':>8s} {'differ':>8s}")
    for part in sorted({name.partition("/")[0] for name in names}):
        count, bad = (sum(n.startswith(part + "/") for n in some) for some in (names, differ))
        print(f"{part:12s} {count:8d} {bad:8d}")
    for name in differ:
        where = "in the new record only" if name not in one else "in the old record only" if name not in other else ""
        print(f"DIFFERS {name} {where}")
    if not names:
        print("There is nothing to compare.")
    return bool(names) and not differ


if __name__ == "__main__":
    main()
