"""Names as people write them: cleaned, read out of addresses, and matched with the names of the catalog.

A name is compared by its words and figures, so case, dashes, blanks and underscores do not count: "Qwen3-8B" is "qwen 3 8b".
A shortened name is taken only where all that it can mean is one model of one size; see `meant`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from harness.core.errors import UsageError, did_you_mean

LISTED = "'fitmatrix models' lists the names known offline"

# Hosts whose pages are /OWNER/NAME, or /models/OWNER/NAME.
HOSTS = frozenset(("huggingface.co", "hf.co", "hf-mirror.com", "modelscope.cn", "modelscope.com", "modelscope.ai"))
# What a page's address may go on with: the revision comes next, and the file after that.
_REVISION_FOLLOWS = frozenset(("tree", "blob", "resolve", "raw", "blame", "commits", "commit", "view"))
_NOT_MODELS = {"datasets": "a data set", "spaces": "a space", "collections": "a collection", "papers": "a paper", "docs": "a page"}
_MAIN = frozenset(("main", "master"))

_SCHEME = re.compile(r"(?P<web>https?://)|hf://|(?:hf|huggingface|modelscope|ms):/{0,2}", re.IGNORECASE)
_CACHE_FOLDER = re.compile(r"models--(?P<owner>[^-/]+(?:-[^-/]+)*)--(?P<name>[^/]+)")
# What people copy with a name: the command that takes it, a link of Markdown, an address of git by ssh.
_COMMAND = re.compile(
    r"(?:\$ )?(?:(?:ollama|lms|docker model) (?:run|pull|show|get)|vllm serve|(?:hf|huggingface-cli|modelscope) download"
    r"|git (?:lfs )?clone|llama-(?:cli|server))\s(?P<words>.+)",
    re.DOTALL,
)
_LINK = re.compile(r"\[[^]]*\]\((?P<address>\S+)\)")
_BY_SSH = re.compile(r"(?:ssh://)?git@(?P<host>[\w.-]+)[:/]")
# Around what is copied from a text or a shell.
_AROUND = " \t\n\r\"'`\u201c\u201d\u2018\u2019\u00ab\u00bb<>,;"
_DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"), "-")
_UNSEEN = dict.fromkeys(map(ord, "\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"))

# "int4", "w4a16" and "a3b" are words; a figure keeps the unit behind it: "8b", "8x7b", "1.5"; letters and figures part: "qwen3".
_WORD = re.compile(
    r"(?:int|uint|fp|bf|nf|mxfp|nvfp)\d+(?![a-z\d])|w\d+a\d+|a\d+(?:\.\d+)?b(?![a-z\d])|\d+(?:[.x]\d+)*[a-z]*|[^\W\d_]+"
)
_DECIMAL = re.compile(r"(?<![.\d]\d)(?<=\d)_(?=\d(?![\da-z.]))")  # as in "phi-1_5"
_SIZE = re.compile(r"a?\d+(?:\.\d+)?(?:x\d+(?:\.\d+)?)?[bm]")
_TUNED = frozenset(("chat", "instruct", "it", "sft", "tuned"))
_UNTUNED = frozenset(("base", "pt", "plugin"))
# Words that tell models of one size and generation apart, or nothing at all.
_VARIANTS = _TUNED | _UNTUNED | frozenset(("hf", "meta", "mono"))
_PACKED = re.compile(r"awq|gptq|gguf|bnb|mlx|autoround|quantized|[48]bit|(?:int|uint|fp|nf|mxfp|nvfp)\d+|w\d+a\d+|dynamic|group")
MOST_NAMED = 6


class WrittenName(NamedTuple):
    """What was written for a model: a name or hub id, and what an address says beside it."""

    name: str
    revision: str | None = None
    file: str | None = None  #: a GGUF file of the repository


def read_name(text: str, hub_host: str | None = None) -> WrittenName:
    """Read what was written for a model: clean it, and take an address apart. `hub_host` is a hub of the user's own.

    Raises:
        UsageError: it is the address of something else.
    """
    name = _copied(unicodedata.normalize("NFKC", text.translate(_DASHES)).translate(_DASHES).translate(_UNSEEN).strip(_AROUND))
    scheme = _SCHEME.match(name)
    rest = name[scheme.end() :] if scheme else name
    host, _, path = rest.partition("/")
    if host.casefold().removeprefix("www.") in HOSTS | {hub_host}:
        return _of_address(text, path)
    if scheme and scheme["web"]:
        raise UsageError(f"{text!r} is no page of a model on a hub: give its hub id (owner/name), or a directory with its files")
    folder = _CACHE_FOLDER.search(rest)
    if folder:
        return WrittenName(f"{folder['owner']}/{folder['name']}")
    return _without_tag(text, rest.rstrip("/"))


def _copied(text: str) -> str:
    """Return the name or address in what was copied: of a command the word with an owner, or the first that is no option."""
    if command := _COMMAND.fullmatch(text):
        given = [word for word in command["words"].split() if not word.startswith("-")]
        text = next((word for word in given if "/" in word), given[0] if given else text).strip(_AROUND)
    link = _LINK.fullmatch(text)
    return _BY_SSH.sub(r"\g<host>/", link["address"] if link else text)


def _of_address(text: str, path: str) -> WrittenName:
    """Read the path of an address on a hub."""
    from urllib.parse import unquote

    parts = [unquote(part) for part in re.split(r"[?#]", path)[0].split("/") if part]
    while parts and parts[0] in ("api", "models"):
        del parts[0]
    if parts and parts[0] in _NOT_MODELS:
        raise UsageError(f"{text!r} is the address of {_NOT_MODELS[parts[0]]}, not of a model: give that of the model's page")
    if not parts:
        raise UsageError(f"{text!r} names no model: give the address of the model's page, or its hub id (owner/name)")
    where = next((place for place in (1, 2, 3) if len(parts) > place + 1 and parts[place] in _REVISION_FOLLOWS), None)
    revision = parts[where + 1] if where else None  # an old model has no owner, and the word stands second: gpt2/tree/main
    file = "/".join(parts[where + 2 :]) if where else ""
    found = _without_tag(text, "/".join(parts[: min(where or 2, 2)]))
    return found._replace(
        revision=found.revision if revision in (None, *_MAIN) else revision, file=file if file.endswith(".gguf") else None
    )


def _without_tag(text: str, name: str) -> WrittenName:
    """Take a revision off a hub id ("owner/name@v1"), and refuse what llama.cpp writes there ("owner/name:Q4_K_M")."""
    owner, slash, rest = name.partition("/")
    if not slash:
        return WrittenName(name)
    rest, _, tag = rest.partition(":")
    if tag and not tag.isdecimal():
        raise UsageError(f"{text!r} names a file by {tag!r}: write {owner}/{rest} and the file's name with --file")
    rest, _, revision = rest.removesuffix(".git").partition("@")
    return WrittenName(f"{owner}/{rest}", None if revision in ("", *_MAIN) else revision)


def words(name: str) -> tuple[str, ...]:
    """Split a name into what counts of it: words, and figures with their units."""
    return tuple(_WORD.findall(_DECIMAL.sub(".", unicodedata.normalize("NFKC", name).casefold())))


def meant(text: str, known: Mapping[str, Sequence[str]]) -> str | None:
    """Return which of the `known` names, given with their words, is meant by a name in any spelling or shortened; None if none is.

    A shortened name leaves words out. First come the names where these are only sizes, ways of tuning and of packing. What they
    have left beyond tuning and packing must be the same, and the generation must be written: then the one that is tuned and not
    packed is meant. So "chatglm" is chatglm-6b and "codegen-16b" is codegen-16b-mono; "qwen3" has several sizes.

    Raises:
        UsageError: it can mean several; the sentence names them.
    """
    asked = words(text)
    for name, has in known.items():
        if asked and tuple(has) == asked:
            return name
    left = {name: out for name, has in known.items() if (out := _left_out(asked, has)) is not None}
    if not left:
        return None
    near = [name for name, out in left.items() if all(_is_detail(word) for _, word in out)] or list(left)
    plain = [name for name in near if not any(_PACKED.fullmatch(word) for _, word in left[name])] or near
    stems = {tuple(word for word in known[name] if word not in _VARIANTS) for name in plain}
    if len(stems) == 1 and _names_family(asked) and not any(_is_generation(left[name]) for name in plain):
        return min(plain, key=lambda name: _preference(known[name]))
    raise UsageError(_several(text, plain))


def _left_out(asked: Sequence[str], has: Sequence[str]) -> list[tuple[int, str]] | None:
    """Return the words of a name that are not asked for, each with the number of asked words before it; None if others are."""
    out, place = [], 0
    for word in has:
        if place < len(asked) and word == asked[place]:
            place += 1
        else:
            out.append((place, word))
    return out if asked and place == len(asked) else None


def _is_detail(word: str) -> bool:
    """Say whether a word is a size, a way of tuning or a way of packing."""
    return bool(word in _VARIANTS or _SIZE.fullmatch(word) or _PACKED.fullmatch(word))


def _is_generation(out: Sequence[tuple[int, str]]) -> bool:
    """Say whether a generation was left out: a figure right behind the first word, as the 1.5 of Yi-1.5."""
    return bool(out) and out[0][0] == 1 and re.fullmatch(r"[\d.]+", out[0][1]) is not None


def _names_family(asked: Sequence[str]) -> bool:
    return any(word.isalpha() and not _is_detail(word) for word in asked)


def _preference(has: Sequence[str]) -> tuple[int, bool, int]:
    return sum(word in _UNTUNED for word in has), not _TUNED.intersection(has), len(has)


def _several(text: str, names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"no model is called {text!r}: did you mean {names[0]!r}?"
    named = ", ".join(sorted(names)[:MOST_NAMED])
    more = f" and {len(names) - MOST_NAMED} more ('fitmatrix models' lists them)" if len(names) > MOST_NAMED else ""
    return f"{text!r} can mean {named}{more}: write out which"


def near_misses(text: str, known: Iterable[str]) -> str:
    """Say which known names resemble `text`, and where all of them stand."""
    import difflib

    names = list(known)
    close = difflib.get_close_matches(text.casefold()[:96], names)
    return f"{did_you_mean(text.casefold()[:96], close)} {LISTED}" if close else LISTED
