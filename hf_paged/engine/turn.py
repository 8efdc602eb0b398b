"""Turn: one thread at a time computes steps for everybody."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress

import torch


class Turn:
    """A lock that whoever waits for gets a chance to take, and that an interrupt anywhere leaves free."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._working: int | None = None
        """The thread whose turn it is."""
        self._queue: set[int] = set()
        """Threads that wait for it."""

    @property
    def mine(self) -> bool:
        """Whether it is the calling thread's turn."""
        return self._working == threading.get_ident()

    def take(self, work: Callable[[], None], recover: Callable[[], None]) -> None:
        """Does `work` while no other thread does any; if that fails, an interrupt included, `recover` too.

        Raises:
            RuntimeError: called from within `work`.
        """
        me = threading.get_ident()
        if self._working == me:
            raise RuntimeError(
                "the engine is in the middle of a step: a logits processor or stopping criterion cannot generate with "
                "the model that it is called for"
            )
        self._queue.add(me)
        try:
            with self.lock:
                self._working = me
                self._queue.discard(me)
                try:
                    # Whatever mode the caller is in, pools and buffers outlive it.
                    with torch.inference_mode(False), torch.no_grad():
                        work()
                except BaseException:
                    recover()
                    raise
                finally:
                    self._working = None
        finally:
            # Only an interrupt on the way out leaves any of this as it was.
            if self._working == me:
                self._working = None
            with suppress(RuntimeError):
                self.lock.release()
            self._queue.discard(me)
        if self._queue:
            time.sleep(1e-4)  # a lock is not fair: whoever waits gets a chance to take it
