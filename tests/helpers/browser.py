"""Pages in a real headless browser without a network, and what one measures in them."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")

LAYOUT = """() => {
  const box = (e) => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
  const visible = (e) => e.checkVisibility() && box(e)[2] > box(e)[0];
  const blocks = [...document.querySelectorAll("h1, h2, p, .wide, figure, summary, .viewer")].filter(visible);
  const cut = [...document.querySelectorAll("table, img")].filter((e) => {
    const room = e.closest(".wide, .picture");
    const fits = e.getBoundingClientRect().right <= innerWidth + 1;
    return visible(e) && !fits && !(room && getComputedStyle(room).overflowX === "auto");
  });
  const overlaps = blocks.flatMap((e, k) => blocks.slice(0, k).filter((other) => {
    const [a, b] = [box(e), box(other)];
    const shared = Math.min(a[2], b[2]) - Math.max(a[0], b[0]) > 1 && Math.min(a[3], b[3]) - Math.max(a[1], b[1]) > 1;
    return shared && !e.contains(other) && !other.contains(e);
  }).map((other) => [other, e].map((x) => x.tagName + ": " + x.textContent.trim().slice(0, 40))));
  return {
    width: document.documentElement.scrollWidth, window: innerWidth,
    blocks: blocks.length, overlaps: overlaps,
    cut: cut.map((e) => e.tagName),
    images: [...document.images].map((e) => e.naturalWidth),
  };
}"""

# Contrast of WCAG 2: every text against the nearest ground behind it that has a colour.
CONTRAST = """() => {
  const part = (c) => { c /= 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (c) => 0.2126 * part(c[0]) + 0.7152 * part(c[1]) + 0.0722 * part(c[2]);
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = numbers(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] > 0.5) return c;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const e of document.querySelectorAll("h1, h2, p, a, th, td, figcaption, summary")) {
    if (!e.textContent.trim() || e.closest(".viewer") || !e.checkVisibility()) continue;
    const [a, b] = [light(numbers(getComputedStyle(e).color)), light(ground(e))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.tagName]);
  }
  return found;
}"""


def start() -> Any:
    """A browser to be closed, and its driver to be stopped; skips the test where there is none."""
    api = pytest.importorskip("playwright.sync_api", reason="pages are looked at with playwright (ubmd[browser])")
    program = next((path for name in PROGRAMS if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser to look at pages with: none of {', '.join(PROGRAMS)} is in the PATH")
    driver = api.sync_playwright().start()
    # Software draws WebGL where there is no graphics card; without a sandbox, as containers forbid it.
    options = ["--no-sandbox", "--enable-unsafe-swiftshader", "--disable-dev-shm-usage"]
    return driver, driver.chromium.launch(executable_path=program, args=options)


@contextmanager
def opened(browser: Any, path: Path, width: int = 1280, scheme: str = "light", height: int = 900) -> Iterator[Any]:
    """A page of a file, which must not report an error or ask for anything from outside."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, offline=True)
    page = context.new_page()
    page.set_default_timeout(240_000)
    said: list[str] = []
    page.on("pageerror", lambda error: said.append(f"error: {error}"))
    page.on("console", lambda line: said.append(f"console: {line.text}") if line.type == "error" else None)
    page.on("dialog", lambda dialog: (said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: said.append(f"request: {request.url[:80]}") if _outside(request.url) else None)
    page.goto(path.resolve().as_uri())
    yield page
    context.close()
    assert said == []


def _outside(url: str) -> bool:
    return not url.startswith(("file:", "data:", "blob:"))
