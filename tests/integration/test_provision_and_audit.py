"""What the provision script makes is what the audit calls tight; and what is loosened there is caught.

The script restricts each account twice, in sshd_config and on its key, so that one setting alone opens
nothing. Here the second lock is taken away first, and then one setting after the other is loosened.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator

import pytest

from airflow_mdbackup.cli.main import main
from airflow_mdbackup.hooks.provider import IndexHook
from airflow_mdbackup.provider_side.request import IndexRequest
from demo.provisioned import ProvisionedServer, connections
from demo.sshd import _namespaces_allowed

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not _namespaces_allowed(), reason="only root has a machine to set up"
)

DROP_IN = "/etc/ssh/sshd_config.d/10-mdbackup-web.conf"
KEYS = "/etc/ssh/mdbackup/web"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProvisionedServer]:
    """A machine on which the script ran, and the Airflow connections that it printed."""
    folder = tmp_path_factory.mktemp("provisioned")
    (folder / "providers.yaml").write_text(
        "providers:\n  web: {sftp_conn_id: web_backupop, ssh_conn_id: web_index, chroot: /home/backupop,\n"
        f"    source: /backups, dest: {folder}/dest}}\n"
    )
    with pytest.MonkeyPatch.context() as patched, ProvisionedServer(folder / "server") as server:
        patched.setenv("AIRFLOW__MDBACKUP__PROVIDERS_FILE", str(folder / "providers.yaml"))
        (server.root / "srv/www").mkdir()
        (server.root / "srv/www/alpha").write_text("content of alpha\n")
        server.start_sshd()
        script = folder / "script.sh"
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert main(["provision", "web", "--bind", "/srv/www:/backups", "--host", "127.0.0.1"]) == 0
        script.write_text(printed.getvalue())
        ran = server.run_script(script.read_text())
        assert (ran.returncode, ran.stderr) == (0, "")
        for name, connection in connections(ran.stdout).items():
            patched.setenv(f"AIRFLOW_CONN_{name.upper()}", json.dumps(connection))
        yield server


def audit(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, set[str]]]:
    """Return the exit status of an audit, and the checks with each verdict."""
    capsys.readouterr()
    status = main(["audit", "web", "--format", "json"])
    found: dict[str, set[str]] = {"tight": set(), "looser": set(), "unknown": set()}
    for finding in json.loads(capsys.readouterr().out)["findings"]:
        found[finding["verdict"]].add(f"{finding['account'].split()[0]}: {finding['check']}")
    return status, found


def test_provisioned_accounts_are_all_tight_before_and_after_an_index_exists(
    machine: ProvisionedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """The audit itself starts no build; the index account's forced command does, whatever it is asked for."""
    status, found = audit(capsys)
    assert (status, len(found["tight"]), found["looser"], found["unknown"]) == (0, 42, set(), set())
    index = machine.root / "home/backupop/.mdbackup/index.md5"
    assert not index.exists()
    with IndexHook("web_index") as hook:
        done = hook.build_index(IndexRequest(b"/", (b"/etc",), b"/tmp/index.md5", id="1"))
    assert (done.files, done.unreadable) == (1, 0)
    assert b"/backups/alpha" in index.read_bytes()
    assert audit(capsys)[0] == 0


@pytest.mark.parametrize(
    ("old", "new", "caught"),
    [
        ("PermitTTY no", "PermitTTY yes", {"backup: no PTY"}),
        (
            "AllowTcpForwarding no",
            "AllowTcpForwarding yes",
            {"backup: no local forwarding", "backup: no dynamic forwarding", "backup: no remote forwarding"},
        ),
        ("internal-sftp -R -p", "internal-sftp -p", {"backup: no write", "backup: no create"}),
        (
            " -p open,close,read,fstat,stat,lstat,realpath,limits",
            "",
            {"backup: no listing", "backup: no other requests"},
        ),
        ("PasswordAuthentication no", "PasswordAuthentication yes", {"backup: keys only"}),
    ],
    ids=["PermitTTY", "AllowTcpForwarding", "no -R", "no -p", "PasswordAuthentication"],
)
def test_setting_loosened_in_the_drop_in_is_caught(
    machine: ProvisionedServer, capsys: pytest.CaptureFixture[str], old: str, new: str, caught: set[str]
) -> None:
    drop_in, key = machine.root / DROP_IN[1:], machine.root / f"{KEYS}/backupop".lstrip("/")
    before = drop_in.read_text(), key.read_text()
    try:
        key.write_text(key.read_text().replace("restrict ", "").replace("restrict,", ""))
        machine.edit(DROP_IN, "DisableForwarding yes", "DisableForwarding no", login="backupop")
        if old.startswith("Password"):
            machine.edit(
                DROP_IN, "AuthenticationMethods publickey", "AuthenticationMethods any", login="backupop"
            )
        machine.edit(DROP_IN, old, new, login="backupop")
        status, found = audit(capsys)
        assert status == 1 and found["looser"] == caught
    finally:
        drop_in.write_text(before[0])
        key.write_text(before[1])
        machine.stop_sshd()
        machine.start_sshd()


@pytest.mark.parametrize(
    ("options", "caught"),
    [
        ("restrict", {"only its forced command", "arguments ignored", "no shell"}),
        ("restrict,command,pty", {"no PTY"}),
        ("restrict,command,port-forwarding",
         {"no local forwarding", "no dynamic forwarding", "no remote forwarding"}),
    ],
    ids=["no forced command", "PTY", "port forwarding"],
)  # fmt: skip
def test_index_account_that_is_loosened_is_caught(
    machine: ProvisionedServer, capsys: pytest.CaptureFixture[str], options: str, caught: set[str]
) -> None:
    drop_in, key = machine.root / DROP_IN[1:], machine.root / f"{KEYS}/mdbackup-index".lstrip("/")
    before = drop_in.read_text(), key.read_text()
    try:
        lock, public = before[1].rstrip("\n").split(" ssh-ed25519 ")
        command = lock.removeprefix("restrict,")
        key.write_text(f"{options.replace('command', command)} ssh-ed25519 {public}\n")
        machine.edit(DROP_IN, "DisableForwarding yes", "DisableForwarding no", login="mdbackup-index")
        text = (machine.root / DROP_IN[1:]).read_text()
        head, mark, block = text.partition("Match User mdbackup-index\n")
        lines = [line for line in block.splitlines() if not line.strip().startswith("ForceCommand")]
        for name in ("PermitTTY", "AllowTcpForwarding"):
            lines = [line.replace(f"{name} no", f"{name} yes") for line in lines]
        (machine.root / DROP_IN[1:]).write_text(head + mark + "\n".join(lines) + "\n")
        machine.stop_sshd()
        machine.start_sshd()
        status, found = audit(capsys)
        assert status == 1 and {f"index: {check}" for check in caught} <= found["looser"], found
        assert all(check.startswith("index: ") for check in found["looser"])
    finally:
        drop_in.write_text(before[0])
        key.write_text(before[1])
        machine.stop_sshd()
        machine.start_sshd()
