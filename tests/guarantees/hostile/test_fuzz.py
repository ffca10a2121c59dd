"""Any bytes as an index or as a server's packets: read, or refused as they should be, within bounds."""

from __future__ import annotations

import random
import struct
import subprocess
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_mdbackup.scheme.index.canonical import MalformedIndex, escape, format_line, read_entries
from airflow_mdbackup.scheme.index.received import canonicalise
from tests.fuzz.targets import TARGETS, read_index, read_packets, seeds
from tests.guarantees.transport.channels import packet
from tests.torture import Cases, scaled

pytestmark = pytest.mark.guarantee("7. Hostile provider")

DIGITS = st.sampled_from([b"d41d8cd98f00b204e9800998ecf8427e", b"6812edcbb9edc05b936b8cbe4b515ec1"])
COMPONENTS = st.sampled_from(
    [b"a", b"b", b"a-", b"a b", b"\\", b"\n", b"\r", b"..", b".", b"", b"\xff", b"*", b"\0", b"n" * 255]
)
PATHS = st.lists(COMPONENTS, min_size=1, max_size=4).map(lambda parts: b"/" + b"/".join(parts))
ENTRIES = st.tuples(
    st.sampled_from([b"", b"\\"]), DIGITS, st.sampled_from([b"  ", b" *", b" ", b"\t", b"  ."]), PATHS
).map(b"".join)
REMARKS = st.tuples(
    st.sampled_from([b"# mdbackup unreadable ", b"# mdbackup rotten ", b"# "]), PATHS.map(escape)
).map(b"".join)
ENDS = st.tuples(
    st.integers(0, 6), st.integers(0, 3), st.sampled_from([b"", b" bytes=7", b" bytes=" + b"9" * 30])
).map(lambda told: b"# mdbackup end format=1 files=%d unreadable=%d%s" % told)
LINES = st.one_of(ENTRIES, ENTRIES, REMARKS, ENDS, st.binary(max_size=60))
INDEXES = st.tuples(st.lists(LINES, max_size=8).map(b"\n".join), st.sampled_from([b"\n", b""])).map(b"".join)

PACKETS = st.builds(
    packet,
    st.sampled_from([2, 101, 102, 103, 105, 201, 0, 255]),
    st.integers(0, 30),
    st.one_of(
        st.binary(max_size=40),
        st.builds(lambda content: struct.pack(">I", len(content)) + content, st.binary(max_size=600)),
        st.integers(0, 2**64 - 1).map(lambda size: struct.pack(">IQIII", 13, size, 0o100644, 5, 5)),
        st.integers(0, 9).map(lambda code: struct.pack(">IIxxx", code, 3)),
    ),
)
STREAMS = st.tuples(
    st.binary(min_size=1, max_size=1), st.just(packet(2, 3)), st.lists(PACKETS, max_size=40).map(b"".join)
).map(b"".join)


@pytest.mark.parametrize(
    ("target", "name"), [(target, path.name) for target in TARGETS for path in seeds(target)]
)
def test_the_corpus_is_read_or_refused_as_its_names_say(target: str, name: str, cases: Cases) -> None:
    """What begins with `bad-` gives nothing; from a good session come results."""
    (path,) = (path for path in seeds(target) if path.name == name)
    with cases.one():
        assert bool(TARGETS[target](path.read_bytes())) != name.startswith("bad-")


@settings(max_examples=scaled(300, 8000))
@given(INDEXES)
def _read_any_index(data: bytes) -> None:
    read_index(data)


def test_any_lines_are_a_canonical_index_or_refused(cases: Cases) -> None:
    """Drawn lines of all kinds, good and nearly good."""
    _read_any_index()
    cases.add(scaled(300, 8000))


@settings(max_examples=scaled(300, 8000))
@given(STREAMS)
def _read_any_packets(data: bytes) -> None:
    read_packets(data)


def test_any_packets_are_answers_or_a_lost_connection(cases: Cases) -> None:
    """Drawn packets: answers to what was asked and to what was not, whole and broken."""
    _read_any_packets()
    cases.add(scaled(300, 8000))


@pytest.mark.parametrize("target", list(TARGETS))
def test_mutated_seeds_neither_break_nor_stop_a_reader(target: str, cases: Cases) -> None:
    """Bytes turned over, cut out, doubled, and taken from another seed; always the same ones."""
    noise = random.Random(target)
    contents = [path.read_bytes() for path in seeds(target)]
    for _ in range(scaled(400, 8000)):
        with cases.one():
            TARGETS[target](mutated(noise, noise.choice(contents), noise.choice(contents)))


def mutated(noise: random.Random, data: bytes, other: bytes) -> bytes:
    for _ in range(noise.choice([1, 1, 2, 5])):
        at, length = noise.randrange(len(data) + 1), noise.choice([1, 4, 9, 100])
        piece = noise.choice(
            [
                b"",
                noise.randbytes(length),
                data[at : at + length] * 2,
                other[(start := noise.randrange(len(other) + 1)) : start + length],
                b"\xff\xff\xff\xff",
                b"\0\0\0\0",
            ]
        )
        data = data[:at] + piece + data[at + noise.choice([0, len(piece), length]) :]
    return data


@pytest.mark.parametrize("target", list(TARGETS))
def test_no_seed_takes_much_memory(target: str, cases: Cases) -> None:
    """Mutated ones too: a length or a number that is told is never believed in advance."""
    noise = random.Random(7)
    contents = [path.read_bytes() for path in seeds(target)]
    tracemalloc.start()
    try:
        for _ in range(scaled(100, 1000)):
            with cases.one():
                tracemalloc.reset_peak()
                before = tracemalloc.get_traced_memory()[0]
                TARGETS[target](mutated(noise, noise.choice(contents), b"\x7f\xff\xff\xff\xff\xff\xff\xff"))
                assert tracemalloc.get_traced_memory()[1] - before < 16 << 20
    finally:
        tracemalloc.stop()


# --- against GNU md5sum -----------------------------------------------------------------------------

NAMES = st.one_of(
    st.binary(min_size=1, max_size=30),
    st.lists(
        st.sampled_from([b"\n", b"\r", b"\\", b" ", b"*", b"#", b"\xff", b"a"]), min_size=1, max_size=9
    ).map(b"".join),
).filter(lambda name: b"\0" not in name and b"/" not in name and name not in (b".", b".."))
TREES = st.dictionaries(
    st.lists(NAMES, min_size=1, max_size=3).map(b"/".join), st.binary(max_size=20), min_size=1, max_size=8
)


@settings(max_examples=scaled(40, 400))
@given(TREES)
def _agree_about_a_tree(tree: dict[bytes, bytes]) -> None:
    files = {
        path: content for path, content in tree.items() if not any(p.startswith(path + b"/") for p in tree)
    }
    with tempfile.TemporaryDirectory() as root, tempfile.TemporaryDirectory() as outside:
        for path, content in files.items():
            whole = Path(root, path.decode("utf-8", "surrogateescape"))
            whole.parent.mkdir(parents=True, exist_ok=True)
            whole.write_bytes(content)
        command = ["find", ".", "-type", "f", "-exec", "md5sum", "--", "{}", "+"]
        written = subprocess.run(command, cwd=root, check=True, capture_output=True).stdout
        received, canonical = Path(outside, "received"), Path(outside, "canonical")
        received.write_bytes(written)
        summary = canonicalise(received, canonical, name="i", chunk=2)
        assert summary.files == len(files)
        assert [entry.path for entry in read_entries(canonical)] == sorted(b"/" + path for path in files)
        # What we write, with the root as it is here, it accepts: each line, and all of them good.
        ours = b"".join(format_line(b"." + path, md5) for path, md5 in read_entries(canonical))
        checked = subprocess.run(["md5sum", "--strict", "-c"], input=ours, cwd=root, capture_output=True)
        assert checked.returncode == 0 and b"FAILED" not in checked.stdout, checked.stderr


def test_md5sum_and_we_agree_about_any_tree(cases: Cases) -> None:
    """Trees of files with odd names: its index is read, and `md5sum --strict -c` accepts ours."""
    _agree_about_a_tree()
    cases.add(scaled(40, 400))


@settings(max_examples=scaled(60, 1000))
@given(INDEXES)
def _agree_about_what_is_well_formed(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        received, canonical = Path(folder, "received"), Path(folder, "canonical")
        received.write_bytes(data)
        try:
            summary = canonicalise(received, canonical, name="i")
        except MalformedIndex:
            return
        command = ["md5sum", "--strict", "--warn", "--ignore-missing", "-c", canonical]
        checked = subprocess.run(command, cwd=folder, capture_output=True)
        assert b"improperly formatted" not in checked.stderr, checked.stderr
        if summary.files:  # else it says that there is none
            assert b"no properly formatted" not in checked.stderr, checked.stderr


def test_md5sum_understands_each_line_of_what_we_accept(cases: Cases) -> None:
    """Of any index that is not refused."""
    _agree_about_what_is_well_formed()
    cases.add(scaled(60, 1000))
