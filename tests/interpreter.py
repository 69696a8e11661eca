"""Make Triton's interpreter fast enough for tests."""

from __future__ import annotations

import contextlib


def skip_repeated_patching() -> None:
    """Call device functions without patching ``triton.language`` again.

    Every call of one `jit` function by another patches the whole language anew, two milliseconds each time, though the
    launch has done so already. (Triton 3.7.1; where its insides look different, nothing happens.)
    """
    with contextlib.suppress(ImportError, AttributeError):
        from triton.runtime.interpreter import InterpretedFunction

        def call(self, *args, **kwargs):
            return self.rewrite()(*args, **kwargs)

        InterpretedFunction.rewrite  # noqa: B018 - the attribute this relies on
        InterpretedFunction.__call__ = call
