"""Gate: whether steps are computed at all, and where threads wait until they are."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Gate:
    """Open at first. While it is closed, threads wait at it without computing anything.

    The thread that closed it would wait for itself: it gets an error instead.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._closed = False
        self._closer: threading.Thread | None = None

    @property
    def closed(self) -> bool:
        return self._closed

    def close(self, by: threading.Thread | None) -> None:
        """Closes it, if it is open.

        Args:
            by: the thread that must not wait here; None when any may.
        """
        with self._changed:
            if not self._closed:
                self._closed, self._closer = True, by

    def open(self) -> None:
        with self._changed:
            self._closed, self._closer = False, None
            self._changed.notify_all()

    def notify(self) -> None:
        """What a waiting thread waits for beside the opening may have happened."""
        with self._changed:
            self._changed.notify_all()

    def check(self) -> None:
        """Raises RuntimeError in the thread that closed the gate."""
        if self._closed and self._closer is threading.current_thread():
            raise RuntimeError(
                "this thread paused the engine and would wait for itself for ever: call engine.resume() first, or "
                "generate in another thread"
            )

    def wait(self, until: Callable[[], bool]) -> None:
        """Waits while the gate is closed and `until()` is false, which is asked again after each `notify`.

        Raises:
            RuntimeError: see `check`.
        """
        with self._changed:
            while self._closed and not until():
                self.check()
                self._changed.wait()
