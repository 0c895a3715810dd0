"""The Markdown of the page, as a tree: what CommonMark says, and no text that is lost or takes long."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "runtimes" / "server" / "page"
SCRIPT = """
import { parseMarkdown } from "%s/markdown.js";
let input = "";
for await (const chunk of process.stdin) input += chunk;
const strip = (block) => { delete block.raw; for (const inner of block.blocks ?? (block.items ?? []).flat()) strip(inner); return block; };
console.log(JSON.stringify(JSON.parse(input).map((text) => parseMarkdown(text).map(strip))));
"""

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="no node")


def parse(*texts: str) -> list[list[dict[str, Any]]]:
    """The blocks of each text."""
    script = SCRIPT % PAGE.as_uri()
    words = ["node", "--input-type=module", "-e", script]
    done = subprocess.run(words, input=json.dumps(texts), capture_output=True, text=True, timeout=60, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def html(node: dict[str, Any]) -> str:
    """A short form of a block or an inline node."""
    match node["type"]:
        case "text" | "break":
            return node.get("text", "<br>")
        case "code" if "language" in node:
            return f"<pre {node['language']}>{node['text']}</pre>"
        case "code":
            return f"<code>{node['text']}</code>"
        case "link":
            return f"<a {node['href']}>{inline(node['inner'])}</a>"
        case "strong" | "em" | "del" as name:
            return f"<{name}>{inline(node['inner'])}</{name}>"
        case "heading":
            return f"<h{node['level']}>{inline(node['inline'])}</h{node['level']}>"
        case "paragraph":
            return f"<p>{inline(node['inline'])}</p>"
        case "quote":
            return f"<quote>{inline(node['blocks'])}</quote>"
        case "list":
            items = "".join(f"<li>{inline(item)}</li>" for item in node["items"])
            return f"<ol {node['start']}>{items}</ol>" if node["ordered"] else f"<ul>{items}</ul>"
        case "table":
            rows = [node["head"], *node["rows"]]
            return f"<table {' '.join(node['align'])}>" + "".join("|".join(map(inline, row)) + ";" for row in rows) + "</table>"
        case "rule":
            return "<hr>"
    raise AssertionError(node["type"])


def inline(nodes: list[dict[str, Any]]) -> str:
    return "".join(map(html, nodes))


CASES = {
    "plain\ntext": "<p>plain\ntext</p>",
    "# Title\ntext": "<h1>Title</h1><p>text</p>",
    "#hashtag": "<p>#hashtag</p>",
    "## A `b` ##": "<h2>A <code>b</code></h2>",
    "Title\n===": "<h1>Title</h1>",
    "a\n\n---\n\nb": "<p>a</p><hr><p>b</p>",
    "**a** *b* ***c*** ~~d~~": "<p><strong>a</strong> <em>b</em> <em><strong>c</strong></em> <del>d</del></p>",
    "*a **b** c*": "<p><em>a <strong>b</strong> c</em></p>",
    "snake_case_name and 2 * 3 * 4": "<p>snake_case_name and 2 * 3 * 4</p>",
    "**open": "<p>**open</p>",
    r"\*a\* \\": r"<p>*a* \</p>",
    "``a ` b`` and `open": "<p><code>a ` b</code> and `open</p>",
    "`*a*`": "<p><code>*a*</code></p>",
    "a  \nb\\\nc": "<p>a<br>b<br>c</p>",
    "[a *b*](https://x.org/c_d_e 'title')": "<p><a https://x.org/c_d_e>a <em>b</em></a></p>",
    "![pic](http://x.org/(1).png)": "<p><a http://x.org/(1).png>pic</a></p>",
    "[a](javascript:alert(1)) [b](/etc)": "<p>[a](javascript:alert(1)) [b](/etc)</p>",
    "see https://x.org/a_b_c. <https://y.org>": "<p>see <a https://x.org/a_b_c>https://x.org/a_b_c</a>. <a https://y.org/>https://y.org</a></p>",
    "<b>no</b>": "<p><b>no</b></p>",
    "```py\na\n\n# b\n```\nc": "<pre py>a\n\n# b</pre><p>c</p>",
    "```\nopen **a**": "<pre >open **a**</pre>",
    "~~~~\n```\n~~~~": "<pre >```</pre>",
    "text\n```\ncode\n```": "<p>text</p><pre >code</pre>",
    "    indented\n\n    code": "<pre >indented\n\ncode</pre>",
    "- a\n- b\n  - c\n\n    d\n- e": "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p><p>d</p></li></ul></li><li><p>e</p></li></ul>",
    "3. a\n4. b\n\ntext": "<ol 3><li><p>a</p></li><li><p>b</p></li></ol><p>text</p>",
    "1. a\n   ```\n   x\n   ```\n2. b": "<ol 1><li><p>a</p><pre >x</pre></li><li><p>b</p></li></ol>",
    "In\n2020. It was": "<p>In\n2020. It was</p>",
    "- a\n* b": "<ul><li><p>a</p></li></ul><ul><li><p>b</p></li></ul>",
    "> a\nb\n>\n> - c\n\nd": "<quote><p>a\nb</p><ul><li><p>c</p></li></ul></quote><p>d</p>",
    "| a | b |\n|:--|--:|\n| `x` | \\| |\n| 1 |": "<table left right>a|b;<code>x</code>||;1|;</table>",
    "a | b": "<p>a | b</p>",
}


def test_markdown_becomes_the_tree_that_it_means() -> None:
    assert dict(zip(CASES, map(inline, parse(*CASES)), strict=True)) == CASES


def words(node: Any) -> str:
    """All text of a tree."""
    if isinstance(node, list):
        return "".join(map(words, node))
    if not isinstance(node, dict):
        return ""
    parts = ("text", "inline", "inner", "blocks", "items", "head", "rows")
    return "".join(node[part] if part == "text" and "text" in node else words(node.get(part)) for part in parts)


def test_no_letter_is_lost_whatever_the_marks_are() -> None:
    choose = random.Random(5)
    marks = [
        "*",
        "**",
        "_",
        "~~",
        "`",
        "```\n",
        "\n",
        "\n\n",
        "- ",
        "1. ",
        "> ",
        "# ",
        "| ",
        "|-|-|\n",
        "[",
        "](",
        ")",
        "![",
        "\\",
        "    ",
        "<",
        "x",
        " ",
    ]
    texts = ["".join(choose.choice([*marks, f"w{i}w"]) for i in range(60)) for _ in range(300)]
    for text, blocks in zip(texts, parse(*texts), strict=True):
        lost = [word for word in set(text.split("w")) if word.isdigit() and f"w{word}w" in text and f"w{word}w" not in shown(blocks)]
        assert not lost, (text, blocks)


def shown(blocks: Any) -> str:
    return words(blocks) + json.dumps(blocks)


@pytest.mark.parametrize(
    "unit", ["[", "*a ", "**a* ", "`", "` `` ", "> ", "- ", "[a](", "_a", "~~a ", "<h", "| ", "![", "# ", "    ", "\\", "("]
)
def test_no_text_takes_long(unit: str) -> None:
    """A process of its own ends after a minute; every text here is done within a second."""
    parse(unit * 4000, (unit + "\n") * 2000)
