"""How single values are written in YAML: durations, shares, paths, schedules, patterns.

Each type takes the value that YAML read, and returns the parsed one or says what to write instead (see
:mod:`airflow_mdbackup.scheme.common.units`).
"""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Annotated, Any
from urllib.parse import urlsplit

from croniter import croniter
from pathspec import GitIgnoreSpec
from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, WithJsonSchema

from airflow_mdbackup.config.schedule import PRESETS, Assets, Timetable
from airflow_mdbackup.scheme.common.units import (
    parse_duration,
    parse_fraction,
    parse_percentage,
    parse_size,
    shortened,
    shown_value,
    write_duration,
    write_percentage,
    write_size,
)

_TEMPLATE = re.compile(r"\{[{%#]")
_TEMPLATE_START = "`{{`, `{%` or `{#`, which starts a template that Airflow would fill in"


def check_part(value: object) -> str:
    """Return a part that :func:`parse_fraction` accepts, as text.

    :raises ValueError: see there.
    """
    parse_fraction(value)
    return str(value)


def check_path(path: str) -> str:
    """Return ``path`` if it is absolute and normalized.

    :raises ValueError: it is relative, begins with ``~``, ends in a slash, has an empty, ``.``, ``..`` or
        over-long component, or contains a NUL or the start of a template.
    """
    if path == "/":
        return path
    components = path.split("/")[1:]
    if path.startswith("~"):
        wrong = "begins with `~`, which is not expanded: write the whole path, starting with `/`"
    elif not path.startswith("/"):
        wrong = "is not absolute: write the whole path, starting with `/`"
    elif "\0" in path:
        wrong = "contains a NUL character, which paths cannot"
    elif ".." in components or "." in components:
        wrong = "has `.` or `..` as a component: write the path without it"
    elif not all(components):
        wrong = "has an empty component: write single slashes, and none at the end"
    elif _TEMPLATE.search(path):
        wrong = f"has {_TEMPLATE_START}: name a directory above it"
    elif len(path.encode()) > 4096 or any(len(part.encode()) > 255 for part in components):
        wrong = "is too long: a component has at most 255 bytes, a path 4096"
    else:
        return path
    raise ValueError(f"{shortened(path)} {wrong}")


def _not_the_root(path: str) -> str:
    if path == "/":
        raise ValueError("must not be `/` itself: name something below it")
    return path


def check_schedule(value: object) -> str | Assets | Timetable | None:
    """Return a schedule: a cron expression of 5 fields, one of :data:`.schedule.PRESETS`, or None (manual).

    A mapping becomes :class:`.Assets` or a :class:`.Timetable`, which need not exist.

    :raises ValueError: it is something else, or never due.
    """
    how = "write a cron expression such as `0 3 * * *`, a preset such as '@daily' (quoted), or `null`"
    if value is None or (isinstance(value, str) and value in PRESETS):
        return value
    if isinstance(value, Assets | Timetable):
        return value
    if isinstance(value, dict):
        return _schedule_of(value)
    if not isinstance(value, str):
        raise ValueError(f"must be text, a mapping or null, but YAML reads {shown_value(value)}: {how}")
    if value.startswith("@"):
        raise ValueError(f"{shown_value(value)} is not one of the presets {', '.join(PRESETS)}")
    # A sixth field would be seconds, so a run every second, which nobody intends. `r` is a random time, a
    # different one each time the file is read.
    if len(value.split()) != 5 or "r" in re.findall("[a-z]+", value.lower()):
        raise ValueError(f"{shown_value(value)} is not a cron expression of five fields: {how}")
    try:
        croniter(value).get_next()
    except ValueError as error:
        raise ValueError(f"{shown_value(value)} is not a schedule ({error}): {how}") from error
    return value


def _schedule_of(mapping: dict[Any, Any]) -> Assets | Timetable:
    if set(mapping) == {"assets"}:
        assets = mapping["assets"]
        names = (assets,) if isinstance(assets, str) else as_tuple(assets)
        if not isinstance(names, tuple) or not names or not all(isinstance(n, str) and n for n in names):
            raise ValueError("`assets` must be a list of URIs or names: write `{assets: ['mdbackup://web']}`")
        return Assets(names)
    if "timetable" in mapping and set(mapping) <= {"timetable", "arguments"}:
        path, arguments = mapping["timetable"], mapping.get("arguments") or {}
        if (
            not isinstance(path, str)
            or not isinstance(arguments, dict)
            or not all(isinstance(name, str) for name in arguments)
        ):
            raise ValueError("`timetable` must be a dotted path, and `arguments` a mapping of names")
        return Timetable(check_dotted_path(path), arguments)
    raise ValueError(
        "as a mapping is either `{assets: [...]}` or `{timetable: package.module.Class, arguments: {...}}`"
    )


def check_dotted_path(path: str) -> str:
    """Return the dotted path of a class, such as ``package.module.Class``.

    :raises ValueError: it is not written like one. The class need not exist.
    """
    if "." not in path or not all(part.isidentifier() for part in path.split(".")):
        raise ValueError(
            f"{shortened(path)} is not the dotted path of a class: write for example"
            " `airflow.providers.slack.notifications.slack.SlackNotifier`"
        )
    return path


def check_address(address: str) -> str:
    """Return an e-mail address.

    :raises ValueError: it is not one, or contains what could start another mail header.
    """
    if not re.fullmatch(r"[^@\s<>,;]+@[^@\s<>,;]+", address):
        raise ValueError(
            f"{shortened(address)} is not an e-mail address: write it alone, such as `ops@example.org`"
        )
    return address


def check_web_address(url: str) -> str:
    """Return the URL of a web service, without a trailing slash.

    :raises ValueError: it is not one. The message omits the URL, since it is a secret.
    """
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and url.isprintable()
        fine = fine and parts.port != 0  # parts.port raises ValueError for an invalid port
    except ValueError:
        fine = False
    if not fine or " " in url or parts.query or parts.fragment:
        raise ValueError("is not the URL of a check: write it with `https://`, without `?` and `#`")
    return url.rstrip("/")


def check_pattern(pattern: str) -> str:
    """Return a gitignore pattern if it can match something.

    :raises ValueError: it is malformed, empty or a comment.
    """
    try:
        useful = any(part.include is not None for part in GitIgnoreSpec.from_lines([pattern]).patterns)
    except (ValueError, re.error) as error:
        raise ValueError(f"{shortened(pattern)} is not a gitignore pattern ({error})") from error
    if pattern.startswith("#"):
        raise ValueError(f"{shortened(pattern)} is a comment in gitignore: write `\\#` for a name with `#`")
    if _TEMPLATE.search(pattern):
        raise ValueError(f"{shortened(pattern)} has {_TEMPLATE_START}: write `[{{]` for the first brace")
    if not useful:
        raise ValueError(f"{shortened(pattern)} matches nothing: remove it, or correct it")
    return pattern


def as_tuple(value: Any) -> Any:
    """Return a list as a tuple, and anything else unchanged."""
    return tuple(value) if isinstance(value, list) else value


def _one_or_several(value: Any) -> Any:
    return (value,) if isinstance(value, str) else as_tuple(value)


# The title in the schema is what the reference page calls the value.
def _titled(title: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "title": title})


Text = Annotated[str, Field(min_length=1, max_length=250), _titled("text")]
Tag = Annotated[str, Field(min_length=1, max_length=100), _titled("text")]
AbsolutePath = Annotated[str, AfterValidator(check_path), _titled("absolute path")]
PathBelowRoot = Annotated[AbsolutePath, AfterValidator(_not_the_root), _titled("absolute path")]
Duration = Annotated[
    timedelta,
    BeforeValidator(parse_duration),
    PlainSerializer(write_duration, when_used="json"),
    _titled("duration"),
]
Size = Annotated[
    int,
    BeforeValidator(parse_size),
    PlainSerializer(write_size, when_used="json"),
    _titled("size"),
]
Share = Annotated[
    float,
    BeforeValidator(parse_percentage),
    PlainSerializer(write_percentage, when_used="json"),
    _titled("percentage, or number from 0 to 1"),
]
Part = Annotated[
    str,
    BeforeValidator(check_part),
    _titled("fraction, size, or `all`"),
]
Schedule = Annotated[
    str | Assets | Timetable | None,
    BeforeValidator(check_schedule),
    _titled("cron expression, preset, mapping or null"),
]
Pattern = Annotated[str, AfterValidator(check_pattern), _titled("gitignore pattern")]
Tags = Annotated[tuple[Tag, ...], BeforeValidator(as_tuple)]
Patterns = Annotated[tuple[Pattern, ...], BeforeValidator(as_tuple)]
Paths = Annotated[tuple[AbsolutePath, ...], BeforeValidator(_one_or_several)]
DottedPath = Annotated[str, AfterValidator(check_dotted_path), _titled("dotted path of a class")]
Address = Annotated[str, AfterValidator(check_address), _titled("e-mail address")]
Addresses = Annotated[tuple[Address, ...], BeforeValidator(_one_or_several)]
WebAddress = Annotated[str, AfterValidator(check_web_address), _titled("URL")]
