"""What is backed up: the same names and the same bytes on every machine, incompressible.

Files lie a hundred to a directory, two levels deep.

What this does not give: the shape of anybody's real data.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path

PER_DIRECTORY = 100
PER_PART = 20  # directories
LONG_AGO = 1_767_225_600  # 1 January 2026: no reader need wonder whether a file is being written
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Data:
    """A number of files, whose sizes in bytes lie between two bounds."""

    files: int
    least: int
    most: int

    def scaled(self, scale: float) -> Data:
        """Return a part of it: fewer files if they are many, else smaller ones."""
        if self.files >= PER_DIRECTORY:
            return Data(max(PER_DIRECTORY, round(self.files * scale)), self.least, self.most)
        return Data(self.files, round(self.least * scale), round(self.most * scale))

    @property
    def room(self) -> int:
        """Bytes that it takes on a disk with blocks of 4 KiB."""
        return self.files * ((self.least + self.most) // 2 + 4096)


def name(number: int) -> str:
    """Return the name of a file; ``part00000/dir00`` is the first hundred."""
    directory = number // PER_DIRECTORY
    return f"part{directory // PER_PART:05}/dir{directory % PER_PART:02}/file{number:07}"


def build(folder: Path, data: Data) -> None:
    """Make the files in the new directory ``folder``, readable by everybody."""
    chance = random.Random(1)
    for number in range(data.files):
        path = folder / name(number)
        if number % PER_DIRECTORY == 0:
            path.parent.mkdir(parents=True)
        write(path, chance, chance.randint(data.least, data.most))
        os.utime(path, (LONG_AGO, LONG_AGO))


def write(path: Path, chance: random.Random, size: int) -> None:
    """Write a file of ``size`` random bytes."""
    with path.open("wb") as file:
        for begin in range(0, size, _BLOCK):
            file.write(chance.randbytes(min(_BLOCK, size - begin)))


def measure(folder: Path) -> tuple[int, int]:
    """Return how many files there are below ``folder``, without versions, and their bytes."""
    files = size = 0
    for directory, below, names in os.walk(folder):
        if ".old" in below:
            below.remove(".old")
        files += len(names)
        size += sum(os.lstat(os.path.join(directory, name)).st_size for name in names)
    return files, size
