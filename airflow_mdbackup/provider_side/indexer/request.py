"""What to index and how: the keys and values of a JSON object, or of the command line."""

import hashlib
import json
import re
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple, Union

from airflow_mdbackup.provider_side.indexer.common import (
    MAX_NAME_BYTES,
    Failure,
    is_too_long,
    printable,
    printable_text,
)

DEFAULT_INDEX = "/.mdbackup/index.md5"
MAX_KEY_BYTES = 217  # of a build_key


class Request(NamedTuple):
    """What to index and how; `source` and `index` are paths as the backup account sees them, below `chroot`.

    `id` names the request; without one, nobody can join its build. `exclude` are gitignore patterns, `jobs`
    the number of processes (None: one per core), `nice` is added to the priority, `limit` is bytes per
    second. `rehash` is "changed", "all", or the percentage of files that each build hashes whether they
    changed or not.
    """

    chroot: bytes
    source: Tuple[bytes, ...]
    index: bytes  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    id: Optional[str] = None
    exclude: Tuple[str, ...] = ()
    jobs: Optional[int] = None
    nice: int = 0
    limit: Optional[int] = None
    rehash: Union[str, float] = "changed"
    one_file_system: bool = False


REQUIRED = ("chroot", "source", "index")


def validated(values: Any) -> Request:
    """Return the request that a JSON object describes; null means the default.

    Paths become bytes as UTF-8 with surrogateescape. Raises `Failure` for an unknown, missing or
    invalid key.
    """
    if not isinstance(values, dict):
        raise Failure("the request must be a JSON object")
    unknown = set(values) - set(Request._fields)
    missing = set(REQUIRED) - set(values)
    if unknown or missing:
        what = f"has no {sorted(missing)[0]}" if missing else f"has an unknown key {sorted(unknown)[0]!a}"
        raise Failure(printable_text(f"the request {what}; valid keys: {', '.join(Request._fields)}"))
    request = Request(
        **{
            key: VALIDATORS[key](key, values[key])
            for key in Request._fields
            if key in REQUIRED or values.get(key) is not None
        }
    )
    if len(name_beside(request, b".cache.%d.%d.tmp" % (1 << 32, 1 << 40))) > MAX_NAME_BYTES:
        shown = printable(request.index)
        raise Failure(f"index {shown} has too long a name: temporary files beside it have longer names")
    return request


def absolute_path(key: str, value: Any) -> bytes:
    if not isinstance(value, str):
        raise Failure(f"{key} must be a path, as text")
    try:
        path = value.encode("utf-8", "surrogateescape")
    except UnicodeError:
        raise Failure(f"{key} must be text that can be encoded as UTF-8 or raw bytes") from None
    if not path.startswith(b"/") or b"\0" in path:
        raise Failure(f"{key} {printable(path)} is not an absolute path")
    return path


def chroot_path(key: str, value: Any) -> bytes:
    return absolute_path(key, value).rstrip(b"/")


def path_in_chroot(key: str, value: Any) -> bytes:
    path = absolute_path(key, value)
    if any(part in (b"", b".", b"..") for part in path[1:].split(b"/")):
        raise Failure(f"{key} {printable(path)} has an empty, '.' or '..' component, remove it")
    if is_too_long(path):
        raise Failure(f"{key} {printable(path)} is too long for a path")
    return path


def source_paths(key: str, value: Any) -> Tuple[bytes, ...]:
    if not isinstance(value, list):
        raise Failure(f"{key} must be a list of paths as text")
    if not value:
        raise Failure("no source is given, name at least one directory")
    return tuple(b"/" if path == "/" else path_in_chroot(key, path) for path in value)


def patterns(key: str, value: Any) -> Tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(pattern, str) for pattern in value):
        raise Failure(f"{key} must be a list of gitignore patterns")
    return tuple(value)


def checked(is_valid: Callable[[Any], Any], expected: str) -> Callable[[str, Any], Any]:
    """Return a validator for values that are used as they are."""

    def validator(key: str, value: Any) -> Any:
        if not is_valid(value):
            raise Failure(f"{key} must be {expected}")
        return value

    return validator


def is_whole(value: Any, least: int, most: float) -> bool:
    # Not isinstance: true is no number here.
    return type(value) is int and least <= value <= most


# Each takes key and value, returns what the request holds, or raises a Failure that says what is expected.
VALIDATORS: Dict[str, Callable[[str, Any], Any]] = {
    "chroot": chroot_path,
    "source": source_paths,
    "index": path_in_chroot,
    "id": checked(
        lambda value: isinstance(value, str) and re.fullmatch("[ -~]{1,200}", value),
        "1 to 200 printable ASCII characters, or null",
    ),
    "exclude": patterns,
    "jobs": checked(lambda value: is_whole(value, 1, 1024), "a whole number from 1 to 1024"),
    "nice": checked(lambda value: is_whole(value, 0, 19), "a whole number from 0 to 19"),
    "limit": checked(
        lambda value: is_whole(value, 1, float("inf")), "a whole number of bytes per second, or null"
    ),
    "rehash": checked(
        lambda value: value in ("changed", "all") or (type(value) in (int, float) and 0 < value <= 100),
        '"changed", "all", or a percentage over 0, at most 100',
    ),
    "one_file_system": checked(lambda value: type(value) is bool, "true or false"),
}


def name_beside(request: Request, suffix: bytes) -> bytes:
    """Return the name of a file beside the index."""
    return b"." + request.index.rsplit(b"/", 1)[1] + suffix


def build_key(request: Request) -> bytes:
    """Return what identifies a build in its lock and in a request to stop it, empty if it has no id.

    It covers what is indexed, since a task may be changed before it is retried.
    """
    if request.id is None:
        return b""
    what = repr(request._replace(id=None, jobs=None, nice=0, limit=None))
    return f"{request.id} {hashlib.sha256(what.encode()).hexdigest()[:16]}".encode("ascii")


def read_json(text: bytes, what: str, encoding: str = "ascii") -> Any:
    try:
        return json.loads(text.decode(encoding))
    except (ValueError, RecursionError) as error:
        raise Failure(f"{what} is not valid JSON: {printable_text(str(error))}") from error
