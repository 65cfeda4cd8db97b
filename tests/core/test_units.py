"""Sizes, seconds and rates: what a person may write, and what a person reads."""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.core import units
from harness.core.errors import UsageError
from harness.core.units import GIB, KIB, MIB, TIB, exact_size, parse_capacity, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("4096B", 4096),
        ("4096b", 4096),
        ("12GiB", 12 * GIB),
        ("12G", 12 * GIB),
        ("12g", 12 * GIB),
        ("12gib", 12 * GIB),
        ("12GB", 12 * 10**9),
        ("512MiB", 512 * MIB),
        ("512M", 512 * MIB),
        ("512MB", 512 * 10**6),
        ("64k", 64 * KIB),
        ("64KB", 64_000),
        ("2TiB", 2 * TIB),
        ("2TB", 2 * 10**12),
        ("1.5GiB", 3 * GIB // 2),
        (".5G", GIB // 2),
        ("  12 GiB ", 12 * GIB),
        ("0.1GB", 10**8),
    ],
)
def test_reads_a_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "GiB",
        "12 apples",
        "12i",
        "12iB",
        "12PiB",
        "-1GiB",
        "+1GiB",
        "1e9",
        "1.GiB",
        "1..5G",
        "1,5G",
        "0x10",
        "1_000",
        "nan",
        "inf",
    ],
)
def test_refuses_what_is_no_size_with_an_example_to_follow(text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"{text!r} is not a size: write for example 8GiB")):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "binary", "decimal"), [("12Gb", "12GiB", "12GB"), ("12gb", "12GiB", "12GB"), ("1.5mb", "1.5MiB", "1.5MB")]
)
def test_refuses_a_small_b_which_may_mean_bits(text: str, binary: str, decimal: str) -> None:
    with pytest.raises(UsageError, match=f"could mean bits: write {binary} or {decimal}"):
        parse_size(text)


@pytest.mark.parametrize("text", ["0", "0GiB", "0.0001", "1048576TiB", "9" * 30, "9" * 400], ids=lambda text: text[:12])
def test_refuses_a_size_that_nothing_has(text: str) -> None:
    with pytest.raises(UsageError, match="out of range"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "meant"), [("32", "32GiB"), (" 8 ", "8GiB"), ("1.5", "1.5GiB"), ("4095", "4095GiB"), ("8192", "8192MiB")]
)
def test_a_capacity_is_no_bare_number_that_only_a_slip_can_mean(text: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"without a unit is [0-9,]+ bytes: write {meant}$"):
        parse_capacity(text)


@pytest.mark.parametrize(("text", "size"), [("32GiB", 32 * GIB), ("512B", 512), ("1048576", MIB), ("17179869184", 16 * GIB)])
def test_a_capacity_with_a_unit_or_of_many_bytes_is_read_as_it_stands(text: str, size: int) -> None:
    assert parse_capacity(text) == size


@given(st.text(max_size=20))
def test_any_text_is_a_size_or_a_usage_error(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert 0 < parse_size(text) < 1 << 60


@given(st.integers(1, 1 << 59))
def test_a_written_size_reads_as_nearly_the_same(size: int) -> None:
    written = units.format_size(size).replace(",", "").replace(" bytes", "")
    assert abs(parse_size(written) - size) <= 0.005 * size + 1  # three digits, and whole bytes


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (-0.0, "0"),
        (0.0123, "0.0123"),
        (0.5, "0.500"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (123.4, "123"),
        (12345, "12,345"),
        (-5.2, "-5.20"),
        (9.999, "10.0"),
        (0.9996, "1.00"),
        (99.96, "100"),
        (999.6, "1,000"),
        (0.00999999, "0.0100"),
        (1e-20, "0.000000000000000"),
        (float("inf"), "inf"),
        (float("nan"), "nan"),
    ],
)
def test_writes_three_significant_digits_and_no_exponent(value: float, text: str) -> None:
    assert units.significant(value) == text


@given(st.floats(1e-9, 999.4))
def test_below_a_thousand_there_are_exactly_three_significant_digits(value: float) -> None:
    text = units.significant(value)
    assert len(text.replace(".", "").lstrip("0")) == 3
    assert float(text) == pytest.approx(value, rel=0.00501)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (KIB, "1.00 KiB"),
        (512 * MIB, "512 MiB"),
        (3 * GIB // 2, "1.50 GiB"),
        (2 * TIB, "2.00 TiB"),
        (-3 * MIB, "-3.00 MiB"),
    ],
)
def test_writes_bytes_with_the_unit_that_suits_them(size: int, text: str) -> None:
    assert units.format_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.0031, "3.10 ms"),
        (0.25, "250 ms"),
        (2.2, "2.20 s"),
        (59.94, "59.9 s"),
        (245, "4 min 05 s"),
        (3599.9, "59 min 59 s"),
        (3720, "1 h 02 min"),
        (360_000, "100 h 00 min"),
    ],
)
def test_writes_a_duration(seconds: float, text: str) -> None:
    assert units.format_seconds(seconds) == text


def test_writes_rates_shares_and_bare_gib() -> None:
    assert units.format_rate(12.2) == "12.2 tokens/s"
    assert units.format_share(0.985) == "98.5 %"
    assert units.format_gib(11.6 * GIB) == "11.6"


@pytest.mark.parametrize("text", ["8GiB", "1536MiB", "12GB", "700MB", "1048577", "12345B", "1B"])
def test_an_exact_size_is_read_back_as_it_was(text: str) -> None:
    assert exact_size(parse_size(text)) == text
