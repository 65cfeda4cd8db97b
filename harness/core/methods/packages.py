"""REQUIREMENTS: what quantization methods need beside torch and transformers, and in which versions transformers takes it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

# Module that is imported -> what pip is asked for. The limits are transformers 5.24's own (`utils.import_utils`), as far as it
# has any; of what needs a GPU to install, or is not on PyPI, the way that its project describes.
REQUIREMENTS: Mapping[str, str] = {
    "bitsandbytes": "bitsandbytes>=0.46.1",
    "gptqmodel": "gptqmodel>=1.4.3",
    "optimum": "optimum>=1.24.0",
    "optimum.quanto": "optimum-quanto",
    "aqlm": "aqlm[gpu,cpu]",
    "quark": "amd-quark>=0.12",
    "fouroversix": "fouroversix",
    "fp_quant": "fp_quant>=0.3.2",
    "qutlass": "git+https://github.com/IST-DASLab/qutlass",
    "kernels": "kernels>=0.18.2,<0.19.0",
    "triton": "triton>=3.4.0",
    "flute": "flute-kernel>=0.4.1",
    "fast_hadamard_transform": "fast_hadamard_transform",
    "hqq": "hqq>=0.2.1",
    "compressed_tensors": "compressed-tensors>=0.15.0",
    "fbgemm_gpu": "fbgemm-gpu",
    "torchao": "torchao>=0.15.0",
    "vptq": "vptq>=0.0.4",
    "spqr_quant": "spqr_quant[gpu]",
    "auto_round": "auto-round>=0.5.0",
    "sinq": "sinq",
    "gguf": "gguf>=0.10.0",
    "flash_attn": "flash-attn",
    "flash_attn_interface": "flash-attn-3",
    "peft": "peft>=0.20.0",
}
# What is installed with this package.
BUNDLED = ("bitsandbytes",)


def lacking(modules: Sequence[str]) -> tuple[str, ...]:
    """Return those of the modules that cannot be imported here, or are of a version that transformers does not take.

    Versions of what comes with this package are pip's business.
    """
    return tuple(module for module in modules if not (_is_here(module) and (module in BUNDLED or _is_accepted(module))))


def how_to_install(modules: Sequence[str], extra: str | None = None) -> str:
    """Name packages and the command that installs them; an extra of ours brings them all."""
    names = [pip_name(module) for module in modules]
    wanted = f"fitmatrix[{extra}]" if extra else quoted([REQUIREMENTS.get(module, module) for module in modules])
    return f"{' and '.join(names)}: pip install {wanted}"


def asked_of_pip(modules: Sequence[str]) -> list[str]:
    """Return what pip is asked for beside what comes with this package."""
    return [REQUIREMENTS.get(module, module) for module in modules if module not in BUNDLED]


def pip_name(module: str) -> str:
    """Return the name of the package that a module is in, as pip knows it."""
    return re.split(r"[\[<>=]", REQUIREMENTS.get(module, module))[0].rpartition("/")[2]


def quoted(requirements: Sequence[str]) -> str:
    """Write requirements as arguments of a shell's pip install."""
    return " ".join(f"'{one}'" if re.search(r"[<>\[]", one) else one for one in requirements)


def _is_here(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def _is_accepted(module: str) -> bool:
    """Say whether the version that is installed lies within a requirement's limits; so does what does not tell its version."""
    requirement = REQUIREMENTS.get(module, module)
    limits = re.findall(r"(>=|<)([\d.]+)", requirement)
    if not limits:
        return True
    from importlib import metadata  # slow to import, and seldom asked

    try:
        found = _numbers(metadata.version(re.split(r"[\[<>=]", requirement)[0]))
    except metadata.PackageNotFoundError:
        return True
    return all(found >= _numbers(limit) if sign == ">=" else found < _numbers(limit) for sign, limit in limits)


def _numbers(text: str) -> tuple[int, ...]:
    """Return the numbers that a version begins with: (0, 18, 2) of "0.18.2.dev1"; without zeros at its end."""
    numbers = [int(part) for part in re.match(r"\d+(?:\.\d+)*", text or "0").group().split(".")]  # type: ignore[union-attr]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)
