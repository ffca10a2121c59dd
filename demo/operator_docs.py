"""The reference page of the operators, from their docstrings and signatures."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

from airflow_mdbackup import operators

EXAMPLE = Path(__file__).resolve().parent.parent / "docs" / "example_dag.py"

_STEPS = [
    operators.BuildProviderIndex,
    operators.FetchIndex,
    operators.DiffIndexes,
    operators.ApproveChanges,
    operators.PullChanged,
    operators.ArchiveOld,
    operators.CommitBackup,
    operators.AuditProvider,
    operators.VerifyMirror,
    operators.RestoreFiles,
    operators.WatchBackup,
]

_INTRODUCTION = """\
# The operators

`from airflow_mdbackup.operators import ...`. The DAGs of `dags/mdbackup.py` consist of these, and you can
wire them yourself. All parameters are keyword-only; those marked *templated* are rendered by Airflow.
Every step keeps the state of its run below `dest`, so all except `BuildProviderIndex` must run where `dest`
is, and a retried or cleared task continues from there. XComs are only small summaries. `VerifyMirror` and
`RestoreFiles` are not steps of a backup, and run where `dest` is; `AuditProvider` and `WatchBackup` are not
either, and run anywhere.

Pass `RETRY_POLICY` as `retry_policy`: then errors that a retry cannot fix (a refused key, a damaged index, a
tripped guard) fail at once. Put `ArchiveOld` and `CommitBackup` after the plan *and* after a join that waits
for all shards, including failed ones, so that what could be pulled is committed; `CommitBackup` then fails if
anything is missing.
"""


def operators_page(made_by: str) -> str:
    """Return the text of the page."""
    parts = [f"<!-- {made_by} -->", _INTRODUCTION]
    parts += [_section(step) for step in _STEPS]
    parts.append(
        f"## A DAG made by hand\n\n[docs/example_dag.py](../example_dag.py):\n\n```python\n{_code()}```"
    )
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _code() -> str:
    return EXAMPLE.read_text(encoding="utf-8").partition('"""\n\n')[2]


def _section(step: Any) -> str:
    text = re.sub(r":\w+:`[^`]*?([\w.]+)`", r"`\1`", inspect.getdoc(step) or "").replace("``", "`")
    about, *described = re.split(r"^:param ", text, flags=re.MULTILINE)
    rows = [_row(step, *entry.split(":", 1)) for entry in described]
    table = "\n".join(["| parameter | default | |", "|---|---|---|", *rows])
    return f"## {step.__name__}\n\n{about.strip()}\n\n{table}"


def _row(step: Any, name: str, about: str) -> str:
    templated = " *Templated.*" if name in step.template_fields else ""
    return f"| `{name}` | {_default(step, name)} | {' '.join(about.split())}{templated} |"


def _default(step: Any, name: str) -> str:
    for kind in step.__mro__:
        # Airflow wraps each operator's own __init__.
        own = kind.__dict__.get("__init__")
        parameter = own and inspect.signature(own).parameters.get(name)
        if parameter:
            required = parameter.default is inspect.Parameter.empty
            return "required" if required else f"`{_shown(parameter.default)}`"
    raise LookupError(f"{step.__name__} has no parameter {name}")


def _shown(value: Any) -> str:
    return repr(value).replace("datetime.timedelta", "timedelta")
