"""What is known of a model before it is loaded or even downloaded: its skeleton, how its files hold it, its context length.

Sources, best first: the headers of files that are here; the catalog that is shipped; headers read from the hub by ranged requests.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from harness.architecture import skeleton, skeleton_source, validate
from harness.architecture.ask_worker import UnknownType
from harness.architecture.key_mapping import Naming
from harness.architecture.skeleton import Skeleton
from harness.architecture.stored.names import as_held, packed_tables
from harness.architecture.stored.packed_check import with_blocks, with_experts
from harness.architecture.stored.storages import Storages, storages_of, weight_bytes
from harness.architecture.vision.image_trace import ImageTrace
from harness.catalog import shipped
from harness.checkpoint import auxiliary_files, quantization, reader
from harness.checkpoint.adapter import Adapter, read_adapter, under_adapter, without_base
from harness.checkpoint.auxiliary_files import RemoteCode
from harness.checkpoint.formats.files import Directory, quote
from harness.checkpoint.published import Stored, published
from harness.checkpoint.quantization import Packed
from harness.checkpoint.reader import CONFIG, Checkpoint, context_length, stated_dtype
from harness.core.dtypes import DTYPE_BYTES
from harness.core.errors import CheckpointError, UsageError
from harness.core.families import GGUF, is_native
from harness.core.methods.table import METHODS
from harness.core.placements import Placement
from harness.core.precisions import Precision
from harness.core.records import Record
from harness.core.units import format_size

if TYPE_CHECKING:
    from harness.catalog.resolve import Source

_NO_TOKENIZER = "there is no tokenizer beside the weights: prompts are token ids, and quality is not measured"


class Gguf(Record, frozen=True, kw_only=True):
    """What loading a GGUF file depends on."""

    file: str
    architecture: str
    elements: tuple[int, ...]  #: of each tensor in the order of the file, in which they are unpacked
    strings: int  #: entries of its vocabulary and merges
    packed_bits: float  #: mean width of the weights that are stored in blocks, 0 if none is
    unloadable: str | None = None  #: why transformers cannot load it

    @property
    def packs(self) -> bool:
        """Whether transformers can keep its blocks."""
        return self.architecture in GGUF.packed_architectures and self.packed_bits > 0

    @property
    def through_ram(self) -> bool:
        """Whether all tensors are unpacked in RAM before the first is placed."""
        return self.architecture not in GGUF.packed_architectures

    def refusal(self, precision: Precision, placement: Placement) -> str | None:
        """Say why transformers does not load it this way; None if it does."""
        if self.unloadable is not None:
            return self.unloadable
        refuses = METHODS[GGUF.name].refuses
        refused = next((refuses[trait] for trait in placement.traits if trait in refuses), None)
        if refused is not None:
            return refused
        if precision.quantizes:
            return "transformers quantizes no GGUF file anew: load it with --precision bf16, fp16 or fp32"
        if precision.requires_checkpoint == GGUF.title and not self.packs:
            if not self.packed_bits:
                return "no tensor of the file is in blocks: load it with --precision bf16, fp16 or fp32"
            known = ", ".join(sorted(GGUF.packed_architectures))
            return f"transformers keeps the blocks of {known} only and unpacks {self.architecture}: use bf16, fp16 or fp32"
        return None


class ModelSpec(Record, frozen=True, kw_only=True):
    """A model to be planned."""

    name: str
    source: str
    skeleton: Skeleton
    stored: dict[str, int]  #: bytes in the files by dtype
    checkpoint_bytes: int
    context_length: int | None = None
    file_format: str = "safetensors"
    storages: Storages = Storages()
    packed: Packed | None = None
    packed_tables: frozenset[str] = frozenset()  #: embedding and head, if they are packed as Linear weights of blocks are
    tensor_bytes: int | None = None  #: stored bytes of a checkpoint that is quantized already and whose headers were read
    as_held: bool = False  #: whether the files, whose headers were read, name every tensor as the model does: no stack is made
    repeated: frozenset[str] = frozenset()  #: paths of tied weights that the files store all the same
    largest_file: tuple[str, int] | None = None  #: what the largest file is called, and its bytes
    tokenizer: bool = True
    notes: tuple[str, ...] = ()  #: what is odd about the files, and what the plan rests on without a skeleton from transformers
    remote_code: tuple[RemoteCode, ...] = ()  #: the code that the files ask for
    has_class: bool = True  #: whether transformers has a class of its own for this architecture
    gguf: Gguf | None = None
    native: bool = False  #: whether `harness.models` has the architecture, and transformers has not
    unknown: str | None = None  #: why nothing here loads it
    config: Mapping[str, Any] = {}  #: config.json, empty if there is none; what records of traces are found by
    adapter: Adapter | None = None  #: what is loaded on top, its modules by their path in the skeleton
    image: ImageTrace | None = None  #: what an image takes, once prompts with images are planned

    def __hash__(self) -> int:
        """Hash what differs from model to model: what is counted of one is kept by it."""
        return hash((self.name, self.source, self.checkpoint_bytes, self.packed))

    @property
    def gguf_file(self) -> str | None:
        """The name of the GGUF file, which loaders need."""
        return self.gguf.file if self.gguf else None

    @property
    def stored_as(self) -> str | None:
        """How it is quantized already (`quantization.describe`); None if it is not."""
        return GGUF.name if self.gguf else self.packed.title if self.packed else None

    def keeps_packed(self, precision: Precision) -> bool:
        """Say whether a precision keeps what is stored packed as it is."""
        if self.gguf is not None:
            return precision.requires_checkpoint == GGUF.title
        return self.packed is not None and not self.packed.unpacks(precision)

    def adapted(self, precision: Precision) -> Precision:
        """Return the row of a precision as it holds of this checkpoint: kept packed or unpacked if it is quantized already."""
        row = self._kept(precision)
        return row if self.adapter is None else under_adapter(row)

    def _kept(self, precision: Precision) -> Precision:
        if self.gguf is not None:
            method, keeps = METHODS[GGUF.name], self.keeps_packed(precision)
            asked = precision.quantization if keeps or precision.quantizes else method.unpacked
            return replace(precision, quantization=asked, incompatible={**precision.incompatible, **method.refuses})
        return self.packed.adapted(precision) if self.packed is not None else precision

    @property
    def stored_dtype(self) -> str:
        """The dtype of most of the bytes in the files."""
        return max(self.stored, key=lambda dtype: self.stored[dtype], default="float16")

    @property
    def rough(self) -> bool:
        """Whether the skeleton was only guessed from tensors."""
        return self.skeleton.source == "tensors"


def read_spec(source: Source) -> ModelSpec:
    """Find out what can be known of a model without loading or downloading its weights.

    Raises:
        UsageError: it is neither here nor in the catalog, and the hub does not tell.
        CheckpointError: its files are damaged, or its config does not say enough, or it is an adapter of another model.
    """
    if source.base is not None:
        adapter = read_adapter(Path(source.location))
        try:
            return on_top(adapter, source, read_spec(source.base))
        except UsageError as error:
            raise without_base(source.location, adapter.base, error) from None
    if source.file == CONFIG:
        return _of_config(source)
    here = local(source)
    if here is not None:
        where = str(here) if source.kind == "directory" else source.location
        return of_checkpoint(source.name, where, reader.read(here / (source.file or "")), here)
    from harness.catalog.resolve import shipped_id

    known = shipped_id(source) if source.file is None else None
    if known is not None:
        return _of_catalog(source, known)
    if source.hub_id is None:
        raise UsageError(
            f"{source.name} is not on this machine yet: run pytest cases/ --model {source.name} once, or name a directory"
        )
    return of_checkpoint(source.name, source.location, reader.read_hub(source.hub_id, file=source.file), None)


def on_top(adapter: Adapter, source: Source, base: ModelSpec) -> ModelSpec:
    """Return the spec of a base with an adapter on top, whose modules transformers must have, each of its size.

    Raises:
        CheckpointError: it belongs to another model, or nothing loads it onto weights that are stored so.
    """
    method = base.packed.method if base.packed else None
    if base.gguf is not None or (base.packed is not None and (method is None or not method.kept_as_made)):
        way = "name the 16-bit model as base_model_name_or_path"
        raise CheckpointError(source.location, f"is an adapter on {base.stored_as} weights, and that is not measured here: {way}")
    placed = replace(adapter, modules=validate.modules_of(adapter, base.skeleton))
    said = f"{adapter}: {format_size(adapter.bytes)} on top of {quote(adapter.base)}, loaded by peft"
    return replace(
        base,
        name=source.name,
        adapter=placed,
        checkpoint_bytes=base.checkpoint_bytes + adapter.bytes,
        notes=(said, *base.notes),
    )


def of_checkpoint(name: str, where: str, read: Checkpoint, directory: Path | None) -> ModelSpec:
    """Read the spec of a checkpoint whose headers were read; the files beside them in `directory` are checked as well.

    Raises:
        CheckpointError: the files do not belong together, must not reach a library, or are a kind that our architecture lacks.
    """
    if directory is not None:
        auxiliary_files.check_files(Directory(directory))
    is_gguf = read.files[0].format == GGUF.name
    found, note, refused = skeleton_source.stored_skeleton(read, is_gguf=is_gguf)
    if refused is not None and is_native(read.config):  # no other code loads it, nor does the one that it may come with
        raise CheckpointError(f"{read.path}/{CONFIG}", str(refused))
    found, untied = _untied(found, read)
    gguf = _gguf(read, str(refused) if refused else None) if is_gguf else None
    packed = quantization.packed(read.config, read.tensors) if gguf is None else None
    notes = validate.check(read, found, packed)
    if packed is not None and packed.layout is not None:
        layout = packed.layout
        mains = [one for one in read.tensors if layout.packed(one.name, one.dtype)]
        packed = with_blocks(packed, ((one.name, one.shape) for one in mains))
        packed = with_experts(packed, found, (layout.whole_name(one.name.removesuffix(layout.main)) for one in mains))
    tokenizer = directory is None or "tokenizer.ggml.model" in read.config or auxiliary_files.has_tokenizer(Directory(directory))
    code = any(one.kind == "model" for one in read.remote_code)
    names = {tensor.name for tensor in read.tensors}
    return ModelSpec(
        name=name,
        source=where,
        skeleton=found,
        stored=read.dtype_bytes,
        checkpoint_bytes=read.bytes,
        context_length=read.context_length,
        file_format=read.files[0].format if read.files else "safetensors",
        storages=storages_of(read.tensors, found),
        packed=packed,
        tensor_bytes=weight_bytes(read.tensors, found) if packed else None,
        as_held=as_held(found, names),
        packed_tables=packed_tables(found, packed, names),
        repeated=frozenset(name for name, source in found.tied.items() if {name, source} <= names),
        largest_file=max(((quote(file.name), file.bytes) for file in read.files), key=lambda file: file[1], default=None),
        tokenizer=tokenizer,
        notes=tuple(filter(None, (note, *notes, untied, None if tokenizer else _NO_TOKENIZER))),
        remote_code=read.remote_code,
        has_class=_has_class(read.config, found),
        gguf=gguf,
        native=is_native(read.config),
        unknown=str(refused) if isinstance(refused, UnknownType) and not code else None,
        config=read.config or {},
    )


def _untied(found: Skeleton, read: Checkpoint) -> tuple[Skeleton, str | None]:
    """Return the skeleton without the tie of a head that the files hold with other values, and a sentence that says so."""
    if read.other_head is None or not found.tied:
        return found, None
    wanted = {weight.path: weight for weight in found.weights}
    head = read.other_head if read.other_head in wanted else (found.naming or Naming()).place(read.other_head, wanted).name
    if head not in found.tied:
        return found, None
    rest = {name: source for name, source in found.tied.items() if name != head}
    what = f"{CONFIG} ties {head} to {found.tied[head]}, and the files hold another: transformers loads both"
    return replace(found, tied=rest), what


def _gguf(read: Checkpoint, why: str | None) -> Gguf:
    """Gather what loading depends on; `why` is what transformers said against its metadata."""
    from harness.checkpoint.formats.gguf_header import BLOCK_TYPES

    blocks = [tensor for tensor in read.tensors if tensor.dtype in BLOCK_TYPES]
    weights = sum(math.prod(tensor.shape) for tensor in blocks)
    arrays = (value for value in read.config.values() if isinstance(value, dict))
    if len(read.files) > 1 and why is None:  # what no library maps is not read once it is joined either
        why = f"it is split into {len(read.files)} files, and transformers loads one: join them with llama-gguf-split --merge"
    return Gguf(
        file=read.files[0].name,
        architecture=read.architecture or "unknown",
        elements=tuple(math.prod(tensor.shape) for tensor in read.tensors),
        strings=sum(int(value["count"]) for value in arrays if value["type"] == "string"),
        packed_bits=8 * sum(tensor.bytes for tensor in blocks) / weights if weights else 0.0,
        unloadable=why,
    )


def _has_class(config: Mapping[str, Any], found: Skeleton) -> bool:
    """Say whether the skeleton was built with a class that is registered for the config's own name, and so loads the model too.

    Its name may add to it: "gemma3_text", "chatglm2". One of another class with the same shapes only the model's own code loads.
    """
    kind = config.get("model_type")
    return found.source.startswith("transformers") and bool(kind) and found.model_type.startswith(str(kind))


def local(source: Source) -> Path | None:
    """Return where the files are, if they are on this machine; huggingface_hub is not imported for a model its cache lacks."""
    from harness.catalog import download

    if source.hub_id is not None and not any(_hub_folder(source.hub_id).glob("snapshots/*/config.json")):
        return None
    return download.cached(source)


def _hub_folder(hub_id: str) -> Path:
    """Return the folder that huggingface_hub would keep a model in (its HF_HUB_CACHE, HF_HOME and XDG_CACHE_HOME)."""
    home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return Path(cache).expanduser() / f"models--{hub_id.replace('/', '--')}"


def _of_catalog(source: Source, known: str) -> ModelSpec:
    entry = shipped.catalog()[known]
    spec = _of_shape(source.name, known, entry.config, skeleton_source.named(known), published(known))
    return replace(spec, notes=entry.doubts)


def _of_config(source: Source) -> ModelSpec:
    """Read the spec of a model of which there is its config alone: with weights in the dtype and the form that it states."""
    config = reader.read_config(Directory(Path(source.location)))
    return _of_shape(source.name, source.location, config, skeleton_source.of_config(config, source.location), None)


def _of_shape(name: str, where: str, config: Mapping[str, Any], shape: Skeleton, stored: Stored | None) -> ModelSpec:
    """Return what a config and a skeleton say of a model whose files are not here; `stored` is what is known of those."""
    dtype, packed = stated_dtype(config), quantization.packed(config)
    if packed is not None:
        taken = (weight for weight, _ in shape.tally if weight.quantizes or skeleton.is_stacked(weight))
        packed = with_experts(with_blocks(packed, ((weight.path, weight.tensor.shape) for weight in taken)), shape)
    size = skeleton.packed_model_bytes(shape, packed) if packed else shape.parameters * DTYPE_BYTES.get(dtype, 2)
    return ModelSpec(
        name=name,
        source=where,
        skeleton=shape,
        stored={_stored_dtype(dtype, stored, packed): size},
        checkpoint_bytes=stored.bytes if stored else size,
        context_length=context_length(config),
        file_format=stored.format if stored else "safetensors",
        packed=packed,
        repeated=frozenset(shape.tied if stored and stored.repeats_head else ()),
        largest_file=stored.largest_file if stored else None,
        native=is_native(config),
        config=config,
    )


def _stored_dtype(said: str, stored: Stored | None, packed: Packed | None) -> str:
    if packed is not None and packed.method is not None and not packed.method.packs_linears:
        return packed.method.held
    return stored.dtype if stored is not None and stored.dtype else said
