"""What training with DeepSpeed's ZeRO would take: its own estimates, in bytes for each GPU and for each node's RAM.

The arithmetic is that of DeepSpeed's `estimate_zero2_model_states_mem_needs` and `estimate_zero3_model_states_mem_needs`
(stage_1_and_2.py and stage3.py of the commit that FOLLOWS names): parameters, gradients and Adam's states in mixed precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from harness.architecture.skeleton import Skeleton
from harness.core.records import Machine, Record, Verdict

STAGES = ("zero2", "zero3")
FOLLOWS = "the code of DeepSpeed at commit edaa722"
NOT_COUNTED = "activations, buffers of communication, fragmentation, CUDA's context and the process itself"
# Where DeepSpeed's document (memory.rst) and its code say the same or not, by stage.
DOCUMENT: Mapping[str, str] = {
    "zero2": "Without offloading its document (memory.rst) says otherwise: 4 bytes a parameter on each GPU and 16 shared "
    "among all, where the code says 2 and 18.",
    "zero3": "Its document (memory.rst) says the same.",
}
BUFFER_FACTOR = 1.5  # DeepSpeed's additional_buffer_factor for what lies in RAM


class Trained(Record, frozen=True, kw_only=True):
    """What is trained on what: all parameters, those of the largest layer, GPUs of a node, nodes."""

    parameters: int
    largest_layer: int
    gpus: int = 1
    nodes: int = 1

    @property
    def all_gpus(self) -> int:
        return self.gpus * self.nodes


class States(Record, frozen=True, kw_only=True):
    """One way to lay out the model's states: where optimizer and parameters lie, and bytes on each GPU and in each node's RAM.

    `init`: parameters are partitioned while the model is made (zero.Init), so that it is never whole in one process.
    """

    stage: str
    optimizer: str
    parameters: str
    init: bool
    gpu_bytes: int
    cpu_bytes: int


class Room(Record, frozen=True, kw_only=True):
    """Bytes that may be used on each GPU (of the smallest: ZeRO shares evenly) and in the RAM of each node; None: unknown."""

    gpus: int
    gpu_bytes: int | None
    cpu_bytes: int | None

    def verdict(self, way: States) -> Verdict:
        """Say whether the states fit; UNKNOWN if that depends on a size that is unknown."""
        pairs = ((way.gpu_bytes, self.gpu_bytes), (way.cpu_bytes, self.cpu_bytes))
        if any(most is not None and needed > most for needed, most in pairs):
            return Verdict.TOO_BIG
        return Verdict.UNKNOWN if any(needed and most is None for needed, most in pairs) else Verdict.FITS


def room(machine: Machine) -> Room:
    """Return what a machine has; one of several nodes stands for all."""
    sizes = [gpu.capacity_bytes for gpu in machine.gpus]
    known = [size for size in sizes if size is not None]
    cpu = machine.tier("cpu")
    return Room(
        gpus=len(sizes),
        gpu_bytes=min(known) if known and len(known) == len(sizes) else None,
        cpu_bytes=cpu.capacity_bytes if cpu else None,
    )


def of_skeleton(skeleton: Skeleton, gpus: int = 1, nodes: int = 1) -> Trained:
    """Count a model as DeepSpeed counts it: tied storage once, a layer as the parameters that one module holds itself."""
    layers = (
        sum(weight.elements for weight in module.weights if weight.tensor.kind == "parameter" and weight.tied_to is None)
        for module in skeleton.root.walk()
    )
    return Trained(parameters=skeleton.parameters, largest_layer=max(layers, default=0), gpus=gpus, nodes=nodes)


def estimate_states(stage: str, trained: Trained) -> list[States]:
    """Return every way of a stage of STAGES, what needs least on the GPU first."""
    ways = _zero2(trained) if stage == "zero2" else _zero3(trained)
    return sorted(ways, key=lambda way: (way.gpu_bytes, way.cpu_bytes))


def _zero2(trained: Trained) -> Iterator[States]:
    count, gpus = trained.parameters, trained.all_gpus
    in_ram = count * max(4 * gpus, 16) * BUFFER_FACTOR
    yield States(stage="zero2", optimizer="cpu", parameters="gpu", init=False, gpu_bytes=2 * count, cpu_bytes=int(in_ram))
    on_gpu = 2 * count + 18 * count / gpus
    in_ram = 4 * count * trained.gpus * BUFFER_FACTOR
    yield States(stage="zero2", optimizer="gpu", parameters="gpu", init=False, gpu_bytes=int(on_gpu), cpu_bytes=int(in_ram))


def _zero3(trained: Trained) -> Iterator[States]:
    count, gpus, nodes = trained.parameters, trained.all_gpus, trained.nodes
    layer = 4 * trained.largest_layer
    whole = 4 * trained.gpus  # bytes a parameter while every process of a node makes the whole model
    for init in (True, False):
        ways = (
            ("cpu", "cpu", float(layer), count * (18 / nodes if init else max(whole, 18 / nodes))),
            ("cpu", "gpu", layer + 2 * count / gpus, count * (16 / nodes if init else max(whole, 16 / nodes))),
            ("gpu", "gpu", layer + 18 * count / gpus, layer * trained.gpus if init else count * whole),
        )
        for optimizer, parameters, on_gpu, in_ram in ways:
            yield States(
                stage="zero3",
                optimizer=optimizer,
                parameters=parameters,
                init=init,
                gpu_bytes=int(on_gpu),
                cpu_bytes=int(in_ram * BUFFER_FACTOR),
            )
