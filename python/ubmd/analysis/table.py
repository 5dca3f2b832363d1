"""Finished runs as rows of a table, beside published ones: same columns and units, mean ± standard deviation."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ubmd.analysis.document import ReportTable, as_markdown, escaped
from ubmd.analysis.run_data import value_or_nan
from ubmd.analysis.run_groups import Run, group_runs
from ubmd.errors import DataError
from ubmd.valid_json import parse_json

COLUMNS: dict[str, tuple[str, str]] = {
    "labels": ("labels", ".0f"),
    "coverage": ("coverage", ".3f"),
    "energy": ("E, meV/atom", ".2f"),
    "force": ("F, eV/Å", ".3f"),
    "energy_trans": ("E trans, meV/atom", ".2f"),
    "force_trans": ("F trans, eV/Å", ".3f"),
    "energy_cis": ("E cis, meV/atom", ".1f"),
    "force_cis": ("F cis, eV/Å", ".3f"),
    "stress": ("S, MPa", ".1f"),
    "position_act": ("position ACT, ps", ".2f"),
    "uncertainty_act": ("uncertainty ACT, ps", ".3f"),
    "volume_min": ("smallest V, Å³", ".0f"),
    "volume_max": ("largest V, Å³", ".0f"),
    "time": ("MD, ps", ".0f"),
    "minutes": ("wall time, min", ".1f"),
}
"""key of a value -> (title with unit, format)"""

Values = dict[str, float]


@dataclass(frozen=True)
class Repeats:
    """One row: repeats of one kind of run."""

    name: str
    runs: list[Values]
    """per repeat, keys of `COLUMNS`; what is missing is not known"""
    where: str = ""
    """folders or files, seeds, dates, machine"""

    def cell(self, key: str) -> str:
        """Mean ± sample standard deviation, or '-'."""
        known = np.array([run[key] for run in self.runs if np.isfinite(run.get(key, np.nan))])
        form = COLUMNS[key][1]
        if not len(known):
            return "-"
        text = format(float(known.mean()), form)
        spread = float(known.std(ddof=1)) if len(known) > 1 else 0.0
        if len(known) < 2 or (key == "labels" and spread == 0.0):
            return text
        return f"{text} ± {format(spread, form)}"


@dataclass(frozen=True)
class Published:
    """A table from the literature."""

    source: str
    rows: dict[str, dict[str, Any]]
    """name -> key of `COLUMNS` -> mean, or [mean, standard deviation]"""
    label: str = "published"
    """what its rows are called, e.g. 'paper'"""
    label_of_runs: str = ""
    """what rows of runs are called beside it, e.g. 'ours'; empty: only how many runs they are"""

    def cell(self, name: str, key: str) -> str:
        """Mean ± standard deviation, or '-'."""
        value = self.rows[name].get(key)
        if value is None:
            return "-"
        form = {"coverage": ".2f", "position_act": "g", "uncertainty_act": "g"}.get(key, COLUMNS[key][1])
        return " ± ".join(format(part, form) for part in (value if isinstance(value, list) else [value]))


def read_published(path: Path) -> Published:
    """A TOML file with ``source`` and one table [[row]] per row: ``name``, then values as in `COLUMNS`.

    It may say how its rows and those of runs are called: ``label``, ``label_of_runs``.

    Raises:
        DataError: the file is no such table.
    """
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
        rows = {row["name"]: {key: row[key] for key in row if key != "name"} for row in content["row"]}
        unknown = {key for row in rows.values() for key in row} - set(COLUMNS)
    except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{path} has no table of published numbers (source, and [[row]] with name): {error}.") from None
    if unknown:
        raise DataError(f"{path}: unknown column '{sorted(unknown)[0]}'; known are {', '.join(COLUMNS)}.")
    words = {key: str(content[key]) for key in ("label", "label_of_runs") if key in content}
    return Published(str(content.get("source", "")), rows, **words)


def run_values(run: Run, labels: int | None = None) -> Values:
    """One run as values of `COLUMNS`, at its end or at the first model with at least this many labels.

    Coverage, volumes and time count the MD that found these labels: all before the training of that model; minutes
    are those of all stages until the model was trained. Errors are those on the test set; 'trans' and 'cis' refer to
    the amide bonds of its structures. Autocorrelation times are those of the traces of the whole run.

    Raises:
        DataError: the run has no model with so many labels.
    """
    index = next((k for k, entry in enumerate(run.history) if labels is None or entry.labels >= labels), None)
    if index is None:
        raise DataError(
            f"{run.folder.path} has no model with {labels} labels yet; the last one has {_last(run)}. Lower --labels."
        )
    index = len(run.history) - 1 if labels is None else index
    entry, before = run.history[index], run.history[index - 1] if index else None
    md_steps = before.md_steps if before else 0
    energy, force, stress = map(value_or_nan, entry.rmse_on("test"))
    values = {
        "labels": float(entry.labels),
        "coverage": value_or_nan(before.coverage if before else None),
        "energy": energy,
        "force": force,
        "stress": stress,
        "position_act": run.times.positions,
        "uncertainty_act": run.times.uncertainty,
        "time": md_steps * run.settings.md.timestep / 1000.0,
        "minutes": run.minutes(index),
    }
    for name, errors in run.isomer_errors(index).items():
        energy, force, _ = map(value_or_nan, errors.rmse)
        values |= {f"energy_{name}": energy, f"force_{name}": force}
    return values | _volumes(run, md_steps)


def _volumes(run: Run, md_steps: int) -> Values:
    """Range of the volumes of the whole cell."""
    volumes = run.frames.volumes()
    if volumes is None:
        return {}
    atoms = len(run.frames.structures[0])
    seen = volumes[run.frames.md_steps <= md_steps] * atoms
    return {"volume_min": float(seen.min()), "volume_max": float(seen.max())} if len(seen) else {}


def _last(run: Run) -> int:
    return run.history[-1].labels


def read_titles(path: Path) -> dict[str, str]:
    """Titles of rows from a TOML file with a table [rows.NAME] and a ``title`` in it for each.

    Raises:
        DataError: there is no such file.
    """
    try:
        rows = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))["rows"]
        return {name: str(row["title"]) for name, row in rows.items()}
    except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise DataError(f"{path} holds no rows (a table [rows.NAME] with a title each): {error}.") from None


def collect_rows(
    paths: Sequence[Path],
    names: Sequence[str] | None = None,
    labels: int | None = None,
    titles: Mapping[str, str] | None = None,
    skip: Callable[[str], None] | None = None,
    run_models: bool = False,
) -> list[Repeats]:
    """Rows from run folders (those that differ in their seed only are repeats) and from row files.

    A row file is JSON with ``name`` and values as in `COLUMNS`, for what is no run folder; files of one name are
    repeats.

    Args:
        paths: run folders and row files.
        names: of the groups of run folders, in the order in which they first appear.
        labels: take the first model with at least this many labels (default: the last).
        titles: name of a run folder without its seed -> name of the row.
        skip: called with the reason for every run that has nothing to count yet; None: that is an error.
        run_models: run the model files of folders that lack their predictions.

    Raises:
        DataError: a path is neither, or (without ``skip``) a run has no finished iteration or lacks such a model.
    """
    counted: dict[Run, Values] = {}
    for path in (Path(path) for path in paths if Path(path).suffix != ".json"):
        try:
            run = Run(path, run_models)
            counted[run] = run_values(run, labels)
        except DataError as error:
            if skip is None:
                raise
            skip(str(error))
    rows = []
    for name, runs in (group_runs(list(counted), names).groups if counted else {}).items():
        title = (titles or {}).get(re.sub(r"_seed\d+$", "", name), name)
        rows.append(Repeats(title, [counted[run] for run in runs], _provenance(runs)))
    found: dict[str, list[Values]] = {}
    for path in (path for path in paths if Path(path).suffix == ".json"):
        name, values = _read_row(Path(path))
        found.setdefault(name, []).append(values)
    return rows + [Repeats(name, runs, "row files") for name, runs in found.items()]


def _read_row(path: Path) -> tuple[str, Values]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        return str(content["name"]), {key: float(content[key]) for key in COLUMNS if content.get(key) is not None}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a row file (JSON with name and values): {error}.") from None


def _provenance(runs: Sequence[Run]) -> str:
    """Folders, seeds, date and machine, from the manifests."""
    manifests = [run.folder.read_manifest() for run in runs]
    folders = ", ".join(run.folder.path.resolve().name for run in runs)
    seeds = ", ".join(str(run.settings.seed) for run in runs)
    dates = sorted({str(manifest["created"])[:10] for manifest in manifests})
    machine = manifests[0]["machine"]
    begun = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    lacks = "".join(f". Without errors by isomer: {run.lacks}" for run in runs if run.lacks)
    return f"{folders}; seeds {seeds}; begun {begun}; {machine['cores']} cores, {machine['system']}{lacks}"


def table_markdown(rows: Sequence[Repeats], published: Published | None = None) -> str:
    """Markdown: every row of runs and, below it, the published row of the same name; then where the runs are from.

    Published rows without runs are listed, too, so that a missing row shows.
    """
    published = published or Published("", {})
    made = {row.name: row for row in rows}
    used = [
        key
        for key in COLUMNS
        if any(row.cell(key) != "-" for row in rows) or any(key in values for values in published.rows.values())
    ]
    lines = []
    for name in [*published.rows, *(name for name in made if name not in published.rows)]:
        if name in made:
            count = len(made[name].runs)
            label = ", ".join(filter(None, [published.label_of_runs, f"{count} run{'s' if count != 1 else ''}"]))
            lines.append([name, label, *(made[name].cell(key) for key in used)])
        if name in published.rows:
            lines.append(["" if name in made else name, published.label, *(published.cell(name, k) for k in used)])
    text = as_markdown(ReportTable(["row", "source", *(COLUMNS[key][0] for key in used)], lines))
    notes = [f"{published.label.capitalize()}: {escaped(published.source)}"] if published.source else []
    notes += [escaped(f"{row.name}: {row.where}") for row in rows if row.where]
    return "\n".join([*text, "", *(f"- {note}" for note in notes), ""])
