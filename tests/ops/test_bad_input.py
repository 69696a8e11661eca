"""What callers get wrong: an error that names the argument, what was expected and what came; never a crash."""

from __future__ import annotations

import pytest
import torch
from forms import some
from hypothesis import given, settings
from hypothesis import strategies as st

from specdec_kernels import LogitBias, Penalties, noise_words, sample, sample_children, verify_chain, verify_tree

TARGET, TOKENS, DRAFT = torch.zeros(2, 4, 7), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 7)
STATS = torch.zeros(2, 3, 3)
RAGGED = {"target_logits": TARGET.flatten(0, 1), "draft_logits": None}

VERIFY = [
    ({"target_logits": TARGET[0]}, ValueError, r"target_logits must have shape \[B, K\+1, V\].*float32 \[4, 7\]"),
    ({"target_logits": TARGET.double()}, TypeError, r"target_logits must be float32 or bfloat16 or float16.*float64"),
    ({"target_logits": [1.0]}, TypeError, r"target_logits must be .* got \[1.0\]"),
    ({"target_logits": torch.zeros(2, 4, 0)}, ValueError, "target_logits must have a vocabulary"),
    (
        {"target_logits": torch.zeros(2, 0, 7)},
        ValueError,
        r"target_logits must have shape \[B, K\+1, V\] = \[2, 4, \*\]",
    ),
    (
        {"target_logits": torch.zeros(2, 4, 14)[..., ::2]},
        ValueError,
        "target_logits must be contiguous along the vocabulary",
    ),
    ({"draft_tokens": TOKENS.float()}, TypeError, r"draft_tokens must be int64 or int32 \[B, K\], got float32"),
    (
        {"draft_tokens": TOKENS[:, :2]},
        ValueError,
        r"target_logits must have shape \[B, K\+1, V\] = \[2, 3, \*\], got float32 \[2, 4, 7\]",
    ),
    ({"draft_tokens": TOKENS + 7}, ValueError, r"draft_tokens must be -1 or in \[0, 7\), got 7 at \[0, 0\]"),
    ({"draft_tokens": TOKENS - 2}, ValueError, r"draft_tokens must be -1 or in \[0, 7\), got -2 at \[0, 0\]"),
    (
        {"draft_logits": DRAFT[..., :6], "draft_temperature": 1.0},
        ValueError,
        r"draft_logits must have shape \[B, K, V\] = \[2, 3, 7\]",
    ),
    ({"draft_logits": None, "draft_stats": STATS}, ValueError, "draft_stats needs the draft_logits"),
    ({"draft_stats": STATS.half()}, TypeError, r"draft_stats must be float32 \[B, K, 3\]"),
    ({"seed": torch.zeros(3, dtype=torch.int64)}, ValueError, r"seed must have shape \[B\] = \[2\], got int64 \[3\]"),
    ({"seed": torch.zeros(2, dtype=torch.int32)}, TypeError, r"seed must be int64 \[B\], got int32"),
    ({"position": 1.5}, TypeError, r"position must be int64 \[B\], got 1.5"),
    ({"num_draft": torch.zeros(2)}, TypeError, r"num_draft must be int64 or int32 \[B\], got float32"),
    ({"temperature": -1.0}, ValueError, "temperature must be finite and not negative, got -1.0"),
    ({"temperature": float("nan")}, ValueError, "temperature must be finite and not negative, got nan"),
    ({"temperature": torch.tensor([1.0, -2.0])}, ValueError, "temperature must be finite and not negative"),
    ({"temperature": "hot"}, TypeError, r"temperature must be a float or float32 \[B\], got 'hot'"),
    ({"rule": "blocks"}, ValueError, r"rule must be one of \['block', 'coupled', 'token'\], got 'blocks'"),
    (
        {"rule": "block", "count_independent": True},
        ValueError,
        "count_independent must be False with rule='block', .* got True",
    ),
    ({"top_k": -1}, ValueError, r"top_k must be at least 1 \(or 0: off\), got -1"),
    ({"top_k": 2.0}, TypeError, r"top_k must be an int or int64 \[B\], got 2.0"),
    ({"top_k": torch.tensor([1, -3])}, ValueError, r"top_k must be at least 1 .* got \[1, -3\]"),
    ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\] \(1: off\), got 0.0"),
    ({"top_p": torch.ones(3)}, ValueError, r"top_p must have shape \[B\] = \[2\], got float32 \[3\]"),
    ({"min_p": 1.5}, ValueError, r"min_p must be in \[0, 1\] \(0: off\), got 1.5"),
    ({"bitmask": torch.zeros(2, 3, 1, dtype=torch.int32)}, ValueError, r"bitmask must have shape .* = \[2, 4, 1\]"),
    ({"bitmask": torch.zeros(2, 4, 1)}, TypeError, r"bitmask must be int32 \[B, K\+1, ceil\(V/32\)\], got float32"),
    (
        {"penalties": Penalties(TOKENS, TOKENS, repetition_penalty=0.0)},
        ValueError,
        "repetition_penalty must be finite and positive",
    ),
    (
        {"penalties": Penalties(TOKENS, TOKENS, presence_penalty=float("inf"))},
        ValueError,
        "presence_penalty must be finite",
    ),
    (
        {"penalties": Penalties(TOKENS, TOKENS, frequency_penalty=-1e39)},
        ValueError,
        "frequency_penalty must be finite .* got -1e",
    ),
    (
        {"penalties": Penalties(TOKENS, TOKENS, repetition_penalty=1e-46)},
        ValueError,
        "repetition_penalty must be finite and positive .* got 1e-46",
    ),
    ({"rule": ["token"]}, ValueError, r"rule must be one of .* got \['token'\]"),
    ({"target_logits": TARGET.numpy()}, TypeError, r"target_logits must be float32 .* got array"),
    ({"logprobs": 1}, TypeError, "logprobs must be True or False, got 1"),
    ({"penalties": Penalties(TOKENS + 7, TOKENS)}, ValueError, r"penalties.prompt must be -1 or in \[0, 7\)"),
    (
        {"penalties": Penalties(TOKENS, TOKENS[:1])},
        ValueError,
        r"penalties.output must have shape \[B, Lo\] = \[2, \*\]",
    ),
    ({"penalties": 1.2}, TypeError, "penalties must be Penalties, got 1.2"),
    ({"logit_bias": LogitBias(TOKENS, TOKENS)}, TypeError, r"logit_bias\[1\] must be float32 \[B, M\], got int64"),
    ({"logit_bias": 3}, TypeError, r"logit_bias must be LogitBias, got 3"),
    ({"cu_rows": torch.tensor([0, 4])}, ValueError, r"target_logits must have shape \[N, V\]"),
    ({**RAGGED, "cu_rows": torch.tensor([0, 4])}, ValueError, r"cu_rows must have shape \[B\+1\] = \[3\]"),
    (
        {**RAGGED, "cu_rows": torch.tensor([0, 0, 4])},
        ValueError,
        "cu_rows must ascend from 0 to at most 8 in steps of 1",
    ),
    ({**RAGGED, "cu_rows": torch.tensor([0, 4, 9])}, ValueError, r"cu_rows must ascend .* got \[0, 4, 9\]"),
    ({"backend": "cuda9"}, ValueError, "backend must be None or one of .* got 'cuda9'"),
]


#: One number for all, which Python makes a tensor of; or tensors, which the C++ looks at before Python does.
KEYS = pytest.mark.parametrize("key", [1, torch.ones(2, dtype=torch.int64)], ids=["number", "tensor"])


@KEYS
@pytest.mark.parametrize(
    ("change", "error", "message"), VERIFY, ids=lambda x: next(iter(x)) if isinstance(x, dict) else ""
)
def test_verify_chain(change, error, message, key):
    named = {
        "target_logits": TARGET, "draft_tokens": TOKENS, "draft_logits": DRAFT, "draft_stats": None,
        "draft_temperature": 1.0 if change.get("draft_stats") is None and "draft_logits" not in change else None,
        "seed": key, "position": key, **change,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        verify_chain(**named)


@KEYS
@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_bad_ids_are_found_by_every_cpu_backend(name, key):
    tokens = torch.tensor([[0, -1, 99], [0, 1, 99]])
    with pytest.raises(ValueError, match=r"draft_tokens must be -1 or in \[0, 7\), got 99 at \[1, 2\]"):
        verify_chain(TARGET, tokens, seed=key, position=key, backend=name)
    verify_chain(TARGET, tokens, seed=key, position=key, num_draft=torch.tensor([3, 2]), backend=name)


def apart(x):
    """The same tensor, not contiguous."""
    return torch.stack([x, x], -1)[..., 0]


def test_what_the_cpp_refuses_is_brought_into_shape():
    """Strides and widths that the operators do not take as they are give what others give."""
    target, draft = torch.randn(2, 4, 7), torch.randn(2, 3, 7)
    key, stats = torch.tensor([5, 5]), sample(draft[0], seed=1, position=1).stats.repeat(2, 1, 1)
    named = {"seed": key, "position": key, "num_draft": torch.tensor([3, 2]), "temperature": 0.7}
    want = verify_chain(target, TOKENS, draft, stats, **named)
    for change in (
        {"seed": torch.tensor(5).expand(2)}, {"seed": 5}, {"num_draft": apart(named["num_draft"]).int()},
        {"temperature": torch.tensor([0.7, 0.7])}, {"draft_stats": apart(stats)}, {"draft_tokens": apart(TOKENS)},
    ):  # fmt: skip
        given = {"target_logits": target, "draft_tokens": TOKENS, "draft_logits": draft, "draft_stats": stats}
        assert torch.equal(verify_chain(**{**given, **named, **change}).tokens, want.tokens), change
    ragged = {"cu_rows": torch.tensor([0, 4, 8]), "seed": key, "position": key}
    rows = target.flatten(0, 1)
    want = verify_chain(rows, TOKENS, **ragged)
    assert torch.equal(verify_chain(rows, TOKENS, **{**ragged, "cu_rows": ragged["cu_rows"].int()}).tokens, want.tokens)
    logits = torch.randn(2, 7)
    want = sample(logits, seed=key, position=key, row=torch.tensor([3, 3]))
    for change in ({"row": 3}, {"seed": 5, "row": 3}, {"seed": torch.tensor(5).expand(2), "row": 3}):
        assert torch.equal(sample(logits, **{"seed": key, "position": key, **change}).tokens, want.tokens), change


def test_operators_in_cpp_refuse_what_they_could_not_read():
    """Called as they are, by whoever finds them: no crash, and who asks the functions is told what is wrong."""
    key = torch.tensor([1, 1])
    arguments = [
        TARGET,
        TOKENS,
        DRAFT,
        None,
        None,
        None,
        1.0,
        key,
        key,
        None,
        None,
        None,
        1.0,
        0,
        1.0,
        0.0,
        *[None] * 5,
        0,
        False,
        False,
    ]
    op = torch.ops.specdec.verify_chain.default
    op(*arguments, None)
    wrong_ones = {
        0: TARGET[:1], 1: TOKENS + 7, 2: DRAFT[..., :6], 3: STATS[:1], 4: key.int(), 5: key, 6: -1.0, 7: key.int(),
        8: key[:1], 9: key.float(), 10: key, 11: TARGET[0], 12: -1.0, 16: key, 17: key.int(),
    }  # fmt: skip
    for index, wrong in wrong_ones.items():
        with pytest.raises(RuntimeError, match="an argument is not taken as it is"):
            op(*arguments[:index], wrong, *arguments[index + 1 :], None)


SAMPLE = [
    ({"logits": torch.zeros(7)}, ValueError, r"logits must have shape \[R, V\]"),
    ({"logits": torch.zeros(2, 7).long()}, TypeError, "logits must be float32 or bfloat16 or float16"),
    ({"row": 65536}, ValueError, r"row must be in \[0, 65536\), got 65536"),
    ({"row": -1}, ValueError, r"row must be in \[0, 65536\), got -1"),
    ({"seed": True}, TypeError, r"seed must be int64 \[R\], got True"),
    ({"temperature": torch.ones(3)}, ValueError, r"temperature must have shape \[R\] = \[2\]"),
]


@KEYS
@pytest.mark.parametrize(
    ("change", "error", "message"), SAMPLE, ids=lambda x: next(iter(x)) if isinstance(x, dict) else ""
)
def test_sample(change, error, message, key):
    with pytest.raises(error, match=message):
        sample(**{"logits": torch.zeros(2, 7), "seed": key, "position": key, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [({"tag": 2**32}, "tag must be"), ({"first": -1}, "first must be"), ({"counters": -1}, "counters must")],
)
def test_noise_words(change, message):
    with pytest.raises(ValueError, match=message):
        noise_words(**{"seed": torch.tensor([1]), "position": torch.tensor([1]), "tag": 0, **change})


def test_tensors_on_different_devices():
    with pytest.raises(ValueError, match="draft_tokens must be on meta like target_logits, got cpu"):
        verify_chain(TARGET.to("meta"), TOKENS, seed=1, position=1)


AWAY = torch.zeros(2, device="meta")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("seed", {"seed": AWAY.long()}),
        ("temperature", {"temperature": AWAY}),
        ("num_draft", {"num_draft": AWAY.long()}),
        ("draft_logits", {"draft_logits": DRAFT.to("meta"), "draft_temperature": 1.0}),
        ("draft_stats", {"draft_logits": DRAFT, "draft_stats": STATS.to("meta")}),
        ("bitmask", {"bitmask": torch.zeros(2, 4, 1, dtype=torch.int32, device="meta")}),
        ("penalties.output", {"penalties": Penalties(TOKENS, TOKENS.to("meta"))}),
        ("presence_penalty", {"penalties": Penalties(TOKENS, presence_penalty=AWAY)}),
        (r"logit_bias\[1\]", {"logit_bias": LogitBias(TOKENS, torch.zeros(2, 3, device="meta"))}),
    ],
)
def test_what_is_on_another_device_is_named(name, change):
    with pytest.raises(ValueError, match=f"^{name} must be on cpu like (target_logits|draft_tokens), got meta"):
        verify_chain(TARGET, TOKENS, **{"seed": 1, "position": 1, **change})


dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64])
values = st.sampled_from([0.0, 1.0, -3.0, float("nan"), float("inf"), float("-inf"), 6e4])


def drawn_from(draw, dense, shape):
    """How drafts were drawn: by scalars, at a temperature, or they are point masses."""
    by_stats = dense and draw(st.booleans())
    heats = st.sampled_from([0.0, 1e-30, 0.5, 1.0, 1e30]) | st.just(torch.linspace(0, 1, shape[0]))
    return {
        "draft_stats": torch.full(shape, draw(values)) if by_stats else None,
        "draft_temperature": draw(heats) if dense and not by_stats else None,
    }


@st.composite
def calls(draw):
    """Arguments that are nearly right: sizes that may disagree, any ids, odd values, strides, lengths."""
    batch, longest, vocab = draw(st.integers(0, 3)), draw(st.integers(0, 3)), draw(st.integers(1, 300))

    def logits(rows):
        width = vocab + draw(st.sampled_from([0, 0, 0, 1]))
        x = torch.full((batch, rows, width), draw(values))
        if x.numel():
            x.view(-1)[:: draw(st.integers(1, 9))] = draw(values)
        return x.to(draw(dtypes) if draw(st.integers(0, 5)) == 0 else torch.float32)[..., :vocab]

    ids = st.integers(-3, vocab + 2) if draw(st.booleans()) else st.integers(-1, vocab - 1)
    tokens = torch.tensor([[draw(ids) for _ in range(longest)] for _ in range(batch)], dtype=torch.int64)
    tokens = tokens.reshape(batch, longest)
    dense = draw(st.booleans())
    return {
        "target_logits": logits(longest + 1),
        "draft_tokens": tokens,
        "draft_logits": logits(longest) if dense else None,
        **drawn_from(draw, dense, (batch, longest, 3)),
        "seed": draw(st.integers(-(2**63), 2**63 - 1) | st.just(torch.arange(batch))),
        "position": draw(st.integers(0, 2**63 - 1) | st.just(torch.arange(batch))),
        "num_draft": draw(st.none() | st.just(torch.randint(-2, 6, (batch,)))),
        "temperature": draw(st.sampled_from([0.0, 1e-30, 1e-4, 0.7, 1e30])),
        "rule": draw(st.sampled_from(["token", "block", "coupled"])),
        "top_k": draw(st.sampled_from([None, 1, 7, 10**6])),
        "top_p": draw(st.sampled_from([None, 1e-6, 0.5, 1.0])),
        "min_p": draw(st.sampled_from([None, 1e-9, 0.5, 1.0])),
        "bitmask": draw(st.none() | st.just(torch.randint(-9, 9, (batch, longest + 1, -(-vocab // 32))).int())),
        "penalties": draw(
            st.none() | st.just(Penalties(tokens.clamp(-1, vocab - 1), tokens[:, :0], frequency_penalty=0.5))
        ),
        "logprobs": draw(st.booleans()),
    }


def by_both(function, named):
    """What the C++ and the reference give, or None from both: an error that says what must be."""
    results = []
    for name in ("cpu", "reference"):
        try:
            results.append(function(**named, backend=name))
        except (ValueError, TypeError) as error:
            assert "must" in str(error)  # noqa: PT017
            results.append(None)
    assert (results[0] is None) == (results[1] is None)
    return results


@settings(max_examples=some(150, 400), deadline=None, derandomize=True)
@given(calls())
def test_nothing_crashes_and_ids_stay_in_range(named):
    vocab = named["target_logits"].shape[-1]
    results = by_both(verify_chain, named)
    for result in results:
        if result is not None:
            assert ((result.tokens >= -1) & (result.tokens < vocab)).all()
            assert (result.tokens[:, 0] >= 0).all()
            assert ((result.tokens >= 0).sum(1) == result.num_accepted + 1).all()
    if results[0] is not None:
        assert torch.equal(results[0].valid, results[1].valid)


# --- trees ------------------------------------------------------------------------------------------------------------

PARENTS = torch.tensor([[-1, 0, 0, 1], [-1, 0, 1, -1]])
TREE_TOKENS = torch.zeros(2, 4, dtype=torch.int64)
TREES = [
    ({"target_logits": TARGET[:, :3]}, ValueError, r"target_logits must have shape \[B, N, V\] = \[2, 4, \*\]"),
    ({"draft_tokens": TREE_TOKENS[:, :3]}, ValueError, r"draft_tokens must have shape \[B, N\] = \[2, 4\]"),
    ({"draft_tokens": TREE_TOKENS + 7}, ValueError, r"draft_tokens must be in \[0, 7\), got 7 at \[0, 1\]"),
    ({"draft_tokens": TREE_TOKENS - 1}, ValueError, r"draft_tokens must be in \[0, 7\), got -1 at \[0, 1\]"),
    ({"parents": PARENTS.float()}, TypeError, r"parents must be int64 or int32 \[B, N\], got float32"),
    ({"parents": PARENTS + 1}, ValueError, r"parents must be -1 for the root, .* got 0 at \[0, 0\]"),
    ({"parents": PARENTS * 2}, ValueError, r"parents must be -1 for the root, .* got -2 at \[0, 0\]"),
    ({"parents": torch.tensor([[-1, 0, 2, 1]] * 2)}, ValueError, r"parents must be .* got 2 at \[0, 2\]"),  # a cycle
    ({"parents": torch.tensor([[-1, 0, 3, 0]] * 2)}, ValueError, r"parents must be .* got 3 at \[0, 2\]"),  # forward
    ({"parents": torch.tensor([[-1, 0, -1, 0]] * 2)}, ValueError, r"parents must be .* got 0 at \[0, 3\]"),  # missing
    (
        {"draft_logits": TARGET[..., :6], "draft_temperature": 1.0, "siblings": "iid", "rule": "recursive"},
        ValueError,
        r"draft_logits must have shape \[B, N, V\] = \[2, 4, 7\]",
    ),
    ({"draft_stats": torch.zeros(2, 4, 3)}, ValueError, "draft_stats needs the draft_logits"),
    (
        {"rule": "token"},
        ValueError,
        r"rule must be one of \['coupled', 'recursive', 'traversal', 'walk'\], got 'token'",
    ),
    ({"siblings": "top"}, ValueError, r"siblings must be one of \['iid', 'without_replacement'\], got 'top'"),
    ({"bitmask": torch.zeros(2, 3, 1).int()}, ValueError, r"bitmask must have shape .* = \[2, 4, 1\]"),
    ({"seed": torch.zeros(3, dtype=torch.int64)}, ValueError, r"seed must have shape \[B\] = \[2\]"),
    ({"temperature": -1.0}, ValueError, "temperature must be finite and not negative, got -1.0"),
    ({"backend": "gpu"}, ValueError, "backend must be None or one of"),
]


@pytest.mark.parametrize(
    ("change", "error", "message"), TREES, ids=lambda x: next(iter(x)) if isinstance(x, dict) else ""
)
def test_verify_tree(change, error, message):
    named = {
        "target_logits": TARGET, "draft_tokens": TREE_TOKENS, "parents": PARENTS, "seed": 1, "position": 1, **change,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        verify_tree(**named)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, r"count must be in \[1, 65536\), got 0"),
        ({"count": 2.0}, r"count must be an int, got 2.0"),
        ({"method": "best"}, r"method must be one of \['iid', 'race', 'top', 'without_replacement'\], got 'best'"),
        ({"row": 65536}, r"row must be in \[0, 65536\), got 65536"),
        ({"logits": torch.zeros(2, 7, 1)}, r"logits must have shape \[R, V\]"),
    ],
)
def test_sample_children(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        sample_children(**{"logits": torch.zeros(2, 7), "count": 2, "seed": 1, "position": 1, **change})


@st.composite
def trees(draw):
    """Arguments that are nearly right: any parents and ids, odd values."""
    batch, nodes, vocab = draw(st.integers(0, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 300))
    strange = draw(st.integers(0, 3)) == 0

    def logits():
        x = torch.full((batch, nodes, vocab), draw(values))
        if x.numel():
            x.view(-1)[:: draw(st.integers(1, 9))] = draw(values)
        return x

    def parent(node):
        if node == 0:
            return -1
        return draw(st.integers(-2, nodes)) if strange and draw(st.booleans()) else draw(st.integers(0, node - 1))

    tokens = [
        [draw(st.integers(-2 if strange else 0, vocab - 1 + strange)) for _ in range(nodes)] for _ in range(batch)
    ]
    parents = [[parent(node) for node in range(nodes)] for _ in range(batch)]
    dense = draw(st.booleans())
    return {
        "target_logits": logits(),
        "draft_tokens": torch.tensor(tokens, dtype=torch.int64).reshape(batch, nodes),
        "parents": torch.tensor(parents, dtype=torch.int64).reshape(batch, nodes),
        "draft_logits": logits() if dense else None,
        **drawn_from(draw, dense, (batch, nodes, 3)),
        "seed": draw(st.integers(-(2**63), 2**63 - 1) | st.just(torch.arange(batch))),
        "position": draw(st.integers(0, 2**63 - 1) | st.just(torch.arange(batch))),
        "temperature": draw(st.sampled_from([0.0, 1e-30, 1e-4, 0.7, 1e30])),
        "rule": draw(st.sampled_from(["walk", "recursive", "traversal", "coupled"])),
        "siblings": draw(st.sampled_from(["iid", "without_replacement"])),
        "top_k": draw(st.sampled_from([None, 1, 7, 10**6])),
        "top_p": draw(st.sampled_from([None, 1e-6, 0.5, 1.0])),
        "logprobs": draw(st.booleans()),
    }


@settings(max_examples=some(150, 300), deadline=None, derandomize=True)
@given(trees())
def test_no_tree_crashes_and_ids_stay_in_range(named):
    vocab, nodes = named["target_logits"].shape[-1], named["target_logits"].shape[1]
    results = by_both(verify_tree, named)
    for result in results:
        if result is not None:
            assert ((result.tokens >= -1) & (result.tokens < vocab)).all()
            assert ((result.nodes >= -1) & (result.nodes < nodes)).all()
            assert (result.nodes[:, :1] == 0).all()
            for x in (result.tokens, result.nodes):
                assert ((x >= 0).sum(1) == result.num_accepted + 1).all()
