"""How anharmonic are crystals? The share of each order of the force constants in the force, side by side.
python anharmonicity.py NAME=SOURCE ... [--out anharmonicity]

SOURCE is the folder of a dynamic run (its newest trajectories), or MODEL:STRUCTURES, a model file and thermal
structures (extxyz), for instance:

  python anharmonicity.py "Si, 900 K=silicon_run" "SnSe, 600 K=../snse/model.pt:../snse/labels/test_600K.extxyz.xz"

Writes OUT.png and OUT.md: rms force of each order over the rms of the whole force.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ase import Atoms

from ubmd.analysis.crystal_figures import order_shares_figure
from ubmd.analysis.dynamic_report import newest_structures
from ubmd.data.structures import read_structures
from ubmd.learning import RunFolder
from ubmd.potentials.force_constants.potential import Potential, anharmonicity, load_potential, order_shares
from ubmd.runs.reading import read_rounds


def read(source: str) -> tuple[Potential, list[Atoms]]:
    """A potential, and structures to measure it on (of a run: those of the highest temperature)."""
    model, _, structures = source.partition(":")
    if structures:
        return load_potential(Path(model)), read_structures(Path(structures))
    folder = RunFolder(Path(model))
    found, _ = newest_structures(folder, read_rounds(folder))
    hottest = max(found, key=lambda name: float(name.split()[0]) if name else 0.0)
    return load_potential(folder.path), found[hottest]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="NAME=SOURCE")
    parser.add_argument("--out", type=Path, default=Path("anharmonicity"), help="files, without their ending")
    arguments = parser.parse_args()
    shares, beyond = {}, {}
    for text in arguments.sources:
        name, _, source = text.partition("=")
        potential, structures = read(source)
        shares[name], beyond[name] = order_shares(potential, structures), anharmonicity(potential, structures)
    orders = sorted({order for values in shares.values() for order in values})
    lines = [
        f"| crystal | {' | '.join(f'order {order}' for order in orders)} | all above 2 |",
        f"| {' | '.join(['---'] * (len(orders) + 2))} |",
    ]
    for name, values in shares.items():
        cells = [f"{values[order]:.3f}" if order in values else "-" for order in orders]
        lines.append(f"| {name} | {' | '.join(cells)} | {beyond[name]:.3f} |")
    text = "\n".join([*lines, ""])
    arguments.out.with_suffix(".md").write_text(text, encoding="utf-8")
    order_shares_figure(shares, arguments.out.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
