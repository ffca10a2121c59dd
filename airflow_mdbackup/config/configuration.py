"""All files together: which providers are valid, and why the others are refused.

Whatever a file contains, nothing here raises: an invalid provider is refused with a :class:`Problem`, and all
others are still backed up. If two providers could write into the same tree, both are refused, since either
backup would be dangerous.
"""

from __future__ import annotations

import difflib
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from airflow_mdbackup.config.problem import Problem, as_text, explain, quoted, unknown_key
from airflow_mdbackup.config.provider import Provider, check_name, is_reserved
from airflow_mdbackup.config.schedule import Assets
from airflow_mdbackup.config.yaml_file import Definition, read
from airflow_mdbackup.scheme.common.units import shown_value

_HOW_TO_START = (
    "write one, starting with `providers: {web: {sftp_conn_id: web_backupop, source: /backups,"
    " dest: /srv/backups/web}}`, or name another file or directory by the Airflow option"
    " `[mdbackup] providers_file` (in the environment: AIRFLOW__MDBACKUP__PROVIDERS_FILE)"
)


class ConfigurationError(Exception):
    """The configuration has problems; the message lists all of them."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """The valid providers, in the order of the files, and what is wrong with the others."""

    providers: tuple[Provider, ...]
    problems: tuple[Problem, ...]

    @property
    def refused(self) -> dict[str, tuple[Problem, ...]]:
        """The problems of each refused provider, by its name.

        Without names that a DAG id cannot contain, and reserved ones, whose DAG ids are taken; ``problems``
        includes those.
        """
        by_name: dict[str, list[Problem]] = defaultdict(list)
        for problem in self.problems:
            name = problem.provider
            if name and re.fullmatch(r"[\w.-]{1,200}", name, re.ASCII) and not is_reserved(name):
                by_name[name].append(problem)
        return {name: tuple(problems) for name, problems in by_name.items()}


def load(path: Path) -> Configuration:
    """Read the configuration from a file, or from all ``*.yaml`` files of a directory, sorted by name.

    Never raises, whatever the files contain, even if there are none: see ``problems`` of the result.
    """
    files, problems = _files(path)
    definitions: list[Definition] = []
    for file in files:
        found, wrong = read(file)
        definitions += found
        problems += wrong

    files_of: dict[str, set[Path]] = defaultdict(set)
    for definition in definitions:
        files_of[as_text(definition.name)].add(definition.file)
    names = None if problems else files_of.keys()  # an unreadable file may have more
    valid: list[tuple[Path, Provider]] = []
    for definition in definitions:
        elsewhere = files_of[as_text(definition.name)] - {definition.file}
        validated = _validate(definition, names)
        if elsewhere:
            problems.append(_same_name(definition, elsewhere))
        if not isinstance(validated, Provider):
            problems += validated
        elif not elsewhere:
            valid.append((definition.file, validated))

    clashes = _clashing_destinations(valid)
    problems += clashes
    clashing = {problem.provider for problem in clashes}
    return Configuration(
        providers=tuple(provider for _, provider in valid if provider.name not in clashing),
        problems=tuple(problems),
    )


def raise_for_problems(configuration: Configuration, others: Iterable[Problem] = ()) -> None:
    """Raise an error if the configuration has problems.

    :param others: problems because of which no provider is refused.
    :raises ConfigurationError: it has some; a problem that several providers share is listed once.
    """
    problems = [*configuration.problems, *others]
    if not problems:
        return
    providers_of: dict[tuple[Path, str | None, str], list[str | None]] = defaultdict(list)
    for problem in problems:
        providers_of[problem.file, problem.key, problem.message].append(problem.provider)
    texts = []
    for (file, key, message), providers in providers_of.items():
        text = str(Problem(file, providers[0], key, message))
        if len(providers) > 1:
            text += f" (and the same for {', '.join(quoted(str(name)) for name in providers[1:])})"
        texts.append(text)
    count = len(texts)
    heading = f"{count} problem{'s' * (count > 1)} in the configuration of the backups:"
    raise ConfigurationError("\n- ".join([heading, *texts]))


def _files(path: Path) -> tuple[list[Path], list[Problem]]:
    try:
        if not path.is_dir():
            if not path.exists():
                return [], [Problem(path, None, None, f"does not exist: {_HOW_TO_START}")]
            return [path], []
        visible = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    except OSError as error:
        return [], [
            Problem(path, None, None, f"cannot be read ({error.strerror}): correct its owner or mode")
        ]
    problems = [
        Problem(file, None, None, "is not read, since its name does not end in `.yaml`: rename it")
        for file in visible
        if file.suffix == ".yml"
    ]
    files = [file for file in visible if file.suffix == ".yaml"]
    if not files:
        problems.append(
            Problem(path, None, None, f"is a directory without any `*.yaml` file: {_HOW_TO_START}")
        )
    return files, problems


def _validate(definition: Definition, names: Collection[str] | None) -> Provider | list[Problem]:
    """Return the provider, or all reasons why it is invalid.

    :param names: of all providers, including invalid ones; None if they are not known.
    """
    keys, problems = _merge_keys(definition)
    try:
        provider = Provider.model_validate({**keys, "name": definition.name})
    except ValidationError as error:
        if isinstance(definition.keys, dict):
            problems += _explain_errors(definition, error)
        return list(dict.fromkeys(problems))
    if names is not None:
        for key, schedule in provider.schedules.items():
            if isinstance(schedule, Assets):
                dotted = _dotted(definition, key.split("."))
                problems += [_problem(definition, dotted, why) for why in _unknown_assets(schedule, names)]
    return problems or provider


def _problem(definition: Definition, key: str | None, message: str) -> Problem:
    return Problem(definition.file, as_text(definition.name), key, message)


def _dotted(definition: Definition, path: list[str]) -> str:
    """Return a key as messages name it: below ``defaults`` if it comes from there."""
    own = isinstance(definition.keys, dict) and path[0] in definition.keys
    return ".".join(path if own or path[0] not in definition.defaults else ["defaults", *path])


def _merge_keys(definition: Definition) -> tuple[dict[str, object], list[Problem]]:
    """Return a provider's keys, over the defaults of its file, and what is wrong with them or its name."""
    problems = [_problem(definition, fault.key, fault.message) for fault in definition.faults]
    try:
        check_name(definition.name)
    except ValueError as error:
        problems.append(_problem(definition, None, str(error)))
    if not isinstance(definition.keys, dict):
        wrong = f"must be a mapping of keys, but is {shown_value(definition.keys)}"
        return {}, [*problems, _problem(definition, None, wrong)]
    merged: dict[str, object] = {}
    for key, value in {**definition.defaults, **definition.keys}.items():
        if key == "name":
            wrong = "is not a key: the provider's name stands before its keys"
            problems.append(_problem(definition, _dotted(definition, ["name"]), wrong))
        elif not isinstance(key, str):
            where = None if key in definition.keys else "defaults"
            problems.append(_problem(definition, where, unknown_key(key, ())))
        else:
            merged[key] = value
    return merged, problems


def _explain_errors(definition: Definition, error: ValidationError) -> Iterator[Problem]:
    for wrong in error.errors(include_url=False):
        # Numbers are positions in lists; the message shows the value itself.
        path = [part for part in wrong["loc"] if isinstance(part, str)]
        # The name has been checked; a list whose elements are all wrong counts as empty here.
        if path == ["name"] or (wrong["type"] == "too_short" and wrong["input"]):
            continue
        yield _problem(definition, _dotted(definition, path), explain(wrong, path[-1], _fields(path)))


def _unknown_assets(schedule: Assets, names: Collection[str]) -> list[str]:
    """Return a message for each asset that is no provider's backup, and so is never updated."""
    messages = []
    for asset in schedule.assets:
        scheme, _, rest = asset.partition("://")
        name = rest.rstrip("/")
        if scheme.lower() != "mdbackup" or name in names:
            continue
        if similar := difflib.get_close_matches(name, names, n=1):
            how = f"did you mean {quoted(f'mdbackup://{similar[0]}')}?"
        else:
            how = f"the providers are {', '.join(map(quoted, names))}"
        messages.append(f"{quoted(asset)} is not the backup of a provider here, and is never updated: {how}")
    return messages


def _fields(path: list[str]) -> dict[str, FieldInfo]:
    """Return the fields of the mapping that has the last key of ``path``."""
    if len(path) == 1:
        return Provider.model_fields
    kind: Any = Provider.model_fields[path[0]].annotation
    mapping: type[BaseModel] = next(iter(get_args(kind)), kind)  # of a list, that of its elements
    return mapping.model_fields


def _same_name(definition: Definition, elsewhere: Iterable[Path]) -> Problem:
    others = ", ".join(str(file) for file in sorted(elsewhere))
    message = f"a provider of this name is also in {others}: rename one; until then none of them is backed up"
    return Problem(definition.file, as_text(definition.name), None, message)


def _clashing_destinations(valid: Iterable[tuple[Path, Provider]]) -> list[Problem]:
    """Return a problem for each provider and each other one whose ``dest`` is the same, around or inside."""
    places = [(file, provider, os.path.realpath(provider.dest)) for file, provider in valid]
    at: dict[str, list[tuple[Path, Provider]]] = defaultdict(list)
    for file, provider, place in places:
        at[place].append((file, provider))

    problems = []

    def refuse(file: Path, provider: Provider, relation: str, other_file: Path, other: Provider) -> None:
        links = ", seen through symbolic links" if not _related_as_written(provider, other) else ""
        message = (
            f"`{provider.dest}` is {relation} `dest` of provider `{other.name}` (`{other.dest}`, in"
            f" {other_file}){links}: give each its own directory; until then neither is backed up"
        )
        problems.append(Problem(file, provider.name, "dest", message))

    for file, provider, place in places:
        for other_file, other in at[place]:
            if other is not provider:
                refuse(file, provider, "the same as", other_file, other)
        above = place
        while above != "/":
            above = os.path.dirname(above)
            for other_file, other in at.get(above, ()):
                refuse(file, provider, "inside", other_file, other)
                refuse(other_file, other, "around", file, provider)
    return problems


def _related_as_written(one: Provider, other: Provider) -> bool:
    return os.path.commonpath([one.dest, other.dest]) in (one.dest, other.dest)
