"""Load, look at and generate with one model, the way a user would."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any

import accelerate.big_modeling
import torch
import transformers.modeling_utils
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.pytorch_utils import Conv1D

from harness.core.records import Loaded
from harness.machine import nvml
from harness.measure import file_pages, quality
from harness.measure.beacon import Pulse
from harness.measure.protocol import Generate, Load
from harness.worker import accelerators

PhaseContext = Callable[[str], AbstractContextManager[None]]


class ModelFault(Exception):
    """The files of a model contradict each other in a way that shows only when it is used; the message is for users."""


class Model:
    """A loaded model, its tokenizer (None: prompts are token ids), what `generate` takes for its KV cache, and where inputs go.

    `ending` are the tokens that a prompt must end with for the model to answer; architectures of `harness.models` have some.
    """

    def __init__(self, module: PreTrainedModel, tokenizer: Any, cache: Mapping[str, Any] = MappingProxyType({})) -> None:
        self.module, self.tokenizer, self.cache = module, tokenizer, cache
        self.vocabulary = _vocabulary(module)
        self.ending: list[int] = list(getattr(module, "prompt_ending", ()))
        self.device_map = {name: str(place) for name, place in getattr(module, "hf_device_map", {}).items()}
        self.device = self._input_device()
        self._prompt: list[int] | None = None
        self.pulse: Pulse | None = None  #: where the tokens are told that it makes

    def _input_device(self) -> torch.device:
        """Return the first GPU of the device map, else the CPU: accelerate's hooks take inputs from there."""
        places = [place for place in getattr(self.module, "hf_device_map", {}).values() if place not in ("cpu", "disk")]
        if places:
            first = min(places, key=str)
            return torch.device("cuda", first) if isinstance(first, int) else torch.device(first)
        device = next(self.module.parameters()).device
        return torch.device("cpu") if device.type == "meta" else device

    def prompt(self, length: int) -> list[int]:
        """Return `length` token ids: real text where there is a tokenizer, else any ids of the vocabulary; then the ending."""
        if self._prompt is None:
            self._prompt = self.encode(quality.prompt_text()) if self.tokenizer is not None else self._any_tokens()
        body = max(length - len(self.ending), 0)
        times = -(-body // len(self._prompt))
        return [*(self._prompt * times)[:body], *self.ending][:length]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without the ending that the tokenizer may add. Raises ModelFault."""
        return self.known(list(self.tokenizer(text, add_special_tokens=not self.ending)["input_ids"]))

    def known(self, ids: list[int]) -> list[int]:
        """Return the ids, all of which the embedding must have.

        Raises:
            ModelFault: the tokenizer is another model's.
        """
        largest = max(ids, default=0)
        if largest >= self.vocabulary:
            way = "take the tokenizer that belongs to the weights, or take it away to measure without quality"
            raise ModelFault(f"the tokenizer makes token {largest} of a text, and the model knows {self.vocabulary} tokens: {way}")
        return ids

    def _any_tokens(self) -> list[int]:
        tokens = ((index * 7919 + 11) % self.vocabulary for index in range(4096))
        return [token for token in tokens if token not in self.ending]


def _vocabulary(module: PreTrainedModel) -> int:
    """Return how many tokens the embedding has, which may be more than the config says; of what hides its embedding, the config."""
    embedding = module.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None)
    return int(rows or module.config.get_text_config().vocab_size)


def synchronize() -> None:
    """Wait for the GPUs that hold anything, and for the other ranks: a clock read before that measures nothing.

    GPUs that hold nothing would be given a context.
    """
    if torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            if torch.cuda.memory_reserved(index):
                torch.cuda.synchronize(index)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def cap_vram(vram_bytes: int, gpus: Sequence[int], context_bytes: int) -> None:
    """Keep the process within `vram_bytes` on these GPUs, as nvidia-smi shows it: cap torch's allocator at what its context leaves.

    The context is what the card has less after torch has begun on it; if NVML does not report it, `context_bytes`. Kernels that
    CUDA loads later come on top; the parent's guard ends the process when NVML shows more than the limit.

    Raises:
        RuntimeError: torch sees no GPU of such a number.
    """
    count = torch.cuda.device_count()
    if gpus and max(gpus) >= count:
        raise RuntimeError(f"no CUDA-capable device gpu:{max(gpus)}, which --vram limits: torch sees {count}")
    with nvml.lent() as library:
        cards = nvml.visible_gpus(library)
        for index in gpus:
            measured = accelerators.begin(library, cards, index)
            context = context_bytes if measured is None else measured
            total = torch.cuda.get_device_properties(index).total_memory
            torch.cuda.set_per_process_memory_fraction(min(max(vram_bytes - context, 0) / total, 1.0), index)


def load(request: Load, phase: PhaseContext) -> tuple[Model, dict[str, float]]:
    """Import, load the tokenizer, and run the loading code; return the model and the seconds of each."""
    seconds: dict[str, float] = {}
    if request.imports:
        with phase("import"), _timed(seconds, "import_s"):
            for name in request.imports:
                importlib.import_module(name)
    tokenizer = None
    if request.tokenizer:
        with phase("tokenizer"), _timed(seconds, "tokenizer_s"):
            given = {"gguf_file": request.gguf_file} if request.gguf_file else {}
            tokenizer = AutoTokenizer.from_pretrained(request.model, trust_remote_code=request.trust_remote_code, **given)
    names: dict[str, Any] = {"MODEL": request.model, "ADAPTER": request.adapter}
    with phase("load"), _parts_timed(seconds), _timed(seconds, "load_s"):
        exec(compile(request.code, "<loading code>", "exec"), names)  # of harness.planning.code: what is printed
    module = names["model"].eval()
    _forget_generation(module)
    return Model(module, tokenizer, request.cache), seconds


def _forget_generation(module: PreTrainedModel) -> None:
    """Keep of the model's own generation_config what ends a text, and nothing else, as the printed code does (`code.greedy`).

    Beams, several answers, sampling, look-up of the prompt, a time limit, another cache: each would measure something else.
    """
    own = module.generation_config
    if own is not None:
        module.generation_config = GenerationConfig(
            bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
        )


@contextlib.contextmanager
def _timed(seconds: dict[str, float], key: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    synchronize()
    seconds[key] = time.perf_counter() - start


@contextlib.contextmanager
def _parts_timed(seconds: dict[str, float]) -> Iterator[None]:
    """Time the libraries' own steps inside the loading code: reading weights, and placing modules with hooks."""
    clock = _StepClock(seconds)
    with (
        clock.timing(transformers.modeling_utils.PreTrainedModel, "_load_pretrained_model", "weights_s"),
        clock.timing(transformers.modeling_utils, "accelerate_dispatch", "dispatch_s"),
        clock.timing(accelerate.big_modeling, "load_checkpoint_in_model", "weights_s"),
        clock.timing(accelerate.big_modeling, "dispatch_model", "dispatch_s"),
        clock.timing(torch.nn.Module, "to", "dispatch_s"),
    ):
        yield


class _StepClock:
    """Adds up the seconds of steps. A step inside another is part of that one, so that all together take no longer than loading."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds, self._is_inside = seconds, False

    @contextlib.contextmanager
    def timing(self, owner: Any, name: str, key: str) -> Iterator[None]:
        """Time the calls of `owner.name` meanwhile; a version of the library without it has no such figure."""
        original = owner.__dict__.get(name)
        if original is None:
            yield
            return
        function = original.__func__ if isinstance(original, (classmethod, staticmethod)) else original
        timed = self._timed(function, key)
        setattr(owner, name, type(original)(timed) if isinstance(original, (classmethod, staticmethod)) else timed)
        try:
            yield
        finally:
            setattr(owner, name, original)

    def _timed(self, function: Callable[..., Any], key: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._is_inside:
                return function(*args, **kwargs)
            self._is_inside, start = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._is_inside = False
                self._seconds[key] = self._seconds.get(key, 0.0) + time.perf_counter() - start

        return timed


def loaded_facts(model: Model) -> Loaded:
    """Count what really was loaded: bytes of the tensors by dtype and by tier, and of the Linear weights by dtype or scheme."""
    by_dtype: dict[str, int] = defaultdict(int)
    by_tier: dict[str, int] = defaultdict(int)
    mapped, files, looked_up = 0, file_pages.own_mappings(), _looked_up(model.module)
    for name, whole in _weights(model.module):
        for part in plain(whole):
            size = part.numel() * part.element_size()
            by_dtype[_dtype(part)] += size
            by_tier[_tier(name, part, model.device_map)] += size
            if files and part.device.type == "cpu" and part.data_ptr() != looked_up:
                mapped += size if file_pages.lies_in_file(part.data_ptr(), files) else 0
    return Loaded(
        model_class=type(model.module).__name__,
        dtype_bytes=dict(by_dtype),
        linear_dtype_bytes=_linear_bytes(model.module),
        tier_bytes=dict(by_tier),
        device_map=model.device_map or {"": _tier_of_device(model.device)},
        mapped_bytes=None if files is None else mapped,
        library_bytes=None if files is None else file_pages.library_bytes(files),
        threads=torch.get_num_threads(),
    )


# GPTQ's and AWQ's, everybody's, AQLM's, compressed-tensors'.
_MAIN = ("qweight", "weight", "codes", "weight_packed")


def _looked_up(module: PreTrainedModel) -> int | None:
    """Return the address of the embedding, of which a token reads a row; None if the head multiplies with all of it."""
    embedding = getattr(module.get_input_embeddings(), "weight", None)
    head = getattr(module.get_output_embeddings(), "weight", None)
    return embedding.data_ptr() if isinstance(embedding, torch.Tensor) and embedding is not head else None


def _weights(module: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all parameters, and of modules that pack their weights the buffers too: that is where GPTQ's and BitNet's are."""
    yield from module.named_parameters()
    for path, part in module.named_modules():
        own = dict(part.named_buffers(recurse=False))
        if own.keys() & set(_MAIN):
            yield from ((f"{path}.{name}", buffer) for name, buffer in part.named_buffers(recurse=False))


def plain(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Take a subclass of torch.Tensor apart: torchao and quanto hold values, scales and zero points, a rank its part."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        if isinstance(part := getattr(tensor, name), torch.Tensor):  # DTensor lists its mesh as well
            yield from plain(part)


def _linear_bytes(module: PreTrainedModel) -> dict[str, int]:
    """Sum the weights of the Linear modules by dtype, without the output embedding, which quantizers leave alone.

    Scales are no weights. What replaces a Linear may be none of torch's, and is known by what it multiplies. What an architecture
    derives from Linear, such as a router, says nothing of a quantizer that goes by the class and leaves it.
    """
    by_dtype: dict[str, int] = defaultdict(int)
    head, quantized = module.get_output_embeddings(), bool(getattr(module, "is_quantized", False))
    for path, part in module.named_modules():
        if ".lora_" in path or hasattr(part, "base_layer"):  # of an adapter, which no precision is about
            continue
        if (isinstance(part, (torch.nn.Linear, Conv1D)) or hasattr(part, "in_features")) and part is not head:
            weight = _main_tensor(part)
            if weight is None:
                continue
            values = max(plain(weight), key=lambda tensor: tensor.nbytes)
            if quantized and type(weight) is torch.nn.Parameter and _is_derived(part) and values.dtype is module.dtype:
                continue
            by_dtype[_scheme(weight) or _dtype(values)] += values.numel() * values.element_size()
    return dict(by_dtype)


def _main_tensor(part: torch.nn.Module) -> torch.Tensor | None:
    """Return what a module multiplies by, a parameter or a buffer, under the names that packages give it; None if it has none."""
    own = (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False))
    found = {name: tensor for name, tensor in own if name in _MAIN}
    return next((found[name] for name in _MAIN if name in found), None)


def _is_derived(part: torch.nn.Module) -> bool:
    """Say whether a class of the architecture's or of torch's own is derived from Linear (torch's attention has one)."""
    kind, linear = type(part), torch.nn.Linear
    return kind is not linear and issubclass(kind, linear) and kind.__module__.startswith(("transformers.models.", "torch.nn."))


def _scheme(weight: torch.Tensor) -> str | None:
    """Name the scheme of a weight where its dtype would not tell: what bitsandbytes, quanto and torchao say of it."""
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return f"{state.quant_type} nested" if state.nested else str(state.quant_type)
    quanto = getattr(weight, "qtype", None)
    if quanto is not None:
        return str(quanto.name)
    if getattr(weight, "act_quant_kwargs", None) is not None:
        return "int8 dynamic"
    return "int4" if type(weight).__name__.startswith("Int4") else None


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _tier_of_device(device: torch.device) -> str:
    return f"gpu:{device.index or 0}" if device.type == "cuda" else device.type


def _tier(name: str, parameter: torch.Tensor, device_map: dict[str, str]) -> str:
    """Name the tier of a parameter; accelerate leaves what it offloads on the meta device, and the device map tells."""
    if parameter.device.type != "meta":
        return _tier_of_device(parameter.device)
    prefixes = [prefix for prefix in device_map if not prefix or name == prefix or name.startswith(prefix + ".")]
    place = device_map[max(prefixes, key=len)] if prefixes else "meta"
    return f"gpu:{place}" if place.isdecimal() else place


class Clock(BaseStreamer):
    """Note when each token is there: generate hands every token over on the CPU, so the device has finished it."""

    def __init__(self, pulse: Pulse | None = None) -> None:
        self.times: list[float] = []
        self._prompt_seen, self._pulse = False, pulse

    def put(self, value: torch.Tensor) -> None:  # noqa: ARG002 the streamer's interface
        if self._prompt_seen:
            self.times.append(time.perf_counter())
            if self._pulse is not None:
                self._pulse.token()
        self._prompt_seen = True

    def end(self) -> None:
        if self._pulse is not None:
            self._pulse.finish()


def generate(model: Model, request: Generate) -> dict[str, Any]:
    """Generate as often as asked for, and time it as one round; return the fields of GenerateDone."""
    first, *more = (_generate_once(model, request) for _ in range(request.times))
    total_s = first["total_s"] + sum(each["total_s"] for each in more)
    return {**first, "total_s": total_s, "more_token_s": [each["token_s"] for each in more]}


def _generate_once(model: Model, request: Generate) -> dict[str, Any]:
    """Generate exactly `new_tokens` greedy tokens from `batch` equal prompts."""
    ids = torch.tensor([model.prompt(request.prompt_tokens)] * request.batch, device=model.device)
    clock = Clock(model.pulse)
    if model.pulse is not None:
        model.pulse.prompt(request.prompt_tokens, request.batch)
    synchronize()
    start = time.perf_counter()
    output = model.module.generate(  # type: ignore[operator]  # transformers' stubs take the mixin's method for a tensor
        ids,
        attention_mask=torch.ones_like(ids),
        streamer=clock,
        do_sample=False,
        num_beams=1,
        min_new_tokens=request.new_tokens,
        max_new_tokens=request.new_tokens,
        pad_token_id=pad_id(model),
        **model.cache,
    )
    synchronize()
    total = time.perf_counter() - start
    new = output[0, ids.shape[1] :].tolist()
    return {
        "token_s": [moment - start for moment in clock.times],
        "total_s": total,
        "prompt_tokens": ids.shape[1],
        "new_tokens": len(new),
        "batch": output.shape[0],
        "text": model.tokenizer.decode(new, skip_special_tokens=True) if model.tokenizer is not None else "",
    }


def pad_id(model: Model) -> int:
    """Return a token to pad with that the model has: the tokenizer's, else one that ends a text, else 0."""
    end = model.module.generation_config.eos_token_id
    ends = end if isinstance(end, list) else [end]
    own = [model.tokenizer.pad_token_id] if model.tokenizer is not None else []
    return next((token for token in (*own, *ends) if isinstance(token, int) and 0 <= token < model.vocabulary), 0)
