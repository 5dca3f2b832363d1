"""lammps_examples/panel: the figures against naive formulas, and the tables of made-up runs; no run here."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy.stats import binomtest, spearmanr

from ubmd.settings import RunSettings, load_settings

PANEL = Path(__file__).parents[2] / "lammps_examples" / "panel"
SYSTEMS = ("molecule", "slab", "crystal", "ethanol", "water")
MODULES = ("judge", "figures", "tables", "rows", "panel")


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    """The panel's scripts as modules, which import each other by name."""
    before, path = set(sys.modules), list(sys.path)
    sys.path[:0] = [str(PANEL), str(PANEL.parent)]
    try:
        yield {name: import_module(name) for name in MODULES}
    finally:
        sys.path[:] = path
        for name in set(MODULES) - before:
            sys.modules.pop(name, None)


@pytest.fixture
def judge(modules: dict[str, ModuleType]) -> ModuleType:
    return modules["judge"]


@pytest.fixture
def panel(modules: dict[str, ModuleType]) -> ModuleType:
    return modules["panel"]


# ------------------------------------------------------------------------------------------ figures


def test_largest_of_each_structure(judge: ModuleType) -> None:
    assert judge.largest([1.0, 5.0, 2.0, 7.0, 3.0, 4.0], [2, 1, 3]).tolist() == [5.0, 2.0, 7.0]


def test_ceilings_are_what_a_perfect_uncertainty_reaches(judge: ModuleType) -> None:
    rng = np.random.default_rng(1)
    counts = [int(n) for n in rng.integers(2, 6, 150)]
    u = rng.lognormal(0.0, 0.6, sum(counts))
    atoms, maxima = [], []
    for _ in range(200):
        error = [math.sqrt(sum(rng.normal(0.0, width) ** 2 for _ in range(3)) / 3.0) for width in u]
        atoms.append(spearmanr(u, error).statistic)
        ends = np.cumsum([0, *counts])
        tops = [(max(u[a:b]), max(error[a:b])) for a, b in pairwise(ends)]
        maxima.append(spearmanr(*zip(*tops, strict=True)).statistic)
    found = judge.ceilings(u, counts, repeats=200)
    assert found == pytest.approx((np.mean(atoms), np.mean(maxima)), abs=0.02)
    assert 0.5 < found[1] < found[0] + 0.2 < 1.1
    assert judge.ceilings(53.0 * u, counts, repeats=200) == pytest.approx(found, abs=1e-12)


def test_ceiling_of_a_spread_without_end_is_one_and_of_none_unknown(judge: ModuleType) -> None:
    atoms, maxima = judge.ceilings(10.0 ** np.arange(60.0), [1] * 60)
    assert (atoms, maxima) == pytest.approx((1.0, 1.0), abs=0.01)
    assert all(map(math.isnan, judge.ceilings(np.ones(60), [2] * 30)))


def test_worst_errors_that_are_found(judge: ModuleType) -> None:
    error = np.arange(300.0)
    assert judge.worst_found(error, error) == 1.0
    assert judge.worst_found(error, -error) == 0.0
    u = np.zeros(300)
    u[[299, 297]] = 2.0  # two of the three worst
    u[:28] = 1.0
    assert judge.worst_found(error, u) == pytest.approx(2 / 3)
    rng = np.random.default_rng(0)
    assert judge.worst_found(rng.random(100_000), rng.random(100_000)) == pytest.approx(0.1, abs=0.03)


def test_labels_to_reach_a_target_and_their_restricted_mean(judge: ModuleType) -> None:
    curve = [(8, 0.5), (16, 0.3), (24, 0.35), (32, 0.2)]
    assert [judge.labels_to_reach(curve, target) for target in (0.6, 0.3, 0.25, 0.1)] == [8, 16, 32, None]
    assert judge.restricted_mean([8, None, 16], 64) == pytest.approx((8 + 64 + 16) / 3)


@pytest.mark.parametrize(("hits", "number"), [(0, 5), (3, 7), (190, 200), (40, 40)])
def test_wilson_interval(judge: ModuleType, hits: int, number: int) -> None:
    oracle = binomtest(hits, number).proportion_ci(0.95, method="wilson")
    assert judge.wilson(hits, number) == pytest.approx((oracle.low, oracle.high), abs=1e-9)


def test_wilson_interval_of_nothing_is_everything(judge: ModuleType) -> None:
    assert judge.wilson(0, 0) == (0.0, 1.0)


def test_paired_interval_is_that_of_all_resamples(judge: ModuleType) -> None:
    values = [0.3, -0.1, 0.4, 0.2]
    every = np.array(np.meshgrid(*[values] * 4)).reshape(4, -1).mean(axis=0)  # 4^4 resamples, equally likely
    mean, low, high = judge.paired_interval({"one": values})
    assert mean == pytest.approx(0.2)
    assert (low, high) == pytest.approx(tuple(np.percentile(every, [2.5, 97.5])), abs=0.026)
    assert low < mean < high


def test_systems_count_the_same_and_are_resampled_within(judge: ModuleType) -> None:
    mean, low, high = judge.paired_interval({"one": [1.0] * 5, "other": [3.0, 3.0]})
    assert (mean, low, high) == (2.0, 2.0, 2.0)
    mean, low, high = judge.paired_interval({"one": [1.0, 2.0], "other": [3.0]})
    assert mean == 2.25
    assert math.isnan(low)
    assert math.isnan(high)


def test_intervals_of_five_seeds_are_too_narrow(judge: ModuleType) -> None:
    """README.md says how much: nominal 95 % are 83 % (one system) and 89 % (three) for normal differences."""
    rng = np.random.default_rng(3)
    for systems, share in ((1, 0.83), (3, 0.89)):
        ends = [
            judge.paired_interval({str(k): rng.normal(size=5) for k in range(systems)}, 1000, seed)[1:]
            for seed in range(1000)
        ]
        assert np.mean([low <= 0.0 <= high for low, high in ends]) == pytest.approx(share, abs=0.03)


def test_jumps_of_factors(judge: ModuleType) -> None:
    assert judge.jumps([{"": 2.0}, {"": 1.0}, {"": 4.0}]) == pytest.approx([math.log(2), math.log(4)])
    assert judge.jumps([{"H": 2.0, "C": 1.0}, {"H": 1.0, "C": 3.0}]) == pytest.approx([math.log(6) / 2])
    assert judge.jumps([{"": 2.0}]) == []


# ------------------------------------------------------------------------------------------ tables


def model(labels: int, error: float, chosen: int) -> dict[str, object]:
    """Figures of one model that chose structures of two atoms; the first is not covered, the last chosen by chance."""
    names = ("atoms_covered", "structures_covered", "spearman_atoms", "spearman_maxima", "worst_found")
    test = dict.fromkeys(names, 0.5) | {"promised": 0.95, "spearman_atoms_ceiling": 0.9, "spearman_maxima_ceiling": 0.6}
    return {
        "labels": labels,
        "md_steps": 100 * labels,
        "minutes": 0.5,
        "factors": {"": float(labels)},
        "energy_rmse_mev_per_atom": 2.0,
        "force_rmse": error,
        "stopped": [],
        "test": test,
        "chosen": {
            "promised": 0.95 if chosen else None,
            "error": [2.0, 0.4, 0.9][:chosen],
            "u": [1.5] * chosen,
            "atoms": [2] * chosen,
            "atoms_covered": [1, 2, 2][:chosen],
            "random": [False, False, True][:chosen],
        },
    }


def run(errors: tuple[float, float, float]) -> dict[str, object]:
    models = [model(labels, error, n) for labels, error, n in zip((8, 16, 24), errors, (3, 3, 0), strict=True)]
    return {"threshold": 1.5, "limit": 24, "ubmd": "0", "models": models}


def results() -> dict[str, dict[str, dict[str, object]]]:
    """`before` reaches its mean of 0.203 in two runs of three, the other strategy with 16 labels in all."""
    before = {"0": run((0.5, 0.3, 0.2)), "1": run((0.5, 0.3, 0.18)), "2": run((0.5, 0.3, 0.23))}
    return {"slab": {"before": before, "better": {seed: run((0.4, 0.2, 0.1)) for seed in "012"}}}


def cells(lines: list[str], name: str, table: int = 0) -> list[str]:
    """Cells of a strategy's row in one of the tables."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith(f"| {name} |")][table]


def test_tables_say_what_the_runs_did(modules: dict[str, ModuleType]) -> None:
    lines = modules["tables"].tables(results())
    assert lines[0] == "### slab: force RMSE of 0.203 eV/Å is the target"
    columns = modules["tables"].LEARNING, modules["tables"].UNCERTAINTY
    before, better = (dict(zip(columns[0], cells(lines, name), strict=True)) for name in ("before", "better"))
    assert before["labels to target"] == "≥ 24.0 (1 of 3 missed)"
    assert (before["difference"], before["ratio"]) == ("", "")
    assert better["labels to target"] == "16.0 (0 of 3 missed)"
    assert better["difference"] == "-8.0 [-8.0, -8.0]"
    assert better["force RMSE, eV/Å"] == "0.100 ± 0.000"
    assert better["ratio"].startswith("0.49 [0.4")
    assert (better["MD steps"], better["minutes"]) == ("2400", "1.5")
    row = cells(lines, "better", 1)
    found = dict(zip(columns[1], row, strict=True))
    assert found["chosen: maxima"].startswith("0.50 [")  # 6 of 12; those chosen by chance are apart
    assert found["chosen: atoms"] == "0.75"
    assert found["random: maxima"].startswith("1.00 [")
    assert found["below a third"] == "0.50"
    assert float(found["jump"]) == pytest.approx(np.median([math.log(2), math.log(1.5)]), abs=0.01)


def test_a_strategy_is_paired_with_the_seeds_that_it_has(modules: dict[str, ModuleType]) -> None:
    part = results()
    part["slab"]["better"] = {"1": part["slab"]["better"]["1"], "7": run((0.1, 0.1, 0.1))}
    row = dict(zip(modules["tables"].LEARNING, cells(modules["tables"].tables(part), "better"), strict=True))
    assert row["seeds"] == "2"
    assert row["ratio"] == f"{0.1 / 0.18:.2f}"  # one pair: no interval


def test_all_systems_need_all_runs(modules: dict[str, ModuleType]) -> None:
    part = results()
    part["crystal"] = {"before": copy.deepcopy(part["slab"]["before"])}
    lines = modules["tables"].tables(part)
    whole = lines[lines.index("### All systems: slab, crystal") :]
    assert [line for line in whole if line.startswith("| better")] == []
    assert len([line for line in whole if line.startswith("| before")]) == 2


def test_results_in_one_file_are_the_figures(panel: ModuleType, tmp_path: Path) -> None:
    for system, strategies in results().items():
        for strategy, runs in strategies.items():
            for seed, figures in runs.items():
                file = tmp_path / "figures" / system / f"{strategy}_seed{seed}.json"
                file.parent.mkdir(parents=True, exist_ok=True)
                panel.write_json(file, figures)
    found = panel.read_results(tmp_path)
    assert found == results()
    for name in ("results.json", "results.json.xz"):
        panel.keep(tmp_path / name, found)
        assert panel.load(tmp_path / name) == found
    assert panel.main(["table", "--results", str(tmp_path / "results.json.xz"), "--systems", "crystal"]) == 1
    assert panel.main(["table", "--folder", str(tmp_path), "--systems", "slab"]) == 0


def test_figures_are_kept_with_six_digits(panel: ModuleType) -> None:
    values = {"a": [1 / 3, 1234567.0, 5], "threshold": math.inf, "none": None}
    assert panel.rounded(values) == {"a": [0.333333, 1234570.0, 5], "threshold": math.inf, "none": None}


# ------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_strategy_is_a_run_of_its_own(panel: ModuleType, system: str) -> None:
    options = panel.options_of(["run", "--systems", system, "--seeds", "0", "1", "--folder", "panel_run"])
    settings = [run.settings(file) for file, run in panel.all_runs(options)]
    assert len({s.model_dump_json(exclude={"run_dir"}) for s in settings}) == len(settings)
    assert {(s.loop.labels, s.selection.batch, s.workers.processes, s.training.threads) for s in settings} == {
        (64, 8, 1, 1)
    }
    base = load_settings(PANEL / f"{system}.toml", RunSettings)
    assert base.test is not None
    assert str(base.test.file) == f"test_{system}.extxyz"
    assert (PANEL / base.start.source).exists()
    assert str(base.test.file) in panel.HERE.joinpath("rows.toml").read_text()


def test_all_strategies_with_the_first_seed_come_first(panel: ModuleType) -> None:
    options = panel.options_of(["run", "--strategies", "before", "random", "--seeds", "4", "2"])
    names = [f"{run.folder.parent.name}/{run.folder.name}" for _, run in panel.all_runs(options)]
    assert names[:3] == ["molecule/before_seed4", "molecule/random_seed4", "slab/before_seed4"]
    assert [name[-1] for name in names] == ["4"] * 6 + ["2"] * 6
