"""Calls that are checked in C++: the same results as through Python's checks and the dispatcher, refusals that change
nothing, memory that lives as its tensors do; and the host's side of the CUDA backend."""

from __future__ import annotations

import ctypes
import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_python
from torch.utils._python_dispatch import TorchDispatchMode

from specdec_kernels import (
    DraftVocabulary,
    Sample,
    _native,
    sample,
    sample_children,
    verify_chain,
    verify_chain_workspace,
    verify_tree,
)
from specdec_kernels.ops import BACKENDS, backends, validate
from specdec_kernels.ops.tree_rules import CHILDREN

CPU = {op: backends._FAST[None, False].get(result) for result, op in backends._OPERATORS.items()}
#: What makes a distribution of logits, as operators take it: temperature 1 and nothing else.
PLAIN = (None, 1.0, 0, 1.0, 0.0, *[None] * 5)

pytestmark = pytest.mark.skipif(bool(BACKENDS["cpu"].reason), reason=BACKENDS["cpu"].reason)


def chain(dtype: torch.dtype = torch.float32, batch: int = 3, drafts: int = 4, vocab: int = 300) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(batch, drafts + 1, vocab, generator=generator).mul_(3).to(dtype)
    draft = target[:, :drafts] + torch.randn(batch, drafts, vocab, generator=generator).to(dtype) / 4
    tokens = draft.argmax(-1)
    return {
        "target_logits": target, "draft_tokens": tokens, "draft_logits": draft, "draft_temperature": 1.0,
        "seed": torch.arange(batch), "position": torch.arange(batch) + 7,
    }  # fmt: skip


def dispatched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_FAST", {})


def assert_equal(ours: Any, others: Any) -> None:
    for mine, other in zip(ours, others, strict=True):
        assert (mine.dtype, mine.shape, mine.stride()) == (other.dtype, other.shape, other.stride())
        assert torch.equal(mine.nan_to_num(), other.nan_to_num())


def test_the_fast_path_is_taken_here():
    def taken(backend: str | None, device: str = "cpu") -> bool:
        rows, ids = torch.zeros(2, 3, device=device), torch.zeros(2, dtype=torch.int64, device=device)
        return backends.try_fast_path(Sample, backend, (rows, None, ids, ids, ids, *PLAIN, False)) is not None

    assert [taken(backend) for backend in (None, "cpu", "reference", "no such")] == [True, True, False, False]
    assert not taken(None, "meta")


CHAINS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scores": {"logprobs": True, "count_independent": True},
    "block, filtered": {"rule": "block", "top_k": 20, "top_p": 0.9, "min_p": 0.01, "temperature": 0.7},
    "coupled": {"rule": "coupled", "temperature": 0.5},
    "greedy": {"temperature": 0.0},
    "masked": {"bitmask": torch.full((3, 5, 10), 0x0F0F0F0F, dtype=torch.int32)},
    "fewer drafts": {"num_draft": torch.tensor([0, 2, 4], dtype=torch.int32)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", CHAINS.values(), ids=CHAINS)
def test_chains_are_those_of_the_dispatcher(monkeypatch, options, dtype):
    fast = verify_chain(**chain(dtype), **options)
    dispatched(monkeypatch)
    assert_equal(fast, verify_chain(**chain(dtype), **options))


def test_ragged_and_strided_chains(monkeypatch):
    given = chain()
    wide = torch.randn(3, 7, 311)[:, 1:6, 5:305].copy_(given["target_logits"])
    rows = {
        **given,
        "target_logits": given["target_logits"].reshape(15, 300)[:11],
        "cu_rows": torch.tensor([0, 2, 7, 11]),
    }
    cases = (
        {**given, "target_logits": wide},
        rows,
        {**given, "draft_tokens": given["draft_tokens"].int().t().contiguous().t()},
    )
    fast = [verify_chain(**case) for case in cases]
    dispatched(monkeypatch)
    for mine, case in zip(fast, cases, strict=True):
        assert_equal(mine, verify_chain(**case))


@pytest.mark.parametrize("coupled", [False, True])
def test_draws_are_those_of_the_dispatcher(monkeypatch, coupled):
    given = {"seed": torch.arange(5), "position": torch.arange(5), "row": torch.arange(5), "coupled": coupled}
    logits = torch.randn(5, 200)
    fast = sample(logits, **given, temperature=0.8, top_p=0.9)
    dispatched(monkeypatch)
    assert_equal(fast, sample(logits, **given, temperature=0.8, top_p=0.9))


@pytest.mark.parametrize("how", CHILDREN)
def test_children_are_those_of_the_dispatcher(monkeypatch, how):
    given = {"seed": torch.arange(5), "position": torch.arange(5), "row": torch.arange(5), "temperature": 0.8}
    logits = torch.randn(5, 200)
    fast = sample_children(logits, 3, how, **given)
    dispatched(monkeypatch)
    assert_equal(fast, sample_children(logits, 3, how, **given))


def test_reduced_vocabularies_are_those_of_the_dispatcher(monkeypatch):
    vocabulary = DraftVocabulary(torch.randperm(300, generator=torch.Generator().manual_seed(2))[:120], 300)
    given, nodes, key = chain(), tree(), {"seed": torch.arange(3), "position": torch.arange(3)}
    logits = given["draft_logits"][..., vocabulary.draft_to_target]
    calls = (
        lambda: verify_chain(**{**given, "draft_logits": logits}, draft_to_target=vocabulary, rule="block"),
        lambda: verify_tree(
            **{**nodes, "draft_logits": nodes["draft_logits"][..., vocabulary.draft_to_target]},
            draft_to_target=vocabulary, siblings="iid", rule="traversal",
        ),
        lambda: sample(logits[:, 0], **key, row=key["seed"], draft_to_target=vocabulary, coupled=True),
        lambda: sample_children(logits[:, 0], 3, "race", **key, row=key["seed"], draft_to_target=vocabulary),
    )  # fmt: skip
    fast = [call() for call in calls]
    dispatched(monkeypatch)
    for mine, call in zip(fast, calls, strict=True):
        assert_equal(mine, call())


def tree(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    given = chain(dtype, drafts=4)
    target = given["target_logits"]
    children = sample_children(target[:, 0] / 2, 4, seed=given["seed"], position=given["position"])
    parents = torch.tensor([[-1, 0, 0, 0, 0], [-1, 0, 0, 0, -1], [-1, 0, 0, -1, -1]])
    stats = children.stats[:, None].expand(-1, 5, -1).contiguous()
    tokens = torch.cat([torch.zeros(3, 1, dtype=torch.int64), children.tokens], 1)
    return {
        "target_logits": target, "draft_tokens": tokens, "parents": parents, "draft_logits": target / 2,
        "draft_stats": stats, "seed": given["seed"], "position": given["position"],
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["walk", "recursive", "traversal", "coupled"])
def test_trees_are_those_of_the_dispatcher(monkeypatch, rule, dtype):
    options = {
        "rule": rule,
        "siblings": "without_replacement",
        "logprobs": rule == "walk",
        "top_k": 50 if rule == "recursive" else None,
    }
    fast = verify_tree(**tree(dtype), **options)
    dispatched(monkeypatch)
    assert_equal(fast, verify_tree(**tree(dtype), **options))


def test_trees_that_are_none_are_refused_by_the_operators():
    given = tree()
    arguments = [given[name] for name in ("target_logits", "draft_tokens", "parents", "draft_logits", "draft_stats")]
    arguments += [None, None, 1.0, given["seed"], given["position"], *PLAIN, 1, False, False]
    wrong = {
        "no root": (2, torch.zeros(3, 5, dtype=torch.int64)),
        "a later parent": (2, torch.tensor([[-1, 2, 0, 0, 0]]).expand(3, -1).contiguous()),
        "a node behind the last": (2, torch.tensor([[-1, 0, -1, 0, 0]]).expand(3, -1).contiguous()),
        "an id outside": (1, torch.full((3, 5), 300)),
        "a missing id": (1, torch.full((3, 5), -1)),
        "fewer rows": (0, given["target_logits"][:, :4]),
        "a table of fewer ids": (5, torch.arange(299, dtype=torch.int32)),
        "a table without rows": (3, None),
    }
    assert len(CPU["verify_tree"](*arguments)) == 6
    for index, value in wrong.values():
        assert CPU["verify_tree"](*(value if at == index else x for at, x in enumerate(arguments))) is None
    with pytest.raises(ValueError, match="parents must be -1 for the root"):
        verify_tree(**{**given, "parents": wrong["a later parent"][1]}, siblings="iid")
    no_nodes = torch.zeros((0, 0), dtype=torch.int64)  # no request either, so that there is nothing to look at
    with pytest.raises(ValueError, match="parents must have at least the root"):
        verify_tree(torch.zeros(0, 0, 5), no_nodes, no_nodes, seed=1, position=1)


def test_children_of_what_is_no_row_are_refused_by_the_operators():
    ids = torch.arange(5)
    given = [torch.randn(5, 200), None, ids, ids, ids, *PLAIN, 3, 2]
    wrong = (
        (0, torch.randn(5, 2, 100)),
        (0, torch.randn(5, 400)[:, ::2]),
        (1, ids),
        (1, torch.zeros(1, 200, dtype=torch.int32)),
        (2, ids[:2]),
        (4, ids.int()),
        (10, ids.int()),
    )
    assert len(CPU["sample_children"](*given)) == 3
    for index, value in wrong:
        assert CPU["sample_children"](*(value if at == index else x for at, x in enumerate(given))) is None


def test_empty_batches():
    given = chain(batch=0)
    assert verify_chain(**given).tokens.shape == (0, 5)
    nothing = torch.empty(0, dtype=torch.int64)
    assert sample(torch.empty(0, 9), seed=nothing, position=nothing, row=nothing).stats.shape == (0, 3)


def _grad(x: torch.Tensor) -> torch.Tensor:
    return x.clone().requires_grad_()


REFUSED: dict[str, dict[str, Any]] = {
    "numbers as seeds": {"seed": 5, "position": 7},
    "a temperature each": {"temperature": torch.tensor([0.0, 0.5, 1.0])},
    "int as a temperature": {"temperature": 1},
    "a parameter": {"target_logits": torch.nn.Parameter(chain()["target_logits"], requires_grad=False)},
    "a tensor with gradients": {"target_logits": _grad(chain()["target_logits"])},
    "offsets in int32": {
        "target_logits": chain()["target_logits"].reshape(15, 300),
        "cu_rows": torch.tensor([0, 5, 10, 15]).int(),
    },
}


@pytest.mark.parametrize("options", REFUSED.values(), ids=REFUSED)
def test_what_is_not_taken_as_it_is_comes_to_the_same(monkeypatch, options):
    given = {**chain(), **options}
    with torch.no_grad():
        tokens = verify_chain(**given).tokens
        dispatched(monkeypatch)
        assert torch.equal(tokens, verify_chain(**given).tokens)


def test_refusals_write_nothing_and_leave_no_error_behind():
    given = chain()
    workspace = torch.zeros(verify_chain_workspace(3, 4, 300), dtype=torch.uint8)
    arguments = [*(given[name] for name in ("target_logits", "draft_tokens", "draft_logits")), None, None, None, 0.7]
    arguments += [given["seed"], given["position"], None, None, *PLAIN, 0, False, False, workspace]
    call = CPU["verify_chain"]
    assert len(call(*arguments)) == 6
    refused: tuple[tuple[int, Any], ...] = (
        (0, given["seed"]), (0, "logits"), (1, torch.full((3, 4), 300)), (3, given["seed"]), (4, given["seed"]),
        (5, given["seed"]), (5, torch.full((3,), -1.0)), (6, -1.0), (6, 1), (7, given["seed"][:2]), (7, 5), (12, 1),
        (13, 1 << 70), (13, None), (14, None), (15, 1), (24, workspace[:-1]), (24, workspace.view(torch.int8)),
        (24, torch.zeros(2 * len(workspace), dtype=torch.uint8)[::2]),
        (0, given["target_logits"].to("meta")), (22, 1), (23, 0),
    )  # fmt: skip
    for index, wrong in refused:
        assert call(*(wrong if at == index else x for at, x in enumerate(arguments))) is None
    with pytest.raises(TypeError, match="expected 25 arguments, got 24"):
        call(*arguments[1:])


def test_a_workspace_is_no_reason_to_check_in_python(monkeypatch):
    workspace = torch.zeros(verify_chain_workspace(3, 4, 300), dtype=torch.uint8)
    monkeypatch.setattr(validate.ArgumentChecker, "logits", None)
    assert verify_chain(**chain(), workspace=workspace).tokens.shape == (3, 5)


def test_ints_and_parameters_of_requests_are_no_reason_to_check_in_python(monkeypatch):
    seeds, rows, parents = torch.full((3,), 5), torch.randn(3, 300), torch.arange(-1, 4).repeat(3, 1)
    each = {"temperature": torch.ones(3), "top_k": torch.full((3,), 9), "min_p": torch.full((3,), 0.25)}
    one = {"temperature": 1, "top_k": 9, "min_p": 0.25}
    tree = {"target_logits": chain()["target_logits"], "draft_tokens": parents, "parents": parents}

    def results(keys, parameters):
        named = {"seed": keys, "position": keys, **parameters}
        return [
            *verify_chain(**{**chain(), **named}), *verify_tree(**tree, **named), *sample(rows, row=keys, **named),
            *sample_children(rows, 2, row=keys, **named),
        ]  # fmt: skip

    with monkeypatch.context() as patched:
        dispatched(patched)
        want = results(seeds, one)
    monkeypatch.setattr(validate.ArgumentChecker, "logits", None)
    for keys, parameters in ((5, {**one, "temperature": 1.0}), (5, one), (seeds, one), (seeds, each), (5, each)):
        assert_equal(results(keys, parameters), want)


class Seen(TorchDispatchMode):
    """Notes the operators that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_who_watches_what_is_dispatched_sees_it():
    with Seen() as seen:
        verify_chain(**chain())
    assert "specdec.verify_chain.default" in seen.names
    with torch.profiler.profile() as profile:
        verify_chain(**chain())
    assert "specdec::verify_chain" in {event.key for event in profile.key_averages()}


def connect(entries: int, on_cuda: bool, by_torch: bool) -> dict[str, Any]:
    results = backends._OPERATORS
    return dict(zip(results.values(), _native.connect(entries, on_cuda, by_torch, tuple(results)), strict=True))


def test_tensors_without_memory_are_left_to_the_dispatcher():
    """They look plain: what functionalisation follows, and zeros that are made where they are read."""
    logits, keys = chain()["target_logits"][0], {"seed": torch.arange(5), "position": torch.arange(5)}
    followed = torch.func.functionalize(lambda x: sample(x, **keys).tokens)(logits)
    assert torch.equal(followed, sample(logits, **keys).tokens)
    with pytest.raises(RuntimeError, match="not taken as it is"):
        sample(torch._efficientzerotensor(5, 300), **keys)


def test_a_library_of_another_build_is_not_connected(monkeypatch):
    other = (ctypes.c_size_t * 4)(1, 1, 0, 0)
    with pytest.raises(RuntimeError, match="another build"):
        connect(ctypes.addressof(other), False, False)
    monkeypatch.delattr(_native, "connect")
    assert backends.connected(BACKENDS["cpu"]) == {}
    assert backends.connected(BACKENDS["triton"]) == {}


def test_without_a_library_arguments_are_checked_and_results_made():
    checked = connect(0, False, True)
    rows, ids = torch.randn(3, 50), torch.arange(3)
    first, again = (checked["sample"](rows, None, ids, ids, ids, *PLAIN, False) for _ in range(2))
    assert len({x.untyped_storage().data_ptr() for x in (*first, *again)}) == 6, "each is a tensor of its own"
    for made, real in zip(first, sample(rows, seed=ids, position=ids, row=ids), strict=True):
        assert (made.dtype, made.shape, made.stride()) == (real.dtype, real.shape, real.stride())
    assert checked["sample"](rows, None, ids, ids, ids[:2], *PLAIN, False) is None
    on_gpu = connect(0, True, False)
    assert on_gpu["sample"](rows, None, ids, ids, ids, *PLAIN, False) is None


def test_launchers_in_python_get_the_arguments_of_the_operators():
    """Triton's: what the C++ has checked is what the operator would have been called with."""
    seen: dict[str, Any] = {}

    def launcher(op: str) -> Any:
        def launch(*arguments: Any, out: tuple[torch.Tensor, ...]) -> None:
            seen[op] = arguments
            for mine, real in zip(out, getattr(torch.ops.specdec, op).default(*arguments), strict=True):
                assert mine.copy_(real).shape == real.shape

        return launch

    names = ("verify_chain", "verify_tree", "sample", "sample_children")
    ours = backends.connected(replace(BACKENDS["cpu"], functions={op: launcher(op) for op in names}, library=None))
    ours = {op: ours[result] for result, op in backends._OPERATORS.items()}
    given, ids, rows = chain(), torch.arange(3), torch.randn(3, 300)
    first = [given[name] for name in ("target_logits", "draft_tokens", "draft_logits")]
    keys = [given["seed"], given["position"]]
    tail = [None, 0.7, 20, 1.0, 0.01, *[None] * 5]
    branches = tree()
    nodes = [branches[x] for x in ("target_logits", "draft_tokens", "parents", "draft_logits", "draft_stats")]
    calls = {
        "verify_chain": [*first, None, None, torch.ones(3), 1.0, *keys, None, None, *tail, 1, True, False, None],
        "verify_tree": [*nodes, None, None, 1.0, *keys, *tail, 1, False, True],
        "sample": [rows, None, ids, ids, ids, *tail, True],
        "sample_children": [rows, None, ids, ids, ids, *tail, 2, 1],
    }
    for op, arguments in calls.items():
        got = ours[op](*arguments)
        assert_equal(got, CPU[op](*arguments))
        assert type(got) is type(CPU[op](*arguments))
        seen.clear()
        assert ours[op](rows.double(), *arguments[1:]) is None
        assert not seen


HOST = """
import ctypes, os, torch
from specdec_kernels import sample, sample_children, verify_chain, verify_chain_workspace, verify_tree
from specdec_kernels.ops.backends import _FAST, BACKENDS
assert _FAST["cuda", False] is not _FAST[None, False]
library = ctypes.CDLL(str(BACKENDS["cuda"].library))
def emulate(stream=0, capturing=False):
    library.specdec_emulate(ctypes.c_void_p(stream), ctypes.c_bool(capturing), ctypes.c_bool(False))
def counts():
    found = (ctypes.c_int * 3)()
    library.specdec_emulated_counts(found)
    return tuple(found)
def chain(batch, workspace=None, **more):
    torch.manual_seed(batch)
    target = torch.randn(batch, 5, 700).mul_(3)
    arguments = dict(seed=torch.arange(batch), position=torch.arange(batch) + 3, draft_temperature=1.0, **more)
    tokens = target[:, :4].argmax(-1)
    ours, others = (verify_chain(target, tokens, target[:, :4] / 2, backend=name, workspace=scratch, **arguments)
                    for name, scratch in (("cuda", workspace), ("cpu", None)))
    for mine, other in zip(ours, others):
        assert (mine.dtype, mine.shape, mine.stride()) == (other.dtype, other.shape, other.stride())
        torch.testing.assert_close(mine, other, equal_nan=True)
    return ours
for _ in range(2):
    chain(3, rule="block"), chain(3), chain(3, logprobs=True)
assert counts() == (1, 1, 6)  # a device is asked once, memory of a stream is cleared once
chain(2), chain(64), chain(3)
assert counts() == (0, 1, 3)  # only more of it is cleared again
emulate(stream=8)
chain(64), chain(64)
assert counts() == (0, 1, 2)  # another stream, another memory
emulate(stream=8, capturing=True)
chain(3), chain(3)
assert counts() == (0, 2, 2)  # a graph may run beside anything
os.environ["SPECDEC_EMULATED_FULL"] = "1"
emulate(stream=16)
chain(3), chain(3)
assert counts() == (0, 2, 2)  # so it is where there is no memory to keep
del os.environ["SPECDEC_EMULATED_FULL"]
chain(3), chain(3)
assert counts() == (0, 1, 2)
size = verify_chain_workspace(8, 4, 700)
memory = torch.zeros(size + 256, dtype=torch.uint8)
begin = -memory.data_ptr() % 256
for batch in (8, 3, 8):
    chain(batch, memory[begin : begin + size])
assert counts() == (0, 0, 3)  # nothing is allocated, nothing cleared
emulate()
rows, ids = torch.randn(5, 700), torch.arange(5)
for draw in (lambda **to: sample(rows, seed=ids, position=ids, row=ids, **to),
             lambda **to: sample_children(rows, 3, seed=ids, position=ids, row=ids, **to)):
    torch.testing.assert_close(tuple(draw(backend="cuda")), tuple(draw(backend="cpu")))
tokens, parents = torch.tensor([[0, 5, 6, 7]]), torch.tensor([[-1, 0, 0, 1]])
trees = [tuple(verify_tree(rows[None, :4], tokens, parents, seed=ids[:1], position=ids[:1], backend=name))
         for name in ("cuda", "cpu")]
torch.testing.assert_close(*trees, equal_nan=True)
assert counts() == (0, 0, 3)
one, two = chain(3), chain(3)
assert one.logprobs is two.logprobs and one.tokens.data_ptr() != two.tokens.data_ptr()
print("done")
"""


def test_the_host_side_of_cuda():
    """What is cached by device and stream, what is not, and the same results as elsewhere."""
    result = run_python("-c", HOST, SPECDEC_EMULATE_CUDA="1")
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr[-3000:]


OUTLIVES = """
import ctypes, torch
from torch.profiler import profile
from specdec_kernels import sample
from specdec_kernels.ops.backends import BACKENDS
library = ctypes.CDLL(str(BACKENDS["cuda"].library))
rows, ids = torch.randn(5, 700), torch.arange(5)
for stream in (0, 8):
    library.specdec_emulate(ctypes.c_void_p(stream), ctypes.c_bool(False), ctypes.c_bool(False))
    with profile(profile_memory=True) as seen:
        sample(rows, seed=ids, position=ids, row=ids, backend="cuda")
    memory = [event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert max(memory) > 1000 and sum(memory) == 0, memory
print("done")
"""


def test_no_tensor_but_results_outlives_the_first_call_on_a_stream():
    """torch.compile(mode="reduce-overhead") calls once with a memory pool of its own, and refuses what stays in it."""
    result = run_python("-c", OUTLIVES, SPECDEC_EMULATE_CUDA="1")
    assert (result.returncode, result.stdout[-5:]) == (0, "done\n"), result.stderr[-3000:]


def test_results_keep_their_memory_as_long_as_one_of_them_lives():
    kept = [verify_chain(**chain()).num_accepted for _ in range(50)]  # the others go
    gc.collect()
    torch.randn(1000).sum()
    assert all(torch.equal(x, kept[0]) for x in kept)


def test_memory_is_given_back():
    rows = 50_000
    logits, ids = torch.zeros(rows, 1), torch.zeros(rows, dtype=torch.int64)

    def draw() -> None:
        sample(logits, seed=ids, position=ids, row=ids)  # 1.2 MB of results

    def own() -> int:
        """Bytes of this process that no file backs: pages of files come and go with what else a machine does."""
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return 1024 * int(status["RssAnon"].split()[0])

    for _ in range(3):
        draw()
    before = own()
    for _ in range(60):
        draw()
    assert own() - before < 60 * 1.2e6 / 3
