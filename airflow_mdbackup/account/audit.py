"""Prove from this side that a provider's accounts can do nothing but what the backup needs.

One TCP connection per account, on it one channel after the other::

    for each account:
        ask for the ways to log in, and log in with the key
        ask for all that must be refused: terminal, forwardings, a shell, a command, other subsystems
        backup account: ask its SFTP server for each kind of change, for a list, and for what lies outside
        index account:  see that only its forced command runs, and start no build

Nothing is changed: writing is asked for where it could not succeed even if it were allowed, and only where a
server refuses that, also where it could; what should be made then all the same is removed again, and told.

What this does not give: a proof that a setting is there. It sees the effect that all settings have together,
and only with this key, from this address.
"""

from __future__ import annotations

from collections.abc import Sequence

from airflow_mdbackup.account import backup_account, index_account
from airflow_mdbackup.account.findings import Audit


def audit(
    provider: str,
    *,
    sftp_conn_id: str,
    source: Sequence[str],
    index: str,
    ssh_conn_id: str | None = None,
) -> Audit:
    """Ask both accounts of a provider for everything that they must refuse.

    :param provider: the provider's name.
    :param sftp_conn_id: connection of the backup account.
    :param source: absolute paths that are backed up, as the backup account sees them; they need not exist.
    :param index: absolute path of the provider index, likewise.
    :param ssh_conn_id: connection of the index account, if there is one.
    :raises AccessRefused: a host key is not the expected one, or an account is refused.
    :raises ConnectionLost: the server cannot be reached.
    """
    login, findings = backup_account.audit(sftp_conn_id, [path.encode() for path in source], index.encode())
    logins = {backup_account.NAME: login}
    if ssh_conn_id is not None:
        logins[index_account.NAME], more = index_account.audit(provider, ssh_conn_id)
        findings += more
    return Audit(tuple(findings), logins)
