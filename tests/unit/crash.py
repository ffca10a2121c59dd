"""Ends or stops a process at its n-th step that changes the disk, as a crash, a kill or a debugger would."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from airflow_mdbackup.scheme import tree

CRASHED = 9
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# What Python tells of before it is done (PEP 578). os.replace tells of os.rename.
_EVENTS = {
    *("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.utime"),
}


def crash_at(number: int, act: Callable[[], object]) -> bool:
    """Do ``act`` in a child process that ends just before its disk-changing step ``number``, from 1 on.

    What a file object has not written to the kernel by then is lost. Return whether it came to the crash.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            _count_down(number, lambda: os._exit(CRASHED))
            act()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, CRASHED), f"the step failed with status {status}"
    return status == CRASHED


def stop_at(number: int, act: Callable[[], object]) -> None:
    """Do ``act``, and have this process stopped just before its disk-changing step ``number``."""
    _count_down(number, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    act()


def _count_down(number: int, then: Callable[[], object]) -> None:
    left = number

    def step() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            then()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS or (event == "open" and arguments[2] & _WRITING):
            step()

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            step()
            return function(*arguments, **options)

        return call

    class Library:
        syncfs = staticmethod(counted(tree._libc.syncfs))
        renameat2 = staticmethod(counted(tree._libc.renameat2))

    assert isinstance(tree._libc, ctypes.CDLL)
    tree._libc = Library  # type: ignore[assignment]
    os.fsync = counted(os.fsync)
    os.write = counted(os.write)
    sys.addaudithook(hook)
