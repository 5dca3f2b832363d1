"""Reports in a real browser: at two widths, in both colour schemes; and the viewer of their structures."""

import io
import json
import re
import tarfile
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from browser import CONTRAST, LAYOUT, opened, start
from matplotlib.image import imread

from ubmd import analysis
from ubmd.analysis import viewer
from ubmd.analysis.document import Document
from ubmd.analysis.dynamic_report import make_dynamic_report
from ubmd.analysis.figures import learning_curve_figure
from ubmd.analysis.shown_structures import FRAME, LABEL, TEST, Shown, thinned
from ubmd.analysis.viewer import write_viewer
from ubmd.runs.stage_names import STAGE_NAMES, stage_name

GOLDEN = Path(__file__).parents[1] / "golden"
HOSTILE = "</script><img src=x onerror=alert(1)><script>alert(2)</script><!--"


@pytest.fixture(scope="module")
def browser():
    driver, browser = start()
    yield browser
    browser.close()
    driver.stop()


def golden_run(kind: str, folder: Path) -> Path:
    """A whole run of an earlier version."""
    with tarfile.open(GOLDEN / f"{kind}.tar.xz") as archive:
        members = [member for member in archive if member.name.startswith("report/")]
        archive.extractall(folder, members=members, filter="data")
    return folder / "report" / "run"


@pytest.fixture(scope="module")
def loop(tmp_path_factory) -> Path:
    """The run folder of a loop with its report; it has a rejected structure with a hostile reason."""
    pytest.importorskip("chemiscope")
    run = golden_run("loop", tmp_path_factory.mktemp("loop"))
    atoms = ase.io.read(run / "dataset.extxyz", 0)
    bare = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
    bare.info |= {"iteration": 0, "replica": 0, "step": 3, "reason": HOSTILE}
    ase.io.write(run / "rejected.extxyz", [bare], format="extxyz")
    analysis.make_report(run)
    return run


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory) -> Path:
    run = golden_run("force_constants", tmp_path_factory.mktemp("dynamic"))
    make_dynamic_report(run)
    return run


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 420])
@pytest.mark.parametrize("kind", ["loop", "dynamic"])
def test_a_report_fits_its_window(kind, width, scheme, browser, request):
    run = request.getfixturevalue(kind)
    with opened(browser, run / "report" / "report.html", width, scheme) as page:
        layout = page.evaluate(LAYOUT)
        assert layout["width"] <= layout["window"] == width
        assert layout["cut"] == []
        assert len(layout["images"]) > 5
        assert min(layout["images"]) > 0
        assert layout["blocks"] > 20
        assert layout["overlaps"] == []
        contrasts = page.evaluate(CONTRAST)
        assert len(contrasts) > 50
        assert min(contrasts)[0] >= 4.5, min(contrasts)


def test_overlaps_and_tables_that_are_cut_are_found(browser, tmp_path):
    """The measures themselves."""
    wide = "<table><tr><td style='min-width: 2000px'>x</td></tr></table>"
    page_of = "<body style='margin: 0'>{}</body>"
    (tmp_path / "cut.html").write_text(page_of.format(wide))
    (tmp_path / "over.html").write_text(page_of.format("<h1>one</h1><p style='margin-top: -3em; color: #999'>two</p>"))
    with opened(browser, tmp_path / "cut.html") as page:
        layout = page.evaluate(LAYOUT)
        assert layout["cut"] == ["TABLE"]
        assert layout["width"] > 1280
    with opened(browser, tmp_path / "over.html") as page:
        assert page.evaluate(LAYOUT)["overlaps"] == [["H1: one", "P: two"]]
        assert min(page.evaluate(CONTRAST))[0] == pytest.approx(2.85, abs=0.01)  # of #999 on white, by WCAG's formula


def test_pictures_take_the_ground_of_the_scheme(browser, tmp_path):
    path = learning_curve_figure({"test set": ([1, 2], [1, 2], [1, 2], [np.nan] * 2)}, tmp_path / "p.png")
    document = Document("Title")
    document.section("One").picture(path, "A picture")
    document.write(tmp_path, "page")
    for scheme, ground in (("light", (255, 255, 255)), ("dark", (0x16, 0x18, 0x1C))):
        with opened(browser, tmp_path / "page.html", 1280, scheme) as page:
            picture = imread(io.BytesIO(page.locator("img").screenshot()))[..., :3] * 255
            assert np.abs(picture[2, 2] - ground).max() < 4  # the edge of the picture
            assert np.abs(picture - ground).max() > 150  # and letters that are seen on it


def test_wide_tables_scroll_and_paper_is_light(browser, tmp_path):
    document = Document("Title")
    for title in ("One", "Two"):
        document.section(title).table([f"column {k}" for k in range(30)], [[str(k) for k in range(30)]])
    document.write(tmp_path, "page")
    with opened(browser, tmp_path / "page.html", 420, "dark") as page:
        assert page.evaluate(LAYOUT)["cut"] == []
        sizes = page.evaluate("[...document.querySelectorAll('.wide')].map((e) => [e.scrollWidth, e.clientWidth])")
        assert all(content > 2 * seen for content, seen in sizes)
        page.click("nav a:has-text('Two')")
        assert page.evaluate("location.hash") == "#s1"
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert not page.locator("nav").is_visible()


@pytest.mark.long  # software draws WebGL: up to half a minute
def test_the_viewer_shows_the_structure_of_a_link(loop, browser):
    report, page_file = loop / "report" / "report.html", loop / "report" / viewer.PAGE
    links = re.findall(r'href="(structures\.html#(\d+))"', report.read_text())
    assert len(links) > 3
    with opened(browser, report, 1000, height=500) as page:
        page.click(f'a[href="{links[-1][0]}"]')
        page.wait_for_function("document.body.dataset.shown !== undefined")
        shown = page.locator("#place-info input[type=number]").first  # of the viewer itself
        assert page.evaluate("location.pathname").endswith(page_file.name)
        assert shown.input_value() == links[-1][1]
        page.click('.index a[href="#1"]')
        page.wait_for_function("document.body.dataset.shown === '1'")
        assert shown.input_value() == "1"
        assert page.evaluate(LAYOUT)["width"] <= 1000
        assert page.locator("#place-structure canvas").first.bounding_box()["width"] > 200
        points = "(plot) => plot.data.flatMap((trace) => trace.x ?? []).filter(Number.isFinite).length"
        assert page.locator("#place-map .js-plotly-plot").first.evaluate(points) > 10
        assert len(set(imread(io.BytesIO(page.locator("#place-structure").screenshot())).reshape(-1).tolist())) > 50
        rejected = page.locator(".index tr", has_text="rejected structure").locator("a")
        rejected.click()
        page.wait_for_function(f"document.body.dataset.shown === '{rejected.inner_text()}'")
        texts = [page.locator(place).text_content() for place in (".index", "#place-info .chsp-properties-table")]
        assert all(HOSTILE in text for text in texts)  # the reason is shown, as a text


def test_the_viewer_has_the_values_of_the_run(loop):
    text = (loop / "report" / viewer.PAGE).read_text()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    kinds = data["properties"]["kind"]["values"]
    assert {"label", "test structure", "rejected structure"} <= set(kinds)
    dataset, test = (ase.io.read(loop / name, ":") for name in ("dataset.extxyz", "test.extxyz"))
    assert kinds.count(LABEL) == len(dataset)
    assert kinds.count(TEST) == len(test)
    energies = sorted(atoms.get_potential_energy() / len(atoms) for atoms in dataset)
    shown = [x for x, kind in zip(data["properties"]["energy"]["values"], kinds, strict=True) if kind == LABEL]
    np.testing.assert_allclose(sorted(shown), energies, rtol=1e-12)
    newest = np.load(sorted((loop / "iterations").glob("*/predictions.npz"))[-1])
    labels = np.concatenate([atoms.get_forces() for atoms in test])
    wanted = (newest["atomic_u"], np.sqrt(np.mean((newest["forces"] - labels) ** 2, axis=1)))
    for name, values in zip(("u of each atom (eV/Å)", "RMSE(F) of each atom (eV/Å)"), wanted, strict=True):
        shown = data["properties"][name]["values"][: len(labels)]  # test structures come first
        np.testing.assert_allclose(sorted(shown), sorted(values), atol=6e-6)
    assert HOSTILE in str(data["properties"]["origin"]["values"])
    assert "<img" not in text.replace(str(re.search(r"<script>.*", text, re.S)[0]), "")  # outside of chemiscope's code


def test_a_hostile_structure_gets_out_of_no_script(tmp_path):
    pytest.importorskip("chemiscope")
    shown = [Shown(Atoms("H2", [[0, 0, 0], [0, 0, 1]]), FRAME, HOSTILE, note=HOSTILE, u=1.0)]
    text = write_viewer(shown, tmp_path / "page.html", HOSTILE, "max u", "error").read_text()
    assert text.count("<script") - text.split("<script>", 1)[1].count("<script") == 2
    head = text.partition("<script>")[0]
    assert "<img" not in head
    assert head.count("</script>") == 1  # the end of the data


def test_thinned_structures_keep_the_worst():
    atoms = Atoms("H")
    shown = [Shown(atoms, TEST, error=float(k), u=1000.0 - k) for k in range(500)]
    shown += [Shown(Atoms("H100"), LABEL, u=float(k)) for k in range(150)]
    kept = thinned(shown)
    tests = [one.error for one in kept if one.kind == TEST]
    assert len(tests) == len(set(tests)) == 120
    assert tests[:40] == [float(k) for k in range(499, 459, -1)]
    assert tests[-1] == 0.0
    assert len([one for one in kept if one.kind == LABEL]) == 120
    large = thinned([Shown(Atoms("H1000"), LABEL, u=float(k)) for k in range(100)])
    assert len(large) == 20
    assert large[0].u == 99.0
    assert len(thinned([Shown(Atoms("H30000"), LABEL)])) == 1
    assert thinned([Shown(Atoms("H", [[0, np.nan, 0]]), LABEL), Shown(Atoms(), LABEL)]) == []


def test_without_the_extra_a_report_says_how_to_get_it(loop, monkeypatch):
    monkeypatch.setattr(viewer, "find_spec", lambda _: None)
    files = analysis.make_report(loop)
    assert viewer.PAGE not in [path.name for path in files]
    text = files[-1].read_text()
    assert "pip install &#x27;ubmd[viewer]&#x27;" in text
    assert 'href="structures.html' not in text
    monkeypatch.undo()
    analysis.make_report(loop)


def test_reports_show_no_short_names_of_stages(loop, dynamic):
    raw = {name for name in STAGE_NAMES if stage_name(name) != name}
    for run in (loop, dynamic):
        rows = re.findall(r"^\| (\S+) .*\| +[\d.]+ (?:s|min|h) +\|", (run / "report" / "report.md").read_text(), re.M)
        assert "MD" in rows
        assert not raw & set(rows)
