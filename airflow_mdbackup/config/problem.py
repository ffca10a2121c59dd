"""What is wrong in the configuration, where, and what to write instead, as a message."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from airflow_mdbackup.scheme.common.units import shown_value


class _Dumper(yaml.SafeDumper):
    """Quotes every time of day, even `08:00`, which YAML also reads as text without quotes."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"\d\d:\d\d\Z"), list("0123456789"))


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to correct. ``str()`` of it is a whole message: where, what, and what to write instead."""

    file: Path
    provider: str | None  # None: it is about the file as a whole
    key: str | None  # dotted, as `guard.share`; `defaults.retries` if it comes from the file's defaults
    message: str

    def __str__(self) -> str:
        provider = None if self.provider is None else f"provider {quoted(self.provider)}"
        key = None if self.key is None else quoted(self.key)
        return ": ".join(part for part in (str(self.file), provider, key, self.message) if part)


def quoted(name: str) -> str:
    """Return a name for a message, escaped if it would garble the message."""
    return f"`{name}`" if name.isprintable() and len(name) <= 200 else ascii(name[:200])


def as_text(key: object) -> str:
    """Return a YAML key, which need not be text, as text to show and to compare."""
    return key if isinstance(key, str) else shown_value(key)


def unknown_key(key: object, known: Collection[str]) -> str:
    """Return the message about a key that does not exist, with the most similar one that does."""
    if not isinstance(key, str):
        return f"a key must be text, but YAML reads {shown_value(key)}: put it in quotes if it is intended"
    if similar := difflib.get_close_matches(key, known, n=1):
        return f"is not a key; did you mean `{similar[0]}`?"
    return f"is not a key; the keys are `{'`, `'.join(known)}`"


def as_yaml(key: str, value: object) -> str:
    """Return ``key: value`` as in a file, on one line."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10_000, allow_unicode=True)
    return f"{key}: {text.removesuffix('...' + chr(10)).strip()}"


def explain(error: Mapping[str, Any], key: str, fields: Mapping[str, FieldInfo]) -> str:
    """Return what is wrong with a value and what to write instead.

    :param error: one of pydantic's errors, from ``ValidationError.errors()``.
    :param key: the key that it is about.
    :param fields: the fields of the mapping that has the key.
    """
    context = error.get("ctx", {})
    value = error.get("input")
    if error["type"] == "extra_forbidden":
        return unknown_key(key, [name for name in fields if name != "name"])
    if error["type"] == "invalid_key":
        return unknown_key(value, ())
    if error["type"] == "value_error":
        return str(context["error"])
    if error["type"] == "string_type" and not isinstance(value, dict | list | tuple | None):
        return f"must be text, but YAML reads {shown_value(value)}: put it in quotes"
    field = fields[key]
    example = f"write for example `{as_yaml(key, field.examples[0])}`" if field.examples else ""
    if value is None and error["type"] != "missing" and not field.is_required():
        example += ", or leave the key out"
    expected = _expected(error, context)
    if error["type"] in _WITHOUT_VALUE:
        return f"{expected}: {example}"
    return f"{expected}, but is {shown_value(value)}: {example}"


_WITHOUT_VALUE = ("missing", "string_too_short", "too_short")


def _expected(error: Mapping[str, Any], context: Mapping[str, Any]) -> str:
    texts = {
        "missing": "is missing",
        "string_type": "must be text",
        "int_type": "must be a whole number",
        "bool_type": "must be `true` or `false`",
        "tuple_type": "must be a list",
        "model_type": "must be a mapping",
        "literal_error": f"must be {context.get('expected')}",
        "greater_than_equal": f"must be at least {context.get('ge')}",
        "less_than_equal": f"must be at most {context.get('le')}",
        "string_too_short": "must not be empty",
        "string_too_long": f"must have at most {context.get('max_length')} characters",
        "too_short": "must not be empty",
    }
    return texts.get(error["type"], error["msg"])
