"""Why a connection cannot be used."""

from __future__ import annotations


class InvalidConnection(Exception):
    """A sentence that begins after the connection's name, such as "has no login: ..."."""
