"""What is made of an Airflow connection before anything is sent. Whether it works: `test_connections`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asyncssh
import pytest

from airflow_mdbackup.hooks.connection import HostKeys, SshAccount, account_of
from airflow_mdbackup.scheme.errors import AccessRefused

KEY = asyncssh.generate_private_key("ssh-ed25519")
HOST, OTHER, AUTHORITY = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(3))


def public(key: asyncssh.SSHKey) -> str:
    return key.export_public_key().decode().strip()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own."""
    (tmp_path / ".ssh").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def account(extra: dict[str, Any] | None = None, /, **fields: Any) -> SshAccount:
    """Return the account of a connection that works, but for what is given."""
    usual = {"private_key": KEY.export_private_key().decode(), "host_key": public(HOST)}
    both = {name: value for name, value in (usual | (extra or {})).items() if value is not None}
    usual_fields = {"host": "web.example.org", "port": 2222, "login": "backupop", "password": None}
    return account_of("web", SimpleNamespace(**usual_fields | {"extra": json.dumps(both)} | fields))


def known(home: Path, *lines: str | bytes) -> HostKeys:
    """Return what known_hosts makes of the server's keys."""
    raw = [line if isinstance(line, bytes) else line.encode() for line in lines]
    (home / ".ssh" / "known_hosts").write_bytes(b"\n".join(raw) + b"\n")
    return account({"host_key": None}).host_keys


def test_all_that_is_said_stands_in_the_account() -> None:
    found = account({"compress": "True", "subsystem": "sftpi", "ciphers": ["aes256-ctr"]})
    assert (found.host, found.address, found.port, found.user) == (*["web.example.org"] * 2, 2222, "backupop")
    assert found.key == KEY and found.password is None and found.certificate is None
    assert found.compress and found.pinned and found.subsystem == "sftpi"
    assert found.algorithms == {"encryption_algs": ["aes256-ctr"]}
    assert found.where == "backupop@web.example.org:2222 (connection web)"


def test_the_port_is_22_if_nobody_says_another_one() -> None:
    assert account(port=None).port == 22


def test_config_says_what_the_connection_leaves_open(home: Path) -> None:
    """And nothing else."""
    config = (
        "Host web.example.org\n  HostName 192.0.2.1\n  Port 4444\n  User somebody\n  ProxyCommand nc %h %p\n"
    )
    (home / ".ssh" / "config").write_text(config)
    found = account(port=None)
    assert (found.host, found.address, found.port) == ("web.example.org", "192.0.2.1", 4444)
    assert found.user == "backupop" and account().port == 2222
    assert found.options.proxy_command[-1].endswith("exec nc 192.0.2.1 4444")
    assert "through the ProxyCommand of ~/.ssh/config" in found.where


def test_a_mistake_in_config_is_told_with_its_line(home: Path) -> None:
    (home / ".ssh" / "config").write_text("Host *\n  Compression perhaps\n")
    with pytest.raises(AccessRefused, match=r"\.ssh/config.* line 2"):
        account()


# --- extras -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("key_file", "private_key", "private_key_passphrase", "host_key", "known_hosts"),
        *("subsystem", "ciphers", "disabled_algorithms", "conn_timeout"),
    ],
)
@pytest.mark.parametrize("value", [[1], {"x": 1}, {"macs": "x"}, {"macs": [1]}], ids=str)
def test_an_extra_of_a_wrong_kind_is_told_by_its_name(name: str, value: object) -> None:
    """One error, whatever it is."""
    with pytest.raises(AccessRefused, match=f"^the connection web .*{name}"):
        account({"private_key": None, name: value} if name == "key_file" else {name: value})


@pytest.mark.parametrize(
    ("extra", "words"),
    [("[]", "no JSON object"), ('"{}"', "encoded twice"), ("{", "no JSON"), ("null", "no JSON object")],
)
def test_an_extra_that_is_no_object_is_refused(extra: str, words: str) -> None:
    with pytest.raises(AccessRefused, match=words):
        account(extra=extra)


@pytest.mark.parametrize("host", ["", None, "-oProxyCommand=x", "a b", "a\nb"])
def test_a_host_that_is_none_is_refused(host: str | None) -> None:
    """It would be an option of `ssh`, or a line of a file."""
    with pytest.raises(AccessRefused, match="leads to no host"):
        account(host=host)


@pytest.mark.parametrize("value", [True, "true", "True"])
@pytest.mark.parametrize(
    "name", ["no_host_key_check", "ignore_hostkey_verification", "allow_host_key_change"]
)
def test_what_trusts_any_server_is_refused(name: str, value: object) -> None:
    with pytest.raises(AccessRefused, match=f"sets {name}"):
        account({name: value})
    assert account({name: "false"}).pinned


def test_algorithms_are_taken_away_and_named() -> None:
    found = account({"disabled_algorithms": {"macs": ["hmac-md5", "hmac-sha1"], "kex": []}}).algorithms
    assert found["mac_algs"] == "-hmac-md5,hmac-sha1" and "kex_algs" not in found


# --- the key ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*bcrypt.kdf")
@pytest.mark.parametrize("form", ["openssh", "pkcs8-pem", "pkcs1-pem"])
@pytest.mark.parametrize("place", ["private_key_passphrase", "passphrase", "password"])
def test_a_passphrase_opens_the_key_and_is_no_password_then(form: str, place: str) -> None:
    key = asyncssh.generate_private_key("ecdsa-sha2-nistp256")
    secret = {"private_key": key.export_private_key(form, "open sesame", rounds=1).decode()}
    if place == "password":
        found = account(secret, password="open sesame")
    else:
        found = account(secret | {place: "open sesame"}, password="a password")
    assert found.key == key
    assert found.password == (None if place == "password" else "a password")
    with pytest.raises(AccessRefused, match="write it into the extra private_key_passphrase"):
        account(secret | {"private_key_passphrase": "wrong"})


def test_no_secret_is_in_what_is_printed_of_an_account() -> None:
    """An error may have it, and a log."""
    text = repr(account(password="a password"))
    assert "a password" not in text and "PRIVATE" not in text


def test_a_certificate_that_cannot_be_read_is_told(home: Path) -> None:
    KEY.write_private_key(home / "key")
    (home / "key-cert.pub").write_text("nonsense")
    with pytest.raises(AccessRefused, match=r"certificate, .*key-cert\.pub, that cannot be read"):
        account({"private_key": None, "key_file": "~/key"})


# --- host keys --------------------------------------------------------------------------------------


def test_a_pinned_key_is_the_only_one(home: Path) -> None:
    """known_hosts is not even read."""
    (home / ".ssh" / "known_hosts").mkdir()
    assert account().host_keys == HostKeys(trusted=(HOST.convert_to_public(),))


def test_lines_say_what_is_trusted_signed_and_revoked(home: Path) -> None:
    found = known(
        home,
        f"[web.example.org]:2222 {public(HOST)}",
        f"@cert-authority *.example.org,[*.example.org]:2222 {public(AUTHORITY)}",
        f"@revoked * {public(OTHER)}",
    )
    assert found == HostKeys(*((key.convert_to_public(),) for key in (HOST, AUTHORITY, OTHER)))
    assert known(home, found.lines("[web.example.org]:2222")) == found


def test_a_line_with_the_port_counts_before_one_without(home: Path) -> None:
    lines = f"web.example.org {public(OTHER)}", f"[web.example.org]:2222 {public(HOST)}"
    assert known(home, *lines).trusted == (HOST.convert_to_public(),)


def test_a_key_that_is_revoked_for_the_port_is_so_whatever_else_is_trusted(home: Path) -> None:
    lines = f"@revoked [web.example.org]:2222 {public(HOST)}", f"web.example.org {public(HOST)}"
    assert known(home, *lines).revoked == (HOST.convert_to_public(),)


def test_names_are_compared_as_openssh_does(home: Path) -> None:
    """Whatever their case; the key's own is left alone."""
    for line in (f"[WEB.example.ORG]:2222 {public(HOST)}", f"*.Example.Org {public(HOST)}"):
        assert known(home, line).trusted == (HOST.convert_to_public(),)
    assert account({"host_key": None}, host="Web.Example.ORG").host_keys.trusted


def test_what_cannot_be_understood_is_skipped_with_a_warning(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No matter in which encoding it is; terminals are safe."""
    caplog.set_level(logging.WARNING)
    good = f"web.example.org {public(HOST)} caf\xe9".encode("latin-1")
    odd = b"@strange\x1b[2J * ssh-ed25519 AAAA"
    assert known(home, b"\xff\xfe", odd, b"# \x85\xe9", b"|1|x|y ssh-rsa AAAA", good).trusted
    warnings = [record.getMessage() for record in caplog.records]
    assert any("line 2, is skipped" in warning for warning in warnings) and all(
        map(str.isprintable, warnings)
    )


def test_files_of_all_users_are_read_too_but_not_with_the_extra(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "all").write_text(f"web.example.org {public(HOST)}\n")
    monkeypatch.setattr("airflow_mdbackup.hooks.connection._OF_ALL", [str(home / "all")])
    assert account({"host_key": None}).host_keys.trusted
    with pytest.raises(AccessRefused, match="host key is unknown"):
        account({"host_key": None, "known_hosts": str(home / "none")})
