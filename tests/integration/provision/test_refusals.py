"""What the printed script refuses, without leaving any change."""

from __future__ import annotations

import os
import re
import shutil

import pytest

from demo.provisioned import DEBIAN, WITHOUT_INCLUDE, ProvisionedServer
from demo.sshd import _namespaces_allowed
from tests.integration.provision.machine import (
    DROP_IN,
    KEYS,
    MAIN,
    Provision,
    done,
    give_cron,
    machine,
    refused,
    take_cron,
    tree,
)

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not _namespaces_allowed(), reason="only root has a machine to set up"
)


def test_match_block_that_decides_otherwise_is_named_and_nothing_stays_changed(
    server: ProvisionedServer, provision: Provision
) -> None:
    """The first Match block wins: `sshd -T` shows what really holds, before sshd is reloaded."""
    (server.root / "etc/ssh/sshd_config.d/00-ours.conf").write_text("Match Group *\n    PermitTTY yes\n")
    untouched = tree(server.root / "etc/ssh")
    result = server.run_script(provision("web"))
    assert result.returncode == 1
    because = 'sshd does not apply "PermitTTY no" to backupop from 127.0.0.1, but: permittty yes'
    assert because in result.stderr
    assert "previous configuration of sshd was restored" in result.stderr
    now = tree(server.root / "etc/ssh")
    assert {name: now.get(name) for name in untouched} == untouched
    assert not (server.root / DROP_IN.lstrip("/")).exists()
    assert server.sshd_answers()


def test_match_block_that_decides_otherwise_for_one_of_several_addresses_is_named(
    server: ProvisionedServer, provision: Provision
) -> None:
    """Each address that B may come from is tried; also when only some other address than A's own is met."""
    admins = server.root / "etc/ssh/sshd_config.d/05-admins.conf"
    admins.write_text("Match Address 10.0.0.0/8\n    ForceCommand none\n    PermitTTY yes\n")
    result = server.run_script(provision("web", "--from", "192.0.2.7", "--from", "10.1.2.3"))
    assert result.returncode == 1
    assert 'apply "ForceCommand internal-sftp' in result.stderr
    assert " to backupop from 10.1.2.3, but: forcecommand none" in result.stderr
    admins.write_text("Match Address *,!127.0.0.1\n    ForceCommand none\n")
    result = server.run_script(provision("web"))
    assert " to backupop from 192.0.2.1, but: forcecommand none" in result.stderr
    assert not (server.root / DROP_IN.lstrip("/")).exists()


@pytest.mark.parametrize("server", [DEBIAN, WITHOUT_INCLUDE], ids=["debian", "rhel8"], indirect=True)
def test_match_block_that_cannot_be_tried_is_told(server: ProvisionedServer, provision: Provision) -> None:
    """What it depends on is known only when B comes. Where the accounts are excluded, nothing is told."""
    main_file = server.root / MAIN.lstrip("/")
    plain = main_file.read_text()
    block = "Match %s\n    PermitTTY yes\nMatch all\n"
    told = "The restrictions are not verified for all connections. These earlier lines may override them"

    def told_of(match: str, *words: str) -> bool:
        if "Include" not in plain:
            main_file.write_text(plain + block % match)
        else:
            (server.root / "etc/ssh/sshd_config.d/05-ours.conf").write_text(block % match)
        output = done(server, provision("web", *words))
        done(server, provision("web", "--undo"))
        assert (told in output) == (f": Match {match}\n" in output)
        return told in output

    assert told_of("Address 10.0.0.0/8")
    assert told_of("Address 10.0.0.0/8", "--from", "192.0.2.0/24")
    assert not told_of("Address 10.0.0.0/8", "--from", "192.0.2.7", "--from", "2001:db8::7")
    assert told_of("LocalPort 2222", "--from", "192.0.2.7")
    assert told_of("User=alice host=*.example.org", "--from", "192.0.2.7")
    assert not told_of("Address 10.0.0.0/8 User *,!backupop,!mdbackup-index")
    assert told_of("Address 10.0.0.0/8 User *,!backupop")
    assert not told_of("User hosting")


@pytest.mark.parametrize(
    ("before", "after", "because"),
    [
        ("AcceptEnv *", "", ""),
        (
            "PermitRootLogin no",
            "Match all\n    AcceptEnv LD_PRELOAD LC_ALL\n",
            "LD_PRELOAD. Another Match block",
        ),
    ],
    ids=["server", "match"],
)
def test_variables_that_b_could_set_are_taken_from_it_or_named(
    server: ProvisionedServer, provision: Provision, before: str, after: str, because: str
) -> None:
    """`AcceptEnv` of our block takes the place of the server's own, but adds up with that of other blocks."""
    config = server.root / MAIN.lstrip("/")
    config.write_text(config.read_text().replace("AcceptEnv LANG LC_*", before) + after)
    result = server.run_script(provision("web"))
    assert (result.returncode, because in result.stderr) == (1 if because else 0, True)
    effective = server.run("sshd", "-T", "-C", "user=mdbackup-index,host=b,addr=192.0.2.7").stdout
    if not because:
        assert re.findall("^acceptenv .*$", effective, re.MULTILINE) == ["acceptenv LANG"]


def test_configuration_that_sshd_does_not_accept_is_taken_back(
    server: ProvisionedServer, provision: Provision
) -> None:
    """As that of an sshd which does not know one of the lines."""
    script = provision("web").replace("    PermitTunnel no\n", "    PermitTunnelling no\n", 1)
    result = server.run_script(script)
    assert result.returncode == 1
    assert "PermitTunnelling" in result.stderr
    assert not (server.root / DROP_IN.lstrip("/")).exists()
    assert server.run("sshd", "-t").returncode == 0


def test_broken_sshd_config_is_refused_before_anything_changes(
    server: ProvisionedServer, provision: Provision
) -> None:
    """Or the administrator could not tell who broke it."""
    (server.root / "etc/ssh/sshd_config.d/00-ours.conf").write_text("Nonsense yes\n")
    refused(server, provision("web"), "the current configuration of sshd is invalid")


def test_chroot_that_sshd_would_refuse_is_named_before_anything_changes(
    server: ProvisionedServer, provision: Provision
) -> None:
    """Each directory on the way to it, with the command that corrects it."""
    script = provision("web")
    home = server.root / "home"
    home.chmod(0o775)
    refused(
        server,
        script,
        "users other than root can write to /home, and sshd refuses such a chroot: chmod go-w /home",
    )
    home.chmod(0o755)
    (home / "backupop").mkdir()
    os.chown(home / "backupop", 1234, 1234)
    refused(server, script, "/home/backupop is not owned by root")
    os.chown(home / "backupop", 0, 0)
    (home / "backupop").chmod(0o755)
    done(server, script)


@pytest.mark.parametrize(
    ("useradd", "because"),
    [
        ("--shell /bin/bash backupop", "the account backupop exists and has the shell /bin/bash"),
        (
            "--shell /bin/bash mdbackup-index",
            "the account mdbackup-index exists and belongs to a regular user",
        ),
        ("--system --shell /bin/false mdbackup-index", "has no shell, so sshd cannot run the indexer"),
        ("--non-unique --uid 0 --shell /bin/false backupop", "has user id 0, like root"),
        ("--system --shell /bin/sh --password $y$x mdbackup-index", "usermod -p '*' mdbackup-index"),
        (
            "--system --shell /bin/false --password $y$x backupop",
            "the account backupop exists and has a pass",
        ),
        ("--system --shell /bin/sh --groups shadow mdbackup-index", "gpasswd -d mdbackup-index shadow"),
    ],
)
def test_account_of_somebody_is_not_taken(
    server: ProvisionedServer, provision: Provision, useradd: str, because: str
) -> None:
    """The restrictions would lock its owner out, or be of no use."""
    assert server.run("useradd", "--no-create-home", *useradd.split()).returncode == 0
    refused(server, provision("web"), because)


def test_account_that_was_made_by_hand_is_taken_and_left_by_undo(
    server: ProvisionedServer, provision: Provision
) -> None:
    """As the original scheme makes it: with the shell /bin/false."""
    server.run("useradd", "--no-create-home", "--shell", "/bin/false", "backupop")
    untouched = machine(server)
    done(server, provision("web"))
    done(server, provision("web", "--undo"))
    assert machine(server) == untouched


@pytest.mark.parametrize(
    ("prepare", "because"),
    [
        ("rm -r /srv/www", "/srv/www, which is to be mounted on /home/backupop/backups, is not a directory"),
        ("mkdir -p /home/backupop/backups/x", "is not empty, and the mount would hide its content"),
        ("mkdir -p /home/backupop; touch /home/backupop/backups", "is to be mounted, is not a directory"),
        (
            "mkdir -p /home/backupop; ln -s /srv /home/backupop/backups",
            "is a symbolic link, so /srv/www would",
        ),
        ("mkdir /home/real; ln -s real /home/backupop", "specify the chroot by its real path, /home/real"),
        (
            "mkdir -p /home/backupop/backups; mount --bind /srv /home/backupop/backups",
            "not by this script: umount /home/backupop/backups",
        ),
        (
            "mkdir -p /home/backupop/.mdbackup; chown daemon /home/backupop/.mdbackup",
            "/home/backupop/.mdbackup, which is to hold the index, is owned by daemon",
        ),
        (
            "mkdir -p /home/backupop; ln -s /srv/www /home/backupop/.mdbackup",
            "/home/backupop/.mdbackup is a symbolic link, and the owner of its target would be changed",
        ),
        ("ln -s /srv /etc/mdbackup", "/etc/mdbackup is a symbolic link"),
        ("echo DenyUsers alice 'back*' >>/etc/ssh/sshd_config", '"denyusers back*" in its configuration'),
        (
            "echo DenyGroups 'mdbackup-inde?' >>/etc/ssh/sshd_config",
            'denies mdbackup-index every login, because of "denyg',
        ),
        ("rm -r /etc/ssh/*.pub", "no host key with a readable public key"),
        ("sed -i /^Subsystem/d /etc/ssh/sshd_config", "has no subsystem sftp"),
    ],
)
def test_what_is_missing_is_named_before_anything_changes(
    server: ProvisionedServer, provision: Provision, prepare: str, because: str
) -> None:
    """With what to do."""
    server.run("sh", "-c", prepare)
    refused(server, provision("web", "--bind", "/srv/www:/backups"), because)
    server.run("umount", "/home/backupop/backups")


@pytest.mark.parametrize(
    ("prepare", "because"),
    [
        (
            "touch /etc/ssh/sshd_config.d/10-mdbackup-web.conf",
            "10-mdbackup-web.conf exists, but was not created by this script",
        ),
        (
            "printf 'Match User backupop\\n    PermitTTY no\\n' >>/etc/ssh/sshd_config",
            '/etc/ssh/sshd_config has a block "Match User backupop" that was not created by this script',
        ),
        (
            "echo '/srv/www /home/backupop/backups/ none bind,ro 0 0' >>/etc/fstab",
            "/etc/fstab has an entry for /home/backupop/backups that was not created by this script",
        ),
    ],
    ids=["drop-in", "block", "fstab"],
)
def test_set_up_by_hand_is_not_overwritten(
    server: ProvisionedServer, provision: Provision, prepare: str, because: str
) -> None:
    """Nor doubled: the two ways know nothing of each other."""
    server.run("sh", "-c", prepare)
    refused(server, provision("web", "--bind", "/srv/www:/backups"), because)


def test_set_up_by_hand_is_not_undone_by_the_script(server: ProvisionedServer, provision: Provision) -> None:
    """Of which it would take down half, and leave the rest."""
    for place in (DROP_IN, f"{KEYS}/backupop", "/etc/mdbackup/web.json", "/etc/cron.d/mdbackup-web"):
        file = server.root / place[1:]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        refused(server, provision("web", "--undo"), "was not set up by `mdbackup provision`")
        if place.startswith(KEYS):
            shutil.rmtree(file.parent)
        else:
            file.unlink()


def test_cron_job_is_refused_where_nothing_would_start_it(
    server: ProvisionedServer, provision: Provision
) -> None:
    """Though there is an /etc/cron.d, which other packages make, too."""
    take_cron(server)
    refused(server, provision("self", "--cron", "@daily"), "this server has no cron: install it, or")
    give_cron(server)
    done(server, provision("self", "--cron", "@daily"))


def test_damaged_program_is_not_installed(server: ProvisionedServer, provision: Provision) -> None:
    """One changed letter in the indexer, and its checksum is another."""
    script = provision("web")
    at = script.index("Build the provider index:")
    result = server.run_script(script[:at] + "b" + script[at + 1 :])
    assert result.returncode == 1
    assert "/usr/local/lib/mdbackup/indexer.py was damaged in transfer" in result.stderr
    assert not (server.root / "usr/local/lib/mdbackup/indexer.py").exists()


def test_another_user_than_root_is_told_so(server: ProvisionedServer, provision: Provision) -> None:
    """And nothing is tried."""
    file = server.root / "srv/script.sh"
    file.write_text(provision("web"))
    result = server.run("runuser", "-u", "nobody", "--", "sh", "/srv/script.sh")
    assert (result.returncode, result.stdout) == (1, "")
    assert "run it as root" in result.stderr
