"""Compile every kernel for GPUs that are not here, and read what the assembler says of it.

    python -m specdec_kernels.triton_kernels.aot sm_90

Must run without ``TRITON_INTERPRET``: an interpreted kernel cannot be compiled.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from specdec_kernels.triton_kernels import noise, verify

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one target; registers and spills are None where no tool here can tell."""

    kernel: str
    target: str
    registers: int | None
    spill_bytes: int | None
    widest_load_bits: int | None


@dataclass(frozen=True)
class Variant:
    """One specialisation: types of the arguments, those that are None, constants, warps."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int


def variants(target: str, vocab: int = 128256) -> Iterator[Variant]:
    """Every kernel, for each dtype of logits and each kind of draft."""
    config = verify.launch_config(vocab, TARGETS[target].backend)
    ids = {"seed_ptr": "*i64", "position_ptr": "*i64"}
    yield Variant(
        "noise_words",
        noise.noise_words_kernel,
        ids | {"scalars_ptr": "*i64", "out_ptr": "*i64", "counters": "i32"},
        {"BLOCK": 128},
        4,
    )
    for dtype in ("fp32", "bf16", "fp16"):
        common = ids | {"temperature": "fp32", "vocab": "i32", "temperature_ptr": "*fp32"}
        yield Variant(
            f"sample {dtype}",
            verify.sample_kernel,
            common
            | {"logits_ptr": f"*{dtype}", "row_ptr": "*i64", "tokens_ptr": "*i64", "logprobs_ptr": "*fp32"}
            | {"stats_ptr": "*fp32", "row_stride": "i64"},
            {"TILES": config.tiles},
            config.warps,
        )
        strides = [f"{of}_{what}_stride" for of in ("target", "draft", "token") for what in ("request", "row")]
        chain = common | {
            "target_ptr": f"*{dtype}", "tokens_ptr": "*i64", "num_draft_ptr": "*i32", "longest": "i32",
            "out_tokens_ptr": "*i64", "out_accepted_ptr": "*i32", "out_valid_ptr": "*i1",
        } | dict.fromkeys(strides, "i64")  # fmt: skip
        draft, stats = {"draft_ptr": f"*{dtype}"}, {"draft_stats_ptr": "*fp32"}
        for kind, types in (("point mass", {}), ("dense", draft), ("statistics", draft | stats)):
            nothing = {name: None for name in ("draft_ptr", "draft_stats_ptr") if name not in types}
            yield Variant(
                f"verify_chain {dtype} {kind}",
                verify.verify_chain_kernel,
                chain | types,
                nothing | {"TILES": config.tiles},
                config.warps,
            )


def compile_variant(variant: Variant, target: str) -> Any:
    """Compile for ``target``, pointers, row strides and vocabulary multiples of 16 as they are in practice."""
    names = variant.kernel.arg_names
    signature = {name: variant.types.get(name, "constexpr") for name in names}
    aligned = [
        i
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name.endswith("stride") or name == "vocab"
    ]
    source = ASTSource(
        variant.kernel,
        signature,
        {(names.index(name),): value for name, value in variant.constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    return triton.compile(source, target=TARGETS[target], options={"num_warps": variant.warps})


def usage(variant: Variant, target: str) -> Usage:
    """Compile and look at the machine code."""
    compiled = compile_variant(variant, target)
    if "cubin" not in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", text)[0])
        spilled = int(re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)[0])
        return Usage(variant.name, target, registers, spilled, None)
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        text = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.findall(rf"{what}:(\d+)", text)[0]) for what in ("REG", "STACK", "LOCAL"))
    widths = re.findall(r"ld\.global(?:\.\w+)*\.v(\d)\.b(\d+)", compiled.asm["ptx"])
    return Usage(
        variant.name, target, registers, stack + local, max((int(v) * int(b) for v, b in widths), default=None)
    )


def main(targets: list[str]) -> None:
    """Print a line a kernel and target."""
    for target in targets or list(TARGETS):
        for variant in variants(target):
            print(usage(variant, target))


if __name__ == "__main__":
    main(sys.argv[1:])
