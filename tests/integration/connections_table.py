"""What an SSH connection may be: each case, and whether it works, as the table of docs/connections.md.

``python -m tests.integration.connections_table`` writes the table into the page. `test_connections` tries
each case over all four ways, against real servers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "connections.md"
COMMAND = "python -m tests.integration.connections_table"
START, END = f"<!-- Made by `{COMMAND}`: edit that instead. -->", "<!-- End of what was made. -->"
WAYS = ("backup, short line", "backup, long line", "index, not deferred", "index, deferred")
BY_SSH, BY_ASYNCSSH, REFUSED = "`ssh`", "asyncssh", "refused"
_USUAL = (BY_SSH, BY_ASYNCSSH, BY_ASYNCSSH, BY_ASYNCSSH)
_WITHOUT_SSH = (BY_ASYNCSSH,) * 4


@dataclass(frozen=True)
class Case:
    """A connection that works, but for what is said here.

    In all texts, ``{...}`` is filled in: ``{keys}`` is the folder of the account's keys, ``{port}`` that of
    the server, ``{key NAME}`` a private key, ``{host NAME}`` a public key of the server, or of another one.

    :ivar what: it is, for people.
    :ivar extra: of the connection; None takes one away that it would have.
    :ivar fields: of the connection, besides.
    :ivar known_hosts: of the user; without a ``host_key`` then.
    :ivar config: ~/.ssh/config.
    :ivar server: which one is asked; "nobody": one that must not be, since it is refused before.
    :ivar ways: over what each of :data:`WAYS` goes.
    :ivar says: words of the message, if it is refused.
    """

    what: str
    extra: Mapping[str, object] = field(default_factory=dict)
    fields: Mapping[str, object] = field(default_factory=dict)
    known_hosts: str | None = None
    config: str | None = None
    server: str = "usual"
    ways: tuple[str, ...] = _USUAL
    says: str = ""


def _here(what: str, says: str, **case: object) -> Case:
    """Return a case that is refused without asking the server."""
    return Case(what, server="nobody", ways=(REFUSED,) * 4, says=says, **case)  # type: ignore[arg-type]


def _there(what: str, says: str, **case: object) -> Case:
    """Return a case that is refused after the server was asked."""
    return Case(what, ways=(REFUSED,) * 4, says=says, **case)  # type: ignore[arg-type]


PHRASE = "open sesame"
FORMS = {
    "ed25519": "Ed25519, OpenSSH's form",
    "ecdsa": "ECDSA, OpenSSH's form",
    "rsa": "RSA, OpenSSH's form",
    "ecdsa-PEM": "ECDSA, PEM",
    "rsa-PEM": "RSA, PEM (PKCS #1)",
    "ed25519-PKCS8": "Ed25519, PKCS #8",
    "ecdsa-PKCS8": "ECDSA, PKCS #8",
    "rsa-PKCS8": "RSA, PKCS #8",
}
"""What a key may be, and its name; there is one more of each, encrypted, with `-secret` behind its name."""


def _at(place: str, name: str) -> dict[str, object]:
    """Return the extras for a key in a file, or in the connection."""
    if place == "file":
        return {"key_file": f"{{keys}}/{name}"}
    return {"key_file": None, "private_key": f"{{key {name}}}"}


def _keys() -> Iterator[Case]:
    for name, form in FORMS.items():
        yield Case(form, extra={"key_file": f"{{keys}}/{name}"})
        secret = {"key_file": f"{{keys}}/{name}-secret"}
        yield Case(f"{form}, encrypted", extra=secret | {"private_key_passphrase": PHRASE})
    yield Case("encrypted, with the password", extra=secret, fields={"password": PHRASE})
    for place in ("file", "private_key"):
        yield Case(f"with CRLF, in {_of(place)}", extra=_at(place, "rsa-PEM-CRLF"))
        yield Case(f"without the last newline, in {_of(place)}", extra=_at(place, "ed25519-bare"))
        yield Case(f"with blank lines around it, in {_of(place)}", extra=_at(place, "ed25519-blank"))
    inline = _at("private_key", "ed25519-secret-CRLF")
    yield Case("encrypted, in `private_key`, with CRLF", extra=inline | {"private_key_passphrase": PHRASE})
    yield Case("PEM, in `private_key`", extra=_at("private_key", "ecdsa-PEM"))
    yield Case("`key_file` in `~/`", extra={"key_file": "~/my key"})
    yield Case("`~/.ssh/id_ed25519`, where the connection names none", extra={"key_file": None})
    yield Case(
        "`IdentityFile` of `~/.ssh/config`",
        extra={"key_file": None},
        config="Host 127.0.0.1\n  IdentityFile {keys}/ecdsa\n",
    )
    yield Case("a certificate beside it, which alone is accepted", extra={"key_file": "{keys}/certified"})
    yield Case("a password", extra={"key_file": None}, fields={"password": "pass word"},
               server="of passwords", ways=_WITHOUT_SSH)  # fmt: skip
    yield Case("a password, beside another key than the account's", extra={"key_file": "{keys}/wrong"},
               fields={"password": "pass word"}, server="of passwords", ways=_WITHOUT_SSH)  # fmt: skip
    yield _there(
        "another key than the account's", "refuses the account's key", extra={"key_file": "{keys}/wrong"}
    )
    yield _there(
        "another password", "refuses the account's password",
        extra={"key_file": None}, fields={"password": "wrong"}, server="of passwords",
    )  # fmt: skip
    public, putty = "it is the public key", "puttygen KEY -O private-openssh"
    for place in ("file", "private_key"):
        for what, name, says in (
            ("the public key by mistake", "public", public),
            ("PuTTY's form", "putty", putty),
            ("something else", "garbage", "that is not a private key"),
            ("half a key", "half", "that is not a private key"),
        ):
            yield _here(f"{what}, in {_of(place)}", says, extra=_at(place, name))
    yield _here("a key whose lines are separated by `\\n`, written out", "in place of line breaks",
                extra=_at("private_key", "escaped"))  # fmt: skip
    yield _here("the key itself, in `key_file`", "which is for the name of a file: move it to private_key",
                extra={"key_file": "{key ed25519}"})  # fmt: skip
    yield _here("the name of a file, in `private_key`", "write it into key_file",
                extra={"key_file": None, "private_key": "{keys}/ed25519"})  # fmt: skip
    yield _here("no such file", "No such file", extra={"key_file": "{keys}/missing"})
    yield _here("a directory", "Is a directory", extra={"key_file": "{keys}"})
    yield _here("a file that may not be read", "Permission denied", extra={"key_file": "{keys}/unreadable"})
    for name in ("ed25519", "rsa-PEM", "rsa-PKCS8"):
        encrypted = {"key_file": f"{{keys}}/{name}-secret"}
        cure = "write it into the extra private_key_passphrase"
        yield _here(f"{FORMS[name]}, encrypted, without a passphrase", cure, extra=encrypted)
        cure = "correct its extra private_key_passphrase"
        yield _here(
            f"{FORMS[name]}, encrypted, with another passphrase",
            cure,
            extra=encrypted | {"private_key_passphrase": "wrong"},
        )
    yield _here("none at all", "name one in its extra key_file",
                extra={"key_file": None, "look_for_keys": "false"})  # fmt: skip
    yield _here(
        "none, with an extra that nobody knows", "unknown extra: keyfile (did you mean key_file?)",
        extra={"key_file": None, "keyfile": "{keys}/ed25519", "look_for_keys": "false"},
    )  # fmt: skip
    yield _here("both `key_file` and `private_key`", "remove one of them",
                extra={"private_key": "{key ed25519}"})  # fmt: skip


def _of(place: str) -> str:
    return "a file" if place == "file" else "`private_key`"


def _host_keys() -> Iterator[Case]:
    for kind, name in (("ed25519", "Ed25519"), ("ecdsa", "ECDSA"), ("rsa", "RSA")):
        yield Case(f"`host_key`, {name}", extra={"host_key": f"{{host {kind}}}"})
    yield Case("`host_key` with a comment", extra={"host_key": "{host ed25519} root@web"})
    yield Case("`host_key` without the type, RSA, as Airflow has it", extra={"host_key": "{base64 rsa}"})
    yield Case("`host_key` as `ssh-keyscan` prints it", extra={"host_key": "127.0.0.1 {host ecdsa}"})
    yield Case("... for a port", extra={"host_key": "[127.0.0.1]:{port} {host ed25519}\n"})
    yield Case(
        "`host_key`, and another one in known_hosts",
        extra={"host_key": "{host ed25519}"},
        known_hosts="[127.0.0.1]:{port} {host other}\n",
    )
    changed = "the server's host key is not the expected one"
    yield _there("`host_key` of another server", changed, extra={"host_key": "{host other}"})
    yield _there("`host_key` of another server, RSA", changed, extra={"host_key": "{host other-rsa}"})
    yield _here("`host_key` that is none", "must look like", extra={"host_key": "SHA256:abcdef"})
    yield _here(
        "`host_key` with a marker", "starts with @revoked", extra={"host_key": "@revoked {host ed25519}"}
    )
    yield _here("`host_key` that is a number", "host_key that is not a string", extra={"host_key": 12345})
    yield _here(
        "neither `host_key` nor known_hosts", "Pin it in its extra host_key", extra={"host_key": None}
    )
    for name in ("no_host_key_check", "allow_host_key_change"):
        yield _here(f"`{name}`", f"sets {name}, which trusts any server", extra={name: "true"})
    yield _here(
        "`known_hosts: none`", "sets known_hosts to none", extra={"known_hosts": "None", "host_key": None}
    )


def _known_hosts() -> Iterator[Case]:
    here = "[127.0.0.1]:{port}"
    for what, lines in (
        ("`host key`, without a port", "127.0.0.1 {host ed25519}"),
        ("`[host]:port`", f"{here} {{host ed25519}}"),
        ("`[host]:port`, ECDSA alone", f"{here} {{host ecdsa}}"),
        ("`[host]:port`, RSA alone", f"{here} {{host rsa}}"),
        ("several hosts in a line", f"example.org,{here},192.0.2.1 {{host ed25519}}"),
        ("hashed", "{hashed}"),
        ("wildcard", "127.0.0.* {host ed25519}"),
        ("wildcard with a port", "[127.0.*]:{port} {host ed25519}"),
        ("wildcard, without others", "*,!192.0.2.1 {host ed25519}"),
        ("`[host]:port` in upper case", "[127.0.0.1]:{port},LOCALHOST {host ed25519}"),
        ("old and new key of one type", f"{here} {{host other}}\n{here} {{host ed25519}}"),
        ("a key of another type, which the server has not",
         f"{here} {{host ed25519}}\n{here} {{host other-rsa}}"),
        ("`@cert-authority`, which signed the server's certificate", "@cert-authority 127.0.0.* {host ca}"),
        ("`@cert-authority` of other hosts, beside the key",
         f"@cert-authority *.example.org {{host ca}}\n{here} {{host ed25519}}"),
        ("`@cert-authority` without a port, beside another key of the port",
         f"{here} {{host other}}\n@cert-authority 127.0.0.1 {{host ca}}"),
        ("`@cert-authority` of all ports that did not sign, beside the key without a port",
         "@cert-authority * {host other}\n127.0.0.1 {host ed25519}"),
        ("`@cert-authority` that did not sign, beside the key",
         f"@cert-authority * {{host other}}\n{here} {{host ed25519}}"),
        ("`@revoked` key of another server, beside the key",
         f"@revoked * {{host other}}\n{here} {{host ed25519}}"),
        ("`@revoked` key without a port, beside the same with it",
         f"@revoked 127.0.0.1 {{host ed25519}}\n{here} {{host ed25519}}"),
        ("keys of kinds that nobody knows, beside the key",
         f"{here} ssh-strange AAAA\n{here} 1024 35 1234567\n{here} {{host ed25519}}"),
        ("broken lines, beside the key",
         "example.org\n@cert-authority\n@strange * {host ca}\n|1|x|y {host ca}\n10.0.0.1/99 {host ca}\n"
         f"x ssh-ed25519 AAAA\n{here} {{host ed25519}}"),
        ("bytes of latin-1, comments and blank lines",
         f"# caf\xe9\n\n   # Andr\xe9\nsrv-\xe9 {{host other}}\n{here} {{host ed25519}} caf\xe9"),
        ("CRLF", f"example.org {{host other}}\r\n{here} {{host ed25519}}\r\n"),
    ):  # fmt: skip
        yield Case(what, known_hosts=lines)
    yield Case(
        "another file, in the extra `known_hosts`", extra={"known_hosts": "~/other hosts", "host_key": None}
    )
    changed, unknown = "the server's host key is not the expected one", "Pin it in its extra host_key"
    for what, lines in (
        ("another key of the same type", f"{here} {{host other}}"),
        ("a `@revoked` key, of those that it has",
         f"@revoked {here} {{host ed25519}}\n{here} {{host ed25519}}"),
        ("a `@revoked` key, which a line without a port has, too",
         f"@revoked {here} {{host ed25519}}\n127.0.0.1 {{host ed25519}}"),
        ("a `@revoked` key without a port, beside another with it, and a `@cert-authority` without",
         f"@revoked 127.0.0.1 {{host ed25519}}\n{here} {{host other}}\n"
         "@cert-authority 127.0.0.1 {host ca}"),
        ("a `@cert-authority` that did not sign", "@cert-authority * {host other}"),
        ("a `@cert-authority` that is `@revoked`", "@cert-authority * {host ca}\n@revoked * {host ca}"),
    ):  # fmt: skip
        yield _there(what, changed, known_hosts=lines)
    for what, lines in (
        ("an empty file", ""),
        ("other hosts alone", "example.org {host ed25519}"),
        ("another port alone", "[127.0.0.1]:1 {host ed25519}"),
        ("a network", "127.0.0.0/8 {host ed25519}"),
        ("`@CERT-AUTHORITY` in upper case", "@CERT-AUTHORITY * {host ca}"),
        ("a wildcard that leaves it out", "*,!*127.0.0.1* {host ed25519}"),
    ):
        yield _here(what, unknown, known_hosts=lines)
    yield _here("no such file, in the extra `known_hosts`", unknown,
                extra={"known_hosts": "~/missing", "host_key": None})  # fmt: skip


def _algorithms() -> Iterator[Case]:
    yield Case("a server with chacha20-poly1305 only", server="of chacha20")
    yield Case("a server with aes-ctr and umac only", server="of umac")
    yield Case("a server with curve25519 only", server="of curve25519")
    yield Case("a server with sntrup761 only", server="of sntrup761", ways=(BY_SSH,) * 4)
    yield Case("`ciphers`", extra={"ciphers": ["aes256-ctr", "aes128-ctr"]})
    yield Case("`disabled_algorithms`", extra={"disabled_algorithms": {
        "ciphers": ["aes128-gcm@openssh.com"], "macs": ["umac-64-etm@openssh.com", "hmac-sha1"],
        "kex": ["curve25519-sha256"], "keys": ["ssh-rsa"], "pubkeys": ["ssh-rsa"]}})  # fmt: skip
    yield Case("`disabled_algorithms` that nobody has, and `compression`", extra={"disabled_algorithms": {
        "ciphers": ["blowfish-cbc"], "macs": ["foo"], "compression": ["zlib"]}})  # fmt: skip
    yield Case("`disabled_algorithms` of others, and a pinned ECDSA key",
               extra={"host_key": "{host ecdsa}", "disabled_algorithms": {"keys": ["ssh-rsa"]}})  # fmt: skip
    yield Case("`HostKeyAlgorithms` of `~/.ssh/config`, of which known_hosts has the last",
               known_hosts="[127.0.0.1]:{port} {host ecdsa}",
               config="Host *\n  HostKeyAlgorithms ssh-ed25519,ecdsa-sha2-nistp256\n")  # fmt: skip
    yield _there("`disabled_algorithms` of the pinned key", "host key is not the expected one",
                 extra={"host_key": "{host ecdsa}",
                        "disabled_algorithms": {"keys": ["ecdsa-*"]}})  # fmt: skip
    chosen = "Ciphers aes256-ctr\n  MACs hmac-sha2-256\n  KexAlgorithms ecdh-sha2-nistp256\n"
    yield Case("`Ciphers`, `MACs` and `KexAlgorithms` of `~/.ssh/config`", config=f"Host *\n  {chosen}")
    yield _there(
        "`ciphers` that the server has not", "no algorithm in common", extra={"ciphers": ["aes256-cbc"]}
    )
    see = "See its extras ciphers and disabled_algorithms"
    yield _here("`ciphers` that nobody has", see, extra={"ciphers": ["aes257-gcm"]})
    yield _here("`ciphers` as a text", "ciphers that is not a list", extra={"ciphers": "aes256-ctr"})
    yield _here("`disabled_algorithms` as a text", "disabled_algorithms that is not an object",
                extra={"disabled_algorithms": "{{}}"})  # fmt: skip


def _rest() -> Iterator[Case]:
    named = {"host": "web", "port": None}
    yield Case("a `Host` of `~/.ssh/config`, with `HostName` and `Port`", fields=named,
               config="Host web\n  HostName 127.0.0.1\n  Port {port}\n")  # fmt: skip
    yield Case("the port of the connection, and another one in `~/.ssh/config`", config="Host *\n  Port 1\n")
    yield Case("`HostKeyAlias` of `~/.ssh/config`", known_hosts="web.example.org {host ed25519}",
               config="Host *\n  HostKeyAlias web.example.org\n")  # fmt: skip
    yield Case(
        "`HostKeyAlias` of `~/.ssh/config`, which the server's certificate has",
        fields={"host": "127.1"},
        known_hosts="@cert-authority * {host ca}",
        config="Host *\n  HostKeyAlias web.example.org\n",
    )
    yield Case("a host in upper case, and a certificate", fields={"host": "LOCALHOST"},
               known_hosts="@cert-authority LocalHost {host ca}")  # fmt: skip
    yield Case("`ProxyCommand` of `~/.ssh/config`, with `%h` and `%p`",
               config="Host *\n  ProxyCommand {proxy} %h %p\n")  # fmt: skip
    yield Case("`ProxyCommand` that is more than a program and its arguments",
               config="Host *\n  ProxyCommand {proxy} $(echo %h) %p 2>/dev/null\n")  # fmt: skip
    yield Case("`ProxyJump` of `~/.ssh/config`", fields={"host": "inside", "port": None},
               known_hosts="[127.0.0.1]:{port} {host ed25519}", config=(
        "Host inside\n  HostName 127.0.0.1\n  Port {port}\n  ProxyJump jump\n"
        "Host jump\n  HostName 127.0.0.1\n  Port {port}\n  User {jumper}\n  IdentityFile {keys}/ed25519\n"
        "  UserKnownHostsFile {home}/.ssh/known_hosts\n"))  # fmt: skip
    yield Case("`ProxyCommand none`", config="Host *\n  ProxyCommand none\n")
    yield Case("`~/.ssh/config` with bytes of latin-1", config="# caf\xe9\nHost *\n  Port 1\n")
    yield _here("no login", "has no login", fields={"login": None})
    yield _here("no host", "has an invalid host", fields={"host": ""})
    for host in ("someone@127.0.0.1", "127.0.0.1:22", "sftp://127.0.0.1"):
        yield _here(f"`{host}` as host", "enter its name or address only", fields={"host": host})
    yield _here("the port 70000", "it must be from 1 to 65535", fields={"port": 70000})
    yield _here("an extra that is encoded twice", "encoded twice", fields={"extra": '"{{}}"'})
    yield _here("an extra that is no JSON", "not JSON", fields={"extra": "key_file=/x"})
    yield _here("a mistake in `~/.ssh/config`", ".ssh/config", config="Host *\n  Port many\n",
                fields={"port": None})  # fmt: skip
    yield _here("`compress: yes`", "compress that is neither true nor false", extra={"compress": "yes"})
    yield _here("`conn_timeout` that is a text", "not a number of seconds", extra={"conn_timeout": "soon"})


def _config() -> Iterator[Case]:
    """What must have no effect, and what ssh itself refuses."""
    for option in (
        "PubkeyAuthentication no",
        "PreferredAuthentications password",
        "RequestTTY force",
        "SessionType none",
        "StdinNull yes",
        "ConnectTimeout 1m",
        "User somebody",
        "RemoteCommand false",
        "LocalCommand touch {home}/touched",
        "KnownHostsCommand /bin/echo x",
        "CertificateFile {keys}/certified-cert.pub",
    ):
        yield Case(f"`{option.split()[0]}`, which has no effect", config=f"Host *\n  {option}\n")
    key_of_other = {"host_key": "{host other}"}
    print_right = "/bin/echo 127.0.0.1 {host ed25519}"
    yield _there("`KnownHostsCommand` with the right key, and another one pinned", "is not the expected one",
                 extra=key_of_other, config=f"Host *\n  KnownHostsCommand {print_right}\n")  # fmt: skip
    yield _there("`ProxyCommand`, and another key pinned", "is not the expected one", extra=key_of_other,
                 config="Host *\n  ProxyCommand {proxy} %h %p\n")  # fmt: skip
    yield _there("`IdentityFile` with the right key, and a wrong `key_file`", "refuses the account's key",
                 extra={"key_file": "{keys}/wrong"},
                 config="Host *\n  IdentityFile {keys}/ed25519\n")  # fmt: skip
    yield _here("`IdentityFile` that is not there", "IdentityFile of ~/.ssh/config", extra={"key_file": None},
                config="Host *\n  IdentityFile ~/.ssh/id_missing\n")  # fmt: skip
    yield Case("several `IdentityFile`, the last of them right", extra={"key_file": None},
               config="Host *\n  IdentityFile {keys}/wrong\n  IdentityFile {keys}/ecdsa\n")  # fmt: skip
    yield Case("`Include`, `Match`, and a comment behind a value", fields={"host": "web", "port": None},
               config='Match originalhost web exec "true"\n  Hostname 127.0.0.1 # us\n'
               "  Include {home}/port\n")  # fmt: skip
    yield Case("`ProxyCommand` with a variable", config="Host *\n  ProxyCommand {proxy} ${{HOME:+%h}} %p\n")
    jump = (
        "Host jump\n  HostName 127.0.0.1\n  Port {port}\n  User {jumper}\n  UserKnownHostsFile {home}/jump\n"
    )
    refuses = "the jump host refuses the login"
    inside = {"host": "inside", "port": None}
    through = "Host inside\n  HostName 127.0.0.1\n  Port {port}\n  ProxyJump jump\n"
    for what, says, key, known in (
        ("known by known_hosts", "", "ed25519", "jump"),
        ("that refuses its key", refuses, "wrong", "jump"),
        ("that is unknown", refuses, "ed25519", "nothing"),
    ):
        config = f"{jump.replace('/jump', f'/{known}')}  IdentityFile {{keys}}/{key}\n{through}"
        case = partial(_there, says=says) if says else Case
        yield case(f"`ProxyJump` to a jump host {what}", fields=inside, config=config)
    in_file = "[127.0.0.1]:{port} {host ed25519}"
    for what, known_hosts in (("pinned", None), ("in known_hosts", in_file)):
        yield _there(f"`RevokedHostKeys` with the server's key, {what}", "is not the expected one",
                     known_hosts=known_hosts,
                     config="Host *\n  RevokedHostKeys {home}/revoked\n")  # fmt: skip
    yield _here("`RevokedHostKeys` that are no keys", "not a list of public keys",
                config="Host *\n  RevokedHostKeys {home}/port\n")  # fmt: skip
    yield _here("`ProxyJump` to itself", "jumphost loop", config="Host *\n  ProxyJump jump\n")
    yield _here("two jump hosts, each behind the other", "is a loop",
                config="Host a\n  ProxyJump b\nHost *\n  ProxyJump a\n")  # fmt: skip
    yield _here("an unknown option", "Bad configuration option", config="Host *\n  UnknownOption yes\n")


CASES: dict[str, list[Case]] = {
    "The account's key": list(_keys()),
    "The host key": list(_host_keys()),
    "known_hosts": list(_known_hosts()),
    "Algorithms": list(_algorithms()),
    "The rest": list(_rest()),
    "`~/.ssh/config`": list(_config()),
}


def table() -> str:
    """Return all cases as tables in Markdown."""
    lines = [START, ""]
    for group, cases in CASES.items():
        lines += [
            f"### {group}",
            "",
            f"| | {' | '.join(WAYS)} | and the message says |",
            "|---|---|---|---|---|---|",
        ]
        for case in cases:
            says = f"`{case.says}`" if case.says else ""
            lines.append(f"| {case.what} | {' | '.join(case.ways)} | {says} |")
        lines.append("")
    return "\n".join([*lines, END])


def in_page() -> str:
    """Return the table that the page has."""
    page = PAGE.read_text(encoding="utf-8")
    return page[page.index(START) : page.index(END) + len(END)]


def main() -> None:
    """Write the table into the page."""
    PAGE.write_text(PAGE.read_text(encoding="utf-8").replace(in_page(), table()), encoding="utf-8")


if __name__ == "__main__":
    main()
