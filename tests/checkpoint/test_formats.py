"""Headers of safetensors, GGUF and .bin files: the figures of the libraries that wrote them, and nothing but CheckpointError."""

from __future__ import annotations

import copyreg
import io
import json
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.checkpoint.formats.bin_header import read_bin
from harness.checkpoint.formats.files import Cursor, LocalFile
from harness.checkpoint.formats.gguf_header import TYPES, read_gguf
from harness.checkpoint.formats.pickle_reader import OPERATIONS
from harness.checkpoint.formats.safetensors_header import StoredTensor, parse_config, read_index, read_safetensors
from harness.core.dtypes import DTYPE_BITS
from harness.core.errors import CheckpointError
from tests.support.gguf_files import small_gguf

Reader = Callable[[LocalFile], Any]


def parse(path: Path, read: Reader) -> Any:
    blob = LocalFile(path, path.name)
    try:
        return read(blob)
    finally:
        blob.close()


def parse_bytes(tmp_path: Path, data: bytes, read: Reader) -> Any:
    path = tmp_path / "file"
    path.write_bytes(data)
    return parse(path, read)


def by_name(tensors: list[StoredTensor]) -> dict[str, StoredTensor]:
    return {tensor.name: tensor for tensor in tensors}


def assert_same(found: list[StoredTensor], state: dict[str, torch.Tensor]) -> None:
    expected = {name: (str(t.dtype)[6:], tuple(t.shape), t.numel() * t.element_size()) for name, t in state.items()}
    assert {t.name: (t.dtype, t.shape, t.bytes) for t in found} == expected


STATE = {
    "embed.weight": torch.zeros(7, 4, dtype=torch.bfloat16),
    "mask": torch.zeros(3, dtype=torch.bool),
    "scale": torch.zeros((), dtype=torch.float32),
    "empty": torch.zeros(0, 5, dtype=torch.float16),
    "packed": torch.zeros(2, 3, dtype=torch.int32),
    "eight": torch.zeros(4, dtype=torch.float8_e4m3fn),
    "wide": torch.zeros(2, dtype=torch.int64),
}


# safetensors


def header(entries: dict[str, Any] | str, data: bytes = b"") -> bytes:
    text = entries if isinstance(entries, str) else json.dumps(entries)
    return struct.pack("<Q", len(text.encode())) + text.encode() + data


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_safetensors_agrees_with_torch(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(STATE, path, metadata={"format": "pt"})
    assert_same(parse(path, read_safetensors), STATE)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9])
def test_safetensors_of_a_few_bytes(tmp_path: Path, size: int) -> None:
    with pytest.raises(CheckpointError, match="download it again"):
        parse_bytes(tmp_path, b"\x40" * size, read_safetensors)


@pytest.mark.parametrize(
    ("entries", "data", "message"),
    [
        ({"a": entry("F33")}, b"1234", "unknown dtype 'F33'"),
        ({"a": entry(offsets=(0, 8))}, b"12345678", "contradicts its dtype and shape"),
        ({"a": entry(offsets=(-4, 0))}, b"1234", "'a' in its header cannot be understood"),
        ({"a": entry(offsets=(4, 0))}, b"1234", "ends before it begins"),
        ({"a": entry(), "b": entry()}, b"1234", "overlaps"),
        ({"a": entry(offsets=(4, 8))}, b"12345678", "leaves a hole"),
        ({"a": entry()}, b"123", "cut short"),
        ({"a": entry()}, b"12345", "1 bytes behind its last tensor"),
        ({"a": entry(shape=(-1,))}, b"1234", "cannot be understood"),
        ({"a": entry(shape=("1",))}, b"1234", "cannot be understood"),
        ({"a": entry(shape=[1 << 59] * 5000)}, b"1234", "impossible shape"),
        ({"a": entry(shape=[1] * 17)}, b"1234", "impossible shape"),
        ({"a": {"dtype": "F32"}}, b"1234", "cannot be understood"),
        ({"a": 5}, b"", "cannot be understood"),
        ("[]", b"", "cannot be understood"),
        ("{", b"", "cannot be understood"),
        ('{"\\ud800": 1}', b"", "cannot be understood"),
        ('{"a":' + "[" * 100_000, b"", "cannot be understood"),
        ('{"a":[' + "1," * 1_500_000 + "1]}", b"", "more tensors than a file can hold"),
    ],
)
def test_safetensors_that_contradicts_itself(tmp_path: Path, entries: Any, data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        parse_bytes(tmp_path, header(entries, data), read_safetensors)
    assert caught.value.path == str(tmp_path / "file")


def test_safetensors_refuses_what_the_library_refuses(tmp_path: Path) -> None:
    """Where the library reads a mutated file, so does this parser, and the other way round."""
    whole = safetensors.numpy.save({"a": np.zeros((2, 3), np.float32), "b": np.ones(4, np.int8)})
    for at in range(8, len(whole) - 28):
        data = whole[:at] + b"1" + whole[at + 1 :]
        try:
            theirs = sorted(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
        except safetensors.SafetensorError:
            continue
        ours = parse_bytes(tmp_path, data, read_safetensors)
        assert sorted((t.name, list(t.shape)) for t in ours) == [(name, spec["shape"]) for name, spec in theirs]


# GGUF


def test_gguf_agrees_with_the_gguf_package(tmp_path: Path) -> None:
    path = small_gguf(tmp_path / "model.gguf")
    metadata, tensors = parse(path, read_gguf)
    theirs = gguf.GGUFReader(path)
    assert {t.name: (t.shape, t.bytes) for t in tensors} == {
        t.name: (tuple(int(n) for n in reversed(t.shape)), t.n_bytes) for t in theirs.tensors
    }
    assert {t.name: t.dtype for t in tensors} == {"a": "q8_0", "b": "q4_1", "c": "float16"}
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.context_length"] == 2048
    assert metadata["llama.attention.head_count_kv"] == [1, 2, 3]
    assert metadata["tokenizer.ggml.tokens"] == {"type": "string", "count": 600}
    assert metadata["tokenizer.ggml.scores"] == {"type": "number", "count": 600}


def test_every_block_type_has_the_size_that_gguf_gives_it() -> None:
    theirs = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {number: (elements, size) for number, (_, elements, size) in TYPES.items()} == theirs


def test_gguf_cut_short_anywhere(tmp_path: Path) -> None:
    whole = small_gguf(tmp_path / "model.gguf").read_bytes()
    for size in [*range(0, len(whole), 97), len(whole) - 33]:
        with pytest.raises(CheckpointError, match=r"cut short|empty"):
            parse_bytes(tmp_path, whole[:size], read_gguf)


def gguf_head(*, version: int = 3, tensors: int = 0, keys: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def key(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


def info(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GGML" + bytes(40), "not a GGUF file"),
        (gguf_head(version=1), "version 1"),
        (gguf_head(version=3 << 24), "big-endian"),
        (gguf_head(tensors=1 << 63), "says it has"),
        (gguf_head(keys=1 << 63), "says it has"),
        (gguf_head(keys=1, rest=key("k", 99, b"")), "unknown type 99"),
        (gguf_head(keys=1, rest=key("k", 9, struct.pack("<IQ", 9, 1))), "unknown type 9"),
        (gguf_head(keys=1, rest=key("k", 9, struct.pack("<IQ", 10, 1 << 61))), "cut short"),
        (gguf_head(keys=1, rest=key("k", 9, struct.pack("<IQ", 8, 1 << 61))), "strings"),
        (gguf_head(keys=1, rest=key("k", 8, struct.pack("<Q", 1 << 60))), "a string of"),
        (gguf_head(keys=1, rest=key("general.alignment", 4, struct.pack("<I", 0))), "not a power of two"),
        (gguf_head(keys=1, rest=key("general.alignment", 8, struct.pack("<Q", 1) + b"x")), "not a power of two"),
        (gguf_head(tensors=1, rest=info("t", (32,), 5, 0)), "block type 5"),
        (gguf_head(tensors=1, rest=info("t", (31,), 2, 0)), "whole q4_0 blocks"),
        (gguf_head(tensors=1, rest=info("t", (1 << 62, 1 << 62), 0, 0)), "impossible shape"),
        (gguf_head(tensors=1, rest=info("t", (1,) * 9, 0, 0)), "9 dimensions"),
        (gguf_head(tensors=1, rest=info("t", (32,), 0, 0)), "cut short"),
        (gguf_head(tensors=2, rest=info("t", (32,), 0, 0) + info("u", (32,), 0, 64) + bytes(512)), "overlaps"),
        (gguf_head(tensors=2, rest=info("t", (8,), 0, 0) + info("t", (8,), 0, 32) + bytes(512)), "twice"),
        (gguf_head(tensors=1, rest=info("t", (8,), 0, 4) + bytes(512)), "not aligned"),
    ],
)
def test_gguf_that_contradicts_itself(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_bytes(tmp_path, data, read_gguf)


# torch.save


def saved(value: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


CONTAINERS = [
    {},
    {"pickle_protocol": 4},
    {"_use_new_zipfile_serialization": False},
]


@pytest.mark.parametrize("options", CONTAINERS, ids=["zip", "zip-protocol-4", "legacy"])
def test_bin_agrees_with_torch(tmp_path: Path, options: dict[str, Any]) -> None:
    # Before the zip container torch had no float8.
    state = {name: value for name, value in STATE.items() if options != CONTAINERS[2] or value.dtype != torch.float8_e4m3fn}
    assert_same(parse_bytes(tmp_path, saved(OrderedDict(state), **options), read_bin), state)


@pytest.mark.parametrize("options", CONTAINERS, ids=["zip", "zip-protocol-4", "legacy"])
def test_bin_of_a_module_with_tied_weights_and_views(tmp_path: Path, options: dict[str, Any]) -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(9, 4)
            self.norm = torch.nn.LayerNorm(4)
            self.head = torch.nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed.weight

    whole = torch.zeros(6, 4)
    state = {**Model().state_dict(), "q": whole[:2], "kv": whole[2:], "turned": whole.T, "parameter": torch.nn.Parameter(whole)}
    tensors = by_name(parse_bytes(tmp_path, saved(state, **options), read_bin))
    assert_same(list(tensors.values()), state)
    assert tensors["embed.weight"].storage == tensors["head.weight"].storage
    assert tensors["q"].storage != tensors["kv"].storage
    assert tensors["parameter"].storage == tensors["turned"].storage


def test_every_dtype_that_torch_saves_is_known() -> None:
    for name, bits in DTYPE_BITS.items():
        kind = getattr(torch, name, None)
        assert kind is None or torch.empty(0, dtype=kind).element_size() * 8 == bits


MARKER = "harness-was-here"


class Runs:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def raw(*operations: bytes) -> bytes:
    return b"\x80\x02" + b"".join(operations) + b"."


HOSTILE: dict[str, tuple[Any, str]] = {
    "os.system": (Runs(os.system, f"touch {MARKER}"), "system"),
    "eval": (Runs(eval, f"open('{MARKER}', 'w')"), r"eval"),
    "inside a tensor's place": ({"a": torch.zeros(2), "b": Runs(eval, "1")}, "eval"),
    "inside a list": ([[Runs(exec, "1")]], "exec"),
    "getattr": (Runs(getattr, "x", "upper"), "getattr"),
    "a whole module": (torch.nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
    "INST": (raw(b"(ios\nsystem\n"), r"os\.system"),
    "GLOBAL": (raw(b"cos\nsystem\n(X\x04\x00\x00\x00true", b"tR"), r"os\.system"),
    "STACK_GLOBAL": (raw(b"\x8c\x02os", b"\x8c\x06system", b"\x93", b"\x8c\x04true", b"\x85R"), r"os\.system"),
    "OBJ": (raw(b"(ccollections\nOrderedDict\n", b"o"), r"collections\.OrderedDict"),
    "NEWOBJ": (raw(b"ccollections\nOrderedDict\n)", b"\x81"), r"collections\.OrderedDict"),
    "EXT1": (raw(b"\x82\x07"), "copyreg extension 7"),
    "EXT2": (raw(b"\x83\x07\x01"), "copyreg extension 263"),
    "EXT4": (raw(b"\x84\x07\x00\x00\x00"), "copyreg extension 7"),
    "dotted name": (raw(b"ctorch\nos.system\n"), r"torch\.os\.system"),
    "hidden behind numpy": (raw(b"cnumpy.core.multiarray\n_reconstruct\n"), "numpy"),
    "PERSID": (raw(b"Pwhatever\n"), "no checkpoint needs"),
    "call a string": (raw(b"X\x01\x00\x00\x00x", b")R"), "calls 'x'"),
    "build on a string": (raw(b"X\x01\x00\x00\x00x", b"}b"), "sets the state of 'x'"),
    "persistent id of a module": (raw(b"(X\x06\x00\x00\x00moduleNNNNtQ"), "no storage"),
    "nested key": (raw(b"}N", b"\x85" * 200_000, b"Ns"), "as a key"),
    "underflow": (raw(b"R"), "empty stack"),
    "pop below a mark": (raw(b"N(0"), "empty stack"),
    "unopened tuple": (raw(b"t"), "closes what was not opened"),
    "memo of nothing": (raw(b"h\x05"), "entry 5"),
    "long number": (raw(b"\x8a\xff" + bytes(255)), "a number of 255 bytes"),
    "long string": (raw(b"X\xff\xff\xff\x7f"), "a string of"),
    "not UTF-8": (raw(b"X\x01\x00\x00\x00\xff"), "not UTF-8"),
    "endless line": (raw(b"c" + b"x" * 1000), "a line longer"),
    "no tensors": ({"epoch": 3}, "no tensors"),
    "only a tensor": (torch.zeros(3), "no tensors"),
    "too many operations": (raw(b"N0" * OPERATIONS), "more than 500,000"),
    "no end": (b"\x80\x02N", "cut short"),
}  # fmt: skip


def in_zip(pickled: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", bytes(8))
    return stream.getvalue()


LEGACY_START = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)


@pytest.mark.parametrize("container", ["zip", "legacy"])
@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_of_a_pickle_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, container: str) -> None:
    monkeypatch.chdir(tmp_path)
    value, message = HOSTILE[name]
    if isinstance(value, bytes):
        data = in_zip(value) if container == "zip" else LEGACY_START + value
    else:
        data = saved(value, _use_new_zipfile_serialization=container == "zip")
    started = time.process_time()
    with pytest.raises(CheckpointError, match=message):
        parse_bytes(tmp_path, data, read_bin)
    assert time.process_time() - started < 5  # of the processor, on a busy machine
    assert not (tmp_path / MARKER).exists()


def test_a_registered_copyreg_extension_is_not_resolved(tmp_path: Path) -> None:
    copyreg.add_extension("os", "system", 240)
    try:
        data = pickle.dumps(Runs(os.system, "true"), 2).replace(b"cposix\nsystem\n", b"\x82\xf0")
        with pytest.raises(CheckpointError, match="copyreg extension 240"):
            parse_bytes(tmp_path, in_zip(data), read_bin)
    finally:
        copyreg.remove_extension("os", "system", 240)


def rebuilt(storage: bytes, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    """A state dict of one tensor, with a storage of 2 floats unless told otherwise."""
    numbers = [pickle.dumps(part, 2)[2:-1] for part in (offset, shape, strides)]
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"".join(numbers) + b"\x89NtR"
    return raw(b"}X\x01\x00\x00\x00a", call, b"s")


FLOATS = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQ"


@pytest.mark.parametrize(
    ("storage", "offset", "shape", "strides", "message"),
    [
        (FLOATS, 0, (3,), (1,), "larger than its storage"),
        (FLOATS, 1, (2,), (1,), "larger than its storage"),
        (FLOATS, 0, (1 << 40,), (0,), "larger than its storage"),
        (FLOATS, 0, (1 << 59,) * 4, (1,) * 4, "impossible shape"),
        (FLOATS, -1, (1,), (1,), "without storage, shape or strides"),
        (FLOATS, 0, (-1,), (1,), "without storage, shape or strides"),
        (FLOATS, 0, (1, 1), (1,), "without storage, shape or strides"),
        (b"N", 0, (1,), (1,), "without storage, shape or strides"),
        (FLOATS.replace(b"K\x02", b"K\x04"), 0, (2,), (1,), "holds 8 bytes for storage '0' of 16"),
        (FLOATS.replace(b"\x000X", b"\x009X"), 0, (2,), (1,), "holds nothing for storage '9'"),
        (FLOATS.replace(b"K\x02", b"N"), 0, (2,), (1,), "without type, key or size"),
        (FLOATS.replace(b"FloatStorage", b"float32"), 0, (2,), (1,), "without type, key or size"),
        (FLOATS.replace(b"torch\nFloat", b"torch.storage\nUntyped"), 0, (2,), (1,), "without a dtype"),
    ],
)
def test_a_tensor_must_fit_its_storage(
    tmp_path: Path, storage: bytes, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], message: str
) -> None:
    assert by_name(parse_bytes(tmp_path, in_zip(rebuilt(FLOATS, 0, (2,), (1,))), read_bin))["a"].bytes == 8
    with pytest.raises(CheckpointError, match=message):
        parse_bytes(tmp_path, in_zip(rebuilt(storage, offset, shape, strides)), read_bin)


def test_the_interpreter_knows_what_pickletools_knows() -> None:
    """Every operation of the standard library is either interpreted or refused by name, none is a gap by accident."""
    from harness.checkpoint.formats.pickle_reader import OPCODES

    left_out = {op.name for op in pickletools.opcodes if ord(op.code) not in OPCODES} - {"STOP"}
    text = {"INT", "LONG", "FLOAT", "STRING", "UNICODE", "GET", "PUT", "PERSID"}
    binary = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER", "LONG4"}
    assert left_out == text | binary | {"DICT", "LIST", "DUP", "POP_MARK", "EMPTY_SET", "ADDITEMS", "FROZENSET", "NEWOBJ_EX"}


def test_a_bin_of_more_than_4_gib_keeps_its_sizes_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above this limit sizes and offsets move to the zip64 records; here the limit is lowered instead of the file made large."""
    whole = zipfile.ZipFile(io.BytesIO(saved(STATE)))
    stream = io.BytesIO()
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 20)
    with zipfile.ZipFile(stream, "w") as archive:
        for name in whole.namelist():
            archive.writestr(name, whole.read(name))
    assert stream.getvalue().count(b"PK\x06\x06") == 1
    assert_same(parse_bytes(tmp_path, stream.getvalue(), read_bin), STATE)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
def test_bin_cut_short_anywhere(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = saved({"a": torch.zeros(3, 2), "b": torch.zeros(4)}, **options)
    for size in [*range(0, len(whole), 41), len(whole) - 1]:
        with pytest.raises(CheckpointError):
            parse_bytes(tmp_path, whole[:size], read_bin)


@pytest.mark.parametrize("read", [read_safetensors, read_gguf, read_bin, parse_config, read_index])
def test_what_stands_in_for_a_file_is_named(tmp_path: Path, read: Reader) -> None:
    with pytest.raises(CheckpointError, match="is empty"):
        parse_bytes(tmp_path, b"", read)
    with pytest.raises(CheckpointError, match="git lfs pull"):
        parse_bytes(tmp_path, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", read)


# JSON


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "a JSON list, not an object"),
        ("null", "not an object"),
        ('{"a": 1', "as JSON"),
        ('{"a": ' + "[" * 100_000, "as JSON"),
        ('{"a": ' + "[" * 70 + "]" * 70 + "}", "64 levels"),
        ('{"a": ' + "9" * 5000 + "}", "as JSON"),
        ('{"a": "\\ud800"}', "as JSON"),
        ('{"a": [' + "1," * 400_000 + "1]}", "more than 300,000 values"),
        ('{"a": "' + "x" * (5 << 20) + '"}', "5.00 MiB"),
        (b"\xff\xfe{}", "as JSON"),
    ],
)
def test_config_that_is_none(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse_bytes(tmp_path, text if isinstance(text, bytes) else text.encode(), parse_config)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_config_is_read_in_the_encodings_of_transformers_alone(tmp_path: Path, encoding: str) -> None:
    """What json guesses of bytes, a byte order mark or two bytes a letter, the library ends at: a plan that fits would not load."""
    data = '{"model_type": "llama", "a": "\u00e9"}'.encode(encoding)
    (tmp_path / "config.json").write_bytes(data)
    try:
        transformers.PretrainedConfig.get_config_dict(tmp_path)
    except OSError:
        with pytest.raises(CheckpointError, match="cannot be understood as JSON"):
            parse_bytes(tmp_path, data, parse_config)
    else:
        assert encoding == "utf-8"
        assert parse_bytes(tmp_path, data, parse_config)["a"] == "\u00e9"


def test_config_may_hold_infinity(tmp_path: Path) -> None:
    assert parse_bytes(tmp_path, b'{"time_step_limit": [0.0, Infinity]}', parse_config)["time_step_limit"] == [0.0, float("inf")]


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": []}', "[]", "{"])
def test_index_that_is_none(tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError):
        parse_bytes(tmp_path, text.encode(), read_index)


# All formats


def test_cursor_reads_in_windows_and_skips_unread(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 1024)
    blob = LocalFile(path, "file")
    reads = []
    read = blob.read
    blob.read = lambda offset, length: reads.append((offset, length)) or read(offset, length)  # type: ignore[method-assign, func-returns-value]
    cursor = Cursor(blob, first=100)
    assert cursor.take(10) == bytes(range(10))
    cursor.skip(200_000)
    assert cursor.take(4) == bytes((200_010 + i) % 256 for i in range(4))
    assert reads == [(0, 100), (200_010, 200)]
    assert cursor.position == 200_014
    with pytest.raises(CheckpointError, match="cut short"):
        cursor.skip(cursor.left + 1)
    blob.close()


SEEDS: dict[str, tuple[Callable[[Path], bytes], Reader]] = {
    "safetensors": (lambda _: safetensors.torch.save(STATE), read_safetensors),
    "gguf": (lambda path: small_gguf(path / "seed.gguf").read_bytes(), read_gguf),
    "zip": (lambda _: saved(STATE), read_bin),
    "legacy": (lambda _: saved({"a": torch.zeros(3), "b": torch.ones(2)}, _use_new_zipfile_serialization=False), read_bin),
    "config": (lambda _: b'{"hidden_size": 8, "a": [1, {"b": null}], "c": "d\\u00e9"}', parse_config),
    "index": (lambda _: b'{"metadata": {"total_size": 4}, "weight_map": {"a": "1.bin", "b": "2.bin"}}', read_index),
}

EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(["set", "insert", "delete", "repeat"]), st.binary(min_size=1, max_size=8)),
    min_size=1,
    max_size=6,
)


def mutate(data: bytes, edits: list[tuple[float, str, bytes]]) -> bytes:
    for where, how, piece in edits:
        at = int(where * len(data))
        rest = {"set": data[at + len(piece) :], "insert": data[at:], "delete": data[at + len(piece) :], "repeat": data[at // 2 :]}
        data = data[:at] + (b"" if how in ("delete", "repeat") else piece) + rest[how]
    return data


@pytest.fixture(scope="module", params=SEEDS)
def seed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Reader, Path]:
    make, read = SEEDS[request.param]
    folder = tmp_path_factory.mktemp("mutated")
    data = make(folder)
    parse_bytes(folder, data, read)
    return data, read, folder


@settings(max_examples=200, deadline=1000, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(edits=EDITS)
def test_a_mutated_file_is_read_or_refused(seed: tuple[bytes, Reader, Path], edits: list[tuple[float, str, bytes]]) -> None:
    data, read, folder = seed
    message = outcome(folder, mutate(data, edits), read)
    assert message.isprintable()
    assert len(message) < 1000


def outcome(folder: Path, data: bytes, read: Reader) -> str:
    """Return the message of the CheckpointError that reading raised, "" where it raised none."""
    try:
        parse_bytes(folder, data, read)
    except CheckpointError as error:
        return str(error)
    return ""


def largest_config() -> bytes:
    return b'{"a":[' + b"{}," * 149_000 + b"{}]}"


def largest_index() -> bytes:
    return b'{"weight_map":{' + b",".join(b'"%07d%s":"%s"' % (i, b"x" * 40, b"y" * 30) for i in range(349_000)) + b"}}"


def widest_shape() -> bytes:
    return header('{"a":{"dtype":"F32","shape":[' + "999," * 1_499_000 + '1],"data_offsets":[0,4]}}', b"1234")


def most_entries() -> bytes:
    return header(
        "{" + ",".join(f'"{i}":{{"dtype":"U8","shape":[],"data_offsets":[{i},{i + 1}]}}' for i in range(110_000)) + "}",
        bytes(110_000),
    )


def most_strings() -> bytes:
    return gguf_head(keys=2, rest=b"".join(key(name, 9, struct.pack("<IQ", 8, 500_000)) + bytes(4_000_000) for name in "ab"))


def longest_texts() -> bytes:
    text = "\U0001f600".encode() + b"\xff" * ((1 << 20) - 4)
    return gguf_head(keys=23, rest=b"".join(key(f"k{i:02}", 8, struct.pack("<Q", len(text)) + text) for i in range(23)))


def most_values() -> bytes:
    values = struct.pack("<IQ", 4, 512) + struct.pack("<512I", *range(1000, 1512))
    return gguf_head(keys=2000, rest=b"".join(key(f"k{i:04}", 9, values) for i in range(2000)))


def most_tensors() -> bytes:
    return gguf_head(tensors=100_000, rest=b"".join(info(f"t{i:06}", (0,) * 8, 0, 0) for i in range(100_000)) + bytes(32))


def fullest_memo() -> bytes:
    return in_zip(raw(b"".join(b"}r" + struct.pack("<I", i) for i in range(249_990))))


def widest_strings() -> bytes:
    text = "\U0001f600".encode() + b"x" * 65_000
    return in_zip(raw((b"X" + struct.pack("<I", len(text)) + text) * 128))


def most_calls() -> bytes:
    """Storages and tensors described again and again, from the memo."""
    name = b"ctorch._utils\n_rebuild_parameter_with_state\n0"
    persistent = FLOATS[:-1] + b"q\x00Qq\x010"
    arguments = b"(h\x01K\x00(" + b"K\x01" * 16 + b"tq\x02h\x02\x89Ntq\x03" + b"0ctorch._utils\n_rebuild_tensor_v2\nq\x040"
    return in_zip(raw(persistent, arguments, b"h\x00Q0" * 60_000, b"h\x04h\x03R0" * 19_999, name * 90_000))


def most_members() -> bytes:
    entry = struct.Struct("<4s6H3I5H2I")
    one = entry.pack(b"PK\x01\x02", 0, 0, 0, 0, 0, 0, 0, 1, 1, 100, 0, 0, 0, 0, 0, 0)
    listing = b"".join(one + b"%0100d" % i for i in range(100_000))
    wide = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 0, 0, 0, 0, 100_000, 100_000, len(listing), 4)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, 4 + len(listing), 1)
    return b"PK\x03\x04" + listing + wide + locator + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 65535, 65535, 0, 0, 0)


LARGEST = {
    largest_config: "parse_config",
    largest_index: "read_index",
    widest_shape: "read_safetensors",
    most_entries: "read_safetensors",
    most_strings: "read_gguf",
    longest_texts: "read_gguf",
    most_values: "read_gguf",
    most_tensors: "read_gguf",
    fullest_memo: "read_bin",
    widest_strings: "read_bin",
    most_calls: "read_bin",
    most_members: "read_bin",
}

MEASURE = r"""
import pathlib, re, sys, time
from harness.checkpoint.formats import bin_header, files, gguf_header, safetensors_header as headers
from harness.core import errors
readers = {**vars(headers), **vars(gguf_header), **vars(bin_header)}
blob = files.LocalFile(pathlib.Path(sys.argv[1]), "file")
start = time.process_time()
try:
    kept = readers[sys.argv[2]](blob)
except errors.CheckpointError as error:
    print(error, file=sys.stderr)
peak = re.search(r"VmHWM:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]
print(time.process_time() - start, peak)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel keeps VmHWM on Linux")
@pytest.mark.parametrize("make", LARGEST, ids=lambda make: make.__name__)
def test_the_largest_file_that_is_read_takes_a_second_and_200_mib(tmp_path: Path, make: Callable[[], bytes]) -> None:
    path = tmp_path / "file"
    path.write_bytes(make())
    command = [sys.executable, "-c", MEASURE, str(path), LARGEST[make]]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=30, check=True)
    seconds, kib = (float(figure) for figure in done.stdout.split())
    assert seconds < 1, done
    assert kib < 200 * 1024, done
