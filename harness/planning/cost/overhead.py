"""What the process itself takes: imports and libraries, tokenizer, CUDA context, the vocabulary of a GGUF, what the heap keeps."""

from __future__ import annotations

from functools import cached_property, lru_cache

from harness.core.quantizers import SCHEMES
from harness.planning.calibration import Bytes, Calibration
from harness.planning.cost.inventory import Inventory, TensorTotals


class Overhead:
    """The memory of a process beside weights, KV cache and activations; none of it depends on the workload.

    `processes` is how many there are; `on_gpu` says whether each has a CUDA context.
    """

    def __init__(self, inventory: Inventory, calibration: Calibration, *, on_gpu: bool, processes: int) -> None:
        self.spec, self.skeleton, self.fmt = inventory.spec, inventory.skeleton, inventory.fmt
        self.calibration, self.on_gpu, self.processes = calibration, on_gpu, processes

    @cached_property
    def context(self) -> Bytes:
        """CUDA context and workspace on each GPU."""
        return self.calibration["gpu_context_bytes"].amount() + self.calibration["gpu_workspace_bytes"].amount()

    @cached_property
    def anonymous(self) -> Bytes:
        """Anonymous memory of imports, libraries and tokenizer."""
        constant, times = self.calibration, self.processes
        total = constant["ram_import_anon_bytes"].amount(times)
        if self.fmt.quantizer:
            total += constant[f"ram_{SCHEMES[self.fmt.quantizer].library}_bytes"].amount(times)
        if self.processes > 1:
            total += constant["ram_ranks_bytes"].amount(times)
        if self.spec.tokenizer:
            total += constant["ram_tokenizer_bytes_per_token"].amount(times * self.skeleton.vocab_size)
        return total + constant["ram_cuda_bytes"].amount(times) if self.on_gpu else total

    @cached_property
    def libraries(self) -> Bytes:
        """Mapped pages of libraries."""
        total = self.calibration["ram_import_file_bytes"].amount()
        return total + self.calibration["ram_cuda_file_bytes"].amount() if self.on_gpu else total

    @cached_property
    def unpacking(self) -> Bytes:
        """What unpacking a GGUF takes beside its weights: its vocabulary in Python, and copies of a tensor in float32.

        Tensors are unpacked in the order of the file, so a large one in front takes less than one at the end.
        """
        gguf = self.spec.gguf
        if gguf is None or self.fmt.packed_bits is not None:
            return Bytes()
        copies, width, total = self.calibration["gguf_unpack_copies"].amount(4.0), self.fmt.element_bytes, sum(gguf.elements)
        most = Bytes()
        done = 0
        for elements in gguf.elements:
            left = width * (total - done)
            ends = {end: max(getattr(most, end), getattr(copies, end) * elements - left) for end in ("low", "best", "high")}
            most, done = Bytes(**ends), done + elements
        return most + self.calibration["gguf_bytes_per_string"].amount(gguf.strings)

    def heap(self, in_ram: TensorTotals) -> Bytes:
        """Return what the heap keeps of the copies that quantizing on the processor makes and frees again.

        Little, since the loading code has each large copy mapped by itself (`planning.code`). Else what is kept of a tensor lies in
        the hole of a copy, which is then too short for the next, and the heap grows by all of them: in half of all processes.
        """
        total = self.calibration["heap_share_stack"].amount(in_ram.stacked)
        if self.fmt.quantizer is None or not in_ram.quantized or self.on_gpu:
            return total
        like = SCHEMES[self.fmt.quantizer].like
        total += self.calibration[f"heap_share_{like}"].amount(in_ram.kept_copies)
        large = self.calibration.constants.get(f"heap_share_large_{like}")
        return total + large.amount(in_ram.quantized - in_ram.kept_copies) if large else total


@lru_cache(maxsize=64)  # every placement of a model in a weight format has the same
def overhead_of(inventory: Inventory, calibration: Calibration, *, on_gpu: bool, processes: int) -> Overhead:
    """Return what the processes of a case take."""
    return Overhead(inventory, calibration, on_gpu=on_gpu, processes=processes)
