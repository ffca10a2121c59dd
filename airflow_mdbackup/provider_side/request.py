"""What is to be indexed on a provider, as one line of JSON."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class IndexRequest:
    """What to index on a provider, and how.

    :param chroot: directory that the backup account sees as ``/``.
    :param source: absolute paths as the backup account sees them.
    :param index: absolute path of the index to write, as the backup account sees it.
    :param id: 1 to 200 printable ASCII characters. If a build of this very request is running already (the
        same but for jobs, nice and limit), it is joined; None: never.
    :param exclude: gitignore patterns of what need not be indexed, anchored at the backup account's ``/``.
    :param jobs: processes that hash; None: one for each core.
    :param nice: how much to lower the priority, 0 to 19.
    :param limit: bytes per second to read at most.
    :param rehash: ``"changed"``, ``"all"``, or the percent of all files, over 0 and at most 100, that each
        build hashes whether they changed or not, taking turns.
    :param one_file_system: leave out what is mounted below a source, unless that is a source itself.
    :raises ValueError: a path is not absolute or holds a NUL byte, or another value is none of these.
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
        if self.id is not None and not re.fullmatch("[ -~]{1,200}", self.id):
            raise ValueError(f"id {self.id!r} must be 1 to 200 printable ASCII characters")
        if self.jobs is not None and not 1 <= self.jobs <= 1024:
            raise ValueError(f"jobs {self.jobs!r} must be from 1 to 1024")
        if not 0 <= self.nice <= 19:
            raise ValueError(f"nice {self.nice!r} must be from 0 to 19")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit {self.limit!r} must be a number of bytes per second")
        percent = 0 if isinstance(self.rehash, str) else self.rehash
        if self.rehash not in ("changed", "all") and not 0 < percent <= 100:
            raise ValueError(
                f"rehash {self.rehash!r} must be changed, all, or percent over 0 and at most 100"
            )


def request_line(request: IndexRequest) -> bytes:
    """Return the request as a line of JSON, which is all that a forced command reads."""
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
    """Return the request that `request_line` made ``line`` of.

    :raises ValueError: it was made of something else.
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
