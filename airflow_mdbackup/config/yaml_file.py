"""One YAML file, read strictly: what it says of each provider, and each fault with its line.

PyYAML keeps the last of two equal keys without a word, so a copied provider that was not renamed would
silently replace the other one. Here the tree of the file is searched for such keys before Python objects
are made of it, so that the fault is told for the provider in which it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from yaml.reader import Reader

from airflow_mdbackup.config.problem import Problem, as_text, unknown_key
from airflow_mdbackup.scheme.common.units import shown_value

try:
    from yaml import CSafeLoader as SafeLoader
except ImportError:  # PyYAML was built without libyaml; ten times slower, and the same otherwise
    from yaml import SafeLoader  # type: ignore[assignment]

_TOP_LEVEL = ("defaults", "providers")
# providers, their names, their keys, the keys of a mapping there or of those in a list there: below is
# nothing that a provider may have.
_DEEPEST_KEY = 4
_DEEPEST_TREE = 50

_QUOTES = "; text that begins with `@`, `*`, `&`, `!`, `%` or `{` needs quotes"
_HINTS = {
    "an alias": _QUOTES,
    "cannot start any token": f"{_QUOTES}, and tabs do not indent",
    "unhashable key": _QUOTES,
}


class _Loader(SafeLoader):
    """Knows no dates: no key has one, and an impossible one (`2026-13-45`) is refused for the whole file."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - the name and the type are PyYAML's
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in SafeLoader.yaml_implicit_resolvers.items()
    }


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that refuses a provider whatever its values are."""

    key: str | None
    message: str


@dataclass(frozen=True, slots=True)
class Definition:
    """What a file says of one provider, not judged yet."""

    file: Path
    name: object  # a key of YAML, which need not be text
    keys: object  # what stands there: a mapping, if all is well
    defaults: dict[Any, object]
    faults: tuple[Fault, ...]


def read(file: Path) -> tuple[list[Definition], list[Problem]]:
    """Return the definitions in a file, in its order, and what is wrong with the file as a whole.

    A fault in what all providers of the file share (its top level, its defaults) is a fault of each of
    them: which settings were meant is not known. Never raises.
    """
    try:
        tree, twice = _parse(file)
    except (OSError, yaml.YAMLError, ValueError) as error:
        return [], [Problem(file, None, None, _unreadable(error))]
    except Exception as error:  # PyYAML lets out any other when an explicit tag does not suit its value
        message = (
            f"is not valid YAML: remove explicit tags, such as `!!int` ({type(error).__name__}: {error})"
        )
        return [], [Problem(file, None, None, message)]

    if not isinstance(tree, dict):
        message = f"must be a mapping with the key `providers`, but holds {shown_value(tree)}"
        return [], [Problem(file, None, None, message)]
    shared = [Fault(as_text(key), unknown_key(key, _TOP_LEVEL)) for key in tree if key not in _TOP_LEVEL]
    shared += [Fault(".".join(path), text) for path, text in twice if path[0] == "defaults" or len(path) == 1]
    defaults = {} if tree.get("defaults") is None else tree["defaults"]
    if not isinstance(defaults, dict):
        shared.append(Fault("defaults", f"must be a mapping, but is {shown_value(defaults)}"))
        defaults = {}
    providers = tree.get("providers")
    if not isinstance(providers, dict):
        found = f"is {shown_value(providers)}" if "providers" in tree else "is missing"
        how = "write the providers as a mapping, name by name, or `providers: {}` if there are none"
        shared.append(Fault("providers", f"{found}: {how}"))
        providers = {}

    definitions = []
    for name, keys in providers.items():
        own = [
            Fault(".".join(path[2:]) or None, text) for path, text in twice if path[:2] == ("providers", name)
        ]
        definitions.append(Definition(file, name, keys, defaults, (*shared, *own)))
    without_provider = (
        [] if definitions else [Problem(file, None, fault.key, fault.message) for fault in shared]
    )
    return definitions, without_provider


def _parse(file: Path) -> tuple[object, list[tuple[tuple[str, ...], str]]]:
    text = file.read_bytes().decode()
    _refuse_control_characters(text)
    _refuse_deep_nesting(text)
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return None, []
        # First, since constructing mixes the keys that `<<` brings into the tree.
        twice = list(_keys_given_twice(root))
        return loader.construct_document(root), twice
    finally:
        loader.dispose()


def _refuse_control_characters(text: str) -> None:
    # PyYAML does that too, but tells no line.
    if odd := Reader.NON_PRINTABLE.search(text):
        before = text[: odd.start()]
        mark = yaml.Mark("", odd.start(), before.count("\n"), len(before) - before.rfind("\n") - 1, None, 0)
        raise yaml.MarkedYAMLError(problem=f"the control character {odd[0]!a}", problem_mark=mark)


def _refuse_deep_nesting(text: str) -> None:
    # libyaml builds its tree by recursion in C: without this, a hundred thousand brackets end the process.
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST_TREE:
            message = "more brackets or levels than any provider needs"
            raise yaml.MarkedYAMLError(None, None, message, event.start_mark)  # type: ignore[arg-type]


def _keys_given_twice(node: yaml.Node, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
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


def _unreadable(error: Exception) -> str:
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
