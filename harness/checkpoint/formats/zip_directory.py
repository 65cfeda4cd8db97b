"""The directory of a zip archive, from its end, under bounds. Source: APPNOTE.TXT of PKWARE, sections 4.3 and 4.5.3."""

from __future__ import annotations

import struct

import msgspec

from harness.checkpoint.formats.files import DOWNLOAD_AGAIN, Blob, damaged
from harness.core.errors import CheckpointError
from harness.core.units import format_size

TAIL_BYTES = (1 << 16) + 256  # the longest comment, and the records at the end
DIRECTORY_BYTES = 16 << 20
MOST_MEMBERS = 100_000

_END = struct.Struct("<4s4H2IH")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR_64 = struct.Struct("<4sIQI")
_ENTRY = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")


class Member(msgspec.Struct, frozen=True):
    """One file in the archive; `offset` is that of its local header."""

    size: int
    offset: int
    compressed: bool


def read_directory(blob: Blob) -> dict[str, Member]:
    """Return the members of an archive, by name, in the order of the directory."""
    start = max(blob.size - TAIL_BYTES, 0)
    tail = blob.read(start, blob.size - start)
    offset, size, count = _find_directory(blob, tail, start)
    if size > DIRECTORY_BYTES or count > MOST_MEMBERS:
        raise CheckpointError(blob.where, f"has {count:,} members, listed in {format_size(size)}: more than any checkpoint's")
    if offset + size > blob.size:
        raise damaged(blob, f"says its directory lies at bytes {offset} to {offset + size} of {blob.size}")
    data = tail[offset - start : offset - start + size] if offset >= start else blob.read(offset, size)
    return _members(blob, data, count)


def start_of(blob: Blob, member: Member) -> int:
    """Return where the bytes of a member begin, behind its local header."""
    if member.offset + _LOCAL.size > blob.size:
        raise damaged(blob, f"says that a member lies at byte {member.offset} of {blob.size}")
    header = _LOCAL.unpack(blob.read(member.offset, _LOCAL.size))
    if header[0] != b"PK\x03\x04":
        raise damaged(blob, f"has no member at byte {member.offset}")
    start: int = member.offset + _LOCAL.size + header[-2] + header[-1]
    if start + member.size > blob.size:
        raise damaged(blob, f"says that a member ends at byte {start + member.size} of {blob.size}")
    return start


def _find_directory(blob: Blob, tail: bytes, start: int) -> tuple[int, int, int]:
    """Return offset, bytes and number of members of the directory."""
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + _END.size > len(tail):
        raise CheckpointError(
            blob.where, f"is cut short: it begins as a zip archive and has no directory at its end: {DOWNLOAD_AGAIN}"
        )
    *_, count, size, offset, _ = _END.unpack_from(tail, at)
    locator = at - _LOCATOR_64.size
    if locator < 0 or tail[locator : locator + 4] != b"PK\x06\x07":
        return offset, size, count
    position = _LOCATOR_64.unpack_from(tail, locator)[2] - start
    if not 0 <= position <= len(tail) - _END_64.size or tail[position : position + 4] != b"PK\x06\x06":
        raise damaged(blob, "points to a 64-bit directory that is not there")
    *_, count, size, offset = _END_64.unpack_from(tail, position)
    return offset, size, count


def _members(blob: Blob, data: bytes, count: int) -> dict[str, Member]:
    members: dict[str, Member] = {}
    at = 0
    for _ in range(count):
        if at + _ENTRY.size > len(data) or data[at : at + 4] != b"PK\x01\x02":
            raise damaged(blob, f"has {len(members)} members in its directory and says it has {count}")
        fields = _ENTRY.unpack_from(data, at)
        method, packed, size, (name_length, extra_length, comment_length), offset = (
            fields[4],
            fields[8],
            fields[9],
            fields[10:13],
            fields[16],
        )
        at += _ENTRY.size
        name = data[at : at + name_length].decode("utf-8", "replace")
        size, packed, offset = _widen(data[at + name_length : at + name_length + extra_length], size, packed, offset)
        members[name] = Member(size=size, offset=offset, compressed=method != 0 or size != packed)
        at += name_length + extra_length + comment_length
    return members


def _widen(extra: bytes, *narrow: int) -> tuple[int, ...]:
    """Replace the 32-bit fields that say "see there" by those of the zip64 extra field, which keeps this order."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{min(length, len(extra) - 4) // 8}Q", extra, 4))
            return tuple(next(wide, value) if value == 0xFFFFFFFF else value for value in narrow)
        extra = extra[4 + length :]
    return narrow
