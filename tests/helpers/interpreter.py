"""Make Triton's interpreter fast enough for tests. (Triton 3.7.1; nothing happens where its insides look different.)"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import operator

import numpy as np
import triton.language as tl
from triton.language import core, random, semantic
from triton.runtime import interpreter


def skip_repeated_work() -> None:
    """Do once what the interpreter does for every operation."""
    with contextlib.suppress(AttributeError):
        _skip_repeated_patching()
        _share_types()
        _leave_like_types()
        _leave_like_shapes()
        _compute_operators()
        _compute_philox()


def _skip_repeated_patching() -> None:
    """Call device functions without patching ``triton.language`` again.

    Every call of one `jit` function by another patches the whole language anew, two milliseconds each time, though the
    launch has done so already for kernels, and the first such call for Triton's own functions, whose ``core`` stays
    patched.
    """
    patch, function = interpreter._patch_lang, interpreter.InterpretedFunction
    semantic = interpreter.interpreter_semantic
    core_patched = False

    def call(self, *args, **kwargs):
        nonlocal core_patched
        if not core_patched and any(value is tl.core for value in self.fn.__globals__.values()):
            patch(self.fn)
            core_patched = True
        return self.rewrite()(*args, **kwargs)

    def patch_attribute(obj, name, member, builder, scope):
        operation = getattr(member, "__wrapped__", member)  # without the wrapper that checks it is called so

        def call(*args, **kwargs):
            kwargs["_semantic"] = semantic
            return operation(*args, **kwargs)

        scope.set_attr(obj, name, call)

    function.rewrite, interpreter._patch_attr  # noqa: B018 - the attributes this relies on
    function.__call__, interpreter._patch_attr = call, patch_attribute


def _share_types() -> None:
    """Tensors of one shape share it, the dtype of arrays is looked up by name, and sums are not computed once more in
    64 bits for an assertion about overflow that is left out unless debugging: all that is half of the time."""
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


INTEGERS = {
    dtype.name: range(dtype.get_int_min_value(), dtype.get_int_max_value() + 1)
    for dtype in (getattr(core, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64))
}
FLOATS = {"fp32", "fp64"}  # a quotient of narrower ones is wider
NEVER_PROMOTED = {"int1", *INTEGERS, *FLOATS}


def _gives_way(number, name):
    """Whether beside a tensor of a dtype a number is one of that dtype."""
    kind = type(number)
    return (name in INTEGERS and kind is int and number in INTEGERS[name]) or (name in FLOATS and kind in (int, float))


def _filled(type, value):
    """A tensor of one value."""
    shape = type.shape if type.is_block() else 1
    data = np.full(shape, value, interpreter._get_np_dtype(type.scalar))
    return core.tensor(interpreter.TensorHandle(data, type.scalar), type)


def _leave_like_types() -> None:
    """Two tensors of one shape and type are taken as they are, and a number as one like the tensor beside it: what the
    rules for promoting and broadcasting arrive at, which take most of the time that is left."""
    check = semantic.TritonSemantic.binary_op_type_checking_impl

    def like(tensor, number):
        """The number as such a tensor; None if it is no number, or not of a kind that gives way to the tensor's."""
        return _filled(tensor.type, number or 0) if _gives_way(number, tensor.dtype.name) else None  # -0.0 is 0.0 there

    def check_unlike(self, lhs, rhs, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True, div_or_mod=False):
        if type(lhs) is type(rhs) is core.tensor:
            if lhs.shape is rhs.shape and lhs.dtype.name == rhs.dtype.name and lhs.dtype.name in NEVER_PROMOTED:
                return lhs, rhs
        elif arithmetic_check:
            if type(lhs) is core.tensor and (other := like(lhs, rhs)) is not None:
                return lhs, other
            if type(rhs) is core.tensor and (other := like(rhs, lhs)) is not None:
                return other, rhs
        return check(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    semantic.TritonSemantic.binary_op_type_checking_impl = check_unlike


def _leave_like_shapes() -> None:
    """Tensors of one shape are not broadcast, those of one dtype not cast, and scalars are broadcast at once."""
    rules, equal = semantic.TritonSemantic, core.dtype.__eq__
    broadcast, cast = rules.broadcast_impl_value, rules.cast

    def broadcast_unlike(self, lhs, rhs):
        if lhs.shape is rhs.shape:
            return lhs, rhs
        if not rhs.type.is_block():
            return lhs, _filled(lhs.type.with_element_ty(rhs.dtype), rhs.handle.data)
        if not lhs.type.is_block():
            return _filled(rhs.type.with_element_ty(lhs.dtype), lhs.handle.data), rhs
        return broadcast(self, lhs, rhs)

    def cast_unlike(self, tensor, dtype, *rounding):
        return tensor if tensor.dtype.name == dtype.name else cast(self, tensor, dtype, *rounding)

    def equal_names(self, other):
        return self.name == other.name if type(other) is core.dtype else equal(self, other)

    rules.broadcast_impl_value, rules.cast, core.dtype.__eq__ = broadcast_unlike, cast_unlike, equal_names


COMPARISONS = {f"__{name}__": getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")}
BITWISE = {f"__{name}__": getattr(operator, f"__{name}__") for name in ("and", "or", "xor")}
ARITHMETIC = {f"__{name}__": getattr(operator, name) for name in ("add", "sub", "mul")}
REVERSE = {"__radd__": operator.add, "__rsub__": lambda x, y: y - x, "__rmul__": operator.mul}
OPERATORS = COMPARISONS | BITWISE | ARITHMETIC | REVERSE


def _compute_operators() -> None:
    """An operator of tensors of one shape, or of a tensor and a scalar or a number, is NumPy's own where the dtypes
    leave no doubt, and so is a pointer with an offset: else each goes through ten functions."""
    patch_attribute = interpreter._patch_attr

    def patch_operator(obj, name, member, builder, scope):
        patch_attribute(obj, name, member, builder, scope)
        if obj is core.tensor and name in OPERATORS:
            by_rules = getattr(obj, name)

            def call(lhs, rhs):
                result = _computed(name, lhs, rhs)
                return by_rules(lhs, rhs) if result is None else result

            scope.set_attr(obj, name, call)
        if obj is core.tensor and name == "__getitem__":
            scope.set_attr(obj, name, _with_axes)

    interpreter._patch_attr = patch_operator


def _with_axes(tensor, slices):
    """A tensor with new axes, as NumPy says it too; there are no other slices."""
    assert all(each is None or each == slice(None) for each in slices)
    data = tensor.handle.data[slices]
    return core.tensor(
        interpreter.TensorHandle(data, tensor.handle.dtype), core.block_type(tensor.dtype, list(data.shape))
    )


def _computed(name, lhs, rhs):
    """What an operator gives; None where it takes the rules of the language."""
    rhs = rhs.value if type(rhs) is core.constexpr else rhs
    tensors = type(rhs) is core.tensor
    data = rhs.handle.data if tensors else rhs or 0  # -0.0 is 0.0 there
    if lhs.dtype.is_ptr():
        offset = _offset(lhs.dtype, rhs, data) if name == "__add__" else None
        if offset is None:
            return None
        dtype, result = lhs.dtype, interpreter.TensorHandle(lhs.handle.data + offset, lhs.handle.dtype)
    elif dtype := _dtype_of(name, lhs, rhs):
        result = interpreter.TensorHandle(OPERATORS[name](lhs.handle.data, data), dtype)
    else:
        return None
    if not tensors or rhs.shape is lhs.shape or not rhs.type.is_block():
        return core.tensor(result, _like(lhs.type, dtype))
    return core.tensor(result, core.block_type(dtype, list(result.data.shape)))


def _like(type, dtype):
    """A type of the same shape."""
    return dtype if not type.is_block() else type if type.scalar is dtype else type.with_element_ty(dtype)


def _dtype_of(name, lhs, rhs):
    """Of what an operator gives for two tensors, or a tensor and a number; None where that takes more rules."""
    own = lhs.dtype
    if type(rhs) is not core.tensor:
        known = _gives_way(rhs, own.name)
    elif own.name == rhs.dtype.name:
        known = own.name in NEVER_PROMOTED and (own.name != "int1" or name in BITWISE)
    else:
        known, own = {own.name, rhs.dtype.name} == {"int32", "int64"}, core.int64
    if not known or (name in BITWISE and own.name in FLOATS):
        return None
    return core.int1 if name in COMPARISONS else own


def _offset(pointer, count, data):
    """Bytes of so many elements, a tensor of ``data`` or a number; None if they are not of a kind that is one."""
    size = max(1, pointer.element_ty.primitive_bitwidth // 8)
    if type(count) is int:
        return np.uint64(size * count % 2**64)
    return (
        size * data.astype(np.uint64) if type(count) is core.tensor and count.dtype.name in ("int32", "int64") else None
    )


def _compute_philox() -> None:
    """Ten rounds of Triton's Philox in a few operations of NumPy's in place of 100 of the interpreter's."""
    interpreted, low = random.philox_impl.rewrite(), 0xFFFFFFFF

    def philox(c0, c1, c2, c3, k0, k1, n_rounds=random.N_ROUNDS_DEFAULT):
        given = c0, c1, c2, c3, k0, k1
        if any(each.dtype.name != "uint32" for each in given) or any(each.shape is not c0.shape for each in given[:4]):
            return interpreted(*given, n_rounds)
        c0, c1, c2, c3, k0, k1 = (each.handle.data.astype(np.uint64) for each in given)
        for _ in range(getattr(n_rounds, "value", n_rounds)):
            a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
            c0, c1, c2, c3 = b >> 32 ^ c1 ^ k0, b & low, a >> 32 ^ c3 ^ k1, a & low
            k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
        handles = [interpreter.TensorHandle(words.astype(np.uint32), given[0].dtype) for words in (c0, c1, c2, c3)]
        return core.tuple([core.tensor(handle, given[0].type) for handle in handles])

    random.philox_impl.rewritten_fn[random.philox_impl.fn] = philox
