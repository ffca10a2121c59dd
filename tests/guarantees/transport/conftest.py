"""A line to a provider over which everything comes in small portions."""

from __future__ import annotations

import os

import pytest

from airflow_mdbackup.scheme.files import syscalls as syscalls_module
from airflow_mdbackup.scheme.transfer import sftp as sftp_module
from airflow_mdbackup.scheme.transfer import sftp_handshake
from tests.guarantees.transport.line import FIRST, PORTION, SMALL, Line
from tests.pair import Pair


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small portions; and nothing waits for the disk, since no power fails here."""
    monkeypatch.setattr(sftp_module, "SMALL", SMALL)
    monkeypatch.setattr(sftp_module, "FIRST_READ", FIRST)
    monkeypatch.setattr(sftp_handshake, "_MAX_READ", PORTION)
    monkeypatch.setattr(sftp_handshake, "DEFAULT_READ", PORTION)
    monkeypatch.setattr("airflow_mdbackup.scheme.transfer.packet_stream._PAUSE", 0)
    monkeypatch.setattr(syscalls_module, "syncfs", lambda descriptor: None)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def line(pair: Pair) -> Line:
    return Line(pair)
