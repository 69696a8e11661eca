"""SGLang's plugin: held against SGLang's own files where `make peers` has fetched them, and its interface always."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import sglang_peer
import torch
import triton.language as tl
from distributions import g_test, limit, uniforms
from triton.runtime.interpreter import TensorHandle

from specdec_kernels.contract import Purpose
from specdec_kernels.integrations import plugins
from specdec_kernels.integrations import sglang as plugin

V, K, B = 300, 3, 12


@pytest.fixture(scope="module", params=["stand-in", "peer"])
def sglang(request):
    with sglang_peer.sglang(request.param) as names:
        yield names


@pytest.fixture
def registered(sglang, monkeypatch):
    """SGLang with the plugin; taken out again afterwards."""
    for module, name in ((sglang.eagle, "eagle_sample"), (sglang.blockwise, "blockwise_rejection_triton")):
        monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(plugins.metadata, "version", lambda name: plugin.VERSIONS[-1])
    vars(sglang.spec).update(
        speculative_use_rejection_sampling=False, speculative_use_block_verification=False,
        speculative_accept_threshold_single=1.0, speculative_accept_threshold_acc=1.0,
    )  # fmt: skip
    own = sglang.eagle.eagle_sample, sglang.blockwise.blockwise_rejection_triton
    sglang.hooks.HookRegistry.reset()
    plugin.register()
    sglang.hooks.HookRegistry.apply_hooks()
    sglang.own_eagle_sample, sglang.own_blockwise = own
    assert sglang.eagle.eagle_sample is not own[0]
    assert sglang.blockwise.blockwise_rejection_triton is not own[1]
    yield sglang
    sglang.hooks.HookRegistry.reset()


def test_other_releases_are_left_alone(sglang, monkeypatch, caplog):
    monkeypatch.setattr(plugins.metadata, "version", lambda name: "0.6.0")
    sglang.hooks.HookRegistry.reset()
    with caplog.at_level(logging.WARNING):
        plugin.register()
    assert [record.message for record in caplog.records] == [
        "specdec-kernels changes nothing in sglang 0.6.0: its plugin knows 0.5.23"
    ]
    own = sglang.eagle.eagle_sample
    sglang.hooks.HookRegistry.apply_hooks()
    assert sglang.eagle.eagle_sample is own


def dspark(columns=V, dense=True, noise=1.0):
    """A step of DSpark; candidates are drawn from the drafts' rows."""
    draft = torch.randn(B + 2, K + 1, columns) * 4
    heat = torch.rand(B, 1) + 0.5
    drawn = (draft[:B, :K] / heat[..., None]).softmax(-1)
    candidates = torch.cat([torch.zeros(B, 1), torch.multinomial(drawn.flatten(0, 1), 1).view(B, K)], 1).long()
    target = noise * torch.randn(B, K + 1, V)
    target[..., :columns] += draft[:B, :, :V]
    return SimpleNamespace(
        candidates=candidates, target_logits=target.flatten(0, 1).bfloat16(),
        draft_logits=draft.bfloat16() if dense else None, target_temperatures=torch.rand(B, 1) + 0.5,
        draft_temperatures=heat[:, 0], noise=SimpleNamespace(key=77, counter=torch.tensor([5])),
        cutoff_verify_lens=None,
    )  # fmt: skip


@pytest.mark.parametrize("cutoff", [False, True])
@pytest.mark.parametrize(("columns", "dense"), [(V, True), (V - 60, True), (V, False)])
def test_dspark_decides_as_sglangs_kernel(registered, monkeypatch, columns, dense, cutoff):
    """With our uniforms in the place of its own, SGLang's kernel accepts the same drafts and cuts the same off."""
    if registered.source != "peer":
        pytest.skip("needs SGLang's kernels")

    def rand(seed, offset):
        request, row = divmod(int(offset.handle.data.item()), K + 1)
        u = uniforms(torch.tensor([77]), Purpose.ACCEPT, 5 * (1 << 20) + request, row)
        return tl.core.tensor(TensorHandle(np.array([u.item()], np.float32), tl.float32), tl.float32)

    seen = []
    for trial in range(3):
        torch.manual_seed(trial)
        step = dspark(columns, dense, noise=0.7 * trial)
        if cutoff:
            step.cutoff_verify_lens = torch.randint(1, K + 2, (B,))
        ours = registered.blockwise.blockwise_rejection_triton(**vars(step))
        assert step.noise.counter.tolist() == [6]
        step.noise.counter -= 1
        with monkeypatch.context() as patched:
            patched.setattr(tl, "rand", rand)
            want = registered.own_blockwise(**vars(step))
        assert [result.dtype for result in ours] == [result.dtype for result in want]
        assert ours[0].tolist() == want[0].tolist()
        assert ours[2].tolist() == want[2].tolist()
        cut = want[2] > 0
        assert ours[1][cut].tolist() == want[1][cut].tolist()
        seen += (want[0] + want[2]).tolist()
    assert set(seen) == {0, 1, 2, 3}


@pytest.mark.parametrize("wrong", [False, True])
def test_dspark_samples_in_distribution(registered, wrong):
    """First tokens of many requests, whose drafts have two columns fewer: the target's tail keeps its mass. Control:
    drafts said to be drawn at another temperature."""
    torch.manual_seed(0)
    count, draft, target = 4000, torch.randn(6), torch.randn(8)
    target[6:] = target.max()
    tokens = torch.multinomial((draft / 0.7).softmax(0), count, replacement=True)
    kept, behind, _ = registered.blockwise.blockwise_rejection_triton(
        candidates=torch.stack([tokens * 0, tokens], 1),
        target_logits=target.repeat(2 * count, 1),
        draft_logits=draft.expand(count, 1, 6),
        target_temperatures=torch.full((count, 1), 0.6),
        draft_temperatures=torch.full((count,), 1.5 if wrong else 0.7),
        noise=SimpleNamespace(key=3, counter=torch.zeros(1, dtype=torch.int64)),
    )
    first = torch.where(kept > 0, tokens, behind)
    statistic, freedom = g_test(
        torch.bincount(first, minlength=8).double().numpy(), (target / 0.6).softmax(0).double().numpy()
    )
    assert (statistic < limit(freedom)) != wrong


@pytest.mark.parametrize("columns", [6, 8, 11])
def test_rows_of_another_width_are_verified_as_they_are(columns, monkeypatch):
    """Without a copy; the result is that of rows as wide as the target's."""
    torch.manual_seed(0)
    draft, target = torch.randn(40, 2, columns), torch.randn(120, 8)
    wide = torch.nn.functional.pad(draft[..., :8], (0, 8 - min(columns, 8)), value=-torch.inf)
    own, seen = plugin.verify_chain, []
    monkeypatch.setattr(plugin, "verify_chain", lambda *a, **k: seen.append(k["draft_logits"]) or own(*a, **k))
    found = [
        plugin.blockwise_rejection(
            candidates=torch.arange(120).view(40, 3) % 6,
            target_logits=target,
            draft_logits=rows,
            target_temperatures=torch.ones(40, 1),
            draft_temperatures=torch.ones(40),
            noise=SimpleNamespace(key=3, counter=torch.zeros(1, dtype=torch.int64)),
        )
        for rows in (draft, wide)
    ]
    assert seen[0].data_ptr() == draft.data_ptr()
    assert all(map(torch.equal, *found))
    assert 0 < int(found[0][0].sum()) < 80


def test_dspark_steps_and_requests_have_noise_of_their_own(registered):
    """All requests alike, nothing drafted that can be accepted: tokens are independent draws."""
    count = 2000
    step = {
        "candidates": torch.tensor([[0, 8]]).expand(count, 2),
        "target_logits": torch.tensor([0.0] * 8 + [-torch.inf]).repeat(2 * count, 1),
        "draft_logits": None,
        "target_temperatures": torch.ones(count, 1),
        "draft_temperatures": torch.ones(count),
        "noise": SimpleNamespace(key=3, counter=torch.zeros(1, dtype=torch.int64)),
    }
    one, two = (registered.blockwise.blockwise_rejection_triton(**step)[1] for _ in range(2))
    statistic, freedom = g_test(torch.bincount(one * 8 + two, minlength=64).double().numpy(), np.full(64, 1 / 64))
    assert statistic < limit(freedom)


def test_dspark_cuts_off(registered):
    """Every draft is accepted; the first that was cut off is the token behind."""
    candidates = torch.tensor([[0, 5, 6, 7]]).expand(4, 4)
    step = dspark(dense=False)
    step.candidates, step.cutoff_verify_lens = candidates, torch.tensor([1, 2, 3, 4])
    step.target_logits = torch.full((4, 4, V), -100.0).scatter(
        2, torch.tensor([5, 6, 7, 8]).view(1, 4, 1).expand(4, 4, 1), 0
    )
    step.target_logits, step.target_temperatures = step.target_logits.flatten(0, 1), torch.ones(4, 1)
    kept, behind, trimmed = registered.blockwise.blockwise_rejection_triton(**vars(step))
    assert (kept.tolist(), behind.tolist(), trimmed.tolist()) == ([0, 1, 2, 3], [5, 6, 7, 8], [3, 2, 1, 0])
    step.cutoff_verify_lens = None
    kept, behind, trimmed = registered.blockwise.blockwise_rejection_triton(**vars(step))
    assert (kept.tolist(), behind.tolist(), trimmed.tolist()) == ([3] * 4, [8] * 4, [0] * 4)


def eagle(tree=False, **info):
    """A step of EAGLE: chains with the distributions that drafts were drawn from, or trees of one shape."""
    nodes = 6 if tree else K + 1
    draft = (torch.randn(B, K, V) * 3).softmax(-1)
    if tree:
        links = plugin.from_parents(torch.tensor([[-1, 0, 0, 1, 1, 3]]).expand(B, nodes))
        tokens = torch.randint(V, (B, nodes))
    else:
        links = plugin.from_parents(torch.tensor([[-1, 0, 1, 2]]).expand(B, nodes))
        drawn = torch.multinomial(draft.flatten(0, 1), 1).view(B, K)
        tokens = torch.cat([torch.zeros(B, 1, dtype=torch.int64), drawn], 1)
    target = torch.randn(B, nodes, V)
    target[:, :K] += draft.log()
    return SimpleNamespace(
        verify_input=SimpleNamespace(
            draft_token=tokens.flatten(), draft_token_num=nodes, max_tree_depth=4, tree_topk=2 if tree else 1,
            retrieve_index=links.retrive_index, retrieve_next_token=links.retrive_next_token,
            retrieve_next_sibling=links.retrive_next_sibling, draft_probs=None if tree else draft,
        ),
        batch=SimpleNamespace(
            device="cpu", seq_lens=torch.arange(B) + 9, forward_mode=SimpleNamespace(is_idle=lambda: False),
            sampling_info=SimpleNamespace(**{
                "temperatures": torch.rand(B, 1) + 0.5, "is_all_greedy": False, "has_watermark_candidates": False,
                "top_ks": torch.full((B,), 1 << 30, dtype=torch.int32), "need_top_k_sampling": False,
                "top_ps": torch.ones(B), "need_top_p_sampling": False, "min_ps": torch.zeros(B),
                "need_min_p_sampling": False, "acc_additive_penalties": None, "acc_scaling_penalties": None,
                "logit_bias": None, "sampling_seed": torch.arange(B) + 50,
            } | info),
        ),
        logits_output=SimpleNamespace(next_token_logits=target.flatten(0, 1)),
    )  # fmt: skip


FILTERS = {
    "top_ks": torch.arange(2, 2 + 3 * B, 3, dtype=torch.int32), "need_top_k_sampling": True,
    "top_ps": torch.linspace(0.5, 1, B), "need_top_p_sampling": True,
}  # fmt: skip
ADJUSTED = {
    "acc_additive_penalties": -torch.rand(B, V, generator=torch.Generator().manual_seed(1)),
    "acc_scaling_penalties": 1 + torch.rand(B, V, generator=torch.Generator().manual_seed(2)),
    "logit_bias": torch.randn(B, V, generator=torch.Generator().manual_seed(3)),
}  # fmt: skip


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("info", [{}, FILTERS, ADJUSTED], ids=["plain", "filters", "adjusted"])
def test_eagle_decides_as_sglangs_kernel(registered, monkeypatch, info, block):
    """SGLang's own function, with our uniforms for its own, accepts the same drafts and leaves the same logits."""
    if registered.source != "peer":
        pytest.skip("needs SGLang's kernels")
    registered.spec.speculative_use_rejection_sampling = True
    registered.spec.speculative_use_block_verification = block

    def same_uniforms(*, sampling_info, seq_lens, **_):
        seeds = sampling_info.sampling_seed
        rows = [
            [uniforms(seed[None], Purpose.ACCEPT, int(position), row).item() for row in range(K + 1)]
            for seed, position in zip(seeds, seq_lens, strict=True)
        ]
        return torch.tensor(rows), torch.rand(B)

    monkeypatch.setattr(registered.eagle, "_verify_coins", same_uniforms)
    lengths = []
    for trial in range(3):
        torch.manual_seed(trial)
        ours_step = eagle(**info)
        torch.manual_seed(trial)
        step = eagle(**info)
        ours, want = registered.eagle.eagle_sample(**vars(ours_step)), registered.own_eagle_sample(**vars(step))
        assert [(r.dtype, r.shape) for r in ours] == [(r.dtype, r.shape) for r in want]
        predict, lens, index = want
        assert ours[1].tolist() == lens.tolist()
        assert ours[2].tolist() == index.tolist()
        kept = torch.arange(K + 1) < lens[:, None] - 1
        rows = index[kept].long()
        assert ours[0][rows].tolist() == predict[rows].tolist()
        assert torch.equal(ours_step.logits_output.next_token_logits, step.logits_output.next_token_logits)
        lengths += lens.tolist()
    assert set(lengths) == {1, 2, 3, 4}


@pytest.mark.parametrize("wrong", [False, True])
def test_chains_are_sampled_in_distribution(registered, wrong):
    """First tokens of many requests. Control: drafts whose distributions are said to be others."""
    registered.spec.speculative_use_rejection_sampling = True
    torch.manual_seed(6)
    count, draft, target = 4000, torch.randn(6).softmax(0), torch.randn(6)
    tokens = torch.multinomial(draft, count, replacement=True)
    links = plugin.from_parents(torch.tensor([[-1, 0]]).expand(count, 2))
    step = eagle(temperatures=torch.full((count, 1), 0.6), sampling_seed=torch.arange(count))
    vars(step.verify_input).update(
        draft_token=torch.stack([tokens * 0, tokens], 1).flatten(), draft_token_num=2, max_tree_depth=2,
        retrieve_index=links.retrive_index, retrieve_next_token=links.retrive_next_token,
        retrieve_next_sibling=links.retrive_next_sibling,
        draft_probs=(draft.flip(0) if wrong else draft).expand(count, 1, 6),
    )  # fmt: skip
    step.batch.seq_lens = torch.full((count,), 9)
    step.logits_output.next_token_logits = target.repeat(2 * count, 1)
    predict, _, index = registered.eagle.eagle_sample(**vars(step))
    statistic, freedom = g_test(
        torch.bincount(predict[index[:, 0].long()], minlength=6).double().numpy(),
        (target / 0.6).softmax(0).double().numpy(),
    )
    assert (statistic < limit(freedom)) != wrong


@pytest.mark.parametrize("block", [False, True])
def test_what_the_operator_is_asked(registered, monkeypatch, block):
    """The rule that the server was started with; noise by the length of each sequence; adjusted logits, in place."""
    registered.spec.speculative_use_rejection_sampling = True
    registered.spec.speculative_use_block_verification = block
    seen = []
    own = plugin.verify_chain
    monkeypatch.setattr(plugin, "verify_chain", lambda *a, **k: seen.append((a, k)) or own(*a, **k))
    step = eagle(**ADJUSTED)
    raw = step.logits_output.next_token_logits.clone().view(B, K + 1, V)
    registered.eagle.eagle_sample(**vars(step))
    (((rows, *_), asked),) = seen
    assert asked["rule"] == ("block" if block else "token")
    assert asked["position"].tolist() == step.batch.seq_lens.tolist()
    want = raw + ADJUSTED["acc_additive_penalties"][:, None]
    penalties = ADJUSTED["acc_scaling_penalties"][:, None]
    want = torch.where(want > 0, want / penalties, want * penalties) + ADJUSTED["logit_bias"][:, None]
    torch.testing.assert_close(rows, want)
    assert rows.data_ptr() == step.logits_output.next_token_logits.data_ptr()


@pytest.mark.parametrize("tree", [False, True])
def test_eagle_has_sglangs_distribution(registered, monkeypatch, tree):
    """The log-probability of each token is that under SGLang's softmax and renormalised rows, min-p behind them."""
    registered.spec.speculative_use_rejection_sampling = not tree
    seen = []
    name = "verify_tree" if tree else "verify_chain"
    own = getattr(plugin, name)
    monkeypatch.setattr(plugin, name, lambda *a, **k: seen.append(own(*a, **k, logprobs=True)) or seen[-1])
    torch.manual_seed(4)
    step = eagle(tree, min_ps=torch.rand(B) * 0.1, need_min_p_sampling=True, **FILTERS)
    info = step.batch.sampling_info
    nodes = step.verify_input.draft_token_num
    predict, lens, index = registered.eagle.eagle_sample(**vars(step))
    probs = (step.logits_output.next_token_logits / info.temperatures.repeat_interleave(nodes, 0)).softmax(-1)
    for kind, limits in (("top_k", info.top_ks), ("top_p", info.top_ps)):
        probs = sglang_peer.filtered(kind)(probs, limits.repeat_interleave(nodes))
    probs[probs < info.min_ps.repeat_interleave(nodes)[:, None] * probs.amax(-1, keepdim=True)] = 0
    probs /= probs.sum(-1, keepdim=True)
    for b, count in enumerate(lens.tolist()):
        rows = index[b, :count].long()
        want = probs[rows, predict[rows].long()].log()
        torch.testing.assert_close(seen[0].logprobs[b, :count], want, atol=2e-4, rtol=0)
        assert rows[0] == b * nodes


def test_seeds_fix_the_tokens(registered):
    """Of a request, whatever else is in the batch; and without seeds two calls differ."""
    torch.manual_seed(5)
    step = eagle(tree=True)
    want = registered.eagle.eagle_sample(**vars(step))[0]
    assert torch.equal(registered.eagle.eagle_sample(**vars(step))[0], want)
    step.batch.sampling_info.sampling_seed[0] += 1
    assert torch.equal(registered.eagle.eagle_sample(**vars(step))[0][6:], want[6:])
    step.batch.sampling_info.sampling_seed = None
    assert not torch.equal(*(registered.eagle.eagle_sample(**vars(step))[0] for _ in range(2)))


@pytest.mark.parametrize(
    "left",
    ["greedy", "idle", "simulated", "watermark", "threshold_single", "threshold_acc", "uno"],
)
def test_what_is_left_to_sglang(registered, monkeypatch, left):
    if registered.source == "peer":
        pytest.skip("asked of the stand-in, whose own function says so")
    step = eagle(tree=True)
    named = {}
    if left == "greedy":
        step.batch.sampling_info.is_all_greedy = True
    elif left == "idle":
        step.batch.forward_mode = SimpleNamespace(is_idle=lambda: True)
    elif left == "simulated":
        monkeypatch.setattr(registered.spec_utils, "SIMULATE_ACC_LEN", 2.5)
    elif left == "watermark":
        step.batch.sampling_info.has_watermark_candidates = True
        assert registered.eagle.eagle_sample(**vars(step)) != "SGLang's own"
        named = {"watermark_state": object()}
    elif left == "uno":
        named = {"uno_target_max_top_k": 8}
    else:
        setattr(registered.spec, f"speculative_accept_{left}", 0.9)
    assert registered.eagle.eagle_sample(**vars(step), **named) == "SGLang's own"


def test_thresholds_do_not_matter_to_chains(registered):
    """SGLang's kernel for chains takes them and does not look at them."""
    registered.spec.speculative_use_rejection_sampling = True
    registered.spec.speculative_accept_threshold_acc = 0.9
    assert len(registered.eagle.eagle_sample(**vars(eagle()))) == 3


@pytest.mark.parametrize("probs", [None, torch.ones(B, K, V - 1)])
def test_chains_need_the_drafts_distributions(registered, probs):
    registered.spec.speculative_use_rejection_sampling = True
    step = eagle()
    step.verify_input.draft_probs = probs
    with pytest.raises(ValueError, match=r"draft_probs must be float32 \[B, K, V\] with V = 300 .* got (None|float32)"):
        registered.eagle.eagle_sample(**vars(step))


def test_the_first_rank_decides(registered, monkeypatch):
    step = eagle(tree=True)
    registered.group.sent.clear()
    registered.eagle.eagle_sample(**vars(step))
    assert registered.group.sent == []
    monkeypatch.setattr(registered.group, "world_size", 2)
    registered.eagle.eagle_sample(**vars(step))
    assert len(registered.group.sent) == 3


def test_masks_of_grammars_are_applied(registered):
    class Only:
        def apply(self, logits):
            logits[:, 1:] = -torch.inf

    step = eagle(tree=True)
    predict, _, _ = registered.eagle.eagle_sample(**vars(step), grammar_mask=Only())
    assert (predict == 0).all()
