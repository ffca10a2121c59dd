"""A paramiko connection whose server can fill neither our memory nor the task's log.

paramiko does not enforce the window that it grants. It reads packets and banners of any size, and as many
items as a message claims to have, and logs every unknown message. Here each of these ends the connection with
:class:`Overrun`::

    more data on a channel than its window allows      RFC 4254, section 5.2
    an oversized packet, or text before the version    RFC 4253, sections 4.2 and 6.1; OpenSSH's limits
    a message that claims more items than it contains  paramiko reads zeros past its end
    more log lines than any honest server causes

Compression is not requested, so a packet is no larger than what was received.

Limitations: a server may keep the processor busy with meaningless messages until the caller's timeout.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import paramiko
from paramiko.common import MSG_CHANNEL_DATA, MSG_CHANNEL_EXTENDED_DATA

_MAX_PACKET = (256 << 10) + 1024  # bytes; we request at most 32 KiB of data in one
_MAX_PAST_END = 100  # fields read past the end of a message; in a truncated one, a few are
_MAX_BANNER = 64 << 10  # bytes before the server's version
_MAX_LOG_LINES = 100  # per connection; an honest server causes a handful, an audit a few dozen
_STDERR = 1


class Overrun(paramiko.SSHException):
    """The server exceeded a limit, so the connection was ended."""


class _Message(paramiko.Message):
    _past_end = 0

    def get_bytes(self, n: int) -> bytes:
        at = self.packet.tell()
        data = super().get_bytes(n)
        if self.packet.tell() < at + n:
            self._past_end += 1
            if self._past_end > _MAX_PAST_END:
                raise Overrun("the server sent a message that claims more items than it contains")
        return data


class _Packetizer(paramiko.Packetizer):  # type: ignore[name-defined]
    _banner = 0

    def read_message(self) -> tuple[int, paramiko.Message]:
        kind, message = super().read_message()
        message.__class__ = _Message
        return kind, message

    def read_all(self, n: int, check_rekey: bool = False) -> Any:
        if n > _MAX_PACKET:
            raise Overrun(f"the server sent a packet of {n:,} bytes, more than SSH allows")
        return super().read_all(n, check_rekey)

    def _read_timeout(self, timeout: float) -> Any:
        data = super()._read_timeout(timeout)
        self._banner += len(data)
        if self._banner > _MAX_BANNER:
            raise Overrun(f"the server sent {self._banner:,} bytes without an SSH version")
        return data


def _feed(channel: Any, message: paramiko.Message) -> None:
    """Accept data as ``Channel._feed`` does, if the window has room."""
    data = message.get_binary()
    _check_window(channel, len(data))
    channel._feed(data)


def _feed_extended(channel: Any, message: paramiko.Message) -> None:
    """Accept standard error likewise. paramiko would log each message of any other type."""
    kind, size = message.get_int(), len(message.get_binary())
    if kind != _STDERR:
        raise Overrun(f"the server sent data of an unknown type ({kind})")
    _check_window(channel, size)
    message.rewind()
    message.get_int()  # the channel's number
    channel._feed_extended(message)


def _check_window(channel: Any, size: int) -> None:
    # Data that is read, but for which no new window was granted yet, still counts.
    used = len(channel.in_buffer) + len(channel.in_stderr_buffer) + channel.in_window_sofar
    if used + size > channel.in_window_size:
        raise Overrun(f"the server sent more than its window of {channel.in_window_size:,} bytes")


class BoundedTransport(paramiko.Transport):
    """A transport that ends with :class:`Overrun` when its server exceeds a limit."""

    _channel_handler_table: ClassVar = {
        **paramiko.Transport._channel_handler_table,  # type: ignore[attr-defined]
        MSG_CHANNEL_DATA: _feed,
        MSG_CHANNEL_EXTENDED_DATA: _feed_extended,
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._log_lines = 0
        super().__init__(*args, **{"packetizer_class": _Packetizer, **kwargs})

    def _log(self, level: int, msg: Any, *args: Any) -> None:
        if level > logging.DEBUG:
            self._log_lines += 1
            if self._log_lines == _MAX_LOG_LINES:
                raise Overrun(f"the server sent {_MAX_LOG_LINES} unknown or unexpected messages")
            if self._log_lines > _MAX_LOG_LINES:  # paramiko logs that it ends; our caller reports it better
                return
        super()._log(level, msg, *args)  # type: ignore[misc]
