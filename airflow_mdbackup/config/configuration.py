"""All files together: which providers are valid, and why the others are refused.

Nothing here raises for what a file says: an invalid provider is refused with a :class:`Problem`, and all
others keep their backups. Two providers that could write into one tree are both refused, since a backup
into it is dangerous whichever of them runs.
"""

from __future__ import annotations

import difflib
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable
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

_HOW_TO_BEGIN = (
    "write one, beginning with `providers: {web: {sftp_conn_id: web_backupop, source: /backups,"
    " dest: /srv/backups/web}}`, or name another file or directory by the Airflow option"
    " `[mdbackup] providers_file` (in the environment: AIRFLOW__MDBACKUP__PROVIDERS_FILE)"
)


class ConfigurationError(Exception):
    """The configuration has problems; the message tells all of them."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """The valid providers, in the order of the files, and what is wrong with the others."""

    providers: tuple[Provider, ...]
    problems: tuple[Problem, ...]

    @property
    def refused(self) -> dict[str, tuple[Problem, ...]]:
        """The problems of each refused provider, by its name.

        Left out are names that no DAG id can contain, and reserved ones, whose DAG id is not theirs.
        ``problems`` has those too.
        """
        by_name: dict[str, list[Problem]] = defaultdict(list)
        for problem in self.problems:
            name = problem.provider
            if name and re.fullmatch(r"[\w.-]{1,200}", name, re.ASCII) and not is_reserved(name):
                by_name[name].append(problem)
        return {name: tuple(problems) for name, problems in by_name.items()}


def load(path: Path) -> Configuration:
    """Read the configuration from a file, or from all ``*.yaml`` files of a directory, sorted by name.

    Whatever the files contain, and also if there are none, this returns: see ``problems`` of the result.
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
    names = None if problems else files_of.keys()  # of a file that cannot be read, they are not known
    valid: list[tuple[Path, Provider]] = []
    for definition in definitions:
        elsewhere = files_of[as_text(definition.name)] - {definition.file}
        judged = _judge(definition, names)
        if elsewhere:
            problems.append(_same_name(definition, elsewhere))
        if not isinstance(judged, Provider):
            problems += judged
        elif not elsewhere:
            valid.append((definition.file, judged))

    clashes = _clashing_destinations(valid)
    problems += clashes
    clashing = {problem.provider for problem in clashes}
    return Configuration(
        providers=tuple(provider for _, provider in valid if provider.name not in clashing),
        problems=tuple(problems),
    )


def raise_for_problems(configuration: Configuration, others: Iterable[Problem] = ()) -> None:
    """Do nothing if the configuration has no problems.

    :param others: problems that refuse no provider.
    :raises ConfigurationError: it has some; what several providers share is told once.
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
                return [], [Problem(path, None, None, f"does not exist: {_HOW_TO_BEGIN}")]
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
            Problem(path, None, None, f"is a directory without any `*.yaml` file: {_HOW_TO_BEGIN}")
        )
    return files, problems


def _judge(definition: Definition, names: Collection[str] | None) -> Provider | list[Problem]:
    """Return the provider, or all reasons why it is none.

    :param names: of all providers, also of those that are refused; None if they are not known.
    """
    file, name, keys, defaults = definition.file, definition.name, definition.keys, definition.defaults

    def problem(key: str | None, message: str) -> Problem:
        return Problem(file, as_text(name), key, message)

    problems = [problem(fault.key, fault.message) for fault in definition.faults]
    try:
        check_name(name)
    except ValueError as error:
        problems.append(problem(None, str(error)))
    if not isinstance(keys, dict):
        return [*problems, problem(None, f"must be a mapping of keys, but is {shown_value(keys)}")]

    values = {}
    for key, value in {**defaults, **keys}.items():
        where = "" if key in keys else "defaults."
        if key == "name":
            problems.append(
                problem(f"{where}name", "is not a key: the provider's name stands before its keys")
            )
        elif not isinstance(key, str):
            problems.append(problem(where.rstrip(".") or None, unknown_key(key, ())))
        else:
            values[key] = value
    try:
        provider = Provider.model_validate({**values, "name": name})
    except ValidationError as error:
        for wrong in error.errors(include_url=False):
            # The numbers are places in lists; the message shows the value itself.
            path = [part for part in wrong["loc"] if isinstance(part, str)]
            # The name has been judged above; a list whose elements are all wrong counts as empty here.
            if path == ["name"] or (wrong["type"] == "too_short" and wrong["input"]):
                continue
            where = "defaults." if path[0] in values and path[0] not in keys else ""
            problems.append(problem(where + ".".join(path), explain(wrong, path[-1], _fields(path))))
        return list(dict.fromkeys(problems))
    for key, schedule in provider.schedules.items():
        if isinstance(schedule, Assets) and names is not None:
            where = "" if key.partition(".")[0] in keys else "defaults."
            problems += [problem(f"{where}{key}", why) for why in _unknown(schedule, names)]
    return problems or provider


def _unknown(schedule: Assets, names: Collection[str]) -> list[str]:
    """Return what to say of each asset that is the backup of no provider, and so is never updated."""
    said = []
    for asset in schedule.assets:
        scheme, _, rest = asset.partition("://")
        name = rest.rstrip("/")
        if scheme.lower() != "mdbackup" or name in names:
            continue
        if similar := difflib.get_close_matches(name, names, n=1):
            how = f"did you mean {quoted(f'mdbackup://{similar[0]}')}?"
        else:
            how = f"the providers are {', '.join(map(quoted, names))}"
        said.append(f"{quoted(asset)} is the backup of no provider here, and would never come: {how}")
    return said


def _fields(path: list[str]) -> dict[str, FieldInfo]:
    """Return the fields among which the last key of ``path`` is one."""
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
    """Return one problem for each provider and each other one whose ``dest`` is its own, around or inside."""
    places = [(file, provider, os.path.realpath(provider.dest)) for file, provider in valid]
    at: dict[str, list[tuple[Path, Provider]]] = defaultdict(list)
    for file, provider, place in places:
        at[place].append((file, provider))

    problems = []

    def refuse(file: Path, provider: Provider, relation: str, other_file: Path, other: Provider) -> None:
        links = ", seen through symbolic links" if not _related_as_written(provider, other) else ""
        message = (
            f"`{provider.dest}` is {relation} `dest` of provider `{other.name}` (`{other.dest}`, in"
            f" {other_file}){links}: give each a directory of its own; until then neither is backed up"
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
