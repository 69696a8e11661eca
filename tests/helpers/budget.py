"""What the machine code of the CUDA kernels costs, read from it without a GPU.

    python tests/helpers/budget.py [LIBRARY or CUBIN] [--write]  # tests/cuda/budget.txt

Of every kernel for compute capability 9.0: registers, and the instructions that the measuring loops take for eight ids.
And what should be nowhere: loads and stores that do not know their memory, local memory in loops, and float64 beside
exponentials.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

TABLE = Path(__file__).resolve().parents[1] / "cuda" / "budget.txt"
#: 1,024 threads of a multiprocessor, which has 65,536.
REGISTERS = 64
#: Bytes of a logit, by a part of the kernel's name; rows of any dtype are measured by code that is not counted.
ELEMENT_BYTES = {"BFloat16": 2, "Half": 2, "If": 4}
#: The measuring loops are those that load 16 bytes at a time and let them leave the cache first.
ROW_LOAD = "LDG.E.EF.128"
#: An instruction may jump or call; what only a warp that diverged takes is left aside. LEAVES: nothing follows it.
#: ENDS: something else may begin behind it.
JUMP = re.compile(r"(?:@!?U?P\w+\s+)?(?:BRA|CALL)(?!\.DIV)\S* (?:.*, )?(0x[0-9a-f]+)")
LEAVES = re.compile(r"BRA 0x|EXIT|RET|BRX")
ENDS = re.compile(r"(?:@!?U?P\w+\s+)?(?:BRA|EXIT|RET|BRX)")


@dataclass
class Kernel:
    """One kernel, with the functions that it calls."""

    name: str
    registers: int = 0
    code: list[tuple[int, str]] = field(default_factory=list)

    @cached_property
    def flow(self) -> list[tuple[list[str], set[int]]]:
        """The blocks that can be reached: the names of their instructions, and what leads there."""
        jumps = {address: int(found[1], 16) for address, text in self.code if (found := JUMP.match(text))}
        begins = {self.code[0][0], *jumps.values()} | {address + 16 for address, text in self.code if ENDS.match(text)}
        names: list[list[str]] = []
        after: list[set[int]] = []
        number = {address: n for n, address in enumerate(sorted(begins & {address for address, _ in self.code}))}
        for address, text in self.code:
            if address in number:
                names.append([])
                after.append(set())
            names[-1].append(operation(text))
            after[-1] |= {number[jumps[address]]} if address in jumps else set()
            after[-1] |= {number[address + 16]} if address + 16 in number and not LEAVES.match(text) else set()
        # A table of jumps says nothing of where they lead: to all that nothing else leads to, but for what only a warp
        # that diverged takes.
        led = {0}.union(*after)  # the first begins by itself
        table = {n for n, own in enumerate(names) if n not in led and not any(op.startswith("WARPSYNC") for op in own)}
        reached: set[int] = set()
        found = [0]
        while found:
            if (block := found.pop()) not in reached:
                reached.add(block)
                after[block] |= table if "BRX" in names[block] else set()
                found += after[block]
        before: list[set[int]] = [set() for _ in names]
        for block in reached:
            for following in after[block]:
                before[following].add(block)
        return list(zip(names, before, strict=True))

    @cached_property
    def bodies(self) -> list[set[int]]:
        """The blocks of each loop. A loop is what leads back to where all that leads into it begins."""
        bodies: dict[int, set[int]] = {}
        for begin, (_, before) in enumerate(self.flow):
            for end in before:
                body, found = {begin}, [end]
                while found and (0 not in body or begin == 0):  # no loop if all of the kernel leads into it
                    if (block := found.pop()) not in body:
                        body.add(block)
                        found += self.flow[block][1]
                if 0 not in body - {begin}:
                    bodies[begin] = bodies.get(begin, set()) | body
        return list(bodies.values())

    def loops(self, having: str) -> Iterator[list[str]]:
        """The instructions of the innermost loops that have one, by their names."""
        those = [body for body in self.bodies if any(having in self.flow[block][0] for block in body)]
        for body in those:
            if not any(other < body for other in those):
                yield [name for block in sorted(body) for name in self.flow[block][0]]

    def measuring(self) -> Iterator[list[str]]:
        """The loops that measure rows, but for the ends of rows and what has to be processed."""
        for body in self.loops(ROW_LOAD):
            if {name for name in body if name.startswith("LDG")} == {ROW_LOAD}:
                yield body

    def eight_ids(self) -> list[float]:
        """Instructions for eight ids of each measuring loop: without sums, with them, with the largest of tiles."""
        size = next((bytes_ for part, bytes_ in ELEMENT_BYTES.items() if part in self.name), 0)
        if not size:
            return []
        return sorted(round(8 * len(body) / (16 // size * body.count(ROW_LOAD)), 1) for body in self.measuring())

    def spilled(self) -> int:
        """Loads and stores of local memory, wherever they are."""
        return len(spills(operation(text) for _, text in self.code))

    @cached_property
    def spilled_in_loops(self) -> list[str]:
        """Those that are in a loop, be it one that goes from node to node or writes what was found."""
        blocks = set().union(*self.bodies)
        return spills(name for block in blocks for name in self.flow[block][0])

    def wrong(self) -> list[str]:
        """What should not be there."""
        said = [f"{self.registers} registers"] if self.registers > REGISTERS else []
        said += sorted({f"{op} anywhere" for _, text in self.code if re.match(r"(LD|ST)(\.|$)", op := operation(text))})
        said += sorted({f"{op} in a loop" for op in self.spilled_in_loops})
        float64 = re.compile(r"D(ADD|MUL|FMA|SETP)")
        said += sorted(
            {f"{op} in a loop with exponentials" for body in self.loops("MUFU.EX2") for op in body if float64.match(op)}
        )
        return said


def spills(names: Iterable[str]) -> list[str]:
    """Those that load or store local memory."""
    return [name for name in names if name[:3] in ("LDL", "STL")]


@cache
def operation(text: str) -> str:
    """The name of an instruction, without what it depends on."""
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def tool() -> Path:
    """cuobjdump, which Triton brings."""
    return Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


#: What the programs are for, by the names of their classes and of what is in their types.
PROGRAMS = {
    ".*VerifyChain": "verify_chain", "Verify": "walk_tree", "Cooperative": "descend_tree",
    "Sample": "sample", "Children": "sample_children",
}  # fmt: skip
DTYPES = {"Children": "", ".*BFloat16": "bf16", ".*Half": "f16", ".*Mixed": "mixed", "": "f32"}
RULES = {
    "Cooperative.*VerifyChain": "block", ".*ByE0": "token", ".*(ByE1|Lb0)": "plain", ".*(ByE2|Lb1)": "coupled", "": "",
}  # fmt: skip


def short(name: str) -> str:
    """A mangled name without its namespaces and arguments."""
    match = re.search(r"program_kernelI\w*?\d+([A-Z][a-z]+Program\w*)", name)
    tables = (PROGRAMS, DTYPES, RULES) if match else ()
    said = [next(text for part, text in table.items() if re.match(part, match[1])) for table in tables]
    return " ".join(filter(None, said))


def machine_code(path: Path, *options: str) -> list[Kernel]:
    """All kernels of a library or a cubin; ``options`` of cuobjdump may choose among those of a library."""
    command = [tool(), *options, "-res-usage", "-sass", path]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers = dict(re.findall(r"Function (\w+):\s+REG:(\d+)", said))
    found = []
    for part in re.split(r"\n\s*Function : ", said)[1:]:
        name = part.split("\n", 1)[0].strip()
        code = [(int(a, 16), text.strip()) for a, text in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+([^;]*);", part)]
        found.append(Kernel(name, int(registers[name]), code))
    return found


def kernels(path: Path, architecture: str = "sm_90") -> list[Kernel]:
    """Those of a library or a cubin that go over rows of logits."""
    found = [kernel for kernel in machine_code(path, "-arch", architecture) if short(kernel.name)]
    return sorted(found, key=lambda kernel: short(kernel.name))


def lines(found: list[Kernel]) -> list[str]:
    """The table; behind the numbers what should not be there. Spilled: loads and stores of registers that were, of
    which so many are in loops."""
    head = f"{'kernel':26} {'registers':>9} {'code':>6} {'spilled':>7} {'in loops':>8}  "
    head += f"{'for eight ids':26}  what should go"
    return [head] + [
        f"{short(k.name):26} {k.registers:9} {len(k.code):6} {k.spilled():7} {len(k.spilled_in_loops):8}  "
        f"{' '.join(map(str, k.eight_ids())):26}  {', '.join(k.wrong())}".rstrip()
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
