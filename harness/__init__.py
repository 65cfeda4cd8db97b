"""fitmatrix: which ways of loading a language model fit this machine, how well do they run, and what code does it take."""


def __getattr__(name: str) -> str:
    """Look the version up when it is asked for: importlib.metadata takes longer to import than the rest of a command."""
    if name != "__version__":
        raise AttributeError(name)
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fitmatrix")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0.0.0"
