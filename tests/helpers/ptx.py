"""Kernels as they are compiled for a GPU (sm_90), executed on a CPU: their PTX, by tests/ptx/machine.cpp.

    TRITON_INTERPRET=0 python tests/helpers/ptx.py triton chains 18 180 2500  # 180 batches of 18 forms, ids of 2500
    python tests/helpers/ptx.py cuda calls sample "verify_tree walk"
    SPECDEC_TEST_PTX=cuda pytest tests/ops -k cuda   # tests of a backend

What neither Triton's interpreter nor the emulated CUDA programs can show: what the compiler makes of a kernel, programs
that run side by side, and whether all that they hand each other is ordered by barriers, releases and acquires.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import random
import re
import struct
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import budget
import torch
import versions
from torch import Tensor

from specdec_kernels import selftest
from specdec_kernels.ops import backends
from specdec_kernels.reference.schema import define

#: In the order of `begin` in tests/ptx/machine.cpp.
SPECIAL = ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z")
#: Of a kernel, or of a function with its results: the name, the parameters, what the assembler is told.
FUNCTION = re.compile(r"^(?:\.\w+ )*\.(?:entry|func)\s+(?:\(([^)]*)\)\s*)?([\w$]+)\s*(?:\(([^)]*)\))?[^;{}()]*\{", re.M)
BRACE = re.compile(r"[{}]")
VARIABLE = re.compile(r".*?\.[busf](\d+)\b.*?([\w$]+)(?:\[(\d*)\])?\s*", re.S)
STATEMENT = re.compile(r"\s*([{}]|[$\w]+:(?!:)|\.loc\b.*|[^;{}\s][^;]*;)")
INSTRUCTION = re.compile(r"(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
CALL = re.compile(r"call(?:\.uni)?\s+(?:\((\w+)\)\s*,\s*)?([\w$]+)\s*(?:,\s*\(([^)]*)\))?\s*;")
MEMORY = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]")
#: Instructions of a warp, after which a launch is taken to wait for ever.
LIMIT = 200_000_000


class _Grid(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_uint32 * 3), ("warps", ctypes.c_int), ("shared", ctypes.c_int), ("resident", ctypes.c_int),
        ("seed", ctypes.c_uint32), ("limit", ctypes.c_uint64),
    )  # fmt: skip


@cache
def machine() -> ctypes.CDLL:
    library = ctypes.CDLL(str(backends.NATIVE_LIBRARY.with_name("libspecdec_ptx.so")))
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


class _Memory:
    """Variables one behind the other."""

    bytes = 0

    def add(self, declared: str) -> dict[str, tuple[int, int]]:
        """Where those begin that are declared, as parameters are, and how many bytes they have."""
        places = {}
        for each in filter(str.strip, declared.split(",")):
            bits, name, count = VARIABLE.fullmatch(each).groups()
            places[name] = (self.bytes, int(bits) // 8 * (1 if count is None else int(count or 0)))
            self.bytes += -(-places[name][1] // 16) * 16
        return places


class _Function(NamedTuple):
    """A kernel, or what is called."""

    results: str
    parameters: str
    body: str
    line: int
    """Where the body begins."""

    def statements(self) -> Iterator[tuple[int, str]]:
        """With their lines: braces, labels, declarations and instructions."""
        at, line = 0, self.line
        while found := STATEMENT.match(self.body, at):
            line += self.body.count("\n", at, found.start(1))
            yield line, found[1]
            line += self.body.count("\n", found.start(1), found.end())
            at = found.end()
        if self.body[at:].strip():
            raise NotImplementedError(f"line {line}: {self.body[at : at + 80]}")


@cache  # one file has many kernels
def functions(text: str) -> dict[str, _Function]:
    """Those that a file defines, by name."""
    text = re.sub(r"//.*", "", text)
    found = {}
    for head in FUNCTION.finditer(text):
        depth, end = 0, head.end()
        for brace in BRACE.finditer(text, head.end() - 1):
            depth, end = depth + (1 if brace[0] == "{" else -1), brace.start()
            if depth == 0:
                break
        line = text.count("\n", 0, head.end()) + 1
        found[head[2]] = _Function(head[1] or "", head[3] or "", text[head.end() : end], line)
    return found


class Program:
    """One kernel of a file, with the functions that it calls. Registers have numbers: `SPECIAL`, then as they come; so
    has what is constant, such as the address of a variable. No function calls itself, so each has one place for its
    parameters in the memory of every lane, and one register that says where a lane returns to."""

    def __init__(self, text: str, kernel: str | None = None) -> None:
        self._functions = functions(text)
        kernel = kernel or next(iter(self._functions))
        self._registers = 0
        self._constants: dict[int, int] = {}  # by register
        self._of_bits: dict[int, int] = {}
        self._shared, self._own = _Memory(), _Memory()
        #: From the outermost on. "%r<" is there for all of %r0, %r1, ...
        self._scopes = [{name: self._new() for name in SPECIAL}]
        for declared in re.findall(r"^\s*(?:\.\w+ )*\.shared ([^;]*);", text, re.M):
            self._declare(self._shared.add(declared))
        self._labels: dict[str, int] = {}
        self._instructions: list[list[Any]] = []
        #: Of functions: where their parameters and their results are, and the register that says where they return to.
        self._called: dict[str, tuple[list[int], list[int], int]] = {}
        self._emit(0, "bra", immediate=kernel)
        self._parameters = self._place(kernel, "ret")
        for each in self._instructions:
            each[3] = self._labels.get(each[3], each[3])
        lines = [" ".join(map(str, each)) for each in self._instructions]
        constants = [f"{register} {bits}" for register, bits in self._constants.items()]
        head = f"{self._registers} {self._own.bytes} {len(constants)}"
        error = ctypes.create_string_buffer(1000)
        self._handle = machine().ptx_read("\n".join([head, *constants, *lines]).encode(), error, len(error))
        if not self._handle:
            raise NotImplementedError(error.value.decode())

    def _new(self) -> int:
        self._registers += 1
        return self._registers - 1

    def _constant(self, bits: int) -> int:
        bits %= 2**64
        if bits not in self._of_bits:
            self._of_bits[bits] = self._new()
            self._constants[self._of_bits[bits]] = bits
        return self._of_bits[bits]

    def _declare(self, places: dict[str, tuple[int, int]]) -> list[int]:
        """Variables of the innermost scope: their names are their addresses."""
        self._scopes[-1] |= {name: self._constant(address) for name, (address, _) in places.items()}
        return [address for address, _ in places.values()]

    def _operand(self, text: str) -> int:
        """The register of a name, or of a constant; of what is left out -1."""
        if text == "_":
            return -1
        if re.match(r"-?\d", text):
            return self._constant(int(text[2:], 16) if text[:2] in ("0f", "0d") else int(text.rstrip("U"), 0))
        numbered = text.rstrip("0123456789") + "<"
        for scope in reversed(self._scopes):
            if text in scope:
                return scope[text]
            if numbered in scope:
                return scope.setdefault(text, self._new())
        raise NotImplementedError(f"{text} was not declared")

    def _operands(self, text: str) -> list[int]:
        return [self._operand(each) for each in re.split(r"[{},\s|]+", text) if each]

    def _emit(self, line: int, name: str, *operands: int, guard: tuple[int, int] = (-1, 0), immediate: Any = 0) -> None:
        """An instruction; ``guard``: a register, and whether it has to be false; `immediate`: a label or a number."""
        self._instructions.append([name, *guard, immediate, line, len(operands), *operands])

    def _place(self, name: str, returns: str = "return") -> list[tuple[int, int]]:
        """A function behind those that it calls: a lane in one is behind those that wait for it to return. Where its
        parameters are, with their sizes."""
        function = self._functions[name]
        parameters, results = self._own.add(function.parameters), self._own.add(function.results)
        for called in CALL.finditer(function.body):
            if called[2] not in self._called:
                self._place(called[2])
        self._scopes.append({})
        back = [self._new()] if returns == "return" else []
        self._called[name] = self._declare(parameters), self._declare(results), *back
        self._labels[name] = len(self._instructions)
        for line, statement in function.statements():
            if statement == "{":
                self._scopes.append({})
            elif statement == "}":
                self._scopes.pop()
            elif statement.endswith(":"):
                self._labels[statement[:-1]] = len(self._instructions)
            elif statement.startswith((".reg", ".param")):
                names = re.findall(r"([%\w$]+<?)(?:\d+>|\[\d+\])?\s*[,;]", statement)
                self._scopes[-1] |= {each: self._new() for each in names}
            elif not statement.startswith((".loc", ".pragma", ".shared")):
                self._instruction(line, statement, returns, back)
        self._scopes.pop()
        return list(parameters.values())

    def _instruction(self, line: int, statement: str, returns: str, back: list[int]) -> None:
        negated, guarded, name, rest = INSTRUCTION.fullmatch(statement[:-1]).groups()
        guard = (-1, 0) if guarded is None else (self._operand(guarded), int(bool(negated)))
        addresses = list(MEMORY.finditer(rest))
        immediate: Any = 0
        operands: list[int] = []
        if call := CALL.match(statement):
            self._call(line, *call.groups())
            return
        if name == "ret":
            name, operands = returns, back
        elif name.startswith("bra"):
            immediate = rest.strip()
        elif "wait_group" in name:
            immediate = int(rest)
        elif len(addresses) == 2:  # cp.async: to, from, bytes, how many of them are there
            size, *given = rest[addresses[1].end() :].strip(", ").split(",")
            name = "cp.async"
            operands = self._operands(" ".join((*(x[1] for x in addresses), size, *(given or [size]))))
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
        self._emit(line, name, *operands, guard=guard, immediate=immediate)

    def _call(self, line: int, result: str | None, name: str, parameters: str | None) -> None:
        """What was declared to hand over parameters, and to take the result, is the function's own memory of them."""
        its_parameters, its_results, back = self._called[name]
        given = [each for each in re.split(r"[,\s]+", parameters or "") if each]
        for variable, address in zip([*given, *filter(None, [result])], [*its_parameters, *its_results], strict=True):
            self._constants[self._operand(variable)] = address
        self._emit(line, "mov.b64", back, self._constant(len(self._instructions) + 2))
        self._emit(line, "bra", immediate=name)

    def parameters_at(self, addresses: Any) -> list[bytes]:
        """Those that lie at some addresses."""
        return [ctypes.string_at(addresses[i], size) for i, (_, size) in enumerate(self._parameters)]

    def run(
        self,
        size: Sequence[int],
        warps: int,
        parameters: Iterable[bytes],
        memory: list[int],
        how: Machine,
        shared: int = 0,
        together: bool = False,
    ) -> None:
        """One launch, to its end; an error that names the line of the PTX where something is wrong. ``memory``: pairs
        of addresses in their order. ``together``: the blocks wait for each other."""
        given = bytearray(sum(self._parameters[-1]))
        for (begin, count), value in zip(self._parameters, parameters, strict=True):
            given[begin : begin + count] = value[:count]
        resident = math.prod(size) if together else how.resident
        shared, seed = self._shared.bytes + shared, how.random.randrange(2**31)
        grid = _Grid((ctypes.c_uint32 * 3)(*size), warps, shared, resident, seed, LIMIT)
        error = ctypes.create_string_buffer(1000)
        if not machine().ptx_run(
            ctypes.c_void_p(self._handle), ctypes.byref(grid), (ctypes.c_uint64 * len(memory))(*memory),
            len(memory) // 2, bytes(given), len(given), error, len(error),
        ):  # fmt: skip
            raise RuntimeError(error.value.decode())


def regions(tensors: Iterable[Tensor]) -> list[int]:
    """What the memory of tensors is."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return [x for begin, size in sorted(storages.items()) for x in (begin, begin + size)]


def _flat(each: Any) -> Iterator[Any]:
    if isinstance(each, tuple):
        for part in each:
            yield from _flat(part)
    else:
        yield each


def _bytes(value: Any, kind: str) -> bytes:
    if kind == "fp32":
        return struct.pack("<f", value)
    return struct.pack("<Q", value.data_ptr() if kind.startswith("*") else int(value) % 2**64)


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
            parameters = [_bytes(*each) for each in given] + 2 * [bytes(8)]  # scratch memory, which no kernel has
            tensors = regions(value for value, _ in given if isinstance(value, Tensor))
            program.run((x, y, z), metadata.num_warps, parameters, tensors, how, metadata.shared)

        return launched

    return of_kernel


def triton_on_cpu(how: Machine) -> None:
    from specdec_kernels.bench.host import stand_in_triton
    from specdec_kernels.triton_kernels import launch

    stand_in_triton(launcher(how))
    launch.processors_of = lambda device: how.processors  # type: ignore[assignment]


@cache
def cuda_library() -> ctypes.CDLL:
    """The CUDA backend, with PTX and a runtime that has it executed (tests/ptx/cuda.cpp)."""
    return ctypes.CDLL(str(backends.NATIVE_LIBRARY.with_name("libspecdec_cuda_ptx.so")))


@cache
def cuda_files() -> list[str]:
    """The PTX that nvcc made of each file."""
    command = [budget.tool(), "-ptx", "-arch", "sm_90", cuda_library()._name]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.split(r"^Fatbin ptx code:$", said, flags=re.M)[1:]


@cache
def cuda_program(kernel: str) -> Program:
    return Program(next(text for text in cuda_files() if f".entry {kernel}(" in text), kernel)


#: In the order of tests/ptx/cuda.cpp.
LAUNCHED = ctypes.CFUNCTYPE(
    ctypes.c_bool, ctypes.c_char_p, ctypes.c_uint, ctypes.c_bool, ctypes.POINTER(ctypes.c_void_p),
    ctypes.POINTER(ctypes.c_uint64), ctypes.c_int, ctypes.c_void_p, ctypes.c_int,
)  # fmt: skip


def cuda_on_cpu(how: Machine) -> None:
    library = cuda_library()

    def launched(
        name: bytes, blocks: int, together: bool, arguments: Any, memory: Any, count: int, error: int, size: int
    ) -> bool:
        try:
            program = cuda_program(name.decode())
            program.run(
                (blocks, 1, 1), 8, program.parameters_at(arguments), memory[: 2 * count], how, together=together
            )
            library.ptx_set_processors(how.processors)
        except Exception as failure:  # which would not leave ctypes
            said = f"{failure} ({name.decode()})".encode()[: size - 1] + b"\0"
            ctypes.memmove(error, said, len(said))
            return False
        return True

    library.callback = LAUNCHED(launched)  # and lives as long
    library.ptx_connect(library.callback)
    library.ptx_set_processors(how.processors)
    backends._LIBRARIES.append(define("specdec_ptx", backends._NATIVE_OPS))
    made = backends._native("cuda", "cpu", "CUDA C++, its PTX", Path(library._name), "", "specdec_ptx")
    backends.BACKENDS["cuda"] = made
    backends._FAST["cuda", False] = backends.connected(made)


def on_cpu(backend: str, how: Machine) -> None:
    """From now on a backend takes tensors on a CPU, and each launch executes the PTX. What stands in stays: for
    processes of their own, those of Triton without TRITON_INTERPRET."""
    torch.set_num_threads(1)
    {"triton": triton_on_cpu, "cuda": cuda_on_cpu}[backend](how)


def check(backend: Any, names: Iterable[str], times: int) -> None:
    """Of those calls that the self-test makes on a GPU: an error where one does not return what the reference does."""
    seed = torch.arange(selftest.common.BATCH)
    calls, by_reference = (dict(selftest.gpu.calls(x, seed)) for x in (backend, "reference"))
    for name in names or calls:
        for _ in range(times):
            torch.testing.assert_close(calls[name](), by_reference[name](), rtol=1e-5, atol=1e-5, equal_nan=True)
            seed += 1


def hold_against_the_oracle(backend: str, what: str, forms: int, batches: int, *vocabs: int) -> None:
    """Chains or trees of the self-test, in a process of its own."""
    report = json.loads(versions.compiling(__file__, backend, what, forms, batches, *vocabs))
    assert not report["wrong"]
    assert report["requests"] > batches
    assert report["too_close"] <= report["requests"] / 10


def main() -> None:
    """Chains or trees of the self-test, or calls by their names, by what a GPU would run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("backend", choices=("triton", "cuda"))
    commands = parser.add_subparsers(dest="what", required=True)
    for name in ("chains", "trees"):
        command = commands.add_parser(name)
        command.add_argument("forms", type=int, help="of calls, for each of which kernels are compiled")
        command.add_argument("batches", type=int)
        command.add_argument("vocabs", type=int, nargs="+")
    command = commands.add_parser("calls")
    command.add_argument("names", nargs="*", help="of all where there are none")
    command.add_argument("--times", type=int, default=16, help="each")
    chosen = parser.parse_args()
    on_cpu(chosen.backend, Machine(random.Random(0)))
    if chosen.what == "calls":
        check(chosen.backend, chosen.names, chosen.times)
        return
    report = selftest.Report()
    every = {"chains": selftest.check_chains, "trees": selftest.check_trees}[chosen.what]
    every(report, chosen.backend, "cpu", chosen.batches, tuple(chosen.vocabs), selftest.Selection(chosen.forms))
    print(json.dumps(asdict(report)))


if __name__ == "__main__":
    main()
