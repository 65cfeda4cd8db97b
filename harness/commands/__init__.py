"""The commands of `fitmatrix`, one module each: HELP, `add_arguments` and `run`.

All of these modules are imported to build the parser, so what is slow to import comes with `run`.
"""

from __future__ import annotations


def print_json(value: object) -> None:
    """Print records and plain values as one JSON object, in ASCII: standard output may have any encoding."""
    import json

    import msgspec

    print(json.dumps(msgspec.to_builtins(value), indent=2))
