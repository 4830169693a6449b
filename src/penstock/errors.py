"""Every exception Penstock raises. A miss or a drop is never an exception: it is a counted `Miss` or `Drop` reason.

PenstockError
|-- ConfigError            a size, name, path or key that cannot be used
|-- SegmentError           the shared memory is not what it should be
|   |-- NoPool             no segment of that name
|   |-- NotOurs            it belongs to another user
|   |-- FormatMismatch     written by another format version
|   `-- Damaged            truncated or inconsistent
|-- NoSpaceLeft            the file system or the memory limit cannot hold the pool
|-- KeeperError            the keeper refused or did not answer
|   |-- NoKeeper           none is running
|   |-- KeeperRunning      one already is
|   `-- LaneTaken          another process holds the lane that the keeper gave
|-- ViewsAlive             memory is still referenced by arrays that the caller made
|-- PoolClosed             used after close
|-- TierError              a tier below the pool could not do what it was asked
|   |-- TierUnavailable    it is not there, refused, or failed as a whole
|   `-- TierTimeout        it did not answer by the deadline
`-- Refused                a model or layout that Penstock cannot store block by block
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "Damaged",
    "FormatMismatch",
    "KeeperError",
    "KeeperRunning",
    "LaneTaken",
    "NoKeeper",
    "NoPool",
    "NoSpaceLeft",
    "NotOurs",
    "PenstockError",
    "PoolClosed",
    "Refused",
    "SegmentError",
    "TierError",
    "TierTimeout",
    "TierUnavailable",
    "ViewsAlive",
]


class PenstockError(Exception):
    """Base of everything raised on purpose; the text names what to do about it."""


class ConfigError(PenstockError, ValueError):
    """A setting that cannot be used."""


class SegmentError(PenstockError):
    """The shared memory is missing, foreign or broken."""


class NoPool(SegmentError):
    """There is no segment of that name."""


class NotOurs(SegmentError):
    """The segment belongs to another user."""


class FormatMismatch(SegmentError):
    """The segment was written by another version of the format."""


class Damaged(SegmentError):
    """The segment is shorter than its header says, or contradicts itself."""


class NoSpaceLeft(PenstockError):
    """The file system or a memory limit cannot hold what was asked for."""


class KeeperError(PenstockError):
    """The keeper refused a request or did not answer in time."""


class NoKeeper(KeeperError):
    """No keeper serves this pool."""


class KeeperRunning(KeeperError):
    """A keeper already serves this pool."""


class LaneTaken(KeeperError):
    """Another process holds the lane that the keeper gave: it restarted in between. Trying again gives another lane."""


class ViewsAlive(PenstockError):
    """Arrays over pool memory are still referenced; releasing would let the memory change under them."""


class PoolClosed(PenstockError):
    """The pool handle was closed."""


class Refused(PenstockError):
    """A model, cache or layout that cannot be stored block by block; the text names the reason."""


class TierError(PenstockError):
    """A tier below the pool could not do what it was asked. Never reaches an engine: it is a counted reason there."""


class TierUnavailable(TierError):
    """The tier is not there, refused (a wrong password, a full or read-only file system), or failed as a whole."""


class TierTimeout(TierError):
    """The tier did not answer by the deadline."""
