"""fitmatrix: which ways of loading a language model fit this machine, how well do they run, and what code does it take."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fitmatrix")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"
