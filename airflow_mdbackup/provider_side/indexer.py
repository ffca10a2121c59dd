"""Build the provider index: the md5 of every regular file below the sources, in one file.

Runs on the provider, where nothing of this package need be installed: the consumer sends this file over
SSH, so it is one file, for Python 3.6 and newer, with nothing but the standard library. Or it is installed
there, and runs as a forced command (``--serve --config FILE``), from cron or a timer (``--config FILE``) or
by hand (``--chroot /srv/a --source /backups``).

The data goes this way, and the file reads in the same order:

    Request     what to index and how, from standard input, a configuration file or the command line
    Report      what is told of it, on standard output and in a file that others can follow
    Watch       once a second: progress, signals, and whether somebody wants the build to stop
    Place       the index's directory: one build at a time; the same request again joins the one that runs
    Excluded    which paths need not be looked at
    Cache       what the last build knew of each file, in the order of the paths
    Builder     the walk, in the order of the raw bytes of the paths:
                    as the cache knows it     its line is copied from there
                    else                      it joins a batch
    Crew        processes, each a Hasher, which hash the batches beside the walk
    Output      lines and records in path order: index and next cache, renamed into place at the end

**When a file is not hashed.** Size, mtime, ctime, inode and device are those of the cache, and the cache's
record is one to trust. It is if the file was last touched more than 2 seconds (the coarsest clock of a
filesystem) before it was hashed: else it may have been changed after that within the same tick. What is
written through mmap may move the times up to half a minute before the content: a file that was touched in the
minute before it was hashed is therefore hashed once more, by the first build that finds it older and
unchanged. Where another machine's clock stamps the files (NFS), and with times in the future, it is not known
when a file was touched: it is hashed by each build until one finds it unchanged for a minute.

**Rot.** A file that is hashed again (``rehash``) although none of the above changed, and whose content did,
is rotten: its line keeps the md5 of when it was sound, and a comment in the index names it. It is hashed in
each build from then on, until its times move (``touch`` it to say that it is right as it is) or it is sound
again. What differs when a file is hashed once more because of its age, as above, is changed and not rotten.
A rotten file is remembered also when a build cannot read it, or does not come by it; and a filesystem of
which nothing but the number changed is the same.

**Memory** is bounded by the largest directory. Files of 32 MiB and more are hashed one by one, and their
lines are filled in afterwards, so that they hold up nothing else.

A reader of the index sees the old one or the new one, whole, whenever this is killed. Below the chroot no
symlink is ever followed, also where somebody replaces a directory by one during the walk. What this does not
promise: the index is no snapshot of the tree; a change that leaves size, times and inode alone, as mmap can
make on filesystems that do not note it (tmpfs), is found by ``rehash`` only.

Standard output, one printable ASCII line each, flushed; exit status 0 complete, 3 something was unreadable or
rotten, 1 no index was built, the old one stays:

    mdbackup ready request                                               before a request is read (--serve)
    mdbackup waiting TEXT | joined TEXT | note TEXT
    mdbackup progress files=N bytes=N hashed=N seconds=N                 every 5 seconds
    mdbackup unreadable PATH: REASON                                     the first 20 of them
    mdbackup rotten PATH                                                 the first 20 of them
    mdbackup done files=N bytes=N hashed=N unreadable=N rotten=N seconds=N.N
    mdbackup error MESSAGE

A line ``stop`` on standard input stops the build; the end of standard input means nothing.
"""

import collections
import contextlib
import errno
import fcntl
import functools
import gc
import hashlib
import json
import marshal
import os
import re
import select
import signal
import stat
import struct
import sys
import time
import zlib
from typing import Any, Callable, Deque, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple, Union

FORMAT = 1
DEFAULT_INDEX = "/.mdbackup/index.md5"
LONGEST_PATH = 4096
LONGEST_NAME = 255
MOST_LINKS = 40
LONGEST_REQUEST = 1 << 20
LEAST_PIPE_BYTES = 512  # PIPE_BUF of POSIX
REQUEST_SECONDS = 30.0
LONGEST_CLAIM = 217

TICK_SECONDS = 0.5
PROGRESS_SECONDS = 5.0
POLL_SECONDS = 0.2
REMIND_SECONDS = 60.0
LAST_WORDS_SECONDS = 30.0
LAST_READ_SECONDS = 2.0
LOGGED = 20

HASH_TRIES = 3
SMALL_BYTES = 1 << 15
BLOCK_BYTES = 1 << 20
BIG_BYTES = 32 << 20
BATCH_FILES = 200  # to be hashed
BATCH_LINES = 2000
WINDOW_LINES = 20000  # that wait for others before them
DEEPEST = 4096  # directories; each holds a descriptor

TICK_NS = 2 * 10**9
WRITEBACK_NS = 60 * 10**9
MOST_CRC = 1 << 32

# What an open says of a file that is gone, or is a symlink by now.
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
OPEN_DIRECTORY = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC
# To go through a directory it need not be readable, where the system can tell the two apart.
OPEN_PASSAGE = OPEN_DIRECTORY | getattr(os, "O_PATH", 0)
SLASH = 0x2F

# Filesystems whose files are stamped by this machine's clock.
LOCAL_FILESYSTEMS = frozenset(
    b"bcachefs btrfs erofs exfat ext2 ext3 ext4 f2fs hfsplus iso9660 jfs msdos nilfs2 ntfs ntfs3 overlay"
    b" ramfs reiserfs squashfs tmpfs udf ufs vfat xfs zfs".split()
)


class Failure(Exception):
    """No index can be written; the message, printable ASCII, says why and what to do."""


# --- the request ------------------------------------------------------------------------------------


class Request(NamedTuple):
    """What to index and how; `source` and `index` are paths as the backup account sees them, below `chroot`.

    `id` names the request, None if nobody may join it. `exclude` are gitignore patterns, `jobs` processes
    (None: one for each core), `nice` is added to the priority, `limit` is bytes per second. `rehash` is
    "changed", "all", or the percent of files that are hashed in each build whether they changed or not.
    """

    chroot: bytes
    source: Tuple[bytes, ...]
    index: bytes  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    id: Optional[str] = None
    exclude: Tuple[str, ...] = ()
    jobs: Optional[int] = None
    nice: int = 0
    limit: Optional[int] = None
    rehash: Union[str, float] = "changed"
    one_file_system: bool = False


def printable(text: bytes) -> str:
    """Give printable ASCII for any bytes: ``\\\\`` for a backslash, ``\\xNN`` for what cannot be printed."""
    return "".join(
        "\\\\" if byte == 0x5C else chr(byte) if 0x20 <= byte < 0x7F else f"\\x{byte:02x}" for byte in text
    )


def printable_text(text: str) -> str:
    """Give the same for text."""
    return printable(text.encode("utf-8", "surrogatepass"))


def reason_of(error: OSError) -> str:
    """Give the system's words for an error, without the colon that ends the path in the report."""
    return printable((error.strerror or str(error)).replace(":", ",").encode("utf-8", "replace"))


def too_long(path: bytes) -> bool:
    """Tell whether a path is longer than an index may hold: 4096 bytes, and 255 in each component."""
    return len(path) > LONGEST_PATH or max(map(len, path.split(b"/"))) > LONGEST_NAME


def checked(request: Request) -> Request:
    """Check a request, raising `Failure` for what is impossible, like a path that is not absolute."""
    if not request.chroot.startswith(b"/") or b"\0" in request.chroot:
        raise Failure(f"chroot {printable(request.chroot)} is not an absolute path")
    if not request.source:
        raise Failure("no source is given, name at least one directory")
    for word, path in [("index", request.index)] + [("source", path) for path in request.source]:
        parts = path[1:].split(b"/")
        whole_chroot = word == "source" and path == b"/"
        if not path.startswith(b"/") or b"\0" in path:
            raise Failure(f"{word} {printable(path)} is not an absolute path")
        if not whole_chroot and any(part in (b"", b".", b"..") for part in parts):
            raise Failure(f"{word} {printable(path)} has an empty, '.' or '..' component, write it without")
        if too_long(path):
            raise Failure(f"{word} {printable(path)} is too long for a path")
    if len(own_name(request, b".cache.%d.%d.tmp" % (1 << 32, 1 << 40))) > LONGEST_NAME:
        raise Failure(f"index {printable(request.index)} has too long a name, what lies beside it needs room")
    if request.id is not None and not re.fullmatch("[ -~]{1,200}", request.id):
        raise Failure("id must be 1 to 200 printable ASCII characters, or null")
    if request.jobs is not None and not 1 <= request.jobs <= 1024:
        raise Failure("jobs must be a whole number from 1 to 1024")
    if not 0 <= request.nice <= 19:
        raise Failure("nice must be a whole number from 0 to 19")
    if request.limit is not None and request.limit < 1:
        raise Failure("limit must be a whole number of bytes per second, or null")
    percent = 0 if isinstance(request.rehash, str) else request.rehash
    if request.rehash not in ("changed", "all") and not 0 < percent <= 100:
        raise Failure('rehash must be "changed", "all", or a number of percent over 0, at most 100')
    return request._replace(chroot=request.chroot.rstrip(b"/"))


def own_name(request: Request, suffix: bytes) -> bytes:
    """Give the name of a file beside the index."""
    return b"." + request.index.rsplit(b"/", 1)[1] + suffix


def request_of(values: Any) -> Request:
    """Read a request from a JSON object; text becomes bytes as UTF-8 with surrogateescape."""

    def fail(key: str, wanted: str) -> Failure:
        return Failure(f"{key} must be {wanted}")

    def path_bytes(key: str, value: Any) -> bytes:
        if not isinstance(value, str):
            raise fail(key, "text, a path" if key != "source" else "a list of paths as text")
        try:
            return value.encode("utf-8", "surrogateescape")
        except UnicodeError:
            raise fail(key, "text that stands for bytes") from None

    if not isinstance(values, dict):
        raise Failure("the request must be a JSON object")
    unknown = set(values) - set(Request._fields)
    missing = {"chroot", "source", "index"} - set(values)
    if unknown or missing:
        what = f"has no {sorted(missing)[0]}" if missing else f"has an unknown key {sorted(unknown)[0]!a}"
        raise Failure(printable_text(f"the request {what}; there are: {', '.join(Request._fields)}"))
    if not isinstance(values["source"], list):
        raise fail("source", "a list of paths as text")
    exclude = values.get("exclude") or []
    if not isinstance(exclude, list) or not all(isinstance(pattern, str) for pattern in exclude):
        raise fail("exclude", "a list of gitignore patterns")
    for key in ("jobs", "nice", "limit"):
        if type(values.get(key)) not in (int, type(None)):
            raise fail(key, "a whole number")
    if type(values.get("rehash")) not in (str, int, float, type(None)):
        raise fail("rehash", 'text, "changed" or "all", or a number of percent')
    if type(values.get("one_file_system")) not in (bool, type(None)):
        raise fail("one_file_system", "true or false")
    if type(values.get("id")) not in (str, type(None)):
        raise fail("id", "text")
    return checked(
        Request(
            path_bytes("chroot", values["chroot"]),
            tuple(path_bytes("source", value) for value in values["source"]),
            path_bytes("index", values["index"]),
            values.get("id"),
            tuple(exclude),
            values.get("jobs"),
            values.get("nice") or 0,
            values.get("limit"),
            "changed" if values.get("rehash") is None else values["rehash"],
            bool(values.get("one_file_system")),
        )
    )


def claim(request: Request) -> bytes:
    """Give what the lock and a wish to stop name a request by, empty if it has no id.

    What is to be indexed is part of it, since a task may be changed before it is tried again.
    """
    if request.id is None:
        return b""
    what = repr(request._replace(id=None, jobs=None, nice=0, limit=None))
    return f"{request.id} {hashlib.sha256(what.encode()).hexdigest()[:16]}".encode("ascii")


def read_json(text: bytes, what: str) -> Any:
    try:
        return json.loads(text.decode("ascii" if what == "the request" else "utf-8"))
    except (ValueError, RecursionError) as error:
        raise Failure(f"{what} is not understood: {printable_text(str(error))}") from error


def read_config(path: bytes) -> Request:
    """Read a request from a file that nobody but root and we ourselves can have written."""
    shown = printable(path)
    try:
        checks = list(passed_by(path))
        with open(path, "rb") as stream:
            checks.append((path, os.fstat(stream.fileno())))
            text = stream.read(LONGEST_REQUEST + 1)
    except OSError as error:
        raise Failure(f"the configuration {shown} cannot be read: {reason_of(error)}") from error
    if not stat.S_ISREG(checks[-1][1].st_mode):
        raise Failure(f"the configuration {shown} is no regular file")
    for place, status in checks:
        # In a directory like /tmp others may write, but not replace what is not theirs.
        sticky = stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
        writable = status.st_mode & 0o022 and not sticky and not stat.S_ISLNK(status.st_mode)
        if status.st_uid not in (0, os.geteuid()) or writable:
            raise Failure(
                f"the configuration {shown} is not used, because others than root can write"
                f" {printable(place)}: change its owner and mode (chown root, chmod go-w)"
            )
    if len(text) > LONGEST_REQUEST:
        raise Failure(f"the configuration {shown} is too long")
    values = read_json(text, f"the configuration {shown}")
    if isinstance(values, dict) and "id" in values:
        raise Failure(f"the configuration {shown} has an id, which only a request can have")
    try:
        return request_of(values)
    except Failure as failure:
        raise Failure(f"the configuration {shown}: {failure}") from failure


def passed_by(path: bytes) -> Iterator[Tuple[bytes, os.stat_result]]:
    """Yield each directory and symlink that a path leads through, with its status, and where it leads."""
    at = b"/"
    yield at, os.lstat(at)
    parts = os.path.join(os.getcwdb(), path).split(b"/")
    links = 0
    while parts:
        part = parts.pop(0)
        if part == b"..":
            at = os.path.dirname(at)
        elif part not in (b"", b"."):
            place = os.path.join(at, part)
            status = os.lstat(place)
            yield place, status
            if not stat.S_ISLNK(status.st_mode):
                at = place
                continue
            links += 1
            if links > MOST_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            target = os.readlink(place)
            at = b"/" if target.startswith(b"/") else at
            parts = target.split(b"/") + parts


def served(asked: Any, path: bytes, config: Request) -> Tuple[Request, List[str]]:
    """Give the configured request under the id of the one that was asked, and in which keys they differ."""
    if not isinstance(asked, dict):
        raise Failure("the request must be a JSON object")
    if type(asked.get("id")) not in (str, type(None)):
        raise Failure("id must be text")

    def text(value: bytes) -> str:
        return value.decode("utf-8", "surrogateescape")

    holds = {
        "source": [text(source) for source in config.source],
        "index": text(config.index),
        "exclude": list(config.exclude),
    }
    differing = [key for key, value in holds.items() if asked.get(key, value) != value]
    notes = [
        f"{key} is not what was asked for, the provider's {printable(path)} decides" for key in differing
    ]
    return checked(config._replace(id=asked.get("id"))), notes


class Input:
    """Standard input: one line with the request, and then perhaps a line ``stop``."""

    def __init__(self) -> None:
        self._waiting = b""
        self._open = True
        self._stop = False

    def request(self) -> bytes:
        """Give the first line, which must come soon and be of a sensible length."""
        deadline = time.monotonic() + REQUEST_SECONDS
        while b"\n" not in self._waiting:
            if len(self._waiting) > LONGEST_REQUEST:
                raise Failure("the request is longer than 1 MiB")
            if not self._open:
                raise Failure("standard input ended before there was a whole line with the request")
            if time.monotonic() > deadline:
                raise Failure(f"no request came within {REQUEST_SECONDS:.0f} seconds")
            self._read(1.0)
        line, self._waiting = self._waiting.split(b"\n", 1)
        if len(line) > LONGEST_REQUEST:
            raise Failure("the request is longer than 1 MiB")
        return line

    def stop_asked(self) -> bool:
        """Tell whether there was a line ``stop``."""
        if self._open and not self._stop:
            self._read(0)
        *lines, self._waiting = self._waiting.split(b"\n")
        self._waiting = self._waiting[:10]
        self._stop = self._stop or b"stop" in [line.rstrip(b"\r") for line in lines]
        return self._stop

    def close(self) -> None:
        """Read no more."""
        self._open = False

    def _read(self, seconds: float) -> None:
        try:
            if select.select([0], [], [], seconds)[0]:
                data = os.read(0, 1 << 16)
                self._waiting += data
                self._open = data != b""
        except OSError:
            self._open = False


# --- what is told -----------------------------------------------------------------------------------


class Report:
    """What was done so far, told on standard output and to whoever follows; nobody need read it."""

    def __init__(self) -> None:
        self.files = 0
        self.hashed = 0
        self.bytes = 0
        self.running: Callable[[], int] = int  # bytes of files that are not finished
        self.unreadable: Dict[bytes, str] = {}
        self.rotten: Set[bytes] = set()
        self.saying = False
        self._told: Set[str] = set()
        self._unsaid = b""  # what standard output has not taken yet
        self._copy: Optional[int] = None
        self._begun = time.monotonic()
        self._next_progress = self._begun + PROGRESS_SECONDS

    def copy_to(self, descriptor: Optional[int]) -> None:
        """Tell the rest also to a file. The time counts from now."""
        self._copy = descriptor
        self._begun = time.monotonic()
        self._next_progress = self._begun + PROGRESS_SECONDS

    def say(self, line: str, passing: bool = False) -> None:
        """Write one line, past any buffer that could complain of a lost reader at exit.

        Nothing waits for a reader: what standard output does not take at once, it gets with a later line, and
        what is of interest in passing it does not get then.
        """
        data = line.encode("ascii") + b"\n"
        self.saying = True
        if not (passing and self._unsaid):
            self._unsaid += data
        if self._copy is not None:
            try:
                write_all(self._copy, data)
            except OSError:
                self._copy = None
        self.saying = False
        self.flush(0)

    def flush(self, seconds: float) -> None:
        """Have standard output take what it has not yet, for so long at most: a reader may have stopped."""
        self.saying = True
        deadline = time.monotonic() + seconds
        try:
            while self._unsaid and select.select([], [1], [], max(0, deadline - time.monotonic()))[1]:
                # What any pipe takes without blocking, when it takes something.
                self._unsaid = self._unsaid[os.write(1, self._unsaid[:LEAST_PIPE_BYTES]) :]
        except OSError:
            self._unsaid = b""  # nobody is there
        self.saying = False

    def seconds(self) -> float:
        return time.monotonic() - self._begun

    def progress(self) -> None:
        """Tell how far it is, if the last time is long enough ago."""
        now = time.monotonic()
        if now < self._next_progress or self.saying:
            return
        self._next_progress = now + PROGRESS_SECONDS
        self.say(
            f"mdbackup progress files={self.files} bytes={self.bytes + self.running()} hashed={self.hashed}"
            f" seconds={int(self.seconds())}",
            passing=True,
        )

    def note(self, text: str) -> None:
        """Tell something once."""
        if text not in self._told and len(self._told) < 2 * LOGGED:
            self._told.add(text)
            self.say(f"mdbackup note {text}")

    def refuse(self, path: bytes, reason: str) -> None:
        """Note a path as unreadable."""
        if path not in self.unreadable:
            self.unreadable[path] = reason
            if len(self.unreadable) <= LOGGED:
                self.say(f"mdbackup unreadable {printable(path)}: {reason}")

    def rot(self, path: bytes) -> None:
        """Note a path as rotten."""
        self.rotten.add(path)
        if len(self.rotten) <= LOGGED:
            self.say(f"mdbackup rotten {printable(path)}")

    def done(self) -> int:
        """Tell the result and give the exit status for it."""
        self.say(
            f"mdbackup done files={self.files} bytes={self.bytes} hashed={self.hashed}"
            f" unreadable={len(self.unreadable)} rotten={len(self.rotten)} seconds={self.seconds():.1f}"
        )
        return 3 if self.unreadable or self.rotten else 0


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of it; one write may take less where a signal comes in between."""
    while data:
        data = data[os.write(descriptor, data) :]


class Watch:
    """Looks up every half second from whatever is going on: to tell progress, and for the wish to stop."""

    def __init__(self, report: Report, standard_input: Input) -> None:
        self._report = report
        self._input = standard_input
        self._reason = ""
        self._look: Callable[[], bool] = bool
        self._may_end = False
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signalled)
        signal.signal(signal.SIGALRM, self._tick)

    def stopped(self) -> bool:
        """Tell whether a stop was asked for on standard input, raising `Failure` after a signal to end."""
        if self._reason:
            raise Failure(self._reason)
        return self._input.stop_asked()

    def begin(self, look: Callable[[], bool]) -> None:
        """From now on a wish to stop ends the build at once, by a `Failure`: `look` knows of others."""
        self._look = look
        self._may_end = True
        signal.setitimer(signal.ITIMER_REAL, TICK_SECONDS, TICK_SECONDS)

    def end(self) -> None:
        """From now on let nothing come in between."""
        self._may_end = False
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _signalled(self, number: int, frame: Any) -> None:
        self._reason = f"stopped by signal {int(number)}"
        self._end_if_asked()

    def _tick(self, number: int, frame: Any) -> None:
        self._report.progress()
        if not self._reason and (self._input.stop_asked() or self._look()):
            self._reason = "stopped on request"
        self._end_if_asked()

    def _end_if_asked(self) -> None:
        # Not within a line that is being told: the next tick comes soon.
        if self._reason and self._may_end and not self._report.saying:
            self.end()
            raise Failure(self._reason)


# --- the place of the index -------------------------------------------------------------------------


def open_below(root: int, path: bytes) -> int:
    """Open a directory below another, to go into it, component by component, following no symlink."""
    descriptor = os.dup(root)
    for component in path.strip(b"/").split(b"/"):
        if component:
            try:
                below = os.open(component, OPEN_PASSAGE, dir_fd=descriptor)
            finally:
                os.close(descriptor)
            descriptor = below
    return descriptor


def open_root(chroot: bytes) -> int:
    """Open the chroot, whose own path may contain symlinks."""
    try:
        return os.open(chroot + b"/.", OPEN_PASSAGE)
    except OSError as error:
        raise Failure(
            f"chroot {printable(chroot) or '/'} is not a directory on the provider that can be entered:"
            f" {reason_of(error)}"
        ) from error


class Place:
    """The directory of the index, with what lies beside it: cache, lock, report, a wish to stop."""

    def __init__(self, request: Request, root: int) -> None:
        self._request = request
        self.directory, self.name = request.index.rsplit(b"/", 1)
        self.shown = printable(request.chroot + request.index)
        self._claimed = claim(request)
        self._name = {
            kind: own_name(request, b"." + kind.encode()) for kind in ("cache", "lock", "report", "stop")
        }
        # All of these, with the temporary files of this and any killed build, with or without Python.
        name = re.escape(self.name)
        self._temporary = re.compile(rb"\.%s(\.cache)?\.[0-9]+\.[0-9]+\.tmp" % name)
        self.is_own = re.compile(
            rb"%s/?|\.%s\.(cache|lock|report|stop|lock\.d/)|\.%s(\.cache)?\.[0-9]+\.[0-9]+\.tmp/?"
            % (name, name, name)
        ).fullmatch
        self.folder = self._open(root)
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISDIR(os.lstat(self.name, dir_fd=self.folder).st_mode):
                raise Failure(f"{self.shown} is a directory, and must be a file or missing")
        self._lock = self.open("lock", os.O_RDWR | os.O_CREAT)

    def _open(self, root: int) -> int:
        """Make the directory if it is missing; refuse one that the backup account could not follow."""
        descriptor = os.open(b".", OPEN_PASSAGE if self.directory else OPEN_DIRECTORY, dir_fd=root)
        for prefix in prefixes(self.directory):
            name = prefix.rsplit(b"/", 1)[1]
            above = descriptor
            try:
                descriptor = os.open(
                    name, OPEN_DIRECTORY if prefix == self.directory else OPEN_PASSAGE, dir_fd=above
                )
            except FileNotFoundError:
                os.mkdir(name, dir_fd=above)
                descriptor = os.open(name, OPEN_DIRECTORY, dir_fd=above)
                # The backup account must get through, whatever the umask is.
                os.fchmod(descriptor, 0o755)
            except OSError as error:
                if error.errno not in GONE:
                    raise
                path = printable(self._request.chroot + prefix)
                raise Failure(
                    f"{path} must be a directory, not a symlink or file, to hold the index"
                ) from error
            finally:
                os.close(above)
        return descriptor

    def open(self, kind: str, flags: int) -> int:
        """Open one of the files beside the index, which only we may read."""
        flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        return os.open(self._name[kind], flags, 0o600, dir_fd=self.folder)

    def rename(self, temporary: bytes, kind: str = "") -> None:
        """Put a temporary file in the place of the index, or of another file, and make that durable."""
        name = self._name[kind] if kind else self.name
        os.rename(temporary, name, src_dir_fd=self.folder, dst_dir_fd=self.folder)
        os.fsync(self.folder)

    def remove(self, name: bytes) -> None:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=self.folder)

    # One build at a time.

    def acquire(self, report: Report, watch: Watch) -> Optional[int]:
        """Wait for the lock; or follow the build that holds it, if it is of this very request.

        Gives None with the lock held, or the exit status of the build that was followed.
        """
        reminded: Tuple[Optional[bytes], float] = (None, 0.0)
        while not self._try_lock():
            holder = self._holder()
            if holder and holder == self._claimed:
                status = self._follow(report, watch)
                if status is not None:
                    return status
                continue
            if watch.stopped():
                raise Failure("stopped on request")
            if holder != reminded[0] or time.monotonic() - reminded[1] > REMIND_SECONDS:
                reminded = (holder, time.monotonic())
                report.say("mdbackup waiting another build of this index is running; then a new one begins")
            time.sleep(POLL_SECONDS)
        self._claim(report)
        return None

    def _try_lock(self) -> bool:
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            # Somebody may have removed the file: then others lock another one.
            with contextlib.suppress(FileNotFoundError):
                there = os.lstat(self._name["lock"], dir_fd=self.folder)
                if os.path.samestat(there, os.fstat(self._lock)):
                    return True
            os.close(self._lock)
            self._lock = self.open("lock", os.O_RDWR | os.O_CREAT)

    def _holder(self) -> bytes:
        """Give the name of the request whose build is running, empty if it has none."""
        return os.pread(self._lock, LONGEST_CLAIM + 1, 0).split(b"\n")[0]

    def _claim(self, report: Report) -> None:
        """Remove what killed builds left, begin a report, and say whose build this is, in this order."""
        for name in os.listdir(self.folder):
            raw = os.fsencode(name)
            if self._temporary.fullmatch(raw):
                try:
                    os.unlink(raw, dir_fd=self.folder)
                except (IsADirectoryError, PermissionError):  # of a build without Python
                    self._remove_folder(raw)
        self.remove(self._name["stop"])
        self.remove(self._name["report"])
        report.copy_to(self.open("report", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND))
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, self._claimed + b"\n", 0)

    def _remove_folder(self, name: bytes) -> None:
        with contextlib.suppress(OSError):
            os.lstat(own_name(self._request, b".lock.d"), dir_fd=self.folder)
            return  # such a build may be running
        import shutil  # rarely needed, and slow to import

        path = self._request.chroot + self.directory + b"/" + name
        shutil.rmtree(path, ignore_errors=True)

    def release(self) -> None:
        """End the build. Its result must have been reported."""
        self.remove(self._name["stop"])
        os.ftruncate(self._lock, 0)
        os.close(self._lock)

    def stop_asked(self) -> bool:
        """Tell whether somebody who follows this build asks to stop it."""
        if not self._claimed:
            return False
        try:
            descriptor = self.open("stop", os.O_RDONLY)
        except OSError:
            return False
        try:
            return os.read(descriptor, LONGEST_CLAIM + 1) == self._claimed
        finally:
            os.close(descriptor)

    def _ask_to_stop(self) -> None:
        descriptor = self.open("stop", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        write_all(descriptor, self._claimed)
        os.close(descriptor)

    def _follow(self, report: Report, watch: Watch) -> Optional[int]:
        """Repeat what the running build tells; give its exit status, or None if it ended without a result."""
        try:
            descriptor = self.open("report", os.O_RDONLY)
        except FileNotFoundError:
            time.sleep(POLL_SECONDS)
            return None
        report.say("mdbackup joined the build of this request that is running")
        waiting, first, asked, ended = b"", True, False, False
        try:
            while True:
                data = os.read(descriptor, 1 << 16)
                *lines, waiting = (waiting + data).split(b"\n")
                for line in lines:
                    if first and line.startswith(b"mdbackup progress"):
                        continue  # of before
                    if re.fullmatch(b"mdbackup [ -~]+", line):
                        report.say(line.decode("ascii"))
                    status = result(line)
                    if status is not None:
                        return status
                if data:
                    continue
                first = False
                if ended:
                    if asked:
                        raise Failure("stopped on request")
                    return None
                if not asked and watch.stopped():
                    self._ask_to_stop()
                    asked = True
                time.sleep(POLL_SECONDS)
                if self._try_lock():  # the other build ended; its last words may have come since
                    fcntl.flock(self._lock, fcntl.LOCK_UN)
                    ended = True
                elif self._holder() != self._claimed:
                    ended = True
        finally:
            os.close(descriptor)


def result(line: bytes) -> Optional[int]:
    """Give the exit status that goes with the last line of a report, None for any other line."""
    if line.startswith(b"mdbackup error "):
        return 1
    counts = re.fullmatch(rb"mdbackup done .* unreadable=([0-9]+) rotten=([0-9]+) seconds=[0-9.]+", line)
    if counts:
        return 3 if int(counts[1]) or int(counts[2]) else 0
    return None


def prefixes(path: bytes) -> Iterator[bytes]:
    """Yield ``/a``, ``/a/b``, ``/a/b/c`` for ``/a/b/c``, nothing for an empty path."""
    for position in range(1, len(path) + 1):
        if path[position : position + 1] in (b"/", b""):
            yield path[:position]


# --- what is left out -------------------------------------------------------------------------------


class Excluded:
    """The paths that gitignore patterns leave out, as far as that is beyond doubt.

    The consumer applies the patterns again, and what it would keep must be in the index: so a pattern that
    may be read in different ways leaves out nothing, and one that takes files back in and is not understood
    switches this off. Source: gitignore(5), and pathspec's GitIgnoreSpec.
    """

    def __init__(self, patterns: Tuple[str, ...]) -> None:
        self._rules: List[Rule] = []
        self._any: Any = None
        rules = []
        for pattern in patterns:
            rule = translated(pattern)
            if rule.expression:
                rules.append(rule)
            elif not rule.excludes:
                return
        if rules and all(rule.excludes for rule in rules):
            self._any = re.compile("|".join(rule.expression for rule in rules))
        self._rules = [rule._replace(search=re.compile(rule.expression).search) for rule in reversed(rules)]

    def __bool__(self) -> bool:
        return bool(self._rules)

    def file(self, path: bytes) -> bool:
        """Tell whether a file is left out, by its path with the leading slash."""
        if not self._rules or b"\n" in path:
            return False
        text = path[1:].decode("utf-8", "surrogateescape")
        if self._any is not None:
            return self._any.search(text) is not None
        # The last one that matches decides, but one of the file itself goes before one of a directory above.
        decided = None
        for rule in self._rules:
            match = rule.search(text)
            if match is not None:
                if rule.contents or match.group(0)[-1:] != "/":
                    return rule.excludes
                if decided is None:
                    decided = rule.excludes
        return decided is True

    def whole(self, directory: bytes) -> bool:
        """Tell whether everything below a directory is left out, by its path with both slashes."""
        if self._any is None or b"\n" in directory:
            return False
        match = self._any.search(directory[1:].decode("utf-8", "surrogateescape"))
        return match is not None and match.group(0)[-1:] == "/"


class Rule(NamedTuple):
    """A pattern: whether it leaves out or takes back in, and its regular expression, empty if it has none.

    What the expression matches ends in a slash if that is of a directory above the file.
    """

    excludes: bool
    expression: str = ""
    contents: bool = False  # of the form ``directory/**``, which is about the files in it
    search: Any = None


def translated(pattern: str) -> Rule:
    """Give the rule that a line of a gitignore file stands for."""
    text = pattern if pattern.endswith("\\ ") else pattern.rstrip()
    if not text or text.startswith("#") or text == "/":
        return Rule(True)
    excludes = not text.startswith("!")
    parts = text[0 if excludes else 1 :].split("/")
    end = "(?:/|$)"
    if parts[-1] == "":
        end = "/"
        parts.pop()
    if parts and parts[0] == "":
        parts = parts[1:]
    elif len(parts) == 1:
        parts = ["**", *parts]
    contents = len(parts) > 1 and parts[-1] == "**" and end != "/"
    if contents:
        end = "/"
        parts.pop()
    # Such as "**" by itself: rare, and read differently.
    if not parts or "" in parts or parts[-1] == "**":
        return Rule(excludes)
    expression = "^"
    for part in parts[:-1]:
        inner = segment(part, excludes)
        if inner is None:
            return Rule(excludes)
        expression += "(?:[^/]+/)*" if part == "**" else inner + "/"
    last = segment(parts[-1], excludes)
    return Rule(excludes, f"{expression}{last}{end}" if last is not None else "", contents)


def segment(part: str, excludes: bool) -> Optional[str]:
    """Give the regular expression of a component with ``*``, ``?``, ``[...]``, escapes; None in doubt."""
    expression = ""
    for piece in re.findall(r"\\.|\[[!^]?[A-Za-z0-9_.-]+\]|.", part, re.DOTALL):
        if piece == "*":
            expression += "[^/]*"
        elif piece == "?":
            expression += "[^/]"
        elif piece in ("[", "\\", "\n") or "--" in piece[1:]:
            return None
        elif piece.startswith("["):
            inside = ("^" if piece[1] in "!^" else "") + piece[1:-1].lstrip("!^")
            try:
                slash = re.match(f"[{inside}]", "/") is not None
            except re.error:
                return None
            if slash and excludes:
                if inside[0] != "^":
                    return None
                inside += "/"
            expression += f"[{inside}]"
        else:
            expression += re.escape(piece[-1])
    # Asterisks alone match whole names, which are not empty.
    return "[^/]+" if part == "*" else expression


# --- what was known before --------------------------------------------------------------------------

# A record of the cache: STATUS, the path, NUL, how far to trust it, the md5.
STATUS = struct.Struct(">QqqQQ")  # size, mtime_ns, ctime_ns, inode, device
SOUND = 0x73  # 's', beyond doubt
YOUNG = 0x79  # 'y', but mmap may have changed it since without a trace: once it is older, to be hashed again
RACY = 0x72  # 'r', hashed too soon after it was touched
ROTTEN = 0x58  # 'X'
VALUE_BYTES = 33
CACHE_END = b"mdbackup cache end format=1 ended=%019d position=%010d rotten=%010d crc=%010d\n"
CACHE_END_BYTES = len(CACHE_END % (0, 0, 0, 0))


def cache_end(ended: int, position: int, rotten: int, crc: int) -> bytes:
    """Give the last line of a cache; `ended` is Unix nanoseconds, `position` of the rolling re-hash.

    `rotten` is how many bytes before it have the records of rotten files once more.
    """
    return CACHE_END % (ended, position, rotten, crc)


def checksum(descriptor: int, length: int) -> int:
    """Give the CRC-32 of the first `length` bytes of a file."""
    crc = offset = 0
    while offset < length:
        data = os.pread(descriptor, min(BLOCK_BYTES, length - offset), offset)
        if not data:
            return -1
        crc = zlib.crc32(data, crc)
        offset += len(data)
    return crc


class Cache:
    """The records of the last build, read along with the walk, which goes in the same order."""

    def __init__(self, descriptor: int, length: int, ended: int, position: int, rotten: int) -> None:
        self.ended = ended
        self.position = position
        length -= rotten
        self.rotten = {path_of(record): record for record in records_in(os.pread(descriptor, rotten, length))}
        self._descriptor = descriptor
        self._offset = 0  # of what comes after `_data`
        self._length = length
        self._data = b""
        self._at = 0
        self._refill()

    def _refill(self) -> None:
        data = os.pread(self._descriptor, min(BLOCK_BYTES, self._length - self._offset), self._offset)
        self._offset += len(data)
        self._data = self._data[self._at :] + data
        self._at = 0
        # The last records need no more data, and no refill when little is left.
        self._low = len(self._data) - 2 * LONGEST_PATH if self._offset < self._length else len(self._data) + 1

    def take(self, wanted: bytes) -> Optional[bytes]:
        """Give trust and md5 of the record that begins with status, path and NUL; None if there is none.

        The paths that are asked for must ascend.
        """
        if not self._data.startswith(wanted, self._at) and not self._search(wanted):
            return None
        end = self._at + len(wanted)
        value = self._data[end : end + VALUE_BYTES]
        self._at = end + VALUE_BYTES
        if self._at >= self._low:
            self._refill()
        return value

    def renumbered(self, wanted: bytes) -> bytes:
        """Give trust and md5 of the record that `take` has just not found, if it differs by its device only.

        Some filesystems get another number at each start of the server. Such a record does not spare the
        hashing, but tells rot from a change.
        """
        data, at, end = self._data, self._at, self._at + len(wanted)
        of_device = STATUS.size - 8
        if (
            data[at + STATUS.size : end] == wanted[STATUS.size :]
            and data[at : at + of_device] == wanted[:of_device]
        ):
            return data[end : end + VALUE_BYTES]
        return b""

    def _search(self, wanted: bytes) -> bool:
        """Go to the path, or where it would be; tell whether its record is the wanted one."""
        path = wanted[STATUS.size : -1]
        while self._at < len(self._data):
            end = self._data.find(b"\0", self._at + STATUS.size)
            if end < 0:
                self._at = len(self._data)  # no cache of ours, whatever its checksum says
                return False
            found = self._data[self._at + STATUS.size : end]
            if found >= path:
                return self._data.startswith(wanted, self._at)
            self._at = end + 1 + VALUE_BYTES
            if self._at >= self._low:
                self._refill()
        return False


def records_in(data: bytes) -> Iterator[bytes]:
    """Yield the records that follow one another."""
    at = 0
    while at < len(data):
        end = data.index(b"\0", at + STATUS.size) + 1 + VALUE_BYTES
        yield data[at:end]
        at = end


def path_of(record: bytes) -> bytes:
    """Give the path in a record."""
    return record[STATUS.size : -1 - VALUE_BYTES]


def open_cache(place: Place, report: Report) -> Optional[Cache]:
    """Open the cache of the last build if it is there and whole."""
    try:
        descriptor = place.open("cache", os.O_RDONLY)
    except FileNotFoundError:
        return None
    except OSError as error:
        report.note(f"the cache is not used, everything is hashed: {reason_of(error)}")
        return None
    status = os.fstat(descriptor)
    length = status.st_size - CACHE_END_BYTES
    if not stat.S_ISREG(status.st_mode) or status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
        report.note("the cache is not used, everything is hashed: others can write it, or it is no file")
    else:
        pattern = (
            rb"mdbackup cache end format=1 ended=([0-9]{19}) position=([0-9]{10}) rotten=([0-9]{10})"
            rb" crc=([0-9]{10})\n"
        )
        end = re.fullmatch(pattern, os.pread(descriptor, CACHE_END_BYTES, max(0, length)))
        if length >= 0 and end and checksum(descriptor, length) == int(end[4]):
            return Cache(descriptor, length, int(end[1]), int(end[2]), int(end[3]))
        report.note("the cache is not used, everything is hashed: it is damaged or of another format")
    os.close(descriptor)
    return None


# --- hashing, in processes of their own -------------------------------------------------------------


# Where FIPS rules forbid md5 for security, it has to be said that this is none; elsewhere that costs time.
new_md5: Any = hashlib.md5
try:
    hashlib.md5()  # noqa: S324
except ValueError:
    new_md5 = functools.partial(hashlib.md5, usedforsecurity=False)

MUST_ESCAPE = re.compile(rb"[\\\n\r]").search


def index_line(md5: bytes, path: bytes) -> bytes:
    """Give a line of the index, escaped as GNU md5sum 9 does."""
    line = escaped(path)
    return b"%s%s  %s\n" % (b"" if line == path else b"\\", md5, line)


def escaped(path: bytes) -> bytes:
    """Escape a path as GNU md5sum 9 does in its lines."""
    return path.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")


def status_of(found: os.stat_result) -> bytes:
    """Give what a record holds of a file's status."""
    size, modified, changed = found.st_size, found.st_mtime_ns, found.st_ctime_ns
    try:
        return STATUS.pack(size, modified, changed, found.st_ino, found.st_dev)
    except struct.error:  # before 1678, or after 2262
        return STATUS.pack(size, wrapped(modified), wrapped(changed), found.st_ino, found.st_dev)


def wrapped(time: int) -> int:
    """Give a time as 64 bits hold it; another time becomes another number, which is all that counts."""
    return (time + (1 << 63)) % (1 << 64) - (1 << 63)


def trust(age: int, sighted: int) -> int:
    """Tell how far to trust an md5: of a file that was touched so many nanoseconds before it was hashed.

    The file is still as a build saw it that ended `sighted` nanoseconds before.
    """
    if max(age, sighted) > WRITEBACK_NS:
        return SOUND
    return YOUNG if age > TICK_NS else RACY


class Job(NamedTuple):
    """What to hash: names, each after its directory (which ends in a slash) if that is another than before.

    `known` has for each name what the cache knows of the file as it is now: status, trust, md5, or nothing.
    """

    names: List[bytes]
    known: List[bytes]
    single: bool  # hash big files too
    joined: bool  # the lines may come in one piece, and so may the records: cheaper
    sighted: int  # nanoseconds since the build from which `known` is


class Answer(NamedTuple):
    """What became of a job: for each name its index line and record, empty if it has none."""

    lines: List[bytes]
    records: List[bytes]
    refused: List[Tuple[bytes, str]]  # path, why
    rotten: List[bytes]  # their records
    big: List[Tuple[int, bytes, bytes]]  # left for a job of its own: which of the names, path, known
    size: int = 0
    hashed: int = 0


class Hasher:
    """Hashes jobs. `advance` is told the bytes that are read, `watch` how far it is in a large file."""

    def __init__(
        self, root: int, advance: Optional[Callable[[int], None]], watch: Callable[[int], None]
    ) -> None:
        self._root = root
        self._advance = advance
        self._watch = watch
        self._local: Dict[int, bool] = {}
        self._buffer = bytearray(BLOCK_BYTES)

    def run(self, job: Job) -> Answer:
        """Do a job."""
        answer = Answer([], [], [], [], [])
        size_of_all = hashed_files = 0
        folder, lost = b"", None  # type: Tuple[bytes, Optional[OSError]]
        known = iter(job.known)
        escape = MUST_ESCAPE(b"".join(job.names)) is not None
        # What was last touched before this time is not being changed while we hash it.
        quiet = time_ns() - TICK_NS - 10**6
        for name in job.names:
            if name[-1] == SLASH:
                folder, lost = name, self._enter(name)
                continue
            path = folder + name
            before = next(known)
            line = record = b""
            try:
                if lost is not None:
                    raise lost
                hashed = self._quickly(name, quiet) if not before else None
                if hashed is None:
                    hashed = self._carefully(name, before, job)
                if hashed is None:
                    answer.big.append((len(answer.lines), path, before))
                else:
                    status, value, size = hashed
                    line = index_line(value[1:], path) if escape else value[1:] + b"  " + path + b"\n"
                    record = status + path + b"\0" + value
                    size_of_all += size
                    hashed_files += 1
                    if value[0] == ROTTEN:
                        answer.rotten.append(record)
            except Unsteady:
                answer.refused.append((path, "changed while being read"))
            except OSError as error:
                if error.errno not in GONE and (lost is not None or is_file(name)):
                    answer.refused.append((path, reason_of(error)))
            answer.lines.append(line)
            answer.records.append(record)
        answer = answer._replace(size=size_of_all, hashed=hashed_files)
        if job.joined and not answer.big:
            return answer._replace(lines=[b"".join(answer.lines)], records=[b"".join(answer.records)])
        return answer

    def _enter(self, folder: bytes) -> Optional[OSError]:
        """Go into a directory below the root, following no symlink; give the error if that fails."""
        try:
            descriptor = open_below(self._root, folder)
            try:
                os.fchdir(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            return error
        return None

    @staticmethod
    def _open(name: bytes) -> int:
        """Open a file; one on which another program holds a lease is left to us after a moment."""
        for _ in range(HASH_TRIES):
            try:
                return os.open(name, OPEN_FILE)
            except BlockingIOError:
                time.sleep(POLL_SECONDS)
        return os.open(name, OPEN_FILE)

    def _quickly(self, name: bytes, quiet: int) -> Optional[Tuple[bytes, bytes, int]]:
        """Hash a small file that was not touched for a while, by one read; None if it is not one of these."""
        descriptor = self._open(name)
        try:
            data = os.read(descriptor, SMALL_BYTES)
            found = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        size, modified, changed = found.st_size, found.st_mtime_ns, found.st_ctime_ns
        touched = modified if modified > changed else changed
        if touched >= quiet or len(data) != size or size >= SMALL_BYTES:
            return None
        if not stat.S_ISREG(found.st_mode) or not self._local.get(found.st_dev):
            return None
        if self._advance is not None:
            self._advance(size)
        status = status_of(found)
        value = new_md5(data).hexdigest().encode()
        return status, (b"s" if touched < quiet + TICK_NS - WRITEBACK_NS else b"y") + value, size

    def _carefully(self, name: bytes, known: bytes, job: Job) -> Optional[Tuple[bytes, bytes, int]]:
        """Hash a file of any size and age; give status, trust with md5, and size in bytes.

        Gives None for a big file that should have a job of its own. Raises `Unsteady` if it changes each time
        while it is read.
        """
        for _ in range(HASH_TRIES):
            descriptor = self._open(name)
            try:
                begun = time_ns()
                found = os.fstat(descriptor)
                if not stat.S_ISREG(found.st_mode):
                    raise FileNotFoundError(errno.ENOENT, "it is no regular file any more")
                if found.st_size >= BIG_BYTES and not job.single:
                    return None
                status = status_of(found)
                md5, size = self._content(descriptor, found)
                if status != status_of(os.fstat(descriptor)):
                    continue
                age = (
                    begun - max(found.st_mtime_ns, found.st_ctime_ns)
                    if self._is_local(found, descriptor)
                    else -1
                )
                if known[: STATUS.size] != status:
                    return status, b"%c%s" % (trust(age, 0), md5), size
                trusted, sound = known[STATUS.size], known[STATUS.size + 1 :]
                if md5 == sound or trusted not in (SOUND, ROTTEN):
                    return status, b"%c%s" % (trust(age, job.sighted), md5), size
                # To write the file's pages back makes a later change through mmap move its times.
                with contextlib.suppress(OSError):
                    os.fsync(descriptor)
                os.lseek(descriptor, 0, os.SEEK_SET)
                again, _ = self._content(descriptor, found)
                if again == md5 and status == status_of(os.fstat(descriptor)):
                    return status, b"%c%s" % (ROTTEN, sound), size
            finally:
                os.close(descriptor)
        raise Unsteady

    def _content(self, descriptor: int, found: os.stat_result) -> Tuple[bytes, int]:
        """Hash a file from its beginning to the end; give md5 and number of bytes.

        One that grows while it is read is not followed: its writer may be faster for ever.
        """
        md5 = new_md5()
        size = 0
        view = memoryview(self._buffer)
        while True:
            count = os.readv(descriptor, [view])
            if not count:
                return md5.hexdigest().encode(), size
            if self._advance is not None:
                self._advance(count)
            md5.update(view[:count])
            size += count
            if count == BLOCK_BYTES:
                self._watch(size)
            if size > found.st_size and status_of(os.fstat(descriptor)) != status_of(found):
                return md5.hexdigest().encode(), size

    def _is_local(self, found: os.stat_result, descriptor: int) -> bool:
        """Tell whether a file is stamped by this machine's clock, as far as that can be known."""
        if found.st_dev not in self._local:
            self._local[found.st_dev] = is_local(descriptor, found.st_dev)
        return self._local[found.st_dev]


def is_local(descriptor: int, device: int) -> bool:
    """Tell whether an open file lies on a local filesystem.

    Source: proc_pid_mountinfo(5), and mnt_id of proc_pid_fdinfo(5), since the device of a file on btrfs or
    overlay need not be that of a mount. Kernels before 3.15 tell the device only.
    """
    mount = None
    with contextlib.suppress(OSError, ValueError, IndexError):
        with open("/proc/self/fdinfo/%d" % descriptor, "rb") as lines:
            for line in lines:
                if line.startswith(b"mnt_id:"):
                    mount = line.split()[1]
        with open("/proc/self/mountinfo", "rb") as lines:
            for line in lines:
                fields = line.split()
                major, minor = fields[2].split(b":")
                if fields[0] == mount if mount else os.makedev(int(major), int(minor)) == device:
                    return fields[fields.index(b"-") + 1] in LOCAL_FILESYSTEMS
    return False


class Unsteady(Exception):
    """A file changed while it was read, each time."""


def local_devices() -> Set[int]:
    """Give the device numbers of mounted local filesystems. Source: proc_pid_mountinfo(5)."""
    devices = set()
    with contextlib.suppress(OSError, ValueError, IndexError), open("/proc/self/mountinfo", "rb") as mounts:
        for line in mounts:
            fields = line.split()
            major, minor = fields[2].split(b":")
            if fields[fields.index(b"-") + 1] in LOCAL_FILESYSTEMS:
                devices.add(os.makedev(int(major), int(minor)))
    return devices


def is_file(name: bytes) -> bool:
    """Tell whether a name is still that of a regular file, as far as that can be told."""
    try:
        return stat.S_ISREG(os.lstat(name).st_mode)
    except OSError as error:
        return error.errno not in GONE


class Throttle:
    """Bytes per second of all processes together.

    The time when the next may read lies in a pipe: who takes it out has the turn, and puts it back with the
    time for its own bytes added.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parent = os.getpid()  # of those who take; not asked for later, when it may be gone already
        self.descriptors = os.pipe()
        os.write(self.descriptors[1], struct.pack(">d", 0))

    def take(self, count: int) -> None:
        """Wait until so many bytes may be read; end this process if its parent is gone."""
        (turn,) = struct.unpack(">d", os.read(self.descriptors[0], 8))
        now = time.monotonic()
        turn = max(turn, now - 1)  # a pause is made good for a second
        os.write(self.descriptors[1], struct.pack(">d", turn + count / self._limit))
        while turn > now:
            if os.getppid() != self._parent:
                os._exit(1)
            time.sleep(min(turn - now, 1))
            now = time.monotonic()


def read_message(descriptor: int) -> Any:
    """Read what `message` wrote; None at the end."""
    data = b""
    wanted = 4
    while len(data) < wanted:
        more = os.read(descriptor, wanted - len(data))
        if not more:
            return None
        data += more
        if len(data) == wanted == 4:
            wanted += int.from_bytes(data, "big")
    return marshal.loads(data[4:])  # noqa: S302  (of our own fork)


def message(value: Any) -> bytes:
    data = marshal.dumps(value)
    return len(data).to_bytes(4, "big") + data


def work(root: int, jobs: int, results: int, throttle: Optional[Throttle]) -> None:
    """Hash the jobs that come, until there are no more or the parent is gone; this is all a worker does."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the parent decides
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    keep = {root, jobs, results, *(throttle.descriptors if throttle else ())}
    for name in os.listdir("/dev/fd") if os.path.isdir("/dev/fd") else range(3, 1024):
        if int(name) > 2 and int(name) not in keep:
            with contextlib.suppress(OSError):
                os.close(int(name))
    told = time.monotonic()

    def watch(size: int) -> None:
        # If the parent is gone, this is where it is noticed: nobody reads any more.
        nonlocal told
        if time.monotonic() > told + 1:
            told = time.monotonic()
            write_all(results, message(size))

    hasher = Hasher(root, throttle.take if throttle else None, watch)
    while True:
        job = read_message(jobs)
        if job is None:
            return
        write_all(results, message(tuple(hasher.run(Job(*job)))))


class Worker:
    """The parent's end of a worker."""

    def __init__(self, pid: int, jobs: int, results: int) -> None:
        self.pid = pid
        self.jobs = jobs
        self.results = results
        self.queue: Deque[Any] = collections.deque()  # batches or big files it was given, first one first
        self.at = 0  # bytes of the file it is in
        self._sending = b""
        self._received = b""

    def send(self, data: bytes = b"") -> bool:
        """Send as much as the pipe takes, and tell whether that is all: so nobody waits for one who waits."""
        self._sending += data
        with contextlib.suppress(BlockingIOError):
            self._sending = self._sending[os.write(self.jobs, self._sending) :] if self._sending else b""
        return not self._sending

    @property
    def sending(self) -> bool:
        return bool(self._sending)

    def receive(self) -> Iterator[Any]:
        """Yield the messages that have come."""
        data = os.read(self.results, 1 << 20)
        if not data:
            raise Failure("a process that hashes was ended by somebody, or found no memory")
        self._received += data
        while len(self._received) >= 4:
            length = 4 + int.from_bytes(self._received[:4], "big")
            if len(self._received) < length:
                return
            data, self._received = self._received[4:length], self._received[length:]
            yield marshal.loads(data)  # noqa: S302  (of our own fork)


class Crew:
    """The workers, who are only there once there is something to hash."""

    def __init__(self, request: Request, root: int, sighted: int) -> None:
        self._root = root
        self._size = request.jobs or available_cores()
        self._throttle = Throttle(request.limit) if request.limit else None
        self._sighted = sighted
        self._workers: List[Worker] = []
        self._poll = select.poll()
        self.batches: Deque["Batch"] = collections.deque()
        self.big: Deque["Big"] = collections.deque()

    def running(self) -> int:
        """Give the bytes that are hashed of unfinished files."""
        return sum(worker.at for worker in self._workers)

    @property
    def busy(self) -> bool:
        return bool(self.big or self.batches or any(worker.queue for worker in self._workers))

    @property
    def has_room(self) -> bool:
        """Tell whether it would be of use to submit more."""
        return len(self.batches) < self._size

    def start(self) -> None:
        """Start the workers, if they are not there yet."""
        while len(self._workers) < self._size:
            jobs, results = os.pipe(), os.pipe()
            pid = os.fork()
            if not pid:
                try:
                    work(self._root, jobs[0], results[1], self._throttle)
                except BrokenPipeError:
                    pass  # the parent is gone
                except Exception as error:
                    write_all(results[1], message(str(unexpected(error))))
                finally:
                    os._exit(1)
            os.close(jobs[0])
            os.close(results[1])
            os.set_blocking(jobs[1], False)
            worker = Worker(pid, jobs[1], results[0])
            self._workers.append(worker)
            self._poll.register(worker.results, select.POLLIN)

    def end(self) -> None:
        """End the workers, whatever they are at."""
        for worker in self._workers:
            with contextlib.suppress(OSError):
                os.kill(worker.pid, signal.SIGKILL)
        # One that hangs in a read, of a dead disk or server, ends when that does: nobody waits for it.
        left = [worker.pid for worker in self._workers]
        deadline = time.monotonic() + LAST_READ_SECONDS
        while left and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                left = [pid for pid in left if os.waitpid(pid, os.WNOHANG) == (0, 0)]
            if left:
                time.sleep(0.01)

    def pump(self, seconds: float) -> Iterator[Tuple[Any, Answer]]:
        """Hand out work, wait so long for something to be done, and yield what is."""
        for worker in self._workers:
            self._hand_out(worker)
        for descriptor, _ in self._poll.poll(seconds * 1000):
            for worker in self._workers:
                if descriptor == worker.jobs:
                    self._send(worker)
                elif descriptor == worker.results:
                    for value in worker.receive():
                        if isinstance(value, int):
                            worker.at = value
                        elif isinstance(value, str):
                            raise Failure(value)
                        else:
                            worker.at = 0
                            yield worker.queue.popleft(), Answer(*value)
                    self._hand_out(worker)

    def _hand_out(self, worker: Worker) -> None:
        """Give a worker more to do. Nothing waits behind a big file; one more batch waits behind a batch."""
        if worker.sending:
            return
        if self.big:
            if not worker.queue:
                self._give(worker, self.big.popleft())
            return
        while self.batches and len(worker.queue) < 2 and not any(isinstance(at, Big) for at in worker.queue):
            self._give(worker, self.batches.popleft())

    def _give(self, worker: Worker, work: Any) -> None:
        worker.queue.append(work)
        job = Job(work.names, work.known, isinstance(work, Big), work.joined, self._sighted)
        self._send(worker, message(tuple(job)))

    def _send(self, worker: Worker, data: bytes = b"") -> None:
        try:
            sent = worker.send(data)
        except BrokenPipeError:
            raise Failure("a process that hashes was ended by somebody, or found no memory") from None
        if sent:
            with contextlib.suppress(KeyError):
                self._poll.unregister(worker.jobs)
        else:
            self._poll.register(worker.jobs, select.POLLOUT)


def available_cores() -> int:
    """Give the number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


# --- the output, in path order ----------------------------------------------------------------------


class Batch:
    """Neighbours in the index: lines and records, with gaps for what is still to be hashed."""

    __slots__ = ("big", "files", "gaps", "known", "length", "lines", "names", "records", "size")

    def __init__(self) -> None:
        self.lines: List[bytes] = []
        self.records: List[bytes] = []
        self.gaps: List[int] = []  # where in `lines` the answers belong
        self.names: List[bytes] = []
        self.known: List[bytes] = []
        self.files = 0
        self.size = 0
        self.big: List[Tuple[int, Big]] = []
        self.length = 0  # when it is complete

    @property
    def joined(self) -> bool:
        """Tell whether all of it is still to be hashed, so that the answer takes the place of everything."""
        return len(self.gaps) == len(self.lines)

    def fill(self, answer: Answer) -> None:
        """Put an answer into the gaps."""
        if self.joined:
            self.lines, self.records = answer.lines, answer.records
        else:
            for gap, line, record in zip(self.gaps, answer.lines, answer.records):  # noqa: B905
                self.lines[gap] = line
                self.records[gap] = record
        for number, path, known in answer.big:
            big = Big(path, known)
            gap = self.gaps[number]
            self.lines[gap], self.records[gap] = big.line, big.record
            self.big.append((gap, big))
        self.big.sort(key=lambda item: item[0])
        self.gaps = []


class Big:
    """A big file, a job of its own. Its line and record have a place, which is filled in afterwards."""

    __slots__ = ("known", "line", "line_at", "names", "path", "record", "record_at")
    joined = False

    def __init__(self, path: bytes, known: bytes) -> None:
        self.path = path
        folder, name = path.rsplit(b"/", 1)
        self.names = [folder + b"/", name]
        self.known = [known]
        self.line = index_line(b"0" * 32, path)
        self.record = bytes(STATUS.size) + path + b"\0" + bytes(VALUE_BYTES)
        self.line_at = self.record_at = 0


class Output:
    """The index and the cache that are being written, under temporary names."""

    def __init__(self, place: Place, report: Report, started: int) -> None:
        self._place = place
        self._report = report
        self.temporary = [
            own_name_of(place, kind, b".%d.%d.tmp" % (os.getpid(), started)) for kind in (b"", b".cache")
        ]
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(self.temporary[0], flags, 0o644, dir_fd=place.folder)
        os.fchmod(descriptor, 0o644)
        self._index = os.fdopen(descriptor, "wb", BLOCK_BYTES)
        self._at = self._index.write(b"# mdbackup started %d\n" % started)
        self._cache: Any = None
        self._cache_at = 0
        with self._cache_may_fail():
            descriptor = os.open(self.temporary[1], flags, 0o600, dir_fd=place.folder)
            self._cache = os.fdopen(descriptor, "wb", BLOCK_BYTES)
        self._waiting: List[Big] = []

    @contextlib.contextmanager
    def _cache_may_fail(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._cache = None
            self._report.note(
                f"the cache cannot be written, the next build hashes more than it must: {reason_of(error)}"
            )

    def write(self, batch: Batch) -> None:
        """Write what a batch has."""
        for gap, big in batch.big:
            big.line_at = self._at + sum(map(len, batch.lines[:gap]))
            big.record_at = self._cache_at + sum(map(len, batch.records[:gap]))
            self._waiting.append(big)
        lines, records = b"".join(batch.lines), b"".join(batch.records)
        self._index.write(lines)
        self._at += len(lines)
        if self._cache is not None:
            with self._cache_may_fail():
                self._cache.write(records)
                self._cache_at += len(records)

    def finish(self, unreadable: List[bytes], rotten: List[bytes], end: bytes) -> None:
        """Write the rest of the index and make it durable, still under its temporary name."""
        self._fill_in()
        for word, paths in ((b"unreadable", unreadable), (b"rotten", rotten)):
            for path in paths:
                self._index.write(b"# mdbackup %s %s\n" % (word, escaped(path)))
        self._index.write(end)
        self._index.flush()
        os.fsync(self._index.fileno())

    def _fill_in(self) -> None:
        """Write the lines of big files into their places, and close up where there is none."""
        self._index.flush()
        empty = []
        for big in self._waiting:
            if big.line:
                os.pwrite(self._index.fileno(), big.line, big.line_at)
            else:
                empty.append((big.line_at, len(index_line(b"0" * 32, big.path))))
        if empty:
            close_up(self._index.fileno(), empty, self._at)
            self._index.seek(0, os.SEEK_END)
        if self._cache is not None:
            with self._cache_may_fail():
                self._cache.flush()
                for big in self._waiting:
                    os.pwrite(self._cache.fileno(), big.record, big.record_at)

    def put_in_place(self, position: int, rotten: bytes) -> None:
        """Rename the index into place, and then the cache, with the records of rotten files."""
        self._place.rename(self.temporary[0])
        self._index.close()
        if self._cache is not None:
            with self._cache_may_fail():
                self._cache.write(rotten)
                self._cache.flush()
                crc = checksum(self._cache.fileno(), self._cache_at + len(rotten))
                self._cache.write(cache_end(time_ns(), position, len(rotten), crc))
                self._cache.flush()
                os.fsync(self._cache.fileno())
                self._place.rename(self.temporary[1], "cache")
                self._cache.close()

    def discard(self) -> None:
        """Remove what has not been renamed."""
        for name in self.temporary:
            self._place.remove(name)


def own_name_of(place: Place, kind: bytes, suffix: bytes) -> bytes:
    return b"." + place.name + kind + suffix


def time_ns() -> int:
    return int(time.time() * 1e9)


def close_up(descriptor: int, empty: List[Tuple[int, int]], length: int) -> None:
    """Move the content of a file together over gaps (offset, bytes; ascending), and shorten it."""
    to = empty[0][0]
    for (offset, size), (following, _) in zip(empty, [*empty[1:], (length, 0)]):  # noqa: B905
        at = offset + size
        while at < following:
            data = os.pread(descriptor, min(BLOCK_BYTES, following - at), at)
            os.pwrite(descriptor, data, to)
            at += len(data)
            to += len(data)
    os.ftruncate(descriptor, to)


# --- the walk ---------------------------------------------------------------------------------------


class Level(NamedTuple):
    """A directory that the walk is in."""

    path: bytes  # ends with a slash
    descriptor: int
    names: Iterator[bytes]  # in order; those of directories end with a slash
    identity: Tuple[int, int]  # device, inode
    escape: bool  # some name must be escaped
    passage: bool = False  # on another filesystem, where only the way to the sources below it is walked


class Builder:
    """Builds one index."""

    def __init__(self, request: Request, root: int, place: Place, report: Report) -> None:
        self._request = request
        self._root = root
        self._place = place
        self._report = report
        self._excluded = Excluded(request.exclude)
        self._cache = open_cache(place, report)
        # Rotten files by path. Those that a build cannot read, or does not come by, are remembered.
        self._in_doubt: Dict[bytes, bytes] = {}  # of them, those that are being hashed again
        self._rotten = dict(self._cache.rotten) if self._cache is not None else {}  # type: Dict[bytes, bytes]
        self._window: Deque[Batch] = collections.deque()
        self._window_lines = 0
        self._batch = Batch()
        self._noted = 0
        now = time_ns()
        sighted = now - self._cache.ended if self._cache else 0
        self._crew = Crew(request, root, sighted)
        report.running = self._crew.running
        position = self._cache.position if self._cache else 0
        if request.rehash in ("all", "changed"):
            self._due = (0, 0)
        else:
            self._due = (position, min(MOST_CRC, int(float(request.rehash) * MOST_CRC / 100) + 1))
        self._position = (position + self._due[1]) % MOST_CRC
        self._begun = now

    def build(self, watch: Watch) -> None:
        """Build the index and put it in place of the old one; if that fails, the old one stays as it was."""
        if self._request.nice:
            os.nice(self._request.nice)
        output = Output(self._place, self._report, self._begun // 10**9)
        self._output = output
        try:
            if self._cache is None:
                self._crew.start()  # while we are small
            for point in sorted(self._starting_points()):
                self._walk(point)
            self._close_batch()
            while self._window or self._crew.busy:
                self._pump(1.0)
            report = self._report
            output.finish(
                sorted(report.unreadable),
                sorted(report.rotten),
                b"# mdbackup end format=%d files=%d unreadable=%d bytes=%d\n"
                % (FORMAT, report.files, len(report.unreadable), report.bytes),
            )
            watch.end()
            output.put_in_place(self._position, b"".join(self._rotten[path] for path in sorted(self._rotten)))
        finally:
            watch.end()
            self._crew.end()
            output.discard()

    # The sources.

    def _starting_points(self) -> List[bytes]:
        """Give the sources that exist, each once, without those that lie in another."""
        found = {point for point in map(self._starting_point, self._request.source) if point is not None}
        directories = [point for point in found if point.endswith(b"/")]
        return [
            point for point in found if not any(point != top and point.startswith(top) for top in directories)
        ]

    def _starting_point(self, source: bytes) -> Optional[bytes]:
        """Give a source, with a slash at its end if it is a directory; or None, after saying why."""
        if source == b"/":
            return source
        directory = os.dup(self._root)
        mode = 0
        try:
            for prefix in prefixes(source):
                name = prefix.rsplit(b"/", 1)[1]
                mode = os.lstat(name, dir_fd=directory).st_mode
                if stat.S_ISLNK(mode):
                    what = "is a symlink" if prefix == source else "lies below a symlink"
                    self._report.refuse(source, what)
                    return None
                if prefix != source:
                    below = os.open(name, OPEN_PASSAGE, dir_fd=directory)
                    os.close(directory)
                    directory = below
        except OSError as error:
            self._report.refuse(source, "does not exist" if error.errno in GONE else reason_of(error))
            return None
        finally:
            os.close(directory)
        if stat.S_ISDIR(mode):
            return source + b"/"
        if stat.S_ISREG(mode):
            return source
        self._report.refuse(source, "is neither a regular file nor a directory")
        return None

    # What lies below them.

    def _walk(self, point: bytes) -> None:
        """Go through a source."""
        folder, name = point.rsplit(b"/", 1)
        try:
            descriptor = open_below(self._root, folder)
            os.fchdir(descriptor)
        except OSError as error:
            self._refuse(point, error)
            return
        identity = (os.fstat(descriptor).st_dev, os.fstat(descriptor).st_ino)
        if name:
            names = [] if self._is_own(folder + b"/", name) else [name]
            escape = escaped(point) != point
            stack = [Level(folder + b"/", descriptor, iter(names), identity, escape)]
        else:
            stack = [self._level(point, descriptor)]
        while stack:
            subdirectory = self._files(stack[-1])
            if subdirectory:
                below = self._below(stack, subdirectory)
                if below is not None:
                    stack.append(below)
                else:
                    os.fchdir(stack[-1].descriptor)
            else:
                os.close(stack.pop().descriptor)
                if stack:
                    os.fchdir(stack[-1].descriptor)

    def _below(self, stack: List[Level], name: bytes) -> Optional[Level]:
        """Go into a directory of the one that the walk is in; None if it is not to be walked."""
        above = stack[-1]
        path = above.path + name
        if self._excluded.whole(path) or self._is_own(above.path, name):
            return None
        descriptor = -1
        try:
            descriptor = os.open(name[:-1], OPEN_DIRECTORY)
            os.fchdir(descriptor)
            status = os.fstat(descriptor)
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            self._refuse(path, error)
            return None
        why = ""
        passage = (
            self._request.one_file_system
            and (above.passage or status.st_dev != above.identity[0])
            and path[:-1] not in self._request.source
        )
        if passage and not any(source.startswith(path) for source in self._request.source):
            why = "is on another filesystem"
        elif any(level.identity == (status.st_dev, status.st_ino) for level in stack):
            why = "is a directory above it once more, by a mount"
        if why:
            os.close(descriptor)
            self._noted += 1
            if self._noted <= LOGGED:
                self._report.note(f"{printable(path[:-1])} {why}, and is left out")
            return None
        return self._level(path, descriptor, passage)

    def _level(self, path: bytes, descriptor: int, passage: bool = False) -> Level:
        """List the directory that the walk has just gone into."""
        names: List[bytes] = []
        add = names.append
        try:
            with os.scandir(b".") as entries:
                for entry in entries:
                    if entry.is_file(follow_symlinks=False):
                        add(entry.name)
                    elif entry.is_dir(follow_symlinks=False):
                        add(entry.name + b"/")
        except OSError as error:
            self._refuse(path, error)
        if names and (max(map(len, names)) > LONGEST_NAME or len(path) + max(map(len, names)) > LONGEST_PATH):
            # No index can hold such a path itself, not even as unreadable.
            short = [name for name in names if not too_long(path + name.rstrip(b"/"))]
            if len(short) < len(names):
                self._report.refuse(path.rstrip(b"/") or b"/", "a path or name in it is too long")
            names = short
        if path == self._place.directory + b"/":
            names = [name for name in names if not self._place.is_own(name)]
        if passage:
            ways = [source + b"/" for source in self._request.source]
            names = [
                name for name in names if any(way.startswith(path + name.rstrip(b"/") + b"/") for way in ways)
            ]
        names.sort()
        some = range(0, len(names), BATCH_LINES)
        escape = any(MUST_ESCAPE(path + b"".join(names[at : at + BATCH_LINES])) for at in some)
        status = os.fstat(descriptor)
        return Level(path, descriptor, iter(names), (status.st_dev, status.st_ino), escape, passage)

    def _is_own(self, folder: bytes, name: bytes) -> bool:
        return folder == self._place.directory + b"/" and self._place.is_own(name) is not None

    def _refuse(self, path: bytes, error: OSError) -> None:
        """Note a file or directory as unreadable, unless it is gone, or nobody wants it."""
        excluded = (self._excluded.whole if path.endswith(b"/") else self._excluded.file)(path)
        path = path.rstrip(b"/") or b"/"
        # A directory may go while the walk is on its way to it, a source may not.
        if error.errno in GONE:
            if path in self._request.source:
                self._report.refuse(path, "does not exist")
        elif not excluded:
            self._report.refuse(path, reason_of(error))

    # The files of a directory, which is where the time goes.

    def _files(self, level: Level) -> bytes:
        """Pass the files by up to the next directory, whose name is given, or the end."""
        folder, names, escape = level.path, level.names, level.escape
        excluded = self._excluded.file if self._excluded else None
        take = self._cache.take if self._cache is not None else None
        rehash_all = self._request.rehash == "all"
        due_from, due = self._due
        grown_up = self._begun - WRITEBACK_NS
        lstat, pack, crc32 = os.lstat, STATUS.pack, zlib.crc32
        batch = self._batch
        first = True
        for name in names:
            if name[-1] == SLASH:
                return name
            path = folder + name
            if excluded is not None and excluded(path):
                continue
            known = b""
            if take is not None:
                try:
                    found = lstat(name)
                    modified, changed = found.st_mtime_ns, found.st_ctime_ns
                    status = pack(found.st_size, modified, changed, found.st_ino, found.st_dev)
                except OSError as error:
                    self._refuse(path, error)
                    continue
                except struct.error:
                    status = status_of(found)
                wanted = status + path + b"\0"
                value = take(wanted)
                if value is not None:
                    if (
                        (
                            value[0] == SOUND
                            or (value[0] == YOUNG and grown_up < max(modified, changed) < self._begun)
                        )
                        and not rehash_all
                        and (not due or (crc32(path) - due_from) % MOST_CRC >= due)
                    ):
                        if escape:
                            batch.lines.append(index_line(value[1:], path))
                        else:
                            batch.lines.append(value[1:] + b"  " + path + b"\n")
                        batch.records.append(wanted + value)
                        batch.files += 1
                        batch.size += found.st_size
                        if len(batch.lines) >= BATCH_LINES:
                            batch = self._close_batch()
                            first = True
                        continue
                    known = wanted[: STATUS.size] + value
                else:
                    known = self._known_of_old(path, wanted)
                if path in self._rotten:
                    self._in_doubt[path] = self._rotten.pop(path)
            if first:
                batch.names.append(folder)
                first = False
            batch.gaps.append(len(batch.lines))
            batch.lines.append(b"")
            batch.records.append(b"")
            batch.names.append(name)
            batch.known.append(known)
            if len(batch.gaps) >= BATCH_FILES:
                batch = self._close_batch()
                first = True
        return b""

    def _known_of_old(self, path: bytes, wanted: bytes) -> bytes:
        """Give what is known of a file that the cache does not have as it is: status, trust, md5."""
        assert self._cache is not None
        value = self._cache.renumbered(wanted)
        record = self._rotten.get(path)
        if not value and record is not None and record[: STATUS.size - 8] == wanted[: STATUS.size - 8]:
            value = record[-VALUE_BYTES:]
        return wanted[: STATUS.size] + value if value else b""

    def _close_batch(self) -> Batch:
        """Hand on what has been collected, and begin anew."""
        batch = self._batch
        self._batch = Batch()
        if not batch.lines:
            return self._batch
        self._report.files += batch.files
        self._report.bytes += batch.size
        if batch.gaps:
            self._crew.start()
            self._crew.batches.append(batch)
        self._window.append(batch)
        batch.length = len(batch.lines)
        self._window_lines += batch.length
        self._write_finished()
        if self._window:
            self._pump(0)
            while self._window_lines > WINDOW_LINES or not self._crew.has_room:
                self._pump(1.0)
        return self._batch

    def _pump(self, seconds: float) -> None:
        """Keep the workers busy, and take in what they have done."""
        for work, answer in self._crew.pump(seconds):
            report = self._report
            report.files += answer.hashed
            report.hashed += answer.hashed
            report.bytes += answer.size
            for path, why in answer.refused:
                if path in self._in_doubt:
                    self._rotten[path] = self._in_doubt[path]
                if not self._excluded.file(path):
                    report.refuse(path, why)
            for record in answer.rotten:
                path = path_of(record)
                report.rot(path)
                self._rotten[path] = record
            if isinstance(work, Big):
                work.line = answer.lines[0]
                work.record = answer.records[0] or work.record
            else:
                work.fill(answer)
                self._crew.big.extend(big for _, big in work.big)
        self._write_finished()

    def _write_finished(self) -> None:
        while self._window and not self._window[0].gaps:
            batch = self._window.popleft()
            self._window_lines -= batch.length
            self._output.write(batch)


# --- from the command line --------------------------------------------------------------------------


def read_arguments(arguments: List[str], standard_input: Input, report: Report) -> Optional[Request]:
    """Get the request from the command line and whatever that names; None if it was only to be checked."""
    if arguments == ["--request-from-stdin"]:  # the common case need not wait for argparse
        return request_of(read_json(standard_input.request(), "the request"))
    import argparse

    parser = argparse.ArgumentParser(description="Build the provider index of airflow-mdbackup.")
    add = parser.add_argument
    add("--chroot", default="/", help="directory that the backup account sees as / (default /)")
    add("--source", action="append", help="what to index, as the backup account sees it; repeatable")
    add("--index", default=DEFAULT_INDEX, help="the index to write (default %(default)s)")
    add("--exclude", action="append", default=[], help="gitignore pattern of what to leave out; repeatable")
    add("--jobs", type=int, help="processes that hash (default: one for each core)")
    add("--nice", type=int, default=0, help="lower the priority by 0 to 19")
    add("--limit", type=int, help="bytes per second to read at most")
    add("--rehash", default="changed", help="changed (default), all, or percent of the files in each build")
    add("--one-file-system", action="store_true", help="leave out what is mounted below a source")
    add("--request-from-stdin", action="store_true", help="take it all from a line of JSON")
    add("--config", help="take it all from a JSON file: chroot, source, index, exclude and so on")
    add("--serve", action="store_true", help="with --config: the forced command of an SSH key")
    add("--check", action="store_true", help="with --config: say whether that is sound, build nothing")
    options = parser.parse_args(arguments)
    if options.request_from_stdin:
        return request_of(read_json(standard_input.request(), "the request"))
    if options.config is not None:
        return configured(os.fsencode(options.config), options, standard_input, report)
    standard_input.close()
    if options.serve or options.check:
        parser.error("--serve and --check need --config")
    if not options.source:
        parser.error("--source is needed at least once")
    try:
        rehash = float(options.rehash)
    except ValueError:
        rehash = options.rehash
    return checked(
        Request(
            os.fsencode(options.chroot),
            tuple(os.fsencode(path) for path in options.source),
            os.fsencode(options.index),
            None,
            tuple(options.exclude),
            options.jobs,
            options.nice,
            options.limit,
            rehash,
            options.one_file_system,
        )
    )


def configured(path: bytes, options: Any, standard_input: Input, report: Report) -> Optional[Request]:
    """Get the request from a configuration file; as a forced command its id from standard input."""
    if not options.serve or options.check:
        standard_input.close()
        config = read_config(path)
        if options.check:
            os.close(open_root(config.chroot))
            report.note(f"the configuration {printable(path)} is sound")
            return None
        return config
    report.say("mdbackup ready request")
    asked = read_json(standard_input.request(), "the request")
    request, notes = served(asked, path, read_config(path))
    for note in notes:
        report.note(note)
    return request


def run(request: Request, report: Report, watch: Watch) -> int:
    """Build an index, or follow the build of the same request that is running; give the exit status."""
    root = open_root(request.chroot)
    try:
        new_md5()
    except (TypeError, ValueError) as error:
        raise Failure("this Python may not use md5, as FIPS rules have it; 3.9 or newer can") from error
    try:
        place = Place(request, root)
        status = place.acquire(report, watch)
        if status is not None:
            return status
        try:
            watch.begin(place.stop_asked)
            try:
                Builder(request, root, place, report).build(watch)
            except OSError as error:
                raise unwritable(request, error) from error
            return report.done()
        except Exception as error:  # told before the lock is free, to those who follow
            watch.end()
            report.say(f"mdbackup error {unexpected(error)}")
            return 1
        finally:
            watch.end()
            place.release()
    except OSError as error:
        raise unwritable(request, error) from error


def unexpected(error: Exception) -> Failure:
    """Give any error as a failure, so that there is a last line whatever happens: others are defects."""
    if isinstance(error, Failure):
        return error
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    line = at.tb_lineno if at is not None else 0
    what = f"{type(error).__name__} in line {line}, {error}"
    return Failure(f"unexpected: {printable_text(what)[:1000]} (a defect of the indexer, please report it)")


def unwritable(request: Request, error: OSError) -> Failure:
    shown = printable(request.chroot + request.index)
    return Failure(
        f"cannot write {shown}: {reason_of(error)} (the index account must be able to write there)"
    )


def main(arguments: List[str]) -> int:
    """Build the index; return 0: complete, 3: something was unreadable or rotten, 1: there is none."""
    # Else a file that is opened later gets the number of a closed standard output, and these lines.
    for standard in (0, 1, 2):
        try:
            os.fstat(standard)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    gc.disable()  # nothing here makes cycles, and looking for them takes time
    raise_descriptor_limit()
    report, standard_input = Report(), Input()
    watch = Watch(report, standard_input)
    try:
        request = read_arguments(arguments, standard_input, report)
        return 0 if request is None else run(request, report, watch)
    except Exception as error:
        watch.end()
        report.say(f"mdbackup error {unexpected(error)}")
        return 1
    finally:
        report.flush(LAST_WORDS_SECONDS)


def raise_descriptor_limit() -> None:
    """Allow as many open files as a deep tree needs, one for each directory on the way down."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = DEEPEST if hard == resource.RLIM_INFINITY else min(DEEPEST, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
