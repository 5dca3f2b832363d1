"""Report of plain trajectories from any program: numbers for a terminal, and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ubmd.analysis import trajectory_figures as figures
from ubmd.analysis.trajectory import Trajectory, correlation_times, read_trajectory
from ubmd.errors import DataError
from ubmd.measure.autocorrelation import autocorrelation_time, mean_autocorrelation
from ubmd.measure.coverage import coverage
from ubmd.measure.torsions import Torsion, torsions
from ubmd.measure.volumes import slow_wave
from ubmd.texts import number

_WAVES = 4  # trajectories whose V(t) is drawn


def describe_trajectories(
    files: Sequence[Path],
    spacing: float | None,
    model: Path | None,
    variables: Mapping[str, Torsion],
    shortest: float,
    out: Path,
) -> tuple[list[tuple[str, str]], list[Path]]:
    """Coverage, volumes and autocorrelation times of trajectories of one system.

    Args:
        files: see `ubmd.analysis.trajectory.read_trajectory`.
        spacing: between frames, ps; None for traces.
        model: says max_i u_i where the files don't.
        variables: name -> torsion, two for coverage.
        shortest: trajectory for autocorrelation times, ps.
        out: folder for pictures.

    Returns:
        (what and value of each number, pictures).

    Raises:
        DataError: a file cannot be read as a trajectory.
    """
    read = [read_trajectory(Path(path), spacing) for path in files]
    found = [t.with_uncertainty(model) if model is not None and t.max_u is None else t for t in read]
    rows = [
        ("trajectories", f"{len(found)}, {sum(t.duration for t in found):,.1f} ps together"),
        ("time between frames", f"{1000 * found[0].spacing:g} fs"),
    ]
    pictures: list[Path] = []
    _add_torsions(found, variables, rows, pictures, out)
    _add_volumes(found, files, rows, pictures, out)
    _add_times(found, shortest, rows, pictures, out)
    return rows, pictures


def _add_torsions(
    found: Sequence[Trajectory],
    variables: Mapping[str, Torsion],
    rows: list[tuple[str, str]],
    pictures: list[Path],
    out: Path,
) -> None:
    if not variables:
        return
    _check_atoms(variables, min(len(t.numbers) for t in found))
    angles = np.concatenate([torsions(t.structures(), list(variables.values())) for t in found])
    rows.append((f"coverage of ({', '.join(variables)})", f"{coverage(angles):.3f} from {len(angles):,} frames"))
    if len(variables) == 2:
        pictures.append(figures.torsion_histogram_figure({"": angles}, out / "torsions.png", list(variables)))


def _check_atoms(variables: Mapping[str, Torsion], n_atoms: int) -> None:
    """DataError unless a torsion is of four different atoms of the structure."""
    for name, atoms in variables.items():
        if len(set(atoms)) < 4 or min(atoms) < 0 or max(atoms) >= n_atoms:
            raise DataError(
                f"--torsion {name}={','.join(map(str, atoms))}: it needs four different atoms, counted from 0 to "
                f"{n_atoms - 1}."
            )


def _add_volumes(
    found: Sequence[Trajectory], files: Sequence[Path], rows: list[tuple[str, str]], pictures: list[Path], out: Path
) -> None:
    named = [(path.stem, t, t.volumes) for path, t in zip(files, found, strict=True)]
    moving = [(name, t, v) for name, t, v in named if v is not None and float(np.ptp(v)) > 1e-6 * float(v.mean())]
    if not moving:
        return
    joined = np.concatenate([v for *_, v in moving])
    rows.append(("volume", f"{joined.min():.1f} to {joined.max():.1f} Å³, mean {joined.mean():.1f} Å³"))
    rows.append(("autocorrelation time of the volume", _time([v for *_, v in moving], moving[0][1].spacing)))
    pictures.append(figures.histogram_figure({"": joined}, out / "volumes.png", "Volume (Å³)"))
    waves = {}
    for name, t, v in moving[:_WAVES]:
        times = t.spacing * np.arange(len(v))
        waves[name] = (times, v, slow_wave(times, v))
        fit = waves[name][2]
        rows.append(
            (
                f"{name}: wave with a period of twice its length",
                f"amplitude {fit.amplitude:.1f} Å³, noise {fit.noise:.1f} Å³, explains {100 * fit.explained:.0f} %",
            )
        )
    pictures.append(figures.slow_wave_figure(waves, out / "volume_against_time.png"))


def _add_times(
    found: Sequence[Trajectory], shortest: float, rows: list[tuple[str, str]], pictures: list[Path], out: Path
) -> None:
    long = [t for t in found if t.duration >= shortest]
    times = correlation_times(long, shortest)
    rows.append(("autocorrelation time of positions", f"{number(times.positions, '.4g')} ps"))
    rows.append(("autocorrelation time of max u", f"{number(times.uncertainty, '.4g')} ps"))
    rows.append(("trajectories used for both", f"{times.trajectories}, {times.duration:,.1f} ps together"))
    if not long:
        return
    longest = max(2, max(len(t) for t in long) // 2)
    curves = {"Positions": {"": mean_autocorrelation([t.internal_positions() for t in long], longest)}}
    known = [t.max_u for t in long if t.max_u is not None]
    if known:
        curves["max $u_i$"] = {"": mean_autocorrelation(known, longest)}
    shown = {"Positions": {"": times.positions}, "max $u_i$": {"": times.uncertainty}}
    pictures.append(figures.autocorrelation_figure(curves, long[0].spacing, out / "autocorrelation.png", shown))


def _time(series: Sequence[np.ndarray], spacing: float) -> str:
    return f"{number(autocorrelation_time(series, spacing), '.4g')} ps"
