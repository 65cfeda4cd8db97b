"""Every command that our texts name works when it is pasted: in messages, help, templates, README and docs.

Placeholders get a value, and what takes milliseconds is run; what downloads, loads or measures is read by the real parser. Commands
that are made while the program runs are pasted in tests/cli/test_plan.py, tests/cli/test_chat.py and tests/test_plugin.py.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from harness.catalog import shipped
from tests.docs import blocks, tables
from tests.docs.test_docs import code_of
from tests.docs.test_messages import NAMED, texts

# What stands in our texts for what a user has.
VALUES = {"MODEL": "smollm2-135m", "X": "smollm2-135m", "DIR": "results", "FILE": "page.html", "RESULTS": "results"}
VALUES |= {"NAME": "main", "N": "2"}
FOLDERS = ("results", "fitmatrix-results", "baseline", "BEFORE", "AFTER", "artifacts", "first-contact")
# Loads, downloads, measures or serves: these are read, not run.
HEAVY = {"chat", "synth", "calibrate", "fleet"}
HEAVY_OPTIONS = {"--prove-min-ram", "--measure", "--file", "--help", "--planner", "--images"}
MADE_BEFORE = {"chatglm-6b-hollow"}  # by the command on the line above
# Where the machine has no such cards: exit status 2 and one sentence.
CARDS = {"fitmatrix plan smollm2-135m --code bf16/tp", "fitmatrix plan chatglm-6b --code int8/direct"}


def filled(word: str) -> str:
    return VALUES.get(word, word).replace("X/X", "bf16/cpu").replace("DIR/", "results/")


def pasted(text: str) -> Iterator[tuple[str, ...]]:
    """Yield the commands of a text with their values, up to the first word that is none of theirs."""
    for found in NAMED.finditer(text):
        words = found["rest"].split()
        if found["program"] == "pytest cases/":
            yield ("pytest", "cases/", *_own(words, dict(_run_options()), 0))
        elif words and (command := words[0].rstrip(".,")) in tables.COMMANDS:
            yield ("fitmatrix", command, *_own(words[1:], dict(_options_of(command)), 2))


def _run_options() -> Iterator[tuple[str, bool]]:
    yield from ((option.flag, not option.switch) for option in tables.OPTIONS)


def _options_of(command: str) -> Iterator[tuple[str, bool]]:
    for flag, action in tables.actions(command).items():
        yield flag, action.nargs != 0


def _own(words: Sequence[str], options: dict[str, bool], places: int) -> Iterator[str]:
    """Yield the options with their values, and as many names as there are places for: none is a plain word in small letters."""
    rest = iter(words)
    for word in rest:
        if word in options:
            yield word
            if options[word]:
                yield filled(next(rest, ""))
        elif places and re.fullmatch(r"X|[A-Z]{3,}|\S*[\w][-./]\S*", word):
            places -= 1
            yield filled(word)
        else:
            return


def in_messages() -> Iterator[tuple[str, ...]]:
    for where, text in texts():
        if not where.endswith("next_steps.py"):  # built of parts, and pasted by test_plan.py
            yield from pasted(" ".join(text.split()))


def in_documents() -> Iterator[tuple[str, ...]]:
    for path in blocks.PAGES:
        for line in code_of(path):
            if re.match(r"fitmatrix [a-z]|pytest cases/", line):
                words = shlex.split(re.split(r" (?:>>|>|\||&&) ", line)[0])
                yield tuple(filled(word) for word in words)


def is_whole(words: Sequence[str]) -> bool:
    """Tell whether a command has the names and options that it needs: `fitmatrix plan` alone is what the command is called."""
    if words[0] == "pytest" or "--help" in words:
        return True
    taking = {flag for flag, takes_value in _options_of(words[1]) if takes_value}
    count, options, rest = tables.needed(words[1:])
    names = [word for before, word in pairwise(["", *rest]) if not word.startswith("--") and before not in taking]
    return len(names) >= count and {*options} <= {*rest}


ALL = sorted({words for words in (*in_messages(), *in_documents()) if is_whole(words)})
RUN = [
    words
    for words in ALL
    if words[0] == "fitmatrix"
    and words[1] not in HEAVY
    and not {*words} & (HEAVY_OPTIONS | MADE_BEFORE)
    and words != ("fitmatrix", "hardware")
    and (words[1] != "watch" or "--once" in words)  # which else goes on until the user ends it
]


def test_there_are_commands_of_every_kind() -> None:
    assert {words[1] for words in ALL if words[0] == "fitmatrix"} == set(tables.COMMANDS)
    assert sum(words[0] == "pytest" for words in ALL) >= 6
    assert len(RUN) >= 15


@pytest.mark.parametrize("words", [words for words in ALL if words[0] == "fitmatrix"], ids=" ".join)
def test_the_parser_takes_it(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    if "--help" in words:
        with pytest.raises(SystemExit, match=r"^0$"):
            tables.parsed(words[1:])
        assert capsys.readouterr().out.startswith(f"usage: fitmatrix {words[1]} ")
    else:
        assert callable(tables.parsed(words[1:]).command)


@pytest.mark.parametrize("words", [words for words in ALL if words[0] == "pytest"], ids=" ".join)
def test_pytest_takes_it_with_its_values(words: tuple[str, ...], request: pytest.FixtureRequest) -> None:
    given, unknown = request.config._parser.parse_known_and_unknown_args(list(words[1:]))
    assert unknown == []
    options = tables.run_options({option.key: getattr(given, f"fitmatrix_{option.key}") for option in tables.OPTIONS})
    for option in tables.OPTIONS:
        if option.flag in words:
            assert getattr(options, option.key) is not None


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with results under each name that our texts give them, and a model's config."""
    for name in FOLDERS:
        (tmp_path / name).mkdir()
        shutil.copy(blocks.ROOT / "reports/smollm2-135m/results.jsonl", tmp_path / name)
    config = shipped.catalog()["HuggingFaceTB/SmolLM2-135M-Instruct"].config
    (tmp_path / "results/config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("words", RUN, ids=" ".join)
@pytest.mark.usefixtures("there")
def test_it_runs(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    status = tables.main(words[1:])
    said = capsys.readouterr()
    if " ".join(words) in CARDS and status == 2:
        assert re.fullmatch(rf"fitmatrix: {words[2]}/{words[-1]} cannot be loaded: .+\n", said.err)
        return
    assert status in (0, 1), said.err  # 1 is an answer: nothing fits here, something got worse
    assert said.out
    assert "fitmatrix:" not in said.err
