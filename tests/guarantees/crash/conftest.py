"""File systems that tests of crashes run on."""

from __future__ import annotations

import ctypes
import errno
import os

import pytest

from airflow_mdbackup.scheme.files import syscalls as syscalls_module


@pytest.fixture
def disk_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for the real disk, which a killed process or a :class:`PowerCut` has nothing to do with."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(syscalls_module._libc, "syncfs", lambda descriptor: 0)


@pytest.fixture
def no_noreplace(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        ctypes.set_errno(errno.EINVAL)
        return -1

    monkeypatch.setattr(syscalls_module._libc, "renameat2", refuse)
