"""All works, by name."""

from __future__ import annotations

from functools import partial

from benchmarks.copying import copying, percent
from benchmarks.data import Data
from benchmarks.floor import floor
from benchmarks.getting import MD5SUM as MD5SUM_CHECKS
from benchmarks.getting import restoring, verifying
from benchmarks.growth import diff, growth, memory
from benchmarks.indexer import FIND, MD5SUM, indexing
from benchmarks.overhead import NOTHING, overhead
from benchmarks.work import Against, Work

_COPYING = (
    "Counted of ours: PullChanged, ArchiveOld, CommitBackup, with connecting and syncing; not imports, index "
    "and comparison. Of the others: the whole program, which verifies and syncs nothing."
)
_FLOOR = (
    "One connection, one process: PullChanged without staging, results and sync. md5 alone: as many bytes."
)
_INDEX = (
    "The whole program in each case, with hot page cache. md5sum: find, and xargs with as many processes as "
    "there are cores. Memory is that of all processes of a build, what they share counted once."
)
_RESTORING = (
    "The whole program in each case. Ours compares each md5 with the one of the backup, and syncs what it "
    "restored; rclone compares that of each file that it copied; rsync verifies nothing."
)
_VERIFYING = (
    "The whole program in each case. Ours reads all of history, and looks for files that it does not know; "
    "the others read the live files by a list that they get. Bare Python opens, reads, hashes and compares, "
    "with one process on each of two cores, and does nothing else."
)
_TENTH, _HUNDRED_FILES = "/part00000", "/part00000/dir00"
_SMALL = Data(20_000, 512, 8192)
_MEDIUM = Data(2_000, 100 << 10, 1 << 20)
_LARGE = Data(4, 256 << 20, 256 << 20)
_MANY = Data(1_000_000, 16, 64)

_index = partial(
    Work,
    note=_INDEX,
    measure=indexing,
    wanted=((MD5SUM, "1.0 x"), (FIND, "0.25 x"), ("memory of ours", "256 MiB")),
)
_restore = partial(Work, note=_RESTORING, measure=restoring)
_verify = partial(Work, note=_VERIFYING, measure=verifying, wanted=((MD5SUM_CHECKS, "0.9 x"),))
_copying = partial(Work, note=_COPYING, measure=copying, rtt=(0,))

WORKS = {
    "small": _copying(
        "20,000 files of 0.5 to 8 KB",
        data=_SMALL,
        against=(
            Against("sftp", "12 x"),
            Against("rclone", "7 x"),
            Against("lftp", "5 x"),
            Against("SFTPHook", "25 x", _TENTH),
            Against("rsync -a", "0.7 x, 1.0 x"),
        ),
    ),
    "large": _copying(
        "4 files of 256 MiB",
        data=_LARGE,
        against=tuple(Against(peer, "1.0 x, 1.3 x") for peer in ("sftp", "rclone", "rsync -a")),
        shards=(1, 2),
    ),
    "one": _copying("1 file of 1 GiB", data=Data(1, 1 << 30, 1 << 30), against=(Against("sftp", "1.0 x"),)),
    "small-rtt": _copying(
        "20,000 files of 0.5 to 8 KB, 20 ms away",
        data=_SMALL,
        against=(Against("rsync -a", "1.0 x"), Against("sftp", "40 x", _TENTH)),
        rtt=(20,),
    ),
    "long": _copying(
        "1 file of 256 MiB, 100 ms away",
        data=Data(1, 256 << 20, 256 << 20),
        against=(Against("sftp", "3 x"),),
        rtt=(100,),
    ),
    "rtt": _copying(
        "20,000 files of 0.5 to 8 KB, nearer and farther",
        data=_SMALL,
        against=(Against("rsync -a"), Against("sftp", part=_HUNDRED_FILES)),
        rtt=(0, 5, 10, 20, 50, 100),
    ),
    "shards": _copying("20,000 files of 0.5 to 8 KB, in 1 to 4 shards", data=_SMALL, shards=(1, 2, 3, 4)),
    "floor": Work("20,000 files of 0.5 to 8 KB, read and hashed, kept nowhere", _FLOOR, floor, _SMALL),
    "floor-large": Work("4 files of 256 MiB, read and hashed, kept nowhere", _FLOOR, floor, _LARGE),
    "percent": Work(
        "1 percent of 100,000 files changed",
        "Counted of ours: all six steps. Files and MB are those that changed.",
        percent,
        Data(100_000, 512, 8192),
        (Against("rsync -ac", "1.0 x"),),
    ),
    "index-small": _index("the index of 20,000 files of 0.5 to 8 KB", data=_SMALL),
    "index-large": _index("the index of 4 files of 256 MiB", data=_LARGE),
    "index-million": _index(
        "the index of 10,000 to 1,000,000 files of 0.5 to 8 KB",
        data=Data(1_000_000, 512, 8192),
        measure=partial(indexing, parts=(100, 10, 1)),
        room_each=9000,
    ),
    "diff": Work(
        "two indexes of 10,000,000 lines, of which 1 percent differs",
        "Counted of ours: make_plan, from the digests of both indexes to the plan on disk. Files are lines.",
        diff,
        Data(10_000_000, 0, 0),
        wanted=(("ours", "< 64 MiB"), ("comm", "0.33 x")),
        room_each=600,
    ),
    "memory": Work(
        "the memory of each step, with 10,000 and 1,000,000 tiny files and with 4 large ones",
        "Each step is a process of its own; an idle one has the same imports.",
        memory,
        _MANY,
        wanted=(("pull", "idle + 100 MiB"),),
    ),
    "overhead": Work(
        "a run of 100,000 unchanged files in Airflow, against as many tasks that do nothing",
        "Counted: a whole run, from start to end by the scheduler's clock. Steps: each from the start to the "
        "end of its task, as Airflow tells; the rest of the time is Airflow's, between them.",
        overhead,
        Data(100_000, 16, 64),
        (Against(NOTHING, "0.77 x"),),
    ),
    "restore": _restore("20,000 files of 0.5 to 8 KB restored", data=_SMALL),
    "restore-large": _restore("4 files of 256 MiB restored", data=_LARGE),
    "verify": _verify("20,000 files of 0.5 to 8 KB read again", data=_SMALL),
    "verify-medium": _verify("2,000 files of 0.1 to 1 MiB read again", data=_MEDIUM),
    "verify-large": _verify("4 files of 256 MiB read again", data=_LARGE),
    "growth": Work(
        "a first run with 1,000 to 1,000,000 tiny files",
        "All six steps in one process, and reading the index once more, by itself.",
        growth,
        _MANY,
    ),
}
