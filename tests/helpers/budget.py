"""What the machine code of the CUDA kernels costs, read from it without a GPU.

    python tests/helpers/budget.py [LIBRARY or CUBIN] [--write]  # tests/cuda/budget.txt

Of every kernel for compute capability 9.0: registers, and the instructions that the measuring loops take for eight ids.
And what should be nowhere: loads and stores that do not know their memory, local memory and float64 in innermost loops.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

TABLE = Path(__file__).resolve().parents[1] / "cuda" / "budget.txt"
#: 1,024 threads of a multiprocessor, which has 65,536.
REGISTERS = 64
#: Bytes of a logit, by a part of the kernel's name; rows of any dtype are measured by code that is not counted.
ELEMENT_BYTES = {"BFloat16": 2, "Half": 2, "If": 4}
#: The measuring loops are those that load 16 bytes at a time and let them leave the cache first.
ROW_LOAD = "LDG.E.EF.128"


@dataclass
class Kernel:
    """One kernel, with the functions that it calls."""

    name: str
    registers: int = 0
    code: list[tuple[int, str]] = field(default_factory=list)

    def loops(self) -> Iterator[list[str]]:
        """The instructions of each innermost loop, by their names."""
        ends = []
        for address, text in self.code:
            target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
            if target is not None and int(target[1], 16) <= address:
                ends.append((int(target[1], 16), address))
        for begin, end in ends:
            if not any(begin <= a and b <= end for a, b in ends if (a, b) != (begin, end)):
                yield [operation(text) for address, text in self.code if begin <= address <= end]

    def measuring(self) -> Iterator[list[str]]:
        """The loops that measure rows, but for the ends of rows and what has to be processed."""
        for body in self.loops():
            if ROW_LOAD in body and {name for name in body if name.startswith("LDG")} == {ROW_LOAD}:
                yield body

    def eight_ids(self) -> list[float]:
        """Instructions for eight ids of each measuring loop: without sums, with them, with the largest of tiles."""
        size = next((bytes_ for part, bytes_ in ELEMENT_BYTES.items() if part in self.name), 0)
        if not size:
            return []
        return sorted(round(8 * len(body) / (16 // size * body.count(ROW_LOAD)), 1) for body in self.measuring())

    def wrong(self) -> list[str]:
        """What should not be there."""
        said = [f"{self.registers} registers"] if self.registers > REGISTERS else []
        said += sorted({f"{op} anywhere" for _, text in self.code if re.match(r"(LD|ST)(\.|$)", op := operation(text))})
        said += sorted(
            {f"{op} in a measuring loop" for body in self.measuring() for op in body if op[:3] in ("LDL", "STL")}
        )
        float64 = re.compile(r"D(ADD|MUL|FMA|SETP)")
        said += sorted(
            {
                f"{op} in a loop over logits"
                for body in self.loops()
                if "MUFU.EX2" in body
                for op in body
                if float64.match(op)
            }
        )
        return said


def operation(text: str) -> str:
    """The name of an instruction, without what it depends on."""
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def tool() -> Path:
    """cuobjdump, which Triton brings."""
    return Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def short(name: str) -> str:
    """A mangled name without its namespaces and arguments."""
    match = re.search(r"\d+((?:verify|walk|descend|sample)\w*?_kernel)(I\w*?E)?Ev|\d+(sample_children_kernel)", name)
    if match is None:
        return ""
    kernel, types = match[1] or match[3], match[2] or ""
    dtype = next((d for key, d in (("BFloat16", "bf16"), ("Half", "f16"), ("Mixed", "mixed")) if key in types), "f32")
    which = {"0": "token", "1": "block", "2": "coupled"} if "Rule" in types else {"0": "plain", "1": "coupled"}
    number = re.search(r"(?:Rule|Lb)E?(\d)E", types)
    return " ".join(
        [kernel.removesuffix("_kernel"), *([dtype] if types else []), *([which[number[1]]] if number else [])]
    )


def kernels(path: Path) -> list[Kernel]:
    """Those of a library or a cubin for compute capability 9.0 that go over rows of logits."""

    def said(*options: str) -> str:
        command = [tool(), "-arch", "sm_90", *options, path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    registers = dict(re.findall(r"Function (\w+):\s+REG:(\d+)", said("-res-usage")))
    found = []
    for part in re.split(r"\n\s*Function : ", said("-sass"))[1:]:
        name = part.split("\n", 1)[0].strip()
        code = [(int(a, 16), text.strip()) for a, text in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+([^;]*);", part)]
        if short(name):
            found.append(Kernel(name, int(registers.get(name, 0)), code))
    return sorted(found, key=lambda kernel: short(kernel.name))


def lines(found: list[Kernel]) -> list[str]:
    """The table; behind the numbers what should not be there."""
    head = f"{'kernel':32} {'registers':>9} {'code':>7}  {'instructions for eight ids':26}  what should go"
    return [head] + [
        f"{short(k.name):32} {k.registers:9} {len(k.code):7}  {' '.join(map(str, k.eight_ids())):26}  "
        f"{', '.join(k.wrong())}".rstrip()
        for k in found
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("library", nargs="?", type=Path, default=Path("specdec_kernels/lib/libspecdec_cuda.so"))
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    read = kernels(arguments.library)
    print(*lines(read), sep="\n")
    if arguments.write:
        TABLE.write_text("\n".join(lines(read)) + "\n")
