"""A text with tables and figures, written as Markdown (figures beside it) and as one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from urllib.parse import quote

from ubmd.analysis.page_style import STYLE
from ubmd.analysis.style import DPI
from ubmd.files import replacing

_LONG = 24
"""Letters from which a cell is a text that may be broken."""

_UNIT = re.compile(r"(\([^()\s]{1,16}\)|(?<=, )[^\s,]{1,10})$")
_READABLE = 540
"""Least width of a picture, pixels: in a narrower window it scrolls."""

# Of a page: it loads nothing, and runs nothing.
_RULES = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

# What begins or ends a style, code, a formula, a link, an HTML element or an entity.
_MARKUP = re.compile(
    r"\\(?=[!-/:-@\[-`{-~]|$)|[`$]|[*~](?=\S)|(?<=\S)[*~]|(?<![^\W_])_|_(?![^\W_])"
    r"|\](?=[(\[:])|<(?=[A-Za-z/!?])|&(?=#?\w+;)|\#$"
)
# What, at the start of a paragraph, makes it a heading, a quotation, a list item or a rule.
_AT_START = re.compile(r"^(\d*)(>|[#+*=-](?=[\s#=-]|$)|(?<=\d)[.)](?=\s|$))")


@dataclass(frozen=True)
class Link:
    """A text that leads to a file beside the document, or to a place in it."""

    text: str
    target: str
    """such as structures.html#12"""


Cell = str | Link


@dataclass(frozen=True)
class Text:
    """One paragraph of plain text, perhaps with a link behind it."""

    text: str
    link: Link | None = None


@dataclass(frozen=True)
class ReportTable:
    """Rows of text cells; columns whose cells all look like numbers are set flush right."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Picture:
    """A PNG file beside the Markdown file, perhaps with a link behind its caption."""

    path: Path
    caption: str
    link: Link | None = None


Block = Text | ReportTable | Picture


@dataclass
class Section:
    """A heading and its content; a folded one opens with a click in the HTML file."""

    title: str
    blocks: list[Block] = field(default_factory=list)
    folded: bool = False

    def text(self, text: str, link: Link | None = None) -> None:
        """Add a paragraph."""
        self.blocks.append(Text(text, link))

    def table(self, head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Add a table."""
        self.blocks.append(ReportTable(head, rows))

    def picture(self, path: Path, caption: str, link: Link | None = None) -> None:
        """Add a picture."""
        self.blocks.append(Picture(path, caption, link))


@dataclass
class Document:
    """Title, introduction and sections."""

    title: str
    introduction: list[str] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    beside: list[Path] = field(default_factory=list)
    """Pages that it links to."""

    def section(self, title: str, folded: bool = False) -> Section:
        """Begin a section."""
        self.sections.append(Section(title, folded=folded))
        return self.sections[-1]

    def pictures(self) -> list[Path]:
        """Files of all pictures, in order."""
        return [block.path for section in self.sections for block in section.blocks if isinstance(block, Picture)]

    def write(self, folder: Path, name: str) -> list[Path]:
        """Write ``name``.md and ``name``.html into a folder; returns both."""
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{name}.md", folder / f"{name}.html"]
        for path, text in zip(files, (self.markdown(), self.html()), strict=True):
            with replacing(path) as file:
                file.write(text.encode())
        return files

    def markdown(self) -> str:
        """The document as Markdown that also reads well as plain text."""
        lines = [f"# {escaped(self.title)}", ""]
        for text in self.introduction:
            lines += [escaped(text), ""]
        for section in self.sections:
            lines += [f"## {escaped(section.title)}", ""]
            for block in section.blocks:
                lines += [*_markdown(block), ""]
        return "\n".join(lines)

    def html(self) -> str:
        """The document as one HTML file: styles and pictures are inside, no scripts."""
        title = html.escape(self.title)
        links = [f'<a href="#s{k}">{html.escape(s.title)}</a>' for k, s in enumerate(self.sections)]
        parts = [
            page_head(self.title, _RULES, STYLE),
            f"<header><h1>{title}</h1>",
            *(f"<p>{html.escape(text)}</p>" for text in self.introduction),
            '</header><div class="columns">',
            f'<nav aria-label="Contents">{" ".join(links)}</nav>' if len(links) > 1 else "",
            "<main>",
            *(_html_section(k, section) for k, section in enumerate(self.sections)),
        ]
        return "\n".join([*parts, "</main></div></body></html>", ""])


def page_head(title: str, rules: str, style: str) -> str:
    """The beginning of an HTML page, up to its body; ``rules``: what the browser may load and run."""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{rules}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{style}</style></head><body>"
    )


def escaped(text: str) -> str:
    """A text on one line in which nothing is taken for Markdown or HTML: settings, reasons and names of files.

    Characters without a special meaning in their place (a minus, an underscore in a word) are kept, so that the file
    reads well as plain text.
    """
    return _AT_START.sub(r"\g<1>\\\g<2>", _inline(text))


def _inline(text: str) -> str:
    """As `escaped`, for a text that is not the beginning of a line."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(text.split()))


def _markdown(block: Block) -> list[str]:
    if isinstance(block, Text):
        return [" ".join([escaped(block.text), *_markdown_links(block.link)])]
    if isinstance(block, Picture):
        return [" ".join([f"![{_inline(block.caption)}]({quote(block.path.name)})", *_markdown_links(block.link)])]
    return as_markdown(block)


def _markdown_links(*links: Link | None) -> list[str]:
    return [f"[{_inline(link.text)}]({quote(link.target, safe='/#')})" for link in links if link]


def as_markdown(block: ReportTable) -> list[str]:
    """Lines of a Markdown table, its columns padded to equal widths."""

    def text(cell: Cell) -> str:
        return (_inline(cell) if isinstance(cell, str) else _markdown_links(cell)[0]).replace("|", "\\|")

    rows = [[text(cell) for cell in row] for row in [block.head, *block.rows]]
    widths = [max(len(row[k]) for row in rows) for k in range(len(block.head))]
    rows.insert(1, ["-" * width for width in widths])
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]


def _html_section(number: int, section: Section) -> str:
    """A section; pictures that follow each other share a grid."""
    parts = []
    for are_pictures, group in groupby(section.blocks, lambda block: isinstance(block, Picture)):
        content = "\n".join(_html(block) for block in group)
        parts.append(f'<div class="pictures">{content}</div>' if are_pictures else content)
    content = "\n".join(parts)
    if section.folded:
        content = f"<details><summary>show</summary>{content}</details>"
    return f'<section id="s{number}"><h2>{html.escape(section.title)}</h2>\n{content}</section>'


def _html(block: Block) -> str:
    if isinstance(block, Text):
        return f"<p>{html.escape(block.text)}{_html_link(block.link, ' ')}</p>"
    if isinstance(block, ReportTable):
        return _html_table(block)
    content = block.path.read_bytes()
    # A PNG file begins with its width: shown at 100 dots per inch, letters are as large as the text around.
    width = struct.unpack(">I", content[16:20])[0] * 100 // DPI
    data = base64.b64encode(content).decode()
    caption = html.escape(block.caption)
    sizes = f"max-width: {width}px; min-width: {min(width, _READABLE)}px"
    image = f'<img style="{sizes}" alt="{caption}" src="data:image/png;base64,{data}">'
    below = f"<figcaption>{caption}{_html_link(block.link, '. ')}</figcaption>"
    return f'<figure><div class="picture">{image}</div>{below}</figure>'


def _html_link(link: Link | None, before: str = "") -> str:
    if link is None:
        return ""
    return f'{before}<a href="{html.escape(quote(link.target, safe="/#"))}">{html.escape(link.text)}</a>'


def _html_table(table: ReportTable) -> str:
    columns = [[_plain(row[k]) for row in table.rows] for k in range(len(table.head))]
    classes = [_column_class(column) for column in columns]

    def line(cells: Sequence[Cell], tag: str) -> str:
        texts = [_html_link(cell) if isinstance(cell, Link) else _html_cell(cell) for cell in cells]
        return "<tr>" + "".join(f"<{tag}{m}>{c}</{tag}>" for c, m in zip(texts, classes, strict=True)) + "</tr>"

    body = "\n".join(line(row, "td") for row in table.rows)
    content = f"<table><thead>{line(table.head, 'th')}</thead><tbody>\n{body}\n</tbody></table>"
    return f'<div class="wide" tabindex="0">{content}</div>'


def _html_cell(text: str) -> str:
    """A cell whose unit at its end is not broken."""
    return _UNIT.sub(r'<span class="unit">\1</span>', html.escape(text))


def _plain(cell: Cell) -> str:
    return cell if isinstance(cell, str) else cell.text


def _column_class(column: Sequence[str]) -> str:
    """Numbers are set flush right and never broken; texts are, but not into single words."""
    if column and all(_is_number(cell) for cell in column):
        return ' class="number"'
    return ' class="long"' if any(len(cell) > _LONG for cell in column) else ""


def _is_number(text: str) -> bool:
    """Whether a cell reads as a number, perhaps with a deviation, a unit of time or a percent sign."""
    if len(text) > _LONG:
        return False
    return text in ("", "-") or text[0].isdigit() or (text[0] in "-−+." and text[1:2].isdigit())
