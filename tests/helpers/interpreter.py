"""Make Triton's interpreter fast enough for tests."""

from __future__ import annotations

import contextlib


def skip_repeated_patching() -> None:
    """Call device functions without patching ``triton.language`` again.

    Every call of one `jit` function by another patches the whole language anew, two milliseconds each time, though the
    launch has done so already for kernels, and the first such call for Triton's own functions, whose ``core`` stays
    patched. (Triton 3.7.1; where its insides look different, nothing happens.)
    """
    with contextlib.suppress(ImportError, AttributeError):
        import triton.language as tl
        from triton.runtime import interpreter

        patch, function = interpreter._patch_lang, interpreter.InterpretedFunction
        core_patched = False

        def call(self, *args, **kwargs):
            nonlocal core_patched
            if not core_patched and any(value is tl.core for value in self.fn.__globals__.values()):
                patch(self.fn)
                core_patched = True
            return self.rewrite()(*args, **kwargs)

        function.rewrite  # noqa: B018 - the attribute this relies on
        function.__call__ = call
