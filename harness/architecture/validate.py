"""Whether a checkpoint holds what its config asks for: every tensor by name, shape and dtype, from headers alone.

What transformers would end with, or would fill with random numbers after a warning, is an error here; what it leaves out or loads
without a word is at most a note. Names are followed through its renamings, conversions, prefixes and ties (`key_mapping`) and
through the layouts of quantized weights (`checkpoint.quantization`). Where they are not known, nothing is said: of skeletons from a
description or from tensors only equal names are compared, of quantizers without a row in LAYOUTS nothing is, of what is quantized
neither stacked experts nor converted tensors, of a file with its config within nothing where transformers reshapes what it reads.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from harness.architecture.key_mapping import Naming, Place, Shape
from harness.architecture.skeleton import Skeleton, Weight
from harness.architecture.stored.packed_check import (
    block_fault,
    lacking_part,
    of_other_form,
    scale_of,
    sides,
    uneven_part,
)
from harness.checkpoint.adapter import Adapter, LoraModule
from harness.checkpoint.formats.files import DOWNLOAD_AGAIN, OWN_CONFIG, quote
from harness.checkpoint.formats.safetensors_header import StoredTensor
from harness.checkpoint.quantization import Packed, bits_said, first_packed, tensors_tell, weights_in
from harness.checkpoint.reader import CONFIG, Checkpoint
from harness.checkpoint.shard_check import more, odd, shown
from harness.core.errors import CheckpointError
from harness.core.methods.config import settings_of
from harness.core.methods.layouts import Layout
from harness.core.records import Record
from harness.core.units import format_count

_MOST_MISSING = 0.02


class StoredWeight(Record, frozen=True):
    """What stands for one weight in the files: itself, or what it is packed into, by the parts of its layout."""

    name: str
    parts: dict[str, StoredTensor]
    packed: bool = False

    @property
    def tensor(self) -> StoredTensor:
        """The tensor to name in a sentence."""
        return next(iter(self.parts.values()))


def check(read: Checkpoint, found: Skeleton, packed: Packed | None = None) -> tuple[str, ...]:
    """Compare the files with the skeleton of their config; return what is odd but no hindrance, a sentence each.

    Raises:
        CheckpointError: the first tensor that is missing, or has not the shape or the kind of dtype that the config asks for.
    """
    comparison = _Comparison(read, found, packed)
    comparison.raise_first()
    return (*_odd(read), *comparison.surplus())


def notes(read: Checkpoint, found: Skeleton | None, packed: Packed | None = None) -> tuple[str, ...]:
    """Say all that `check` says, without an end at what is wrong; without a skeleton, what the files tell among themselves."""
    if found is None:
        return _odd(read)
    try:
        return check(read, found, packed)
    except CheckpointError as error:
        return (str(error).removeprefix(f"{read.path}/"), *_odd(read))


def _odd(read: Checkpoint) -> tuple[str, ...]:
    """Say what the files tell among themselves, and where the config is wrong about bits that the tensors' shapes decide."""
    tensor, bits = first_packed(read.tensors) if tensors_tell(read.config) else (None, 0)
    if tensor is None or bits == bits_said(read.config):
        return odd(read)
    said = read.config.get("wbits")
    says = "nothing of wbits" if said is None else f"wbits {quote(said)}"
    what = f"{CONFIG} says {says}, and {shown(tensor.name)} in {shown(tensor.file)} has {bits} bits"
    return (*odd(read), f"{what}: it is planned and loaded as what it has")


class _Comparison:
    """Where every stored tensor goes, and what is wrong with it there."""

    def __init__(self, read: Checkpoint, found: Skeleton, packed: Packed | None) -> None:
        self.read, self.found, self.packed = read, found, packed
        self.layout = packed.layout if packed else None
        self.silent = packed is not None and self.layout is None and not packed.plain
        self.naming = found.naming
        turned = (module for module in found.root.walk() if module.block.linear == "conv1d")
        self.turned = frozenset(weight.path for module in turned for weight in module.weights)
        self.names = frozenset(tensor.name for tensor in read.tensors)
        self.wanted = {} if self.silent else {w.path: w for w in found.weights if w.tensor.kind != "unsaved"}
        self.arrived: dict[str, list[StoredWeight]] = defaultdict(list)
        self.converted: dict[tuple[int, str], dict[int, list[StoredWeight]]] = defaultdict(lambda: defaultdict(list))
        self.lost: list[StoredWeight] = []
        for stored in _stored_weights(read, self.layout):
            self._assign(stored)

    def _assign(self, stored: StoredWeight) -> None:
        naming = self.naming or Naming()
        place = Place(stored.name) if stored.name in self.wanted else naming.place(stored.name, self.wanted)
        if place.name not in self.wanted:
            self.lost.append(stored)
        elif place.conversion is None:
            self.arrived[place.name].append(stored)
        else:
            self.converted[place.conversion, place.name][place.source].append(stored)

    def raise_first(self) -> None:
        """Raise CheckpointError for the first thing that is wrong, if anything is."""
        if self.silent:
            return
        self._raise_unpacked()
        self._raise_misplaced()
        linears = ((path, one.tensor, one.packed) for path, group in self.arrived.items() for one in group)
        if other := of_other_form(self.packed, self.read.config, self.found, linears):
            raise self._error(other[0][0].file, f"{other[0][1]}{more(other)}")
        wrong = [*self._misshapen(), *self._misconverted()]
        if wrong:
            stored, what = wrong[0]
            is_one_file = self.naming is not None and self.naming.names
            raise self._error(stored.tensor.file, f"{what}{more(wrong)}: {DOWNLOAD_AGAIN if is_one_file else OWN_CONFIG}")
        if self.naming is None:
            self._raise_short()
        else:
            self._raise_missing(self.naming)

    def surplus(self) -> Iterator[str]:
        """Say which weights transformers leaves out; masks, scales and what it expects to leave out are not worth a word."""
        if self.naming is None or self.silent or self.naming.names:
            return
        shapes = {tensor.name: tensor.shape for tensor in self.read.tensors}
        ignored = _any_of(self.naming.may_have)
        left = []
        for stored in self.lost:
            tensor = stored.tensor
            counts = weights_in(tensor, shapes, self.read.config)
            if counts and not stored.packed and not (ignored and ignored.search(stored.name)) and not self._belongs(stored.name):
                left.append(tensor)
        if left:
            what = f"{shown(left[0].name)} in {shown(left[0].file)}{more(left)}"
            yield f"{self.found.model_class} has no place for {what}: transformers leaves out what its config does not ask for"

    def _belongs(self, name: str) -> bool:
        """Say whether a name is a part of a packed weight: a bias that its layout adds, or a part that LAYOUTS leaves out."""
        base = name.rpartition(".")[0]
        return any(stored.packed and stored.name.startswith(f"{base}.") for stored in self.arrived.get(f"{base}.weight", ()))

    # ---- packed ----

    def _raise_unpacked(self) -> None:
        if self.packed is None or self.layout is None:
            return
        packed = [stored for stored in _stored_weights(self.read, self.layout) if stored.packed]
        if packed:
            self._raise_partless(packed)
        elif any(weight.quantizes for weight, _ in self.found.tally):
            what = f"says {self.packed.title}, and no tensor of the files is packed so ({self.layout.main})"
            raise self._error(CONFIG, f"{what}: {OWN_CONFIG}")

    def _raise_partless(self, packed: list[StoredWeight]) -> None:
        """Raise for a packed weight without scales, or that lacks a part which most others like it have."""
        assert self.packed is not None
        assert self.layout is not None
        for stored in packed:
            self._raise_other_type(stored)
            if lacked := lacking_part(self.packed, self.layout, stored.parts.keys()):
                raise self._partless(stored, lacked)
        lacks = uneven_part({stored.name: stored.parts.keys() for stored in packed}, settings_of(self.read.config) or {})
        if lacks is not None:
            stored = next(one for one in packed if one.name == lacks[0])
            raise self._partless(stored, lacks[1])

    def _partless(self, stored: StoredWeight, part: str) -> CheckpointError:
        name = f"{stored.name.removesuffix('.weight')}{part}"
        return self._error(stored.tensor.file, f"holds {shown(stored.tensor.name)} without its {shown(name)}: {DOWNLOAD_AGAIN}")

    def _raise_other_type(self, stored: StoredWeight) -> None:
        """Raise for a weight of bitsandbytes whose state is that of another type than the config's."""
        said = (settings_of(self.read.config) or {}).get("bnb_4bit_quant_type", "fp4")
        state = next((tensor for part, tensor in stored.parts.items() if ".quant_state." in part), None)
        kind = state.name.rpartition("__")[2] if state is not None else said
        if state is not None and kind != said:
            raise self._error(
                CONFIG, f"says {quote(said)}, and {shown(stored.tensor.name)} in {shown(state.file)} is {kind}: {OWN_CONFIG}"
            )

    def _raise_misplaced(self) -> None:
        """Raise for what is packed outside of Linear modules, such as the embedding in ChatGLM-6B's int4-qe files.

        Only those are replaced by modules that unpack; some are subclasses of torch's Linear (FalconLinear).
        """
        if self.packed is None or self.layout is None or self.layout.anywhere or self.naming is None:
            return
        for module in self.found.root.walk():
            kind = module.block.class_name
            if module.block.linear or "Linear" in kind:
                continue
            for weight in module.weights:
                stored = next((stored for stored in self.arrived.get(weight.path, ()) if stored.packed), None)
                if stored is not None and len(weight.tensor.shape) == 2:
                    main = stored.parts.get(self.layout.main, stored.tensor)
                    what = f"holds {shown(main.name)} packed, and only Linear modules are loaded so, not {kind}"
                    way = "take a checkpoint that packs those alone, or the 16-bit one with --precision int8 or int4"
                    raise self._error(main.file, f"{what}: {way}")

    def _packed_fault(self, stored: StoredWeight, shape: Shape) -> str | None:
        """Say what is wrong with the parts of a packed weight of this shape."""
        assert self.packed is not None
        assert self.layout is not None
        whole = self.packed.method is not None and self.packed.method.whole_blocks is not None
        if len(shape) != 2 or (self.packed.varies and not whole):
            return None
        bits, group = self.packed.bits, self.packed.group
        if self.packed.block is not None:
            return block_fault(stored.parts, shape, self.packed.block)
        if self.layout.groups and group not in (0, shape[1], *self.layout.groups) and not self.packed.own:
            known = ", ".join(map(str, self.layout.groups))
            return f"{shown(stored.tensor.name)} is packed in groups of {group} by the config, and kernels know {known}"
        if self.layout.whole and group and shape[1] % group:
            return f"{shown(stored.tensor.name)} is of {shape[1]} inputs, which groups of {group} do not divide"
        shapes = {part: tensor.shape for part, tensor in stored.parts.items()}
        wrong = self.layout.fault(shapes, shape, bits, group)
        if wrong is None:
            return None
        part, asked = wrong
        what = f"{shown(stored.parts[part].name)} is {sides(stored.parts[part].shape)}"
        for other in self.layout.bits:
            if other != bits and self.layout.fault(shapes, shape, other, group) is None:
                return f"{what}, which means {other} bits, and the config says {bits}"
        groups = stored.parts[".scales"].shape[:1] if ".scales" in stored.parts else ()
        for other in {-(-shape[1] // max(count, 1)) for count in groups} - {group}:
            if self.layout.fault(shapes, shape, bits, other) is None:
                return f"{what}, which means groups of {other}, and the config says {group or 'none'}"
        return f"{what}, the config asks for {sides(asked)}"

    # ---- shapes ----

    def _misshapen(self) -> Iterator[tuple[StoredWeight, str]]:
        for path, group in self.arrived.items():
            for stored in group:
                what = self._fault(stored, self.wanted[path])
                if what is not None:
                    yield stored, what

    def _fault(self, stored: StoredWeight, weight: Weight) -> str | None:
        shape, tensor = weight.tensor.shape, stored.tensor
        if stored.packed:
            return self._packed_fault(stored, shape[::-1] if stored.name in self.turned else shape)
        if tensor.shape != shape and not self._converts(stored, shape):
            return f"{shown(tensor.name)} is {sides(tensor.shape)}, the config asks for {sides(shape)}"
        if (
            (self.packed is None or self.packed.plain)
            and tensor.dtype.startswith("float8")
            and (scale := scale_of(tensor.name, self.names))
        ):
            what = f"{shown(tensor.name)} is {tensor.dtype} with {shown(scale)} beside it"
            return f"{what}, which transformers leaves out: the config says nothing of packed weights"
        numbers = weight.tensor.dtype is None or "float" in weight.tensor.dtype
        if numbers and tensor.dtype.startswith(("int", "uint", "bool")):
            return f"{shown(tensor.name)} is {tensor.dtype}, and the config says nothing of packed weights"
        return None

    def _converts(self, stored: StoredWeight, shape: Shape) -> bool:
        """Say whether a conversion that keeps the name, such as one that transposes, makes this shape of the tensor."""
        steps = self.naming.conversions if self.naming else ()
        return any(step.apply(stored.name) and not step.fault({0: [stored.tensor.shape]}, [shape]) for step in steps)

    def _misconverted(self) -> Iterator[tuple[StoredWeight, str]]:
        assert self.naming is not None or not self.converted
        for (number, name), sources in self.converted.items():
            everything = [stored for group in sources.values() for stored in group]
            if self.naming is None or any(stored.packed for stored in everything):
                continue
            step, made = self.naming.conversions[number], self.naming.others(Place(name, number))
            wanted = [self.wanted[path].tensor.shape for path in made if path in self.wanted]
            shapes = {source: [stored.tensor.shape for stored in group] for source, group in sources.items()}
            if step.fault(shapes, wanted):
                asked = " and ".join(sides(shape) for shape in wanted)
                count = f"{len(everything)} tensors" if len(everything) > 1 else "one tensor"
                first = everything[0]
                what = f"{shown(first.name)} and what belongs to it, {count}, do not make {shown(name)}, {asked} by the config"
                yield first, what

    # ---- missing ----

    def _raise_missing(self, naming: Naming) -> None:
        missing = list(self._missing(naming))
        if not missing:
            return
        if naming.names:
            own = {name: stored for stored, name in naming.names.items()}[missing[0]]
            what = f"does not hold {shown(own)}{more(missing)}, which its metadata asks for"
            raise self._error(self.read.files[0].name, f"{what}: {DOWNLOAD_AGAIN}")
        if not self.arrived and not self.converted:
            first = f"{shown(self.read.tensors[0].name)} in {shown(self.read.tensors[0].file)}" if self.read.tensors else "nothing"
            what = f"asks for {len(missing)} tensors of {self.found.model_class}, and the files hold none of them, but {first}"
            raise self._error(CONFIG, f"{what}: {OWN_CONFIG}")
        name = missing[0]
        if self._is_headless(missing):
            other = next((one.name for one in self.lost if one.name.startswith("score.")), None)
            kind = "as embedding models do" if other is None else f"and {shown(other)} instead, as models that judge texts do"
            what = f"holds all of {self.found.model_class} but its output head ({shown(name)}), {kind}"
            raise self._error(self.read.files[0].name, f"{what}: it continues no text, and AutoModel loads it")
        listed = self.read.listed.get(name)
        if listed is not None:
            what = f"does not hold {shown(name)}{more(missing)}, which the index says it does"
            raise self._error(listed, f"{what}: {DOWNLOAD_AGAIN}")
        packed = next((tensor for tensor in self.read.tensors if tensor.name.endswith(".qweight")), None)
        if packed is not None and self.packed is None:
            what = f"says nothing of packed weights, and {shown(packed.name)} in {shown(packed.file)} is one"
            raise self._error(CONFIG, f"{what}: {OWN_CONFIG}")
        if other := _of_shapes(self.lost, (self.wanted[path].tensor.shape for path in missing)):
            what = f"asks for {shown(name)}{more(missing)}, and the files hold as many by other names, as {shown(other)}"
            raise self._error(CONFIG, f"{what}: {OWN_CONFIG}")
        files = self.read.files
        where = f"none of the {len(files)} files" if len(files) > 1 else "no file"
        what = f"asks for {shown(name)}{more(missing)}, which {where} holds"
        raise self._error(CONFIG, f"{what}: complete the download, or {OWN_CONFIG}")

    def _is_headless(self, missing: list[str]) -> bool:
        """Say whether nothing is missing but the output embedding, which no index lists either."""
        heads = {weight.path for module in self.found.root.walk() if module.block.exempt for weight in module.weights}
        return heads.issuperset(missing) and not self.read.listed.keys() & set(missing)

    def _missing(self, naming: Naming) -> Iterator[str]:
        ignored = _any_of(naming.may_miss)
        here = set(self.arrived)
        for number, name in self.converted:
            here.update(naming.others(Place(name, number)))
        tied = defaultdict(list)
        for name, source in self.found.tied.items():
            tied[source].append(name)
        for path, weight in self.wanted.items():
            shared = path in self.found.tied or any(name in here for name in tied[path])
            stacked = self.packed is not None and len(weight.tensor.shape) > 2
            if path not in here and not shared and not stacked and not (ignored and ignored.search(path)):
                yield path

    def _raise_short(self) -> None:
        """Raise where names may differ, by sums: for what an index lists and no file has, and where hardly anything is there."""
        here = {tensor.name for tensor in self.read.tensors}
        absent = [name for name in self.read.listed if name not in here]
        if absent:
            what = f"does not hold {shown(absent[0])}{more(absent)}, which the index says it does"
            raise self._error(self.read.listed[absent[0]], f"{what}: {DOWNLOAD_AGAIN}")
        if self.packed is None and self.arrived and self.read.parameters < (1 - _MOST_MISSING) * self.found.parameters:
            stored, asked = format_count(self.read.parameters), format_count(self.found.parameters)
            raise self._error(CONFIG, f"describes {asked} parameters, and the files hold {stored}: {OWN_CONFIG}")

    def _error(self, file: str, what: str) -> CheckpointError:
        path = self.read.path
        return CheckpointError(path if path.endswith(f"/{file}") else f"{path}/{file}", what)


def _stored_weights(read: Checkpoint, layout: Layout | None) -> Iterator[StoredWeight]:
    """Gather the parts of packed weights; everything else is itself."""
    packed: dict[str, dict[str, StoredTensor]] = {}
    for tensor in read.tensors:
        base, part = layout.split(tensor.name, tensor.dtype) if layout else (None, "")
        if base is None:
            yield StoredWeight(tensor.name, {"": tensor})
        else:
            packed.setdefault(base, {})[part] = tensor
    for base, parts in packed.items():
        if layout is not None and layout.main in parts:
            yield StoredWeight(layout.whole_name(base), {layout.main: parts[layout.main], **parts}, packed=True)
        else:  # a scale, or what is called so, without a packed weight
            yield from (StoredWeight(tensor.name, {"": tensor}) for tensor in parts.values())


def _of_shapes(lost: Sequence[StoredWeight], shapes: Iterable[Shape]) -> str | None:
    """Name the first tensor without a place where there is one of each of these shapes: nothing was lost on the way."""
    return lost[0].name if lost and Counter(shapes) <= Counter(one.tensor.shape for one in lost) else None


def _any_of(patterns: Iterable[str]) -> re.Pattern[str] | None:
    return re.compile(joined) if (joined := "|".join(f"({pattern})" for pattern in patterns)) else None


def modules_of(adapter: Adapter, skeleton: Skeleton) -> dict[str, LoraModule]:
    """Return the modules of an adapter by their paths in its base.

    Raises:
        CheckpointError: the base lacks one, or has it in another size.
    """
    wanted = {weight.path: weight.tensor.shape for weight in skeleton.weights}
    naming, found = skeleton.naming or Naming(), {}
    for name, module in adapter.modules.items():
        path = naming.place(f"{name}.weight", wanted).name
        if sorted(wanted.get(path, ())) != sorted((module.inputs, module.outputs)):
            what = f"is an adapter for {quote(name)} of {module.outputs} x {module.inputs}, which {quote(adapter.base)} has not"
            raise CheckpointError(adapter.path, f"{what}: give the base that it was trained on, in the names of transformers 5")
        found[path.removesuffix(".weight")] = module
    return found
