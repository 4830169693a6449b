"""What an object store's error means: the object is not there, this request failed, or nobody can use the store.

Covers the errors of `obstore`, which carries a server's answer in the text only. The text is read here and never handed
on: a server's answer may quote the key id and what was signed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum

from penstock.errors import TierError, TierUnavailable

__all__ = ["Judge", "Verdict"]

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([A-Za-z]{1,64})</Code>")
_OS_ERROR = re.compile(r"os error (\d{1,4})\)")
_NO_BUCKET = frozenset({"NoSuchBucket", "ContainerNotFound", "ContainerBeingDeleted"})
_NO_ACCESS = frozenset({"PermissionDeniedError", "UnauthenticatedError"})
_EACCES, _EROFS, _FULL = 13, 30, frozenset({28, 122})  # Linux; 122 is EDQUOT


class Verdict(IntEnum):
    """What a failed request says."""

    ABSENT = 0
    """There is no such object."""
    REQUEST = 1
    """This request failed; others may not."""
    FULL = 2
    """There is no room for the object."""
    PLACE = 3
    """No request can succeed until somebody does something."""


@dataclass(frozen=True, slots=True)
class Judge:
    """Reads the errors of one store."""

    where: str
    """What the store is called in messages, without anything secret."""
    remote: bool
    """Whether it is asked over HTTP; otherwise it is a directory."""
    remedies: dict[str, str]
    """What to do where `access`, `bucket` or `reach` is the trouble."""

    def of(self, error: Exception) -> Verdict:
        """What it says."""
        if isinstance(error, TierError):
            return Verdict.PLACE
        trouble = self._trouble(error)
        if trouble:
            return Verdict.PLACE
        if isinstance(error, FileNotFoundError):
            return Verdict.ABSENT
        return Verdict.FULL if _os_error(error) in _FULL else Verdict.REQUEST

    def unavailable(self, name: str, error: Exception) -> TierError:
        """The error to raise for one whose verdict is PLACE: what answered, and the remedy."""
        if isinstance(error, TierError):
            return error
        remedy = self.remedies.get(self._trouble(error), "see the store's own log")
        return TierUnavailable(f"{name}: {self.where} {_answer(error)}; {remedy}")

    def _trouble(self, error: Exception) -> str:
        return self._remote_trouble(error) if self.remote else _local_trouble(error)

    def _remote_trouble(self, error: Exception) -> str:
        status, code = _find(_STATUS, error), _find(_CODE, error)
        if code in _NO_BUCKET:
            return "bucket"
        if type(error).__name__ in _NO_ACCESS or status in ("401", "403"):
            return "access"
        if isinstance(error, FileNotFoundError):
            return ""
        if not status:
            return "reach"
        return "" if status.startswith("5") or status in ("404", "408", "409", "412", "429") else "request"


def _local_trouble(error: Exception) -> str:
    return "access" if _os_error(error) in (_EACCES, _EROFS) else ""


def _os_error(error: Exception) -> int:
    return int(_find(_OS_ERROR, error) or 0)


def _find(pattern: re.Pattern[str], error: Exception) -> str:
    match = pattern.search(str(error))
    return match[1] if match else ""


def _answer(error: Exception) -> str:
    status, code, number = _find(_STATUS, error), _find(_CODE, error), _os_error(error)
    if status or code:
        return f"answered {' '.join(filter(None, (status, code)))}"
    return f"failed with errno {number}" if number else "cannot be reached"
