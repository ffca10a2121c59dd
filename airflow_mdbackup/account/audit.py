"""Prove from this side that a provider's accounts can do nothing but what the backup needs.

One TCP connection per account, with one channel after another::

    for each account:
        query the login methods, and log in with the key
        request everything that must be refused: terminal, forwarding, shell, command, other subsystems
        backup account: ask its SFTP server for each kind of change, a listing, and paths outside the chroot
        index account:  check that only its forced command runs; no build is started

Nothing is changed. A write is first requested where it could not succeed even if it were allowed. Only if the
server refuses that is it requested where it could succeed; anything created then is removed again and
reported.

Limitations: it proves the combined effect of all settings, with this key and from this address, and not that
a particular setting is present.
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
    """Try everything that both accounts of a provider must refuse.

    :param provider: the provider's name.
    :param sftp_conn_id: connection of the backup account.
    :param source: absolute paths that are backed up, as the backup account sees them; they need not exist.
    :param index: absolute path of the provider index, as the backup account sees it.
    :param ssh_conn_id: connection of the index account, if the provider has one.
    :raises AccessRefused: a host key is not the expected one, or a login is refused.
    :raises ConnectionLost: the server cannot be reached.
    """
    login, findings = backup_account.audit(sftp_conn_id, [path.encode() for path in source], index.encode())
    logins = {backup_account.NAME: login}
    if ssh_conn_id is not None:
        logins[index_account.NAME], more = index_account.audit(provider, ssh_conn_id)
        findings += more
    return Audit(tuple(findings), logins)
