"""A paramiko connection whose server can fill neither our memory nor the task's log.

paramiko grants a server a window and takes whatever comes; it reads packets and greetings of any size, and as
many items as a message says that it has; and it logs each message that it does not know. Here each of these
ends the connection with :class:`Overrun`::

    more data on a channel than its window has left           RFC 4254, section 5.2
    a packet, or lines before the version, that are too large RFC 4253, sections 4.2 and 6.1; OpenSSH's limits
    a message that counts more items than it holds            paramiko reads zeros past its end
    more to log than a server has to say

Compression is not asked for, so that no packet is larger than it was on the line.

What this does not give: a server may keep the processor busy with messages that mean nothing, until the
caller's patience ends.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import paramiko
from paramiko.common import MSG_CHANNEL_DATA, MSG_CHANNEL_EXTENDED_DATA

_PACKET = (256 << 10) + 1024  # bytes; we ask for at most 32 KiB of data in one
_PAST_END = 100  # fields that may be read past the end of a message; of one that lacks its last, a few are
_GREETING = 64 << 10  # bytes before the server's version
_LINES = 100  # that one connection may log; an honest one has a handful, an audit some dozens
_STDERR = 1


class Overrun(paramiko.SSHException):
    """The server sent more than it may, which has ended the connection."""


class _Message(paramiko.Message):
    _past_end = 0

    def get_bytes(self, n: int) -> bytes:
        at = self.packet.tell()
        data = super().get_bytes(n)
        if self.packet.tell() < at + n:
            self._past_end += 1
            if self._past_end > _PAST_END:
                raise Overrun("the server sent a message that counts more items than it holds")
        return data


class _Packetizer(paramiko.Packetizer):  # type: ignore[name-defined]
    _greeting = 0

    def read_message(self) -> tuple[int, paramiko.Message]:
        kind, message = super().read_message()
        message.__class__ = _Message
        return kind, message

    def read_all(self, n: int, check_rekey: bool = False) -> Any:
        if n > _PACKET:
            raise Overrun(f"the server sent a packet of {n:,} bytes, more than SSH allows")
        return super().read_all(n, check_rekey)

    def _read_timeout(self, timeout: float) -> Any:
        data = super()._read_timeout(timeout)
        self._greeting += len(data)
        if self._greeting > _GREETING:
            raise Overrun(f"the server sent {self._greeting:,} bytes and no version of SSH")
        return data


def _feed(channel: Any, message: paramiko.Message) -> None:
    """Take in data as ``Channel._feed`` does, if the window has room for them."""
    data = message.get_binary()
    _check_window(channel, len(data))
    channel._feed(data)


def _feed_extended(channel: Any, message: paramiko.Message) -> None:
    """Take in standard error, likewise. paramiko would log each message of any other kind."""
    kind, size = message.get_int(), len(message.get_binary())
    if kind != _STDERR:
        raise Overrun(f"the server sent data of a kind that nobody knows ({kind})")
    _check_window(channel, size)
    message.rewind()
    message.get_int()  # the channel's number
    channel._feed_extended(message)


def _check_window(channel: Any, size: int) -> None:
    # What is read and not granted again yet is no room either.
    used = len(channel.in_buffer) + len(channel.in_stderr_buffer) + channel.in_window_sofar
    if used + size > channel.in_window_size:
        raise Overrun(
            f"the server sent more than the window that it was granted, {channel.in_window_size:,} bytes"
        )


class BoundedTransport(paramiko.Transport):
    """A transport that ends with :class:`Overrun` where its server sends more than it may."""

    _channel_handler_table: ClassVar = {
        **paramiko.Transport._channel_handler_table,  # type: ignore[attr-defined]
        MSG_CHANNEL_DATA: _feed,
        MSG_CHANNEL_EXTENDED_DATA: _feed_extended,
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._lines = 0
        super().__init__(*args, **{"packetizer_class": _Packetizer, **kwargs})

    def _log(self, level: int, msg: Any, *args: Any) -> None:
        if level > logging.DEBUG:
            self._lines += 1
            if self._lines == _LINES:
                raise Overrun(f"the server sent {_LINES} messages that are unknown, or out of place")
            if self._lines > _LINES:  # where paramiko logs that it ends, which our caller says better
                return
        super()._log(level, msg, *args)  # type: ignore[misc]
