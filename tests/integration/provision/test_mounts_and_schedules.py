"""Mounts, the indexer and its schedules, as the printed script makes and undoes them."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable

import pytest

from airflow_mdbackup.cli.main import main
from airflow_mdbackup.hooks.provider import IndexHook
from airflow_mdbackup.scheme.errors import AccessRefused
from demo.provisioned import WITHOUT_INCLUDE, ProvisionedServer, connections
from demo.sshd import _namespaces_allowed
from tests.integration.provision.machine import (
    DROP_IN,
    MAIN,
    Provision,
    done,
    give_cron,
    machine,
    refused,
    say,
)

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not _namespaces_allowed(), reason="only root has a machine to set up"
)


def test_mounts_are_read_only_and_follow_the_options(server: ProvisionedServer, provision: Provision) -> None:
    """Not even root writes through them; one that is not asked for any more goes; data stays where it is."""
    done(server, provision("web", "--bind", "/srv/www:/backups/www", "--bind", "/etc:/backups/etc"))
    assert server.run("touch", "/home/backupop/backups/www/new").returncode == 1
    fstab = (server.root / "etc/fstab").read_text()
    assert "\n/srv/www /home/backupop/backups/www none bind,ro,nosuid,nodev,noexec,nofail 0 0\n" in fstab
    done(server, provision("web", "--bind", "/srv/www:/backups/www"))
    assert os.listdir(server.root / "home/backupop/backups/etc") == []
    # After a reboot it is fstab that mounts them.
    assert server.run("umount", "/home/backupop/backups/www").returncode == 0
    assert server.run("mount", "-a").returncode == 0
    assert os.listdir(server.root / "home/backupop/backups/www") == ["alpha"]
    assert server.run("touch", "/home/backupop/backups/www/new").returncode == 1


def test_another_source_takes_the_place_of_the_one_that_was_mounted(
    server: ProvisionedServer, provision: Provision
) -> None:
    """Also if it has the same name, and is a directory that was made anew."""
    seen = server.root / "home/backupop/backups"
    server.run("mkdir", "/srv/other")
    done(server, provision("web", "--bind", "/srv/www:/backups"))
    done(server, provision("web", "--bind", "/srv/other:/backups"))
    assert os.listdir(seen) == []
    server.run("sh", "-c", "mv /srv/other /srv/old; mkdir /srv/other; touch /srv/other/beta")
    script = provision("web", "--bind", "/srv/other:/backups")
    done(server, script)
    assert os.listdir(seen) == ["beta"]
    assert "Nothing to change" in done(server, script)


def test_index_directory_is_readable_and_of_who_builds_the_index(
    server: ProvisionedServer, provision: Provision
) -> None:
    """However it was before; the files of the indexer go with it."""
    directory = server.root / "home/backupop/.mdbackup"
    directory.mkdir(parents=True, mode=0o700)
    for name in ("index.md5", ".index.md5.cache", "another"):
        (directory / name).touch()
    done(server, provision("web"))
    owner = directory.stat().st_uid
    assert (directory.stat().st_mode & 0o777, owner != 0) == (0o755, True)
    assert (directory / ".index.md5.cache").stat().st_uid == owner
    assert (directory / "another").stat().st_uid == 0


def test_undo_removes_no_data(server: ProvisionedServer, provision: Provision) -> None:
    """What somebody put into the chroot stays, beside the index too, and it says so."""
    done(server, provision("web"))
    for name in ("backups/kept", ".mdbackup/index.md5.kept", ".mdbackup/index.md5"):
        (server.root / "home/backupop" / name).parent.mkdir(exist_ok=True)
        (server.root / "home/backupop" / name).write_text("data")
    output = done(server, provision("web", "--undo"))
    assert "/home/backupop is not empty, so it is kept" in output
    assert (server.root / "home/backupop/backups/kept").read_text() == "data"
    assert os.listdir(server.root / "home/backupop/.mdbackup") == ["index.md5.kept"]


@pytest.mark.parametrize("python", [True, False], ids=["python", "sh"])
def test_undo_removes_the_index_and_what_the_indexer_keeps_beside_it(
    server: ProvisionedServer, provision: Provision, python: bool
) -> None:
    """Nothing is left that would belong to nobody; also what a build leaves that was killed."""
    if not python:
        server.run(
            "mount", "--bind", "/dev/null", server.run("readlink", "-f", "/usr/bin/python3").stdout.strip()
        )
    untouched = machine(server)
    done(server, provision("web", "--bind", "/srv/www:/backups"))
    script = "index-web.sh" if not python else "indexer.py"
    words = f"/bin/sh /usr/local/lib/mdbackup/{script} --no-request"
    if python:
        words = f"/usr/bin/python3 -I /usr/local/lib/mdbackup/{script} --config /etc/mdbackup/web.json"
    assert server.run("runuser", "-u", "mdbackup-index", "--", *words.split()).returncode == 0
    directory = server.root / "home/backupop/.mdbackup"
    (directory / ".index.md5.7.1.tmp").touch()
    (directory / ".index.md5.lock.d").mkdir()
    (directory / ".index.md5.lock.d/holder").touch()
    (directory / ".index.md5.link").symlink_to("/srv/www/alpha")
    assert (directory / "index.md5").exists()
    assert "so it is kept" not in done(server, provision("web", "--undo"))
    assert machine(server) == untouched


def test_undo_leaves_an_index_in_a_directory_of_somebody(
    server: ProvisionedServer, provision: Provision
) -> None:
    """Only what the script made is for it to empty."""
    (server.root / "home/backupop/.mdbackup").mkdir(parents=True)
    (server.root / "home/backupop/.mdbackup/index.md5").write_text("data")
    done(server, provision("web"))
    done(server, provision("web", "--undo"))
    assert (server.root / "home/backupop/.mdbackup/index.md5").read_text() == "data"


def test_server_without_python_gets_the_indexer_of_the_shell(
    server: ProvisionedServer, provision: Provision
) -> None:
    """Python 3.6 is looked for by trying."""
    python = server.run("readlink", "-f", "/usr/bin/python3").stdout.strip()
    server.run("mount", "--bind", "/dev/null", python)
    output = done(server, provision("web", "--bind", "/srv/www:/backups"))
    assert "no Python 3.6 or newer was found" in output
    forced = "ForceCommand /bin/sh /usr/local/lib/mdbackup/index-web.sh\n"
    assert forced in (server.root / DROP_IN.lstrip("/")).read_text()
    assert os.listdir(server.root / "usr/local/lib/mdbackup") == ["index-web.sh"]


def test_indexer_of_the_shell_is_run_by_the_account_and_by_cron(
    server: ProvisionedServer, provision: Provision, connect: Callable[[str], object]
) -> None:
    """As the one in Python: what it is asked for does not matter."""
    python = server.run("readlink", "-f", "/usr/bin/python3").stdout.strip()
    server.run("mount", "--bind", "/dev/null", python)
    give_cron(server)
    index = server.root / "home/backupop/.mdbackup/index.md5"
    connect(done(server, provision("web", "--bind", "/srv/www:/backups", "--cron", "@daily")))
    with IndexHook("web_index") as hook:
        standard_input, output, _ = hook.get_conn().exec_command("id")
        assert output.readline() == "mdbackup ready request\n"
        standard_input.write('{"id": null}\n')
        standard_input.flush()
        assert "mdbackup done files=1 " in output.read().decode()
    index.unlink()
    job = (server.root / "etc/cron.d/mdbackup-web").read_text().splitlines()[-1]
    command = job.removeprefix("@daily mdbackup-index ")
    built = server.run("runuser", "-u", "mdbackup-index", "--", "sh", "-c", command)
    assert (built.stdout, built.stderr, index.exists()) == ("", "", True)


def test_configuration_of_the_indexer_is_that_of_the_provider(
    server: ProvisionedServer, provision: Provision
) -> None:
    """Patterns with blanks and quotes come through the shell as they are; only root can change the file."""
    options = ("--indexer", "jobs=2", "--indexer", "rehash=2.5%", "--indexer", "one_file_system=true")
    done(server, provision("self", *options))
    file = server.root / "etc/mdbackup/self.json"
    assert json.loads(file.read_text()) == {
        "chroot": "/home/backupop",
        "source": ["/backups"],
        "index": "/.mdbackup/index.md5",
        "exclude": ["it's *.tmp"],
        "nice": 10,
        "jobs": 2,
        "rehash": 2.5,
        "one_file_system": True,
    }
    assert (oct(file.stat().st_mode), file.stat().st_uid) == ("0o100644", 0)


def test_units_are_sound_and_start_at_boot(server: ProvisionedServer, provision: Provision) -> None:
    """Timer and path unit start the same service, which may read everything and write the index only."""
    output = done(server, provision("self", "--bind", "/srv/www:/backups", "--path-unit"))
    assert "systemd is not running: the next boot starts" in output
    units = server.root / "etc/systemd/system"
    found = {}
    for kind in ("service", "timer", "path"):
        found[kind] = configparser.ConfigParser(interpolation=None, strict=True)
        found[kind].optionxform = str  # type: ignore[assignment,method-assign]
        found[kind].read_string((units / f"mdbackup-index-self.{kind}").read_text())
    assert found["service"]["Service"]["User"] == "root"
    assert found["service"]["Service"]["CapabilityBoundingSet"] == "CAP_DAC_READ_SEARCH"
    assert found["service"]["Service"]["ReadWritePaths"] == "/home/backupop/.mdbackup"
    assert found["timer"]["Timer"]["OnCalendar"] == "hourly"
    assert found["service"]["Unit"]["RequiresMountsFor"] == "/home/backupop /home/backupop/backups"
    assert found["path"]["Path"]["PathChanged"] == "/home/backupop/backups"
    assert (units / "timers.target.wants/mdbackup-index-self.timer").is_symlink()
    assert (units / "multi-user.target.wants/mdbackup-index-self.path").is_symlink()
    if shutil.which("systemd-analyze"):
        for kind in found:
            unit = f"/etc/systemd/system/mdbackup-index-self.{kind}"
            judged = server.run("systemd-analyze", "verify", "--man=no", unit)
            assert "mdbackup" not in judged.stderr, judged.stderr
            assert judged.returncode == 0
    # Another choice takes the place of the first.
    done(server, provision("self", "--bind", "/srv/www:/backups", "--timer", "*:0/15"))
    assert not (units / "mdbackup-index-self.path").exists()
    assert "OnCalendar=*:0/15\n" in (units / "mdbackup-index-self.timer").read_text()
    refused(server, provision("self", "--timer", "someday"), "systemd rejects the calendar expression")


def test_service_and_cron_job_build_the_index(server: ProvisionedServer, provision: Provision) -> None:
    """Each by the very command that is written there; cron is silent while all is well."""
    index = server.root / "home/backupop/.mdbackup/index.md5"
    done(server, provision("self", "--bind", "/srv/www:/backups"))
    service = (server.root / "etc/systemd/system/mdbackup-index-self.service").read_text()
    built = server.run(*re.findall("^ExecStart=(.*)$", service, re.MULTILINE)[0].split())
    assert (built.returncode, index.exists()) == (0, True)
    index.unlink()
    give_cron(server)
    output = done(server, provision("self", "--bind", "/srv/www:/backups", "--cron", "30 2 * * *"))
    first = re.findall("^To build the first index: (.*)$", output, re.MULTILINE)[0]
    assert (server.run("sh", "-c", first).returncode, index.exists()) == (0, True)
    index.unlink()
    assert not (server.root / "etc/systemd/system/mdbackup-index-self.service").exists()
    job = (server.root / "etc/cron.d/mdbackup-self").read_text().splitlines()[-1]
    assert job.startswith("30 2 * * * root ")
    command = job.removeprefix("30 2 * * * root ")
    built = server.run("sh", "-c", command)
    assert (built.stdout, built.stderr, index.exists()) == ("", "", True)
    (server.root / "etc/mdbackup/self.json").write_text("damaged")
    assert "mdbackup error" in server.run("sh", "-c", command).stdout


@pytest.mark.parametrize("service", ["ssh", "sshd"])
def test_running_systemd_reloads_the_server_under_the_name_it_has(
    server: ProvisionedServer, provision: Provision, service: str
) -> None:
    """Debian calls it ssh, RHEL sshd; and a running systemd is told of new units and mounts."""
    stand_in = server.root / "srv/systemctl"
    stand_in.write_text(
        '#!/bin/sh\necho "$*" >>/srv/asked\n'
        f'case "$*" in "is-active --quiet {service}.service") exit 0 ;; is-*) exit 3 ;; esac\n'
    )
    stand_in.chmod(0o755)
    server.run("mount", "--bind", "/srv/systemctl", shutil.which("systemctl") or "/usr/bin/systemctl")
    server.run("mkdir", "-p", "/run/systemd/system")
    output = done(server, provision("self", "--bind", "/srv/www:/backups"))
    asked = (server.root / "srv/asked").read_text().splitlines()
    assert f"sshd was reloaded ({service}.service)" in output
    assert [line for line in asked if not line.startswith("is-")] == [
        "daemon-reload",
        f"reload {service}.service",
        "daemon-reload",
        "enable --quiet --now mdbackup-index-self.timer",
    ]


def test_reload_that_failed_is_tried_again(server: ProvisionedServer, provision: Provision) -> None:
    """Although there is nothing left to change."""
    stand_in = server.root / "srv/systemctl"
    stand_in.write_text(
        '#!/bin/sh\ncase "$*" in reload*) exec rm /srv/allowed ;; is-enabled*) exit 1 ;; esac\n'
    )
    stand_in.chmod(0o755)
    server.run("mount", "--bind", "/srv/systemctl", shutil.which("systemctl") or "/usr/bin/systemctl")
    server.run("mkdir", "-p", "/run/systemd/system")
    result = server.run_script(provision("web"))
    assert (result.returncode, "sshd could not be reloaded" in result.stderr) == (1, True)
    (server.root / "srv/allowed").touch()
    assert "sshd was reloaded" in done(server, provision("web"))
    assert "sshd was reloaded" not in done(server, provision("web"))


def test_run_that_was_killed_is_made_up_for_by_the_next(
    server: ProvisionedServer, provision: Provision
) -> None:
    """sshd has still to read what the killed one wrote, although nothing is left to change."""
    script = provision("web")
    killed = script.replace('    verify_restrictions "$backupop"\n', "    kill -KILL $$\n", 1)
    assert killed != script
    assert server.run_script(killed).returncode != 0
    assert (server.root / DROP_IN.lstrip("/")).exists()
    assert "sshd was sent SIGHUP" in done(server, script)
    assert "sshd was sent SIGHUP" not in done(server, script)
    assert not (server.root / "run/mdbackup-web.reload").exists()


def test_undo_leaves_an_account_that_somebody_made_after_the_script_could_not(
    server: ProvisionedServer, provision: Provision
) -> None:
    """What the script made is noted when it is made."""
    script = provision("web")
    failing = script.replace("    useradd --system", "    false --system")
    assert server.run_script(failing).returncode == 1
    by_hand = ("useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", "backupop")
    assert server.run(*by_hand).returncode == 0
    done(server, script)
    done(server, provision("web", "--undo"))
    assert server.run("getent", "passwd", "backupop").returncode == 0
    assert server.run("getent", "passwd", "mdbackup-index").returncode == 2


@pytest.mark.parametrize("server", [WITHOUT_INCLUDE], ids=["rhel8"], indirect=True)
def test_configuration_that_is_a_symbolic_link_stays_one(
    server: ProvisionedServer, provision: Provision
) -> None:
    """As where the files of /etc are kept elsewhere."""
    server.run("sh", "-c", "mv /etc/ssh/sshd_config /srv/ours; ln -s /srv/ours /etc/ssh/sshd_config")
    untouched = machine(server)
    done(server, provision("web"))
    assert os.readlink(server.root / MAIN.lstrip("/")) == "/srv/ours"
    assert "Match User backupop\n" in (server.root / "srv/ours").read_text()
    done(server, provision("web", "--undo"))
    assert machine(server) == untouched


def test_directories_that_were_there_already_become_root_s_alone(
    server: ProvisionedServer, provision: Provision
) -> None:
    """Who could rename files in them could put another program in the indexer's place."""
    places = ["etc/mdbackup", "etc/ssh/mdbackup", "etc/ssh/mdbackup/web", "usr/local/lib/mdbackup"]
    for number, place in enumerate(places):
        (server.root / place).mkdir()
        (server.root / place).chmod(0o777 if number % 2 else 0o700)
        os.chown(server.root / place, 1234, 1234)
    script = provision("web")
    done(server, script)
    for place in places:
        about = (server.root / place).stat()
        assert (about.st_uid, about.st_mode & 0o777) == (0, 0o755), place
    assert "Nothing to change" in done(server, script)


def test_account_that_gets_another_name_leaves_no_key_behind(
    server: ProvisionedServer, provision: Provision, connect: Callable[[str], object]
) -> None:
    """The old account is let in no more, and undo removes both."""
    untouched = machine(server)
    connect(done(server, provision("web")))
    done(server, provision("web", "--backupop", "reader"))
    with pytest.raises(AccessRefused):
        say("web_backupop", "id")
    assert sorted(os.listdir(server.root / "etc/ssh/mdbackup/web")) == ["mdbackup-index", "reader"]
    done(server, provision("web", "--undo"))
    assert machine(server) == untouched


def test_lines_to_paste_pin_the_host_key_and_name_the_server(
    server: ProvisionedServer, provision: Provision, capsys: pytest.CaptureFixture[str]
) -> None:
    """The key is the server's own; without `--host` and `--port` the script fills in what A calls itself."""
    output = done(server, provision("web", "--sftpi", "--host", "a.example.org", host="b.example.org"))
    key = (server.root / "etc/ssh/ssh_host_ed25519_key.pub").read_text().split()[:2]
    for connection in connections(output).values():
        assert connection["extra"]["host_key"] == " ".join(key)
        assert (connection["host"], connection["port"]) == ("b.example.org", server.port)
    assert connections(output)["web_backupop"]["extra"]["subsystem"] == "sftpi"
    assert main(["provision", "web"]) == 0
    output = done(server, capsys.readouterr().out)
    name = subprocess.run(["hostname", "-f"], capture_output=True, text=True).stdout.strip()
    assert connections(output)["web_index"]["host"] == name
    assert f"B must reach this server as {name}" in output
