"""What the cases of each model are compared with: the predictions of the first case that ran, the widest of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from harness.core.records import Case, Plan, Result
from harness.measure.quality import Reference, reference_of
from harness.run.case_result import CaseEnded, CaseModel, RunContext
from harness.run.runner import Run


@dataclass
class CaseReference:
    """The reference of a model."""

    reference: Reference
    case: Case
    file: Path | None  #: its predictions; None if the result is of an earlier run and they are gone


class References:
    """The reference of each model, by name; `reloaded` are the ids of cases that were loaded once more for their predictions."""

    def __init__(self, models: Sequence[str], folder: Callable[[], Path]) -> None:
        """Take the names of the models, and the folder for predictions, which is asked for when the first are written."""
        self._models, self._folder = models, folder
        self._by_model: dict[str, CaseReference] = {}
        self.reloaded: list[str] = []

    def file_for(self, model: str) -> Path:
        """Return where a model's predictions go; its name may be no name for a file."""
        return self._folder() / f"reference-{self._models.index(model)}.npy"

    def of(self, model: str) -> CaseReference | None:
        """Return the reference of a model, None if no case of it has run."""
        return self._by_model.get(model)

    def add(self, result: Result, file: Path | None) -> None:
        """Take a result that was just measured as the reference, if its predictions are in `file` and good for that."""
        reference = reference_of(result)
        if file is not None and reference is not None:
            self._by_model[result.case.model] = CaseReference(reference, result.case, file)

    def keep(self, earlier: Result) -> None:
        """Take a result of an earlier run as the reference, if it was one then and the model has none yet."""
        reference = reference_of(earlier)
        if reference is not None and earlier.quality is not None and earlier.quality.reference is None:
            self._by_model.setdefault(earlier.case.model, CaseReference(reference, earlier.case, file=None))

    def load_predictions(self, model: str, prepare: Callable[[Case], tuple[Plan, CaseModel]], context: RunContext) -> None:
        """Load a kept reference once more for its predictions: they are large, and gone with the run that made them.

        Does nothing if there is no reference or its predictions are here. A reference that does not work any more is dropped.
        """
        found = self._by_model.get(model)
        if found is None or found.file is not None:
            return
        plan, case_model = prepare(found.case)
        if plan.code is None:  # it cannot be loaded here any more
            del self._by_model[model]
            return
        file = self.file_for(model)
        run = Run(plan, replace(case_model, reference=None, reference_file=None, keep_file=file), context)
        try:
            run.score()
            found.file = file
            self.reloaded.append(found.case.id)
        except CaseEnded:
            del self._by_model[model]
        finally:
            run.finish()
