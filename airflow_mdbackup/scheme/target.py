"""Where a restore may write, when the one who asks for it must not write elsewhere.

::

    named   a directory below a base, by its whole path, by one from there, or not at all
    walked  from the base on, one directory after the other, following no symlink; what is missing is made
    looked  at what it must not touch: backups, and whatever else it is told of

What this does not give: safety from somebody who can write below the base himself, and puts a symlink there
once it was walked.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from airflow_mdbackup.scheme.errors import DestinationRefused
from airflow_mdbackup.scheme.mirror import Mirror

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def target_below(base: Path, target: str, keep_out: Iterable[Path] = (), *, make: bool = True) -> Path:
    """Return the directory that somebody names, if it is below ``base``, with all symlinks above resolved.

    :param base: an absolute path of a directory that is there.
    :param target: an absolute path, or one from ``base`` on.
    :param keep_out: directories that it must be neither within nor above.
    :param make: make the directories that are missing.
    :raises DestinationRefused: it is not below the base, leads elsewhere, or touches what it must not.
    :raises OSError: the disk is full or broken.
    """
    if not base.is_absolute() or not base.is_dir():
        raise DestinationRefused(
            f"{base} is no absolute path of a directory on this machine, below which files are restored: "
            "make it, for the user of the workers alone"
        )
    real = base.resolve(strict=True)
    parts = _parts_below(base, real, target)
    _walk(real, parts, target)
    there = real.joinpath(*parts)
    for other in [*keep_out, *(place for place in (there, *there.parents) if Mirror(place, "").is_set_up())]:
        resolved = other.resolve()
        if there.is_relative_to(resolved) or resolved.is_relative_to(there):
            raise DestinationRefused(f"{there} must be neither within nor above {other}: name another one")
    if make:
        _walk(real, parts, target, make=True)
    return there


def _parts_below(base: Path, real: Path, target: str) -> tuple[str, ...]:
    path = Path(target)
    fine = target.isprintable() and ".." not in path.parts
    for above in (base, real):
        if fine and (above / path).is_relative_to(above):
            parts = (above / path).relative_to(above).parts
            if parts:
                return parts
    raise DestinationRefused(
        f"{target!r} is not below {base}, or cannot be printed: name a directory below it, by its whole path "
        "or from there"
    )


def _walk(real: Path, parts: tuple[str, ...], target: str, *, make: bool = False) -> None:
    """Go through the directories one by one, so that none of them is a symlink; make what is missing."""
    at = os.open(real, _DIRECTORY)
    try:
        for part in parts:
            if make:
                with suppress(FileExistsError):
                    os.mkdir(part, 0o700, dir_fd=at)
            below = os.open(part, _DIRECTORY, dir_fd=at)
            os.close(at)
            at = below
    except FileNotFoundError:
        pass  # and so is what would be below it
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        raise DestinationRefused(
            f"{part!r} in {target!r} is no directory, or a symlink: name another one"
        ) from None
    finally:
        os.close(at)
