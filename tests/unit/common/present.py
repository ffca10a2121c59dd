"""The moment that tests take for the present."""

from __future__ import annotations

from datetime import UTC, datetime

NOW = datetime(2026, 11, 28, 15, 30, tzinfo=UTC)
