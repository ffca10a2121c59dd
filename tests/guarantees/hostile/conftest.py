"""Something outside that no attack may reach."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guarantees.hostile.attack import everything_in
from tests.pair import Pair


@pytest.fixture
def canary(pair: Pair, tmp_path: Path) -> Iterator[bytes]:
    """Something outside ``dest``, with a content that nobody else has. All outside stays as it is."""
    content = b"canary of whoever runs the backup"
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "canary").write_bytes(content)
    yield content
    assert (outside / "canary").read_bytes() == content
    assert sorted(path.name for path in outside.iterdir()) == ["canary"]
    assert content not in everything_in(pair.mirror.dest)
