"""What a verification finds, and damage for it."""

from __future__ import annotations

import os
from pathlib import Path

from airflow_mdbackup.scheme.history.timeline import Timeline
from airflow_mdbackup.scheme.recovery.verify import VerifyOutcome, unknown_files, verify
from tests.pair import Pair


def found_in(pair: Pair) -> dict[bytes, str]:
    """Verify all, and return what is not sound, by its place."""
    with Timeline(pair.mirror) as past:
        every = [*verify(pair.mirror, past, past.contents()), *unknown_files(pair.mirror, past)]
    return {each.place: each.outcome.value for each in every if each.outcome != VerifyOutcome.SOUND}


def rot(file: Path) -> None:
    """Change a bit, as a bad disk does: size and time stay."""
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
