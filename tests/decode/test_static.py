"""Steps of static shapes: the same text as steps of any shapes, in one graph that waits for nothing."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from decoding import OPTIONS, PROMPTS, drafters, only_even
from host_reads import HostReads
from tiny import VOCAB, tiny
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from specdec_kernels.decode import StaticTarget, Statistics, TransformersTarget, generate, stream
from specdec_kernels.decode.static import Graphs, StaticSession, bucket

RULES = ["token", "block", "coupled"]
SAMPLING = {"greedy": {"temperature": 0.0}, "sampled": {"temperature": 0.9, "top_p": 0.95, "top_k": [0, 7, 5]}}


def models():
    torch.manual_seed(0)
    plain = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.3}
    common = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, **plain,
    }  # fmt: skip
    made = {
        "llama": LlamaForCausalLM(LlamaConfig(**common)),
        "llama, eager": LlamaForCausalLM(LlamaConfig(**common, attn_implementation="eager")),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**common)),
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **plain)),
        "gpt-neox": GPTNeoXForCausalLM(GPTNeoXConfig(**{**common, "num_key_value_heads": 4})),
        "mixtral": MixtralForCausalLM(MixtralConfig(**common, num_local_experts=4, num_experts_per_tok=2)),
    }
    return {name: model.eval() for name, model in made.items()}


@pytest.fixture(scope="module")
def architectures():
    return models()


@pytest.fixture(scope="module")
def model():
    return tiny(1, layers=2)


def text(target, drafter=None, prompts=PROMPTS[:3], **options):
    """Of a ragged batch that shrinks, unless said otherwise."""
    options = {"num_draft": 3, "max_new_tokens": [14, 4, 9][: len(prompts)], "seed": 3, **options}
    return [
        (result.tokens, result.finished, [f"{value:.4f}" for value in result.logprobs])
        for result in generate(target, prompts, drafter=drafter, **options)
    ]


def drafter_of(name):
    """One of those for the model below."""
    return None if name is None else drafters(tiny(1, layers=2))[name]


@pytest.mark.parametrize("architecture", models())
@pytest.mark.parametrize("sampling", SAMPLING)
def test_the_text_is_that_of_the_dynamic_target(architectures, architecture, sampling):
    """With every rule, in a batch and alone."""
    model, options = architectures[architecture], SAMPLING[sampling]
    dynamic, fixed = TransformersTarget(model), StaticTarget(model)
    for name in (None, "lookup", "model"):
        for rule in RULES if name == "model" else RULES[:1]:
            own = {"rule": rule, **options}
            assert text(fixed, drafter_of(name), **own) == text(dynamic, drafter_of(name), **own)
    own = {**options, "top_k": 6, "prompts": PROMPTS[2:3], "logprobs": True}
    assert text(fixed, drafter_of("model"), **own) == text(dynamic, drafter_of("model"), **own)


@pytest.mark.parametrize("name", ["tree", "siblings", "medusa", "feature of two layers", "first of"])
def test_so_it_is_with_trees_and_features(model, name):
    for rule in RULES:
        options = {"rule": rule, "temperature": 0.9, "prompts": PROMPTS, "max_new_tokens": [14, 4, 9, 2]}
        dynamic = text(TransformersTarget(model), drafter_of(name), **options)
        assert text(StaticTarget(model), drafter_of(name), **options) == dynamic


@pytest.mark.parametrize("options", [*OPTIONS.values(), {"grammar": [only_even, None, only_even, only_even]}])
def test_so_it_is_with_all_that_is_done_to_logits(model, options):
    own = {"prompts": PROMPTS, "max_new_tokens": [14, 4, 9, 2], "temperature": 0.8, **options}
    dynamic = text(TransformersTarget(model), drafter_of("model"), **own)
    assert text(StaticTarget(model), drafter_of("model"), **own) == dynamic


def test_a_history_may_fill_the_context():
    """No padding row has a position behind the last that there is."""
    model = models()["gpt2"]
    options = {"prompts": [[1, 2, 3], [4]], "max_new_tokens": [62, 64], "num_draft": 5, "temperature": 0.9}
    dynamic = text(TransformersTarget(model), drafter_of("lookup"), **options)
    assert text(StaticTarget(model), drafter_of("lookup"), **options) == dynamic


# --- one graph --------------------------------------------------------------------------------------------------------


class Recorded:
    """A graph as CUDA would capture it: the operations that ran on given tensors, and nothing of the Python."""

    def __init__(self, module, inputs, results):
        self.module, self.inputs, self.results = module, inputs, results

    def replay(self):
        for old, new in zip(tree_leaves(self.results), tree_leaves(self.module(self.inputs)), strict=True):
            if old is not None:
                old.copy_(new)


@pytest.fixture
def recorded(monkeypatch):
    """Steps are recorded and replayed; what was recorded."""
    made = []

    def capture(function, inputs, others):
        module = make_fx(lambda named: tree_leaves(function(**named, **others)))(inputs)
        results = function(**inputs, **others)
        made.append(function.__name__)
        return Recorded(module, inputs, results), results

    monkeypatch.setattr(Graphs, "devices", ("cpu",))
    monkeypatch.setattr(Graphs, "capture", staticmethod(capture))
    return made


@pytest.mark.parametrize("name", [None, "lookup", "model", "tree", "feature of two layers", "nested"])
def test_replayed_operations_give_the_same_text(model, name, recorded):
    """Of batches that shrink; once for each number of rows and each half of the batch, not once a step."""
    options = {"temperature": 0.9, "prompts": PROMPTS, "max_new_tokens": [24, 14, 9, 20]}
    target, statistics = StaticTarget(model, check=False), Statistics()
    replayed = text(target, drafter_of(name), statistics=statistics, **options)
    assert replayed == text(TransformersTarget(model), drafter_of(name), **options)
    assert 0 < len(recorded) < statistics.steps
    if name in (None, "model"):
        assert set(recorded) == {"stepped"}


def begun(model, prompts=PROMPTS[:3]):
    """A session, and the arguments of its first step with three drafts each."""
    session = StaticTarget(model).begin(prompts, [40] * len(prompts))
    count = len(prompts)
    torch.manual_seed(1)
    return session, {
        "last": torch.tensor([[prompt[-1]] for prompt in prompts]),
        "lengths": torch.tensor([len(prompt) - 1 for prompt in prompts]),
        "draft_tokens": torch.randint(VOCAB, (count, 3)),
        "draft_logits": torch.randn(count, 3, VOCAB),
        "draft_stats": None,
        "draft_temperature": 1.0,
        "seed": torch.arange(count),
        "position": torch.tensor([len(prompt) for prompt in prompts]),
        "rule": "token",
        "temperature": 0.9,
    }


def following(arguments, stepped):
    """The arguments of the next step: what the one before made, and nothing that the host knows."""
    state = {name: getattr(stepped, name) for name in ("last", "lengths", "position")}
    return {**arguments, **state, "draft_tokens": arguments["draft_tokens"].roll(1, 0)}


@pytest.mark.parametrize("architecture", models())
@torch.inference_mode()
def test_a_step_is_one_graph_whatever_the_lengths(architectures, architecture):
    model = architectures[architecture]
    (session, arguments), (other, _) = begun(model), begun(model)
    torch.compiler.reset()
    compiled = torch.compile(other.stepped, fullgraph=True, backend="eager", dynamic=False)
    for time in range(4):
        with torch.compiler.set_stance("default" if time == 0 else "fail_on_recompile"):
            whole = compiled(**arguments)
        stepped = session.stepped(**arguments)
        for one, two in zip(tree_leaves(stepped), tree_leaves(whole), strict=True):
            torch.testing.assert_close(one, two, equal_nan=True)
        assert (stepped.lengths > arguments["lengths"]).all()
        assert (stepped.position - stepped.lengths == 1).all()
        arguments = following(arguments, stepped)


@torch.inference_mode()
def test_steps_follow_each_other_without_the_host(model):
    """Of the rule whose text is the same with any drafts: what the loop writes is written by steps alone."""
    session, arguments = begun(model)
    arguments |= {"rule": "coupled", "draft_logits": None, "seed": torch.full((3,), 3)}
    tokens = [[], [], []]
    for _ in range(9):
        stepped = session.stepped(**arguments)
        for own, new in zip(tokens, stepped.verified.tokens.tolist(), strict=True):
            own += [token for token in new if token >= 0]
        arguments = following(arguments, stepped)
    wanted = text(TransformersTarget(model), rule="coupled", temperature=0.9, max_new_tokens=9, stop_tokens=())
    assert [own[:9] for own in tokens] == [own for own, _, _ in wanted]


@pytest.mark.parametrize("architecture", models())
@torch.inference_mode()
def test_a_step_reads_nothing(architectures, architecture):
    session, arguments = begun(architectures[architecture])
    with HostReads() as reads:
        session.stepped(**arguments)
    assert not reads.found


@pytest.mark.parametrize("name", [None, "lookup", "model", "feature"])
def test_the_host_waits_once_a_step(model, name):
    """Not even transformers waits: the target's masks are made beforehand. (A model drafter's are not.)"""
    statistics, options = Statistics(), {"num_draft": 3, "max_new_tokens": [14, 4, 9], "seed": 3}
    text(StaticTarget(model), drafter_of(name))  # the probes of first use
    with HostReads() as reads:
        tokens = stream(StaticTarget(model), PROMPTS[:3], drafter=drafter_of(name), statistics=statistics, **options)
        reads.found.clear()  # what is read at the beginning
        list(tokens)
    assert len(reads.found if name in (None, "lookup") else reads.own) == statistics.steps, reads.found


def test_features_are_not_overwritten_by_the_next_step(model, recorded):
    """A drafter that is not asked keeps them for longer."""
    session = StaticTarget(model, check=False).begin(PROMPTS[:1], [20], (1,))
    rows = torch.tensor([[2, 7]])
    features = session.score(rows, [2]).features
    before = features.clone()
    session.commit([2])
    session.score(rows + 1, [2])
    assert recorded == ["scored"]
    assert torch.equal(features, before)


def test_a_session_that_is_dropped_leaves_nothing(model, recorded):
    """Its caches are large, and memory of a device does not wake the garbage collector."""
    gc.disable()
    try:
        session, arguments = begun(model)
        with torch.inference_mode():
            session._replay(session.stepped, **arguments)
        dropped = weakref.ref(session)
        del session
        assert dropped() is None
    finally:
        gc.enable()


def test_slots_stay_until_half_of_them_are_idle(model, monkeypatch):
    sizes = []
    forward = StaticSession._scored

    def watched(session, tokens, *rest):
        sizes.append(len(tokens))
        return forward(session, tokens, *rest)

    monkeypatch.setattr(StaticSession, "_scored", watched)
    text(StaticTarget(model, check=False), prompts=PROMPTS, max_new_tokens=[1, 2, 3, 4])
    assert sizes == [4, 4, 2, 1]


def test_rows_are_in_powers_of_two():
    assert [bucket(rows) for rows in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 4, 4, 8, 8, 16]


def test_a_step_has_no_more_rows_than_wanted(model):
    statistics = Statistics()
    text(StaticTarget(model, max_rows=3), drafter_of("self"), num_draft=7, statistics=statistics)
    assert len(statistics.proposed_at) == 2


def test_bad_constructions(model):
    with pytest.raises(TypeError, match=r"max_rows must be an int, got 2\.5"):
        StaticTarget(model, max_rows=2.5)
    with pytest.raises(ValueError, match="max_rows must be at least 1, got 0"):
        StaticTarget(model, max_rows=0)


def test_a_model_that_needs_other_masks_is_refused():
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=4)).eval()
    with pytest.raises(ValueError, match="model BloomForCausalLM cannot score chains"):
        StaticTarget(model).begin([[1, 2, 3]], [4])
