"""A request from a configuration file, which decides; what B asks for gives it an id and no more."""

import errno
import os
import stat
from typing import Any, Iterator, List, Tuple

from airflow_mdbackup.provider_side.indexer.common import Failure, printable, reason_of
from airflow_mdbackup.provider_side.indexer.request import VALIDATORS, Request, read_json, validated

MAX_CONFIG_BYTES = 1 << 20
MAX_SYMLINKS = 40


def read_config(path: bytes) -> Request:
    """Read a request from a file that only root and this account can have written."""
    shown = f"the configuration {printable(path)}"
    try:
        checks = list(traversed(path))
        with open(path, "rb") as stream:
            checks.append((path, os.fstat(stream.fileno())))
            text = stream.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise Failure(f"{shown} cannot be read: {reason_of(error)}") from error
    if not stat.S_ISREG(checks[-1][1].st_mode):
        raise Failure(f"{shown} is not a regular file")
    for place, status in checks:
        if is_writable_by_others(status):
            raise Failure(
                f"{shown} is not used, because others than root can write {printable(place)}: change its"
                " owner and mode (chown root, chmod go-w)"
            )
    if len(text) > MAX_CONFIG_BYTES:
        raise Failure(f"{shown} is longer than 1 MiB")
    values = read_json(text, shown, "utf-8")
    if isinstance(values, dict) and "id" in values:
        raise Failure(f"{shown} has an id, which only a request can have")
    try:
        return validated(values)
    except Failure as failure:
        raise Failure(f"{shown}: {failure}") from failure


def is_writable_by_others(status: os.stat_result) -> bool:
    """Whether anybody but root and this account could replace a file, directory or symlink."""
    # In a directory like /tmp others may write, but cannot replace what is not theirs.
    sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
    writable = status.st_mode & 0o022 and not sticky and not stat.S_ISLNK(status.st_mode)
    return status.st_uid not in (0, os.geteuid()) or bool(writable)


def traversed(path: bytes) -> Iterator[Tuple[bytes, os.stat_result]]:
    """Yield each directory and symlink on the way to a file, and the file, each with its status."""
    at = b"/"
    yield at, os.lstat(at)
    parts = os.path.join(os.getcwdb(), path).split(b"/")
    links = 0
    while parts:
        part = parts.pop(0)
        if part == b"..":
            at = os.path.dirname(at)
        elif part not in (b"", b"."):
            place = os.path.join(at, part)
            status = os.lstat(place)
            yield place, status
            if not stat.S_ISLNK(status.st_mode):
                at = place
                continue
            links += 1
            if links > MAX_SYMLINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            target = os.readlink(place)
            at = b"/" if target.startswith(b"/") else at
            parts = target.split(b"/") + parts


def with_id_of(asked: Any, path: bytes, config: Request) -> Tuple[Request, List[str]]:
    """Return the configured request with the id that B asked for, and notes on the keys that differ."""
    if not isinstance(asked, dict):
        raise Failure("the request must be a JSON object")

    def text(value: bytes) -> str:
        return value.decode("utf-8", "surrogateescape")

    configured_values = {
        "source": [text(source) for source in config.source],
        "index": text(config.index),
        "exclude": list(config.exclude),
    }
    notes = [
        f"{key} differs from the request, the provider's {printable(path)} decides"
        for key, value in configured_values.items()
        if asked.get(key, value) != value
    ]
    name = asked.get("id")
    return config._replace(id=None if name is None else VALIDATORS["id"]("id", name)), notes
