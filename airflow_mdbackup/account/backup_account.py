"""What must not work with the backup account: running programs, changes, listings, leaving the chroot."""

from __future__ import annotations

import posixpath
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from airflow_mdbackup.account.connection import Account, Unanswered
from airflow_mdbackup.account.findings import Finding, Observation, Verdict
from airflow_mdbackup.account.probes import (
    Check,
    Token,
    common_checks,
    judge_execution,
    match_block,
    nonexistent_path,
    output_of_command,
    output_of_shell,
    run_checks,
    start_subsystem,
    unique_name,
)
from airflow_mdbackup.account.sftp_requests import NO_SUCH_FILE, OK, Answer, NoSftp, Requests
from airflow_mdbackup.scheme.common.paths import to_text

NAME = "backup account"
FORCE_COMMAND = "ForceCommand internal-sftp -R -p open,close,read,fstat,stat,lstat,realpath,limits"
_RESTRICTIONS = match_block(FORCE_COMMAND)
_REFUSAL = b"This service allows sftp connections only."  # printed by a forced internal-sftp
_CHROOT = match_block("ChrootDirectory /home/backupop (owned by root, 0755, without any system files)")

_MAX_SOURCES = 8  # that are tried, to keep an audit short
_INVALID_HANDLE = b"none"  # four bytes, like handles of OpenSSH, but never issued by it
_UP = b"/.." * 40
# Paths that no backup directory contains. Those that overlap with a source are excluded.
_SYSTEM_PATHS = (b"/proc/self", b"/proc/version", b"/sys/kernel", b"/etc/shadow", b"/root", b"/usr/bin/env")
_SYSTEM_LINKS = (
    b"/proc/self/root",
    b"/proc/self/cwd",
    b"/proc/1/root",
    b"/var/run",
    b"/etc/mtab",
    b"/dev/stdin",
)


@dataclass(frozen=True, slots=True)
class Files:
    """The account's SFTP server, and the paths of its index and sources there."""

    requests: Requests
    index: bytes
    source: tuple[bytes, ...]

    @property
    def directories(self) -> list[bytes]:
        """Directories in which creating a file must fail, without duplicates and with some of the sources."""
        return list(dict.fromkeys([b"/", posixpath.dirname(self.index), *self.source[:_MAX_SOURCES]]))


def audit(conn_id: str, source: Sequence[bytes], index: bytes) -> tuple[str, list[Finding]]:
    """Return the account's login, and the findings, over one TCP connection.

    :raises AccessRefused: the host key is not the expected one, or the login is refused.
    :raises ConnectionLost: the server cannot be reached.
    """
    with Account(conn_id) as account:
        findings = run_checks(NAME, account, common_checks())
        findings += run_checks(NAME, account, _execution_checks(index, source))
        file_findings: list[Finding] = []
        try:
            with account.session() as channel:
                requests = start_subsystem(account, channel, account.ssh_account.subsystem)
                if requests is None:
                    raise Unanswered(
                        f"the server does not start the subsystem {account.ssh_account.subsystem}"
                    )
                file_findings = run_checks(NAME, Files(requests, index, tuple(source)), _FILE_CHECKS)
        except Unanswered as error:
            change = "Subsystem in sshd_config, and the extra subsystem of the Airflow connection"
            unknown = [
                Finding(NAME, check.name, Verdict.UNKNOWN, str(error), change) for check in _FILE_CHECKS
            ]
            file_findings = file_findings or unknown
        return account.login, findings + file_findings


# --- running programs -------------------------------------------------------------------------------


def _probe_command(account: Account) -> Observation:
    token = Token()
    return judge_execution(token, output_of_command(account, token), [_REFUSAL])


def _probe_shell(account: Account) -> Observation:
    token = Token()
    return judge_execution(token, output_of_shell(account, token), [_REFUSAL])


def _probe_other_subsystems(account: Account, index: bytes, source: Sequence[bytes]) -> Observation:
    """Try other subsystems, which must be as restricted as the expected one."""
    names = {"sftp", "sftpi", "netconf", f"mdbackup-{secrets.token_hex(4)}"} - {account.ssh_account.subsystem}
    restricted: list[str] = []
    loose: list[str] = []
    unclear: list[str] = []
    for name in sorted(names):
        with account.session() as channel:
            try:
                requests = start_subsystem(account, channel, name)
                if requests is None:
                    continue
                found = run_checks(NAME, Files(requests, index, tuple(source)), _REQUEST_CHECKS)
                unproven = [finding for finding in found if finding.verdict is not Verdict.TIGHT]
                if not unproven:
                    restricted.append(name)
                    continue
                is_loose = any(finding.verdict is Verdict.LOOSER for finding in unproven)
                checks = ", ".join(finding.check for finding in unproven)
                (loose if is_loose else unclear).append(f"{name} starts, not proven: {checks}")
            except NoSftp as error:
                if not error.ended:
                    loose.append(f"{name} starts something other than SFTP")
    if loose or unclear:
        return Observation(Verdict.LOOSER if loose else Verdict.UNKNOWN, "; ".join(loose + unclear))
    others = (
        f"{', '.join(restricted)}, equally restricted" if restricted else f"none of {len(names)} others tried"
    )
    return Observation(Verdict.TIGHT, f"{account.ssh_account.subsystem}, and {others}")


def _execution_checks(index: bytes, source: Sequence[bytes]) -> list[Check[Account]]:
    return [
        Check("no shell", _probe_shell, _RESTRICTIONS),
        Check("no exec", _probe_command, _RESTRICTIONS),
        Check(
            "only the expected subsystem",
            lambda account: _probe_other_subsystems(account, index, source),
            _RESTRICTIONS,
        ),
    ]


# --- changes ---------------------------------------------------------------------------------------


def judge_answers(answers: Sequence[tuple[str, Answer]]) -> Observation:
    """Judge requests that the server must refuse before it looks at their path or handle."""
    loose = [
        f"{request} worked" if answer.code == OK else f"{request} was tried: {answer}"
        for request, answer in answers
        if not answer.refused
    ]
    if loose:
        return Observation(Verdict.LOOSER, "; ".join(loose))
    by_answer: dict[str, list[str]] = {}
    for request, answer in answers:
        by_answer.setdefault(str(answer), []).append(request)
    return Observation(
        Verdict.TIGHT, "; ".join(f"{answer}: {', '.join(requests)}" for answer, requests in by_answer.items())
    )


def _probe_write(files: Files) -> Observation:
    requests = files.requests
    return judge_answers(
        [
            ("opening to write", requests.open_to_write(nonexistent_path())),
            ("writing", requests.write(_INVALID_HANDLE)),
            ("copying", requests.copy_data(_INVALID_HANDLE, _INVALID_HANDLE)),
        ]
    )


def probe_create(files: Files) -> Observation:
    """Create a file at a path that cannot exist, and if that is refused, in the account's directories."""
    requests = files.requests

    def undo(path: bytes, created: Answer) -> Answer:
        requests.close(created.value)
        return requests.remove(path)

    return _probe_creation(files, "creating", requests.create, undo)


def probe_mkdir(files: Files) -> Observation:
    """Create a directory, likewise."""
    return _probe_creation(files, "mkdir", files.requests.mkdir, lambda path, _: files.requests.rmdir(path))


def _probe_creation(
    files: Files,
    request: str,
    create: Callable[[bytes], Answer],
    undo: Callable[[bytes, Answer], Answer],
) -> Observation:
    answer = create(nonexistent_path())
    answers = [(request, answer)]
    if not answer.refused:
        return judge_answers(answers)
    for directory in files.directories:
        path = posixpath.join(directory, unique_name())
        answer = create(path)
        if answer.code == OK:
            removed = undo(path, answer).code == OK
            rest = "removed again" if removed else "WHICH IS STILL THERE: please remove it"
            return Observation(Verdict.LOOSER, f"{request} worked: {to_text(path)}, {rest}")
        answers.append((f"in {to_text(directory)}", answer))
    return judge_answers(answers)


def _probe_rename(files: Files) -> Observation:
    requests = files.requests
    return judge_answers(
        [
            ("renaming", requests.rename(nonexistent_path(), nonexistent_path())),
            ("posix-rename", requests.posix_rename(nonexistent_path(), nonexistent_path())),
        ]
    )


def _probe_delete(files: Files) -> Observation:
    requests = files.requests
    return judge_answers(
        [("remove", requests.remove(nonexistent_path())), ("rmdir", requests.rmdir(nonexistent_path()))]
    )


def _probe_attributes(files: Files) -> Observation:
    requests = files.requests
    return judge_answers(
        [
            ("setstat", requests.setstat(nonexistent_path())),
            ("fsetstat", requests.fsetstat(_INVALID_HANDLE)),
            ("lsetstat", requests.lsetstat(nonexistent_path())),
        ]
    )


def _probe_symlink(files: Files) -> Observation:
    return judge_answers([("symlink", files.requests.symlink(nonexistent_path(), nonexistent_path()))])


def _probe_hardlink(files: Files) -> Observation:
    return judge_answers([("hardlink", files.requests.hardlink(nonexistent_path(), nonexistent_path()))])


# --- reading beyond the backup ----------------------------------------------------------------------------


def _probe_listing(files: Files) -> Observation:
    requests = files.requests
    opened = requests.opendir(b"/")
    answers = [
        ("listing /", opened),
        ("reading a directory", requests.readdir(opened.value or _INVALID_HANDLE)),
    ]
    if opened.code == OK:
        requests.close(opened.value)
    return judge_answers(answers)


def _probe_other_requests(files: Files) -> Observation:
    """Make the requests that change and list nothing, but reveal something about the machine."""
    requests = files.requests
    return judge_answers(
        [
            ("readlink", requests.readlink(nonexistent_path())),
            ("statvfs", requests.statvfs(nonexistent_path())),
            ("fstatvfs", requests.fstatvfs(_INVALID_HANDLE)),
            ("fsync", requests.fsync(_INVALID_HANDLE)),
            ("users-groups-by-id", requests.names_of_ids()),
            ("home-directory", requests.home_directory(unique_name())),
            ("expand-path", requests.expand_path(nonexistent_path())),
        ]
    )


def _probe_dotdot(files: Files) -> Observation:
    """Look for system files by `..` from each of the account's directories."""
    prefixes = [posixpath.join(directory, b"") + _UP.lstrip(b"/") for directory in files.directories]
    return _probe_outside(files, _SYSTEM_PATHS, prefixes, "nothing above the account's root: no")


def probe_absolute_paths(files: Files) -> Observation:
    return _probe_outside(files, _SYSTEM_PATHS, [b""], "not visible:")


def _probe_links(files: Files) -> Observation:
    """Follow a system's usual symlinks. A backup's own cannot leave a chroot in which none of these works."""
    return _probe_outside(files, _SYSTEM_LINKS, [b""], "no symlink leads outside: no")


def _probe_outside(
    files: Files, paths: Sequence[bytes], prefixes: Sequence[bytes], tight: str
) -> Observation:
    """Look for system files.

    :param prefixes: what to put before each path.
    :param tight: the text of a good result, to be followed by the paths.
    """
    look = _existence_request(files.requests)
    foreign = [path for path in paths if not _is_backed_up(path, files)]
    answers = {path: {look(prefix + path).code for prefix in prefixes} for path in foreign}
    visible = [path for path, codes in answers.items() if OK in codes]
    if visible:
        return Observation(Verdict.LOOSER, f"the account sees the machine's {_join(visible)}")
    unclear = [path for path, codes in answers.items() if codes != {NO_SUCH_FILE}]
    if unclear:
        return Observation(Verdict.UNKNOWN, f"the server does not say whether these exist: {_join(unclear)}")
    _check_location(files, look)
    return Observation(Verdict.TIGHT, f"{tight} {_join(foreign)}")


def _existence_request(requests: Requests) -> Callable[[bytes], Answer]:
    """Return a request that shows whether a path exists.

    A request that the account may not make is refused for any path.

    :raises Unanswered: neither request does.
    """
    for look in (requests.stat, requests.open_to_read):
        if look(nonexistent_path()).code == NO_SUCH_FILE:
            return look
    raise Unanswered("neither stat nor open shows whether a file exists")


def _check_location(files: Files, look: Callable[[bytes], Answer]) -> None:
    """Check that the account sees the backup: any other directory lacks system files as well.

    :raises Unanswered: it sees neither a source nor the index.
    """
    own = [path for path in (*files.directories, files.index) if path != b"/"]
    if not any(look(path).code == OK for path in own):
        raise Unanswered(
            f"none of {_join(own)} exists: the account may be confined to a directory other than the backup"
        )


def _is_backed_up(path: bytes, files: Files) -> bool:
    """Whether a path may be visible, because it is inside a source, or contains one.

    Nobody backs up /proc or /sys, not even with ``source: /``.
    """
    if path.startswith((b"/proc/", b"/sys/")):
        return False
    return any(
        own == b"/" or (path + b"/").startswith(own + b"/") or (own + b"/").startswith(path + b"/")
        for own in (*files.source, files.index)
    )


def _join(paths: Sequence[bytes]) -> str:
    return ", ".join(map(to_text, paths))


# For every SFTP subsystem of the account, whatever directory it starts in.
_REQUEST_CHECKS: list[Check[Files]] = [
    Check("no write", _probe_write, _RESTRICTIONS),
    Check("no create", probe_create, _RESTRICTIONS),
    Check("no mkdir", probe_mkdir, _RESTRICTIONS),
    Check("no rename", _probe_rename, _RESTRICTIONS),
    Check("no delete", _probe_delete, _RESTRICTIONS),
    Check("no chmod", _probe_attributes, _RESTRICTIONS),
    Check("no symlink", _probe_symlink, _RESTRICTIONS),
    Check("no hardlink", _probe_hardlink, _RESTRICTIONS),
    Check("no listing", _probe_listing, _RESTRICTIONS),
    Check("no other requests", _probe_other_requests, _RESTRICTIONS),
]
_FILE_CHECKS: list[Check[Files]] = [
    *_REQUEST_CHECKS,
    Check("no escape by ..", _probe_dotdot, _CHROOT),
    Check("no escape by an absolute path", probe_absolute_paths, _CHROOT),
    Check("no escape by a symlink", _probe_links, _CHROOT),
]
