"""Speed of ubmd: a table with units, targets and ratios, and where the time goes.

python tests/benchmarks/run.py [--quick] [--groups medium small ...] [--json out.json]

Times are processor times of LAMMPS's loop on one thread (of two ranks: wall-clock times). What is compared is measured
in turn within one process, and the shortest time of several counts; quote the ratios. A busy machine still spoils them:
the last line says how much the matrix products varied.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch and LAMMPS start

import argparse
import multiprocessing
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import accuracy
import gemm
import lammps_runs
import peers
import report
import systems
import torch
import training
from lammps_runs import Case

TAU = 0.25
DEFAULT = f"force {TAU}"  # of the learning loop: p = 128, every 4 steps, with atomic uncertainties


GROUPS = (
    "medium",
    "exact",
    "small",
    "first",
    "large",
    "ranks",
    "drift",
    "accuracy",
    "train",
    "warm_start",
    "profile",
)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own: no warm caches, its own peak of memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


class Suite:
    """All measurements; `figures` fills up group by group."""

    def __init__(self, folder: Path, quick: bool, groups: Sequence[str] = ()) -> None:
        self.folder = folder
        self.quick = quick
        self.groups = groups
        self.figures: report.Figures = {row.key: None for row in report.TABLE if isinstance(row, report.Row)}
        self.profiles: dict[str, dict[str, float]] = {}
        self.failures: list[str] = []
        self.without_atoms = ""  # keywords of fix ubmd that leave out atomic uncertainties

    def run(self) -> None:
        """Every group; one that fails leaves its figures empty and doesn't stop the others."""
        for name in ("prepare", *(self.groups or GROUPS)):
            group = getattr(self, name)
            start = time.perf_counter()
            try:
                group()
            except Exception as problem:  # the table says which figures are missing
                self.failures.append(f"{name}: {type(problem).__name__}: {problem}")
            print(f"[{name}: {time.perf_counter() - start:.0f} s]", file=sys.stderr, flush=True)

    # ---- cases

    def prepare(self) -> None:
        """Data and model files; which keywords the plugin knows."""
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            jobs = [
                pool.submit(systems.write_model, self.folder, name, model)
                for name in systems.SYSTEMS
                for model in systems.MODELS
            ]
            jobs.append(pool.submit(systems.write_model, self.folder, "alanine", "light128", 0.1))
            for name in systems.SYSTEMS:
                systems.write_data(self.folder, name)
            self.figures["operators"], *_ = [job.result() for job in jobs]
        if in_fresh_process(lammps_runs.fix_takes, f"{DEFAULT} atoms no"):
            self.without_atoms = " atoms no"

    def mgo(
        self,
        name: str,
        cells: int | tuple[int, int, int],
        model: str,
        bias: str = "",
        every: int = 1,
        options: str = "",
    ) -> Case:
        """Rocksalt, cells^3 times 8 atoms, or as many cells along each edge."""
        x, y, z = (cells, cells, cells) if isinstance(cells, int) else cells
        box = f"read_data {self.folder / 'mgo.data'}\nreplicate {x} {y} {z}"
        return Case(name, 8 * x * y * z, box, self.potential("mgo", model, options), bias, every, tether=2.0)

    def alanine(self, name: str, model: str, bias: str = "", every: int = 1, options: str = "") -> Case:
        box = f"read_data {self.folder / 'alanine.data'}"
        potential = self.potential("alanine", model, options)
        return Case(name, 22, box, potential, bias, every, tether=0.5, periodic=False)

    def framework(self, name: str, model: str, bias: str = "", every: int = 1) -> Case:
        box = f"read_data {self.folder / 'framework.data'}"
        return Case(name, 76, box, self.potential("framework", model), bias, every, tether=2.0)

    def potential(self, system: str, model: str, options: str = "", scale: float = systems.ENERGY_SCALE) -> str:
        file = systems.model_file(self.folder, system, model, scale)
        return f"pair_style ubmd {options}\npair_coeff * * {file} {' '.join(systems.SYSTEMS[system].elements)}"

    # ---- groups

    def medium(self) -> None:
        """512 atoms: matrix products, energies and forces, biased steps and peers, all in one process."""
        exact = DEFAULT + self.without_atoms
        cases = [
            self.mgo("plain", 4, "light512"),
            self.mgo("paper", 4, "paper512"),
            self.mgo("default", 4, "light128", DEFAULT, 4),
            self.mgo("every10", 4, "light128", DEFAULT, 10),
            self.mgo("exact", 4, "light512", exact),
            self.mgo("exact_ui", 4, "light512", DEFAULT),
            self.mgo("exact_paper", 4, "paper512", DEFAULT),
            *peers.peer_cases(),
        ]
        products = {(kind, size): 512 for kind in ("torch", "fastest") for size in gemm.INPUTS}
        times = in_fresh_process(lammps_runs.time_cases, cases, products, 20.0 if self.quick else 90.0)
        best = {name: min(values) for name, values in times.items()}
        for size in gemm.INPUTS:
            best[f"fastest {size}"] = min(best[f"fastest {size}"], best[f"torch {size}"])
        self.figures["gemm_variation"] = statistics.median(times["fastest light"]) / min(times["fastest light"])
        self.medium_figures(best)

    def medium_figures(self, best: dict[str, float]) -> None:
        """Ratios of the shortest times, s per step."""
        put, plain = self.figures.__setitem__, best["plain"]
        operations = gemm.inference_products(512, "light", torch.mm)[1]
        put("gflops_float32", operations / best["torch light"] / 1e9)
        put("gflops_float32_fastest", operations / best["fastest light"] / 1e9)
        put("us_per_atom_512", 1e6 * plain / 512)
        put("us_per_atom_512_paper", 1e6 * best["paper"] / 512)
        put("gemm_ratio", plain / best["fastest light"])
        put("gemm_ratio_paper", best["paper"] / best["fastest paper"])
        put("gemm_ratio_torch", plain / best["torch light"])
        for key in ("default", "every10", "exact_ui"):
            put(f"bias_ratio_{key}", best[key] / plain)
        put("bias_ratio_exact_512", best["exact"] / plain if self.without_atoms else None)
        put("bias_ratio_exact_paper", best["exact_paper"] / best["paper"])
        put("ms_biased_step_512_paper", 1000 * best["exact_paper"])
        for key, name in (("snap8", "SNAP 2J=8"), ("snap6", "SNAP 2J=6"), ("pod", "POD"), ("uf3", "UF3")):
            put(f"us_per_atom_{key}", 1e6 * best[name] / peers.ATOMS)
        put("snap_speedup", self.figures["us_per_atom_snap8"] / self.figures["us_per_atom_512"])
        put("pytorch_speedup_512", self.peer(peers.PYTORCH_BIASED_MS[512], 1000 * best["exact_paper"]))
        put("pytorch_speedup_512_plain", self.peer(peers.PYTORCH_PLAIN_MS[512], 1000 * best["paper"]))

    def peer(self, milliseconds: float, ours: float) -> float | None:
        """A given time, scaled to the speed of the matrix products here, over ours; unknown without `medium`."""
        speed = self.figures["gflops_float32"]
        return milliseconds * peers.REFERENCE_GFLOPS / speed / ours if speed else None

    def exact(self) -> None:
        """4096 atoms: the exact bias has a cost per structure that 512 atoms share among too few."""
        cases = [
            self.mgo("plain", 8, "light512"),
            self.mgo("exact", 8, "light512", DEFAULT + self.without_atoms),
            self.mgo("exact_ui", 8, "light512", DEFAULT),
        ]
        times = in_fresh_process(lammps_runs.time_cases, cases, {}, 6.0 if self.quick else 30.0)
        best = {name: min(values) for name, values in times.items()}
        self.figures["bias_ratio_exact"] = best["exact"] / best["plain"] if self.without_atoms else None
        self.figures["bias_ratio_exact_ui_4096"] = best["exact_ui"] / best["plain"]

    def small(self) -> None:
        """22 and 76 atoms: here the fixed cost of a step counts."""
        cases = [
            self.alanine("plain_step_22", "light512"),
            self.alanine("biased_step_22", "light128", DEFAULT, 4),
            self.alanine("biased_step_22_paper", "paper512", DEFAULT),
            self.framework("plain_step_76", "light512"),
            self.framework("biased_step_76", "light128", DEFAULT, 4),
            self.framework("biased_step_76_paper", "paper512", DEFAULT),
        ]
        times = in_fresh_process(lammps_runs.time_cases, cases, {}, 8.0 if self.quick else 40.0)
        for name, values in times.items():
            self.figures[f"ms_{name}"] = 1000 * min(values)
        for n in (22, 76):
            ours = self.figures[f"ms_biased_step_{n}_paper"]
            self.figures[f"bias_ratio_{n}"] = self.figures[f"ms_biased_step_{n}"] / self.figures[f"ms_plain_step_{n}"]
            self.figures[f"pytorch_speedup_{n}"] = self.peer(peers.PYTORCH_BIASED_MS[n], ours)
        self.figures["jax_speedup_22"] = self.peer(peers.JAX_BIASED_MS[22], self.figures["ms_biased_step_22"])

    def first(self) -> None:
        """First steps of a fresh process; the least disturbed of a few tries."""
        cases = {
            "first_step_ratio": self.mgo("first", 4, "light512"),
            "first_step_ratio_22": self.alanine("first", "light128", DEFAULT),
        }
        for key, case in cases.items():
            tries = [in_fresh_process(lammps_runs.first_steps, case) for _ in range(1 if self.quick else 3)]
            self.figures[key] = min(first for first, _ in tries) / min(steady for _, steady in tries)

    def large(self) -> None:
        """10^3 and 10^5 atoms."""
        cases = [self.mgo(f"{8 * cells**3} atoms", cells, "light512") for cells in (5, 10, 23)]
        result = in_fresh_process(lammps_runs.scaling, *cases, 2 if self.quick else 6)
        self.figures["flatness_1e5"] = result["large"] / result["small"]
        self.figures["bytes_per_atom"] = result["bytes_per_atom"]
        self.figures["n_large"] = int(result["n_large"])

    def ranks(self) -> None:
        """One and two ranks in turn."""
        repeats, rounds = (2, 1) if self.quick else (4, 3)
        cases = {
            "rank2_speedup": self.mgo("plain", 8, "light512"),
            "rank2_speedup_biased": self.mgo("biased", 8, "light128", DEFAULT, 4),
        }
        for key, case in cases.items():
            if self.quick and case.bias:
                continue
            times: dict[int, list[float]] = {1: [], 2: []}
            for _ in range(rounds):
                for n, values in times.items():
                    values.append(lammps_runs.on_ranks(case, n, 4, repeats)["seconds"])
            self.figures[key] = min(times[1]) / min(times[2])

    def drift(self) -> None:
        """NVE with a random model whose forces are of the usual size."""
        steps = 1000 if self.quick else 8000
        atoms = f"read_data {self.folder / 'alanine.data'}"
        potential = self.potential("alanine", "light128", scale=0.1)
        kinds = {"none": ("", 1), "every1": (DEFAULT, 1), "every4": (DEFAULT, 4), "every10": (DEFAULT, 10)}
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:  # not timed
            cases = [Case(k, 22, atoms, potential, *kinds[k], 25, tether=5.0, periodic=False) for k in kinds]
            for case, job in [(case, pool.submit(lammps_runs.drift, case, steps, TAU)) for case in cases]:
                self.figures[f"drift_{case.name}"] = job.result()

    def accuracy(self) -> None:
        """Mixed precision against double: the larger errors of a crystal and a molecule."""
        errors = []
        for name, model in (("mgo", "light512"), ("alanine", "light128")):
            atoms = systems.SYSTEMS[name].make()
            atoms = atoms * (3, 3, 3) if name == "mgo" else atoms
            structures = [rattled for seed in range(3) for rattled in systems.rattled(atoms, 1, 1.0, seed)]
            file = systems.model_file(self.folder, name, model)
            errors.append(in_fresh_process(accuracy.mixed_against_double, file, structures))
        for key in errors[0]:
            self.figures[f"mixed_error_{key}"] = max(values[key] for values in errors)

    def train(self) -> None:
        """A step of training: 22-atom molecules, 76-atom cells."""
        for n, name in ((22, "alanine"), (76, "framework")):
            times = in_fresh_process(training.time_training, name, 64, 2 if self.quick else 5, 1 if self.quick else 4)
            times["fastest"] = min(times["fastest"], times["torch"])
            self.figures[f"train_ms_{n}"] = 1000 * times["fused"]
            self.figures[f"train_configs_per_s_{n}"] = training.BATCH / times["fused"]
            self.figures[f"train_gemm_ratio_{n}"] = times["fused"] / times["fastest"]
            self.figures[f"train_gemm_ratio_torch_{n}"] = times["fused"] / times["torch"]
            self.figures[f"train_speedup_{n}"] = times["plain"] / times["fused"]
        self.figures["train_gemm_ratio"] = max(self.figures[f"train_gemm_ratio_{n}"] for n in (22, 76))
        self.figures["train_speedup"] = min(self.figures[f"train_speedup_{n}"] for n in (22, 76))

    def warm_start(self) -> None:
        """Only in the full suite: some minutes."""
        if not self.quick:
            result = in_fresh_process(training.warm_start, 300, 3)
            self.figures["warm_start_ratio"] = result["ratio"]
            self.figures["warm_start_ratio_largest"] = result["largest"]

    def profile(self) -> None:
        """Where the time goes, and from it the share of what is neither network nor uncertainty nor bias."""
        exact = DEFAULT + self.without_atoms
        cases = {
            "512 plain": (self.mgo("", 4, "light512", options="timing yes"), 20),
            "512 default": (self.mgo("", 4, "light128", DEFAULT, 4, "timing yes"), 20),
            "512 exact": (self.mgo("", 4, "light512", exact, options="timing yes"), 10),
            "22 default": (self.alanine("", "light128", DEFAULT, 4, "timing yes"), 400),
            "22 paper": (self.alanine("", "paper512", DEFAULT, options="timing yes"), 200),
        }
        for name, (case, steps) in cases.items():
            scale = 1 if self.quick else 5
            self.profiles[name] = in_fresh_process(
                lammps_runs.profile, case, scale * steps, self.folder / f"{name}.log".replace(" ", "_")
            )
        self.figures["profiles"] = self.profiles
        self.figures["glue_fraction"] = glue(self.profiles["512 plain"])
        self.figures["glue_fraction_biased"] = glue(self.profiles["512 default"])


def glue(parts: dict[str, float]) -> float:
    """Share of the loop in Pair and Modify that isn't network, uncertainty or bias."""
    work = parts.get("network", 0.0) + parts.get("uncertainty", 0.0) + parts.get("bias", 0.0)
    return (parts["Pair"] + parts["Modify"] - work) / parts["Loop"]


def circumstances(quick: bool) -> report.Figures:
    """Machine, date and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    git = ["git", "-C", str(systems.ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "quick": quick,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "load_at_start": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("ubmd", "torch", "lammps", "numpy")},
        "python": platform.python_version(),
        "commit": commit or None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 minutes instead of about 20: no warm starts")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, metavar="GROUP", help=f"only some: {', '.join(GROUPS)}")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    from ubmd.process import keep_freed_memory

    keep_freed_memory()  # as the command ubmd and its workers do
    start, meta = time.perf_counter(), circumstances(arguments.quick)
    with tempfile.TemporaryDirectory(prefix="ubmd_benchmarks_") as folder:
        suite = Suite(Path(folder), arguments.quick, arguments.groups or ())
        suite.run()
    meta["seconds"] = round(time.perf_counter() - start, 1)
    print(report.table(suite.figures))
    print(f"\n{report.profile_table(suite.profiles)}\n")
    print(", ".join(f"{key}: {value}" for key, value in meta.items()))
    print(f"operator libraries of the model files: {suite.figures.get('operators') or 'none'}")
    print(f"matrix products: median / shortest time = {report.number(suite.figures.get('gemm_variation'))}")
    for failure in suite.failures:
        print(f"FAILED {failure}")
    if arguments.json:
        report.write_json(arguments.json, {**suite.figures, "circumstances": meta, "failures": suite.failures})
    return 1 if suite.failures else 0


if __name__ == "__main__":
    sys.exit(main())
