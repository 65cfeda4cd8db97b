"""Markdown for GitHub: whatever a name or a reason holds, it is rendered as that text and as nothing else."""

from __future__ import annotations

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from harness.core.text import visible
from harness.report.export.markdown import block, code, escaped, folded, table

RENDERER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
HOSTILE = (
    "<script>alert(1)</script>",
    "a | b || c",
    "`code` ``more`` \\` \\| \\",
    "one\n\n# two\n| three |",
    "![x](https://a.example/x.png) [y](javascript:alert) <https://a.example> [^1]",
    "@everyone a@b.example org/repo#12 GH-7 :tada: :+1: www.a.example http://a.example",
    "\u202egnp.exe \u2066x\u2069 \x1b[31mred\x07",
    "**bold** _it_ ~~gone~~ $x^2$ &lt; &amp; &#64;",
    "- list",
    "1. list",
    "---",
    "| --- |",
    "<!-- comment",
    "</details>",
    "x" * 10_000,
)
AWKWARD = st.text(alphabet=st.sampled_from("ab1@#<>|`\\*_[]()!~$&;:/.-+= \n\t\u202e"), max_size=40)


def shown(markdown: str) -> str:
    """Return the text that a reader sees, which must stand in no element but those of the frame around it."""
    rendered = RENDERER.render(markdown)
    tags = set(re.findall(r"</?([a-zA-Z]+)", rendered))
    assert tags <= {"p", "ul", "li", "code", "table", "thead", "tbody", "tr", "th", "td", "strong"}, rendered
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", rendered)).replace("\u200b", "").split())


def meant(text: str) -> str:
    return " ".join(visible(text).split())


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:12])
@pytest.mark.parametrize("write", [escaped, code])
def test_a_hostile_text_is_shown_as_it_is(text: str, write: object) -> None:
    assert callable(write)
    cell = write(text)
    assert "\n" not in cell
    assert shown(f"- {cell}") == meant(text)
    assert shown("\n".join(table(["a", "b"], [[cell, "end"]]))) == f"a b {meant(text)} end"


@given(AWKWARD)
def test_any_text_stays_one_cell_and_one_paragraph(text: str) -> None:
    for cell in (escaped(text), code(text)):
        assert shown(f"- {cell}") == meant(text)
        assert shown("\n".join(table(["a", "b"], [[cell, "end"]]))) == " ".join(f"a b {meant(text)} end".split())


@pytest.mark.parametrize(
    "text", ["@octocat", "a@b.example", "#12", "GH-12", "https://a.example", "www.a.example", ":tada:", ":100:"]
)
def test_what_github_makes_links_of_after_rendering_is_broken_by_a_letter_without_width(text: str) -> None:
    """GitHub's mention, reference, link and emoji filters see the rendered text, in which escapes are gone."""
    rendered = RENDERER.renderInline(escaped(text))
    assert "\u200b" in rendered
    assert rendered.replace("\u200b", "") == text


def test_what_is_no_danger_stays_readable() -> None:
    said = "too big for gpu:0: needs 24.1 GiB (weights 23.6, KV 0.1), free 11.6. Try --precision int8, -22.1 %"
    assert escaped(said) == said
    assert escaped("-22.1 %") == "-22.1 %"
    assert code("int8") == "`int8`"
    assert code("") == ""


def test_long_texts_are_cut() -> None:
    assert escaped("x" * 50, 10) == "x" * 9 + "…"
    assert len(code("x" * 5000, 120)) == 122


def test_code_is_fenced_by_more_than_it_holds() -> None:
    text = "a = '''\n````\n</details>\n'''"
    rendered = RENDERER.render("\n".join(folded("code", block(text, "python"))))
    assert html.escape(text, quote=False) in rendered
    assert rendered.count("</details>") == 1


def test_figures_stand_on_the_right() -> None:
    assert table(["a", "b"], [["x", "1"]], right=[1]) == ["| a | b |", "| --- | ---: |", "| x | 1 |"]
