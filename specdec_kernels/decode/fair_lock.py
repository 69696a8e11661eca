"""A lock that is given to whoever waits the longest."""

from __future__ import annotations

import threading


class FairLock:
    """A reentrant lock that is fair: a thread that releases it queues behind those already waiting. With
    ``threading.RLock`` a thread that makes step after step would starve the others."""

    def __init__(self) -> None:
        self._turn, self._lock = threading.Lock(), threading.Lock()
        self._owner: int | None = None
        self._depth = 0

    def __enter__(self) -> None:
        own = threading.get_ident()
        if self._owner != own:
            with self._turn:  # which who waits for the lock keeps from all others
                self._lock.acquire()
            self._owner = own
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._owner = None
            self._lock.release()
