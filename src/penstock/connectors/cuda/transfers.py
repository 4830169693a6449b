"""A transfer under way: what it uses stays until the device has passed its event, and is then given back once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from penstock.connectors.cuda.streams import Passing, Stream

__all__ = ["Transfer"]

_PAUSE_S = 20e-6
_LONGEST_PAUSE_S = 1e-3


class Transfer:
    """Blocks on their way between slots and pages. Thread-safe.

    What moves is not to be touched before `done()` or `wait()` said so: pages of a gather not read, pages of a scatter
    not written, slots of a scatter not committed. There is no stopping half-way: cancelling is waiting.
    """

    __slots__ = ("_ended", "_finish", "_good", "_lock", "_passing", "_stream", "error")

    def __init__(self, stream: Stream, passing: Passing, finish: Callable[[bool], int]) -> None:
        """`finish(arrived)` gives everything back and returns how many blocks may be used; it is called once."""
        self._stream = stream
        self._passing = passing
        self._finish: Callable[[bool], int] | None = finish
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._good = 0
        self.error: Exception | None = None
        """What the device or the check afterwards raised; no block may be used then."""

    @property
    def good(self) -> int:
        """How many blocks, from the first, may be used. 0 until the transfer has ended, and when it failed."""
        return self._good

    def done(self) -> bool:
        """Whether it has ended, in whichever way. Does not block. Ends it if the event has passed."""
        if self._ended.is_set():
            return True
        try:
            passed = self._passing.query()
        except RuntimeError as error:  # the device's context is lost: nothing of it runs on
            self._end(error)
            return True
        if passed:
            self._end(None)
        return passed

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until it has ended, at most `timeout_s` seconds (without: until the event). Returns whether it has;
        what it uses is held on to if not."""
        if timeout_s is None:
            self._synchronize()
            return True
        deadline, pause = time.monotonic() + timeout_s, _PAUSE_S
        while not self.done():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        return True

    def cancel(self) -> None:
        """The blocks are not wanted any more: wait until the device is done, so that their pages can be used again."""
        self.wait()

    def order(self) -> None:
        """Let the caller's current CUDA stream wait for this transfer: kernels queued there afterwards see its bytes.

        Does not block and ends nothing. A gather's bytes are known to be good only when it has ended.
        """
        if not self._ended.is_set():
            self._stream.order(self._passing)

    def _synchronize(self) -> None:
        if self._ended.is_set():
            return
        try:
            self._passing.synchronize()
        except RuntimeError as error:
            self._end(error)
            return
        self._end(None)

    def _end(self, error: Exception | None) -> None:
        """Give back, once: whoever comes second waits for the first."""
        with self._lock:
            finish, self._finish = self._finish, None
            if finish is None:
                return
            self.error = error
            try:
                self._good = finish(error is None)
            except Exception as failure:  # noqa: BLE001 - a lost pool ends the transfer, never the engine
                self.error = self.error or failure
            finally:
                self._ended.set()
