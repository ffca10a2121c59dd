"""Which algorithms a connection asks for: by its extras, or by ~/.ssh/config.

They are named as asyncssh names its options: a list, or a text that adds to the defaults or removes from
them, as ssh_config(5) has it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fnmatch import filter as filter_names
from typing import Any

from asyncssh.encryption import get_encryption_algs
from asyncssh.kex import get_kex_algs
from asyncssh.mac import get_mac_algs
from asyncssh.public_key import (
    get_certificate_algs,
    get_default_certificate_algs,
    get_default_public_key_algs,
    get_public_key_algs,
)

from airflow_mdbackup.hooks.host_keys import HostKeys
from airflow_mdbackup.hooks.invalid_connection import InvalidConnection
from airflow_mdbackup.hooks.ssh_config import Reached

Algorithms = Mapping[str, str | list[str]]
_FAST = "aes128-gcm@openssh.com,aes256-gcm@openssh.com"  # with hardware support in today's processors
# paramiko's and Airflow's names, and asyncssh's.
_DISABLED = {
    "ciphers": "encryption_algs",
    "macs": "mac_algs",
    "kex": "kex_algs",
    "keys": "server_host_key_algs",
    "pubkeys": "signature_algs",
}
# Those of ssh_config(5), and asyncssh's.
_SSH_CONFIG = {
    "Ciphers": "encryption_algs",
    "MACs": "mac_algs",
    "KexAlgorithms": "kex_algs",
    "HostKeyAlgorithms": "server_host_key_algs",
}
# What asyncssh supports.
_SUPPORTED: dict[str, Callable[[], list[bytes]]] = {
    "encryption_algs": get_encryption_algs,
    "mac_algs": get_mac_algs,
    "kex_algs": get_kex_algs,
    "server_host_key_algs": lambda: get_public_key_algs() + get_certificate_algs(),
    "signature_algs": lambda: get_public_key_algs() + get_certificate_algs(),
}
_NAME = re.compile(r"[\w.@*?-]+", re.ASCII)


class FromSshConfig(list[str]):
    """Algorithms of ~/.ssh/config, some of which asyncssh may not support."""


def requested(extra: Mapping[str, Any], reached: Reached, host_keys: HostKeys) -> Algorithms:
    """Return the algorithms that the connection's extras or ~/.ssh/config ask for.

    Of host keys, the kinds that are trusted come first, since a server may have others as well.

    :raises InvalidConnection: the extra ``disabled_algorithms`` has another form.
    """
    chosen: dict[str, str | list[str]] = {
        option: FromSshConfig(reached.options[name][0].split(","))
        for name, option in _SSH_CONFIG.items()
        if name in reached.options
    }
    if names := chosen.get("server_host_key_algs"):
        trusted = _trusted(host_keys)
        chosen["server_host_key_algs"] = FromSshConfig(sorted(names, key=lambda name: name not in trusted))
    for name, disabled in extra.get("disabled_algorithms", {}).items():
        if (
            name not in (*_DISABLED, "compression")
            or not isinstance(disabled, list)
            or not all(isinstance(each, str) and _NAME.fullmatch(each) for each in disabled)
        ):
            raise InvalidConnection(
                'has an extra disabled_algorithms that is not an object, such as {"macs": ["hmac-md5"]}'
            )
        if disabled and name in _DISABLED:  # the extra compress decides about compression
            chosen[_DISABLED[name]] = "-" + ",".join(disabled)
    if "ciphers" in extra:
        chosen["encryption_algs"] = extra["ciphers"]
    else:
        chosen.setdefault("encryption_algs", f"^{_FAST}")
    return chosen


def for_asyncssh(algorithms: Algorithms, host_keys: HostKeys) -> dict[str, str | list[str]]:
    """Return asyncssh's options for these algorithms.

    It refuses names that it does not support. Those are dropped, unless the connection lists them itself.
    """
    chosen: dict[str, str | list[str]] = {"server_host_key_algs": _host_key_algorithms(host_keys)}
    for option, names in algorithms.items():
        supported = [name.decode() for name in _SUPPORTED[option]()]
        if isinstance(names, FromSshConfig):
            chosen[option] = [name for name in names if name in supported] or names
        elif isinstance(names, str) and names.startswith("-"):
            known = {pattern: filter_names(supported, pattern) for pattern in names[1:].split(",")}
            if option in chosen:  # host keys, whose order matters
                disabled = {name for each in known.values() for name in each}
                chosen[option] = [name for name in chosen[option] if name not in disabled]
            elif any(known.values()):
                chosen[option] = "-" + ",".join(pattern for pattern, found in known.items() if found)
        else:
            chosen[option] = names
    return chosen


def _host_key_algorithms(host_keys: HostKeys) -> list[str]:
    """Return the trusted kinds of host keys, and then all others, so that a wrong key can be reported."""
    usual = [name.decode() for name in get_default_public_key_algs()]
    return [*dict.fromkeys([*_trusted(host_keys), *usual])]


def _trusted(host_keys: HostKeys) -> list[str]:
    signed = get_default_certificate_algs() if host_keys.authorities else []
    names = [*signed, *(name for key in host_keys.trusted for name in key.sig_algorithms)]
    return [name.decode() for name in names]
