"""A lock that who gives it back does not have again before one that waits for it."""

from __future__ import annotations

import threading


class FairLock:
    """A reentrant lock. A thread that gives it back does not have it again before one of those that wait (which one,
    Python does not say). With ``threading.RLock`` a thread that makes step after step would starve the others."""

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
