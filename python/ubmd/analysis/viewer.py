"""Structures in a page of their own, beside the report: a map of errors and a viewer (chemiscope), without a network.

The page contains the script of the chemiscope that is installed. Texts of a run folder are escaped wherever they go,
and the page may load nothing: a run folder may come from anyone.
"""

from __future__ import annotations

import html
import json
import math
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from ubmd.analysis.document import Link, page_head
from ubmd.analysis.page_style import STYLE
from ubmd.analysis.shown_structures import RULE, Shown
from ubmd.files import replacing
from ubmd.texts import number

PAGE = "structures.html"
MISSING = "pip install 'ubmd[viewer]' and a new report add a page in which the structures can be turned and compared."

# The map compiles its drawing routines, which browsers call eval.
_RULES = (
    "default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline' 'unsafe-eval'; worker-src blob:; font-src data:"
)
_COLOUR, _ERROR, _FORCE = "u of each atom (eV/Å)", "RMSE(F) of each atom (eV/Å)", "force on each atom (eV/Å)"
_NAN = "***NaN***"  # JSON has none

_LOOK = """
/* The viewer draws on white in both schemes. */
.viewer { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1rem;
          background: #fff; color: #1a1a1a; color-scheme: light; padding: 0.6rem; border: 1px solid var(--line);
          border-radius: 4px; }
.viewer > div { display: flex; flex-direction: column; min-width: 0; height: clamp(26rem, 82vh, 36rem); }
.viewer > div:first-child { padding-bottom: 2.4rem; }
#place-meta { display: none; }
#place-map, #place-structure { flex: 1; min-height: 0; min-width: 0; }
.index { max-height: 26rem; overflow: auto; }
"""

_SCRIPT = """
const text = document.getElementById("data").textContent;
const data = JSON.parse(text, (_, value) => value === "%s" ? NaN : value);
const places = {meta: "place-meta", map: "place-map", structure: "place-structure", info: "place-info"};
Chemiscope.DefaultVisualizer.load(places, data, new Chemiscope.Warnings()).then((viewer) => {
  const show = () => {
    const wanted = /^#\\d+$/.test(location.hash) ? Number(location.hash.slice(1)) : -1;
    if (wanted >= 0 && wanted < data.structures.length) {
      viewer.select(viewer.indexer.fromStructure(wanted, "structure"));
      document.getElementById("viewer").scrollIntoView({block: "nearest"});
    }
    document.body.dataset.shown = String(wanted);
  };
  addEventListener("hashchange", show);
  show();
});
"""


def link_to_viewer(text: str) -> Link | None:
    """A link to the page; None where the extra ubmd[viewer] is not installed."""
    return Link(text, PAGE) if find_spec("chemiscope") is not None else None


def write_viewer(structures: Sequence[Shown], path: Path, title: str, u_name: str, error_name: str) -> Path:
    """Write the page; ``structures.html#12`` shows the structure with index 12.

    Args:
        structures: at least one.
        path: of the page.
        title: of the page, such as that of the report.
        u_name, error_name: what `Shown.u` and `Shown.error` are, without units.

    Returns:
        The path.
    """
    import chemiscope

    script = Path(chemiscope.__file__).parent / "sphinx" / "static" / "chemiscope.min.js"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that are not known
        dataset = chemiscope.create_input(**_input(structures, title, u_name, error_name))
    # Within a script only these letters could end it.
    data = json.dumps(_without_nan(dataset), ensure_ascii=True).replace("<", "\\u003c")
    code = script.read_text(encoding="utf-8").replace("</script", "<\\/script")
    parts = [
        page_head(title, _RULES, STYLE + _LOOK),
        f"<header><h1>{html.escape(title)}</h1>{_introduction(structures)}</header>",
        '<div class="viewer" id="viewer"><div><div id="place-meta"></div><div id="place-map"></div></div>',
        '<div><div id="place-structure"></div><div id="place-info"></div></div></div>',
        "<h2>All structures of this page</h2>",
        f'<div class="wide index" tabindex="0">{_index(structures, u_name, error_name)}</div>',
        f"<p>Drawn by chemiscope {html.escape(version('chemiscope'))} (BSD 3-Clause licence), chemiscope.org.</p>",
        f'<script type="application/json" id="data">{data}</script>',
        f"<script>{code}</script><script>{_SCRIPT % _NAN}</script></body></html>\n",
    ]
    with replacing(path) as file:
        file.write("\n".join(parts).encode())
    return path


def _introduction(structures: Sequence[Shown]) -> str:
    known = any(one.atomic_u is not None for one in structures)
    colours = "uncertainty (grey where it is not known)" if known else "force"
    return (
        "<p>Each point of the map is a structure: a click shows it, with its atoms coloured by their "
        f"{colours}. The menus with three bars choose what the map and the viewer draw, such as the forces "
        f"of the reference as arrows (shapes). {html.escape(RULE)}</p>"
    )


def _index(structures: Sequence[Shown], u_name: str, error_name: str) -> str:
    """A table of all structures, each with a link that shows it."""
    head = ["structure", "kind", "origin", f"{u_name} (eV/Å)", f"{error_name} (eV/Å)", "energy (eV/atom)", "note"]
    rows = [
        f'<td><a href="#{k}">{k}</a></td>'
        + "".join(
            f"<td>{html.escape(text)}</td>"
            for text in (one.kind, one.place, *(number(x, ".3f") for x in (one.u, one.error, one.energy)), one.note)
        )
        for k, one in enumerate(structures)
    ]
    titles = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return f"<table><thead><tr>{titles}</tr></thead><tbody>\n{body}\n</tbody></table>"


def _input(structures: Sequence[Shown], title: str, u_name: str, error_name: str) -> dict[str, Any]:
    """Arguments of chemiscope's function; its viewer shows texts as texts."""
    import chemiscope

    frames = [_bare(one.atoms) for one in structures]
    u = _of_atoms([one.atomic_u for one in structures], frames)
    errors = _of_atoms([one.atomic_error for one in structures], frames)
    forces = _of_atoms([one.forces for one in structures], frames, (3,))
    properties = {
        u_name: _property([one.u for one in structures], "eV/Å"),
        error_name: _property([one.error for one in structures], "eV/Å"),
        "energy": _property([one.energy for one in structures], "eV/atom"),
        "iteration": _property([one.iteration for one in structures]),
        "kind": {"target": "structure", "values": [one.kind for one in structures]},
        "origin": {"target": "structure", "values": ["; ".join(filter(None, (s.place, s.note))) for s in structures]},
        _COLOUR: {"target": "atom", "values": u.round(5)},
        **({_ERROR: {"target": "atom", "values": errors.round(5)}} if np.isfinite(errors).any() else {}),
        _FORCE: {"target": "atom", "values": np.linalg.norm(forces, axis=1).round(4)},
    }
    return {
        "structures": frames,
        "metadata": {"name": title},
        "properties": properties,
        "environments": chemiscope.all_atomic_environments(frames),
        "shapes": {"reference forces": _arrows(np.nan_to_num(forces))},
        "settings": _settings(structures, u_name, error_name, u),
    }


def _settings(structures: Sequence[Shown], u_name: str, error_name: str, atomic_u: np.ndarray) -> dict[str, Any]:
    """What the page shows at first: errors against uncertainties, as the report's picture, and u of each atom."""
    import chemiscope

    known = [(one.u, one.error) for one in structures if np.isfinite([one.u, one.error]).all()]
    y, form = (error_name, "log") if len(known) > 1 else ("energy", "linear")
    scale = form if all(min(pair) > 0 for pair in known) else "linear"
    x = u_name if np.isfinite([one.u for one in structures]).sum() > 1 else "iteration"
    finite = atomic_u[np.isfinite(atomic_u)]
    colour = {"property": _COLOUR, "min": 0.0, "max": float(finite.max())} if len(finite) else {"property": _FORCE}
    return chemiscope.quick_settings(  # type: ignore[no-any-return]
        symbol="kind",
        map_color="energy",
        periodic=bool(structures[0].atoms.pbc.any()),
        map_settings={"x": {"property": x, "scale": scale}, "y": {"property": y, "scale": scale}},
        structure_settings={"color": colour | {"palette": "viridis"}},
    )


def _of_atoms(
    values: Sequence[NDArray[np.float64] | None], frames: Sequence[Atoms], shape: tuple[int, ...] = ()
) -> NDArray[np.float64]:
    """Values of all atoms of all structures; NaN where they are not known."""
    return np.concatenate(
        [
            np.full((len(atoms), *shape), np.nan) if one is None else one
            for one, atoms in zip(values, frames, strict=True)
        ]
    )


def _property(values: Sequence[float], units: str = "") -> dict[str, Any]:
    return {"target": "structure", "values": np.array(values, dtype=float)} | ({"units": units} if units else {})


def _arrows(forces: np.ndarray) -> dict[str, Any]:
    """One arrow for each atom, the longest 2 Å long."""
    longest = float(np.linalg.norm(forces, axis=1).max(initial=0.0)) or 1.0
    arrows = [{"vector": vector} for vector in (2.0 / longest * forces).round(3).tolist()]
    sizes = {"baseRadius": 0.08, "headRadius": 0.16, "headLength": 0.25}
    return {"kind": "arrow", "parameters": {"global": sizes, "atom": arrows}}


def _bare(atoms: Atoms) -> Atoms:
    """Elements, positions and cell only."""
    return Atoms(atoms.numbers, atoms.positions.round(4), cell=atoms.cell, pbc=atoms.pbc)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return _NAN
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list | tuple) else value
