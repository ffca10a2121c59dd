"""What can go wrong, sorted by what the reader of the message can do about it.

Every message names the provider, file or path concerned, and the next step. Names that came from
a provider are escaped by :func:`.common.paths.to_text` before they enter a message.
"""

from __future__ import annotations


class BackupError(Exception):
    """Base class of all foreseen failures. Catch a subclass."""


class ConnectionLost(BackupError):
    """The connection to the provider broke, stalled or violated the protocol. A retry may help."""


class AccessRefused(BackupError):
    """The provider refused the account, or its host key is not the expected one. An operator must look."""


class NotOnProvider(BackupError):
    """The provider does not have, or refuses to send, a file that the run needs."""


class IndexRefused(BackupError):
    """The provider's index is malformed, truncated or too old. Nothing was changed."""


class ConsumerIndexDamaged(BackupError):
    """The consumer's own index cannot be read. Restore it, or copy everything again."""


class GuardTripped(BackupError):
    """More than the allowed part of the backup would be forgotten or replaced. Nothing was changed."""


class ParameterRefused(BackupError):
    """A parameter of a run is invalid, for example misspelt. Nothing was done."""


class DestinationRefused(BackupError):
    """``dest`` is wrong: another provider's, not mounted, or of a newer format."""


class DestinationFull(BackupError):
    """The disk of ``dest``, or of a restore's target, has too little space. What is there is kept."""


class DestinationBroken(BackupError):
    """The disk of ``dest`` has errors, or is gone. Check it and its mount, then retry."""


class WorkerExhausted(BackupError):
    """This machine, or the task's process, has used up its open files or its memory. A retry may help."""


class DestinationBusy(BackupError):
    """Another run held the lock on ``dest`` for longer than this one waits."""


class RunIncomplete(BackupError):
    """An earlier step left no result for this run."""


class EntriesFailed(BackupError):
    """What could be backed up was committed; some entries could not, and the message names them."""


class DamageFound(BackupError):
    """Files of the backup have changed since they arrived. The message names some, and says what to do."""
