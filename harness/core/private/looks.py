"""What is private by its look, whoever's it is and wherever it comes from: secrets, homes, addresses of people and machines.

Every pattern begins at a bound or reads a bounded piece, so that a text of any length is searched in time that grows with it.
Sources: the documentation of Hugging Face, GitHub, GitLab, OpenAI, AWS, Google, Slack, Stripe, npm and PyPI; RFC 7468 and 7519.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_network
from typing import NamedTuple


class Look(NamedTuple):
    """A kind of private text: what it is called, what takes its place, how it looks, and what tells it from its doubles.

    One of `hints` is in every text that has it: most have none, and finding that out takes no time.
    """

    what: str
    mark: str
    pattern: re.Pattern[str]
    hints: tuple[str, ...]
    is_one: Callable[[re.Match[str]], bool] = bool

    def find(self, text: str) -> Iterator[re.Match[str]]:
        """Yield where a text has it."""
        if any(hint in text for hint in self.hints):
            yield from filter(self.is_one, self.pattern.finditer(text))


_TOKENS = re.compile(
    r"\bhf_(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{6,}|\bapi_org_[A-Za-z0-9]{16,}|\bgh[pousr]_\w{16,}|\bgithub_pat_\w{16,}"
    r"|\bgl(pat|ptt|rt|dt|ft)-[\w-]{16,}|\bsk-[\w-]{16,}|\b[rsp]k_(live|test)_[A-Za-z0-9]{8,}|\bwhsec_[A-Za-z0-9]{16,}"
    r"|\b(AKIA|ASIA|AROA)[A-Z0-9]{16}\b|\bAIza[\w-]{30,}|\bya29\.[\w-]{16,}|\bGOCSPX-[\w-]{16,}"
    r"|\bxox[abposre]-[\w-]{10,}|\bxapp-[\w-]{10,}|\bnpm_[A-Za-z0-9]{20,}|\bpypi-[\w-]{16,}|\bdop_v1_[a-f0-9]{16,}"
    r"|\bSG\.[\w-]{16,}\.[\w-]{16,}|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*|(?<=Bearer )[\w.~+/=-]{8,}"
    r"|(?<=Basic )(?=[A-Za-z][a-z]{0,80}[A-Z0-9+/=])[A-Za-z0-9+/]{6,}={0,2}"
    r"|-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----.*?(-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)",
    re.ASCII | re.DOTALL,
)
# Who a request is from, in the address itself: USER:PASSWORD@host and TOKEN@host; ssh's git@ is everybody's.
_USERINFO = re.compile(r"(?<=://)(?!git@)[^\s/@'\"<>]{1,512}(?=@)")
# What is named a secret where it is given: ?api_key=..., HF_TOKEN=...
_QUERY = re.compile(
    r"(?<=[?&])(?P<kept>(?:[\w-]{0,20}(?:key|token|secret|password|passwd|signature|credential)|auth|sig|pwd)=)[^\s&#'\"<>$]{4,}",
    re.IGNORECASE,
)
_VARIABLE = re.compile(
    r"\b(?P<kept>[A-Z][A-Z0-9_]{0,60}(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD)=['\"]?)(?=\S{0,80}[0-9])[^\s'\"<>$(]{8,}"
)
# Windows' homes have blanks in their names; in code and JSON each of their backslashes is two or four.
_HOMES = re.compile(
    r"(?:/home/|/Users/)[^\s/\\'\":,;)<>]+"
    r"|[A-Za-z]:(?:\\{1,8}|/)(?i:Users|Documents and Settings)(?:\\{1,8}|/)"
    r"(?:[^\s\\/:*?'\"<>|][^\\/:*?'\"<>|\r\n]{0,63}(?=[\\/])|[^\s\\/'\":,;)<>]+)"
)
# Of top-level domains those of countries, in two letters, and the commonest others: `x@w.weight` is a product of matrices.
_MAIL = re.compile(
    r"(?<![\w.+-])(?!git@)[A-Za-z0-9][\w.+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.){1,8}"
    r"(?:[a-z]{2}|com|org|net|edu|gov|mil|int|info|biz|dev|app|cloud|email|online|name|xyz|tech|science|museum|example|local|lan)"
    r"(?![\w(]|\.\w)",
    re.ASCII,
)
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w+]|\.\w|-\w)", re.ASCII)
_IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])", re.ASCII)
_MAC = re.compile(r"(?<![\w:-])(?:[0-9A-Fa-f]{2}[:-]){5}[0-9A-Fa-f]{2}(?![\w:-])", re.ASCII)

_INSIDE = [ip_network(name) for name in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "169.254.0.0/16")]
# What stands before a version: "==", a "v", the word; and a name, alone before it on its line or in a list, as pip prints it.
_VERSION = re.compile(r"(?:[=<>~!]=|[-_+]|\bv|\b(?:version|release|driver|build)\b[ :=]{0,3})\Z", re.IGNORECASE)
_LISTED = re.compile(r"(?:^|[\n,;(\[|\"'])[ \t]*([A-Za-z][\w.-]{0,60})[ \t]*[ \t(:=]\Z")
_NETWORK = re.compile(
    r"(?i:host|hostname|inet|inet6|addr|address|ip|server|client|node|peer|from|to|at|on|via|gateway|dns|listen|bind|rank|master|worker)"
)
_BEFORE = 80


def _is_address(found: re.Match[str]) -> bool:
    """Tell a machine's address in a network from a version of four numbers."""
    try:
        address = ip_address(found[0])
    except ValueError:
        return False
    if address.is_loopback or address.is_unspecified or address.is_multicast or found[0].startswith("255."):
        return False
    if address.version == 6:
        return found[0].count(":") == 7 or address.is_link_local or (address.is_private or found[0].count(":") > 2)
    start = found.start()
    before = found.string[max(0, start - _BEFORE) : start]
    if _VERSION.search(before):
        return False
    if any(address in network for network in _INSIDE):
        return True
    listed = _LISTED.search(before)
    return listed is None or _NETWORK.fullmatch(listed[1]) is not None


_PREFIXES = (
    *(
        "hf_",
        "api_org_",
        "ghp_",
        "gho_",
        "ghu_",
        "ghs_",
        "ghr_",
        "github_pat_",
        "glpat-",
        "glptt-",
        "glrt-",
        "gldt-",
        "glft-",
        "sk-",
    ),
    *("k_live_", "k_test_", "whsec_", "AKIA", "ASIA", "AROA", "AIza", "ya29.", "GOCSPX-", "xox", "xapp-", "npm_", "pypi-"),
    *("dop_v1_", "SG.", "eyJ", "Bearer ", "Basic ", "PRIVATE KEY"),
)
LOOKS = (
    Look("a secret", "<token>", _TOKENS, _PREFIXES),
    Look("a secret", "<token>", _USERINFO, ("://",)),
    Look("a secret", "<token>", _QUERY, ("?", "&")),
    Look("a secret", "<token>", _VARIABLE, ("KEY=", "TOKEN=", "SECRET=", "PASSWORD=", "PASSWD=")),
    Look("a user's directory", "~", _HOMES, ("/home/", "/Users/", ":\\", ":/")),
    Look("an e-mail address", "<email>", _MAIL, ("@",)),
    Look("a network address", "<address>", _IPV4, (".",), _is_address),
    Look("a network address", "<address>", _IPV6, (":",), _is_address),
    Look("a network address", "<address>", _MAC, (":", "-")),
)


def without(text: str) -> str:
    """Return a text with its mark for everything that is private by its look."""
    for look in LOOKS:
        pieces, at = [], 0
        for found in look.find(text):
            pieces += [text[at : found.start()], found.groupdict().get("kept", ""), look.mark]
            at = found.end()
        if pieces:
            text = "".join(pieces) + text[at:]
    return text


@functools.lru_cache(maxsize=4096)
def private(text: str) -> str | None:
    """Say what in a text is private by its look; None if nothing is."""
    return next((look.what for look in LOOKS if any(True for _ in look.find(text))), None)
