"""vLLM's plugin: held against vLLM's own files where `make peers` has fetched them, and its interface always."""

from __future__ import annotations

import ast
import inspect
import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import vllm_stand_in
from distributions import g_test, limit, uniforms
from peers import files
from vllm_peer import GPU
from vllm_peer import vllm as vllm_of

from specdec_kernels import verify_chain
from specdec_kernels.contract import Purpose
from specdec_kernels.integrations import plugins
from specdec_kernels.integrations import vllm as plugin
from specdec_kernels.ops import BACKENDS

V, K, SLOTS = 300, 3, 12
CPU = torch.device("cpu")
SPECULATION = SimpleNamespace(
    num_speculative_tokens=K, rejection_sample_method="standard", enable_adaptive_verification=False,
    synthetic_acceptance_rates=None, fly_window_size=None, fly_entropy_threshold=0.3, fly_entropy_top_k=3,
)  # fmt: skip


def speculation(**changed):
    return SimpleNamespace(**vars(SPECULATION) | changed)


@pytest.fixture(scope="module", params=["stand-in", "peer"])
def vllm(request):
    with vllm_of(request.param) as names:
        names.source = request.param
        yield names


@pytest.fixture
def registered(vllm, monkeypatch):
    """vLLM with the plugin; taken out again afterwards."""
    for owner, name in (
        (vllm.model_states, "resolve_model_state_cls"),
        (vllm.SamplingParams, "_validate_spec_decode"),
        (vllm.InputProcessor, "_validate_params"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(plugins.metadata, "version", lambda name: f"{plugin.VERSIONS[-1]}+cu130")
    plugin._register.cache_clear()
    plugin.register()
    yield vllm
    plugin._register.cache_clear()


class ModelState:
    supports_prompt_embeds = False

    def __init__(self, config, model, encoder_cache, device):
        self.device = device

    def custom_sampler(self, sampler):
        return None


def custom_sampler(vllm, config, sampler, state=ModelState):
    model = SimpleNamespace(get_model_state_cls=lambda: state)
    return vllm.model_states.resolve_model_state_cls(config, model)(config, model, None, CPU).custom_sampler(sampler)


class Engine:
    """Requests in vLLM's slots, and one step of them."""

    def __init__(
        self, vllm, requests, *, lengths=None, vocab=V, slots=SLOTS, method="standard", dtype=torch.bfloat16, **options
    ):
        torch.manual_seed(3)
        self.states = vllm.RequestState(slots, 64, 64, K, vocab, CPU)
        config = SimpleNamespace(
            speculative_config=speculation(rejection_sample_method=method), watermark_config=None, reasoning_config=None
        )
        self.sampler = vllm.Sampler(config, slots, vocab, CPU, self.states, **options)
        # As requests leave them that had the slots before.
        self.sampler.logits_processors[0].logit_bias_token_ids.gpu.fill_(2)
        self.sampler.logits_processors[0].logit_bias.gpu.fill_(9.0)
        for number, request in enumerate(requests):
            prompt = torch.randint(vocab, (5 + number % 7,)).tolist()
            self.states.add_request(str(number), len(prompt) - 1, prompt, len(prompt), 50)
            self.sampler.add_request(self.states.req_id_to_index[str(number)], vllm.SamplingParams(**request))
        self.states.apply_staged_writes()
        self.sampler.apply_staged_writes()
        self.sampler, self.verification = custom_sampler(vllm, config, self.sampler)
        lengths = [K] * len(requests) if lengths is None else lengths
        self.draft_logits = torch.randn(slots, K, vocab).mul(4).to(dtype)
        indices = np.array([self.states.req_id_to_index[str(number)] for number in range(len(requests))])
        self.batch = self._batch(indices, lengths)
        self.logits = torch.randn(len(self.batch.input_ids), vocab) * 0.7
        for row in range(len(self.logits)):  # near what the drafts were drawn from
            local, slot = int(self.batch.expanded_local_pos[row]), int(self.batch.expanded_idx_mapping[row])
            self.logits[row] += self.draft_logits[slot, min(local, K - 1)]
        self.logits = self.logits.to(dtype)

    def _batch(self, slots, lengths):
        rows = [length + 1 for length in lengths]
        cu_rows = np.cumsum([0, *rows]).astype(np.int32)
        local = torch.cat([torch.arange(count) for count in rows])
        mapping = torch.from_numpy(slots)
        expanded = mapping.repeat_interleave(torch.tensor(rows))
        first = torch.from_numpy(self.states.prefill_len.np[slots]).long()
        heat = self.sampler.sampling_states.temperature.gpu[expanded][:, None]
        # Row i was fed draft i - 1.
        scaled = self.draft_logits[expanded, (local - 1).clamp(min=0)].float()
        drawn = torch.multinomial((scaled / heat.where(heat > 0, 1)).softmax(-1), 1)[:, 0]
        ids = torch.where(heat[:, 0] > 0, drawn, scaled.argmax(-1)).int()
        return SimpleNamespace(
            num_reqs=len(slots), input_ids=ids, positions=first.repeat_interleave(torch.tensor(rows)) + local,
            logits_indices=torch.arange(len(ids)), expanded_idx_mapping=expanded, expanded_local_pos=local.int(),
            idx_mapping=mapping, idx_mapping_np=slots, cu_num_logits=torch.from_numpy(cu_rows),
            cu_num_logits_np=cu_rows, seq_lens=(first + torch.tensor(rows)).int(),
            seq_lens_cpu_upper_bound=(first + torch.tensor(rows)).int(),
        )  # fmt: skip

    def step(self, draft_logits="own", **named):
        given = self.draft_logits if isinstance(draft_logits, str) else draft_logits
        return self.verification(self.logits, self.batch, given, **named)

    def only(self, number):
        """The same step of one request alone."""
        lo, hi = self.batch.cu_num_logits_np[number : number + 2]
        alone = object.__new__(Engine)
        vars(alone).update(vars(self), logits=self.logits[lo:hi], batch=self._batch(
            self.batch.idx_mapping_np[number : number + 1], [hi - lo - 1]))  # fmt: skip
        alone.batch.input_ids = self.batch.input_ids[lo:hi]
        return alone

    def processed(self):
        """vLLM's own: the rows after all its parameters, in float32."""
        batch = self.batch
        return self.sampler.apply_sampling_params(
            self.logits, batch.expanded_idx_mapping, batch.idx_mapping, batch.idx_mapping_np, batch.positions,
            batch.input_ids, batch.expanded_local_pos, batch.seq_lens_cpu_upper_bound.numpy(),
        )  # fmt: skip


def seen_calls(monkeypatch, **named):
    """What the plugin asks of verify_chain, and what it gets."""
    calls = []

    def verify_chain(*args, **kwargs):
        calls.append((args, kwargs, plugin_verify(*args, **kwargs, **named)))
        return calls[-1][2]

    plugin_verify = plugin.verify_chain
    monkeypatch.setattr(plugin, "verify_chain", verify_chain)
    return calls


MIXED = [
    {"temperature": 0.0},
    {"temperature": 0.7, "seed": 5},
    {"temperature": 1.3, "top_k": 20, "seed": -7},
    {"temperature": 1.0, "top_p": 0.8, "seed": 1 << 40},
    {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "seed": 8},
    {"temperature": 1.1, "min_p": 0.05, "top_k": 30, "seed": 9},
    {"temperature": 0.8, "logit_bias": {3: 4.0, 100: -2.5}, "seed": 10},
    {"temperature": 0.0, "logit_bias": {7: 30.0}},
]
COPIED = [
    {"temperature": 0.8, "min_p": 0.1, "top_p": 0.7, "seed": 11},
    {"temperature": 0.8, "presence_penalty": 1.5, "seed": 12},
]


@pytest.mark.parametrize("method", ["standard", "block"])
@pytest.mark.parametrize("requests", [MIXED, MIXED + COPIED], ids=["inside", "copied"])
def test_the_distribution_is_vllms(registered, monkeypatch, requests, method):
    """The log-probability of each token under the operator's distribution is that under vLLM's processed rows; and
    what vLLM has nothing to do for is read as the model wrote it."""
    calls = seen_calls(monkeypatch, logprobs=True)
    lengths = [3, 2, 3, 1, 0, 3, 3, 2, 3, 2][: len(requests)]
    engine = Engine(registered, requests, lengths=lengths, dtype=torch.float32, method=method)  # no ties
    out = engine.step()
    (((rows, *_), asked, verified),) = calls
    # The prompt, and the token that was fed first in this step.
    assert torch.equal(asked["position"], engine.states.prefill_len.gpu[engine.batch.idx_mapping] + 1)
    assert asked["rule"] == {"standard": "token", "block": "block"}[method]
    assert (rows.data_ptr() == engine.logits.data_ptr()) == (requests is MIXED)
    want = engine.processed()
    greedy = torch.tensor([request["temperature"] == 0 for request in requests])
    for b, first in enumerate(engine.batch.cu_num_logits_np[:-1]):
        count = int(out.num_sampled[b])
        tokens = out.sampled_token_ids[b, :count]
        ours, theirs = verified.logprobs[b, :count], want[first : first + count].log_softmax(-1)
        if greedy[b]:
            assert tokens.tolist()[-1:] == theirs.argmax(-1).tolist()[-1:]
        else:
            torch.testing.assert_close(ours, theirs.gather(1, tokens[:, None])[:, 0], atol=2e-4, rtol=0)
    assert out.sampled_token_ids.shape == (len(requests), K + 1)
    assert out.num_sampled.dtype == torch.int32


@pytest.mark.parametrize("method", ["standard", "block"])
@pytest.mark.parametrize("dense", [True, False])
def test_decisions_are_vllms(registered, monkeypatch, method, dense):
    """With our uniforms in the place of its own, vLLM's kernel accepts the same drafts; greedy tokens are its own."""
    if registered.source != "peer":
        pytest.skip("needs vLLM's kernels")
    import vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils as theirs

    monkeypatch.setattr(theirs, "tl_rand32", _ours)
    accepted = []
    for trial in range(6):
        requests = [request | {"seed": 100 * trial + n} for n, request in enumerate(MIXED + COPIED)]
        engine = Engine(registered, requests, lengths=[3, 2, 3, 3, 0, 3, 3, 3, 3, 1], method=method)
        torch.manual_seed(trial)
        engine.logits = (engine.logits.float() + torch.randn(engine.logits.shape)).to(engine.logits.dtype)
        if trial == 1:
            engine.batch.input_ids[2] = -1
        drafts = engine.draft_logits if dense else None
        ours = engine.step(drafts)
        _ours.start = engine.batch.positions[engine.batch.cu_num_logits_np[:-1]]
        _ours.seeds = engine.sampler.sampling_states.seeds.gpu[engine.batch.idx_mapping]
        # vLLM's own verification, on the class that the plugin's object is of.
        del engine.verification._verify
        want = engine.verification(engine.logits, engine.batch, drafts)
        assert ours.num_sampled.tolist() == want.num_sampled.tolist(), trial
        for b, request in enumerate(requests):
            kept = int(want.num_sampled[b]) - (request["temperature"] > 0)
            assert ours.sampled_token_ids[b, :kept].tolist() == want.sampled_token_ids[b, :kept].tolist()
        accepted += (want.num_sampled - 1).tolist()
    assert {0, 1, 2, 3} == set(accepted)


def _ours(seed, position, includes_zero):
    """vLLM's uniform, by the noise contract: of the row that is at this position of its request.

    Under the block rule vLLM has mixed the step into the upper half of the seed.
    """
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    where = int(position.handle.data.item())
    value = int(seed.handle.data.item())
    for own, start in zip(_ours.seeds.tolist(), _ours.start.tolist(), strict=True):
        row = where - start
        if 0 <= row <= K and value in (own, own ^ (row << 32)):
            u = uniforms(torch.tensor([own]), Purpose.ACCEPT, start + 1, row)
            return tl.core.tensor(TensorHandle(np.array([u.item()], np.float32), tl.float32), tl.float32)
    raise AssertionError("no request has this seed and position")


@pytest.mark.parametrize("number", range(len(MIXED)))
def test_a_request_does_not_see_its_neighbours(registered, number):
    """Seed and position alone: in a batch, in one where a neighbour needs vLLM's copy, and by itself."""
    with_copy = Engine(registered, MIXED + COPIED)
    inside = Engine(registered, MIXED)
    inside.draft_logits = with_copy.draft_logits
    rows = len(inside.logits)
    inside.logits, inside.batch.input_ids = with_copy.logits[:rows], with_copy.batch.input_ids[:rows]
    want = with_copy.step().sampled_token_ids[number].tolist()
    assert inside.step().sampled_token_ids[number].tolist() == want
    assert inside.only(number).step().sampled_token_ids[0].tolist() == want


@pytest.mark.parametrize("wrong", [False, True])
def test_sampled_in_distribution(registered, monkeypatch, wrong):
    """The first token of many requests that differ in their seeds alone, against vLLM's own numbers. Control: drafts
    that are said to be drawn at another temperature."""
    if registered.source == "peer":
        pytest.skip("vLLM's kernels are interpreted: too many rows")
    count = 4000
    request = {"temperature": 0.6, "min_p": 0.02, "logit_bias": {1: 1.5}}
    engine = Engine(
        registered, [request | {"seed": n} for n in range(count)], lengths=[1] * count, vocab=8, slots=count,
        dtype=torch.float32,
    )  # fmt: skip
    draft, target = torch.randn(8), torch.randn(2, 8)
    engine.draft_logits[:] = draft
    engine.batch.input_ids[1::2] = torch.multinomial((draft / 0.6).softmax(0), count, replacement=True).int()
    engine.logits = target.repeat(count, 1)
    if wrong:
        own = plugin.verify_chain
        heat = torch.full((count,), 2.0)
        monkeypatch.setattr(plugin, "verify_chain", lambda *a, **k: own(*a, **k | {"draft_temperature": heat}))
    first = engine.step().sampled_token_ids[:, 0]
    statistic, freedom = g_test(
        torch.bincount(first, minlength=8).double().numpy(), engine.only(0).processed()[0].softmax(0).double().numpy()
    )
    assert (statistic < limit(freedom)) != wrong


@pytest.mark.parametrize("columns", [V - 40, V + 20])
def test_draft_vocabularies_of_another_size(registered, monkeypatch, columns):
    """What the draft's head has no column for has draft probability 0, so the target keeps its tail; columns beyond the
    target's are padding."""
    calls = seen_calls(monkeypatch)
    engine = Engine(registered, MIXED)
    given = torch.full((SLOTS, K, columns), 50.0 if columns > V else 0.0, dtype=torch.bfloat16)
    given[..., :V] = engine.draft_logits[..., :columns]
    engine.step(given)
    (((logits, tokens), asked, result),) = calls
    wide = engine.draft_logits[engine.batch.idx_mapping].clone()
    wide[..., columns:] = -torch.inf
    assert torch.equal(asked["draft_logits"], wide[..., :columns])
    assert ("draft_to_target" in asked) == (columns < V)
    others = asked | {"draft_logits": wide, "draft_to_target": None}
    assert torch.equal(result.tokens, verify_chain(logits, tokens, **others).tokens)


def test_rows_of_slots_that_follow_each_other_are_not_copied():
    """Nor are they made wider."""
    rows = torch.randn(8, K, V)
    ascending, other = torch.arange(2, 6), torch.tensor([3, 2, 5])
    own = plugin._of_slots(rows, ascending, ascending.numpy())
    assert own.data_ptr() == rows[2].data_ptr()
    assert torch.equal(plugin._of_slots(rows, other, other.numpy()), rows[other])
    for width in (V - 3, V, V + 3):
        given = plugin.draft_rows(own, width)
        assert given["draft_logits"].data_ptr() == own.data_ptr()
        assert given["draft_logits"].shape[-1] == min(V, width)


def test_drafts_that_a_grammar_forbids_end_the_draft(registered):
    engine = Engine(registered, [{"temperature": 0.0}] * 2)
    for row in range(len(engine.logits) - 1):  # what a greedy target accepts
        engine.batch.input_ids[row + 1] = engine.logits[row].argmax()
    assert engine.step().num_sampled.tolist() == [K + 1, K + 1]
    forbidden = torch.zeros(len(engine.logits), dtype=torch.bool)
    forbidden[2] = True
    assert engine.step(invalid_drafts=forbidden).num_sampled.tolist() == [2, K + 1]


@pytest.mark.parametrize(
    ("requests", "options", "copied"),
    [
        ([{"logprobs": 3}], {"logprobs_mode": "raw_logprobs"}, False),
        ([{"logprobs": 3}], {"logprobs_mode": "processed_logprobs"}, True),
        ([{}], {"logprobs_mode": "processed_logprobs"}, False),
        ([{}], {"return_sampling_mask": True}, True),
        ([{}, {"min_p": 0.1, "top_p": 0.5}], {}, True),
        ([{"min_p": 0.1}, {"top_p": 0.5}], {}, False),
        ([{"presence_penalty": 1.0}], {}, True),
    ],
)
def test_what_needs_vllms_copy(registered, requests, options, copied):
    engine = Engine(registered, requests, **options)
    assert plugin._needs_copy(engine.sampler, engine.batch.idx_mapping_np) == copied


@pytest.mark.parametrize(
    "attribute", ["num_allowed_token_ids", "num_stop_token_ids", "num_bad_words", "others", "use_thinking_budget"]
)
def test_what_only_vllm_does_needs_its_copy(registered, attribute):
    engine = Engine(registered, [{}, {}])
    sampler, slots = engine.sampler, engine.batch.idx_mapping_np
    assert not plugin._needs_copy(sampler, slots)
    bias, _, bad_words = sampler.logits_processors
    if attribute == "others":
        sampler.logits_processors.append(object())
    elif attribute == "use_thinking_budget":
        used = np.zeros(SLOTS, dtype=bool)
        sampler.thinking_budget_state = SimpleNamespace(enabled=True, use_thinking_budget=used)
        assert not plugin._needs_copy(sampler, slots)
        used[slots[1]] = True
    else:
        getattr(bad_words if "bad" in attribute else bias, attribute).np[slots[1]] = 1
    assert plugin._needs_copy(sampler, slots)


class Own(ModelState):
    def custom_sampler(self, sampler):
        return sampler, "the model's own"


@pytest.mark.parametrize(
    ("changed", "state", "want", "said"),
    [
        ({"speculative_config": None}, ModelState, None, ""),
        ({"speculative_config": speculation(rejection_sample_method="fly")}, ModelState, None, "got 'fly'"),
        ({"speculative_config": speculation(rejection_sample_method="synthetic")}, ModelState, None, "got 'synthetic'"),
        ({"watermark_config": object()}, ModelState, None, "watermarks"),
        ({}, Own, ("sampler", "the model's own"), ""),
    ],
)
def test_what_is_left_to_vllm(registered, caplog, changed, state, want, said):
    config = SimpleNamespace(**{"speculative_config": SPECULATION, "watermark_config": None} | changed)
    with caplog.at_level(logging.WARNING):
        assert custom_sampler(registered, config, "sampler", state) == want
    assert [said in record.message for record in caplog.records] == [True] * bool(said)


def test_other_releases_are_left_alone(vllm, monkeypatch, caplog):
    before = vllm.model_states.resolve_model_state_cls, vllm.SamplingParams._validate_spec_decode
    monkeypatch.setattr(plugins.metadata, "version", lambda name: "0.34.0")
    plugin._register.cache_clear()
    with caplog.at_level(logging.WARNING):
        plugin.register()
        plugin.register()
    assert [record.message for record in caplog.records] == [
        "specdec-kernels changes nothing in vllm 0.34.0: its plugin knows 0.33.0"
    ]
    assert before == (vllm.model_states.resolve_model_state_cls, vllm.SamplingParams._validate_spec_decode)
    plugin._register.cache_clear()


def test_where_only_the_reference_runs_vllm_is_left_alone(vllm, monkeypatch, caplog):
    """It is there to be read, not to be fast."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(plugins.metadata, "version", lambda name: plugin.VERSIONS[-1])
    unable = {name: replace(backend, reason="not built") for name, backend in BACKENDS.items() if name != "reference"}
    monkeypatch.setattr(plugins, "BACKENDS", {"reference": BACKENDS["reference"], **unable})
    with caplog.at_level(logging.WARNING):
        assert not plugins.fits("vllm", plugin.VERSIONS)
    assert "backend cpu: not built" in caplog.text
    monkeypatch.setattr(plugins, "BACKENDS", {**unable, "cpu": BACKENDS["cpu"]})
    assert plugins.fits("vllm", plugin.VERSIONS)


@pytest.mark.parametrize("asked", [{"min_p": 0.1}, {"logit_bias": {1: 2.0}}])
def test_min_p_and_biases_pass_where_they_are_honoured(registered, asked):
    """Model Runner V1 drops them with speculation, so vLLM's refusal stays there."""
    params = registered.SamplingParams(**asked)
    registered.InputProcessor(SPECULATION, use_v2_model_runner=True)._validate_params(params, ("generate",))
    with pytest.raises(ValueError, match="min_p and logit_bias"):
        params._validate_spec_decode(SPECULATION)
    with pytest.raises(ValueError, match="min_p and logit_bias"):
        registered.InputProcessor(SPECULATION, use_v2_model_runner=False)._validate_params(params, ("generate",))


def parameters(module):
    """Of vLLM's functions and methods their parameters, by qualified name, read from its file without running it."""
    path = files("vllm").joinpath(*module.split("."))
    tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())
    return {
        f"{owner}.{node.name}".lstrip("."): [argument.arg for argument in node.args.args]
        for owner, nodes in [("", tree.body), *((c.name, c.body) for c in tree.body if isinstance(c, ast.ClassDef))]
        for node in nodes
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize("module", vllm_stand_in.MODULES)
def test_the_stand_in_has_vllms_interface(module):
    """What the stand-in's functions are called with, vLLM's take, in that order."""
    theirs = parameters(module)
    for thing in vllm_stand_in.MODULES[module].values():
        functions = vars(thing).values() if isinstance(thing, type) else [thing]
        for function in filter(inspect.isfunction, functions):
            ours = [
                p.name for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
            ]
            if function.__qualname__ not in ("InputProcessor.__init__", "SamplingParams.__init__"):
                named = theirs[function.__qualname__]
                assert [name for name in named if name in ours] == ours, function.__qualname__


def test_the_plugins_verification_takes_what_vllms_takes():
    theirs = parameters(f"{GPU}.spec_decode.rejection_sampler")["RejectionSampler._verify"]
    assert list(inspect.signature(plugin.verify).parameters)[3:] == theirs[1:]
    assert parameters(f"{GPU}.model_states.interface")["ModelState.custom_sampler"] == ["self", "sampler"]
