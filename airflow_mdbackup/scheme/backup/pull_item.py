"""An item while it is being pulled, and the result that each answer of the provider leads to."""

from __future__ import annotations

import os
from dataclasses import dataclass

from airflow_mdbackup.scheme.backup.plan import PlanItem
from airflow_mdbackup.scheme.backup.results import Result
from airflow_mdbackup.scheme.common.units import format_size
from airflow_mdbackup.scheme.history.outcomes import Outcome
from airflow_mdbackup.scheme.transfer.partial_file import PartialFile
from airflow_mdbackup.scheme.transfer.sftp_files import Fetched
from airflow_mdbackup.scheme.transfer.sftp_packets import Attributes, Code, Refusal

_REFUSALS: dict[int, Outcome] = {
    Code.NO_SUCH_FILE: Outcome.VANISHED,
    Code.PERMISSION_DENIED: Outcome.DENIED,
}


@dataclass(slots=True, eq=False)
class Slot:
    """An item on its way to a result. Slots are completed in the order of their items.

    :ivar earlier: the result of an earlier try.
    :ivar part: the file that a large file is written to.
    :ivar first: the first transfer, if its md5 was wrong.
    :ivar outcome: the outcome if the requested attributes arrive.
    :ivar staged: attributes of the staged file with the content.
    :ivar error: why the content cannot be written to staging.
    :ivar waiting: how many bytes another task had written of it, and since when.
    :ivar probing: attributes were requested first, to open it only if it is a regular file that fits.
    """

    item: PlanItem
    earlier: Result | None
    result: Result | None = None
    part: PartialFile | None = None
    first: Fetched | None = None
    outcome: Outcome = Outcome.PULLED
    staged: os.stat_result | None = None
    error: str | None = None
    waiting: tuple[int, float] = -1, 0.0
    probing: bool = False


def succeeded(slot: Slot, attributes: Attributes | None, size: int | None) -> Result:
    """Return the result of an item whose content is staged.

    :param size: bytes of the content, which may differ from the size in the attributes.
    """
    assert attributes is not None
    item = slot.item
    found = attributes.size if size is None else size, attributes.mtime, attributes.mode
    inode, changed = (None, None) if slot.staged is None else (slot.staged.st_ino, slot.staged.st_ctime_ns)
    return Result(*(item.path, item.md5, item.replaces, slot.outcome, *found), inode=inode, changed=changed)


def failed(item: PlanItem, why: str) -> Result:
    """Return the result of an item that failed."""
    return Result(item.path, item.md5, item.replaces, Outcome.FAILED, detail=why)


def changed(item: PlanItem, why: str) -> Result:
    """Return the result of an item that changed on the provider."""
    return Result(item.path, item.md5, item.replaces, Outcome.CHANGED, detail=why)


def refused(item: PlanItem, refusal: Refusal) -> Result:
    """Return the result of an item that the server refused."""
    outcome = _REFUSALS.get(refusal.code, Outcome.FAILED)
    return Result(item.path, item.md5, item.replaces, outcome, detail=refusal.message)


def mismatched(slot: Slot, second: Fetched, provider_time: int) -> Result:
    """Return the result of an item that arrived twice with the wrong md5: changed, or corrupt.

    :param provider_time: when the provider's index was begun, in Unix seconds by its clock.
    """
    assert slot.first is not None
    found = [a for fetched in (slot.first, second) for a in (fetched.before, fetched.after) if a is not None]
    differs = len({(a.size, a.mtime) for a in found}) > 1
    is_newer = any(a.mtime is not None and a.mtime >= provider_time for a in found)
    outcome = Outcome.CHANGED if differs or is_newer else Outcome.CORRUPT
    detail = f"arrived with md5 {second.md5.decode()}, the index has {slot.item.md5.decode()}"
    return Result(slot.item.path, slot.item.md5, slot.item.replaces, outcome, detail=detail)


def why_too_large(size: int | None, max_size: int | None) -> str | None:
    """Return why a file of this size is not pulled; None if it may be."""
    if max_size is None or size is None or size <= max_size:
        return None
    return f"it has {format_size(size)}, more than the allowed {format_size(max_size)} (max_file_size)"


def why_too_long(part: PartialFile, max_size: int | None) -> str:
    """Return why a file failed that is longer than its server stated, and than there is room for."""
    why = "that max_file_size allows" if part.room == max_size else "there is room for"
    return (
        f"the server says that it has {format_size(part.size)}, but it continues past the "
        f"{format_size(part.room or 0)} {why}"
    )


def why_not_same(slot: Slot, attributes: Attributes | None, provider_time: int) -> str | None:
    """Return why local content with the md5 of a file cannot be that of the file; None if it may be.

    A file that changed since the index was built may have any size.
    """
    if attributes is None or slot.staged is None or attributes.size in (None, slot.staged.st_size):
        return None
    if attributes.mtime is None or attributes.mtime >= provider_time:
        return None
    return (
        f"it has {attributes.size:,} bytes, but the backup has {slot.staged.st_size:,} bytes with its md5: "
        "it was replaced since the index was built, or somebody has made two files with one md5"
    )
