"""Build the provider index: the md5 of every regular file below the sources, in one file.

Runs on the provider, where nothing of this package need be installed: the consumer sends this file over
SSH, so it is one file, for Python 3.6 and newer, with nothing but the standard library. By hand or from
cron: ``python3 indexer.py --chroot /srv/a --source /backups``.

The walk, in the order of the raw bytes of the paths, so that nothing needs to be sorted afterwards:

    take the next path
    a directory:     put what it holds in its place; never follow a symlink
    a regular file:  hash it, again if it changed meanwhile, and write its line into a temporary file
    unreadable:      remember it for the end of the index
    at the end, sync the temporary file and rename it over the index

A reader of the index sees the old one or the new one, whole. What this does not promise: the index is no
snapshot of the tree, and a directory that somebody replaces by a symlink during the walk may be followed.

Standard output, one printable ASCII line each, flushed:

    mdbackup progress files=N bytes=N seconds=N                          every 5 seconds
    mdbackup unreadable PATH: REASON                                     the first 20 of them
    mdbackup done files=N bytes=N hashed=N unreadable=N seconds=N.N      exit status 0, or 3: some unreadable
    mdbackup error MESSAGE                                               exit status 1: the old index stays
"""

import argparse
import contextlib
import errno
import hashlib
import json
import os
import re
import signal
import stat
import sys
import time
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

FORMAT = 1
PROGRESS_SECONDS = 5.0
LOGGED_UNREADABLE = 20
HASH_TRIES = 3
LONGEST_PATH = 4096
LONGEST_NAME = 255
BLOCK_BYTES = 1 << 20
DEFAULT_INDEX = "/.mdbackup/index.md5"

# What an open says of a file that is gone, or is a symlink by now.
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class Failure(Exception):
    """No index can be written; the message, printable ASCII, says why and what to do."""


class Request(NamedTuple):
    """What to index; `source` and `index` are paths as the backup account sees them, below `chroot`."""

    chroot: bytes
    source: Tuple[bytes, ...]
    index: bytes  # type: ignore[assignment]  # hides tuple.index, which nobody needs here


def escaped(path: bytes) -> bytes:
    """Escape a path as GNU md5sum 9 does in its lines."""
    return path.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")


def printable(text: bytes) -> str:
    """Give printable ASCII for any bytes: ``\\\\`` for a backslash, ``\\xNN`` for what cannot be printed."""
    return "".join(
        "\\\\" if byte == 0x5C else chr(byte) if 0x20 <= byte < 0x7F else f"\\x{byte:02x}" for byte in text
    )


def too_long(path: bytes) -> bool:
    """Tell whether a path is longer than an index may hold: 4096 bytes, and 255 in each component."""
    return len(path) > LONGEST_PATH or max(map(len, path.split(b"/"))) > LONGEST_NAME


def make_request(chroot: bytes, source: Tuple[bytes, ...], index: bytes) -> Request:
    """Check the three parts of a request, raising `Failure` for a path that is not plain and absolute."""
    if not chroot.startswith(b"/") or b"\0" in chroot:
        raise Failure(f"chroot {printable(chroot)} is not an absolute path")
    if not source:
        raise Failure("no source is given, name at least one directory")
    for word, path in [("index", index)] + [("source", path) for path in source]:
        parts = path[1:].split(b"/")
        whole_chroot = word == "source" and path == b"/"
        if not path.startswith(b"/") or b"\0" in path:
            raise Failure(f"{word} {printable(path)} is not an absolute path")
        if not whole_chroot and any(part in (b"", b".", b"..") for part in parts):
            raise Failure(f"{word} {printable(path)} has an empty, '.' or '..' component, write it without")
        if too_long(path):
            raise Failure(f"{word} {printable(path)} is too long for a path")
    return Request(chroot.rstrip(b"/"), source, index)


def read_request(line: bytes) -> Request:
    """Read a request from its JSON line; text becomes bytes as UTF-8 with surrogateescape."""

    def path_bytes(value: Any) -> bytes:
        if not isinstance(value, str):
            raise Failure("the request must hold paths as text")
        return value.encode("utf-8", "surrogateescape")

    try:
        request = json.loads(line.decode("ascii"))
        if not isinstance(request, dict) or sorted(request) != ["chroot", "index", "source"]:
            raise Failure("the request must be a JSON object of chroot, source and index")
        if not isinstance(request["source"], list):
            raise Failure("source must be a list of paths")
        source = tuple(path_bytes(value) for value in request["source"])
        return make_request(path_bytes(request["chroot"]), source, path_bytes(request["index"]))
    except ValueError as error:
        why = printable(str(error).encode("utf-8", "backslashreplace"))
        raise Failure(f"the request is not understood: {why}") from error


class Report:
    """What was done so far, told on standard output; a lost connection only makes it silent."""

    def __init__(self) -> None:
        self.files = 0
        self.hashed = 0
        self.bytes = 0
        self.unreadable: Dict[bytes, str] = {}
        self._begun = time.monotonic()
        self._next_progress = self._begun + PROGRESS_SECONDS
        # Without this a file opened later could get descriptor 1 and receive these lines.
        self._silent = sys.stdout is None

    def say(self, line: str) -> None:
        """Write one line at once, past any buffer that could complain of a lost reader at exit."""
        if not self._silent:
            try:
                os.write(1, line.encode("ascii") + b"\n")
            except OSError:
                self._silent = True

    def seconds(self) -> float:
        return time.monotonic() - self._begun

    def progress(self, bytes_of_this_file: int = 0) -> None:
        """Tell how far it is, if the last time is long enough ago; cheap enough to call for each file."""
        now = time.monotonic()
        if now >= self._next_progress:
            self._next_progress = now + PROGRESS_SECONDS
            total = self.bytes + bytes_of_this_file
            self.say(f"mdbackup progress files={self.files} bytes={total} seconds={int(self.seconds())}")

    def refuse(self, path: bytes, reason: str) -> None:
        """Note a path as unreadable."""
        if path not in self.unreadable:
            self.unreadable[path] = reason
            if len(self.unreadable) <= LOGGED_UNREADABLE:
                self.say(f"mdbackup unreadable {printable(path)}: {reason}")

    def done(self) -> None:
        self.say(
            f"mdbackup done files={self.files} bytes={self.bytes} hashed={self.hashed}"
            f" unreadable={len(self.unreadable)} seconds={self.seconds():.1f}"
        )


def reason_of(error: OSError) -> str:
    """Give the system's words for an error, without the colon that ends the path in the report."""
    return printable((error.strerror or str(error)).replace(":", ",").encode("utf-8", "replace"))


def new_md5() -> Any:
    """Give an md5 that also works where FIPS rules forbid md5 for security (Python 3.9 and newer)."""
    try:
        return hashlib.md5(usedforsecurity=False)
    except TypeError:
        return hashlib.md5()  # noqa: S324


class Tree:
    """The regular files below the sources of a request."""

    def __init__(self, request: Request, report: Report) -> None:
        self._chroot = request.chroot
        self._source = request.source
        self._report = report
        directory, name = request.index.rsplit(b"/", 1)
        # The index itself and the temporary files of this and any killed build, with or without Python.
        name = re.escape(name)
        self._own = re.compile(re.escape(directory) + rb"/(%s|\.%s\.[0-9]+\.[0-9]+\.tmp)" % (name, name))
        self._buffer = bytearray(BLOCK_BYTES)

    def files(self) -> Iterator[Tuple[bytes, str, int]]:
        """Yield path, md5 and size in bytes of each regular file, in the order of the raw path bytes."""
        # A directory is kept with its trailing slash: so it sorts where the paths below it belong.
        pending = sorted(self._starting_points(), reverse=True)
        while pending:
            path = pending.pop()
            self._report.progress()
            if self._own.fullmatch(path.rstrip(b"/")):
                continue
            if path.endswith(b"/"):
                pending.extend(sorted(self._children(path), reverse=True))
                continue
            hashed = self._hash(path)
            if hashed is not None:
                yield (path, *hashed)

    def _starting_points(self) -> List[bytes]:
        """Give the sources that exist, each once, without those that lie in another."""
        found = {point for point in map(self._starting_point, self._source) if point is not None}
        directories = [point for point in found if point.endswith(b"/")]
        return [
            point for point in found if not any(point != top and point.startswith(top) for top in directories)
        ]

    def _starting_point(self, source: bytes) -> Optional[bytes]:
        if source == b"/":
            return source
        mode = 0
        for prefix in prefixes(source):
            try:
                mode = os.lstat(self._chroot + prefix).st_mode
            except OSError as error:
                gone = error.errno in (errno.ENOENT, errno.ENOTDIR)
                self._report.refuse(source, "does not exist" if gone else reason_of(error))
                return None
            if stat.S_ISLNK(mode):
                self._report.refuse(source, "is a symlink" if prefix == source else "lies below a symlink")
                return None
        if stat.S_ISDIR(mode):
            return source + b"/"
        if stat.S_ISREG(mode):
            return source
        self._report.refuse(source, "is neither a regular file nor a directory")
        return None

    def _children(self, directory: bytes) -> List[bytes]:
        """List the regular files and directories in a directory, as far as it can be read."""
        children: List[bytes] = []
        try:
            with os.scandir(self._chroot + directory) as entries:
                for entry in entries:
                    self._report.progress()
                    path = directory + entry.name
                    is_directory = entry.is_dir(follow_symlinks=False)
                    if not is_directory and not entry.is_file(follow_symlinks=False):
                        continue
                    if too_long(path):
                        # No index can hold the path itself, not even as unreadable.
                        self._report.refuse(
                            directory.rstrip(b"/") or b"/", "a path or name in it is too long"
                        )
                    else:
                        children.append(path + b"/" if is_directory else path)
        except OSError as error:
            path = directory.rstrip(b"/") or b"/"
            # A directory may go while the walk is on its way to it, a source may not.
            if error.errno not in GONE:
                self._report.refuse(path, reason_of(error))
            elif path in self._source:
                self._report.refuse(path, "does not exist")
        return children

    def _hash(self, path: bytes) -> Optional[Tuple[str, int]]:
        """Give md5 and size of a file; None if it is gone, no regular file any more, or unreadable."""
        try:
            for _ in range(HASH_TRIES):
                descriptor = os.open(self._chroot + path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    before = os.fstat(descriptor)
                    if not stat.S_ISREG(before.st_mode):
                        return None
                    md5, size = self._hash_content(descriptor)
                    after = os.fstat(descriptor)
                finally:
                    os.close(descriptor)
                if all(
                    getattr(before, name) == getattr(after, name)
                    for name in ("st_size", "st_mtime_ns", "st_ctime_ns")
                ):
                    return md5, size
            self._report.refuse(path, "changed while being read")
        except OSError as error:
            if error.errno not in GONE:
                self._report.refuse(path, reason_of(error))
        return None

    def _hash_content(self, descriptor: int) -> Tuple[str, int]:
        md5 = new_md5()
        size = 0
        view = memoryview(self._buffer)
        while True:
            count = os.readv(descriptor, [view])
            if not count:
                return md5.hexdigest(), size
            md5.update(view[:count])
            size += count
            self._report.progress(size)


def prefixes(path: bytes) -> Iterator[bytes]:
    """Yield ``/a``, ``/a/b``, ``/a/b/c`` for ``/a/b/c``."""
    for position in range(1, len(path) + 1):
        if path[position : position + 1] in (b"/", b""):
            yield path[:position]


def prepare_directory(chroot: bytes, directory: bytes) -> None:
    """Make the index's directory if it is missing; refuse one that the backup account could not follow."""
    if not os.path.isdir(chroot + b"/"):
        raise Failure(f"chroot {printable(chroot) or '/'} is not a directory on the provider")
    for prefix in prefixes(directory):
        path = chroot + prefix
        try:
            mode = os.lstat(path).st_mode
        except FileNotFoundError:
            os.mkdir(path)
            os.chmod(path, 0o755)  # noqa: S103  (the backup account must get through, whatever the umask is)
            continue
        if not stat.S_ISDIR(mode):
            raise Failure(f"{printable(path)} must be a directory, not a symlink or file, to hold the index")


def write_index(request: Request, report: Report) -> None:
    """Build the index and put it in place of the old one; if that fails, the old one stays as it was."""
    directory, name = request.index.rsplit(b"/", 1)
    prepare_directory(request.chroot, directory)
    started = int(time.time())
    final = request.chroot + request.index
    temporary = request.chroot + directory + b"/.%s.%d.%d.tmp" % (name, os.getpid(), started)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        with os.fdopen(descriptor, "wb", BLOCK_BYTES) as stream:
            os.fchmod(descriptor, 0o644)
            stream.write(b"# mdbackup started %d\n" % started)
            for path, md5, size in Tree(request, report).files():
                line = escaped(path)
                stream.write(b"%s%s  %s\n" % (b"" if line == path else b"\\", md5.encode("ascii"), line))
                report.files += 1
                report.hashed += 1
                report.bytes += size
            for path in sorted(report.unreadable):
                stream.write(b"# mdbackup unreadable %s\n" % escaped(path))
            stream.write(
                b"# mdbackup end format=%d files=%d unreadable=%d bytes=%d\n"
                % (FORMAT, report.files, len(report.unreadable), report.bytes)
            )
            stream.flush()
            os.fsync(descriptor)
        os.rename(temporary, final)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    descriptor = os.open(request.chroot + directory + b"/", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def stop(number: int, frame: Any) -> None:
    """Turn a signal to end into a failure, so that the temporary file is removed."""
    raise Failure(f"stopped by signal {number}")


def read_arguments(arguments: List[str]) -> Request:
    """Get the request from the command line, or from the next line of standard input."""
    parser = argparse.ArgumentParser(description="Build the provider index of airflow-mdbackup.")
    parser.add_argument(
        "--chroot", default="/", help="directory that the backup account sees as / (default /)"
    )
    parser.add_argument(
        "--source", action="append", help="what to index, as the backup account sees it; repeatable"
    )
    parser.add_argument("--index", default=DEFAULT_INDEX, help="the index to write (default %(default)s)")
    parser.add_argument("--request-from-stdin", action="store_true", help="take it all from a line of JSON")
    options = parser.parse_args(arguments)
    if options.request_from_stdin:
        return read_request(sys.stdin.buffer.readline())
    if not options.source:
        parser.error("--source is needed at least once")
    source = tuple(os.fsencode(path) for path in options.source)
    return make_request(os.fsencode(options.chroot), source, os.fsencode(options.index))


def main(arguments: List[str]) -> int:
    """Build the index; return 0 if it is complete, 3 if something was unreadable, 1 if there is none."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    report = Report()
    try:
        request = read_arguments(arguments)
        try:
            write_index(request, report)
        except OSError as error:
            path = printable(request.chroot + request.index)
            raise Failure(
                f"cannot write {path}: {reason_of(error)} (the index account must be able to write there)"
            ) from error
    except Failure as failure:
        report.say(f"mdbackup error {failure}")
        return 1
    report.done()
    return 3 if report.unreadable else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
