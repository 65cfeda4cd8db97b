"""Results with damaged bytes: every command that reads them says which line it left out, keeps the rest and the file as it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from harness.cli.entry import main
from harness.core.records import encode_record
from harness.core.units import MIB
from harness.results.store import NAME
from tests.support import builders

LINES = [
    encode_record(builders.result(builders.case(precision), metrics={"ram_needed_bytes": 2e9, "decode_tok_s": 9.0})) + b"\n"
    for precision in ("fp32", "bf16", "fp16", "int8")
]
WHOLE = b"".join(LINES)
ASKED = {
    "report": "report damaged --format md",
    "compare": "compare whole damaged --all",
    "publish": "publish damaged --to site",
    "share": "share damaged --to shared",
    "plan": "plan gpt2 --ram 8GiB --results damaged",
}
# What happened to the file, and the lines that are lost by it.
DAMAGED: dict[str, tuple[bytes, int]] = {
    "one flipped bit": (LINES[0] + bytes([LINES[1][0] ^ 4]) + LINES[1][1:] + LINES[2], 1),
    "a cut line": (LINES[0] + LINES[1][:200] + b"\n" + LINES[2], 1),
    "a cut end": (WHOLE[:-100], 1),
    "a block of zeros": (LINES[0] + bytes(4096) + b"\n" + LINES[2], 1),
    "zeros at the end": (WHOLE + bytes(4096), 1),
    "two runs in one another": (LINES[0] + LINES[1][:100] + LINES[2] + LINES[1][100:] + LINES[3], 2),
    "a huge line": (LINES[0] + b"a" * (20 * MIB) + b"\n" + LINES[2], 1),
}


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], Path]:
    """Write damaged results beside whole ones, in a directory of their own; return their file."""
    monkeypatch.chdir(tmp_path)
    for name in ("whole", "damaged"):
        Path(name).mkdir()
        Path(name, NAME).write_bytes(WHOLE)

    def written(data: bytes) -> Path:
        Path("damaged", NAME).write_bytes(data)
        return Path("damaged", NAME)

    return written


@pytest.mark.parametrize("command", ASKED)
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_line_that_cannot_be_read_is_told_and_nothing_else_is_lost(
    command: str, damage: str, put: Callable[[bytes], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    data, lost = DAMAGED[damage]
    file = put(data)
    status = main(ASKED[command].split())
    out, err = capsys.readouterr()
    told = [line for line in err.splitlines() if f"{file}:" in line]
    assert len(told) == lost
    assert all("not a result, set aside: " in line for line in told)
    assert file.read_bytes() == data
    assert "Traceback" not in out + err
    assert status in (0, 1)


def test_200_flipped_bits_are_a_sentence_or_a_result_and_never_a_traceback(
    put: Callable[[bytes], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(15)
    for number in range(200):
        data = bytearray(WHOLE)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file = put(bytes(data))
        words = ASKED[chance.choice(["report", "compare", "plan"])]
        assert main(words.split()) in (0, 1), number
        err = capsys.readouterr().err
        assert err.count("\n") <= 2, (number, err)  # a line break that became a letter joins two lines
        assert file.read_bytes() == data
