"""A text with tables and figures, written as Markdown (figures beside it) and as one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from ubmd.analysis.style import DPI
from ubmd.files import replacing

_STYLE = """
body { font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: #1a1a1a; background: #fff;
       max-width: 880px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0.3rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 0.5rem; border-bottom: 1px solid #ccc; }
img { max-width: 100%; height: auto; display: block; margin: 0.8rem auto 0.2rem; }
figcaption { font-size: 0.9rem; color: #555; text-align: center; }
figure { margin: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; margin: 0.6rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.7rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #999; }
nav a { margin-right: 0.9rem; white-space: nowrap; }
summary { cursor: pointer; margin: 0.6rem 0; }
"""

# What begins or ends a style, code, a formula, a link, an HTML element or an entity.
_MARKUP = re.compile(
    r"\\(?=[!-/:-@\[-`{-~]|$)|[`$]|[*~](?=\S)|(?<=\S)[*~]|(?<![^\W_])_|_(?![^\W_])"
    r"|\](?=[(\[:])|<(?=[A-Za-z/!?])|&(?=#?\w+;)|\#$"
)
# What, at the start of a paragraph, makes it a heading, a quotation, a list item or a rule.
_AT_START = re.compile(r"^(\d*)(>|[#+*=-](?=[\s#=-]|$)|(?<=\d)[.)](?=\s|$))")


@dataclass(frozen=True)
class Text:
    """One paragraph of plain text."""

    text: str


@dataclass(frozen=True)
class ReportTable:
    """Rows of text cells; columns whose cells all look like numbers are set flush right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG file beside the Markdown file."""

    path: Path
    caption: str


Block = Text | ReportTable | Picture


@dataclass
class Section:
    """A heading and its content; a folded one opens with a click in the HTML file."""

    title: str
    blocks: list[Block] = field(default_factory=list)
    folded: bool = False

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self.blocks.append(Text(text))

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table."""
        self.blocks.append(ReportTable(head, rows))

    def picture(self, path: Path, caption: str) -> None:
        """Add a picture."""
        self.blocks.append(Picture(path, caption))


@dataclass
class Document:
    """Title, introduction and sections."""

    title: str
    introduction: list[str] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)

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
            f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{_STYLE}</style></head><body>",
            f"<h1>{title}</h1>",
            *(f"<p>{html.escape(text)}</p>" for text in self.introduction),
            f"<nav>{' '.join(links)}</nav>" if len(links) > 1 else "",
        ]
        for k, section in enumerate(self.sections):
            parts.append(f'<h2 id="s{k}">{html.escape(section.title)}</h2>')
            content = "\n".join(_html(block) for block in section.blocks)
            parts.append(f"<details><summary>show</summary>{content}</details>" if section.folded else content)
        return "\n".join([*parts, "</body></html>", ""])


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
        return [escaped(block.text)]
    if isinstance(block, Picture):
        return [f"![{_inline(block.caption)}]({quote(block.path.name)})"]
    return as_markdown(block)


def as_markdown(block: ReportTable) -> list[str]:
    """Lines of a Markdown table, its columns padded to equal widths."""
    rows = [[_inline(cell).replace("|", "\\|") for cell in row] for row in [block.head, *block.rows]]
    widths = [max(len(row[k]) for row in rows) for k in range(len(block.head))]
    rows.insert(1, ["-" * width for width in widths])
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]


def _html(block: Block) -> str:
    if isinstance(block, Text):
        return f"<p>{html.escape(block.text)}</p>"
    if isinstance(block, ReportTable):
        return _html_table(block)
    content = block.path.read_bytes()
    # A PNG file begins with its width: shown at 100 dots per inch, letters are as large as the text around.
    width = struct.unpack(">I", content[16:20])[0] * 100 // DPI
    data = base64.b64encode(content).decode()
    caption = html.escape(block.caption)
    image = f'<img width="{width}" alt="{caption}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _html_table(table: ReportTable) -> str:
    numeric = [bool(table.rows) and all(_is_number(row[k]) for row in table.rows) for k in range(len(table.head))]

    def line(cells: Sequence[str], tag: str) -> str:
        marks = [' class="number"' if flag else "" for flag in numeric]
        return (
            "<tr>" + "".join(f"<{tag}{m}>{html.escape(c)}</{tag}>" for c, m in zip(cells, marks, strict=True)) + "</tr>"
        )

    body = "\n".join(line(row, "td") for row in table.rows)
    return f'<div class="wide"><table><thead>{line(table.head, "th")}</thead><tbody>\n{body}\n</tbody></table></div>'


def _is_number(text: str) -> bool:
    """Whether a cell reads as a number, perhaps with a deviation, a unit of time or a percent sign."""
    return text in ("", "-") or text[0].isdigit() or (text[0] in "-−+." and text[1:2].isdigit())
