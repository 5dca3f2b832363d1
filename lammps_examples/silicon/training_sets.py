"""Which structures should a crystal's potential be trained on? Those of a dynamic run, or a set made beforehand?
python training_sets.py SETTINGS [--seeds 0 1 2] [--counts 1 2 3 5 8 10 15 20] [--out training_sets] [--help]

SETTINGS is the file of a dynamic run (silicon: dynamic.toml; the same script serves ../bas and ../snse). The sets:

  dynamic          labels of a dynamic run, in the order in which it asked for them (one run per seed; made if missing)
  rattled 0.05 Å   the ideal crystal with Gaussian displacements of all atoms, one set per amplitude
  MD frames        equally spaced frames of molecular dynamics with the reference

Potentials are fitted to the first 1, 2, 3, ... labels of each (of the MD: as many equally spaced frames) and compared
on thermal test sets of the reference that none of them saw. Labels come from SETTINGS' own reference, noise included,
or from files in the folder --labels (default: 'labels' beside SETTINGS), also compressed ones (.xz), if they are there:

  rattled_0.05_seed0.extxyz (or rattled_0.05.extxyz for all seeds, each taking it in another order)
  md_seed0.extxyz (or md.extxyz for all, each beginning at another frame), test_900K.extxyz
  dynamic_seed0.extxyz (labels of a dynamic run with SETTINGS, in order; not used with --set)

Finished parts are found again. Writes into --out: training_sets.md (tables), training_sets.json, training_sets.png, and
with --models N a model file of each set after N labels of the first seed, for stability.py.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small matrices: more threads are slower

import numpy as np
from ase import Atoms

from ubmd.analysis.style import BLUE, COLOURS, GREY, MARKERS, legend_above, log_ticks, new_figure, save
from ubmd.data.extxyz import write_structures
from ubmd.data.labels import dataset_hash
from ubmd.data.structures import read_structures
from ubmd.learning.dynamic.check import ideal_box
from ubmd.learning.dynamic.engine import run as run_dynamic
from ubmd.potentials.force_constants.basis import ClusterBasis
from ubmd.potentials.force_constants.export import export_crystal
from ubmd.potentials.force_constants.lattice import Supercell
from ubmd.potentials.force_constants.regression import NormalEquations, Posterior, fit
from ubmd.references import label, sample
from ubmd.settings import SamplingSettings, load_settings
from ubmd.settings.dynamic import DynamicRunSettings

TEST_SEED, MD_SEED, RATTLE_SEED = 9000, 7000, 5000  # plus the seed (the test sets have no other)
DYNAMIC, MD = "dynamic", "MD frames"


@dataclass
class Work:
    """What every part needs."""

    arguments: argparse.Namespace
    settings: DynamicRunSettings
    base: Path
    box: Atoms
    basis: ClusterBasis
    supercell: Supercell
    tests: dict[float, list[Atoms]] = field(default_factory=dict)
    test_rows: dict[float, Any] = field(default_factory=dict)

    @property
    def labels(self) -> Path:
        """Where new labels are kept."""
        return self.arguments.out / "labels"

    @property
    def folders(self) -> list[Path]:
        """Where labels may be."""
        return [self.arguments.labels or self.base / "labels", self.labels]

    @property
    def amplitudes(self) -> list[float]:
        """Of the rattled sets, Å: those asked for, or those that there are."""
        if self.arguments.amplitudes:
            return self.arguments.amplitudes
        names = [path.name.split(".extxyz")[0] for path in self.folders[0].glob("rattled_*.extxyz*")]
        return sorted({float(name.split("_")[1]) for name in names}) or [0.01, 0.05, 0.1]

    def stored(self, name: str) -> list[Atoms] | None:
        """A set of labels, if there is a file of it."""
        for folder in self.folders:
            for path in (folder / f"{name}.extxyz", folder / f"{name}.extxyz.xz"):
                if path.exists():
                    return read_structures(path, labelled=True)
        return None

    @property
    def counts(self) -> list[int]:
        return sorted(self.arguments.counts)

    @property
    def temperature(self) -> float:
        """Of the MD frames and of the test set that counts, K."""
        return self.arguments.temperature or max(self.settings.dynamic.temperatures)


# ---------------------------------------------------------------------------------------------------- labels


def rattled(work: Work, amplitude: float, seed: int) -> list[Atoms]:
    """As many labelled structures as the largest count."""
    found = _known(work, f"rattled_{amplitude:g}", seed)
    if found is not None:
        return found
    rng = np.random.default_rng([RATTLE_SEED + seed, round(1e6 * amplitude)])
    structures = []
    for _ in range(max(work.counts)):
        atoms = work.box.copy()
        atoms.positions += rng.normal(scale=amplitude, size=atoms.positions.shape)
        structures.append(label(atoms, work.settings.reference, work.base))
    write_structures(work.labels / f"rattled_{amplitude:g}_seed{seed}.extxyz", structures)
    return structures


def md_frames(work: Work, seed: int) -> list[Atoms]:
    """Labelled frames of reference MD, in order."""
    found = _known(work, "md", seed, shuffled=False)
    return found if found is not None else _sampled(work, f"md_seed{seed}", work.temperature, MD_SEED + seed, 40)


def test_set(work: Work, temperature: float) -> list[Atoms]:
    """Labelled frames of an independent trajectory."""
    name = f"test_{temperature:g}K"
    found = work.stored(name)
    return found if found is not None else _sampled(work, name, temperature, TEST_SEED, work.arguments.test_frames)


def _sampled(work: Work, name: str, temperature: float, seed: int, frames: int) -> list[Atoms]:
    if work.settings.reference.cache is not None:  # labels that are worth keeping are too slow for dynamics
        raise SystemExit(f"There is no {name}.extxyz in {work.folders[0]}: make it with labels.py, or use --no-md.")
    sampling = SamplingSettings(
        temperature=temperature,
        frames=frames,
        stride=50,
        equilibration=500,
        timestep=work.settings.dynamic.timestep,
        trajectories=1,
        seed=seed,
    )
    print(f"  reference MD: {name} ({frames} frames)", flush=True)
    structures = sample(work.box, work.settings.reference, sampling, work.base)
    write_structures(work.labels / f"{name}.extxyz", structures)
    return structures


def _known(work: Work, name: str, seed: int, shuffled: bool = True) -> list[Atoms] | None:
    """A set of this seed, or a common one in an order of this seed."""
    found = work.stored(f"{name}_seed{seed}")
    if found is not None:
        return found if len(found) >= max(work.counts) or not shuffled else None
    found = work.stored(name)
    if found is None:
        return None
    order = np.random.default_rng(seed).permutation(len(found)) if shuffled else np.arange(len(found))
    return [found[k] for k in order]


def dynamic_labels(work: Work, seed: int) -> list[Atoms]:
    """Labels of a dynamic run, in order; the run is started or resumed if it has not ended."""
    found = None if work.arguments.set else work.stored(f"dynamic_seed{seed}")
    if found is not None:
        return found
    folder = work.arguments.runs / f"seed{seed}"
    history = folder / "history.json"
    if not history.exists() or not json.loads(history.read_text())[-1].get("ended"):
        print(f"  dynamic run: {folder}", flush=True)
        changed = [f"run_dir='{folder}'", f"seed={seed}", f"dynamic.labels={max(work.counts)}"]
        changed += ["dynamic.convergence.stop=false", *work.arguments.set]
        run_dynamic(load_settings(work.arguments.settings, DynamicRunSettings, changed), work.base)
    return read_structures(folder / "dataset.extxyz", labelled=True)


# ---------------------------------------------------------------------------------------------------- fits


def rows_of(work: Work, structures: Sequence[Atoms]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Force matrix and forces of each structure."""
    return [(work.basis.force_matrix(a, work.supercell), a.get_forces().ravel()) for a in structures]


def fitted(work: Work, rows: Sequence[tuple[np.ndarray, np.ndarray]], start: Posterior | None = None) -> Posterior:
    """The potential of these labels."""
    equations = NormalEquations(work.basis.parameter_orders)
    for matrix, forces in rows:
        equations.add(matrix, forces)
    assert work.settings.crystal is not None
    return fit(equations, start, caution=work.settings.crystal.caution)


def chosen(total: int, count: int, name: str, seed: int) -> list[int] | None:
    """Places of the first ones, or of equally spaced ones of MD; None if there are too few."""
    if count > total:
        return None
    if name != MD:
        return list(range(count))
    phase = (0.5 + seed % 3) / 3  # where in its interval a frame lies: seeds may share the trajectory
    return np.floor((np.arange(count) + phase) * total / count).astype(int).tolist()


def relative_error(work: Work, posterior: Posterior, temperature: float) -> float:
    """RMSE of the force components over their rms, %."""
    if temperature not in work.test_rows:
        rows = rows_of(work, work.tests[temperature])
        work.test_rows[temperature] = tuple(np.concatenate(parts) for parts in zip(*rows, strict=True))
    matrix, forces = work.test_rows[temperature]
    return 100.0 * float(np.sqrt(np.mean((matrix @ posterior.mean - forces) ** 2) / np.mean(forces**2)))


def set_names(work: Work) -> list[str]:
    """Sets that are compared."""
    names = [] if work.arguments.no_dynamic else [DYNAMIC]
    names += [f"rattled {amplitude:g} Å" for amplitude in work.amplitudes]
    return names if work.arguments.no_md else [*names, MD]


def structures_of(work: Work, name: str, seed: int) -> list[Atoms]:
    """All labels of a set."""
    if name == DYNAMIC:
        return dynamic_labels(work, seed)
    if name == MD:
        return md_frames(work, seed)
    return rattled(work, float(name.split()[1]), seed)


def measure(work: Work) -> list[dict[str, Any]]:
    """One row per set, seed and number of labels; rows that were measured before are taken."""
    path = work.arguments.out / "training_sets.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    known = {row["key"]: row for row in rows}
    test = [dataset_hash(structures) for structures in work.tests.values()]
    decay = [] if work.basis.decay is None else [f"decay {work.basis.decay:g}"]
    result: list[dict[str, Any]] = []
    for name in set_names(work):
        for seed in work.arguments.seeds:
            labels = structures_of(work, name, seed)
            rows_known: dict[int, tuple[np.ndarray, np.ndarray]] = {}
            posterior: Posterior | None = None
            for count in work.counts:
                places = chosen(len(labels), count, name, seed)
                if places is None:
                    continue
                key = "/".join(
                    [dataset_hash([labels[k] for k in places]), *test, *map(str, work.basis.cutoffs.items()), *decay]
                )
                if key not in known:
                    new = [k for k in places if k not in rows_known]
                    rows_known |= dict(zip(new, rows_of(work, [labels[k] for k in new]), strict=True))
                    posterior = fitted(work, [rows_known[k] for k in places], posterior)
                    errors = {f"{t:g}": relative_error(work, posterior, t) for t in work.tests}
                    shared = sum(posterior.gamma.values()) / work.basis.n_parameters
                    known[key] = {"errors": errors, "gamma": shared, "noise": posterior.noise}
                result.append(known[key] | {"key": key, "set": name, "seed": seed, "labels": count})
            last = result[-1]
            error = last["errors"][f"{work.temperature:g}"]
            print(f"{name}, seed {seed}: {error:.2f} % of the force at {last['labels']} labels", flush=True)
            path.write_text(json.dumps({"rows": result}, indent=1), encoding="utf-8")
    return result


# ---------------------------------------------------------------------------------------------------- tables


def summary(
    rows: Sequence[dict[str, Any]], name: str, count: int, temperature: float, seeds: int
) -> tuple[float, float] | None:
    """Mean and standard deviation over the seeds, %; None unless all seeds have that many labels."""
    key = f"{temperature:g}"
    found = [row["errors"][key] for row in rows if row["set"] == name and row["labels"] == count]
    if len(found) < seeds:
        return None
    return float(np.mean(found)), float(np.std(found, ddof=1)) if seeds > 1 else 0.0


def text_of(pair: tuple[float, float] | None) -> str:
    return "-" if pair is None else f"{pair[0]:.2f} ± {pair[1]:.2f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def tables(work: Work, rows: Sequence[dict[str, Any]]) -> str:
    """Errors against the number of labels; then at other temperatures."""
    names, seeds = set_names(work), len(work.arguments.seeds)
    structures = len(work.tests[work.temperature])
    lines = [
        f"Force error at {work.temperature:g} K in % of the force's rms ({structures} test structures of "
        f"{len(work.box)} atoms; mean ± standard deviation of {seeds} seeds; "
        f"{work.basis.n_parameters} parameters, label noise {1000 * work.settings.reference.noise:g} meV/Å).",
        "",
    ]
    body = [
        [str(count), *(text_of(summary(rows, name, count, work.temperature, seeds)) for name in names)]
        for count in work.counts
    ]
    lines += table(["labels", *names], body)
    for name in names:
        ends = [max(r["labels"] for r in rows if r["set"] == name and r["seed"] == s) for s in work.arguments.seeds]
        if max(ends) < max(work.counts):
            lines += ["", f"{name}: no more than {', '.join(map(str, ends))} labels (seeds in order)."]
    if len(work.tests) > 1:
        count = work.arguments.models or 10
        lines += ["", f"The same after {count} labels, tested at other temperatures:", ""]
        body = [[name, *(text_of(summary(rows, name, count, t, seeds)) for t in work.tests)] for name in names]
        lines += table(["trained on", *(f"{t:g} K" for t in work.tests)], body)
    return "\n".join([*lines, ""])


def picture(work: Work, rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Errors against the number of labels, with bars of one standard deviation."""
    figure = new_figure(7.0, 4.4)
    axes = figure.subplots()
    seeds = len(work.arguments.seeds)
    colours = [BLUE, *(c for c in COLOURS if c != BLUE)]
    for k, name in enumerate(set_names(work)):
        found = [(c, summary(rows, name, c, work.temperature, seeds)) for c in work.counts]
        points = [(c, *pair) for c, pair in found if pair is not None]
        if not points:
            continue
        x, mean, deviation = np.array(points).T
        low = np.minimum(deviation, 0.7 * mean)  # bars end inside a logarithmic axis
        style = {"color": colours[k], "marker": MARKERS[k], "markersize": 5, "capsize": 2.5, "elinewidth": 0.9}
        width = 2.2 if name == DYNAMIC else 1.3
        axes.errorbar(x, mean, yerr=[low, deviation], linewidth=width, label=name, **style)
    if work.arguments.target:
        text = f"{work.arguments.target:g} %"
        axes.axhline(work.arguments.target, color=GREY, linewidth=1.0, linestyle="--", label=text)
    axes.set(xscale="log", yscale="log", xlabel="Labels")
    axes.set_ylabel(f"Force RMSE at {work.temperature:g} K (% of rms force)")
    axes.set_xticks(work.counts, [str(c) for c in work.counts])
    axes.minorticks_off()
    log_ticks(axes, x=False)
    axes.grid(alpha=0.25, which="major")
    legend_above(figure, *axes.get_legend_handles_labels(), columns=3)
    return save(figure, path)


def write_models(work: Work) -> None:
    """A model file of every set, from the first seed."""
    count, seed = work.arguments.models, work.arguments.seeds[0]
    for name in set_names(work):
        labels = structures_of(work, name, seed)
        places = chosen(len(labels), count, name, seed)
        if places is None:
            print(f"{name}: fewer than {count} labels, no model file", flush=True)
            continue
        part = [labels[k] for k in places]
        path = work.arguments.out / f"{name.replace(' Å', '').replace(' ', '_')}_{count}.pt"
        provenance = {"training_set_hash": dataset_hash(part), "n_training": count}
        assert work.settings.crystal is not None
        guard = work.settings.crystal.max_displacement
        export_crystal(
            work.basis, fitted(work, rows_of(work, part)), path, max_displacement=guard, provenance=provenance
        )
        print(f"model of {name}: {path}", flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path, help="settings of a dynamic run (TOML)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 3, 5, 8, 10, 15, 20], help="labels")
    parser.add_argument("--amplitudes", type=float, nargs="+", help="of rattled sets, Å; default: the files', or three")
    parser.add_argument("--temperature", type=float, help="of MD and test, K; default: highest of dynamic.temperatures")
    parser.add_argument("--test-temperatures", type=float, nargs="+", default=[], help="further test sets, K")
    parser.add_argument("--test-frames", type=int, default=40, help="structures of each test set")
    parser.add_argument("--labels", type=Path, help="folder of labelled sets; default: labels beside SETTINGS")
    parser.add_argument("--runs", type=Path, help="folder of the dynamic runs seed0, seed1, ...; default: OUT/runs")
    parser.add_argument("--out", type=Path, default=Path("training_sets"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")
    parser.add_argument("--models", type=int, help="write model files after this many labels")
    parser.add_argument("--target", type=float, default=2.5, help="line in the picture, %%; 0: none")
    parser.add_argument("--no-dynamic", action="store_true", help="leave the dynamic runs out")
    parser.add_argument("--no-md", action="store_true", help="leave the frames of reference MD out")
    found = parser.parse_args(arguments)
    found.runs = found.runs or found.out / "runs"
    return found


def main() -> None:
    arguments = parse()
    settings = load_settings(arguments.settings, DynamicRunSettings, arguments.set)
    if settings.crystal is None:
        raise SystemExit("This comparison is for force-constant potentials: the settings need a [crystal] table.")
    base = arguments.settings.resolve().parent
    box = ideal_box(settings, base)
    arguments.out.mkdir(parents=True, exist_ok=True)
    crystal = read_structures(settings.crystal.structure_file(base))[0]
    basis = ClusterBasis.build(crystal, settings.crystal.cutoffs, settings.crystal.decay, settings.crystal.tolerance)
    work = Work(arguments, settings, base, box, basis, basis.supercell(box))
    for temperature in sorted({work.temperature, *arguments.test_temperatures}):
        work.tests[temperature] = test_set(work, temperature)
    rows = measure(work)
    text = tables(work, rows)
    (arguments.out / "training_sets.md").write_text(text, encoding="utf-8")
    picture(work, rows, arguments.out / "training_sets.png")
    print(text)
    if arguments.models:
        write_models(work)


if __name__ == "__main__":
    main()
