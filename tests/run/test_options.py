"""The options: each value comes from the default, then the file, then the command line, and says which."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from harness.core.errors import UsageError
from harness.core.options import DEFAULT_MODEL, OPTIONS, Option
from harness.core.placements import PLACEMENTS
from harness.core.precisions import DEFAULT_PRECISIONS, PRECISIONS
from harness.core.units import GIB
from harness.run.options import Options, read_config

# For each option: what pyproject.toml says in TOML and what that means, what the command line gives and what that means.
SAMPLES: dict[str, tuple[str, Any, Any, Any]] = {
    "model": ('["a/b", "c/d"]', ("a/b", "c/d"), ["./tiny"], ("./tiny",)),
    "weights": ('"synthetic"', "synthetic", "synthetic", "synthetic"),
    "precision": ('["int4"]', ("int4",), ["bf16", "fp16"], ("bf16", "fp16")),
    "placement": ('["gpu+cpu", "cpu"]', ("gpu+cpu", "cpu"), ["direct"], ("direct",)),
    "kv": ('["fp8", "static"]', ("fp8", "static"), ["dynamic"], ("dynamic",)),
    "attention": ('["eager"]', ("eager",), ["sdpa"], ("sdpa",)),
    "device-map": ('"map.json"', Path("map.json"), "m.toml", Path("m.toml")),
    "prompt-tokens": ("128", 128, "256", 256),
    "new-tokens": ("8", 8, "48", 48),
    "batch": ("2", 2, "4", 4),
    "repeats": ("5", 5, "7", 7),
    "vram": ('["8GiB", "12GiB"]', (8 * GIB, 12 * GIB), ["6GiB"], (6 * GIB,)),
    "ram": ('"16GiB"', 16 * GIB, "1.5GiB", 3 * GIB // 2),
    "case-timeout": ("60", 60.0, "90.5", 90.5),
    "phase-timeout": ("30", 30.0, "45.5", 45.5),
    "results": ('"out"', Path("out"), "/elsewhere/out", Path("/elsewhere/out")),
    "baseline": ('"old"', Path("old"), "old.jsonl", Path("old.jsonl")),
    "html": ('"page.html"', Path("page.html"), "p.html", Path("p.html")),
    "trust-remote-code": ("true", True, True, True),
    "resume": ("false", False, True, True),
    "run-all": ("false", False, True, True),
    "shard": ('"shard.json"', Path("shard.json"), "gpu-1.json", Path("gpu-1.json")),
    "calibrate": ('"never"', "never", "never", "never"),
    "fail-on-oom": ("true", True, True, True),
}
EVERY = pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
ONE_VALUE = [option for option in OPTIONS if not option.repeat and not option.switch]


def from_file(root: Path, text: str) -> Options:
    (root / "pyproject.toml").write_text(f"[tool.fitmatrix]\n{text}\n", encoding="utf-8")
    return Options(config=read_config(root))


def test_every_option_is_sampled_here() -> None:
    assert list(SAMPLES) == [option.name for option in OPTIONS]


@EVERY
def test_without_a_word_the_default_holds(option: Option) -> None:
    options = Options()
    assert getattr(options, option.key) == option.default
    assert option.key not in options.origin


@EVERY
def test_the_file_goes_before_the_default(option: Option, tmp_path: Path) -> None:
    text, value, _, _ = SAMPLES[option.name]
    options = from_file(tmp_path, f"{option.name} = {text}")
    assert getattr(options, option.key) == value
    assert options.origin == {option.key: "[tool.fitmatrix]"}


@EVERY
def test_the_command_line_goes_before_the_file(option: Option, tmp_path: Path) -> None:
    text, _, given, value = SAMPLES[option.name]
    (tmp_path / "pyproject.toml").write_text(f"[tool.fitmatrix]\n{option.name} = {text}\n", encoding="utf-8")
    options = Options(config=read_config(tmp_path), given={option.key: given})
    assert getattr(options, option.key) == value
    assert options.origin == {option.key: "command line"}


@EVERY
def test_what_the_command_line_does_not_give_is_left_to_the_file(option: Option, tmp_path: Path) -> None:
    text, value, _, _ = SAMPLES[option.name]
    (tmp_path / "pyproject.toml").write_text(f"[tool.fitmatrix]\n{option.name} = {text}\n", encoding="utf-8")
    options = Options(config=read_config(tmp_path), given={each.key: None for each in OPTIONS})
    assert getattr(options, option.key) == value


@EVERY
def test_the_file_may_write_a_name_with_underscores(option: Option, tmp_path: Path) -> None:
    text, value, _, _ = SAMPLES[option.name]
    assert getattr(from_file(tmp_path, f"{option.key} = {text}"), option.key) == value


@EVERY
def test_the_default_stands_the_option_s_own_check(option: Option) -> None:
    """So that writing the default down changes nothing."""
    if option.default is not None:
        written = option.default if option.switch else [*option.default] if option.repeat else str(option.default)
        assert getattr(Options(given={option.key: written}), option.key) == option.default


@EVERY
def test_the_help_tells_the_default(option: Option) -> None:
    told = {
        "model": DEFAULT_MODEL,
        "html": "default index.html",
        "baseline": "default none",
        "shard": "default none",
        "device-map": "no other unless named",
        "kv": "default dynamic",
        "attention": "default what transformers chooses",
        "precision": f"default {' '.join(DEFAULT_PRECISIONS)}",
    } | dict.fromkeys(("placement", "vram", "ram"), "default all")
    if not option.switch:
        default = option.default if not isinstance(option.default, float) else f"{option.default:.0f}"
        assert told.get(option.name, f"default {default}") in option.help


def test_all_stands_for_every_row() -> None:
    assert Options(given={"precision": ["all"]}).precision == tuple(PRECISIONS)
    assert Options(given={"precision": ["int4", "all"]}).precision[0] == "int4"


def test_the_help_lists_what_can_be_chosen() -> None:
    helps = {option.name: option.help for option in OPTIONS}
    assert ", ".join(PRECISIONS) in helps["precision"]
    assert ", ".join(PLACEMENTS) in helps["placement"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"prompt-token": 3}, "[tool.fitmatrix]: unknown option 'prompt_token': did you mean 'prompt_tokens'?"),
        ({"zzz": 3}, "[tool.fitmatrix]: unknown option 'zzz': known: attention, baseline, batch,"),
        ({"precision": "int44"}, "--precision ([tool.fitmatrix]): unknown precision 'int44': did you mean 'int4'"),
        ({"precision": ["bf16", "INT8"]}, "--precision ([tool.fitmatrix]): unknown precision 'INT8': did you mean 'int8'"),
        ({"precision": 4}, "--precision ([tool.fitmatrix]): 4 is neither a name nor a list of names"),
        ({"precision": True}, "--precision ([tool.fitmatrix]): true is neither a name nor a list of names"),
        ({"model": {"a": 1}}, '--model ([tool.fitmatrix]): {"a": 1} is neither a name nor a list of names'),
        ({"placement": "gpu-cpu"}, "--placement ([tool.fitmatrix]): unknown placement 'gpu-cpu': did you mean 'gpu+cpu'"),
        ({"model": " "}, "--model ([tool.fitmatrix]): an empty name"),
        ({"batch": "two"}, "--batch ([tool.fitmatrix]): 'two' is not a whole number"),
        ({"batch": 1.5}, "--batch ([tool.fitmatrix]): '1.5' is not a whole number"),
        ({"batch": 0}, "--batch ([tool.fitmatrix]): 0 is too small: at least 1"),
        ({"batch": -3}, "--batch ([tool.fitmatrix]): -3 is too small: at least 1"),
        ({"batch": [1, 2]}, "--batch ([tool.fitmatrix]): [1, 2] is not one value"),
        ({"batch": True}, "--batch ([tool.fitmatrix]): true is not one value"),
        ({"new-tokens": 1}, "--new-tokens ([tool.fitmatrix]): 1 is too small: at least 2"),
        ({"case-timeout": "soon"}, "--case-timeout ([tool.fitmatrix]): 'soon' is not a number of seconds"),
        ({"case-timeout": 0}, "--case-timeout ([tool.fitmatrix]): '0' is out of range: more than 0 seconds"),
        ({"case-timeout": "nan"}, "'nan' is out of range"),
        ({"case-timeout": "inf"}, "'inf' is out of range"),
        ({"run-all": "yes"}, "--run-all ([tool.fitmatrix]): 'yes' is neither true nor false"),
        ({"run-all": 1}, "--run-all ([tool.fitmatrix]): 1 is neither true nor false"),
    ],
)
def test_a_mistake_is_one_sentence_with_option_origin_value_and_way_out(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        Options(config=config)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mistake_on_the_command_line_says_so() -> None:
    with pytest.raises(UsageError, match=re.escape("--repeats: 'many' is not a whole number")):
        Options(config={"repeats": 3}, given={"repeats": "many"})


def test_a_name_alone_is_a_list_of_one(tmp_path: Path) -> None:
    assert from_file(tmp_path, 'precision = "int4"').precision == ("int4",)


def test_a_name_said_twice_counts_once() -> None:
    assert Options(given={"precision": ["int4", "bf16", "int4"]}).precision == ("int4", "bf16")


def test_an_option_that_does_not_exist_is_no_attribute() -> None:
    with pytest.raises(AttributeError):
        _ = Options().tape


# The file


def test_no_file_and_no_table_say_nothing(tmp_path: Path) -> None:
    assert read_config(tmp_path) == {}
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\n", encoding="utf-8")
    assert read_config(tmp_path) == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"[tool.fitmatrix\n", "is not TOML"),
        (b"name = '\xff'\n", "is not TOML"),
        (b"[tool]\nfitmatrix = 3\n", "[tool.fitmatrix] is not a table"),
        (b"tool = 3\n", "[tool.fitmatrix] is not a table"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: bytes, said: str) -> None:
    (tmp_path / "pyproject.toml").write_bytes(text)
    with pytest.raises(UsageError, match=re.escape(said)) as caught:
        read_config(tmp_path)
    assert str(tmp_path / "pyproject.toml") in str(caught.value)


# The command that repeats a run


def test_a_run_by_default_needs_no_option() -> None:
    assert Options().command() == ""


@pytest.mark.parametrize("option", [*ONE_VALUE, *(each for each in OPTIONS if each.switch)], ids=lambda option: option.name)
def test_the_command_gives_back_what_was_changed(option: Option) -> None:
    _, _, given, value = SAMPLES[option.name]
    words = shlex.split(Options(given={option.key: given}).command())
    if option.name in (
        "ram",
        "results",
        "html",
        "resume",
        "device-map",
        "baseline",
        "shard",
        "calibrate",
    ):  # a limit is said of each case
        assert words == []
    elif option.switch:
        assert words == [option.flag]
    else:
        assert words[0] == option.flag
        assert getattr(Options(given={option.key: words[1]}), option.key) == value


def test_the_command_repeats_what_the_file_said_too(tmp_path: Path) -> None:
    options = from_file(tmp_path, "batch = 2\nrun-all = true\nresults = 'elsewhere'\nprecision = 'int4'")
    assert options.command() == "--batch 2 --run-all"


@pytest.mark.parametrize("name", ["ram", "vram"])
def test_a_memory_without_a_unit_is_refused_with_the_way_out(name: str) -> None:
    option = next(option for option in OPTIONS if option.name == name)
    with pytest.raises(UsageError, match=f"--{name}: '32' without a unit is 32 bytes: write 32GiB"):
        Options(given={option.key: ["32"] if option.repeat else "32"})
