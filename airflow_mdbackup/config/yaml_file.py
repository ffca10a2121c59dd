"""One YAML file, read strictly: the keys of each provider, and each fault with its line.

PyYAML silently keeps the last of two equal keys, so a copied provider that was not renamed would replace the
original. Here the file's node tree is searched for such keys before Python objects are made of it, so that
the fault is reported for the right provider.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from airflow_mdbackup.config.problem import Problem, as_text, unknown_key
from airflow_mdbackup.scheme.common.units import shown_value

try:
    from yaml import CSafeLoader as SafeLoader
except ImportError:  # PyYAML was built without libyaml; ten times slower, and the same otherwise
    from yaml import SafeLoader  # type: ignore[assignment]

_TOP_LEVEL = ("defaults", "providers")
# providers, their names, their keys, and the keys of mappings or of lists of mappings; a provider has no
# deeper keys.
_DEEPEST_KEY = 4
_DEEPEST_TREE = 50

_QUOTES = "; text that begins with `@`, `*`, `&`, `!`, `%` or `{` needs quotes"
_HINTS = {
    "an alias": _QUOTES,
    "cannot start any token": f"{_QUOTES}, and tabs do not indent",
    "unhashable key": _QUOTES,
}


_Duplicate = tuple[tuple[str, ...], str]
"""The path of a key that is given twice, and the message."""


class _Loader(SafeLoader):
    """Reads no dates: no key is a date, and an invalid one (`2026-13-45`) would refuse the whole file."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - the name and the type are PyYAML's
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in SafeLoader.yaml_implicit_resolvers.items()
    }


@dataclass(frozen=True, slots=True)
class Fault:
    """Something because of which a provider is refused, whatever its values are."""

    key: str | None
    message: str


@dataclass(frozen=True, slots=True)
class Definition:
    """What a file says about one provider, not validated yet."""

    file: Path
    name: object  # a YAML key, which need not be text
    keys: object  # a mapping, if it is valid
    defaults: dict[Any, object]
    faults: tuple[Fault, ...]


def read(file: Path) -> tuple[list[Definition], list[Problem]]:
    """Return the definitions in a file, in its order, and what is wrong with the file as a whole.

    A fault in what all providers of the file share (its top level, its defaults) counts as a fault of each of
    them, since it is not known which keys were intended. Never raises.
    """
    try:
        tree, twice = _parse(file)
    except (OSError, yaml.YAMLError, ValueError) as error:
        return [], [Problem(file, None, None, _explain(error))]
    except Exception as error:  # PyYAML lets out any other if an explicit tag does not suit its value
        message = (
            f"is not valid YAML: remove explicit tags, such as `!!int` ({type(error).__name__}: {error})"
        )
        return [], [Problem(file, None, None, message)]
    if not isinstance(tree, dict):
        message = f"must be a mapping with the key `providers`, but holds {shown_value(tree)}"
        return [], [Problem(file, None, None, message)]

    defaults, providers, shared = _top_level(tree, twice)
    definitions = []
    for name, keys in providers.items():
        own = [
            Fault(".".join(path[2:]) or None, text) for path, text in twice if path[:2] == ("providers", name)
        ]
        definitions.append(Definition(file, name, keys, defaults, (*shared, *own)))
    problems = [] if definitions else [Problem(file, None, fault.key, fault.message) for fault in shared]
    return definitions, problems


def _top_level(
    tree: dict[Any, Any], twice: list[_Duplicate]
) -> tuple[dict[Any, object], dict[Any, object], list[Fault]]:
    """Return the defaults and providers of a file, and the faults that all of its providers share."""
    faults = [Fault(as_text(key), unknown_key(key, _TOP_LEVEL)) for key in tree if key not in _TOP_LEVEL]
    faults += [Fault(".".join(path), text) for path, text in twice if path[0] == "defaults" or len(path) == 1]
    defaults = {} if tree.get("defaults") is None else tree["defaults"]
    if not isinstance(defaults, dict):
        faults.append(Fault("defaults", f"must be a mapping, but is {shown_value(defaults)}"))
        defaults = {}
    providers = tree.get("providers")
    if not isinstance(providers, dict):
        found = f"is {shown_value(providers)}" if "providers" in tree else "is missing"
        how = "write the providers as a mapping, name by name, or `providers: {}` if there are none"
        faults.append(Fault("providers", f"{found}: {how}"))
        providers = {}
    return defaults, providers, faults


def _parse(file: Path) -> tuple[object, list[_Duplicate]]:
    text = file.read_bytes().decode()
    _check_depth(text)
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None, []
        # First, since construction merges the keys of `<<` into the tree.
        twice = list(_keys_given_twice(root))
        return loader.construct_document(root), twice
    finally:
        loader.dispose()


def _check_depth(text: str) -> None:
    """Refuse deep nesting: libyaml recurses in C, and some 30,000 brackets end the process."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST_TREE:
            message = "nested more deeply than any provider needs"
            raise yaml.MarkedYAMLError(None, None, message, event.start_mark)  # type: ignore[arg-type]


def _keys_given_twice(node: yaml.Node, path: tuple[str, ...] = ()) -> Iterator[_Duplicate]:
    if not isinstance(node, yaml.MappingNode) or len(path) == _DEEPEST_KEY:
        return
    lines: dict[tuple[str, str], int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        here = (*path, key.value)
        line = key.start_mark.line + 1
        if first := lines.get((key.tag, key.value)):
            where = f"lines {first} and {line}" if first != line else f"line {line}"
            yield here, f"is given twice, on {where}: remove or rename one of them"
        lines[key.tag, key.value] = line
        for inner in value.value if isinstance(value, yaml.SequenceNode) else [value]:
            yield from _keys_given_twice(inner, here)


def _explain(error: Exception) -> str:
    match error:
        case OSError():
            return f"cannot be read ({error.strerror}): correct its path, owner or mode"
        case UnicodeDecodeError():
            line = error.object.count(b"\n", 0, error.start) + 1
            return f"line {line}: is not UTF-8 text: save the file as UTF-8"
        case yaml.MarkedYAMLError():
            mark = error.problem_mark or error.context_mark
            place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
            said = ", ".join(filter(None, [error.context, error.problem]))
            hint = next((hint for sign, hint in _HINTS.items() if sign in said), "")
            return f"{place}is not valid YAML: {said}{hint}"
    return f"is not valid YAML: {' '.join(str(error).split())}"
