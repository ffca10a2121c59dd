"""Several set-ups on one server."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from demo.provisioned import DEBIAN, WITHOUT_INCLUDE, ProvisionedServer
from demo.sshd import _namespaces_allowed
from tests.integration.provision.machine import Provision, done, give_cron, machine, read, refused

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not _namespaces_allowed(), reason="only root has a machine to set up"
)


def test_two_set_ups_on_one_server_do_not_disturb_each_other(
    server: ProvisionedServer, provision: Provision, connect: Callable[[str], object]
) -> None:
    """They want accounts and a chroot of their own; what they share stays until the last one goes."""
    untouched = machine(server)
    web = provision("web", "--bind", "/srv/www:/backups", "--sftpi")
    connect(done(server, web))
    refused(server, provision("self", "--sftpi"), "the account backupop belongs to another setup")
    for chroot in ("/home/backupop", "/home/backupop/more", "/home"):
        theirs = provision("self", "--backupop", "backupop2", "--chroot", chroot)
        refused(server, theirs, ": choose another one")
    own = ("self", "--backupop", "backupop2", "--bind", "/srv/www:/backups", "--sftpi", "--cron", "@daily")
    give_cron(server)
    connect(done(server, provision(*own)))
    assert "Nothing to change" in done(server, web)
    for connection_id in ("web_backupop", "self_backupop"):
        assert read(connection_id, b"/backups/alpha") == b"content of alpha\n"
    done(server, provision("web", "--undo"))
    assert read("self_backupop", b"/backups/alpha") == b"content of alpha\n"
    done(server, provision("self", "--undo"))
    assert machine(server) == untouched


def test_consumers_that_call_the_provider_the_same_choose_other_names_on_a(
    server: ProvisionedServer, provision: Provision
) -> None:
    """By `--as`."""
    done(server, provision("web"))
    own = ("--backupop", "backupop2", "--index-account", "mdbackup-index2")
    refused(server, provision("web", "--as", "web2", *own), "backupop is, or is inside, that")
    done(server, provision("self", "--as", "web2", "--chroot", "/home/backupop2", *own))
    assert {path.name for path in (server.root / "etc/mdbackup").iterdir()} == {
        "web.json", "web.made", "web2.json", "web2.made",
    }  # fmt: skip


@pytest.mark.parametrize("server", [WITHOUT_INCLUDE], ids=["rhel8"], indirect=True)
def test_set_up_that_is_called_like_the_subsystem_keeps_its_restrictions(
    server: ProvisionedServer, provision: Provision
) -> None:
    """Both are marked blocks of the same file."""
    script = provision("web", "--as", "sftpi", "--sftpi")
    done(server, script)
    assert "Nothing to change" in done(server, script)
    effective = server.run("sshd", "-T", "-C", "user=backupop,host=b,addr=192.0.2.7").stdout
    assert "subsystem sftpi internal-sftp\n" in effective
    done(server, provision("web", "--as", "sftpi"))
    own = ("--backupop", "backupop2", "--sftpi")
    done(server, provision("self", *own))
    done(server, provision("self", "--undo"))
    effective = server.run("sshd", "-T", "-C", "user=backupop,host=b,addr=192.0.2.7").stdout
    assert "forcecommand internal-sftp -R" in effective
    assert "subsystem sftpi" not in effective


@pytest.mark.parametrize("server", [DEBIAN + "Subsystem sftpi internal-sftp\n"], ids=["sftpi"], indirect=True)
def test_subsystem_that_is_there_already_is_used_and_left(
    server: ProvisionedServer, provision: Provision, connect: Callable[[str], object]
) -> None:
    """As the original scheme has it."""
    untouched = machine(server)
    script = provision("web", "--bind", "/srv/www:/backups", "--sftpi")
    connect(done(server, script))
    assert read("web_backupop", b"/backups/alpha") == b"content of alpha\n"
    assert "Nothing to change" in done(server, script)
    done(server, provision("web", "--undo"))
    assert machine(server) == untouched
