"""The models of a run: where each comes from, where its files are, and what they hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

from harness.architecture import model_spec
from harness.architecture import synthetic as synth
from harness.architecture.model_spec import ModelSpec
from harness.catalog import download, fingerprint, resolve
from harness.catalog.resolve import Source
from harness.checkpoint import reader
from harness.checkpoint.adapter import read_adapter
from harness.checkpoint.reader import Checkpoint
from harness.core.errors import CheckpointError, HarnessError, UsageError
from harness.core.methods.packages import lacking
from harness.core.precisions import PRECISIONS
from harness.core.progress import Report, show_progress


class ModelSet:
    """Models by name. What is not `fetched` yet has a source and nothing else; of `faults` a sentence each says why it cannot be.

    `synthetic` writes weights of the true shape instead of downloading any; `trust` lets code that comes with a model run.
    A synthetic model is written once more for each precision that reads another form (`files_of`), and has a name of its own so.
    """

    def __init__(self, models: Sequence[str], *, synthetic: bool, trust: bool) -> None:
        self.sources = _resolved(models, real=not synthetic)
        self.faults: dict[str, str] = {}
        self._synthetic, self._trust = synthetic, trust
        self._locations: dict[str, Path] = {}
        self._checkpoints: dict[str, Checkpoint] = {}
        self._specs: dict[str, ModelSpec] = {}
        self._fingerprints: dict[str, str] = {}
        self._forms: dict[str, tuple[str, str]] = {}

    def files_of(self, model: str, precision: str) -> str:
        """Return what the files of a case go by: the model's name, or one for files that are written in the form of the precision.

        A form whose packages are missing here is not written.
        """
        row = PRECISIONS[precision]
        if not self._synthetic or row.requires_checkpoint is None:
            return model
        name = f"{model} as {precision}"
        if name not in self._forms:
            try:
                form = synth.form_of(self.sources[model], row)
            except HarnessError:  # which fetching the model itself says
                return model
            if form is None or form.method is None or lacking(form.method.needs):
                return model
            self._forms[name] = model, precision
        return name

    def fault(self, model: str, precision: str) -> str | None:
        """Say why the files of a case cannot be had or contradict themselves; None if they do not."""
        return self.faults.get(self.files_of(model, precision))

    def form_of(self, name: str) -> str | None:
        """Return the form that files are written in for a precision that reads it alone; None for those of the model itself."""
        return PRECISIONS[self._forms[name][1]].requires_checkpoint if name in self._forms else None

    def fetch(self, names: Collection[str], check: Callable[[str], object]) -> None:
        """Bring the files of these models here, read their headers, and `check` each.

        A model that cannot be had, or that contradicts itself, is among `faults` from then on, and holds up none of the others.

        Raises:
            UsageError, CheckpointError: that of the last, if no model is left.
        """
        with show_progress() as progress:
            self._take(names, (partial(self._bring, progress=progress),))
        self._take(names, (self._read, check))

    def _take(self, names: Collection[str], steps: Sequence[Callable[[str], object]]) -> None:
        """Take each model through the steps; raise what went wrong only if nothing is left."""
        for name in names:
            try:
                for step in steps if name not in self.faults else ():
                    step(name)
            except HarnessError as error:
                self.faults[name] = str(error)
                if self.faults.keys() >= set(names):
                    raise

    def _bring(self, name: str, progress: Report) -> None:
        model, form = self._forms.get(name, (name, None))
        source = self.sources[model]
        if self._synthetic and source.base is not None:
            raise UsageError(f"--weights synthetic writes none for the adapter {source.name}: take it away, or name the base alone")
        self._locations[name] = (
            synth.fetch_synthetic(source, progress, form)
            if self._synthetic
            else download.fetch(source, progress=progress, trust_remote_code=self._trust)
        )

    def _read(self, name: str) -> None:
        location, source = self._locations[name], self._source(name)
        self._checkpoints[name] = read = reader.read(location / (source.of_base.file or ""))
        adapter = Path(source.location) if source.base else None
        self._fingerprints[name] = fingerprint.of_model(location, read, trusted=self._trust, adapter=adapter)

    def _source(self, name: str) -> Source:
        """Return where the model comes from that files go by the name of."""
        return self.sources[self._forms[name][0] if name in self._forms else name]

    def fetched(self, name: str) -> bool:
        """Say whether the files of a model are here and were read."""
        return name in self._checkpoints and name not in self.faults

    def location(self, name: str) -> Path:
        """Return the directory that the files of a model are in; before they are fetched, the path or id that it goes by."""
        return self._locations.get(name, Path(self._source(name).of_base.location))

    def fingerprint(self, name: str) -> str:
        """Return what distinguishes the files of a model from others; empty before they are fetched."""
        return self._fingerprints.get(name, "")

    def spec(self, name: str) -> ModelSpec:
        """Read the spec of a model that is fetched, once; an architecture that is new takes transformers some seconds.

        Raises:
            CheckpointError: its config or its files are wrong, or nothing here loads it.
        """
        if name not in self._specs:
            location = self._locations[name]
            source, base = self._source(name), self._source(name).of_base
            spec = model_spec.of_checkpoint(base.name, base.location, self._checkpoints[name], location)
            if spec.unknown is not None:
                raise CheckpointError(location / reader.CONFIG, spec.unknown)
            if source.base is not None:
                spec = model_spec.on_top(read_adapter(Path(source.location)), source, spec)
            self._specs[name] = spec
        return self._specs[name]

    def weights(self, name: str) -> str:
        """Return "synthetic" or "real": what the weights of a model are; a directory that is given as real may hold others."""
        is_here = self.fetched(name) or self._source(name).kind == "directory"
        return "synthetic" if self._synthetic or (is_here and synth.is_synthetic(self.location(name))) else "real"

    def modeling_modules(self, names: Collection[str]) -> list[str]:
        """Name transformers' modules of the models' classes, which the first from_pretrained would import."""
        return sorted(filter(None, {_modeling_module(self._checkpoints[name]) for name in names}))


def _resolved(models: Sequence[str], *, real: bool) -> dict[str, Source]:
    """Resolve models to sources by name; two directories of one name would have one name in the results."""
    sources: dict[str, Source] = {}
    for source in (resolve.resolve(model, weights=real) for model in models):
        other = sources.setdefault(source.name, source)
        if other.location != source.location:
            raise UsageError(f"two models are called {source.name!r}: {other.location} and {source.location}; rename a directory")
    return sources


def _modeling_module(read: Checkpoint) -> str | None:
    kind = str(read.config.get("model_type", "")).replace("-", "_")
    return f"transformers.models.{kind}.modeling_{kind}" if re.fullmatch(r"\w+", kind, re.ASCII) else None
