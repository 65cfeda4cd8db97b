"""README and docs say what the program does: outputs, tables, commands, options and links are those that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.docs import blocks, recorded, tables

ROOT = blocks.ROOT
README, CHINESE = ROOT / "README.md", ROOT / "README.zh.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
REPOSITORY = re.compile(r"https://github\.com/fitmatrix/fitmatrix/(?:blob|tree)/main/([^)#\s]+)")
FENCE = re.compile(r"^```\w*\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
# Options of other programs that the pages name: pytest, pip.
OTHERS = {"--junit-xml", "--collect-only", "--benchmark-json", "--no-build-isolation"}
# Of commands for developers that are no commands of fitmatrix.
OTHERS |= {"--catalog", "--missing", "--against"}
# Of Slurm, in a fleet file.
OTHERS |= {"--partition", "--gres"}
# Of ray start.
OTHERS |= {"--head", "--num-cpus", "--address", "--resources", "--labels"}


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def name_of(path: Path) -> str:
    return path.name


def code_of(path: Path) -> Iterator[str]:
    """Yield the lines of a page that are code: those of fences as typed, without comments and output, and spans in the text."""
    text = text_of(path)
    for body in FENCE.findall(text):
        typed = [line[2:] for line in body.splitlines() if line.startswith("$ ")]
        yield from (re.sub(r"\s#\s.*", "", line) for line in typed or body.splitlines())
    yield from re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


@pytest.mark.parametrize("path", [path for path in blocks.PAGES if blocks.blocks(path)], ids=name_of)
def test_every_block_shows_what_the_program_prints(path: Path) -> None:
    page = blocks.blocks(path)
    for block, now in zip(page, blocks.fresh(page), strict=True):
        # argparse wraps its lines in another way from one Python to the next.
        stands, prints = (re.split(r"\s+" if block.what.endswith("--help") else "\n", text.strip()) for text in (block.text, now))
        assert stands == prints, f"{block.what}: run python -m tests.docs.blocks"


@pytest.mark.parametrize("path", blocks.PAGES, ids=name_of)
def test_every_output_and_every_marked_block_is_checked(path: Path) -> None:
    text, page = text_of(path), blocks.blocks(path)
    assert len(re.findall(r"^<!-- ", text, re.MULTILINE)) == len(page)
    assert text.count("```console\n") == sum(block.kind != "table" for block in page)
    assert len(re.findall(r"^\$ ", text, re.MULTILINE)) == text.count("```console\n")
    assert not re.findall(r"^\|.*\n[^|\n].*", text, re.MULTILINE)  # it would be one more row


def test_kept_results_are_of_the_cases_that_the_matrix_runs() -> None:
    ran = {
        found[1]
        for found in re.finditer(r"^(\S+/\S+) +[.F]{4}  (?:works|check failed)", recorded.scripted(blocks.WIDTH), re.MULTILINE)
    }
    assert ran == set(tables.figures(recorded.RECORD))


def test_the_readme_is_short_and_in_order() -> None:
    text = text_of(README)
    assert len(text.split()) <= 1400
    order = (
        "fitmatrix tells",
        "![",
        "$ fitmatrix plan chatglm-6b",
        "$ tox run -e matrix",
        "## Commands",
        "## Precisions",
        "## Tests",
    )
    assert sorted(map(text.index, order)) == [text.index(part) for part in order]
    assert text.index("## Links") == text.rindex("\n## ") + 1


@pytest.mark.parametrize("path", blocks.PAGES, ids=name_of)
def test_every_link_leads_to_a_file_and_a_heading(path: Path) -> None:
    text = FENCE.sub("", text_of(path))
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if (ours := REPOSITORY.match(target)) or not target.startswith("https://"):
            name, _, anchor = (ours[1] if ours else target).partition("#")
            place = (ROOT if ours else path.parent) / name if name else path
            assert place.exists(), target
            # The site is built from docs/ alone: a page of it reaches what lies elsewhere by its address.
            assert ours or path not in DOCS or place.resolve().is_relative_to(path.parent), target
            assert not anchor or anchor in anchors(place), target


def anchors(path: Path) -> set[str]:
    """Return the anchors of the headings of a page, in lower case with dashes."""
    heads = re.findall(r"^#+ (.+)$", FENCE.sub("", text_of(path)), re.MULTILINE)
    return {re.sub(r"[^\w-]", "", head.lower().replace(" ", "-")) for head in heads}


@pytest.mark.parametrize("path", blocks.PAGES, ids=name_of)
def test_every_command_and_option_exists(path: Path) -> None:
    run = {option.flag for option in tables.OPTIONS}
    every = run.union(OTHERS, *map(tables.flags, tables.COMMANDS))
    for line in code_of(path):
        flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", line))
        if found := re.match(r"fitmatrix ([a-z]\S*)", line):
            assert found[1] in tables.COMMANDS, line
            assert flags <= tables.flags(found[1]), line
        elif line.startswith("pytest "):
            assert flags <= run | OTHERS, line
        assert flags <= every, line


def test_every_option_and_every_row_is_documented() -> None:
    said = {path.name: text_of(path) for path in DOCS}
    assert not [option.flag for option in tables.OPTIONS if option.flag not in said["options.md"]]
    for command in tables.COMMANDS:
        assert f"fitmatrix {command} --help" in said["commands.md"]
        assert not [flag for flag in tables.flags(command) if flag not in said["commands.md"]]
    for name, rows in (("precisions.md", tables.PRECISIONS), ("placements.md", tables.PLACEMENTS)):
        assert not [row for row in rows if f"| `{row}` |" not in said[name]]


def test_every_page_is_in_the_navigation() -> None:
    nav = yaml.safe_load(text_of(ROOT / "mkdocs.yml"))["nav"]
    listed = re.findall(r"[\w-]+\.md", str(nav))
    assert sorted(listed) == [path.name for path in DOCS]


# What the Chinese README may say in its own words is prose; the rest is the same.


def test_the_chinese_readme_has_the_same_headings_code_and_links() -> None:
    english, chinese = text_of(README), text_of(CHINESE)
    for pattern in (r"^#+ ", r"^```.*?^```$", r"^<!-- (?!table).* -->$"):
        assert re.findall(pattern, english, re.M | re.S if "```" in pattern else re.M) == re.findall(
            pattern, chinese, re.M | re.S if "```" in pattern else re.M
        )
    links = [sorted(re.findall(r"\]\(([^)]+)\)", text)) for text in (english, chinese)]
    assert [link for link in links[0] if "README" not in link] == [link for link in links[1] if "README" not in link]


def test_the_chinese_readme_has_the_same_tables() -> None:
    english, chinese = (re.findall(r"^\|.*\|$", text_of(path), re.MULTILINE) for path in (README, CHINESE))
    assert len(english) == len(chinese)
    for ours, theirs in zip(english, chinese, strict=True):
        assert ours.count("|") == theirs.count("|"), theirs
        assert re.findall(r"`[^`]+`", ours) == re.findall(r"`[^`]+`", theirs), theirs
        assert [not cell.strip() for cell in ours.split("|")] == [not cell.strip() for cell in theirs.split("|")], theirs


def test_the_chinese_readme_names_the_same_things_in_its_text() -> None:
    english, chinese = (sorted(set(re.findall(r"`([^`\n]+)`", FENCE.sub("", text_of(path))))) for path in (README, CHINESE))
    assert english == chinese
