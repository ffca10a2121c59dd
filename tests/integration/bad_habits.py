"""An SFTP server on standard input and output, with habits of servers that people complain of.

At most three files may be open, attributes of an open file are not told, STAT is unknown, a block may be
shorter than asked for, and a file ends with an empty block. A program of its own: sshd starts it.
"""

import os
import struct
import sys

AT_ONCE = 3
SHORT = 20_000
VERSION, STATUS, HANDLE, DATA = 2, 101, 102, 103
INIT, OPEN, CLOSE, READ = 1, 3, 4, 5
OK, NO_SUCH_FILE, FAILURE, UNSUPPORTED = 0, 2, 4, 8


def string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def main(root: bytes) -> None:
    there = sys.stdin.buffer, sys.stdout.buffer
    files: dict = {}

    def send(kind: int, body: bytes) -> None:
        there[1].write(struct.pack(">IB", len(body) + 1, kind) + body)
        there[1].flush()

    def answer(kind: int, body: bytes) -> tuple:
        (size,) = struct.unpack_from(">I", body)
        name, rest = body[4 : 4 + size], body[4 + size :]
        if kind == OPEN:
            if len(files) >= AT_ONCE:
                return STATUS, struct.pack(">I", FAILURE) + string(b"Too many open files") + string(b"")
            handle = b"%d" % next(number for number in range(AT_ONCE + 1) if b"%d" % number not in files)
            files[handle] = os.open(root + name, os.O_RDONLY)
            return HANDLE, string(handle)
        if kind == CLOSE:
            os.close(files.pop(name))
            return STATUS, struct.pack(">I", OK) + string(b"") + string(b"")
        if kind == READ:
            offset, length = struct.unpack_from(">QI", rest)
            return DATA, string(os.pread(files[name], min(length, SHORT), offset))
        code = FAILURE if kind == 8 else UNSUPPORTED
        return STATUS, struct.pack(">I", code) + string(b"no") + string(b"")

    while head := there[0].read(5):
        size, kind = struct.unpack(">IB", head)
        body = there[0].read(size - 1)
        if kind == INIT:
            send(VERSION, struct.pack(">I", 3))
            continue
        number, body = body[:4], body[4:]
        try:
            kind, told = answer(kind, body)
        except OSError as error:
            kind, told = STATUS, struct.pack(">I", NO_SUCH_FILE) + string(str(error).encode()) + string(b"")
        send(kind, number + told)


if __name__ == "__main__":
    main(os.fsencode(sys.argv[1]))
