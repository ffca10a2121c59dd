"""What must not work with the backup account: running, changing, listing, and leaving its directory."""

from __future__ import annotations

import posixpath
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from airflow_mdbackup.account.connection import Account, Unanswered
from airflow_mdbackup.account.findings import Finding, Seen, Verdict
from airflow_mdbackup.account.probes import (
    STILL_THERE,
    Check,
    Token,
    common_checks,
    match_block,
    ran,
    run,
    said_to_command,
    said_to_shell,
    subsystem_start,
    unique_name,
)
from airflow_mdbackup.account.sftp_requests import OK, Answer, NoSftp, Requests
from airflow_mdbackup.scheme.names import to_text

NAME = "backup account"
FORCE_COMMAND = "ForceCommand internal-sftp -R -p open,close,read,fstat,stat,lstat,realpath,limits"
_LOCKED = match_block(FORCE_COMMAND)
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
        """Directories in which nothing may be made."""
        return places(self.index, self.source)


def places(index: bytes, source: Sequence[bytes]) -> list[bytes]:
    """Return the directories of a provider that matter, each once; of many sources some."""
    return list(dict.fromkeys([b"/", posixpath.dirname(index), *source[:_SOURCES]]))


def audit(conn_id: str, source: Sequence[bytes], index: bytes) -> tuple[str, list[Finding]]:
    """Return the account's login, and what was found; over one TCP connection.

    :raises AccessRefused: the host key is not the expected one, or the account is refused.
    :raises ConnectionLost: the server cannot be reached.
    """
    with Account(conn_id) as account:
        findings = run(NAME, account, common_checks([b"/tmp", *places(index, source)]))
        findings += run(NAME, account, _RUNNING)
        of_files: list[Finding] = []
        try:
            with account.session() as channel:
                requests = subsystem_start(account, channel, account.hook.subsystem)
                if requests is None:
                    raise Unanswered(f"the server does not start the subsystem {account.hook.subsystem}")
                of_files = run(NAME, Files(requests, index, tuple(source)), _FILES)
        except Unanswered as error:
            change = "Subsystem in sshd_config, and the extra subsystem of the Airflow connection"
            unjudged = [Finding(NAME, check.name, Verdict.UNKNOWN, str(error), change) for check in _FILES]
            of_files = of_files or unjudged
        return account.login, findings + of_files


# --- running ----------------------------------------------------------------------------------------


def _execution(account: Account) -> Seen:
    token = Token()
    return ran(token, said_to_command(account, token))


def _shell(account: Account) -> Seen:
    token = Token()
    return ran(token, said_to_shell(account, token))


def _other_subsystems(account: Account) -> Seen:
    """Start what else there may be. Under ``ForceCommand`` all of them are the same locked server."""
    names = {"sftp", "sftpi", "netconf", f"mdbackup-{secrets.token_hex(4)}"} - {account.hook.subsystem}
    loose, locked = [], []
    for name in sorted(names):
        with account.session() as channel:
            try:
                requests = subsystem_start(account, channel, name)
                if requests is None:
                    continue
                if requests.opendir(b"/").refused and requests.create(_nowhere()).refused:
                    locked.append(name)
                else:
                    loose.append(f"{name} can list or write")
            except NoSftp as error:
                if not error.ended:
                    loose.append(f"{name} is something else than SFTP")
    if loose:
        return Seen(Verdict.LOOSER, "; ".join(loose))
    others = f"{', '.join(locked)} as locked as it" if locked else f"none of {len(names)} others tried"
    return Seen(Verdict.TIGHT, f"{account.hook.subsystem}, and {others}")


_RUNNING: list[Check[Account]] = [
    Check("no shell", _shell, _LOCKED),
    Check("no exec", _execution, _LOCKED),
    Check("only the expected subsystem", _other_subsystems, _LOCKED),
]


# --- changing ---------------------------------------------------------------------------------------


def _nowhere() -> bytes:
    """Return a path in a directory that does not exist: a server that would write looks for it in vain."""
    return b"/%b/x" % unique_name()


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
            ("opening to write", requests.open_to_write(_nowhere())),
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
    answer = make(_nowhere())
    answers = [(what, answer)]
    if not answer.refused:
        return judged(answers)
    for place in files.places:
        path = posixpath.join(place, unique_name())
        answer = make(path)
        if answer.code == OK:
            gone = unmake(path, answer).code == OK
            left = "removed again" if gone else STILL_THERE
            return Seen(Verdict.LOOSER, f"{what} worked: {to_text(path)}, {left}")
        answers.append((f"in {to_text(place)}", answer))
    return judged(answers)


def _rename(files: Files) -> Seen:
    requests = files.requests
    return judged(
        [
            ("renaming", requests.rename(_nowhere(), _nowhere())),
            ("posix-rename", requests.posix_rename(_nowhere(), _nowhere())),
        ]
    )


def _delete(files: Files) -> Seen:
    requests = files.requests
    return judged([("remove", requests.remove(_nowhere())), ("rmdir", requests.rmdir(_nowhere()))])


def _attributes(files: Files) -> Seen:
    requests = files.requests
    return judged(
        [
            ("setstat", requests.setstat(_nowhere())),
            ("fsetstat", requests.fsetstat(_NO_HANDLE)),
            ("lsetstat", requests.lsetstat(_nowhere())),
        ]
    )


def _symlink(files: Files) -> Seen:
    return judged([("symlink", files.requests.symlink(_nowhere(), _nowhere()))])


def _hardlink(files: Files) -> Seen:
    return judged([("hardlink", files.requests.hardlink(_nowhere(), _nowhere()))])


# --- seeing -----------------------------------------------------------------------------------------


def _listing(files: Files) -> Seen:
    requests = files.requests
    opened = requests.opendir(b"/")
    answers = [("listing /", opened), ("reading a list", requests.readdir(opened.value or _NO_HANDLE))]
    if opened.code == OK:
        requests.close(opened.value)
    return judged(answers)


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
    looked_for = [mark for mark in marks if not _is_backed_up(mark, files)]
    seen = [
        mark
        for mark in looked_for
        if any(files.requests.stat(before + mark).code == OK for before in prefixes)
    ]
    if seen:
        return Seen(Verdict.LOOSER, f"the account sees the machine's {_listed(seen)}")
    return Seen(Verdict.TIGHT, f"{tight} {_listed(looked_for)}")


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


_FILES: list[Check[Files]] = [
    Check("no write", _write, _LOCKED),
    Check("no create", creation, _LOCKED),
    Check("no mkdir", directory_creation, _LOCKED),
    Check("no rename", _rename, _LOCKED),
    Check("no delete", _delete, _LOCKED),
    Check("no chmod", _attributes, _LOCKED),
    Check("no symlink", _symlink, _LOCKED),
    Check("no hardlink", _hardlink, _LOCKED),
    Check("no listing", _listing, _LOCKED),
    Check("no escape by ..", _dotdot, _CHROOT),
    Check("no escape by an absolute path", absolute_paths, _CHROOT),
    Check("no escape by a symlink", _links, _CHROOT),
]
