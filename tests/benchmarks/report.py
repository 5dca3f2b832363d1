"""The figures of the suite as JSON keys, and as a table with units, targets and ratios."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Figures = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A line of the table; target "<= 1.5" or ">= 4", if there is one."""

    key: str
    meaning: str
    unit: str = ""
    target: str = ""


TABLE = (
    "Energies and forces, 512 atoms of MgO (56 neighbours), one thread",
    Row("gflops_float32", "bare matrix products of the network, float32, torch.mm", "GFLOP/s"),
    Row("gflops_float32_fastest", "the same by the fastest library at hand", "GFLOP/s"),
    Row("us_per_atom_512", "light network", "µs/atom/step"),
    Row("us_per_atom_512_paper", "paper network", "µs/atom/step"),
    Row("gemm_ratio", "light, over its own matrix products (fastest library)", "×", "<= 1.5"),
    Row("gemm_ratio_paper", "paper, over its own matrix products (fastest library)", "×", "<= 1.5"),
    Row("gemm_ratio_torch", "light, over the same products by torch.mm", "×"),
    Row("glue_fraction", "graph, copies, scatter: share of the step", "", "<= 0.05"),
    Row("glue_fraction_biased", "the same in the biased default", "", "<= 0.05"),
    Row("first_step_ratio", "slowest of the first steps of a process, over a steady one", "×", "<= 3"),
    Row("first_step_ratio_22", "the same, biased default, 22 atoms, over a steady step with bias", "×", "<= 3"),
    "Biased over unbiased step, light, 512 atoms",
    Row("bias_ratio_default", "p = 128, every 4 steps (u, u_i, bias)", "×", "<= 1.3"),
    Row("bias_ratio_every10", "p = 128, every 10 steps", "×", "<= 1.1"),
    Row("bias_ratio_exact_512", "p = 512, every step, without u_i", "×"),
    Row("bias_ratio_exact", "the same, 4096 atoms", "×", "<= 3"),
    Row("bias_ratio_exact_ui", "p = 512, every step, with u_i", "×", "<= 4"),
    Row("bias_ratio_exact_ui_4096", "the same, 4096 atoms", "×", "<= 4"),
    Row("bias_ratio_exact_paper", "paper network, p = 512, every step, with u_i", "×"),
    "Small systems: alanine dipeptide (22 atoms), a periodic framework (76 atoms, 68 neighbours)",
    Row("ms_plain_step_22", "22 atoms, light, unbiased", "ms/step"),
    Row("ms_biased_step_22", "22 atoms, light, biased default", "ms/step", "<= 1.2"),
    Row("bias_ratio_22", "the same over unbiased", "×", "<= 1.5"),
    Row("ms_biased_step_22_paper", "22 atoms, paper, p = 512, every step, with u_i", "ms/step", "<= 4"),
    Row("ms_plain_step_76", "76 atoms, light, unbiased", "ms/step"),
    Row("ms_biased_step_76", "76 atoms, light, biased default", "ms/step"),
    Row("bias_ratio_76", "the same over unbiased", "×", "<= 1.5"),
    Row("ms_biased_step_76_paper", "76 atoms, paper, p = 512, every step, with u_i", "ms/step"),
    "Size and ranks",
    Row("flatness_1e5", "time per atom of 10^5 over that of 10^3 atoms", "×", "<= 1.2"),
    Row("n_large", "atoms of the larger one", ""),
    Row("bytes_per_atom", "memory per atom", "bytes"),
    Row("rank2_speedup", "two ranks over one, 4096 atoms", "×", ">= 1.8"),
    Row("rank2_speedup_biased", "the same, biased default", "×", ">= 1.8"),
    "Energy drift in NVE, 22 atoms, 0.5 fs, forces of about 1 eV/Å",
    Row("drift_none", "without bias", "meV/atom/ps"),
    Row("drift_every1", "bias every step", "meV/atom/ps"),
    Row("drift_every4", "bias every 4 steps", "meV/atom/ps"),
    Row("drift_every10", "bias every 10 steps", "meV/atom/ps"),
    "Mixed precision against double: RMS error over RMS, the larger of a crystal and a molecule",
    Row("mixed_error_force", "forces", "", "<= 0.0001"),
    Row("mixed_error_u", "u of structures", "", "<= 0.01"),
    Row("mixed_error_ui", "u_i of atoms", "", "<= 0.01"),
    Row("mixed_error_bias", "bias force", "", "<= 0.02"),
    "Training, light network, mini-batches of 32, one thread",
    Row("train_ms_22", "22-atom molecules", "ms/step"),
    Row("train_ms_76", "76-atom cells", "ms/step"),
    Row("train_configs_per_s_22", "22-atom molecules", "structures/s"),
    Row("train_configs_per_s_76", "76-atom cells", "structures/s"),
    Row("train_gemm_ratio", "over its own matrix products, fastest library (the larger of both sizes)", "×", "<= 2"),
    Row("train_gemm_ratio_22", "22 atoms", "×", "<= 2"),
    Row("train_gemm_ratio_76", "76 atoms", "×", "<= 2"),
    Row("train_speedup", "over the plain torch path (the smaller of both sizes)", "×"),
    Row("warm_start_ratio", "warm start to the accuracy of a training from scratch", "× its time", "<= 0.2"),
    "Peers on the same core",
    Row("snap_speedup", "SNAP 2J=8 (W, 432 atoms) over our light network", "×", ">= 4"),
    Row("us_per_atom_snap8", "SNAP 2J=8", "µs/atom/step"),
    Row("us_per_atom_snap6", "SNAP 2J=6", "µs/atom/step"),
    Row("us_per_atom_pod", "POD", "µs/atom/step"),
    Row("us_per_atom_uf3", "UF3", "µs/atom/step"),
    Row(
        "pytorch_speedup_22", "PyTorch implementation (given, scaled by GFLOP/s), 22 atoms, paper, biased", "×", ">= 1"
    ),
    Row("pytorch_speedup_76", "the same, 76 atoms", "×", ">= 1"),
    Row("pytorch_speedup_512", "the same, 512 atoms", "×", ">= 1"),
    Row("pytorch_speedup_512_plain", "the same, 512 atoms, unbiased", "×", ">= 1"),
    Row("jax_speedup_22", "JAX implementation (given, scaled), 22 atoms, biased; ours light default", "×", ">= 1"),
)


def verdict(value: float | None, target: str) -> str:
    """How far from the target: 1 or less is met."""
    if value is None or not target:
        return ""
    relation, limit = target.split()
    ratio = value / float(limit) if relation == "<=" else float(limit) / value
    return f"{ratio:.2f} {'met' if ratio <= 1.0 else 'MISSED'}"


def number(value: float | None) -> str:
    """Three significant digits; '-' for what wasn't measured."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(figures: Figures) -> str:
    """The first half: all figures with units and targets; the last column is 1 at the target, less is better."""
    lines = [f"{'':68} {'value':>8} {'unit':13} {'target':8} of target"]
    for row in TABLE:
        if isinstance(row, str):
            lines += ["", row]
            continue
        value = figures.get(row.key)
        cells = f"{number(value):>8} {row.unit:13} {row.target:8} {verdict(value, row.target)}"
        lines.append(f"  {row.meaning:66} {cells}".rstrip())
    return "\n".join(lines)


def profile_table(profiles: dict[str, dict[str, float]]) -> str:
    """The second half: where the time goes, in % of the loop; LAMMPS's sections, then those of pair_style ubmd.

    LAMMPS counts the plugin's work under Pair (energies, forces) and Modify (fix ubmd): the lines of the plugin say
    what it is.
    """
    names = list(dict.fromkeys(part for parts in profiles.values() for part in parts if part != "Loop"))
    width = max(14, *(len(name) + 2 for name in profiles)) if profiles else 14
    lines = ["Where the time goes, % of the loop", f"{'':16}" + "".join(f"{name:>{width}}" for name in profiles)]
    lines.append(f"{'ms per step':16}" + "".join(f"{1000 * p['Loop']:>{width}.3f}" for p in profiles.values()))
    for name in names:
        shares = (100 * parts.get(name, 0.0) / parts["Loop"] for parts in profiles.values())
        lines.append(f"{name:16}" + "".join(f"{share:>{width}.1f}" for share in shares))
    return "\n".join(lines)


def write_json(path: Path, figures: Figures) -> None:
    """All figures; what could not be measured is null."""
    path.write_text(json.dumps(_finite(figures), indent=1, sort_keys=True) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
