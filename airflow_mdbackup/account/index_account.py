"""What must not work with the index account: anything but its forced command, whatever it is asked to run.

No index is built: an indexer that is ready gets the end of its input instead of a request.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

from airflow_mdbackup.account.connection import ANSWER_TIMEOUT, Account, Unanswered
from airflow_mdbackup.account.findings import Finding, Observation, Verdict
from airflow_mdbackup.account.probes import (
    READY,
    Check,
    Token,
    common_checks,
    judge_execution,
    output_of_command,
    output_of_shell,
    quote_output,
    run_checks,
    start_subsystem,
)
from airflow_mdbackup.account.sftp_requests import NoSftp

NAME = "index account"
_FORCED_COMMAND = (
    'its line of authorized_keys, before the key: restrict,command="/usr/bin/python3 -I'
    ' /usr/local/lib/mdbackup/indexer.py --serve --config /etc/mdbackup/{}.json"'
)
_RESTRICT = "its line of authorized_keys, before the key: restrict; or "


def audit(provider: str, conn_id: str) -> tuple[str, list[Finding]]:
    """Return the account's login, and the findings, over one TCP connection.

    :raises AccessRefused: the host key is not the expected one, or the login is refused.
    :raises ConnectionLost: the server cannot be reached.
    """
    change = _FORCED_COMMAND.format(provider)
    with Account(conn_id) as account:
        findings = run_checks(NAME, account, map(_restrictable, common_checks()))
        findings += run_checks(
            NAME,
            _Outputs.collect(account),
            [
                Check("only its forced command", _probe_command, change),
                Check("arguments ignored", _probe_arguments, change),
                Check(
                    "no shell",
                    lambda outputs: judge_execution(outputs.token, outputs.shell(), READY),
                    change,
                ),
            ],
        )
        findings += run_checks(NAME, account, [Check("no subsystem", _probe_subsystems, change)])
        return account.login, findings


def _restrictable(check: Check[Account]) -> Check[Account]:
    """Add to the advice on terminal and forwarding that the key's options can forbid them as well."""
    if not check.name.startswith("no ") or check.name in ("no tunnel", "no environment"):
        return check
    return Check(check.name, check.probe, _RESTRICT + check.change)


@dataclass(frozen=True, slots=True)
class _Outputs:
    """The account's output for each way to run something.

    All are collected first, since each helps to judge the others. They are functions, so that a missing
    answer is raised in the check that uses it.
    """

    token: Token
    command: Callable[[], bytes | None]
    arguments: Callable[[], bytes | None]
    shell: Callable[[], bytes | None]

    @classmethod
    def collect(cls, account: Account) -> _Outputs:
        token = Token()
        command = _deferring_errors(lambda: output_of_command(account, token))
        # An indexer that received this option would print its help.
        arguments = _deferring_errors(lambda: output_of_command(account, token, " --help"))
        is_indexer = _is_ready(command) or _is_ready(arguments)
        patience = {"patience": ANSWER_TIMEOUT} if is_indexer else {}
        shell = _deferring_errors(lambda: output_of_shell(account, token, **patience))
        return cls(token, command, arguments, shell)


def _deferring_errors(ask: Callable[[], bytes | None]) -> Callable[[], bytes | None]:
    """Call ``ask`` now; return a function that returns its result, or raises its error."""
    try:
        answer = ask()
    except Unanswered as error:
        why = str(error)

        def fail() -> bytes | None:
            raise Unanswered(why)

        return fail
    return lambda: answer


def _is_ready(output_of: Callable[[], bytes | None]) -> bool:
    try:
        output = output_of() or b""
    except Unanswered:
        return False
    return any(word in output for word in READY)


def _probe_command(outputs: _Outputs) -> Observation:
    return _judge_output(outputs, outputs.command())


def _probe_arguments(outputs: _Outputs) -> Observation:
    return _judge_output(outputs, outputs.arguments())


def _judge_output(outputs: _Outputs, output: bytes | None) -> Observation:
    if output is None:
        return Observation(Verdict.UNKNOWN, "the server refuses to run anything, so no index can be built")
    if outputs.token.word in output:
        return Observation(Verdict.LOOSER, "the server ran the command")
    wants_request, wants_program = READY
    if wants_program in output:
        return Observation(Verdict.LOOSER, "it runs any program that is sent to it")
    if wants_request in output:
        return Observation(Verdict.TIGHT, "the indexer answered instead")
    if _is_ready(outputs.shell):
        return Observation(Verdict.LOOSER, f"the request changed what ran: {quote_output(output)}")
    return Observation(
        Verdict.UNKNOWN,
        f"neither the command nor an indexer ran; the answer was {quote_output(output)}",
    )


def _probe_subsystems(account: Account) -> Observation:
    names = ["sftp", "sftpi", f"mdbackup-{secrets.token_hex(4)}"]
    instead = ""
    for name in names:
        with account.session() as channel:
            try:
                if start_subsystem(account, channel, name) is not None:
                    return Observation(
                        Verdict.LOOSER, f"{name} gives read and write access to the account's files"
                    )
            except NoSftp:
                instead = "; its forced command ran instead"
    return Observation(Verdict.TIGHT, f"none of {len(names)} tried{instead}")
