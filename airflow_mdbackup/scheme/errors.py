"""What can go wrong, sorted by what the reader of the message can do about it.

Every message names the provider, file or path that it is about, and the next step. Names that came from
a provider are escaped by :func:`.common.paths.to_text` before they enter a message.
"""

from __future__ import annotations


class BackupError(Exception):
    """Any failure that the backup scheme foresees. Catch one of its kinds."""


class ConnectionLost(BackupError):
    """The connection to the provider broke, stalled or spoke nonsense. Trying again may help."""


class AccessRefused(BackupError):
    """The provider refused the account, or its host key is not the expected one. A person must look."""


class NotOnProvider(BackupError):
    """The provider does not have, or does not hand out, a file that the run cannot do without."""


class IndexRefused(BackupError):
    """The provider's index is malformed, truncated or too old. Nothing was changed."""


class ConsumerIndexDamaged(BackupError):
    """The consumer's own index cannot be read. A person decides between restoring and a full copy."""


class GuardTripped(BackupError):
    """More than the allowed part of the backup would be forgotten or replaced. Nothing was changed."""


class ParameterRefused(BackupError):
    """What a person asked of a run cannot be meant, as by a misspelt parameter. Nothing was done."""


class DestinationRefused(BackupError):
    """``dest`` is not what it should be: another provider's, not mounted, of a newer format."""


class DestinationFull(BackupError):
    """The disk of ``dest``, or of a restore's target, has too little room. What is there is kept."""


class DestinationBroken(BackupError):
    """The disk of ``dest`` gives errors, or is gone. Look at it and its mount; a retry may help then."""


class WorkerExhausted(BackupError):
    """This machine, or the task's process, has used up its open files or its memory. A retry may help."""


class DestinationBusy(BackupError):
    """Another run has held the lock on ``dest`` for longer than this one was willing to wait."""


class RunIncomplete(BackupError):
    """A step before this one left no result for this run, so that there is nothing to go on from."""


class EntriesFailed(BackupError):
    """What could be backed up was committed; some entries could not, and the message names them."""


class DamageFound(BackupError):
    """Files of the backup are not what they were when they came. The message names some, and what to do."""
