"""Importing a class that the configuration names by its dotted path."""

from __future__ import annotations

import importlib
from typing import Any


def find_class(path: str) -> Any:
    """Return the class of this dotted path.

    :raises ImportError, AttributeError: it does not exist. The module itself may raise other errors.
    """
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
