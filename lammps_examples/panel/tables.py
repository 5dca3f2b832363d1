"""Tables of the panel in Markdown, from the figures of its runs. What the columns mean: README.md."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from judge import jumps, labels_to_reach, paired_interval, restricted_mean, wilson

Figures = dict[str, Any]
Runs = Mapping[str, Figures]
"""seed -> figures of a run"""
Results = Mapping[str, Mapping[str, Runs]]
"""system -> strategy -> seed -> figures of a run"""

BASE = "before"
LEARNING = (
    "strategy", "seeds", "labels to target", "difference", "force RMSE, eV/Å", "ratio", "energy RMSE, meV/atom",
    "MD steps", "minutes",
)  # fmt: skip
UNCERTAINTY = (
    "strategy", "promised", "chosen: maxima", "chosen: atoms", "random: maxima", "test: maxima", "test: atoms",
    "ρ maxima", "ceiling", "ρ atoms", "ceiling", "worst 1 % found", "below a third", "jump",
)  # fmt: skip


def tables(results: Results) -> list[str]:
    """Lines of Markdown: two tables per system, then two of all systems together."""
    lines: list[str] = []
    with_base = {system: strategies for system, strategies in results.items() if BASE in strategies}
    for system, strategies in with_base.items():
        lines += [f"### {system}: force RMSE of {target_of(strategies[BASE]):.3f} eV/Å is the target", ""]
        lines += both({system: strategies})
    if len(with_base) > 1:
        lines += [f"### All systems: {', '.join(with_base)}", "", *both(with_base)]
    return lines


def both(results: Results) -> list[str]:
    """The two tables of these systems; a strategy needs runs on every one of them."""
    first, *others = results.values()
    names = [name for name in first if all(name in other for other in others)]
    targets = {system: target_of(strategies[BASE]) for system, strategies in results.items()}
    learning = [learning_row(name, results, targets) for name in names]
    uncertainty = [uncertainty_row(name, results) for name in names]
    return [*markdown(LEARNING, learning), "", *markdown(UNCERTAINTY, uncertainty), ""]


def markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """A table."""
    names = list(head)
    yield f"| {' | '.join(names)} |"
    yield "|" + "---|" * len(names)
    for row in rows:
        yield f"| {' | '.join(row)} |"


# ------------------------------------------------------------------------------------------ labels and errors


def target_of(runs: Runs) -> float:
    """The error to reach: mean of the last models of `BASE`."""
    return float(np.mean([run["models"][-1]["force_rmse"] for run in runs.values()]))


def reached(run: Figures, target: float) -> int | None:
    """Labels of a run's first model at or below the target; None if it has none."""
    return labels_to_reach([(model["labels"], model["force_rmse"]) for model in run["models"]], target)


def counted(run: Figures, target: float) -> int:
    """`reached`, where a run that missed the target counts as all of its labels."""
    labels = reached(run, target)
    return int(run["limit"]) if labels is None else labels


def paired(name: str, results: Results, difference: Callable[[str, Figures, Figures], float]) -> dict[str, list[float]]:
    """System -> difference (system, run of this strategy, run of `BASE`) for every seed that both have."""
    return {
        system: [difference(system, runs[name][seed], runs[BASE][seed]) for seed in runs[name] if seed in runs[BASE]]
        for system, runs in results.items()
    }


def interval(differences: Mapping[str, list[float]], show: Callable[[float], str]) -> str:
    """'mean [low, high]'; empty if a system has no pair, without interval where one has a single pair."""
    if not all(differences.values()):
        return ""
    mean, low, high = paired_interval(differences)
    return show(mean) if math.isnan(low) else f"{show(mean)} [{show(low)}, {show(high)}]"


def learning_row(name: str, results: Results, targets: Mapping[str, float]) -> list[str]:
    """Labels to the target, final errors, cost; means over runs."""
    runs = [(system, run) for system, strategies in results.items() for run in strategies[name].values()]
    labels = [reached(run, targets[system]) for system, run in runs]
    missed = labels.count(None)
    last = [run["models"][-1] for _, run in runs]
    few = paired(name, results, lambda system, a, b: counted(a, targets[system]) - counted(b, targets[system]))
    ratio = paired(
        name, results, lambda _, a, b: math.log(a["models"][-1]["force_rmse"] / b["models"][-1]["force_rmse"])
    )
    limit = max(run["limit"] for _, run in runs)
    mean_labels = f"{'≥ ' if missed else ''}{restricted_mean(labels, limit):.1f}"
    return [
        name,
        seeds_of(name, results),
        f"{mean_labels} ({missed} of {len(runs)} missed)",
        "" if name == BASE else interval(few, lambda value: f"{value:+.1f}"),
        spread([model["force_rmse"] for model in last], 3) if len(results) == 1 else "",
        "" if name == BASE else interval(ratio, lambda value: f"{math.exp(value):.2f}"),
        spread([model["energy_rmse_mev_per_atom"] for model in last], 2) if len(results) == 1 else "",
        f"{np.mean([model['md_steps'] for model in last]):.0f}",
        f"{np.mean([sum(model['minutes'] for model in run['models']) for _, run in runs]):.1f}",
    ]


def seeds_of(name: str, results: Results) -> str:
    """Number of seeds; smallest to largest where systems differ."""
    counts = sorted({len(strategies[name]) for strategies in results.values()})
    return "-".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))


def spread(values: list[float], digits: int) -> str:
    """Mean ± standard deviation of the runs."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


# ------------------------------------------------------------------------------------------ uncertainties


def uncertainty_row(name: str, results: Results) -> list[str]:
    """Promises and what is found, over all models and all chosen labels of these runs."""
    runs = [run for strategies in results.values() for run in strategies[name].values()]
    models = [model for run in runs for model in run["models"]]
    tests = [model["test"] for model in models]
    own, random = pool(models, random=False), pool(models, random=True)
    factors = [jump for run in runs for jump in jumps([model["factors"] for model in run["models"]])]
    low_errors = [
        error < run["threshold"] / 3.0 for run in runs for error in pool(run["models"], random=False)["error"]
    ]

    def mean(key: str) -> str:
        values = [test[key] for test in tests if not math.isnan(test[key])]
        return f"{np.mean(values):.2f}" if values else ""

    return [
        name,
        mean("promised"),
        covered(own),
        f"{sum(own['atoms_covered']) / sum(own['atoms']):.2f}" if own["atoms"] else "",
        covered(random),
        mean("structures_covered"),
        mean("atoms_covered"),
        mean("spearman_maxima"),
        mean("spearman_maxima_ceiling"),
        mean("spearman_atoms"),
        mean("spearman_atoms_ceiling"),
        mean("worst_found"),
        # without a threshold nothing was stopped too early
        f"{np.mean(low_errors):.2f}" if low_errors and not any(map(math.isinf, thresholds(runs))) else "",
        f"{np.median(factors):.2f}" if factors else "",
    ]


def thresholds(runs: Iterable[Figures]) -> list[float]:
    """Thresholds of runs; JSON has infinity as Python writes it."""
    return [float(run["threshold"]) for run in runs]


def pool(models: Iterable[Figures], random: bool) -> dict[str, list[float]]:
    """Labels that were chosen by uncertainty and the like (or, ``random``, by chance), of all models together."""
    found: dict[str, list[float]] = {key: [] for key in ("error", "u", "atoms", "atoms_covered")}
    for model in models:
        chosen = model["chosen"]
        for k, by_chance in enumerate(chosen["random"]):
            if by_chance == random:
                for key, values in found.items():
                    values.append(chosen[key][k])
    return found


def covered(labels: Mapping[str, list[float]]) -> str:
    """Share of structures whose largest error is below their largest u, with Wilson's interval."""
    number = len(labels["error"])
    if not number:
        return ""
    hits = sum(error <= u for error, u in zip(labels["error"], labels["u"], strict=True))
    low, high = wilson(hits, number)
    return f"{hits / number:.2f} [{low:.2f}, {high:.2f}]"
