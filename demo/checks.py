"""What the demo promises, each looked up on the disk and shown."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from rich.tree import Tree

from airflow_mdbackup.scheme.files.jsonl import read_records
from airflow_mdbackup.scheme.history.changes import Change, commits
from airflow_mdbackup.scheme.index.canonical import read_entries
from airflow_mdbackup.scheme.store.mirror import Mirror
from demo.run_report import RunReport, console
from demo.scene import PROVIDER, REPOSITORY, Scene


class NotAsItShouldBe(AssertionError):
    """The disk does not show what the demo promises."""


def check(promise: str, kept: bool, evidence: str = "") -> None:
    """Print that a promise is kept.

    :raises NotAsItShouldBe: it is not.
    """
    if not kept:
        raise NotAsItShouldBe(f"Not so: {promise} {evidence}".strip())
    console.print(f"  [green]ok[/] {promise}" + (f"  [dim]{evidence}[/]" if evidence else ""))


def everything_is_backed_up(both: Scene) -> None:
    """Each file on A, and no other, is in B's index, and it is byte for byte in the mirror."""
    files = [path for path in both.source.rglob("*") if path.is_file() and not path.is_symlink()]
    same = all(_content(both.on_mirror(both.name(path))) == path.read_bytes() for path in files)
    indexed = _indexed(both) == {both.seen(both.name(path)) for path in files}
    check(f"all {len(files):,} files are in the mirror, byte for byte, and in B's index", same and indexed)


def old_version_is_kept(both: Scene, name: str, before: bytes) -> None:
    """The changed file is replaced, and what it was is a version beside it."""
    live = both.on_mirror(name)
    versions = list((live.parent / ".old").glob(f"{name}.*"))
    kept = [version.read_bytes() for version in versions] == [before]
    check(f"{name} is replaced", _content(live) == (both.source / name).read_bytes(), _shown(live))
    check("its old version is kept", kept, _shown(versions[0]) if versions else "")
    old, new = (path.read_text().splitlines()[0] for path in (versions[0], live))
    console.print(f"     first line then: {old}", markup=False)
    console.print(f"     first line now:  {new}", markup=False)


def deleted_on_provider_stays(both: Scene, name: str) -> None:
    """The file deleted on A is on B still, and has left B's index."""
    kept, forgotten = both.on_mirror(name).is_file(), both.seen(name) not in _indexed(both)
    check(f"{name}, deleted on A, is on B still, and has left B's index", kept and forgotten)


def deleted_by_hand_is_not_copied(both: Scene, name: str) -> None:
    """The file deleted by hand on B is in B's index, and so was not copied again."""
    gone, indexed = not both.on_mirror(name).exists(), both.seen(name) in _indexed(both)
    check(f"{name}, deleted by hand on B, is not copied again (B's index has it)", gone and indexed)


def moved_file_is_not_transferred(both: Scene, name: str, transferred: int, pulled: Sequence[str]) -> None:
    """The file moved on A was copied from what B had; only the files `pulled` were transferred."""
    changes = {change.path: change for change in read_records(history(both)[-1], Change)}
    outcome = changes[both.seen(name)].outcome if both.seen(name) in changes else "left alone"
    on_b = both.on_mirror(name)
    whole = _content(on_b) == (both.source / name).read_bytes()
    check(f"{name}, moved on A, was copied on B", whole and outcome == "copied", f"outcome: {outcome}")
    sizes = [(both.source / file).stat().st_size for file in pulled]
    sum_told = f"{' + '.join(map(str, sizes))} = {transferred:,} bytes, without its {on_b.stat().st_size:,}"
    check(f"only {' and '.join(pulled)} were transferred", sum(sizes) == transferred, sum_told)


def nothing_was_done(both: Scene, run: RunReport, commits_before: list[Path]) -> None:
    """The run had nothing to do, said so, and left no history."""
    said = "nothing to do" in run.log and run.summary.startswith("nothing to do")
    check("there was nothing to do, and the tasks say so", said and not run.transferred and not run.outcomes)
    check("the history has no new file", history(both) == commits_before)


def md5sum_agrees(both: Scene, without: str) -> None:
    """`md5sum -c` passes on B's index, paths made relative, without one file."""
    missing = re.escape(both.seen(without))
    index = (both.dest / "index.md5").read_bytes()
    index = re.sub(rb"^[0-9a-f]{32}  %s\n" % missing, b"", index, flags=re.MULTILINE)
    relative = re.sub(rb"^(\\?[0-9a-f]{32}  )/", rb"\1", index, flags=re.MULTILINE)
    answer = subprocess.run(
        ["md5sum", "--check", "--strict"],
        input=relative,
        capture_output=True,
        cwd=both.dest / "files",
        env=os.environ | {"LC_ALL": "C"},
    )
    passed = answer.stdout.count(b": OK\n")
    everything = not answer.returncode and passed == len(_indexed(both)) - 1
    output = f"{passed:,} files OK {answer.stderr.decode(errors='replace')}".strip()
    check("md5sum --check passes on B's index, paths made relative", everything, output)


def history(both: Scene) -> list[Path]:
    """Return the history's files, oldest first."""
    return commits(Mirror(both.dest, PROVIDER))


def show_mirror(both: Scene, notes: dict[str, str]) -> None:
    """Print the mirror around the versions, with a note for each name of `notes`."""
    tree = Tree(_shown(both.mirror), guide_style="dim")
    versions = tree.add(".old")
    for version in sorted((both.mirror / ".old").iterdir()):
        versions.add(f"{version.name}  [dim]the old version[/]")
    for name, note in sorted(notes.items()):
        tree.add(f"{name}  [dim]{note}[/]")
    live = sum(path.is_file() and ".old" not in path.parts for path in both.mirror.rglob("*"))
    tree.add(f"[dim]and {live - len(notes):,} more files[/]")
    console.print(tree)


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _indexed(both: Scene) -> set[bytes]:
    return {entry.path for entry in read_entries(both.dest / "index.md5")}


def _shown(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))
