"""Files of tensors written without torch are read by torch and safetensors, and by our own readers."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.checkpoint.formats.tensor_writer import ALIGNMENT, TensorToWrite, write_bin, write_safetensors

TENSORS = (
    TensorToWrite(name="a.weight", dtype="float16", shape=(300, 70)),
    TensorToWrite(name="名", dtype="bool", shape=(1, 1, 8, 8)),
    TensorToWrite(name="c", dtype="bfloat16", shape=(5,)),
    TensorToWrite(name="d", dtype="float32", shape=()),
)


def counted(tensor: TensorToWrite) -> Iterator[memoryview]:
    data = bytes(index % 2 for index in range(tensor.bytes))
    yield memoryview(data[:7])
    yield memoryview(data[7:])


@pytest.mark.parametrize("mapped", [False, True])
def test_torch_reads_what_write_bin_wrote(tmp_path: Path, mapped: bool) -> None:
    path = tmp_path / "pytorch_model.bin"
    write_bin(path, TENSORS, counted)
    read = torch.load(path, weights_only=True, mmap=mapped)
    assert [(name, str(value.dtype), tuple(value.shape)) for name, value in read.items()] == [
        (tensor.name, f"torch.{tensor.dtype}", tensor.shape) for tensor in TENSORS
    ]
    for tensor in TENSORS:
        held = read[tensor.name].reshape(-1).view(torch.uint8)
        assert bytes(held.tolist()) == b"".join(counted(tensor))
        assert not mapped or read[tensor.name].data_ptr() % ALIGNMENT == 0


def test_a_bin_file_is_a_whole_zip(tmp_path: Path) -> None:
    write_bin(tmp_path / "x.bin", TENSORS, counted)
    assert zipfile.ZipFile(tmp_path / "x.bin").testzip() is None


def test_safetensors_reads_what_write_safetensors_wrote(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, TENSORS, counted)
    read = load_file(path)
    for tensor in TENSORS:
        assert tuple(read[tensor.name].shape) == tensor.shape
        assert bytes(read[tensor.name].reshape(-1).view(torch.uint8).tolist()) == b"".join(counted(tensor))


def test_hollow_files_have_their_size_and_take_no_disk(tmp_path: Path) -> None:
    large = [TensorToWrite(name=f"w{index}", dtype="float16", shape=(1 << 16, 1 << 14)) for index in range(6)]  # 2 GiB each
    write_bin(tmp_path / "x.bin", large, None)
    write_safetensors(tmp_path / "x.safetensors", large, None)
    for name in ("x.bin", "x.safetensors"):
        found = (tmp_path / name).stat()
        assert found.st_size > 6 * (2 << 30)
        assert found.st_blocks * 512 < 1 << 20
    assert torch.load(tmp_path / "x.bin", weights_only=True, mmap=True)["w5"].shape == (1 << 16, 1 << 14)
