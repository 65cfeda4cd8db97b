"""What tells the files of one model from those of another, without reading them through."""

from __future__ import annotations

import hashlib
from pathlib import Path

from harness.catalog.download import SMALL_FILES
from harness.checkpoint.adapter import ADAPTER_WEIGHTS
from harness.checkpoint.auxiliary_files import ADAPTER
from harness.checkpoint.reader import Checkpoint
from harness.core.errors import CheckpointError
from harness.core.units import MIB

_WHOLE_BYTES, _END_BYTES = 64 * MIB, MIB


def of_model(directory: Path, read: Checkpoint, *, trusted: bool = False, adapter: Path | None = None) -> str:
    """Return a digest of the files that a model is loaded from, in well under a second for any size of model.

    Those of the directory of an `adapter` that is loaded on top are among them.

    Config, tokenizer and code go in whole. Of a file of weights: name, size, its first and last MiB (the headers of safetensors
    among them), and what else tells it from another: in a cache of the hub the name of the blob, which is the hash of
    its contents, elsewhere the time it was written. So weights that were copied or made anew count as changed: that costs a
    measurement, and the opposite error would show figures of another model.

    Nothing tells whether code of another repository, which runs where it is `trusted`, is what it was: then it is "".

    Raises:
        CheckpointError: a file cannot be read.
    """
    if trusted and any(code.elsewhere for code in read.remote_code):
        return ""
    weights = {file.name for file in read.files}
    found = hashlib.sha256()
    try:
        small = {file.name for file in directory.iterdir() if file.is_file() and file.name.endswith((*SMALL_FILES, ".py"))}
        # The model's own code may import from folders below; where there is none, what else lies there is not read.
        code = {file.relative_to(directory).as_posix() for file in directory.rglob("*.py")} if read.remote_code else set()
        for name in sorted(weights | small | code):
            found.update(f"{name}\0".encode())
            _add(found, directory / name, of_weights=name in weights)
        if adapter is not None:
            _add(found, adapter / ADAPTER, of_weights=False)
            _add(found, adapter / ADAPTER_WEIGHTS, of_weights=True)
    except OSError as error:
        raise CheckpointError(error.filename or directory, f"cannot be read ({error.strerror})") from None
    return found.hexdigest()[:32]


def _add(found: hashlib._Hash, path: Path, *, of_weights: bool) -> None:
    target = path.resolve()
    facts = target.stat()
    with target.open("rb") as file:
        if not of_weights and facts.st_size <= _WHOLE_BYTES:
            found.update(hashlib.sha256(file.read()).digest())
            return
        written = target.name if target.parent.name == "blobs" else facts.st_mtime_ns
        found.update(f"{facts.st_size}\0{written}\0".encode())
        found.update(file.read(_END_BYTES))
        file.seek(max(facts.st_size - _END_BYTES, 0))
        found.update(file.read(_END_BYTES))
