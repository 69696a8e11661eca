"""Make Triton's interpreter fast enough for tests. (Triton 3.7.1; nothing happens where its insides look different.)"""

from __future__ import annotations

import contextlib
import dataclasses
import math


def skip_repeated_work() -> None:
    """Do once what the interpreter does for every operation."""
    with contextlib.suppress(ImportError, AttributeError):
        _skip_repeated_patching()
        _share_types()


def _skip_repeated_patching() -> None:
    """Call device functions without patching ``triton.language`` again.

    Every call of one `jit` function by another patches the whole language anew, two milliseconds each time, though the
    launch has done so already for kernels, and the first such call for Triton's own functions, whose ``core`` stays
    patched.
    """
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


def _share_types() -> None:
    """Tensors of one shape share it, the dtype of arrays is looked up by name, and sums are not computed once more in
    64 bits for an assertion about overflow that is left out unless debugging: all that is half of the time."""
    from triton.language import core
    from triton.runtime import interpreter

    options, lookup = interpreter.interpreter_builder.options, interpreter._get_np_dtype
    assert not options.debug
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    shapes, dtypes, blocks = {}, {}, {}

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        sizes = tuple(type.shape) if type.is_block() else ()
        if sizes not in shapes:
            shapes[sizes] = core.tuple([core.constexpr(size) for size in sizes]), core.constexpr(math.prod(sizes))
        self.shape, self.numel = shapes[sizes]

    def dtype_of_array(dtype):
        if dtype.name not in dtypes:
            dtypes[dtype.name] = lookup(dtype)
        return dtypes[dtype.name]

    make_block = core.block_type.__init__

    def block(self, element_ty, shape):
        key = element_ty.name, *(getattr(size, "value", size) for size in shape)
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = vars(self).copy()
        vars(self).update(blocks[key])

    core.tensor.__init__, core.block_type.__init__ = tensor, block
    interpreter._get_np_dtype = dtype_of_array
    interpreter.TensorHandle.__post_init__ = lambda self: None
