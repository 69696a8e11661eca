"""The backends as operators: against the oracle, under PyTorch's own checks, and when they are missing."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from forms import pairwise, some
from processes import run_python
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner

import specdec_kernels
from specdec_kernels import ops, selftest, verify_chain_workspace
from specdec_kernels.cli import main
from specdec_kernels.contract import Rule
from specdec_kernels.ops.validate import ArgumentChecker


@pytest.mark.slow
def test_against_the_oracle(backend, device):
    interpreted = backend == "triton" and device == "cpu"
    count = {"cpu": 120, "cuda": 120, "reference": some(40, 120)}.get(backend, some(6, 30) if interpreted else 120)
    report = selftest.run(backend, device, count=count)
    assert report.wrong == []
    assert report.too_close <= 1 + report.requests // 50  # a threshold of a filter is often close to some logit
    assert report.requests > 7 * count


def test_the_command_line_of_the_suite():
    def said(*options):
        return CliRunner().invoke(main.app, ["selftest", "--count", "2", *options])

    result = said("--backend", "reference", "--backend", "cpu")
    assert result.exit_code == 0, result.output
    assert result.stdout.count(" 0 wrong") == 2
    result = said("--backend", "abacus")
    assert result.exit_code == 2
    assert "backend must be one of ['cpu', 'cuda', 'reference', 'triton']," in result.stderr
    if not torch.cuda.is_available():
        result = said("--device", "cuda")
        assert result.exit_code == 2
        assert result.stderr == "error: device cuda cannot be tested: torch sees no GPU\n"


def test_what_the_suite_calls_on_a_gpu_runs():
    """Where there is none, on the CPU: the calls that it checks for waiting, launches and graphs."""
    names = []
    for name, call in selftest.gpu.calls("reference", torch.arange(3)):
        call()
        names.append(name)
    assert len(set(names)) == 9 + 1 + 4 + 4


def test_triton_launches_on_the_gpu_of_its_tensors(monkeypatch):
    """Not on the current one, whose streams order nothing on another. Of two GPUs that are not here."""
    current, seen = [0], []

    @contextmanager
    def on_that_of(tensor):
        before, current[0] = current[0], tensor.get_device()
        yield
        current[0] = before

    class OnSecond(torch.Tensor):
        def get_device(self):
            return 1

    monkeypatch.setattr(torch.cuda, "device_of", on_that_of)
    launch = ops.backends._on_its_device(lambda *given, **named: seen.append((current[0], given, named)))
    there = torch.zeros(1).as_subclass(OnSecond)
    launch(there, 7, out=None)
    launch([there, there], 7)
    assert (current, seen) == ([0], [(1, (there, 7), {"out": None}), (1, ([there, there], 7), {})])


def test_the_suite_notices_a_wrong_backend(monkeypatch):
    """The comparison itself can fail: a backend that accepts one token too few."""
    real = ops.verify_chain

    def wrong(*positional, **named):
        verified = real(*positional, **named)
        return verified._replace(num_accepted=(verified.num_accepted - 1).clamp(min=0))

    monkeypatch.setattr(selftest.chains, "verify_chain", wrong)
    assert selftest.run("cpu", count=20).wrong


#: Rows whose sums a vector of exponentials can get wrong: far above the base that the begin of a row gives, by more
#: than a float holds, or just not; far below it; and at temperatures at which nothing is. In whole tiles: behind the
#: end of a row stands -inf, by which all that is wrong with low logits is found.
EXTREMES = """
import torch
from specdec_kernels import ops, sample, selftest
print(ops.BACKENDS["cpu"].detail)
inf, nan = float("inf"), float("nan")
late = [200.0, 95.0, 89.5, 88.0, 60.0, 1e4, 1e30, inf, nan, -88.5, -178.0, -200.0, -1e30, -inf]
heats = [1.0, 0.01, 1e4, 1e30, 1e38]
for dtype in (torch.float32, torch.bfloat16, torch.float16) if ops.BACKENDS["cpu"].detail != "C++, none" else ():
    for begin in (0.0, 3.0, -30.0):
        rows = (torch.randn(len(late), 3072, generator=torch.Generator().manual_seed(0)) + begin).to(dtype)
        rows[:, 2500:2600] = torch.tensor(late)[:, None].to(dtype)
        for heat in heats:
            ours, others = (sample(rows, seed=1, position=1, temperature=heat, backend=name)
                            for name in ("cpu", "reference"))
            torch.testing.assert_close(ours, others, rtol=2e-5, atol=2e-5, equal_nan=True)
assert ops.BACKENDS["cpu"].detail == "C++, none" or selftest.run("cpu", count=30).wrong == []
"""


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_every_instruction_set(isa):
    result = run_python("-c", EXTREMES, SPECDEC_CPU_ISA=isa)
    if result.stdout.strip() == "C++, none":
        pytest.skip(f"this machine has no {isa}")
    assert (result.returncode, result.stdout.strip()) == (0, f"C++, {isa}"), result.stderr


def test_an_unknown_instruction_set_is_an_error():
    code = "import torch, specdec_kernels as s; s.sample(torch.zeros(1, 3), seed=1, position=1)"
    result = run_python("-c", code, SPECDEC_CPU_ISA="sse9")
    assert "SPECDEC_CPU_ISA must be scalar, avx2 or avx512 and run on this machine, got sse9" in result.stderr


def test_without_the_compiled_library_the_reference_runs():
    code = """
import torch, specdec_kernels as s
row = torch.tensor([[0.0, 5.0, 0.0]])
print(s.sample(row, seed=1, position=1, temperature=0.0).tokens.tolist())
try:
    s.sample(row, seed=1, position=1, backend="cpu")
except RuntimeError as error:
    print(error)
"""
    result = run_python("-c", code, SPECDEC_LIBRARY="/nowhere/libspecdec_cpu.so")
    assert result.stdout.splitlines() == [
        "[1]",
        "backend='cpu' cannot run here: libspecdec_cpu.so was not built (pip install -e .)",
    ]


def test_without_a_gpu_triton_says_why():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    code = "import torch, specdec_kernels as s; s.sample(torch.zeros(1, 3), seed=1, position=1, backend='triton')"
    result = run_python("-c", code, TRITON_INTERPRET="0")
    assert "backend='triton' cannot run here: there is no GPU" in result.stderr


def test_an_import_does_not_start_cuda():
    """A process that has started CUDA cannot fork any more: vLLM's and others do, after plug-ins were imported."""
    code = """
import torch
def started(*_): raise SystemExit("CUDA was started")
torch.cuda._lazy_init = torch._C._cuda_getDeviceCount = torch.cuda.is_available = started
torch.cuda.device_count = lambda: 1
import specdec_kernels.ops as ops
print(ops.BACKENDS["triton"].reason)
"""
    result = run_python("-c", code, TRITON_INTERPRET="0")
    assert (result.returncode, result.stdout) == (0, "\n"), result.stderr


def test_an_old_gpu_is_refused():
    code = """
import torch, specdec_kernels as s
for _ in range(2):
    try:
        s.sample(torch.zeros(1, 3), seed=1, position=1, backend='cuda')
    except RuntimeError as error:
        print(error)
"""
    result = run_python("-c", code, SPECDEC_EMULATE_CUDA="1", SPECDEC_EMULATED_CAPABILITY="7")
    said = "backend='cuda' needs a GPU of compute capability 8.0, GPU -1 has 7.x: try backend='triton'"
    assert result.stdout.count(said) == 2, result.stderr


NO_FILTERS = (0, 1.0, 0.0)
NO_PROCESSING = (None,) * 5


def arguments(kind, full, rule):
    """Of the operator ``verify_chain``: with everything there is, or the least."""
    generator = torch.Generator().manual_seed(0)
    target, draft = torch.randn(2, 4, 50, generator=generator), torch.randn(2, 3, 50, generator=generator)
    drawn = ops.sample(draft.reshape(6, 50), seed=1, position=1)
    penalties = ops.Penalties(torch.tensor([[1], [2]]), torch.tensor([[3], [-1]]), presence_penalty=0.5)
    tokens = drawn.tokens.reshape(2, 3)
    if full:  # every draft is accepted: opcheck takes the nan where a token's log-probability would be for a difference
        target = target.scatter(2, torch.cat([tokens, tokens[:, :1]], 1)[..., None], 90.0)
    processing = (
        torch.full((2, 4, 2), -1, dtype=torch.int32),
        *ops.processing.adjustments(ArgumentChecker("target", target, B=2, V=50), penalties, None, tokens),
    )
    vocabulary = ops.DraftVocabulary(torch.randperm(50, generator=generator), 50)
    return (
        target,
        tokens,
        None if kind == "point mass" else draft,
        drawn.stats.reshape(2, 3, 3) if kind == "statistics" else None,
        vocabulary.target_to_draft if full and kind != "point mass" else None,
        torch.tensor([0.7, 0.0]) if full else None,
        1.0,
        torch.tensor([1, 2]),
        torch.tensor([3, 4]),
        torch.tensor([3, 3]) if full else None,
        None,
        torch.tensor([[0.5, 3, 0.9, 0.1], [0.0, 0, 1, 0]]) if full else None,
        0.7,
        *NO_FILTERS,
        *(processing if full else NO_PROCESSING),
        int(rule),
        full,
        full and rule != Rule.BLOCK,
        torch.zeros(verify_chain_workspace(2, 3, 50), dtype=torch.uint8) if full else None,
    )


@pytest.mark.parametrize("kind", selftest.DRAFT_KINDS)
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("rule", Rule)
def test_opcheck_verify_chain(kind, full, rule):
    """Case 33: schema, fake, dispatch and tracing."""
    torch.library.opcheck(torch.ops.specdec.verify_chain.default, arguments(kind, full, rule))


def test_opcheck_sample_and_noise_words():
    two = torch.tensor([1, 2])
    table = ops.DraftVocabulary(torch.randperm(12)[:9], 12).target_to_draft
    own = torch.tensor([[0.0, 0, 1, 0], [1, 2, 0.5, 0.1]])
    for sampling, coupled, columns in ((None, False, None), (own, True, None), (None, True, table)):
        given = (torch.randn(2, 9), columns, two, two, two, sampling, 0.5, *NO_FILTERS, *NO_PROCESSING, coupled)
        torch.library.opcheck(torch.ops.specdec.sample.default, given)
    torch.library.opcheck(torch.ops.specdec.noise_words.default, (two, two, 3, 4, 5))


def test_the_graphs_of_torch_compile_leave_out_what_keeps_scratch():
    tags = {op: getattr(torch.ops.specdec, op).default.tags for op in ops.backends.OPS}
    tagged = [op for op in tags if torch.Tag.cudagraph_unsafe in tags[op]]
    assert tagged == ["verify_chain", "verify_tree", "sample", "sample_children"]


def test_compiled_without_a_break_and_replayed():
    """Cases 32 and 33: one graph, whose results follow its inputs."""

    def step(target, draft, seed, position, temperature):
        drawn = ops.sample(draft.flatten(0, 1), seed=seed.repeat_interleave(3), position=9, temperature=0.9, top_k=20)
        tokens, stats = drawn.tokens.unflatten(0, (2, 3)), drawn.stats.unflatten(0, (2, 3))
        penalties = ops.Penalties(tokens, tokens[:, :1], repetition_penalty=1.2)
        return ops.verify_chain(
            target, tokens, draft, stats, seed=seed, position=position, temperature=temperature, top_p=0.9,
            penalties=penalties, rule="block", logprobs=True,
        )  # fmt: skip

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for index in range(4):
        generator = torch.Generator().manual_seed(index)
        target, draft = torch.randn(2, 4, 50, generator=generator), torch.randn(2, 3, 50, generator=generator)
        given = (target, draft, torch.tensor([index, 7]), torch.tensor([index, 5]), torch.tensor([0.5, 1.0]))
        for got, want in zip(compiled(*given), step(*given), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_compiled_for_any_number_of_drafts():
    """A size that varies may be one that is known, such as the 1 of one draft."""

    def step(target, tokens):
        return ops.verify_chain(target, tokens, seed=1, position=2).tokens

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for drafts in (3, 4, 1, 0):
        generator = torch.Generator().manual_seed(drafts)
        given = torch.randn(3, drafts + 1, 50, generator=generator), torch.randint(0, 50, (3, drafts))
        assert torch.equal(compiled(*given), step(*given)), drafts


def test_fake_tensors_outside_of_a_compiler():
    """Their values cannot be looked at."""
    with FakeTensorMode() as mode:
        logits, ids, parents = map(
            mode.from_tensor, (torch.zeros(2, 3, 50), torch.zeros(2, 3).long(), torch.tensor([[-1, 0, 0]] * 2))
        )
        heat = torch.ones(2)
        chain = specdec_kernels.verify_chain(logits, ids[:, :2], seed=1, position=2, temperature=heat)
        tree = specdec_kernels.verify_tree(logits, ids, parents, seed=1, position=2)
        assert chain.tokens.shape == tree.tokens.shape == (2, 3)
        assert specdec_kernels.tree_mask(parents).shape == (2, 3, 3)
        specdec_kernels.compact_kv([torch.zeros(2, 1, 9, 4)], ids, 1)


def by_threads(call):
    """What it returns with one thread, with two, and with more than there are cores."""
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(call())
    finally:
        torch.set_num_threads(threads)
    return results


def test_threads_do_not_change_the_tokens():
    target = torch.randn(3, 5, 60_000, generator=torch.Generator().manual_seed(0))
    draft = target[:, :4] + 0.5 * torch.randn(3, 4, 60_000, generator=torch.Generator().manual_seed(1))
    tokens = ops.sample(draft.flatten(0, 1), seed=3, position=1).tokens.reshape(3, 4)
    one, *others = by_threads(
        lambda: [
            ops.verify_chain(target, tokens, draft, draft_temperature=1.0, seed=s, position=1).tokens for s in range(20)
        ]
    )
    for other in others:
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b)


KINDS = ["statistics", "point mass", "masked", "a row of nan", "rows far apart", "nothing drafted"]
TEMPERATURES = [0.0, 0.05, 0.8]  # 0.05: tiles whose weights have a base of their own


@pytest.mark.parametrize(
    ("kind", "temperature", "dtype"), pairwise(KINDS, TEMPERATURES, [torch.float32, torch.bfloat16])
)
def test_a_batch_of_one_is_as_one_of_many(kind, temperature, dtype):
    """Whose threads decide for themselves what comes next, each; in a batch they are told."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(3, 5, 60_000, generator=generator).mul_(3)
    if kind == "a row of nan":
        target[:, 2, 59_999] = torch.nan
    if kind == "rows far apart":  # so that one says nothing of the next
        target += torch.tensor([0.0, -500.0, 700.0, -90.0, 40.0])[:, None]
    target = target.to(dtype)
    draft = target[:, :4] + torch.randn(3, 4, 60_000, generator=generator).mul_(0.3).to(dtype)
    drawn = ops.sample(draft.flatten(0, 1), seed=3, position=1, temperature=temperature)
    drafted = (None, None) if kind == "point mass" else (draft, drawn.stats.reshape(3, 4, 3))
    options = {"temperature": temperature}
    if kind == "masked":
        words = torch.randint(-(2**31), 2**31, (3, 3, 5, 1875), generator=generator, dtype=torch.int32)
        options["bitmask"] = words[0] | words[1] | words[2]
    if kind == "nothing drafted":
        options["num_draft"] = torch.zeros(3, dtype=torch.int64)

    def verified(rows, seed, backend=None):
        given = (None if x is None else x[rows] for x in (target, drawn.tokens.reshape(3, 4), *drafted))
        own = {name: x[rows] if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        heat = 1.0 if kind == "dense" else None
        return ops.verify_chain(*given, draft_temperature=heat, seed=seed, position=1, backend=backend, **own)

    accepted = 0
    for seed in range(some(6, 10)):
        many = verified(slice(None), seed)
        assert torch.equal(many.tokens, verified(slice(None), seed, "reference").tokens)
        for b in range(3):
            for one in by_threads(lambda b=b, seed=seed: verified(slice(b, b + 1), seed)):
                for a, x in zip(one[:4], many[:4], strict=True):
                    assert torch.equal(a[0], x[b])
        accepted += int(many.num_accepted.sum())
    assert (accepted > 0) == (kind != "nothing drafted")
