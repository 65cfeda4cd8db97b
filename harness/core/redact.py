"""What a result must not tell: who ran it, on which machine, in which folders, with which secrets.

Results are made to be published, and code of a model, an error or a path may carry anything into them. Everything that is text
in a result passes through `clean` once, when the result is complete. What is found is replaced by what it was: `~`, `<tmp>`,
`<user>`, `<host>`, `<token>`, `<$NAME>` for the value of an environment variable.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from harness.core.placements import PLACEMENTS
from harness.core.precisions import PRECISIONS
from harness.core.private import looks
from harness.core.private.own_words import is_ours
from harness.core.records import Result

# By these a case is found again and compared, loaded again and drawn. They hold names of ours, the model's, which is private only
# if the user says so, and those of its classes and modules: no text that comes from this machine, but for `_FILE`.
KEPT = frozenset(
    {"schema", "id", "run", "at", "case", "weights", "machine", "verdict", "outcome", "stage", "metrics", "samples", "phases"}
    | {"timeline", "estimate", "environment", "fingerprint", "files_bytes", "allowed_s", "failed", "code", "loaded", "device_map"}
)
# The name of the GGUF file in loading code, which is the user's.
_FILE = re.compile(r'(?<=gguf_file=")(?:[^"\\]|\\.)*(?=")')
# Words of our tables, which anybody's variables may hold as well.
OURS = frozenset({*PRECISIONS, *PLACEMENTS, *(precision.dtype for precision in PRECISIONS.values())})

# Accounts and hosts that are everybody's, and words of our own that a person or a machine may be called.
COMMON = re.compile(
    r"admin|administrator|app|auto|build|builder|centos|cloud|cpu|cuda|data|debian|default|demo|desktop|dev|developer|disk|docker"
    r"|error|fedora|file|fitmatrix|gpu|guest|home|host|laptop|layer|linux|llama|load|local|localhost|main|max|min|model|models|node"
    r"|nobody|none|notebook|python|root|runner|sandbox|server|service|shell|system|temp|test|tests|tester|torch|transformers"
    r"|ubuntu|unknown|user|users|vm|weight|work|worker|workspace",
    re.IGNORECASE,
)
# Variables whose values are known to everybody, say nothing about anybody, or are the directories of `_places`.
PLAIN_NAME = re.compile(
    r"HOME|USERPROFILE|PWD|TMPDIR|TEMP|TMP|LANG|LANGUAGE|LC_\w+|TERM|COLORTERM|SHELL|PATH|MANPATH|INFOPATH|LS_COLORS|TZ|EDITOR|PAGER|DEBIAN_FRONTEND|PYTHON(?!PATH)\w*"
    r"|(OMP|MKL|OPENBLAS|NUMEXPR|TOKENIZERS|TQDM|PYTORCH)_\w+|TORCH_\w+|CUDA_(VISIBLE_DEVICES|DEVICE_ORDER)|HF_(ENDPOINT|HUB_OFFLINE)|_"
)
# TOKENS are counted, as in MAX_TOKENS.
SECRET = re.compile(r"TOKEN(?!S|IZER)|KEY|SECRET|PASS|AUTH(?!OR)|CRED|COOKIE", re.IGNORECASE)
LEAST_VALUE, LEAST_SECRET, LEAST_NAME = 8, 6, 3
# A text of so many letters may have been cut in the middle of a value; so much of it must be left to be found.
CUT_TEXT, LEAST_CUT = 500, 6

_NUMBERS = frozenset({int, float, bool, type(None)})
# Texts that are remembered as harmless, and how long they are at most: a hundred megabytes.
_MOST_SEEN, _LONG = 50_000, 2_000

Cleaner = Callable[[str], str]


def clean(result: Result, model: Path | None = None) -> Result:
    """Return the result without what is private; `model` is the directory of its model, which becomes "<model>"."""
    texts = cleaner(public=result.id, model=model)
    changed = {name: _walk(getattr(result, name), texts) for name in result.__struct_fields__ if name not in KEPT}
    if result.code is not None:
        changed["code"] = _FILE.sub(lambda file: clean_name(file[0]), result.code)
    return msgspec.structs.replace(result, **changed)


def texts_of(result: Result) -> dict[str, list[str]]:
    """Return the texts in each field of a result."""
    return {name: texts_in(getattr(result, name)) for name in result.__struct_fields__}


def is_clean(result: Result, texts: Mapping[str, Sequence[str]] | None = None, here: Private | None = None) -> bool:
    """Tell whether `clean` would leave a result as it is, in less than half the time: most results are.

    `texts` are those of its fields and `here` is what `private_here` says, if they are known. Short ones are looked at together,
    long ones alone, because a value may be cut off at either end of them.
    """
    texts = texts_of(result) if texts is None else texts
    known = here or private_here()
    # What is public of this result may be private in another, where it is not its name.
    seen = known.seen if known.hides_nothing_of(result.id) else _Seen()
    new = seen.new_of(text for name, said in texts.items() if name not in KEPT for text in said)
    cleaned = _cleaner_by(known, result.id)
    together = ["\0".join(text for text in new if len(text) < CUT_TEXT)]
    found = all(cleaned(text) == text for text in together + [text for text in new if len(text) >= CUT_TEXT])
    if found:
        seen.add(new)
    return found


class _Seen:
    """Texts in which nothing was found: results of one program say the same again and again."""

    def __init__(self) -> None:
        self._texts: set[str] = set()

    def new_of(self, texts: Iterable[str]) -> list[str]:
        """Return those of some texts that were not looked at before, each once."""
        return [text for text in dict.fromkeys(texts) if text not in self._texts]

    def add(self, texts: Iterable[str]) -> None:
        if len(self._texts) > _MOST_SEEN:
            self._texts.clear()
        self._texts.update(text for text in texts if len(text) < _LONG)


def clean_text(text: str) -> str:
    """Return a text without what is private."""
    return cleaner()(text)


def clean_name(name: str) -> str:
    """Return the name of a model's file or directory without secrets, user and machine.

    The values of other variables stay: MODEL=NAME of a script that runs us makes no secret of what is to be named.
    """
    return cleaner(secrets_only=True)(name)


def gives_away(value: Any) -> str | None:
    """Say what in a field of a result is private by its look, whoever's it is and wherever it comes from; None if nothing is.

    For what `clean` must keep as it is, and for results of other machines, whose names and variables nobody here knows.
    """
    return private_in(texts_in(value))


def private_in(texts: Iterable[str]) -> str | None:
    """Say what in texts is private by its look; None if nothing is."""
    new = _HARMLESS.new_of(texts)
    said = looks.private("\n".join(new))
    if said is None:
        _HARMLESS.add(new)
    return said


def texts_in(value: Any) -> list[str]:
    """Return the texts in a field of a result as they are read, keys of tables included."""
    found: list[str] = []
    _collect(value, found)
    return found


def _collect(value: Any, found: list[str]) -> None:
    inside: Iterable[Any] = ()
    if isinstance(value, str):
        found.append(value)
    elif isinstance(value, msgspec.Struct):
        inside = msgspec.structs.astuple(value)
    elif isinstance(value, dict):
        found += value  # whose keys are texts
        inside = value.values()
    elif isinstance(value, (list, tuple)) and not _NUMBERS.issuperset(map(type, value)):  # as in samples and timelines
        inside = value
    for inner in inside:
        if (kind := type(inner)) is str:
            found.append(inner)
        elif kind not in _NUMBERS:
            _collect(inner, found)


def _walk(value: Any, texts: Cleaner) -> Any:
    if isinstance(value, Enum):
        return value
    if isinstance(value, str):
        return texts(value)
    if isinstance(value, dict):
        return {_walk(key, texts): _walk(inner, texts) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_walk(inner, texts) for inner in value)
    if isinstance(value, msgspec.Struct):
        return msgspec.structs.replace(value, **{name: _walk(getattr(value, name), texts) for name in value.__struct_fields__})
    return value


_HARMLESS = _Seen()  # by their look, whoever's they are


def cleaner(public: str = "", model: Path | None = None, *, secrets_only: bool = False) -> Cleaner:
    """Make a function that cleans texts; the parts of `public`, between its slashes, and its words are no secrets of anybody's."""
    return _cleaner_by(private_here(), public, model, secrets_only=secrets_only)


def _cleaner_by(known: Private, public: str, model: Path | None = None, *, secrets_only: bool = False) -> Cleaner:
    places = [*_written(str(model), "<model>"), *known.places] if model and model.is_absolute() else known.places
    values = [(value, mark) for value, mark, secret in known.values if secret or not secrets_only]
    values = [(value, mark) for value, mark in values if f"/{value}/" not in f"/{public}/"]
    names = [(pattern, mark) for pattern, mark in known.names if not pattern.search(public)]

    def cleaned(text: str) -> str:
        for place, mark in places:
            text = re.sub(rf"(?<![\w.~-]){re.escape(place)}(?![\w-])", mark, text)
        for value, mark in values:
            text = _without(text, value, mark)
        text = looks.without(text)
        for pattern, mark in names:
            text = pattern.sub(mark, text)
        return text

    return cleaned


class Private(NamedTuple):
    """What is private on this machine: directories, values of variables and whether they are secrets, names; the longest first.

    `seen` are texts in which nothing of it was found.
    """

    places: list[tuple[str, str]]
    values: list[tuple[str, str, bool]]
    names: list[tuple[re.Pattern[str], str]]
    seen: _Seen

    def hides_nothing_of(self, public: str) -> bool:
        """Tell whether nothing that is private here stands in what is public."""
        values = any(f"/{value}/" in f"/{public}/" for value, _, _ in self.values)
        return not values and not any(pattern.search(public) for pattern, _ in self.names)


def private_here() -> Private:
    """Return what is private on this machine now; who checks a hundred thousand results of a moment asks once."""
    return _known(_surroundings())


def _surroundings() -> tuple[object, ...]:
    """Return what all that is private on this machine follows from, so that it is looked up once and not for every text."""
    here = ""
    with contextlib.suppress(OSError):  # the directory one stands in may be gone
        here = str(Path.cwd())
    return tuple(os.environ.items()), here, sys.prefix, tempfile.tempdir, socket.gethostname()


def surroundings_digest() -> str:
    """Return a digest of all that is private on this machine: what was cleaned with another is not known to be clean."""
    known = private_here()
    names = [(pattern.pattern, mark) for pattern, mark in known.names]
    return hashlib.sha256(repr((known.places, known.values, names)).encode(errors="surrogateescape")).hexdigest()


@functools.lru_cache(maxsize=4)
def _known(_: tuple[object, ...]) -> Private:
    places = sorted(_places(), key=lambda place: -len(place[0]))
    values = sorted(_values(), key=lambda one: -len(one[0]))
    return Private(places, values, [(_word(name), mark) for name, mark in _names()], _Seen())


def _without(text: str, value: str, mark: str) -> str:
    """Replace a value, also where the text ends in the middle of it or, as the last lines of a log do, begins there."""
    text = text.replace(value, mark)
    if len(text) < CUT_TEXT:
        return text
    for length in range(len(value) - 1, LEAST_CUT - 1, -1):
        if text.endswith(value[:length]):
            text = text[:-length] + mark
            break
    for length in range(len(value) - 1, LEAST_CUT - 1, -1):
        if text.startswith(value[-length:]):
            text = mark + text[length:]
            break
    return text


def _places() -> Iterator[tuple[str, str]]:
    """Yield the directories that tell of this machine or its user, and their marks."""
    home = os.environ.get("HOME") or os.environ.get("USERPROFILE")
    known = []
    with contextlib.suppress(FileNotFoundError):  # no directory takes temporary files
        known.append((tempfile.gettempdir(), "<tmp>"))
    known += [(sys.prefix, "<python>")] if sys.prefix != "/usr/local" else []
    with contextlib.suppress(OSError):  # the directory one stands in may be gone
        known.append((str(Path.cwd()), "<here>"))
    known += [(home, "~")] if home else []
    with contextlib.suppress(RuntimeError):
        known.append((str(Path.home()), "~"))
    for place, mark in known:
        yield from _written(place, mark)


def _written(place: str, mark: str) -> Iterator[tuple[str, str]]:
    """Yield a directory as it is written and with links followed, and its mark."""
    for written in {place.rstrip("/\\"), os.path.realpath(place)}:
        # Nearer the root than this, a path names nobody, and would be found in others.
        if written.count(os.sep) > 1 or (mark in ("~", "<model>") and len(written) > 1):
            yield written, mark


def _values() -> Iterator[tuple[str, str, bool]]:
    """Yield the environment variables whose values nobody else should read, and whether they are secrets."""
    for name, value in os.environ.items():
        is_secret = SECRET.search(name) is not None
        if len(value) < (LEAST_SECRET if is_secret else LEAST_VALUE) or PLAIN_NAME.fullmatch(name) or value in OURS:
            continue
        is_word = value.isalpha() or value.replace(".", "").isdigit()  # too likely to stand in a text by itself
        if (is_secret or not is_word) and not is_ours(value):
            yield value, f"<${name}>", is_secret


def _names() -> Iterator[tuple[str, str]]:
    """Yield what the user and the machine are called, unless half the world's are."""
    for name in sorted(_users(), key=len, reverse=True):
        if len(name) >= LEAST_NAME and not COMMON.fullmatch(name):
            yield name, "<user>"
    full = socket.gethostname()
    for name in dict.fromkeys((full, full.partition(".")[0])):
        if len(name) >= LEAST_NAME and not COMMON.fullmatch(name):
            yield name, "<host>"


def _users() -> set[str]:
    found = {os.environ.get(name, "") for name in ("USER", "LOGNAME", "USERNAME", "SUDO_USER")}
    found.add(Path(os.environ.get("HOME", "")).name)
    if sys.platform not in ("win32", "emscripten"):  # which has no accounts
        import pwd

        with contextlib.suppress(KeyError):  # a container may run as a number that has no name
            found.add(pwd.getpwuid(os.getuid()).pw_name)
    return found


def _word(name: str) -> re.Pattern[str]:
    """Match a name as a word of its own: a short one may be a part of any identifier, so there _ joins.

    A name that is a word of ours is one only where a directory is called so.
    """
    if is_ours(name):
        return re.compile(rf"(?<=/){re.escape(name)}(?=/)")
    joined = r"A-Za-z0-9" if len(name) > 4 else r"\w"
    return re.compile(rf"(?<![{joined}]){re.escape(name)}(?![{joined}])")
