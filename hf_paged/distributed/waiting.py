"""What must not go wrong while ranks wait for each other: a Ctrl-C in the middle, and a wait without an end."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from hf_paged.distributed.groups import TensorParallel

logger = logging.getLogger(__name__)

GRACE_S = 10.0
"""How long a device may wait for a rank that is gone, or past the timeout, before the process is ended."""


class Interrupts:
    """Within it Ctrl-C waits for the end, or for `check`."""

    def __init__(self) -> None:
        self._before: Any = None
        self._pending = False

    def __enter__(self) -> None:
        mine = threading.current_thread() is threading.main_thread()
        if mine and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._pending, self._before = False, signal.signal(signal.SIGINT, self._note)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._before is None or threading.current_thread() is not threading.main_thread():
            return
        before, self._before = self._before, None
        signal.signal(signal.SIGINT, before)
        if self._pending and kind is None:
            signal.raise_signal(signal.SIGINT)

    def check(self) -> None:
        """Raises KeyboardInterrupt if one waits; in the thread that it is for."""
        if self._pending and threading.current_thread() is threading.main_thread():
            self._pending = False
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._pending = True


class Watchdog:
    """Ends the process where a device waits for a rank that will never come: nothing else would end that wait."""

    def __init__(self, parallel: TensorParallel) -> None:
        self._link = parallel.link
        self._since: float | None = None
        self._thread: threading.Thread | None = None
        self._needed = parallel.device.type == "cuda"  # gloo ends its own waits

    @contextmanager
    def armed(self) -> Iterator[None]:
        if self._needed and self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="hf_paged watchdog", daemon=True)
            self._thread.start()
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def _watch(self) -> None:
        lost: float | None = None
        while True:
            time.sleep(1.0)
            since, now = self._since, time.monotonic()
            if since is None:
                lost = None
                continue
            gone = self._link.gone()
            lost = (lost or now) if gone else None
            late = now - since > self._link.timeout_s + GRACE_S
            if self._since == since and (late or (lost is not None and now - lost > GRACE_S)):
                who = f"rank {gone[0]} ended" if gone else f"another rank hangs for {now - since:.0f} s"
                logger.critical("rank %d ends: %s in the middle of a step", self._link.rank, who)
                os._exit(1)
