"""What the accounts that the printed script makes can do, and what not."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from airflow_mdbackup.hooks.provider import IndexHook, ProviderHook
from airflow_mdbackup.scheme.errors import AccessRefused
from demo.provisioned import ProvisionedServer
from demo.sshd import _namespaces_allowed
from tests.integration.provision.machine import MAIN, Provision, done, read, say

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not _namespaces_allowed(), reason="only root has a machine to set up"
)


def test_backupop_reads_and_nothing_else(
    server: ProvisionedServer, provision: Provision, connect: Callable[[str], object]
) -> None:
    """No listing, no writing even where the file system would allow it, nothing outside of the chroot."""
    connect(done(server, provision("web", "--bind", "/srv/www:/backups")))
    (server.root / "home/backupop/open").mkdir()
    (server.root / "home/backupop/open").chmod(0o777)
    with ProviderHook("web_backupop") as hook:
        sftp = hook.get_conn()
        assert sftp.stat("/backups/alpha").st_size == 17
        for forbidden in (
            lambda: sftp.listdir("/"),
            lambda: sftp.open("/open/new", "w"),
            lambda: sftp.mkdir("/open/new"),
            lambda: sftp.symlink("/etc", "/open/new"),
            lambda: sftp.stat("/etc/passwd"),
            lambda: sftp.stat("/../../etc/passwd"),
        ):
            with pytest.raises(OSError):
                forbidden()
    assert os.listdir(server.root / "home/backupop/open") == []


def test_index_account_runs_the_indexer_whatever_is_asked(
    server: ProvisionedServer, provision: Provision, connect: Callable[[str], object]
) -> None:
    """Also with arguments, without a command, and when the key's own restriction is gone."""
    connect(done(server, provision("web")))
    for command in ("id", "python3 -c 'print(1)'", "--config /dev/null"):
        assert say("web_index", command).startswith("mdbackup ready request\n")
    server.edit("/etc/ssh/mdbackup/web/mdbackup-index", "restrict,", "")
    key = (server.root / "etc/ssh/mdbackup/web/mdbackup-index").read_text()
    (server.root / "etc/ssh/mdbackup/web/mdbackup-index").write_text(
        re.sub('command="[^"]*"', "restrict", key)
    )
    assert say("web_index", "id").startswith("mdbackup ready request\n")


def test_index_account_builds_what_the_configuration_on_a_says(
    server: ProvisionedServer, provision: Provision, connect: Callable[[str], object]
) -> None:
    """Through the forced command, without Python or anything else of the account's own."""
    connect(done(server, provision("web", "--bind", "/srv/www:/backups")))
    with IndexHook("web_index") as hook:
        standard_input, output, _ = hook.get_conn().exec_command("anything")
        request = {"id": None, "chroot": "/", "source": ["/etc"], "index": "/.mdbackup/index.md5"}
        standard_input.write(json.dumps(request) + "\n")
        standard_input.flush()
        assert "mdbackup done files=1 " in output.read().decode()
    assert read("web_backupop", b"/.mdbackup/index.md5").endswith(
        b"end format=1 files=1 unreadable=0 bytes=17\n"
    )


def test_accounts_can_change_neither_keys_nor_restrictions(
    server: ProvisionedServer, provision: Provision
) -> None:
    """All of it belongs to root; the index account owns the index's directory only."""
    done(server, provision("web", "--bind", "/srv/www:/backups"))
    places = "/etc/ssh /etc/mdbackup /usr/local/lib/mdbackup /home/backupop"
    for account, own in (("backupop", ""), ("mdbackup-index", "/home/backupop/.mdbackup\n")):
        found = server.run("runuser", "-u", account, "--", *f"find {places} -writable ! -type l".split())
        assert found.stdout == own
    shadow = (server.root / "etc/shadow").read_text()
    assert re.findall("^(backupop|mdbackup-index):([^:]*):", shadow, re.MULTILINE) == [
        ("backupop", "*"),
        ("mdbackup-index", "*"),
    ]


def test_key_is_of_use_from_the_given_addresses_only(
    server: ProvisionedServer, provision: Provision, connect: Callable[[str], object]
) -> None:
    """`--from` takes networks too; and a run with other addresses replaces the old ones."""
    connect(done(server, provision("web", "--from", "192.0.2.0/24", "--from", "2001:db8::7")))
    with pytest.raises(AccessRefused):
        say("web_backupop", "id")
    done(server, provision("web", "--from", "127.0.0.0/8"))
    say("web_backupop", "id")


def test_new_key_replaces_the_old_one(
    server: ProvisionedServer, provision: Provision, connect: Callable[[str], object], tmp_path: Path
) -> None:
    """Whoever has the old one is locked out."""
    connect(done(server, provision("web")))
    say("web_backupop", "id")
    done(server, provision("web", "--keys", str(tmp_path / "new")))
    with pytest.raises(AccessRefused):
        say("web_backupop", "id")


def test_server_that_lets_in_some_users_only_lets_in_these_two(
    server: ProvisionedServer, provision: Provision, connect: Callable[[str], object]
) -> None:
    """`AllowUsers` and `AllowGroups` of the server stay as they are, for everybody else."""
    server.edit(MAIN, "UsePAM no", "UsePAM no\nAllowUsers root alice\nAllowGroups root")
    connect(done(server, provision("web", "--bind", "/srv/www:/backups")))
    assert read("web_backupop", b"/backups/alpha") == b"content of alpha\n"
    say("web_index", "id")
