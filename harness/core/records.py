"""The records of a run and their JSON: cases, estimates, plans, results.

Records carry names, not objects, so that an old result stays readable after a table changes. Quantities carry their unit
in the name (`_bytes`, `_s`, `_tok_s`, `_j`); bytes are ints.

History of the format of a result (`SCHEMA`):

1. 2026-11: first. Fields that came later have a default, which is what a line without them means.
"""

from __future__ import annotations

from enum import Enum
from functools import cached_property
from typing import Any

import msgspec

from harness.core.units import exact_size

SCHEMA = 1
USUAL_KV = "dynamic"  # the form of the KV cache that generate makes by itself


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Frozen, keyword-only, strict when decoded."""


class Outcome(str, Enum):
    """How a case ended."""

    OK = "ok"
    OOM = "oom"
    TIMEOUT = "timeout"
    CRASH = "crash"
    UNSUPPORTED = "unsupported"
    SKIPPED = "skipped"


class Verdict(str, Enum):
    """What the plan says of a case before it runs."""

    FITS = "fits"
    TIGHT = "tight"
    TOO_BIG = "too_big"
    INVALID = "invalid"
    UNAVAILABLE = "unavailable"
    UNKNOWN = "unknown"

    @property
    def is_good(self) -> bool:
        """Whether the case is expected to run, with room to spare or without."""
        return self in (Verdict.FITS, Verdict.TIGHT)


class Workload(Record, frozen=True, kw_only=True):
    """What every case is asked to do: `batch` prompts of `prompt_tokens`, `new_tokens` each, `repeats` warm rounds."""

    prompt_tokens: int = 64
    new_tokens: int = 16
    batch: int = 1
    repeats: int = 5
    images: int = 0  #: in a prompt, whose tokens are among its own; a run has none

    @property
    def asked(self) -> Workload:
        """The same without how often it was measured: what two results must share for their figures to compare."""
        return msgspec.structs.replace(self, repeats=1)

    @property
    def most_rounds(self) -> int:
        """How many warm rounds may run where others disturb those that were asked for."""
        return 3 * self.repeats

    @property
    def cached_tokens(self) -> int:
        """Tokens in the KV cache at the end; the last one is never fed back."""
        return self.prompt_tokens + self.new_tokens - 1


class Case(Record, frozen=True, kw_only=True, dict=True):
    """One way of loading one model, by names, and what memory it may use: `vram_bytes` on each GPU, `ram_bytes`; None is all."""

    model: str
    precision: str
    placement: str
    workload: Workload = Workload()
    vram_bytes: int | None = None
    ram_bytes: int | None = None
    kv: str = USUAL_KV  #: how the KV cache is kept (`kv_forms.KV_FORMS`)
    attention: str | None = None  #: the implementation that is asked for (`attention.ATTENTIONS`); None: transformers chooses

    @property
    def place(self) -> str:
        """The placement, what else is asked for and the limits: `direct`, `gpu+cpu@vram8GiB@ram16GiB`, `cpu@kv-fp8@eager`."""
        asked = [f"@kv-{self.kv}"] * (self.kv != USUAL_KV) + [f"@{self.attention}"] * (self.attention is not None)
        given = (("vram", self.vram_bytes), ("ram", self.ram_bytes))
        return "".join([self.placement, *asked, *(f"@{kind}{exact_size(size)}" for kind, size in given if size is not None)])

    @property
    def way(self) -> str:
        """`precision/placement`, with what else is asked for and the limits where there are any."""
        return f"{self.precision}/{self.place}"

    @cached_property
    def id(self) -> str:
        """`model/precision/placement`, with what else is asked for and the limits where there are any."""
        return f"{self.model}/{self.way}"


class Tier(Record, frozen=True, kw_only=True, dict=True):
    """One level of memory: a GPU, the RAM or the disk. Unknown figures are None."""

    name: str  #: "gpu:0", "cpu" or "disk"
    kind: str  #: "gpu", "cpu" or "disk"
    total_bytes: int | None = None
    free_bytes: int | None = None
    limit_bytes: int | None = None  #: what a container or the user allows
    bytes_per_s: float | None = None  #: how fast it is read by its own processor
    is_under_load: bool = False  #: whether that was measured while others worked, so that it is a lower bound
    link_bytes_per_s: float | None = None  #: how fast bytes of the RAM reach it
    model: str | None = None
    compute_capability: str | None = None
    shared: bool = False  #: a GPU without memory of its own: what lies in it lies in the RAM, and both are one budget
    context_bytes: int | None = None  #: what a CUDA context takes of a card, once it was measured

    @cached_property
    def capacity_bytes(self) -> int | None:
        """What a case may use: the least of what is free and what is allowed."""
        return min([size for size in (self.free_bytes, self.limit_bytes) if size is not None], default=self.total_bytes)


class Machine(Record, frozen=True, kw_only=True, dict=True):
    """The tiers of a machine, and what else describes it."""

    name: str
    tiers: tuple[Tier, ...]  #: fastest first
    cpu: str | None = None
    cores: int | None = None
    system: str | None = None
    driver: str | None = None
    mapping_bytes: int | None = None  #: the largest file that the system maps for torch and safetensors; None if no limit is known
    gpu_problem: str | None = None  #: why GPUs that are here are not among the tiers; None if all of them are
    avx512_bf16: bool | None = None  #: whether the processor multiplies bfloat16 in AVX-512; None if unknown
    assumed: tuple[str, ...] = ()  #: what was taken for granted of a machine that is only described

    @cached_property
    def gpus(self) -> tuple[Tier, ...]:
        return tuple(tier for tier in self.tiers if tier.kind == "gpu")

    @property
    def fuses_4bit(self) -> bool | None:
        """Whether bitsandbytes multiplies with 4-bit weights in RAM as they are; None: it depends on an unknown processor.

        Of its libraries only that for processors has the product, for AVX-512 with bfloat16 (bitsandbytes 0.50, cextension.py).
        """
        return False if self.gpus else self.avx512_bf16

    @property
    def gpus_differ(self) -> bool:
        """Whether there are GPUs of several models: then their order decides what is measured."""
        return len({gpu.model for gpu in self.gpus}) > 1

    @property
    def main_gpu(self) -> int:
        """The number of the GPU that what needs one alone goes to: the first, or of several models that with the most memory."""
        sizes = [gpu.total_bytes or 0 for gpu in self.gpus]
        return sizes.index(max(sizes)) if self.gpus_differ else 0

    @property
    def shares_ram(self) -> bool:
        """Whether a GPU has no memory but the machine's."""
        return any(gpu.shared for gpu in self.gpus)

    def tier(self, name: str) -> Tier | None:
        """Return the tier called `name`, such as "gpu:0", "cpu" or "disk"."""
        return self._by_name.get(name)

    @cached_property
    def _by_name(self) -> dict[str, Tier]:
        return {tier.name: tier for tier in self.tiers}


class Span(Record, frozen=True, kw_only=True):
    """An estimate with its interval."""

    low: float
    best: float
    high: float


class TierEstimate(Record, frozen=True, kw_only=True):
    """Bytes that a case is expected to use in one tier."""

    weights_bytes: int
    kv_bytes: int
    activation_bytes: int
    overhead_bytes: int
    allocated_bytes: int  #: what torch reports
    peak_bytes: int  #: what nvidia-smi shows; in the RAM, every resident page
    load_peak_bytes: int
    low_bytes: int  #: lower end of the interval of `peak_bytes`
    high_bytes: int  #: its upper end
    capacity_bytes: int | None
    anon_bytes: int = 0  #: the part of the peak that the kernel cannot drop
    load_anon_bytes: int = 0  #: the part of the load peak that the kernel cannot drop
    needed_bytes: int = 0  #: what the verdict compares with the capacity: anonymous bytes, and mapped weights read for every token
    needed_high_bytes: int = 0  #: the upper end of its interval
    needed_low_bytes: int = 0  #: the lower end; of older results 0


class Makeup(Record, frozen=True, kw_only=True):
    """How a figure is made up, in its unit: the whole, and by constant of the cost model the part that is proportional to it.

    A negative part is that of a speed or a share of one: the figure shrinks as the constant grows.
    """

    whole: float
    parts: dict[str, float] = {}


class Estimate(Record, frozen=True, kw_only=True):
    """What the planner expects of a case."""

    tiers: dict[str, TierEstimate]
    load_s: Span
    first_token_s: Span
    decode_tok_s: Span
    ready_s: dict[str, Span] = {}  #: load and first token, by where the files are: "disk", "page_cache" if it keeps them
    bound_by: str = ""  #: what a token waits for most, in words; empty in older results
    corrections: dict[str, float] = {}  #: factors that results of this machine gave to constants; of older results, to figures
    fixed_token_s: float = 0.0  #: of older results: the part of a token's seconds that was not corrected
    constants: str = ""  #: digest of the constants it was made by (`calibration.Calibration`); empty if unknown
    makeup: dict[str, Makeup] = {}  #: by figure (`evidence.FIGURES`), without corrections; empty of what is not measured


class Plan(Record, frozen=True, kw_only=True):
    """One case, decided: whether it can work here, and the code that loads it."""

    case: Case
    verdict: Verdict
    why: str | None = None
    code: str | None = None  #: Python that loads what `MODEL` names into `model` (`planning.code.script` prints it whole)
    device_map: str | dict[str, str | int] | None = None  #: what the code passes on
    max_memory: dict[str, int] | None = None  #: what the code passes on
    estimate: Estimate | None = None
    remote_code: list[str] = []  #: code of the model that a library would run
    trusted: bool = False  #: whether it may
    needs: list[str] = []  #: what pip is asked for, beside what comes with this package
    needs_checkpoint: str | None = None  #: the form that the weights would have to be stored in, where they are not
    partly: bool = False  #: whether the checkpoint says that only some Linear weights are held so
    linear_dtype: str | None = None  #: what Linear weights must be after loading, where that is not what the precision says
    expandable_segments: bool = False  #: whether torch's allocator has to use them on the GPUs
    kept_share: float | None = None  #: of quality, where more is known of it than the rule of thumb


class Phase(Record, frozen=True, kw_only=True):
    """One phase of a case on the timeline, with the exact peaks that kernel and torch kept for it.

    `name` is import, load, cold, warm or score. `ram_peak_bytes` is the kernel's high-water mark (`sampled` where none is kept);
    `vram` maps a tier's name to torch's peaks. `disk_read_bytes` came from the disk, mapped weights too; None if not counted.
    """

    name: str
    start_s: float
    end_s: float
    ram_peak_bytes: int | None = None
    ram_anon_bytes: int | None = None
    sampled: bool = False
    disk_read_bytes: int | None = None
    vram_peak_bytes: dict[str, int] = {}
    vram_reserved_bytes: dict[str, int] = {}


class Timeline(Record, frozen=True, kw_only=True):
    """Memory of the worker over time, as the parent sampled it; all columns have the length of `t_s`."""

    t_s: list[float] = []
    ram_bytes: list[int] = []
    ram_anon_bytes: list[int] = []
    vram_bytes: dict[str, list[int]] = {}


class GpuInterference(Record, frozen=True, kw_only=True):
    """What others did to one card during a window: share of its time, bytes they held, reasons it was throttled for, its clock."""

    others_share: float | None = None
    others_bytes: int | None = None
    throttles: tuple[str, ...] = ()
    sm_mhz: int | None = None
    sm_most_mhz: int | None = None


class Interference(Record, frozen=True, kw_only=True):
    """What others did while one request was answered (load, cold, each warm round, score), on the CPUs that the worker may use.

    Cores are seconds of CPU for each second; `own` is the worker's and the parent's part, `others_user` that of others in user
    mode, `stolen` what a hypervisor took, `withheld` what a quota on CPU time kept from us, which allows `allowed_cores` at once.
    What the system does not tell, and what there is not, is None. `why` says what was too much, empty if nothing.
    """

    phase: str
    start_s: float
    end_s: float
    cpus: int | None = None
    own_cores: float | None = None
    others_cores: float | None = None
    others_user_cores: float | None = None
    idle_cores: float | None = None
    stolen_cores: float | None = None
    withheld_cores: float | None = None
    allowed_cores: int | None = None
    swapped_bytes: int | None = None
    swap_used_bytes: int | None = None
    cpu_mhz: int | None = None
    cpu_throttles: int = 0
    gpus: dict[str, GpuInterference] = {}
    why: str = ""


class Answer(Record, frozen=True, kw_only=True):
    """One short question of the probe and what the model said; `wrong` says what was wrong with it where that takes a sentence."""

    question: str
    answer: str
    correct: bool
    wrong: str = ""


class Quality(Record, frozen=True, kw_only=True):
    """What the probe found. `reference` is the id of the case that the agreement is measured against.

    `probe` is the probe's version and, where a model was asked in a dialogue of its own, the name of that: "1", "1+moss-plugin".
    """

    probe: str
    verdict: str
    why: str
    reference: str | None = None
    answers: list[Answer] = []


class Loaded(Record, frozen=True, kw_only=True):
    """What was really loaded; if several processes share the model, their sums."""

    model_class: str
    dtype_bytes: dict[str, int]  #: bytes by dtype
    linear_dtype_bytes: dict[str, int]  #: those of Linear weights, by dtype or scheme ("nf4")
    tier_bytes: dict[str, int]  #: bytes by tier
    device_map: dict[str, str]  #: module, or rank, -> tier
    rank_bytes: list[int] = []  #: bytes of each process
    mapped_bytes: int | None = None  #: of those in RAM, pages of a file that every token reads; None if the system does not tell
    library_bytes: int | None = None  #: pages of libraries that are resident beside them
    threads: int | None = None  #: that torch computes with on the processor, in each process; None in older results


class Result(Record, frozen=True, kw_only=True):
    """What one case showed. One line of `results.jsonl`."""

    schema: int = SCHEMA
    id: str
    run: str
    at: str
    case: Case
    weights: str
    machine: Machine
    verdict: Verdict
    outcome: Outcome
    stage: str
    why: str | None = None
    metrics: dict[str, float] = {}
    samples: dict[str, list[float]] = {}
    noisy: dict[str, str] = {}
    interference: list[Interference] = []
    phases: list[Phase] = []
    timeline: Timeline | None = None
    estimate: Estimate | None = None
    loaded: Loaded | None = None
    device_map: dict[str, str] | None = None
    quality: Quality | None = None
    checks: dict[str, str] = {}
    code: str | None = None
    command: str | None = None
    environment: dict[str, str] = {}
    remote_code: list[str] = []  #: the model's own code that ran with it
    log_tail: str = ""
    fingerprint: str = ""  #: tells the files of the model from others, for `--resume`
    files_bytes: int | None = None  #: size of the files that hold its weights; None in older results
    allowed_s: dict[str, float] = {}  #: time limits of the case by option, for `--resume`
    failed: list[str] = []  #: tests that failed, for `--resume`


def encode_record(record: Record) -> bytes:
    """Write a record as one line of JSON, without the newline."""
    return msgspec.json.encode(record)


def to_builtins(record: Record) -> dict[str, Any]:
    """Turn a record into plain dicts, lists and strings."""
    return dict(msgspec.to_builtins(record))
