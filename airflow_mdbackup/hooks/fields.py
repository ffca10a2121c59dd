"""The fields and extras of an Airflow connection, each checked for its type and characters.

Sources: Airflow's documentation of SSH connections.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from difflib import get_close_matches
from typing import Any

from airflow_mdbackup.hooks.files import is_key_text, path_of
from airflow_mdbackup.hooks.invalid_connection import InvalidConnection
from airflow_mdbackup.scheme.common.paths import to_text

# An alias of ~/.ssh/config may have other characters than a host name or an address.
_HOST = re.compile(r"[\w.:%+][\w.:%+-]*")
_LONGEST_TIMEOUT = 86400  # seconds
_TYPES = {
    "key_file": str,
    "private_key": str,
    "private_key_passphrase": str,
    "passphrase": str,
    "host_key": str,
    "known_hosts": str,
    "subsystem": str,
    "ciphers": list,
    "disabled_algorithms": dict,
}
_EXAMPLES = {
    str: "a string",
    list: 'a list, such as ["aes256-gcm@openssh.com"]',
    dict: 'an object, such as {"macs": ["hmac-md5"]}',
}
_KEY_ITSELF = {"key_file": "private_key", "known_hosts": "host_key"}  # extras for a key instead of its file
_TRUST_ANY = ("no_host_key_check", "ignore_hostkey_verification", "allow_host_key_change")
_SWITCHES = (*_TRUST_ANY, "compress", "look_for_keys")
_OTHERS = ("conn_timeout", "cmd_timeout", "timeout")


def check_text(what: str, text: str, *, printable: bool) -> None:
    """Refuse lone surrogates and, where ``printable``, invisible characters.

    :raises InvalidConnection: there are such.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidConnection(
            f"has {what} with half of a surrogate pair, which is not a character: enter it again"
        ) from None
    if printable and not text.isprintable():
        raise InvalidConnection(f"has {what} with an invisible character: enter it again")


def check_host(host: str, source: str = "") -> None:
    """Refuse what cannot be a host.

    :param source: where it comes from, for the message.
    :raises InvalidConnection: it is neither a name nor an address.
    """
    try:
        host.encode("idna")  # as the lookup encodes it
    except UnicodeError:
        is_host = False
    else:
        is_host = _HOST.fullmatch(host) is not None and host.count(":") != 1
    if not is_host:
        # There may be a login and a password before it.
        shown = to_text(re.sub(".*@", "...@", host, flags=re.DOTALL).encode("utf-8", "backslashreplace"))
        raise InvalidConnection(
            f"has an invalid host ({shown!r}{source}): enter its name or address only. Login and port have"
            " fields of their own"
        )


def port_of(port: Any) -> int | None:
    """Return the port of a connection; None if ~/.ssh/config decides.

    :raises InvalidConnection: it is not a port.
    """
    if port in (None, ""):
        return None
    with suppress(ValueError):
        if 1 <= int(port) <= 65535:
            return int(port)
    raise InvalidConnection(f"has the port {port!r}: it must be from 1 to 65535")


def extras_of(connection: Any) -> dict[str, Any]:
    """Return the extras that are set, each of its type.

    :raises InvalidConnection: one is of another type, or would trust any server.
    """
    try:
        extra = json.loads(connection.extra or "{}")
    except (ValueError, RecursionError) as error:
        raise InvalidConnection(
            f"has an extra that is not JSON ({error}): write an object, such as {{}}"
        ) from error
    if not isinstance(extra, dict):
        twice = " It is encoded twice: write the object itself, not a string." * isinstance(extra, str)
        raise InvalidConnection(f"has an extra that is not a JSON object.{twice}")
    extra = {name: value for name, value in extra.items() if value not in (None, "")}
    _check_types(extra)
    for name in _TRUST_ANY:
        if is_on(extra, name):
            raise InvalidConnection(
                f"sets {name}, which trusts any server. Remove that, and pin the key in its extra host_key"
            )
    if str(extra.get("known_hosts", "")).lower() == "none":
        raise InvalidConnection(
            "sets known_hosts to none, which trusts any server. Pin the key in its extra host_key"
        )
    check_file(extra, "key_file")
    check_file(extra, "known_hosts")
    return extra


def _check_types(extra: Mapping[str, Any]) -> None:
    for name, wanted in _TYPES.items():
        value = extra.get(name)
        if value is not None and not isinstance(value, wanted):
            # Airflow reads every extra in a URI as a string, except for this one.
            uri = ". In a URI, write all extras as JSON into ?__extra__=" * isinstance(value, str)
            raise InvalidConnection(f"has an extra {name} that is not {_EXAMPLES[wanted]}{uri}")
        if isinstance(value, str):
            check_text(f"an extra {name}", value, printable=name == "subsystem")
    if not all(isinstance(name, str) for name in extra.get("ciphers", ())):
        raise InvalidConnection(f"has an extra ciphers that is not {_EXAMPLES[list]}")
    for name in _SWITCHES:
        if str(extra.get(name, "false")).lower() not in ("true", "false"):
            raise InvalidConnection(f"has an extra {name} that is neither true nor false")


def check_file(extra: Mapping[str, Any], name: str) -> None:
    """Refuse what cannot be a file's name. Whether the file exists is seen when it is read.

    :param name: ``key_file`` or ``known_hosts``.
    :raises InvalidConnection: it is the key itself, which is not quoted; or no file can have this name.
    """
    if (value := extra.get(name)) is None:
        return
    if is_key_text(value):  # must not be quoted in a message
        raise InvalidConnection(
            f"has the key itself in its extra {name}, which is for the name of a file: move it to"
            f" {_KEY_ITSELF[name]}"
        )
    try:
        path_of(value)
    except ValueError as error:
        raise InvalidConnection(f"has an extra {name} that is not the name of a file: {error}") from error


def unknown_extras(connection: Any) -> str:
    """Return a warning about unknown extras, with the closest known names; empty if there are none."""
    try:
        extra = json.loads(connection.extra or "{}")
    except (ValueError, RecursionError):
        return ""
    known = {*_TYPES, *_SWITCHES, *_OTHERS}
    found = []
    for name in sorted(set(extra) - known) if isinstance(extra, dict) else ():
        close = get_close_matches(name, known, 1)
        shown = to_text(name.encode("utf-8", "backslashreplace"))
        found.append(f"{shown} (did you mean {close[0]}?)" if close else shown)
    return f"unknown extra: {', '.join(found)}" if found else ""


def is_on(extra: Mapping[str, Any], name: str) -> bool:
    """Return whether a switch is set. The UI and URIs write it as a string."""
    return str(extra.get(name, "false")).lower() == "true"


def seconds_of(extra: Mapping[str, Any], name: str, default: int) -> int:
    """Return a timeout.

    :raises InvalidConnection: it is not a number of seconds, or too long.
    """
    with suppress(TypeError, ValueError, OverflowError):
        if 1 <= (seconds := int(extra.get(name, default))) <= _LONGEST_TIMEOUT:
            return seconds
    raise InvalidConnection(
        f"has an extra {name} that is not a number of seconds from 1 to {_LONGEST_TIMEOUT}"
    )
