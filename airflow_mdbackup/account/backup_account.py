"""What must not work with the backup account: running, changing, listing, and leaving its directory."""

from __future__ import annotations

import posixpath
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from airflow_mdbackup.account.connection import Account, Unanswered
from airflow_mdbackup.account.findings import Finding, Seen, Verdict
from airflow_mdbackup.account.probes import (
    Check,
    Token,
    common_checks,
    match_block,
    nowhere,
    ran,
    run,
    said_to_command,
    said_to_shell,
    subsystem_start,
    unique_name,
)
from airflow_mdbackup.account.sftp_requests import NO_SUCH_FILE, OK, Answer, NoSftp, Requests
from airflow_mdbackup.scheme.common.paths import to_text

NAME = "backup account"
FORCE_COMMAND = "ForceCommand internal-sftp -R -p open,close,read,fstat,stat,lstat,realpath,limits"
_LOCKED = match_block(FORCE_COMMAND)
_REFUSAL = b"This service allows sftp connections only."  # of internal-sftp, where it is forced
_CHROOT = match_block("ChrootDirectory /home/backupop (of root, 0755, with nothing of the machine in it)")

_SOURCES = 8  # so many are tried, so that an audit stays short
_NO_HANDLE = b"none"  # of the four bytes that handles of OpenSSH have, and never given by it
_UP = b"/.." * 40
# What is in no directory that was made for backups. What a source contains, or lies in, is left out.
_MACHINE = (b"/proc/self", b"/proc/version", b"/sys/kernel", b"/etc/shadow", b"/root", b"/usr/bin/env")
_LINKS = (b"/proc/self/root", b"/proc/self/cwd", b"/proc/1/root", b"/var/run", b"/etc/mtab", b"/dev/stdin")


@dataclass(frozen=True, slots=True)
class Files:
    """The account's files: requests to its SFTP server, and where its index and sources are."""

    requests: Requests
    index: bytes
    source: tuple[bytes, ...]

    @property
    def places(self) -> list[bytes]:
        """Directories in which nothing may be made, each once; of many sources some."""
        return list(dict.fromkeys([b"/", posixpath.dirname(self.index), *self.source[:_SOURCES]]))


def audit(conn_id: str, source: Sequence[bytes], index: bytes) -> tuple[str, list[Finding]]:
    """Return the account's login, and what was found; over one TCP connection.

    :raises AccessRefused: the host key is not the expected one, or the account is refused.
    :raises ConnectionLost: the server cannot be reached.
    """
    with Account(conn_id) as account:
        findings = run(NAME, account, common_checks())
        findings += run(NAME, account, _running(index, source))
        of_files: list[Finding] = []
        try:
            with account.session() as channel:
                requests = subsystem_start(account, channel, account.reached.subsystem)
                if requests is None:
                    raise Unanswered(f"the server does not start the subsystem {account.reached.subsystem}")
                of_files = run(NAME, Files(requests, index, tuple(source)), _FILES)
        except Unanswered as error:
            change = "Subsystem in sshd_config, and the extra subsystem of the Airflow connection"
            unjudged = [Finding(NAME, check.name, Verdict.UNKNOWN, str(error), change) for check in _FILES]
            of_files = of_files or unjudged
        return account.login, findings + of_files


# --- running ----------------------------------------------------------------------------------------


def _execution(account: Account) -> Seen:
    token = Token()
    return ran(token, said_to_command(account, token), [_REFUSAL])


def _shell(account: Account) -> Seen:
    token = Token()
    return ran(token, said_to_shell(account, token), [_REFUSAL])


def _other_subsystems(account: Account, index: bytes, source: Sequence[bytes]) -> Seen:
    """Start what else there may be, which must be as locked as the expected one."""
    names = {"sftp", "sftpi", "netconf", f"mdbackup-{secrets.token_hex(4)}"} - {account.reached.subsystem}
    locked: list[str] = []
    loose: list[str] = []
    unclear: list[str] = []
    for name in sorted(names):
        with account.session() as channel:
            try:
                requests = subsystem_start(account, channel, name)
                if requests is None:
                    continue
                found = run(NAME, Files(requests, index, tuple(source)), _REQUESTS)
                if not (lacking := [one for one in found if one.verdict is not Verdict.TIGHT]):
                    locked.append(name)
                    continue
                is_loose = any(one.verdict is Verdict.LOOSER for one in lacking)
                lacks = f"{name} starts, and is not proven: {', '.join(one.check for one in lacking)}"
                (loose if is_loose else unclear).append(lacks)
            except NoSftp as error:
                if not error.ended:
                    loose.append(f"{name} is something else than SFTP")
    if loose or unclear:
        return Seen(Verdict.LOOSER if loose else Verdict.UNKNOWN, "; ".join(loose + unclear))
    others = f"{', '.join(locked)} as locked as it" if locked else f"none of {len(names)} others tried"
    return Seen(Verdict.TIGHT, f"{account.reached.subsystem}, and {others}")


def _running(index: bytes, source: Sequence[bytes]) -> list[Check[Account]]:
    return [
        Check("no shell", _shell, _LOCKED),
        Check("no exec", _execution, _LOCKED),
        Check(
            "only the expected subsystem",
            lambda account: _other_subsystems(account, index, source),
            _LOCKED,
        ),
    ]


# --- changing ---------------------------------------------------------------------------------------


def judged(answers: Sequence[tuple[str, Answer]]) -> Seen:
    """Judge requests that must be refused before the server looks at what they are about."""
    loose = [
        f"{what} worked" if answer.code == OK else f"{what} was tried: {answer}"
        for what, answer in answers
        if not answer.refused
    ]
    if loose:
        return Seen(Verdict.LOOSER, "; ".join(loose))
    by_answer: dict[str, list[str]] = {}
    for what, answer in answers:
        by_answer.setdefault(str(answer), []).append(what)
    return Seen(
        Verdict.TIGHT, "; ".join(f"{answer}: {', '.join(what)}" for answer, what in by_answer.items())
    )


def _write(files: Files) -> Seen:
    requests = files.requests
    return judged(
        [
            ("opening to write", requests.open_to_write(nowhere())),
            ("writing", requests.write(_NO_HANDLE)),
            ("copying", requests.copy_data(_NO_HANDLE, _NO_HANDLE)),
        ]
    )


def creation(files: Files) -> Seen:
    """Create a file nowhere, and only where that is refused, in the places that matter."""
    requests = files.requests

    def unmake(path: bytes, made: Answer) -> Answer:
        requests.close(made.value)
        return requests.remove(path)

    return _made(files, "creating", requests.create, unmake)


def directory_creation(files: Files) -> Seen:
    """The same for a directory."""
    return _made(files, "mkdir", files.requests.mkdir, lambda path, _: files.requests.rmdir(path))


def _made(
    files: Files,
    what: str,
    make: Callable[[bytes], Answer],
    unmake: Callable[[bytes, Answer], Answer],
) -> Seen:
    answer = make(nowhere())
    answers = [(what, answer)]
    if not answer.refused:
        return judged(answers)
    for place in files.places:
        path = posixpath.join(place, unique_name())
        answer = make(path)
        if answer.code == OK:
            gone = unmake(path, answer).code == OK
            left = "removed again" if gone else "WHICH IS STILL THERE: please remove it"
            return Seen(Verdict.LOOSER, f"{what} worked: {to_text(path)}, {left}")
        answers.append((f"in {to_text(place)}", answer))
    return judged(answers)


def _rename(files: Files) -> Seen:
    requests = files.requests
    return judged(
        [
            ("renaming", requests.rename(nowhere(), nowhere())),
            ("posix-rename", requests.posix_rename(nowhere(), nowhere())),
        ]
    )


def _delete(files: Files) -> Seen:
    requests = files.requests
    return judged([("remove", requests.remove(nowhere())), ("rmdir", requests.rmdir(nowhere()))])


def _attributes(files: Files) -> Seen:
    requests = files.requests
    return judged(
        [
            ("setstat", requests.setstat(nowhere())),
            ("fsetstat", requests.fsetstat(_NO_HANDLE)),
            ("lsetstat", requests.lsetstat(nowhere())),
        ]
    )


def _symlink(files: Files) -> Seen:
    return judged([("symlink", files.requests.symlink(nowhere(), nowhere()))])


def _hardlink(files: Files) -> Seen:
    return judged([("hardlink", files.requests.hardlink(nowhere(), nowhere()))])


# --- seeing -----------------------------------------------------------------------------------------


def _listing(files: Files) -> Seen:
    requests = files.requests
    opened = requests.opendir(b"/")
    answers = [("listing /", opened), ("reading a list", requests.readdir(opened.value or _NO_HANDLE))]
    if opened.code == OK:
        requests.close(opened.value)
    return judged(answers)


def _other_requests(files: Files) -> Seen:
    """Ask for what changes nothing and lists no files, and tells about the machine all the same."""
    requests = files.requests
    return judged(
        [
            ("readlink", requests.readlink(nowhere())),
            ("statvfs", requests.statvfs(nowhere())),
            ("fstatvfs", requests.fstatvfs(_NO_HANDLE)),
            ("fsync", requests.fsync(_NO_HANDLE)),
            ("users-groups-by-id", requests.names_of_ids()),
            ("home-directory", requests.home_directory(unique_name())),
            ("expand-path", requests.expand_path(nowhere())),
        ]
    )


def _dotdot(files: Files) -> Seen:
    """Look for the machine from the top of each place."""
    prefixes = [posixpath.join(place, b"") + _UP.lstrip(b"/") for place in files.places]
    return _outside(files, _MACHINE, prefixes, "the top is the account's own: no")


def absolute_paths(files: Files) -> Seen:
    return _outside(files, _MACHINE, [b""], "there is no")


def _links(files: Files) -> Seen:
    """Follow the links that a machine has. Those of a backup cannot leave what has none of these."""
    return _outside(files, _LINKS, [b""], "links lead nowhere else: no")


def _outside(files: Files, marks: Sequence[bytes], prefixes: Sequence[bytes], tight: str) -> Seen:
    look = _way_to_look(files.requests)
    looked_for = [mark for mark in marks if not _is_backed_up(mark, files)]
    answers = {mark: {look(before + mark).code for before in prefixes} for mark in looked_for}
    seen = [mark for mark, codes in answers.items() if OK in codes]
    if seen:
        return Seen(Verdict.LOOSER, f"the account sees the machine's {_listed(seen)}")
    unclear = [mark for mark, codes in answers.items() if codes != {NO_SUCH_FILE}]
    if unclear:
        return Seen(Verdict.UNKNOWN, f"the server does not tell whether there is {_listed(unclear)}")
    _check_place(files, look)
    return Seen(Verdict.TIGHT, f"{tight} {_listed(looked_for)}")


def _way_to_look(requests: Requests) -> Callable[[bytes], Answer]:
    """Return the request that tells whether a path is there.

    One that the account may not make is refused, whatever it is about.

    :raises Unanswered: there is none.
    """
    for look in (requests.stat, requests.look_by_opening):
        if look(nowhere()).code == NO_SUCH_FILE:
            return look
    raise Unanswered("the server tells neither by stat nor by open that a file is not there")


def _check_place(files: Files, look: Callable[[bytes], Answer]) -> None:
    """See that the account is where the backup is: other directories have nothing of a machine, too.

    :raises Unanswered: nothing shows that.
    """
    own = [path for path in (*files.places, files.index) if path != b"/"]
    if not any(look(path).code == OK for path in own):
        raise Unanswered(
            f"none of {_listed(own)} is there: the account may be in another directory than the backup"
        )


def _is_backed_up(mark: bytes, files: Files) -> bool:
    """Whether a path may rightly be there, because it lies in a source, or one lies in it.

    Nobody backs up /proc or /sys, also not by saying ``source: /``.
    """
    if mark.startswith((b"/proc/", b"/sys/")):
        return False
    return any(
        one == b"/" or (mark + b"/").startswith(one + b"/") or (one + b"/").startswith(mark + b"/")
        for one in (*files.source, files.index)
    )


def _listed(paths: Sequence[bytes]) -> str:
    return ", ".join(map(to_text, paths))


# These hold for every SFTP server of the account, wherever it is.
_REQUESTS: list[Check[Files]] = [
    Check("no write", _write, _LOCKED),
    Check("no create", creation, _LOCKED),
    Check("no mkdir", directory_creation, _LOCKED),
    Check("no rename", _rename, _LOCKED),
    Check("no delete", _delete, _LOCKED),
    Check("no chmod", _attributes, _LOCKED),
    Check("no symlink", _symlink, _LOCKED),
    Check("no hardlink", _hardlink, _LOCKED),
    Check("no listing", _listing, _LOCKED),
    Check("no other requests", _other_requests, _LOCKED),
]
_FILES: list[Check[Files]] = [
    *_REQUESTS,
    Check("no escape by ..", _dotdot, _CHROOT),
    Check("no escape by an absolute path", absolute_paths, _CHROOT),
    Check("no escape by a symlink", _links, _CHROOT),
]
