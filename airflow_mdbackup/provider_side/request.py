"""What to index on a provider, as one line of JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class IndexRequest:
    """What to index on a provider, and how.

    :param chroot: directory that the backup account sees as ``/``.
    :param source: absolute paths as the backup account sees them.
    :param index: absolute path of the index to write, as the backup account sees it.
    :param id: 1 to 200 printable ASCII characters. If a build of the same request is running (jobs, nice and
        limit may differ), it is joined. None: never.
    :param exclude: gitignore patterns of paths to exclude, anchored at the backup account's ``/``.
    :param jobs: number of hashing processes; None: one per core.
    :param nice: how much to lower the priority, 0 to 19.
    :param limit: maximum bytes per second to read.
    :param rehash: ``"changed"``, ``"all"``, or the percentage of all files, over 0 and at most 100, that each
        build hashes in turn whether they changed or not.
    :param one_file_system: skip what is mounted below a source, unless that is a source itself.
    :raises ValueError: a path is not absolute or contains a NUL byte, or another value is invalid.
    """

    chroot: bytes
    source: tuple[bytes, ...]
    index: bytes
    id: str | None = None
    exclude: tuple[str, ...] = ()
    jobs: int | None = None
    nice: int = 0
    limit: int | None = None
    rehash: str | float = "changed"
    one_file_system: bool = False

    def __post_init__(self) -> None:
        for path in (self.chroot, *self.source, self.index):
            if not path.startswith(b"/") or b"\0" in path:
                raise ValueError(f"{path!r} must be an absolute path without NUL bytes")
        for name, (is_valid, expected) in _VALIDATORS.items():
            value = getattr(self, name)
            if not is_valid(value):
                raise ValueError(f"{name} {value!r} must be {expected}")


_VALIDATORS: dict[str, tuple[Callable[[Any], object], str]] = {
    "id": (lambda id: id is None or re.fullmatch("[ -~]{1,200}", id), "1 to 200 printable ASCII characters"),
    "jobs": (lambda jobs: jobs is None or 1 <= jobs <= 1024, "from 1 to 1024"),
    "nice": (lambda nice: 0 <= nice <= 19, "from 0 to 19"),
    "limit": (lambda limit: limit is None or limit >= 1, "a number of bytes per second"),
    "rehash": (
        lambda share: share in ("changed", "all") or (not isinstance(share, str) and 0 < share <= 100),
        "changed, all, or a percentage over 0, at most 100",
    ),
}


def request_line(request: IndexRequest) -> bytes:
    """Return the request as a line of JSON; a forced command reads nothing else."""
    wanted: dict[str, Any] = {
        "id": request.id,
        "chroot": _text(request.chroot),
        "source": [_text(path) for path in request.source],
        "index": _text(request.index),
        "exclude": list(request.exclude),
        "jobs": request.jobs,
        "nice": request.nice,
        "limit": request.limit,
        "rehash": request.rehash,
        "one_file_system": request.one_file_system,
    }
    return json.dumps(wanted).encode("ascii") + b"\n"


def read_request(line: str) -> IndexRequest:
    """Return the request from which `request_line` made ``line``.

    :raises ValueError: it is not such a line.
    """
    values = json.loads(line)
    for key in ("chroot", "index"):
        values[key] = _bytes(values[key])
    values["source"] = tuple(map(_bytes, values["source"]))
    values["exclude"] = tuple(values["exclude"])
    return IndexRequest(**values)


def _text(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
