"""What is made of an Airflow connection before anything is sent. Whether it works: `test_connections`."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asyncssh
import pytest

from airflow_mdbackup.hooks.connection import SshAccount, account_of
from airflow_mdbackup.hooks.host_keys import HostKeys
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
    assert [key[0] for key in found.keys] == [KEY] and found.password is None
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
    assert found.proxy == "nc 192.0.2.1 4444"
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
    [
        ("[]", "not a JSON object"),
        ('"{}"', "encoded twice"),
        ("{", "not JSON"),
        ("null", "not a JSON object"),
    ],
)
def test_an_extra_that_is_no_object_is_refused(extra: str, words: str) -> None:
    with pytest.raises(AccessRefused, match=words):
        account(extra=extra)


@pytest.mark.parametrize(
    "host",
    [
        *("", None, "-oProxyCommand=x", "a b", "a\nb", "a\0b", "\ud800", "$(id)", "a;b", "a,b", "*", "#a"),
        *("a@b", "sftp://a", "a/b", "a:22", "[::1]", "a..b", "a" * 80),
    ],
    ids=repr,
)
def test_a_host_that_is_none_is_refused(host: str | None, home: Path) -> None:
    """It would be an option of `ssh`, or a line of a file; or it is more than a host."""
    with pytest.raises(AccessRefused, match="has an invalid host"):
        account(host=host)


@pytest.mark.parametrize(
    "host", ["::1", "fe80::1%eth0", "192.0.2.1", "b\xfccher.example", "web_1.", "web+db"]
)
def test_a_host_may_be_a_name_an_address_or_an_alias(host: str) -> None:
    assert account(host=host).address == host


def test_a_name_in_config_that_is_none_is_refused(home: Path) -> None:
    (home / ".ssh" / "config").write_text("Host *\n  HostName a..b\n")
    with pytest.raises(AccessRefused, match=r"has an invalid host .*the HostName of"):
        account()


def test_no_password_before_a_host_is_quoted() -> None:
    with pytest.raises(AccessRefused) as refused:
        account(host="sftp://someone:open sesame@web.example.org")
    assert "sesame" not in str(refused.value) and "web.example.org" in str(refused.value)


@pytest.mark.parametrize("port", [0, -1, 65536, 70000, "x"])
def test_a_port_that_is_none_is_refused(port: object) -> None:
    with pytest.raises(
        AccessRefused, match=f"^the connection web has the port {port!r}: it must be from 1 to 65535"
    ):
        account(port=port)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"login": "a\0b"}, "has a login with an invisible character"),
        ({"login": "\ud800"}, "has a login with half of a surrogate pair"),
        ({"password": "\udc80"}, "has a password with half of a surrogate pair"),
        ({"extra": "[" * 100_000}, "not JSON"),
        ({"extra": '{"conn_timeout": Infinity, "private_key": "x", "host_key": "x"}'}, "private_key"),
    ],
)
def test_fields_that_no_server_could_take_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(AccessRefused, match=words):
        account(**fields)


@pytest.mark.parametrize("seconds", [float("inf"), float("nan"), -5, 0, 10**30, "soon"])
def test_a_timeout_that_is_none_is_refused(seconds: object) -> None:
    with pytest.raises(AccessRefused, match="conn_timeout that is not a number of seconds"):
        account({"conn_timeout": seconds})


@pytest.mark.parametrize(
    "name", ["private_key", "private_key_passphrase", "host_key", "known_hosts", "subsystem"]
)
def test_half_a_character_in_an_extra_is_refused(name: str) -> None:
    with pytest.raises(AccessRefused, match=f"an extra {name} with half of a surrogate pair"):
        account({name: "\ud800"})


def test_an_extra_that_nobody_knows_is_told_and_what_was_meant(caplog: pytest.LogCaptureFixture) -> None:
    """With every refusal; or else as a warning."""
    with pytest.raises(
        AccessRefused, match=r"host key is unknown.* \(unknown extra: hostkey \(did you mean host_key\?\)\)"
    ):
        account({"host_key": None, "hostkey": public(HOST)})
    assert account({"con_timeout": 5, "purpose": "\x1b"})
    assert (
        "the connection web: unknown extra: con_timeout (did you mean conn_timeout?), purpose" in caplog.text
    )
    caplog.clear()
    assert account({"cmd_timeout": 5, "look_for_keys": "False"}) and not caplog.text


@pytest.mark.parametrize("name", ["compress", "look_for_keys", "no_host_key_check"])
def test_a_switch_that_is_neither_on_nor_off_is_refused(name: str) -> None:
    with pytest.raises(AccessRefused, match=f"{name} that is neither true nor false"):
        account({name: "yes"})


def test_texts_of_a_uri_are_refused_with_the_way_out() -> None:
    with pytest.raises(AccessRefused, match=r"is not an object, .*\?__extra__="):
        account({"disabled_algorithms": '{"macs": ["hmac-md5"]}'})


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


def test_algorithms_that_asyncssh_has_not_may_be_taken_away() -> None:
    """`ssh` may have them. Compression is chosen by another extra."""
    without = {"macs": ["foo", "hmac-sha1"], "kex": ["foo"], "ciphers": ["foo"], "compression": ["zlib"]}
    found = account({"disabled_algorithms": without})
    assert (found.algorithms["mac_algs"], found.algorithms["kex_algs"]) == ("-foo,hmac-sha1", "-foo")
    assert b"hmac-sha1" not in found.options.mac_algs and found.options.mac_algs
    with pytest.raises(AccessRefused, match="disabled_algorithms"):
        account({"disabled_algorithms": {"macs": ["\0"]}})


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
    assert found.keys[0].key == key
    assert found.password == (None if place == "password" else "a password")
    with pytest.raises(AccessRefused, match="correct its extra private_key_passphrase"):
        account(secret | {"private_key_passphrase": "wrong"})
    with pytest.raises(AccessRefused, match="write it into the extra private_key_passphrase"):
        account(secret)


def test_no_secret_is_in_what_is_printed_of_an_account() -> None:
    """An error may have it, and a log."""
    text = repr(account(password="a password"))
    assert "a password" not in text and "PRIVATE" not in text


SECRET = KEY.export_private_key().decode()


@pytest.mark.parametrize(
    "text",
    [
        SECRET,
        SECRET.replace("\n", "\\n"),
        SECRET.splitlines()[1],
        KEY.export_private_key("pkcs8-pem").decode(),
    ],
    ids=["file", "one line", "its body", "PKCS #8"],
)
@pytest.mark.parametrize(("name", "place"), [("key_file", "private_key"), ("known_hosts", "host_key")])
def test_a_key_in_place_of_its_file_is_not_quoted(name: str, place: str, text: str) -> None:
    with pytest.raises(
        AccessRefused, match=f"the key itself in its extra {name}, .*: move it to {place}"
    ) as refused:
        account({"private_key": None, name: text})
    assert refused.value.__cause__ is None and refused.value.__suppress_context__
    assert not any(line in str(refused.value) for line in text.splitlines())


@pytest.mark.parametrize("name", ["/keys/web", "~/.ssh/id_rsa"])
def test_a_file_in_place_of_the_key_is_told(name: str) -> None:
    with pytest.raises(AccessRefused, match="it is the name of a file: write it into key_file"):
        account({"private_key": name})


@pytest.mark.parametrize("extra", ["key_file", "known_hosts"])
@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "/x\0y"], ids=repr)
def test_what_no_file_can_be_called_is_refused(extra: str, name: str) -> None:
    with pytest.raises(AccessRefused, match=f"an extra {extra} that is not the name of a file"):
        account({"private_key": None, "host_key": None, extra: name})


@pytest.mark.parametrize("name", ["key", "hosts", "good-cert.pub"])
def test_nobody_waits_for_what_is_no_file(home: Path, name: str) -> None:
    """The triggerer's loop would wait, too."""
    os.mkfifo(home / name)
    KEY.write_private_key(home / "good")
    key, hosts = "~/key" if name == "key" else "~/good", "~/hosts" if name == "hosts" else None
    with pytest.raises(AccessRefused, match="Not a regular file"):
        account({"private_key": None, "host_key": None, "key_file": key, "known_hosts": hosts})


def test_a_certificate_of_another_key_is_told(home: Path) -> None:
    KEY.write_private_key(home / "key")
    AUTHORITY.generate_user_certificate(OTHER, "x").write_certificate(home / "key-cert.pub")
    with pytest.raises(AccessRefused, match=r"key-cert\.pub, that is for another key"):
        account({"private_key": None, "key_file": "~/key"})


def test_a_key_may_have_the_mark_of_utf_8() -> None:
    assert account({"private_key": "\ufeff" + SECRET}).keys[0].key == KEY


@pytest.mark.filterwarnings("ignore:.*bcrypt.kdf")
def test_a_key_that_may_be_encrypted_in_an_unknown_way_can_be_written_anew() -> None:
    key = KEY.export_private_key("pkcs8-pem", "open sesame").decode()
    with pytest.raises(AccessRefused, match="`ssh-keygen -p -f KEY`"):
        account({"private_key": key, "private_key_passphrase": "wrong"})


def test_blanks_belong_to_a_password() -> None:
    extra = {"private_key": None, "look_for_keys": "false"}
    assert account(extra, password=" pass word ").password == " pass word "


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


@pytest.mark.parametrize("marker", ["@revoked", "@cert-authority *"])
def test_a_pinned_key_has_no_marker(marker: str) -> None:
    with pytest.raises(AccessRefused, match=f"starts with {marker.split()[0]}"):
        account({"host_key": f"{marker} {public(HOST)}"})


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


def test_authorities_count_with_the_port_and_without(home: Path) -> None:
    """Whatever keys there are; and they hide no key."""
    with_port = (
        f"[web.example.org]:2222 {public(OTHER)}",
        f"@cert-authority web.example.org {public(AUTHORITY)}",
    )
    found = known(home, *with_port)
    assert (found.trusted, found.authorities) == (
        (OTHER.convert_to_public(),),
        (AUTHORITY.convert_to_public(),),
    )
    found = known(home, f"@cert-authority * {public(AUTHORITY)}", f"web.example.org {public(HOST)}")
    assert (found.trusted, found.authorities) == (
        (HOST.convert_to_public(),),
        (AUTHORITY.convert_to_public(),),
    )


@pytest.mark.parametrize(
    ("revoked", "trusted", "is_revoked"),
    [
        ("[web.example.org]:2222", "[web.example.org]:2222", True),
        ("[web.example.org]:2222", "web.example.org", True),
        ("web.example.org", "web.example.org", True),
        ("*", "[web.example.org]:2222", True),
        ("web.example.org", "[web.example.org]:2222", False),
    ],
)
@pytest.mark.parametrize("marker", ["", "@cert-authority "])
def test_only_a_line_without_the_port_does_not_revoke_what_is_trusted_with_it(
    home: Path, marker: str, revoked: str, trusted: str, is_revoked: bool
) -> None:
    found = known(home, f"@revoked {revoked} {public(HOST)}", f"{marker}{trusted} {public(HOST)}")
    assert found.revoked == (HOST.convert_to_public(),) * is_revoked


def test_names_are_compared_as_openssh_does(home: Path) -> None:
    """Whatever their case; the key's own is left alone."""
    for names in ("[WEB.example.ORG]:2222", "*.Example.Org", "web.example.or?", "x,*,!y", "[web.*]:22*"):
        assert known(home, f"{names} {public(HOST)}").trusted == (HOST.convert_to_public(),)
    assert account({"host_key": None}, host="Web.Example.ORG").host_keys.trusted


@pytest.mark.parametrize(
    "line",
    [
        *(
            "192.0.2.0/24",
            "192.0.2.?,!192.0.2.1",
            "!192.0.2.1",
            "192.0.2",
            "192.0.2.1x",
            "[0-9]*",
            "192x0x2x1",
        ),
        *("@CERT-AUTHORITY *", "@cert-authority,revoked *", "@revoked *", "[192.0.2.1]:22"),
    ],
)
def test_nothing_is_trusted_that_openssh_would_not_trust(home: Path, line: str) -> None:
    (home / ".ssh" / "known_hosts").write_text(f"{line} {public(HOST)}\n")
    with pytest.raises(AccessRefused, match="host key is unknown"):
        account({"host_key": None}, host="192.0.2.1")


def test_an_identity_file_of_an_unknown_user_is_skipped(home: Path) -> None:
    (home / ".ssh" / "config").write_text("Host *\n  IdentityFile ~nobody-has-this-name/key\n")
    with pytest.raises(AccessRefused, match="has no key"):
        account({"private_key": None})


def test_a_host_is_looked_up_in_lower_case(home: Path) -> None:
    """So it is in a certificate."""
    found = account(host="WEB.example.org")
    assert (found.address, found.options.host) == ("web.example.org", "web.example.org")


def test_where_a_host_key_was_looked_for_is_told(home: Path) -> None:
    (home / "hosts").write_text("")
    for name, where in (("hosts", "hosts"), ("gone", r"gone \(no such file\)")):
        with pytest.raises(
            AccessRefused, match=rf"no line for \[web.*\]:2222 or web.example.org in {home}/{where}\. "
        ):
            account({"host_key": None, "known_hosts": f"~/{name}"})
    with pytest.raises(AccessRefused, match=r"in /dev/null\. "):
        account({"host_key": None, "known_hosts": "/dev/null"}, port=None)


def test_what_cannot_be_understood_is_skipped_with_a_warning(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No matter in which encoding it is; terminals are safe."""
    caplog.set_level(logging.WARNING)
    good = f"web.example.org {public(HOST)} caf\xe9".encode("latin-1")
    odd = b"@strange\x1b[2J * ssh-ed25519 AAAA"
    assert known(home, b"\xff\xfe", odd, b"# \x85\xe9", b"|1|x|y ssh-rsa AAAA", good).trusted
    warnings = [record.getMessage() for record in caplog.records]
    assert any("line 2: " in warning and warning.startswith("Skipping ") for warning in warnings) and all(
        map(str.isprintable, warnings)
    )


def test_files_of_all_users_are_read_too_but_not_with_the_extra(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "all").write_text(f"web.example.org {public(HOST)}\n")
    monkeypatch.setattr("airflow_mdbackup.hooks.host_keys.GLOBAL_FILES", [str(home / "all")])
    assert account({"host_key": None}).host_keys.trusted
    with pytest.raises(AccessRefused, match="host key is unknown"):
        account({"host_key": None, "known_hosts": str(home / "none")})
