"""What must not work with the index account: anything but its one forced command, whatever it is told.

Nothing here has an index built: an indexer that is ready gets the end of its input instead of a request.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

from airflow_mdbackup.account.connection import PATIENCE, Account, Unanswered
from airflow_mdbackup.account.findings import Finding, Seen, Verdict
from airflow_mdbackup.account.probes import (
    READY,
    Check,
    Token,
    common_checks,
    quoted,
    ran,
    run,
    said_to_command,
    said_to_shell,
    subsystem_start,
)
from airflow_mdbackup.account.sftp_requests import NoSftp

NAME = "index account"
_FORCED = (
    'its line of authorized_keys, before the key: restrict,command="/usr/bin/python3 -I'
    ' /usr/local/lib/mdbackup/indexer.py --serve --config /etc/mdbackup/{}.json"'
)
_RESTRICT = "its line of authorized_keys, before the key: restrict; or "


def audit(provider: str, conn_id: str) -> tuple[str, list[Finding]]:
    """Return the account's login, and what was found; over one TCP connection.

    :raises AccessRefused: the host key is not the expected one, or the account is refused.
    :raises ConnectionLost: the server cannot be reached.
    """
    forced = _FORCED.format(provider)
    with Account(conn_id) as account:
        findings = run(NAME, account, map(_restrictable, common_checks()))
        findings += run(
            NAME,
            _Heard.by(account),
            [
                Check("only its forced command", _only_forced, forced),
                Check("arguments ignored", _arguments_ignored, forced),
                Check("no shell", lambda heard: ran(heard.token, heard.shell(), READY), forced),
            ],
        )
        findings += run(NAME, account, [Check("no subsystem", _subsystems, forced)])
        return account.login, findings


def _restrictable(check: Check[Account]) -> Check[Account]:
    """Say for a terminal and forwarding that the key's line can forbid it, too."""
    if not check.name.startswith("no ") or check.name in ("no tunnel", "no environment"):
        return check
    return Check(check.name, check.probe, _RESTRICT + check.change)


@dataclass(frozen=True, slots=True)
class _Heard:
    """What the account answered when it was told to run something, in each way that there is.

    The answers are got beforehand, since each of them tells something about the others; a function, so that
    an answer which did not come is told where it is asked for.
    """

    token: Token
    command: Callable[[], bytes | None]
    arguments: Callable[[], bytes | None]
    shell: Callable[[], bytes | None]

    @classmethod
    def by(cls, account: Account) -> _Heard:
        token = Token()
        command = _kept(lambda: said_to_command(account, token))
        # An indexer that got these words among its arguments would show its help.
        arguments = _kept(lambda: said_to_command(account, token, " --help"))
        is_indexer = _is_ready(command) or _is_ready(arguments)
        patience = {"patience": PATIENCE} if is_indexer else {}
        return cls(token, command, arguments, _kept(lambda: said_to_shell(account, token, **patience)))


def _kept(ask: Callable[[], bytes | None]) -> Callable[[], bytes | None]:
    try:
        answer = ask()
    except Unanswered as error:
        why = str(error)

        def fail() -> bytes | None:
            raise Unanswered(why)

        return fail
    return lambda: answer


def _is_ready(answer: Callable[[], bytes | None]) -> bool:
    try:
        said = answer() or b""
    except Unanswered:
        return False
    return any(word in said for word in READY)


def _only_forced(heard: _Heard) -> Seen:
    return _judged(heard, heard.command())


def _arguments_ignored(heard: _Heard) -> Seen:
    return _judged(heard, heard.arguments())


def _judged(heard: _Heard, said: bytes | None) -> Seen:
    if said is None:
        return Seen(Verdict.UNKNOWN, "the server refuses to run anything, so that no index can be built")
    if heard.token.word in said:
        return Seen(Verdict.LOOSER, "it ran what it was told")
    wants_request, wants_program = READY
    if wants_program in said:
        return Seen(Verdict.LOOSER, "it runs whatever program it is sent")
    if wants_request in said:
        return Seen(Verdict.TIGHT, "the indexer answered instead")
    if _is_ready(heard.shell):
        return Seen(Verdict.LOOSER, f"what it was told changed what ran: {quoted(said)}")
    return Seen(Verdict.UNKNOWN, f"neither that nor an indexer ran; the answer was {quoted(said)}")


def _subsystems(account: Account) -> Seen:
    names = ["sftp", "sftpi", f"mdbackup-{secrets.token_hex(4)}"]
    instead = ""
    for name in names:
        with account.session() as channel:
            try:
                if subsystem_start(account, channel, name) is not None:
                    return Seen(Verdict.LOOSER, f"{name} gives the account's files to read and to write")
            except NoSftp:
                instead = "; its forced command ran instead"
    return Seen(Verdict.TIGHT, f"none of {len(names)} tried{instead}")
