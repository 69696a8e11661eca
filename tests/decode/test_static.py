"""Steps of static shapes: the same text as steps of any shapes, in one graph that waits for nothing."""

from __future__ import annotations

import functools
import gc
import weakref

import pytest
import torch
from decoding import OPTIONS, PROMPTS, drafters, only_even
from forms import some
from host_reads import HostReads
from tiny import VOCAB, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
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

from specdec_kernels.decode import StaticTarget, Statistics, TransformersTarget, generate, static, stream
from specdec_kernels.decode.drafters import DraftConfig, ModelDrafter, StaticDrafter, TreeDrafter
from specdec_kernels.decode.drafters.static import drafted
from specdec_kernels.decode.drafts import Step
from specdec_kernels.decode.static_cache import Graphs, StaticCache, bucket

RULES = ["token", "block", "coupled"]
SAMPLING = {"greedy": {"temperature": 0.0}, "sampled": {"temperature": 0.9, "top_p": 0.95, "top_k": [0, 7, 5]}}


def models():
    torch.manual_seed(0)
    plain = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.3}
    common = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, **plain,
    }  # fmt: skip
    windows = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
    made = {
        "gemma3, windows": Gemma3ForCausalLM(Gemma3TextConfig(**common, **windows)),
        "llama": LlamaForCausalLM(LlamaConfig(**common)),
        "llama, eager": LlamaForCausalLM(LlamaConfig(**common, attn_implementation="eager")),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**common)),
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **plain)),
        "gpt-neox": GPTNeoXForCausalLM(GPTNeoXConfig(**{**common, "num_key_value_heads": 4})),
        "mixtral": MixtralForCausalLM(MixtralConfig(**common, num_local_experts=4, num_experts_per_tok=2)),
    }
    return {name: model.eval() for name, model in made.items()}


ARCHITECTURES = tuple(models())


@pytest.fixture(scope="module")
def architectures():
    return models()


@pytest.fixture(scope="module")
def model():
    return tiny(1, layers=2)


def decoded(target, drafter=None, prompts=PROMPTS[:3], **options):
    """Of a ragged batch that shrinks, unless said otherwise."""
    options = {"num_draft": 3, "max_new_tokens": [14, 4, 9][: len(prompts)], "seed": 3, **options}
    return [
        (result.tokens, result.finished, [f"{value:.4f}" for value in result.logprobs])
        for result in generate(target, prompts, drafter=drafter, **options)
    ]


def drafter_of(name):
    """One of those for the model below."""
    return None if name is None else drafters(tiny(1, layers=2))[name]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("sampling", SAMPLING)
def test_the_text_is_that_of_the_dynamic_target(architectures, architecture, sampling):
    """With every rule, in a batch and alone."""
    model, options = architectures[architecture], SAMPLING[sampling]
    dynamic, fixed = TransformersTarget(model), StaticTarget(model)
    for name in (None, "lookup", "model"):
        for rule in RULES if name == "model" else RULES[:1]:
            own = {"rule": rule, **options}
            assert decoded(fixed, drafter_of(name), **own) == decoded(dynamic, drafter_of(name), **own)
    own = {**options, "top_k": 6, "prompts": PROMPTS[2:3], "logprobs": True}
    assert decoded(fixed, drafter_of("model"), **own) == decoded(dynamic, drafter_of("model"), **own)


@pytest.mark.parametrize("name", ["tree", "siblings", "medusa", "feature of two layers", "first of"])
def test_so_it_is_with_trees_and_features(model, name):
    for rule in RULES:
        options = {"rule": rule, "temperature": 0.9, "prompts": PROMPTS, "max_new_tokens": [14, 4, 9, 2]}
        dynamic = decoded(TransformersTarget(model), drafter_of(name), **options)
        assert decoded(StaticTarget(model), drafter_of(name), **options) == dynamic


@pytest.mark.parametrize("options", [*OPTIONS.values(), {"grammar": [only_even, None, only_even, only_even]}])
def test_so_it_is_with_all_that_is_done_to_logits(model, options):
    own = {"prompts": PROMPTS, "max_new_tokens": [14, 4, 9, 2], "temperature": 0.8, **options}
    dynamic = decoded(TransformersTarget(model), drafter_of("model"), **own)
    assert decoded(StaticTarget(model), drafter_of("model"), **own) == dynamic


def test_a_history_may_fill_the_context():
    """No padding row has a position behind the last that there is."""
    model = models()["gpt2"]
    options = {"prompts": [[1, 2, 3], [4]], "max_new_tokens": [62, 64], "num_draft": 5, "temperature": 0.9}
    dynamic = decoded(TransformersTarget(model), drafter_of("lookup"), **options)
    assert decoded(StaticTarget(model), drafter_of("lookup"), **options) == dynamic


# --- one graph --------------------------------------------------------------------------------------------------------


class Recorded(TorchDispatchMode):
    """A graph as CUDA would capture it: the operations that ran, on the tensors that there were, and nothing of the
    Python."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation is not torch.ops.aten._local_scalar_dense.default, "no capture goes on after the host reads"
        run = functools.partial(operation, *args, **(kwargs or {}))
        results = run()
        self.operations.append((run, results))
        return results

    def replay(self):
        for run, results in self.operations:
            for old, new in zip(tree_leaves(results), tree_leaves(run()), strict=True):
                if old is not new and isinstance(old, torch.Tensor):
                    assert old.shape == new.shape
                    old.copy_(new)


@pytest.fixture
def recorded(monkeypatch):
    """Steps are recorded and replayed; what was recorded."""
    made = []

    def capture(function, cache, inputs, others):
        with Recorded() as graph:
            results = function(cache, **inputs, **others)
        made.append(function.__name__)
        return graph, results

    monkeypatch.setattr(Graphs, "devices", ("cpu",))
    monkeypatch.setattr(Graphs, "capture", staticmethod(capture))
    return made


@pytest.mark.parametrize("name", [None, "lookup", "model", "tree", "feature of two layers", "nested", "static"])
def test_replayed_operations_give_the_same_text(model, name, recorded):
    """Of batches that shrink; once for each number of rows and each half of the batch, not once a step."""
    options = {"temperature": 0.9, "prompts": PROMPTS, "max_new_tokens": [24, 14, 9, 20]}
    target, statistics = StaticTarget(model, check=False), Statistics()
    replayed = decoded(target, drafter_of(name), statistics=statistics, **options)
    assert replayed == decoded(TransformersTarget(model), drafter_of(name), **options)
    assert 0 < len(recorded) < statistics.steps
    if name in (None, "model", "static"):
        assert set(recorded) == {"stepped", "drafted"} if name == "static" else {"stepped"}


def test_later_streams_replay_what_the_first_one_recorded(model, recorded):
    """In its cache, of which they see nothing: not even a nan."""
    target, drafter = StaticTarget(model, check=False), StaticDrafter(tiny(2))
    options = {"temperature": 0.9, "drafter": drafter}
    decoded(target, **options)
    once = list(recorded)
    storage = target.caches._idle[0].layers[0].storage
    with torch.inference_mode():
        for cache in (target.caches._idle[0], drafter.caches._idle[0]):
            cache.layers[0].storage[0].fill_(torch.nan)
    other = decoded(TransformersTarget(model), ModelDrafter(tiny(2)), PROMPTS[1:], temperature=0.9)
    assert decoded(target, prompts=PROMPTS[1:], **options) == other
    assert recorded == once
    assert target.caches._idle[0].layers[0].storage is storage


def test_streams_at_the_same_time_have_caches_of_their_own(model):
    target, drafter = StaticTarget(model), StaticDrafter(tiny(2))
    options = {"temperature": 0.9, "drafter": drafter, "max_new_tokens": 12, "seed": 3, "num_draft": 3}
    alone = [[token.token for token in stream(target, [prompt], **options)] for prompt in PROMPTS[:2]]
    together = list(zip(*(stream(target, [prompt], **options) for prompt in PROMPTS[:2]), strict=True))
    assert [[token.token for token in tokens] for tokens in zip(*together, strict=True)] == alone


def test_a_cache_serves_no_stream_of_another_size_nor_a_changed_model():
    target = StaticTarget(tiny(1, layers=2), check=False)
    decoded(target)
    first = target.caches._idle[0]
    decoded(target, prompts=PROMPTS[:2])
    second = target.caches._idle[0]
    assert second is not first
    decoded(target, prompts=PROMPTS[:2], max_new_tokens=100)
    third = target.caches._idle[0]
    assert third.capacity > second.capacity
    target.model.bfloat16()
    decoded(target, prompts=PROMPTS[:2], max_new_tokens=100)
    assert target.caches._idle[0] is not third


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


#: Each architecture is compiled in one of two tests, and windows in both.
STEPS = ("gemma3, windows", "llama", "llama, eager", "qwen3", "gpt2", "mixtral")
DRAFTS = ("gemma3, windows", "gpt-neox")


@pytest.mark.brief(kept=lambda parameters: parameters["architecture"] in STEPS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.inference_mode()
def test_a_step_is_one_graph_whatever_the_lengths(architectures, architecture):
    model = architectures[architecture]
    (session, arguments), (other, _) = begun(model), begun(model)
    torch.compiler.reset()
    compiled = torch.compile(static.stepped, fullgraph=True, backend="eager", dynamic=False)
    for time in range(4):
        with torch.compiler.set_stance("default" if time == 0 else "fail_on_recompile"):
            whole = compiled(other._cache, **arguments)
        stepped = static.stepped(session._cache, **arguments)
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
        stepped = static.stepped(session._cache, **arguments)
        for own, new in zip(tokens, stepped.verified.tokens.tolist(), strict=True):
            own += [token for token in new if token >= 0]
        arguments = following(arguments, stepped)
    wanted = decoded(TransformersTarget(model), rule="coupled", temperature=0.9, max_new_tokens=9, stop_tokens=())
    assert [own[:9] for own in tokens] == [own for own, _, _ in wanted]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.inference_mode()
def test_a_step_reads_nothing(architectures, architecture):
    session, arguments = begun(architectures[architecture])
    with HostReads() as reads:
        static.stepped(session._cache, **arguments)
    assert not reads.found


@pytest.mark.parametrize("name", [None, "lookup", "model", "feature"])
def test_the_host_waits_once_a_step(model, name):
    statistics, options = Statistics(), {"num_draft": 3, "max_new_tokens": [14, 4, 9], "seed": 3}
    decoded(StaticTarget(model), drafter_of(name))  # the probes of first use
    with HostReads() as reads:
        tokens = stream(StaticTarget(model), PROMPTS[:3], drafter=drafter_of(name), statistics=statistics, **options)
        reads.found.clear()  # what is read at the beginning
        list(tokens)
    assert len(reads.found) == statistics.steps, reads.found


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


def test_what_is_dropped_leaves_nothing(model, recorded):
    """Caches are large, and memory of a device does not wake the garbage collector: that of a stream goes back to its
    target, and with the target it is gone."""
    gc.disable()
    try:
        session, arguments = begun(model)
        with torch.inference_mode():
            session._cache.replay(static.stepped, **arguments)
        target, cache = session._target, weakref.ref(session._cache)
        del session
        assert target.caches._idle[0] is cache()
        del target
        assert cache() is None
    finally:
        gc.enable()


def test_slots_stay_until_half_of_them_are_idle(model, monkeypatch):
    sizes = []
    forward = StaticCache.pass_over

    def watched(cache, tokens, *rest):
        sizes.append(len(tokens))
        return forward(cache, tokens, *rest)

    monkeypatch.setattr(StaticCache, "pass_over", watched)
    decoded(StaticTarget(model, check=False), prompts=PROMPTS, max_new_tokens=[1, 2, 3, 4])
    assert sizes == [4, 4, 2, 1]


@pytest.mark.parametrize("kept", [[0], [1, 0]])
@torch.inference_mode()
def test_several_go_on_from_one(model, kept):
    """More than there were slots, or than passes have had since half of them ended: each as the one did alone."""
    session = StaticTarget(model, check=False).begin([[1, 2, 3], [4, 5], [6], [7, 8]], [9] * 4)
    session.select(kept)
    known = session.score(torch.tensor([[3]] * len(kept)), [1] * len(kept)).logits
    session.commit([0] * len(kept))
    for slots in ([0] * 3, [1] * 6, [0] * 2):
        session.select(slots)
        scored = session.score(torch.tensor([[3]] * len(slots)), [1] * len(slots)).logits
        torch.testing.assert_close(scored, known[:1].expand(len(slots), -1, -1))
        session.commit([0] * len(slots))


def test_rows_are_in_powers_of_two():
    assert [bucket(rows) for rows in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 4, 4, 8, 8, 16]


def test_a_step_has_no_more_rows_than_wanted(model):
    statistics = Statistics()
    decoded(StaticTarget(model, max_rows=3), drafter_of("self"), num_draft=7, statistics=statistics)
    assert len(statistics.proposed_at) == 2


def test_bad_constructions(model):
    with pytest.raises(TypeError, match=r"max_rows must be an int, got 2\.5"):
        StaticTarget(model, max_rows=2.5)
    with pytest.raises(ValueError, match="max_rows must be at least 1, got 0"):
        StaticTarget(model, max_rows=0)


# --- drafters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_static_drafts_are_those_of_the_dynamic_drafter(architectures, architecture):
    """Step by step: tokens, logits, scalars, of batches that shrink and are accepted by turns."""
    model, kept = architectures[architecture], [[3, 1, 2], [1, 4, 1], [2, 2]]
    for rule, temperature in (("token", 0.9), ("coupled", 0.7), ("token", 0.0)):
        one, other = (kind(model, VOCAB).begin(PROMPTS[:3], None) for kind in (ModelDrafter, StaticDrafter))
        position = torch.tensor([len(prompt) for prompt in PROMPTS[:3]])
        for accepted in kept:
            if len(accepted) < len(position):
                position = position[1:]
                one.select([1, 2]), other.select([1, 2])
            step = Step(
                num_draft=[3, 2, 3][: len(accepted)], seed=torch.arange(len(accepted)), position=position,
                temperature=temperature, top_k=7, coupled=rule == "coupled",
            )  # fmt: skip
            dynamic, fixed = one.propose(step), other.propose(step)
            assert dynamic.tokens.tolist() == fixed.tokens.tolist()
            assert dynamic.counts == fixed.counts
            real = dynamic.tokens >= 0
            torch.testing.assert_close(dynamic.logits[real], fixed.logits[real], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(dynamic.stats[real], fixed.stats[real], atol=1e-4, rtol=1e-4)
            new = [(draft + [7] * 4)[:count] for draft, count in zip(dynamic.tokens.tolist(), accepted, strict=True)]
            new = [[max(0, token) for token in tokens] for tokens in new]
            one.commit(new, None), other.commit(new, None)
            position = position + torch.tensor(accepted)


def drafting(model, prompts=PROMPTS[:3]):
    """A cache of a drafter, and the arguments of its first drafts."""
    session, count = StaticDrafter(model, VOCAB).begin(prompts, None), len(prompts)
    return session._cache, {
        "tokens": torch.tensor([[prompt[-1], 0, 0, 0] for prompt in prompts]),
        "lengths": torch.tensor([len(prompt) - 1 for prompt in prompts]),
        "counts": torch.ones(count, dtype=torch.int64), "wanted": torch.tensor([3, 1, 2])[:count],
        "seed": torch.arange(count), "position": torch.tensor([len(prompt) for prompt in prompts]),
        "temperature": 0.9, "top_k": 7, "top_p": 1.0, "min_p": 0.0,
        "drafts": 3, "own_vocab": VOCAB, "vocab": VOCAB, "coupled": False, "backend": None,
    }  # fmt: skip


@pytest.mark.brief(kept=lambda parameters: parameters["architecture"] in DRAFTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.inference_mode()
def test_drafts_are_one_graph_whatever_the_lengths(architectures, architecture):
    """It reads nothing, and what was drafted and accepted goes into the next drafts as tensors."""
    (cache, arguments), (other, _) = (drafting(architectures[architecture]) for _ in range(2))
    torch.compiler.reset()
    compiled = torch.compile(drafted, fullgraph=True, backend="eager", dynamic=False)
    for time in range(4):
        with torch.compiler.set_stance("default" if time == 0 else "fail_on_recompile"):
            whole = compiled(other, **arguments)
        with HostReads() as reads:
            tokens, logits, stats = drafted(cache, **arguments)
        assert not reads.found
        for one, two in zip((tokens, logits, stats), whole, strict=True):
            torch.testing.assert_close(one, two, equal_nan=True)
        read, accepted = arguments["counts"], torch.tensor([3, 1, 2])
        arguments |= {
            "lengths": arguments["lengths"] + read, "position": arguments["position"] + accepted,
            "counts": accepted, "tokens": torch.cat([tokens, tokens[:, :1]], 1),
        }  # fmt: skip


def test_a_drafter_reads_on_as_far_as_its_text_gets(model, recorded):
    """Its cache grows, and is recorded anew; the context's last position is drafted from, and none behind it."""
    small = models()["gpt2"]
    for drafting_model, count in ((tiny(2, max_position_embeddings=512), some(280, 400)), (small, 80)):
        fixed, dynamic = StaticDrafter(drafting_model, VOCAB), ModelDrafter(drafting_model, VOCAB)
        target, statistics = tiny(1, layers=2, max_position_embeddings=512), (Statistics(), Statistics())
        for drafter, own in zip((fixed, dynamic), statistics, strict=True):
            options = {"max_new_tokens": count, "temperature": 0.0, "num_draft": 3, "statistics": own}
            generate(TransformersTarget(target), PROMPTS[:1], drafter=drafter, **options)
        assert [own.proposed_at for own in statistics] == [statistics[0].proposed_at] * 2
        assert [own.accepted_at for own in statistics] == [statistics[0].accepted_at] * 2
    assert recorded.count("drafted") < 20


def test_drafts_that_need_the_host_are_refused(model):
    for config in (DraftConfig(siblings=1), DraftConfig(min_confidence=0.2)):
        with pytest.raises(ValueError, match="min_confidence 0 and siblings 0 for drafts of static shapes"):
            StaticDrafter(model, config=config)
    with pytest.raises(TypeError, match="got a StaticDrafter: use ModelDrafter"):
        decoded(TransformersTarget(model), TreeDrafter(StaticDrafter(model)))


def test_a_model_that_needs_other_masks_is_refused():
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=4)).eval()
    with pytest.raises(ValueError, match="no ALiBi for steps of static shapes, got BloomForCausalLM: use Transf"):
        StaticTarget(model)
    with pytest.raises(ValueError, match="no ALiBi for drafts of static shapes, got BloomForCausalLM: use ModelDr"):
        StaticDrafter(model)
