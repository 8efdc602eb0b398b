"""Calls made at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    """What each call returned or raised, every one made by a thread of its own."""
    results: list[Any] = [None] * len(calls)

    def run(place: int) -> None:
        try:
            results[place] = calls[place]()
        except BaseException as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=(place,), daemon=True) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a thread hangs"
    return results
