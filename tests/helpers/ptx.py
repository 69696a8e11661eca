"""Kernels as Triton compiles them for a GPU (sm_90), executed on a CPU: their PTX, by tests/ptx/machine.cpp.

    TRITON_INTERPRET=0 python tests/helpers/ptx.py chains 18 180 2500  # 180 batches of 18 forms, ids of 2500
    TRITON_INTERPRET=0 python tests/helpers/ptx.py calls sample "verify_tree walk"
    SPECDEC_TEST_PTX=1 pytest tests/ops -k triton   # tests of the backend

What the interpreter cannot show: what Triton's compiler makes of a kernel, programs that run side by side, and whether
all that they hand each other is ordered by barriers, releases and acquires.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import random
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec_kernels import selftest
from specdec_kernels.ops.backends import NATIVE_LIBRARY

#: In the order of `begin` in tests/ptx/machine.cpp; parameters follow.
SPECIAL = ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z")
INSTRUCTION = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)")
MEMORY = re.compile(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\w+))?\s*\]")
#: Instructions of a warp, after which a launch is taken to wait for ever.
LIMIT = 200_000_000


class _Grid(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_uint32 * 3), ("warps", ctypes.c_int), ("shared", ctypes.c_int), ("resident", ctypes.c_int),
        ("seed", ctypes.c_uint32), ("limit", ctypes.c_uint64),
    )  # fmt: skip


@cache
def machine() -> ctypes.CDLL:
    library = ctypes.CDLL(str(NATIVE_LIBRARY.with_name("libspecdec_ptx.so")))
    library.ptx_read.restype = ctypes.c_void_p
    library.ptx_run.restype = ctypes.c_bool
    return library


@dataclass
class Machine:
    """What executes launches: another GPU for each, and another order of its warps, by chance."""

    random: random.Random

    @property
    def processors(self) -> int:
        return self.random.choice((1, 2, 4, 9))

    @property
    def resident(self) -> int:
        """Blocks that are there at a time: where they are few, most find what others left."""
        return self.random.choice((1, 5, 30))


class Program:
    """The text of one kernel. Registers are numbered: `SPECIAL`, parameters, then as they come."""

    def __init__(self, text: str) -> None:
        parameters = len(re.findall(r"^\s*\.param", text, re.M))
        self._registers = {name: i for i, name in enumerate((*SPECIAL, *(f"param_{i}" for i in range(parameters))))}
        self._constants: dict[int, int] = {}
        self._labels: dict[str, int] = {}
        code = [(line, each) for line, row in enumerate(text.splitlines(), 1) for each in self._statements(row)]
        lines = []
        for line, statement in code:
            if statement.endswith(":"):
                self._labels[statement[:-1]] = len(lines)
            else:
                lines.append((line, statement))
        instructions = [self._instruction(*each) for each in lines]
        constants = [f"{register} {bits}" for register, bits in self._constants.items()]
        made = "\n".join([f"{len(self._registers)} {len(constants)}", *constants, *instructions])
        error = ctypes.create_string_buffer(1000)
        self._handle = machine().ptx_read(made.encode(), error, len(error))
        if not self._handle:
            raise NotImplementedError(error.value.decode())

    @staticmethod
    def _statements(row: str) -> Iterator[str]:
        """Instructions and labels of a line, which may be of inline assembly: some within braces."""
        for each in re.sub(r"//.*", "", row).split(";"):
            statement = re.sub(r"^[{}\s]*(?:\.reg[^;]*$)?", "", each).strip()
            if re.match(r"\$?\w+:$|@|[a-z]", statement):
                yield statement

    def _register(self, name: str) -> int:
        return -1 if name == "_" else self._registers.setdefault(name, len(self._registers))

    def _operand(self, text: str) -> int:
        """Of a register, a constant, or the begin of shared memory."""
        if text == "global_smem":
            text = "0"
        if re.match(r"%|_|[a-z]", text):  # inline assembly names registers as it likes
            return self._register(text)
        bits = int(text[2:], 16) if text[:2] in ("0f", "0d") else int(text.rstrip("U"), 0)
        register = self._register(f"constant {bits}")
        self._constants[register] = bits % 2**64
        return register

    def _operands(self, text: str) -> list[int]:
        return [self._operand(each) for each in re.split(r"[{},\s|]+", text) if each]

    def _instruction(self, line: int, statement: str) -> str:
        negated, guard, name, rest = INSTRUCTION.fullmatch(statement).groups()
        addresses = list(MEMORY.finditer(rest))
        immediate = 0
        if name.startswith("bra"):
            immediate, operands = self._labels[rest.strip()], []
        elif "wait_group" in name:
            immediate, operands = int(rest), []
        elif name.startswith("ld.param"):
            register, parameter = re.fullmatch(r"(%\w+),\s*\[\w+_(param_\d+)\]", rest).groups()
            name = "cvt.s64.s32" if name.endswith("s32") else name.replace("ld.param", "mov")
            operands = self._operands(f"{register}, {parameter}")
        elif len(addresses) == 2:  # cp.async: to, from, bytes, how many of them are there
            size, *given = rest[addresses[1].end() :].strip(", ").split(",")
            name, operands = (
                "cp.async",
                self._operands(" ".join((*(x[1] for x in addresses), size, *(given or [size])))),
            )
            if any(int(x[2] or "0", 0) for x in addresses):
                raise NotImplementedError(statement)
        elif addresses:
            (address,) = addresses
            immediate = int(address[2] or "0", 0)
            operands = self._operands(rest[: address.start()] + rest[address.end() :])
            first = {"st": 0, "stmatrix": 0, "red": 0, "atom": 1}.get(name.partition(".")[0], len(operands))
            operands.insert(first, self._operand(address[1]))
        else:
            if name.startswith("mov") and "{" in rest:
                name = name.replace("mov", "unpack" if rest.startswith("{") else "pack")
            operands = self._operands(rest)
        guarded = -1 if guard is None else self._register(guard)
        return " ".join(map(str, (name, guarded, int(bool(negated)), immediate, line, len(operands), *operands)))

    def run(
        self,
        size: Sequence[int],
        warps: int,
        shared: int,
        parameters: list[int],
        tensors: Iterable[Tensor],
        how: Machine,
    ) -> None:
        """One launch, to its end; an error that names the line of the PTX where something is wrong."""
        grid = _Grid((ctypes.c_uint32 * 3)(*size), warps, shared, how.resident, how.random.randrange(2**31), LIMIT)
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        regions = [x for begin, size in storages.items() for x in (begin, begin + size)]
        error = ctypes.create_string_buffer(1000)
        if not machine().ptx_run(
            ctypes.c_void_p(self._handle), ctypes.byref(grid), (ctypes.c_uint64 * len(regions))(*regions),
            len(storages), (ctypes.c_uint64 * len(parameters))(*parameters), len(parameters), error, len(error),
        ):  # fmt: skip
            raise RuntimeError(error.value.decode())


def _flat(each: Any) -> Iterator[Any]:
    if isinstance(each, tuple):
        for part in each:
            yield from _flat(part)
    else:
        yield each


def _bits(value: Any, kind: str) -> int:
    if kind.startswith("*"):
        return value.data_ptr()
    return struct.unpack("<I", struct.pack("<f", value))[0] if kind == "fp32" else int(value) % 2**64


def launcher(how: Machine) -> Callable[[Any, Any], Callable[..., None]]:
    """What stands in for Triton's own launcher (`specdec_kernels.bench.host.stand_in_driver`)."""
    from triton.runtime.cache import get_cache_manager

    def of_kernel(source: Any, metadata: Any) -> Callable[..., None]:
        path = get_cache_manager(metadata.hash).get_file(f"{metadata.name}.ptx")
        program = Program(Path(path).read_text())
        kinds = list(_flat(tuple(source.signature.values())))

        def launched(x: int, y: int, z: int, *rest: Any) -> None:
            values = list(_flat(rest[-len(source.signature) :]))
            given = [(value, kind) for value, kind in zip(values, kinds, strict=True) if kind != "constexpr"]
            parameters = [_bits(*each) for each in given] + [0, 0]  # scratch memory, which no kernel has
            tensors = [value for value, _ in given if isinstance(value, Tensor)]
            program.run((x, y, z), metadata.num_warps, metadata.shared, parameters, tensors, how)

        return launched

    return of_kernel


def on_cpu(how: Machine) -> None:
    """From now on backend "triton" takes tensors on a CPU, and each launch executes the PTX. What stands in stays: for
    processes of their own, without TRITON_INTERPRET."""
    from specdec_kernels.bench.host import stand_in_triton
    from specdec_kernels.triton_kernels import launch

    torch.set_num_threads(1)
    stand_in_triton(launcher(how))
    launch.processors_of = lambda device: how.processors  # type: ignore[assignment]


def check(names: Iterable[str]) -> None:
    """Of those calls that the self-test makes on a GPU: an error where one does not return what the reference does."""
    seed = torch.arange(selftest.common.BATCH)
    calls, by_reference = (dict(selftest.gpu.calls(backend, seed)) for backend in ("triton", "reference"))
    for name in names:
        for _ in range(16):
            torch.testing.assert_close(calls[name](), by_reference[name](), rtol=1e-5, atol=1e-5, equal_nan=True)
            seed += 1


def main() -> None:
    """Chains or trees of the self-test, or calls by their names, by what a GPU would run."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="what", required=True)
    for name in ("chains", "trees"):
        command = commands.add_parser(name)
        command.add_argument("forms", type=int, help="of calls, for each of which kernels are compiled")
        command.add_argument("batches", type=int)
        command.add_argument("vocabs", type=int, nargs="+")
    commands.add_parser("calls").add_argument("names", nargs="+")
    chosen = parser.parse_args()
    on_cpu(Machine(random.Random(0)))
    if chosen.what == "calls":
        check(chosen.names)
        return
    report = selftest.Report()
    every = {"chains": selftest.check_chains, "trees": selftest.check_trees}[chosen.what]
    every(report, "triton", "cpu", chosen.batches, tuple(chosen.vocabs), selftest.Selection(chosen.forms))
    print(json.dumps(asdict(report)))


if __name__ == "__main__":
    main()
