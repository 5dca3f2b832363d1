"""What a report quotes is shown as it is, in Markdown and in HTML: a CommonMark parser is the judge."""

import html
import random
import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt  # rich needs it

from ubmd.analysis.document import Document, ReportTable, as_markdown, escaped

PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
HOSTILE = [
    "*a* **b** _c_ __init__ `code` <b>x</b> <script>alert(1)</script> [l](http://x) ![i](y) a|b",
    "&amp; ~~s~~ \\* C:\\dir",
    "# no heading",
    "- no item",
    "12) nor this",
    "> no quotation",
    "---",
    "***",
    "```\ncode\n```",
    "<!-- comment -->",
    "[x]: http://y",
    "first\n\n# second\n",
    "ends with \\",
    "|F| < 3 and > 2 in a\\|b",
    "$u_i$",
    "##",
]


def rendered(markdown: str) -> str:
    return PARSER.render(markdown)


def texts(seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices("ab1 *_`[]()<>|\\&;#~-+=.!$:/\n\"'", k=rng.randint(1, 14))) for _ in range(3000)]


@pytest.mark.parametrize("text", [*HOSTILE, *texts(1)[:20]])
def test_a_table_shows_the_text_itself(text: str) -> None:
    document = Document(text, [text])
    section = document.section(text)
    section.text(text)
    section.table(["reason", text], [[text, "1"], ["2", text]])
    wanted = html.escape(" ".join(text.split()), quote=False)
    shown = rendered(document.markdown()).replace("&quot;", '"')
    assert re.findall(r"<h1>(.*)</h1>", shown) == re.findall(r"<h2>(.*)</h2>", shown) == [wanted]
    assert re.findall(r"<p>(.*)</p>", shown) == [wanted, wanted]
    assert re.findall(r"<t[hd]>(.*)</t[hd]>", shown) == ["reason", wanted, wanted, "1", "2", wanted]
    assert set(re.findall(r"<(\w+)", shown)) == {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td"}


def test_random_signs_are_shown_as_they_are() -> None:
    for text in texts(2):
        wanted = html.escape(" ".join(text.split()), quote=False)
        assert rendered(escaped(text)).replace("&quot;", '"').strip() == (f"<p>{wanted}</p>" if wanted else ""), text
        lines = rendered("\n".join(as_markdown(ReportTable(["k"], [[text], ["end"]])))).replace("&quot;", '"')
        assert re.findall(r"<td>(.*?)</td>", lines) == [wanted, "end"], text


def test_plain_texts_stay_readable() -> None:
    for text in (
        "md.steps = 40",
        "-3.5 ± 0.1 eV/Å",
        "u_i, E_0 (meV/atom)",
        "5 * 3 - 2 < 4 & more",
        "[1, 2]",
        "-",
        "50 %",
    ):
        assert escaped(text) == text or text == "-"
        assert as_markdown(ReportTable(["what"], [[text]]))[2].strip("| ") == text.strip("| ")


def test_html_escapes_too(tmp_path: Path) -> None:
    document = Document("<b>", ["<i>"])
    document.section("<u>").table(["<s>"], [["<script>"]])
    page = document.write(tmp_path, "page")[1].read_text()
    assert not re.search(r"<(b|i|u|s|script)>", page)
