"""Files that an old site spares a new one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Old:
    """The site that a new one takes the place of, whose files are taken where they would be the same; None if there is none."""

    place: Path | None = None

    def has_all(self, files: Mapping[str, int]) -> bool:
        """Tell whether the old site has these files, as large as they were."""
        if self.place is None:
            return False
        old = str(self.place)  # of a hundred thousand files each path object counts
        try:
            return all(os.stat(f"{old}/{name}").st_size == size for name, size in files.items())  # noqa: PTH116
        except OSError:
            return False

    def take(self, files: Mapping[str, int], folder: Path) -> bool:
        """Put files of the old site, given with their sizes, into a new one; tell whether all are there, as large as they were."""
        if not self.has_all(files):
            return False
        for name in files:
            self.lend(name, folder)
        return True

    def lend(self, name: str, folder: Path) -> None:
        """Give a file of the old site a second name in a new one, or copy it where the file system has no such names.

        Raises:
            OSError: it is not there, or one of its name is in the new one.
        """
        old, new = f"{self.place}/{name}", f"{folder}/{name}"
        try:
            os.link(old, new)
        except FileExistsError:
            raise
        except OSError:
            shutil.copyfile(old, new)
