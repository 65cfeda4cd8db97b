"""What a site was made of, kept so that the next build makes anew only what has changed.

All in here follows from the files of results, and is found by what it follows from: their SHA-256, and digests of results. It is
thrown away as a whole when the program, its format or what is private on this machine is another, and where it is damaged. Losing
it costs time and nothing else.
"""

from __future__ import annotations

import functools
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import msgspec

from harness.core import redact
from harness.machine.cache import cache_dir

_FORMAT = 2
_TABLES = ("sources", "raw", "machines", "models", "cards")
_PACKAGE = Path(__file__).parents[2]
_MOST_ASKED = 500  # keys in one question
Kept = TypeVar("Kept")


class SiteState:
    """Blobs by table and key in a database, and which site the pages are of that they tell about. Raises sqlite3.Error."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._used: dict[str, set[str]] = {}

    @property
    def site(self) -> str:
        """The mark of the site that this was last saved for; empty if it never was."""
        return _facts(self._db).get("site", "")

    def kept(self, table: str, keys: Sequence[str], kind: type[Kept]) -> dict[str, Kept]:
        """Return what is kept under these keys, so far as it is whole and of this kind; what is not asked for is not kept on."""
        self._used.setdefault(table, set()).update(keys)
        found = {}
        for at in range(0, len(keys), _MOST_ASKED):
            some = keys[at : at + _MOST_ASKED]
            marks = ",".join("?" * len(some))
            for key, blob in self._db.execute(f"SELECT key, value FROM {table} WHERE key IN ({marks})", some):
                with suppress(msgspec.DecodeError, UnicodeDecodeError):
                    if (data := _whole(blob)) is not None:
                        found[key] = msgspec.json.decode(data, type=kind)
        return found

    def keep(self, table: str, key: str, data: bytes) -> None:
        """Keep data under a key."""
        self._used.setdefault(table, set()).add(key)
        self._db.execute(f"INSERT OR REPLACE INTO {table} VALUES (?, ?)", (key, _packed(data)))

    def keep_share(self, model: str, machine: str, data: bytes) -> None:
        """Keep what a machine, which `machine` is the key of, has to say of a model."""
        self._db.execute("INSERT OR REPLACE INTO shares VALUES (?, ?, ?)", (model, machine, _packed(data)))

    def shares(self, model: str) -> dict[str, bytes]:
        """Return what machines have to say of a model by their keys, so far as it is whole."""
        found = self._db.execute("SELECT machine, value FROM shares WHERE model = ?", (model,))
        return {machine: data for machine, blob in found if (data := _whole(blob)) is not None}

    def save(self, site: str) -> None:
        """Save what was kept, as that of the site with this mark, and drop all that nobody asked for."""
        for table, used in self._used.items():
            gone = [(key,) for (key,) in self._db.execute(f"SELECT key FROM {table}") if key not in used]
            self._db.executemany(f"DELETE FROM {table} WHERE key = ?", gone)
        self._db.execute("DELETE FROM shares WHERE machine NOT IN (SELECT key FROM machines)")
        self._db.execute("INSERT OR REPLACE INTO facts VALUES ('site', ?)", (site,))
        self._db.commit()


def _facts(db: sqlite3.Connection) -> dict[str, str]:
    return dict(db.execute("SELECT name, value FROM facts"))


def _packed(data: bytes) -> bytes:
    return zlib.compress(data, 1)


def _whole(blob: bytes) -> bytes | None:
    """Unpack what was kept; None if it is damaged, which its checksum tells."""
    with suppress(zlib.error):
        return zlib.decompress(blob)
    return None


def file_for(place: Path) -> Path:
    """Return the file that the state of the site in a directory is kept in."""
    return cache_dir() / "sites" / f"{sha256(str(place.resolve()).encode(errors='surrogateescape')).hexdigest()[:16]}.sqlite"


@contextmanager
def opened(file: Path | None) -> Iterator[SiteState]:
    """Open a state, an empty one where there is none or it is another program's; one that is never saved if `file` is None.

    Raises:
        sqlite3.Error: it is damaged, locked, or cannot be kept there.
    """
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
    db = sqlite3.connect(file or ":memory:", timeout=1)
    try:
        db.execute("PRAGMA synchronous = OFF")  # what a crash of the machine damages is thrown away
        _prepare(db)
        yield SiteState(db)
    finally:
        db.close()


def forget_state(file: Path) -> None:
    """Remove a state that cannot be used."""
    for name in (file.name, f"{file.name}-journal"):
        with suppress(OSError):
            file.with_name(name).unlink(missing_ok=True)


def _prepare(db: sqlite3.Connection) -> None:
    db.execute("CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT)")
    ours = _follows_from()
    if _facts(db).get("from") != ours:
        for name in (*_TABLES, "shares"):
            db.execute(f"DROP TABLE IF EXISTS {name}")
        db.execute("DELETE FROM facts")
        db.execute("INSERT INTO facts VALUES ('from', ?)", (ours,))
    for name in _TABLES:
        db.execute(f"CREATE TABLE IF NOT EXISTS {name} (key TEXT PRIMARY KEY, value BLOB)")
    db.execute("CREATE TABLE IF NOT EXISTS shares (model TEXT, machine TEXT, value BLOB, PRIMARY KEY (model, machine))")
    db.commit()


def _follows_from() -> str:
    """Return what tells this program, and what is private here, from others: both decide what is made of a result."""
    return sha256(f"{_FORMAT}\0{_program()}\0{redact.surroundings_digest()}".encode()).hexdigest()


@functools.cache
def _program() -> str:
    """Return a digest of the program's own files, which a version in the making changes as well, and of what writes for it."""
    found = sha256(repr([(name, version(name)) for name in ("jinja2", "markupsafe", "msgspec")]).encode())
    for path in sorted(_PACKAGE.rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            found.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def keyed(*parts: Iterable[str]) -> str:
    """Return a key that follows from texts in their order."""
    return sha256("\0".join("\1".join(part) for part in parts).encode()).hexdigest()[:32]
