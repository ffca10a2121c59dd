"""Private keys: read on this machine, in any form that OpenSSH and OpenSSL write.

A key that cannot be used is reported before anything is sent to a server.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import asyncssh

from airflow_mdbackup.hooks.files import read
from airflow_mdbackup.hooks.invalid_connection import InvalidConnection


class Key(NamedTuple):
    """A private key, the passphrase that opened it, and the certificate beside it, if there are any."""

    key: asyncssh.SSHKey
    passphrase: str | None
    certificate: asyncssh.SSHCertificate | None = None


def key_from_file(path: Path, passphrases: Iterable[str | None], what: str) -> Key:
    """Return the key in a file, with the certificate in the file beside it.

    :param passphrases: to try, in this order; None stands for an unencrypted key.
    :param what: the key, as a message calls it.
    :raises InvalidConnection: the key or the certificate cannot be used.
    """
    try:
        content = read(path)
    except OSError as error:
        raise InvalidConnection(
            f"has {what} that cannot be read on this machine: {error.strerror}. Copy it here, or correct the"
            " path"
        ) from error
    found = key_from_text(content, passphrases, what)
    return found._replace(certificate=_certificate_beside(path, found.key))


def key_from_text(content: bytes, passphrases: Iterable[str | None], what: str) -> Key:
    """Return the key that a text holds. See :func:`key_from_file`."""
    # The UI and Windows add a byte order mark or CRLF line ends, and drop the last line end.
    content = content.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").strip() + b"\n"
    passphrases, problem = [*dict.fromkeys(passphrases)], ""
    for passphrase in passphrases:
        try:
            return Key(asyncssh.import_private_key(content, passphrase), passphrase)
        except asyncssh.KeyEncryptionError as error:
            problem = str(error)
        except asyncssh.KeyImportError as error:
            # asyncssh raises the same error for an encrypted key without its passphrase.
            if "assphrase" not in str(error) and "decrypt" not in str(error):
                raise InvalidConnection(
                    f"has {what} that is not a private key: {_hint(content, error)}"
                ) from error
            problem = str(error)
    if not any(passphrases):
        raise InvalidConnection(
            f"has {what} that is encrypted, and no passphrase: write it into the extra private_key_passphrase"
        )
    # asyncssh lacks some ciphers of PKCS #8, and reports them as a wrong passphrase.
    other = ". If it is right, `ssh-keygen -p -f KEY` encrypts the key in a way that can be read here"
    raise InvalidConnection(
        f"has {what} that is encrypted, and no passphrase of the connection opens it ({problem}): correct its"
        f" extra private_key_passphrase{other * (b'BEGIN ENCRYPTED PRIVATE KEY' in content)}"
    )


def _hint(content: bytes, error: Exception) -> str:
    if content.startswith((b"ssh-", b"ecdsa-", b"sk-")):
        return "it is the public key"
    if content.startswith(b"PuTTY"):
        return "it is in PuTTY's format; `puttygen KEY -O private-openssh -o NEW` converts it"
    if b"\n" not in content.strip() and content.startswith((b"/", b"~", b"./")):
        return "it is the name of a file: write it into key_file"
    if b"\\n" in content:
        return "it has \\n in place of line breaks"
    return f"{error}"


def _certificate_beside(path: Path, key: asyncssh.SSHKey) -> asyncssh.SSHCertificate | None:
    """Return the certificate in the file beside the key's, if any."""
    beside = path.with_name(path.name + "-cert.pub")
    try:
        certificate = asyncssh.import_certificate(read(beside))
    except FileNotFoundError:
        return None
    except (OSError, asyncssh.KeyImportError) as error:
        raise InvalidConnection(
            f"has a key with a certificate, {beside}, that cannot be read: {error}"
        ) from error
    if certificate.key.public_data != key.public_data:
        raise InvalidConnection(
            f"has a key with a certificate, {beside}, that is for another key: renew or remove it"
        )
    return certificate
