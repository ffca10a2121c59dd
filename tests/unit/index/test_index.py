"""The index grammar, against hand-written lines and against the installed GNU md5sum."""

from __future__ import annotations

import hashlib
import os
import resource
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_mdbackup.scheme.common import paths as names
from airflow_mdbackup.scheme.common.sorted_paths import Prefixes
from airflow_mdbackup.scheme.index import canonical as index_module
from airflow_mdbackup.scheme.index import received as received_module
from airflow_mdbackup.scheme.index.canonical import (
    Difference,
    Entry,
    IdenticalEntries,
    IndexWriter,
    MalformedIndex,
    Remark,
    check_path,
    compare,
    count_entries,
    entries_with_md5,
    format_line,
    merge,
    parse_line,
    read_entries,
    read_remarks,
    revise,
)
from airflow_mdbackup.scheme.index.malformed import HOW
from airflow_mdbackup.scheme.index.received import IndexSummary, canonicalise

EMPTY = b"d41d8cd98f00b204e9800998ecf8427e"
OTHER = b"6812edcbb9edc05b936b8cbe4b515ec1"


def read(tmp_path: Path, content: bytes, *, chunk: int = 100_000) -> tuple[IndexSummary, list[Entry]]:
    """Canonicalise an index of this content and return what came of it."""
    source = tmp_path / "received"
    source.write_bytes(content)
    summary = canonicalise(source, tmp_path / "canonical", name="srv1: index /i", chunk=chunk)
    return summary, list(read_entries(tmp_path / "canonical"))


def refusal(tmp_path: Path, content: bytes, **options: int) -> str:
    with pytest.raises(MalformedIndex) as caught:
        read(tmp_path, content, **options)
    return str(caught.value)


# --- what is accepted -------------------------------------------------------------------------------


def test_the_sample_of_the_seed_is_read(tmp_path: Path) -> None:
    """Its lines have one blank behind the digest."""
    sample = (
        b"d41d8cd98f00b204e9800998ecf8427e /backups/alpha\n"
        b"d41d8cd98f00b204e9800998ecf8427e /backups/bravo\n"
        b"6812edcbb9edc05b936b8cbe4b515ec1 /backups/forumbackup.sql\n"
    )
    summary, entries = read(tmp_path, sample)
    assert entries == [
        (b"/backups/alpha", EMPTY),
        (b"/backups/bravo", EMPTY),
        (b"/backups/forumbackup.sql", OTHER),
    ]
    assert summary == IndexSummary(files=3, unreadable=0, rotten=0, size=None, started=None, complete=False)


@pytest.mark.parametrize(
    ("line", "path"),
    [
        (b"%s  /a b", b"/a b"),
        (b"%s  / a", b"/ a"),
        (b"%s */a", b"/a"),
        (b"%s /a", b"/a"),
        (b"%s ./a", b"/a"),
        (b"%s  ./a", b"/a"),
        (b"%s */ *a", b"/ *a"),
        (b"\\%s  /a\\nb\\\\c\\rd", b"/a\nb\\c\rd"),
        (b"\\%s  /a\\n", b"/a\n"),
        (b"\\%s  /\\n", b"/\n"),
        (b"\\%s  /a/..\\n", b"/a/..\n"),
        (b"\\%s  /plain", b"/plain"),
        (b"%s  /back\\slash", b"/back\\slash"),
        (b"%s  /-x/...", b"/-x/..."),
        (b"%s  /.hidden/..x", b"/.hidden/..x"),
        (b"%s  /\xff\x01\x1b[31m\t", b"/\xff\x01\x1b[31m\t"),
        (b"%s  /a\rb", b"/a\rb"),
        (b"%s  /" + b"n" * 255, b"/" + b"n" * 255),
    ],
)
def test_a_line_of_an_accepted_form_gives_its_path(line: bytes, path: bytes) -> None:
    """What GNU md5sum writes, the one blank of the seed, binary marks and a leading ./ are all read."""
    assert parse_line(line.replace(b"%s", EMPTY) + b"\n") == (path, EMPTY)
    assert parse_line(line.replace(b"%s", EMPTY)) == (path, EMPTY)


@settings(max_examples=1000)
@given(
    st.lists(
        st.sampled_from([b"/", b"/a", b".", b" ", b"\\", b"\n", b"\r", b"\0", b"\xff", b"n" * 255]),
        max_size=30,
    )
)
def test_a_line_that_is_taken_at_a_glance_is_one_that_a_closer_look_takes(parts: list[bytes]) -> None:
    """And it is canonical already, so that it can be copied."""
    line = EMPTY + b"  /a" + b"".join(parts) + b"\n"
    if received_module._PLAIN_LINE.fullmatch(line):
        assert parse_line(line) == (line[34:-1], EMPTY)
        assert format_line(line[34:-1], EMPTY) == line


def test_a_path_of_the_greatest_length_is_accepted_with_every_byte_escaped(tmp_path: Path) -> None:
    """The bound on the line length leaves room for it."""
    path = b"/" + b"/".join([b"\n" * 255] * 15 + [b"\n" * 200]) + b"/" + b"\n" * 54
    assert len(path) == 4096
    assert read(tmp_path, format_line(path, EMPTY))[1] == [(path, EMPTY)]


def test_exact_duplicates_foreign_comments_and_any_order_are_normalised(tmp_path: Path) -> None:
    """The canonical form has each path once, sorted by raw bytes, and no comment of others."""
    content = b"# by cron\n%s  /z\n%s  /\xff\n%s  /a/b\n# mdbackup something new\n%s  /z\n%s  /a-b\n" % (
        (EMPTY, OTHER, OTHER, EMPTY, OTHER)
    )
    summary, entries = read(tmp_path, content)
    assert [path for path, _ in entries] == [b"/a-b", b"/a/b", b"/z", b"/\xff"]
    assert summary.files == 4
    lines = (tmp_path / "canonical").read_bytes().splitlines()
    assert [line for line in lines if line.startswith(b"#")] == [
        b"# mdbackup end format=1 files=4 unreadable=0"
    ]


def test_an_end_line_makes_the_index_complete_and_its_counts_are_of_lines(tmp_path: Path) -> None:
    """Duplicates count in the received end line, and no more in the canonical one."""
    content = (
        b"# mdbackup started 1795402800\n"
        b"%s  /a\n%s  /a\n# mdbackup unreadable /p\\nq\n# mdbackup unreadable /p\\nq\n# mdbackup rotten /a\n"
        b"# mdbackup end format=1 files=2 unreadable=2 bytes=77\n" % (EMPTY, EMPTY)
    )
    summary, _ = read(tmp_path, content)
    assert summary == IndexSummary(
        files=1, unreadable=1, rotten=1, size=77, started=1795402800, complete=True
    )
    assert list(read_remarks(tmp_path / "canonical", Remark.UNREADABLE)) == [b"/p\nq"]
    assert list(read_remarks(tmp_path / "canonical", Remark.ROTTEN)) == [b"/a"]
    assert count_entries(tmp_path / "canonical") == 1
    again = canonicalise(tmp_path / "canonical", tmp_path / "again", name="again")
    assert again == summary
    assert (tmp_path / "again").read_bytes() == (tmp_path / "canonical").read_bytes()


def test_remarks_of_an_unsorted_index_are_kept(tmp_path: Path) -> None:
    """As the shell's indexer writes it when a name must be escaped."""
    lines = b"%s  /b\n%s  /a\n# mdbackup unreadable /p\n# mdbackup rotten /a\n" % (EMPTY, EMPTY)
    summary, _ = read(tmp_path, lines + b"# mdbackup end format=1 files=2 unreadable=1\n")
    assert (summary.files, summary.unreadable, summary.rotten) == (2, 1, 1)
    assert list(read_remarks(tmp_path / "canonical", Remark.UNREADABLE)) == [b"/p"]
    assert list(read_remarks(tmp_path / "canonical", Remark.ROTTEN)) == [b"/a"]


def test_the_root_itself_may_be_unreadable(tmp_path: Path) -> None:
    """A provider that can read nothing at all says so with the path /."""
    read(tmp_path, b"# mdbackup unreadable /\n# mdbackup end format=1 files=0 unreadable=1\n")
    assert list(read_remarks(tmp_path / "canonical", Remark.UNREADABLE)) == [b"/"]


def test_an_empty_file_is_an_index_without_entries_and_without_end(tmp_path: Path) -> None:
    """The guard judges it later."""
    summary, entries = read(tmp_path, b"")
    assert entries == [] and not summary.complete


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"%s  relative", "no two blanks and absolute path|not absolute"),
        (b"%s   /three", "not absolute"),
        (b"%s  /a//b", "empty component"),
        (b"%s  //a", "empty component"),
        (b"%s  /a/", "empty component"),
        (b"%s  /", "empty component"),
        (b"%s  ./", "empty component"),
        (b"%s  /a/./b", "component '.'"),
        (b"%s  ././a", "component '.'"),
        (b"%s  /a/../b", "component '..'"),
        (b"%s  /..", "component '..'"),
        (b"%s  ../a", "not absolute"),
        (b"%s  /a\0b", "NUL"),
        (b"%s  /" + b"n" * 256, "over 255"),
        (b"%s  /ok/" + b"n" * 256 + b"/ok", "over 255"),
        (b"%s  /" + b"/".join([b"n" * 255] * 16) + b"/n", "4098 bytes long"),
        (b"%s  /a\r", "CR LF"),
        (b"\\%s  /a\\tb", "unknown escape"),
        (b"\\%s  /a\\", "unknown escape"),
        (b"%s", "no two blanks"),
        (b"%s  ", "no two blanks"),
        (b"%s\t/a", "no two blanks"),
        (b" %s  /a", "32 hexadecimal digits"),
        (b"0%s  /a", "32 hexadecimal digits"),
        (b"d41d8cd98f00b204e9800998ecf8427  /a", "32 hexadecimal digits"),
        (b"g41d8cd98f00b204e9800998ecf8427e  /a", "32 hexadecimal digits"),
        (b"D41D8CD98F00B204E9800998ECF8427E  /a", "upper-case"),
        (b"", "blank line"),
        (b"   ", "blank line"),
        (b"\\\\%s  /a", "32 hexadecimal digits"),
        (b"# mdbackup unreadable a", "not absolute"),
        (b"# mdbackup unreadable /a/../b", "component '..'"),
        (b"# mdbackup rotten a", "not absolute"),
        (b"# mdbackup unreadable /a\\x", "unknown escape"),
        (b"# mdbackup started soon", "not a time in Unix seconds"),
    ],
)
def test_one_bad_line_refuses_the_whole_index_naming_file_and_line(
    tmp_path: Path, line: bytes, why: str
) -> None:
    """Nothing is guessed: good lines around a bad one do not save it."""
    content = b"%s  /good\n%s\n%s  /zgood\n" % (EMPTY, line.replace(b"%s", EMPTY), EMPTY)
    message = refusal(tmp_path, content)
    assert message.startswith("srv1: index /i, line 2: ")
    assert any(part in message for part in why.split("|")), message


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"MD5 (/f) = %s\n" % EMPTY, "tagged form of BSD and openssl, `MD5 (file) = ...`."),
        (b"MD5(/f)= %s\n" % EMPTY, "tagged form of BSD and openssl, `MD5 (file) = ...`."),
        (b"\\MD5 (/f\\n) = %s\n" % EMPTY, "tagged form of BSD"),
        (b"SHA2-256(/f)= %s\n" % (EMPTY * 2), "and of SHA2-256, not MD5"),
        (b"\xef\xbb\xbf%s  /f\n" % EMPTY, "byte order mark (BOM) of UTF-8"),
        (b"\xef\xbb\xbf# mdbackup started 1\n", "byte order mark (BOM) of UTF-8"),
        ("\ufeff# a comment\n".encode("utf-16-le"), "(BOM) of UTF-16"),
        ("\ufeff/f\n".encode("utf-16-be"), "(BOM) of UTF-16"),
        (f"{EMPTY.decode()}  /f\n".encode("utf-16-le"), "it is UTF-16"),
        (f"{EMPTY.decode()}  /f\n".encode("utf-16-be"), "it is UTF-16"),
        (b"%s  /f\n" % (b"a" * 40), "its sum has 40 hexadecimal digits, like SHA-1"),
        (b"%s */f\n" % (b"A" * 64), "its sum has 64 hexadecimal digits, like SHA-256"),
        (b"\\%s  /f\\n\n" % (b"a" * 128), "its sum has 128 hexadecimal digits, like SHA-512"),
        (b"%s  relative\n" % EMPTY, "the path is not absolute: relative"),
        (b"%s\t/f\n" % EMPTY, "no two blanks"),
        (EMPTY.upper() + b"  /f\n", "upper-case"),
        (b"\x1f\x8b\x08\x00\n", "compressed by gzip"),
        (b"\xfd7zXZ\0\0\x04\n", "compressed by xz"),
        ("\ufeff# a comment\n".encode("utf-32-le"), "(BOM) of UTF-32"),
        ("\ufeff/f\n".encode("utf-32-be"), "(BOM) of UTF-32"),
        (f"{EMPTY.decode()}  /f\n".encode("utf-32-le"), "it is UTF-32"),
        (f"{EMPTY.decode()}  /f\n".encode("utf-32-be"), "it is UTF-32"),
        ("\r\nAlgorithm\r\n".encode("utf-16-le"), "it is UTF-16"),
        (b"%s  /f\r%s  /g\r" % (EMPTY, EMPTY), "its lines end in CR alone"),
        (b"%s  /f\r%s  /g" % (EMPTY, EMPTY), "its lines end in CR alone"),
        (b"%s  /f\r\\%s  /g\\n\r\n" % (EMPTY, EMPTY), "its lines end in CR alone"),
        (b"# a comment\r%s  /f\r" % EMPTY, "its lines end in CR alone"),
        (b"".join(b"%s  /%d\r" % (EMPTY, n) for n in range(1000)), "its lines end in CR alone"),
        (b"\r\nAlgorithm       Hash      Path\r\n", "Get-FileHash of PowerShell prints"),
        (b"\n\n\nAlgorithm : MD5\nHash : 0\n", "Get-FileHash of PowerShell prints"),
        (b'"Algorithm","Hash","Path"\r\n', "Get-FileHash of PowerShell prints"),
        (b" " * 32 + b"  alpha\n", "there are blanks in place of the md5, as `rclone md5sum`"),
        (b"  %s  /f\n" % EMPTY, "`  ` stands before the 32 hexadecimal digits of the md5"),
        (b"\xc2\xa0%s  /f\n" % EMPTY, r"`\xc2\xa0` stands before the 32 hexadecimal digits"),
        (b"\xe2\x80\x8b\t%s  /f\n" % EMPTY, r"`\xe2\x80\x8b\x09` stands before the 32 hexadecimal digits"),
        (b"%s\xc2\xa0 /f\n" % EMPTY, r"after the md5, but `\xc2\xa0 /f`"),
        (b"%s\xa0\xa0/f\n" % EMPTY, r"after the md5, but `\xa0\xa0/f`"),
        (b"%s \xc2\xa0/f\n" % EMPTY, r"after the md5, but ` \xc2\xa0/f`"),
        (b"%s,/f\n" % EMPTY, "after the md5, but `,/f`"),
        (b"%s\xc2\xa0 /f\n" % (b"a" * 64), "its sum has 64 hexadecimal digits, like SHA-256"),
        (b"<html>\x1b[31m\n", r"but with `<html>\x1b[31m`"),
        (b"".join(b"%s  /%d\0" % (EMPTY, n) for n in range(1000)), "as `md5sum --zero`"),
    ],
)
def test_a_list_of_another_tool_is_named_with_the_command_that_writes_the_right_one(
    tmp_path: Path, content: bytes, what: str
) -> None:
    message = refusal(tmp_path, content)
    assert message.startswith("srv1: index /i, line 1: ") and what in message
    assert message.isprintable()
    assert "cd CHROOT && find ./backups -type f -exec md5sum {} + > LIST" in message


def test_the_command_that_a_refusal_names_writes_a_list_that_is_taken(tmp_path: Path) -> None:
    below = tmp_path / "chroot" / "backups"
    below.mkdir(parents=True)
    for name in ("plain", "line\nend", "back\\slash", "ü"):
        (below / name).touch()
    command = HOW.partition(": ")[2].partition(", where")[0]
    line = command.replace("CHROOT", str(tmp_path / "chroot")).replace("LIST", str(tmp_path / "LIST"))
    subprocess.run(["sh", "-c", line], check=True)
    summary = canonicalise(tmp_path / "LIST", tmp_path / "canonical", name="LIST")
    assert summary.files == 4


def test_a_name_that_ends_in_cr_is_mentioned_beside_windows_line_ends(tmp_path: Path) -> None:
    """md5sum of coreutils 8 writes it like that, and the line does not show which of the two it is."""
    message = refusal(tmp_path, b"%s  /name\r\n" % EMPTY)
    assert "the line ends in CR LF" in message and "name itself ends in CR" in message
    assert "since version 9" in message and "dos2unix" in message


def test_a_bad_line_is_found_also_when_the_lines_are_unsorted(tmp_path: Path) -> None:
    """The second reading, for sorting, is as strict."""
    message = refusal(tmp_path, b"%s  /z\n%s  /a\n\n" % (EMPTY, EMPTY))
    assert message == "srv1: index /i, line 3: a blank line"


@pytest.mark.parametrize(
    ("end", "why"),
    [
        (b"# mdbackup end format=1 files=2 unreadable=0\n", "the end line counts 2 files"),
        (b"# mdbackup end format=1 files=0 unreadable=0\n", "the end line counts 0 files"),
        (b"# mdbackup end format=1 files=1 unreadable=1\n", "and 1 unreadable"),
        (b"# mdbackup end format=1\n", "the end line counts None files"),
        (b"# mdbackup end format=1 files=-1 unreadable=0\n", "the end line counts None files"),
        (b"# mdbackup end format=2 files=1 unreadable=0\n", "format 2 is newer"),
        (b"# mdbackup end format=1 files=1 unreadable=0\n# more\n", "line 3: a line after the end line"),
        (b"# mdbackup end format=1 files=1 unreadable=0\n%s  /b\n" % EMPTY, "3: a line after the end line"),
        (b"# mdbackup end format=1 files=1 unreadable=0", "truncated"),
    ],
)
def test_an_end_line_that_does_not_match_is_refused(tmp_path: Path, end: bytes, why: str) -> None:
    """Truncated, edited, or of a newer format."""
    assert why in refusal(tmp_path, b"%s  /a\n%s" % (EMPTY, end))


def test_an_index_cut_at_any_byte_is_refused_or_known_as_incomplete(tmp_path: Path) -> None:
    """No prefix of an index with an end line passes for the whole."""
    whole = b"%s  /a\n\\%s  /b\\nc\n# mdbackup end format=1 files=2 unreadable=0\n" % (EMPTY, OTHER)
    for length in range(len(whole)):
        try:
            summary, _ = read(tmp_path, whole[:length])
        except MalformedIndex:
            continue
        assert not summary.complete
    assert read(tmp_path, whole)[0].complete


def test_a_line_of_any_length_is_refused_without_being_read_whole(tmp_path: Path) -> None:
    """Memory stays bounded with a provider that sends one endless line."""
    with (tmp_path / "received").open("wb") as file:
        file.write(EMPTY + b"  /")
        file.truncate(3 << 30)  # sparse: reading it whole would show
    with pytest.raises(MalformedIndex, match=r"line 1: the line is over \d+ bytes long"):
        canonicalise(tmp_path / "received", tmp_path / "canonical", name="i")


@pytest.mark.parametrize("chunk", [1, 100_000])
def test_the_same_path_with_two_md5s_is_refused_naming_both_lines(tmp_path: Path, chunk: int) -> None:
    """Sorted or not, one after the other or far apart."""
    content = b"# one\n%s  /a\n%s  /b\n# two\n%s  /a\n" % (EMPTY, EMPTY, OTHER)
    message = refusal(tmp_path, content, chunk=chunk)
    assert message == "srv1: index /i, lines 2 and 5: the same path with different md5s: /a"


@pytest.mark.parametrize("chunk", [1, 100_000])
@pytest.mark.parametrize("between", [b"", b"/x-1", b"/x\x01/y"])
def test_a_path_that_is_also_a_directory_is_refused(tmp_path: Path, chunk: int, between: bytes) -> None:
    """Also when other paths sort between the two."""
    content = b"# one\n%s  /x/y\n%s  /x\n" % (EMPTY, EMPTY)
    if between:
        content += b"%s  %s\n" % (EMPTY, between)
    message = refusal(tmp_path, content, chunk=chunk)
    assert message == (
        "srv1: index /i, lines 2 and 3: a path that is also the directory of another: /x and /x/y"
    )


@settings(max_examples=300)
@given(st.sets(st.text("/-a", min_size=1, max_size=6).map(lambda text: b"/a" + text.encode()), max_size=12))
def test_a_path_that_is_also_a_directory_is_found_among_any_others(paths: set[bytes]) -> None:
    """As by looking at every pair."""
    paths = {path for path in paths if b"//" not in path and not path.endswith(b"/")}
    clash = any(other.startswith(path + b"/") for path in paths for other in paths)
    content = b"".join(format_line(path, EMPTY) for path in sorted(paths))
    with tempfile.TemporaryDirectory() as folder:
        if clash:
            assert "also the directory of another" in refusal(Path(folder), content)
        else:
            assert len(read(Path(folder), content)[1]) == len(paths)


def test_paths_that_only_begin_alike_do_not_clash(tmp_path: Path) -> None:
    """/x, /x-1 and /x1 are three files."""
    assert len(read(tmp_path, b"%s  /x\n%s  /x-1\n%s  /x1\n" % (EMPTY, EMPTY, EMPTY))[1]) == 3


def test_names_in_messages_cannot_act_on_a_terminal(tmp_path: Path) -> None:
    """Control characters of a name from the provider are escaped."""
    message = refusal(tmp_path, b"%s  /\x1b[2J/../x\n" % EMPTY)
    assert message.isprintable() and "\\x1b" in message


# --- sorting and merging ----------------------------------------------------------------------------

PATHS = st.lists(
    st.lists(st.binary(min_size=1, max_size=3), min_size=1, max_size=3).map(lambda c: b"/" + b"/".join(c)),
    max_size=200,
    unique=True,
)


@settings(max_examples=60)
@given(PATHS, st.integers(1, 3))
def test_sorting_outside_memory_gives_what_sorting_in_memory_gives(paths: list[bytes], chunk: int) -> None:
    """With runs so short that several levels of merging are needed."""
    good: list[bytes] = []
    for path in paths:
        try:
            check_path(path)
        except ValueError:
            continue
        if not any(p == path or p.startswith(path + b"/") or path.startswith(p + b"/") for p in good):
            good.append(path)
    with tempfile.TemporaryDirectory() as folder:
        _, entries = read(Path(folder), b"".join(format_line(p, EMPTY) for p in good), chunk=chunk)
    assert entries == [(path, EMPTY) for path in sorted(good)]


def test_many_runs_are_merged_on_the_way(tmp_path: Path) -> None:
    """So that the number of open files stays bounded, however long the index is."""
    count = 1000
    lines = [format_line(b"/%04d" % (n * 7 % count), EMPTY) for n in range(count)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Of 500 runs. Threads of servers that other tests have left running open files, too.
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 200, limits[1]))
    try:
        _, entries = read(tmp_path, b"".join(lines), chunk=2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [path for path, _ in entries] == [b"/%04d" % n for n in range(count)]


@given(
    st.dictionaries(st.binary(max_size=2), st.sampled_from([EMPTY, OTHER])),
    st.dictionaries(st.binary(max_size=2), st.sampled_from([EMPTY, OTHER])),
)
def test_merging_tells_of_each_path_once_in_order(
    left: dict[bytes, bytes], right: dict[bytes, bytes]
) -> None:
    """With the md5 of each side that has it."""
    merged = merge(map(Entry._make, sorted(left.items())), map(Entry._make, sorted(right.items())))
    both = sorted(left.keys() | right.keys())
    assert list(merged) == [Difference(path, left.get(path), right.get(path)) for path in both]


NAMES = st.text("ab-/\\\n", min_size=1, max_size=3).map(lambda text: b"/" + text.encode())
INDEXES = st.dictionaries(NAMES, st.sampled_from([EMPTY, OTHER]), max_size=30)


def write_index(path: Path, entries: dict[bytes, bytes], unreadable: int = 0) -> Path:
    """Write a canonical index."""
    with IndexWriter(path) as writer:
        for entry in sorted(entries.items()):
            writer.add(*entry)
        for number in range(unreadable):
            writer.add_remark(Remark.UNREADABLE, b"/unreadable-%03d" % number)
    return path


@given(left=INDEXES, right=st.none() | INDEXES, both=INDEXES, size=st.sampled_from([1, 100, 300, 1 << 20]))
def test_comparing_in_blocks_finds_what_a_walk_over_entries_finds(
    left: dict[bytes, bytes], right: dict[bytes, bytes] | None, both: dict[bytes, bytes], size: int
) -> None:
    """Wherever the blocks end, and with comments over several blocks at the end."""
    left |= both
    right = None if right is None else right | both
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "_BLOCK", size)
        first = write_index(Path(folder) / "left", left, unreadable=5)
        second = None if right is None else write_index(Path(folder) / "right", right)
        found = list(compare(first, second))
    right = right or {}
    differing = [entry for entry in found if isinstance(entry, Difference)]
    expected = [
        Difference(path, left.get(path), right.get(path))
        for path in sorted(left.keys() | right.keys())
        if left.get(path) != right.get(path)
    ]
    assert differing == expected
    same = [entry for entry in found if isinstance(entry, IdenticalEntries)]
    paths = [path for entry in same for path in entry.paths()]
    assert paths == sorted(path for path in left if left[path] == right.get(path))
    assert sum(entry.count for entry in same) == len(paths)
    assert all(entry.span[0] <= path <= entry.span[1] for entry in same for path in entry.paths())


@given(st.none() | INDEXES, st.dictionaries(NAMES, st.sampled_from([EMPTY, OTHER, b""])), st.integers(1, 300))
def test_revising_changes_what_is_named_and_nothing_else(
    entries: dict[bytes, bytes] | None, changes: dict[bytes, bytes], size: int
) -> None:
    """Wherever the blocks end; an empty md5 takes an entry out, if it is there."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "_BLOCK", size)
        source = None if entries is None else write_index(Path(folder) / "index", entries, unreadable=2)
        with IndexWriter(Path(folder) / "revised") as writer:
            revise(writer, source, map(Entry._make, sorted(changes.items())))
        found = list(read_entries(Path(folder) / "revised"))
    expected = {path: md5 for path, md5 in ((entries or {}) | changes).items() if md5}
    assert found == sorted(expected.items()) and writer.files == len(expected)


@given(INDEXES)
def test_holders_of_an_md5_are_found(entries: dict[bytes, bytes]) -> None:
    """Also those whose names are escaped."""
    with tempfile.TemporaryDirectory() as folder:
        found = list(entries_with_md5(write_index(Path(folder) / "index", entries), {OTHER}))
    assert found == [entry for entry in sorted(entries.items()) if entry[1] == OTHER]


@given(st.lists(st.text("ab-/", min_size=1, max_size=6).map(lambda t: b"/" + t.encode())))
def test_prefixes_find_a_directory_that_came_before(paths: list[bytes]) -> None:
    """Compared with looking at all paths before."""
    seen = Prefixes()
    before: list[bytes] = []
    for path in sorted({p.rstrip(b"/") or b"/" for p in paths}):
        seen.advance(path)
        above = [p for p in before if path.startswith(p.rstrip(b"/") + b"/")]
        assert (seen.above(path) is not None) == bool(above)
        seen.push(path)
        before.append(path)


def test_a_failed_write_leaves_no_end_line(tmp_path: Path) -> None:
    """So that what is left can never pass for a whole index."""
    with pytest.raises(RuntimeError), IndexWriter(tmp_path / "i") as writer:
        writer.add(b"/a", EMPTY)
        raise RuntimeError
    assert b"end" not in (tmp_path / "i").read_bytes()


# --- against GNU md5sum -----------------------------------------------------------------------------

AWKWARD = [bytes([byte]) for byte in range(1, 256) if byte != 0x2F]
NAMES = st.one_of(
    st.binary(min_size=1, max_size=60),
    st.lists(
        st.sampled_from([b"\n", b"\r", b"\\", b" ", b"*", b"n", b".", b"-", b"#", b"\xff"]), min_size=1
    ).map(lambda parts: b"".join(parts)[:255]),
).filter(lambda name: b"\0" not in name and b"/" not in name and name not in (b".", b".."))


def check_against_md5sum(all_names: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = os.fsencode(folder)
        expected = {}
        for number, name in enumerate(all_names):
            content = b"%d" % number
            with open(root + b"/" + name, "wb") as file:
                file.write(content)
            expected[b"/" + name] = hashlib.md5(content).hexdigest().encode()
        command = ["md5sum", "--", *(b"./" + name for name in all_names)]
        written = subprocess.run(command, cwd=root, check=True, capture_output=True).stdout
        assert dict(map(parse_line, written.splitlines(keepends=True))) == expected
        # What we write is what it writes, but for the dot that makes a path relative.
        ours = b"".join(format_line(path, md5) for path, md5 in expected.items())
        assert ours.replace(b"  /", b"  ./") == written
        index = b"".join(format_line(b"." + path, md5) for path, md5 in expected.items())
        index += b"# mdbackup end format=1 files=%d unreadable=0\n" % len(expected)
        checked = subprocess.run(["md5sum", "--strict", "-c"], input=index, cwd=root, capture_output=True)
        assert checked.returncode == 0, checked.stderr
        with tempfile.TemporaryDirectory() as outside:
            _, entries = read(Path(outside), written)
            assert dict(entries) == expected


@settings(max_examples=60)
@given(st.lists(NAMES, min_size=1, max_size=20, unique=True))
def test_any_file_name_is_written_and_read_as_gnu_md5sum_does(drawn: list[bytes]) -> None:
    """Real files with drawn names: its output is read, and `md5sum -c` accepts our index."""
    check_against_md5sum(drawn)


def test_every_byte_as_a_name_and_at_either_end_of_one(tmp_path: Path) -> None:
    """Each byte but NUL and slash, alone, leading, trailing, and 255 times."""
    forms = [form for b in AWKWARD for form in (b, b + b"x", b"x" + b, b * 255)]
    check_against_md5sum([name for name in dict.fromkeys(forms) if name not in (b".", b"..")])


# --- names as text ----------------------------------------------------------------------------------


@given(st.binary(max_size=50))
def test_any_path_comes_back_from_its_text(path: bytes) -> None:
    """And the text is printable, whatever the bytes are."""
    text = names.to_text(path)
    assert text.isprintable() and names.from_text(text) == path


@given(st.text(max_size=30))
def test_text_names_come_back_too(text: str) -> None:
    """Names of people's own languages, with whatever marks there are."""
    path = text.encode("utf-8", "surrogatepass")
    assert names.from_text(names.to_text(path)) == path


def test_readable_names_stay_readable() -> None:
    """Escapes are only for what must be escaped."""
    assert names.to_text("/Übung/файл 1".encode()) == "/Übung/файл 1"
    assert names.to_text(b"/a\nb\\\xff\x1b") == "/a\\x0ab\\\\\\xff\\x1b"
    assert names.to_text("\u202eexe\u00a0".encode()) == "\\xe2\\x80\\xaeexe\\xc2\\xa0"


@pytest.mark.parametrize("text", ["\\", "a\\n", "\\x4", "\\xFF", "\\\\\\"])
def test_text_with_a_broken_escape_is_refused(text: str) -> None:
    """It came from nowhere that writes our escapes."""
    with pytest.raises(ValueError):
        names.from_text(text)
