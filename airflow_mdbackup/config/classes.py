"""Classes that the configuration names by their dotted paths."""

from __future__ import annotations

import importlib
from typing import Any


def find_class(path: str) -> Any:
    """Return the class of this dotted path.

    :raises ImportError, AttributeError: it is not there. Other errors come from the module itself.
    """
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
