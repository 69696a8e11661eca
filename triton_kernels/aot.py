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

from specdec_kernels.contract import Children, MaskFormat, Rule, TreeRule
from specdec_kernels.triton_kernels import attention, head, kv, noise
from specdec_kernels.triton_kernels.children import sample_children_kernel
from specdec_kernels.triton_kernels.launch import entries, launch_config
from specdec_kernels.triton_kernels.sample import sample_kernel
from specdec_kernels.triton_kernels.tree_rules import verify_tree_kernel
from specdec_kernels.triton_kernels.trees import packed_kernel, tree_mask_kernel
from specdec_kernels.triton_kernels.verify import verify_chain_kernel

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
    """One specialisation: types of the arguments, those that are None, constants, options of the launch."""

    name: str
    kernel: Any
    types: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, int]


_SCALARS = {"temperature": "fp32", "top_k": "i32", "top_p": "fp32", "min_p": "fp32", "vocab": "i32", "num_edits": "i32"}
_PROCESSING = {
    "bitmask_ptr": "*i32", "edit_ids_ptr": "*i32", "edit_counts_ptr": "*i32", "edit_bias_ptr": "*fp32",
    "penalties_ptr": "*fp32",
}  # fmt: skip
_IDS = {"seed_ptr": "*i64", "position_ptr": "*i64"}


def _sample(dtype: str) -> dict[str, str]:
    """Types of the arguments of ``sample_kernel``, everything given."""
    return {
        **_IDS, **_SCALARS, **_PROCESSING, "logits_ptr": f"*{dtype}", "row_ptr": "*i64", "sampling_ptr": "*fp32",
        "tokens_ptr": "*i64", "logprobs_ptr": "*fp32", "stats_ptr": "*fp32", "tables_ptr": "*fp32",
        "counters_ptr": "*i32", "row_stride": "i64", "slices": "i32",
    }  # fmt: skip


def _verify_chain(dtype: str) -> dict[str, str]:
    """Types of the arguments of ``verify_chain_kernel``, everything given."""
    strides = [f"{of}_{what}_stride" for of in ("target", "draft", "token") for what in ("request", "row")]
    return {
        **_IDS, **_SCALARS, **_PROCESSING, **dict.fromkeys(strides, "i64"), "target_ptr": f"*{dtype}",
        "head_ptr": f"*{dtype}", "head_row_stride": "i64", "width": "i32",
        "draft_ptr": f"*{dtype}", "draft_stats_ptr": "*fp32", "draft_temperatures_ptr": "*fp32",
        "draft_temperature": "fp32", "tokens_ptr": "*i64", "num_draft_ptr": "*i32",
        "cu_rows_ptr": "*i64", "sampling_ptr": "*fp32", "longest": "i32", "tables_ptr": "*fp32",
        "memory_ptr": "*fp64", "counters_ptr": "*i32", "batch": "i32", "slices": "i32",
        "out_tokens_ptr": "*i64", "out_accepted_ptr": "*i32", "out_valid_ptr": "*i1", "out_counters_ptr": "*i32",
        "out_logprobs_ptr": "*fp32", "out_raw_logprobs_ptr": "*fp32",
    }  # fmt: skip


def _verify_tree(dtype: str) -> dict[str, str]:
    """Types of the arguments of ``verify_tree_kernel``, everything given."""
    chain = _verify_chain(dtype)
    gone = (
        "num_draft_ptr", "cu_rows_ptr", "out_counters_ptr", "longest", "token_request_stride", "token_row_stride",
        *_HEAD, "head_row_stride", "width",
    )  # fmt: skip
    own = {"parents_ptr": "*i64", "out_nodes_ptr": "*i32", "nodes": "i32", "replacement": "i32"}
    return {name: kind for name, kind in chain.items() if name not in gone} | own


#: What is given where logits are made of hidden states.
_HEAD = ("head_ptr",)
#: What the plain call of a serving loop leaves out.
_EXTRAS = (
    "sampling_ptr",
    "draft_temperatures_ptr",
    *_PROCESSING,
    "cu_rows_ptr",
    "out_logprobs_ptr",
    "out_raw_logprobs_ptr",
)
#: What a call leaves out by the kind of its drafts.
_DRAFTS = {"point mass": ("draft_ptr", "draft_stats_ptr"), "dense": ("draft_stats_ptr",), "statistics": ()}
#: (rule, kind of drafts, whether everything else is given too) beside the plain token rule.
_OTHERS = (
    (Rule.TOKEN, "point mass", False), (Rule.TOKEN, "dense", False), (Rule.TOKEN, "statistics", True),
    (Rule.BLOCK, "dense", False), (Rule.BLOCK, "statistics", False), (Rule.BLOCK, "statistics", True),
    (Rule.COUPLED, "point mass", False), (Rule.COUPLED, "point mass", True),
)  # fmt: skip


def _attention_and_kv() -> Iterator[Variant]:
    """Heads of 128 in bfloat16; paged keys and values of 2 bytes an element."""
    partial = {"best_ptr": "*fp32", "total_ptr": "*fp32", "mixed_ptr": "*fp32"}
    sizes = dict.fromkeys(("nodes", "rows", "kv_heads", "group", "splits"), "i32")
    shape = {"WIDTH": 128, "WIDE": 128}
    strides = dict.fromkeys([f"{x}_{of}" for x in "kv" for of in ("batch", "head", "token")], "i64")
    types = {
        **partial, **sizes, **strides, **dict.fromkeys(("query_ptr", "key_ptr", "value_ptr"), "*bf16"),
        **dict.fromkeys(("q_batch", "q_head", "q_node"), "i64"), "packed_ptr": "*i32", "context_ptr": "*i64",
        "scale": "fp32", "split": "i32", "words": "i32",
    }  # fmt: skip
    constants = {**shape, "ROWS": 32, "KEYS": attention.KEYS, "UPCAST": False}
    yield Variant("tree_attention bf16", attention.tree_attention_kernel, types, constants, {"num_warps": 4})
    types = {**partial, **sizes, **dict.fromkeys(("o_batch", "o_head", "o_node"), "i64"), "out_ptr": "*bf16"}
    yield Variant("tree_attention combine", attention.combine_kernel, types, shape, {"num_warps": 1})
    types = {
        "caches": ("*i16",) * kv.CACHES_A_LAUNCH, **dict.fromkeys(("path_ptr", "start_ptr", "page_table_ptr"), "*i64"),
        **dict.fromkeys(("nodes", "tokens", "pages", "outer", "page_size", "width"), "i32"),
        **dict.fromkeys(("outer_stride", "token_stride", "head_stride"), "i64"),
    }  # fmt: skip
    yield Variant("compact_kv paged", kv.compact_kv_kernel, types, {"BLOCK": 128}, {"num_warps": 1})


def _head_tables(vocab: int) -> Variant:
    """The product with the weights, for as many rows as a program takes."""
    rows, warps = head.rows_and_warps(head.MOST_ROWS)
    types = {
        **dict.fromkeys(("hidden_ptr", "weight_ptr"), "*bf16"), "sampling_ptr": "*fp32", "temperature": "fp32",
        "tables_ptr": "*fp32", **dict.fromkeys([f"{x}_stride" for x in ("hidden_request", "hidden_row", "weight_row")],
        "i64"), **dict.fromkeys(("rows", "rows_a_request", "vocab", "width"), "i32"),
    }  # fmt: skip
    constants = {"ENTRIES": entries(vocab), "ROWS": rows, "UPCAST": False}
    return Variant("head_tables bf16", head.head_tables_kernel, types, constants, {"num_warps": warps})


#: (rule, kind of drafts, whether everything else is given too).
_TREES = (
    (TreeRule.WALK, "point mass", True), (TreeRule.COUPLED, "point mass", True),
    (TreeRule.RECURSIVE, "dense", False), (TreeRule.TRAVERSAL, "statistics", True),
)  # fmt: skip


def variants(target: str, vocab: int = 128256) -> Iterator[Variant]:
    """The plain kernels for each dtype of logits; every rule, kind of draft and the largest kernels in bfloat16. All of
    it for sm_90; for the others bfloat16, and of the rules the largest kernels."""
    everything = target == "sm_90"
    words = _IDS | {"scalars_ptr": "*i64", "out_ptr": "*i64", "counters": "i32"}
    yield Variant("noise_words", noise.noise_words_kernel, words, {"BLOCK": 128}, {"num_warps": 4})

    types = {"out_ptr": "*i32", "parents_ptr": "*i64", "nodes": "i32"}
    constants = {"BITS": 32, "WORDS": 2, "NODES": 64}
    yield Variant("tree_mask packed", packed_kernel, types, constants, {"num_warps": 1})
    for element, form in (("fp32", MaskFormat.DENSE), ("u8", MaskFormat.FLAT_BITS)):
        types = {"out_ptr": f"*{element}", "parents_ptr": "*i64", "context_ptr": "*i64"}
        sizes = {"nodes": "i32", "width": "i32", "room": "i64"}
        constants = {"FORMAT": int(form), "ADDITIVE": element == "fp32", "BLOCK": 32, "NODES": 64}
        name = f"tree_mask {form.name.lower()}"
        yield Variant(name, tree_mask_kernel, types | sizes, constants, {"num_warps": 4})

    yield from _attention_and_kv()

    def variant(
        name: str, kernel: Any, types: dict[str, str], without: tuple[str, ...], large: bool, **constants: Any
    ) -> Variant:
        config = launch_config(vocab, TARGETS[target].backend, large)
        constants |= config.constants | {key: None for key in without if key in types}
        kept = {key: value for key, value in types.items() if key not in without}
        return Variant(name, kernel, kept, constants, config.options)

    def chain(dtype: str, rule: Rule, kind: str, full: bool) -> Variant:
        name = f"verify_chain {rule.name.lower()} {dtype} {kind} {'full' if full else 'plain'}"
        without = (*_HEAD, *_DRAFTS[kind]) if full else (*_HEAD, *_EXTRAS, *_DRAFTS[kind])
        independent = full and rule != Rule.BLOCK
        large = full or rule == Rule.BLOCK
        types = _verify_chain(dtype)
        return variant(name, verify_chain_kernel, types, without, large, RULE=int(rule), INDEPENDENT=independent)

    for kind in ("point mass", "statistics"):
        types, without = _verify_chain("bf16"), (*_EXTRAS, *_DRAFTS[kind])
        constants = {"RULE": int(Rule.TOKEN), "INDEPENDENT": False}
        yield variant(f"verify_chain_lm_head bf16 {kind}", verify_chain_kernel, types, without, False, **constants)
    yield _head_tables(vocab)

    for dtype in ("fp32", "bf16", "fp16") if everything else ("bf16",):
        yield variant(f"sample {dtype} plain", sample_kernel, _sample(dtype), _EXTRAS, False, COUPLED_RULE=False)
        yield chain(dtype, Rule.TOKEN, "statistics", full=False)
    yield variant("sample bf16 full", sample_kernel, _sample("bf16"), (), True, COUPLED_RULE=True)
    for rule, kind, full in _OTHERS:
        if everything or full:
            yield chain("bf16", rule, kind, full)
    for tree_rule, kind, full in _TREES:
        name = f"verify_tree {tree_rule.name.lower()} bf16 {kind} {'full' if full else 'plain'}"
        without = _DRAFTS[kind] if full else (*_EXTRAS, *_DRAFTS[kind])
        constants = {"RULE": int(tree_rule), "BLOCK": 64, "AHEAD": tree_rule == TreeRule.TRAVERSAL or not full}
        yield variant(name, verify_tree_kernel, _verify_tree("bf16"), without, True, **constants)
    for how in (Children.WITHOUT_REPLACEMENT, Children.RACE):
        name, types = f"sample_children {how.name.lower()} bf16 full", _sample("bf16") | {"count": "i32"}
        yield variant(name, sample_children_kernel, types, (), True, HOW=int(how))


def compile_variant(variant: Variant, target: str) -> Any:
    """Compile for ``target``, pointers, row strides and vocabulary multiples of 16 as they are in practice."""
    names = variant.kernel.arg_names
    signature = {name: variant.types.get(name, "constexpr") for name in names}
    aligned: list[tuple[int, ...]] = []
    for i, name in enumerate(names):
        if isinstance(signature[name], tuple):
            aligned += [(i, j) for j in range(len(signature[name]))]
        elif (
            signature[name].startswith("*")
            or name.endswith(("stride", "_batch", "_head", "_token", "_node"))
            or name in ("vocab", "width")
        ):
            aligned.append((i,))
    source = ASTSource(
        variant.kernel,
        signature,
        {(names.index(name),): value for name, value in variant.constants.items()},
        attrs={path: [["tt.divisibility", 16]] for path in aligned},
    )
    return triton.compile(source, target=TARGETS[target], options=variant.options)


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
    loads = re.findall(r"ld\.global(?:\.\w+)*\.v(\d)\.b(\d+)", compiled.asm["ptx"])
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global .*?, 0x(\w+)", compiled.asm["ptx"])
    widths = [int(count) * int(bits) for count, bits in loads] + [8 * int(size, 16) for size in copies]
    return Usage(variant.name, target, registers, stack + local, max(widths, default=None))


def main(targets: list[str]) -> None:
    """Print a line a kernel and target."""
    for target in targets or list(TARGETS):
        for variant in variants(target):
            print(usage(variant, target))


if __name__ == "__main__":
    main(sys.argv[1:])
