"""Write the reference pages of configuration and operators, and the sample file, from the code.

``python -m demo.generate_docs`` writes them, ``python -m demo.generate_docs --check`` changes nothing and
exits with 1 when one of them is not what the code says.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from datetime import timedelta
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from airflow_mdbackup.config import Provider
from airflow_mdbackup.config.problem import as_yaml
from airflow_mdbackup.scheme.common.units import write_duration
from demo.operator_docs import operators_page

REPOSITORY = Path(__file__).resolve().parent.parent
REFERENCE = REPOSITORY / "docs" / "reference" / "configuration.md"
OPERATORS = REPOSITORY / "docs" / "reference" / "operators.md"
SAMPLE = REPOSITORY / "docs" / "providers.example.yaml"

_MADE_BY = (
    "Made by `python -m demo.generate_docs` from airflow_mdbackup/config/provider.py: edit that instead."
)
_OPERATORS_MADE_BY = (
    "Made by `python -m demo.generate_docs` from airflow_mdbackup/operators and docs/example_dag.py."
)
_WIDTH = 100

_INTRODUCTION = """\
# Configuration: the providers

Each provider, a server whose files are backed up, is described in a YAML file. The Airflow option
`[mdbackup] providers_file` (in the environment `AIRFLOW__MDBACKUP__PROVIDERS_FILE`) names it; without the
option it is `<AIRFLOW_HOME>/mdbackup/providers.yaml`. The option may also name a directory: then all its
`*.yaml` files are read, in the order of their names, each of the form described here. A commented sample
is [providers.example.yaml](../providers.example.yaml). The smallest useful file is

```yaml
providers:
  web:
    sftp_conn_id: web_backupop
    source: /backups
    dest: /srv/backups/web
```

## The file

| key | value |
|---|---|
| `providers` | required: a mapping from each provider's name to its keys |
| `defaults` | keys that every provider *of this file* has unless it gives them itself |

A provider's own key replaces the whole value of the default, also when that is a list or a mapping.

A provider's name is made of lowercase letters, digits, `_` and `-`, begins with a letter or digit, and has
at most 100 characters. `watchdog`, `restore`, `verify` and names that begin with `verify_` are reserved. The
provider's DAG is called `mdbackup_<name>`.

The option `[mdbackup] restore_below` (`AIRFLOW__MDBACKUP__RESTORE_BELOW`), on the workers, names the
directory below which the DAG `mdbackup_restore` may write ([how](../restore.md#in-airflow)). Not set, it
restores nothing.

## How values are written

- **duration**: numbers with units, the greater unit first: `90s`, `15m`, `1h30m`, `1.5h`, `26h`, `2d`, `8w`,
  `1y` (365 days); `m` are minutes. It is more than nothing and at most ten years.
- **rate**: bytes per second: `500KB`, `20MB`, `1.5GB`, `10MiB`; `/s` may follow. A `KB` is 1,000 bytes, a
  `KiB` 1,024. It is at least `1KB` and at most `1000GB`.
- **time of day**: `"08:00"`, in quotes (YAML reads an unquoted 18:00 as the number 1080), from `"00:00"` to
  `"23:59"`.
- **percentage**: `50%` or `12.5%`; a number from 0 to 1 (`0.5`) means the same.
- **absolute path**: begins with `/`; without `.`, `..`, doubled or trailing slashes; `~` is not expanded.
- **text** that YAML would read as something else needs quotes: `"on"`, `"no"`, `"0123"`, and whatever begins
  with `@`, `*`, `&`, `!` or `%`.
- `null` stands for "none" where a key allows it; that also takes back a default.

## When something is wrong

Unknown keys, values that do not fit, and keys given twice are refused; nothing is guessed. The message names
the file, the provider, the key, and what to write instead.

| what is wrong | what is refused |
|---|---|
| a key of a provider, or its name | that provider |
| `defaults`, or an unknown key beside `defaults` and `providers` | the providers of that file |
| a file that is no YAML, or cannot be read | the providers of that file |
| the same name in two files | all providers of that name |
| a `dest` that is the same as another one, inside or around it, also through symlinks | both providers |

All other providers keep their backups. A refused provider keeps its DAG, whose only task fails with the
message; and the file `mdbackup_config.py` shows all messages among the import errors of Airflow.
"""

_SAMPLE_HEAD = """\
# A sample of the configuration, with every key. A line that begins with `#` and a key, without a blank
# between them, shows an optional key: remove the `#` to use it. The reference is reference/configuration.md.

# Keys that every provider of this file has unless it gives them itself.
defaults:
  #tags: [backup]

providers:
  # The provider's name: its DAG is called mdbackup_web.
  web:
"""


def kind(schema: dict[str, Any]) -> str:
    """Return what values a property of a JSON schema takes, in words."""
    match schema:
        case {"anyOf": [value, {"type": "null"}]}:
            return f"{kind(value)}, or null"
        case {"enum": values}:
            return " or ".join(f"`{value}`" for value in values)
        case {"type": "array", "items": item}:
            return f"list ({kind(item)})"
        case {"type": "object", "title": title}:
            return title
        case {"type": "integer", "minimum": lowest, "maximum": highest}:
            return f"whole number, {lowest} to {highest}"
        case {"type": "integer", "minimum": lowest}:
            return f"whole number, at least {lowest}"
        case {"type": "boolean"}:
            return "`true` or `false`"
        case {"$ref": _}:
            return "mapping"
        case {"type": "string", "title": title}:
            return title
    raise ValueError(f"no words for {schema}")


def keys() -> list[tuple[str, dict[str, Any], bool]]:
    """Return name, schema and whether it is required of every key; those of a mapping follow it,
    dotted; so do those of the mappings in a list."""
    # As it is written out, so that defaults look as they do in a file.
    schema = Provider.model_json_schema(mode="serialization")
    found = []
    for name, item in schema["properties"].items():
        if name == "name":
            continue
        found.append((name, item, name in schema["required"]))
        optional = next(iter(item.get("anyOf", ())), {})
        if mapping := next(
            (of["$ref"] for of in (item, optional, item.get("items", {})) if "$ref" in of), ""
        ):
            inner = schema["$defs"][mapping.rpartition("/")[2]]
            found += [(f"{name}.{key}", value, False) for key, value in inner["properties"].items()]
    return found


def _is_mapping(schema: dict[str, Any]) -> bool:
    return any("$ref" in of for of in (schema, *schema.get("anyOf", ())))


def default_text(schema: dict[str, Any], required: bool) -> str:
    """Return what holds when the key is left out; nothing if the description says it."""
    if required:
        return "Required."
    if _is_mapping(schema) or "Default:" in schema["description"]:
        return ""
    default = schema.get("default")
    if isinstance(default, str) and re.fullmatch("P[0-9DTHMS]+", default):  # ISO 8601, beside null
        default = write_duration(TypeAdapter(timedelta).validate_python(default))
    return f"Default: {'none' if default in (None, []) else '`' + as_yaml('', default)[2:] + '`'}."


def reference() -> str:
    """Return the text of the reference page."""
    parts = [f"<!-- {_MADE_BY} -->", _INTRODUCTION, "## The keys of a provider"]
    for name, schema, required in keys():
        examples = [f"`{as_yaml(name.rpartition('.')[2], example)}`" for example in schema["examples"]]
        told = " ".join(filter(None, [schema["description"], default_text(schema, required)]))
        parts.append(f"### `{name}`")
        parts.append(f"{textwrap.fill(told, _WIDTH, break_long_words=False, break_on_hyphens=False)}")
        label = "examples" if examples[1:] else "example"
        parts.append(f"- value: {kind(schema)}\n- {label}: {', '.join(examples)}")
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def sample() -> str:
    """Return the text of the sample file, a valid configuration also without its comment marks."""
    lines = [f"# {_MADE_BY}", _SAMPLE_HEAD.rstrip("\n")]
    lists = {name for name, schema, _ in keys() if "items" in schema}
    for name, schema, required in keys():
        if name.rpartition(".")[0] in lists:  # it stands in the list's example
            continue
        indent = "      " if "." in name else "    "
        told = " ".join(filter(None, [schema["description"], default_text(schema, required)]))
        mark = f"{indent}# "
        lines.append(
            textwrap.fill(told, _WIDTH, initial_indent=mark, subsequent_indent=mark, break_on_hyphens=False)
        )
        key = name.rpartition(".")[2]
        lines += [f"{mark}Or: {as_yaml(key, example)}" for example in schema["examples"][1:]]
        shown = f"{key}:" if _is_mapping(schema) else as_yaml(key, schema["examples"][0])
        lines += [f"{indent}{'' if required else '#'}{shown}", ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Write or check the files; return the exit status."""
    parser = argparse.ArgumentParser(description="Write the generated pages of the documentation.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if they are out of date"
    )
    check = parser.parse_args(arguments).check
    status = 0
    pages = {REFERENCE: reference(), OPERATORS: operators_page(_OPERATORS_MADE_BY), SAMPLE: sample()}
    for file, text in pages.items():
        if file.exists() and file.read_text(encoding="utf-8") == text:
            continue
        if check:
            print(f"{file} is out of date: run `python -m demo.generate_docs`", file=sys.stderr)
            status = 1
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
