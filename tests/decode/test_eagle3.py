"""EAGLE-3 checkpoints in the layout of ``speculators``, of random weights, against a forward pass written out here."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from decoding import exact_distribution
from distributions import g_test, limit
from eagle3_layout import Reference, hidden_states
from safetensors.torch import save_file
from tiny import VOCAB, Altered, slow_greedy, steady, tiny
from transformers import Qwen3Config, Qwen3ForCausalLM

from specdec_kernels.decode import Statistics, TransformersTarget, generate
from specdec_kernels.decode.drafters import DraftConfig, Eagle3Drafter, Growth, TreeDrafter
from specdec_kernels.decode.drafts import Step

WIDTH, HEADS, KV_HEADS, HEAD, INNER = 24, 4, 2, 8, 40
#: Not ascending: what the layout allows, and whoever mixes up the two vocabularies is seen.
TARGETS = [7, 0, 3, 10, 5]
LAYERS = (1, 2, 3)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 50.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip


def target_model(seed=1, vocab=VOCAB):
    return steady(tiny(seed, vocab=vocab, layers=5))


def write(folder, *, kind="llama", vocab=VOCAB, target_width=32, targets=TARGETS, change=None, **fields):
    """A checkpoint of random weights; ``change(config, weights)`` before it is written."""
    torch.manual_seed(11)
    layer = {
        "model_type": kind, "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD, "intermediate_size": INNER, "num_hidden_layers": 1, "rms_norm_eps": 1e-5,
        "vocab_size": vocab, "max_position_embeddings": 64, "rope_theta": 50.0,
    }  # fmt: skip
    config = {
        "speculators_model_type": "eagle3", "transformer_layer_config": layer, "draft_vocab_size": len(targets),
        "norm_before_residual": False, "target_hidden_size": target_width,
        "eagle_aux_hidden_state_layer_ids": list(LAYERS), **fields,
    }  # fmt: skip
    own = "layers.0."
    shapes = {
        "fc.weight": (WIDTH, 3 * target_width),
        own + "self_attn.q_proj.weight": (HEADS * HEAD, 2 * WIDTH),
        own + "self_attn.k_proj.weight": (KV_HEADS * HEAD, 2 * WIDTH),
        own + "self_attn.v_proj.weight": (KV_HEADS * HEAD, 2 * WIDTH),
        own + "self_attn.o_proj.weight": (WIDTH, HEADS * HEAD),
        own + "mlp.gate_proj.weight": (INNER, WIDTH),
        own + "mlp.up_proj.weight": (INNER, WIDTH),
        own + "mlp.down_proj.weight": (WIDTH, INNER),
        own + "input_layernorm.weight": (WIDTH,),
        own + "hidden_norm.weight": (WIDTH,),
        own + "post_attention_layernorm.weight": (WIDTH,),
        "norm.weight": (WIDTH,),
        "lm_head.weight": (len(targets), WIDTH),
        "embed_tokens.weight": (vocab, WIDTH),
    }
    if kind == "qwen3":
        shapes |= {own + "self_attn.q_norm.weight": (HEAD,), own + "self_attn.k_norm.weight": (HEAD,)}
    weights = {name: torch.randn(shape) / math.sqrt(shape[-1]) for name, shape in shapes.items()}
    weights = {name: 1 + 0.3 * torch.randn_like(w) if w.dim() == 1 else 2 * w for name, w in weights.items()}
    weights["d2t"] = torch.tensor(targets) - torch.arange(len(targets))
    weights["t2d"] = torch.zeros(vocab, dtype=torch.bool).scatter(0, torch.tensor(targets), True)
    if change is not None:
        change(config, weights)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")
    return folder


def drafter_of(folder, model):
    """A drafter with its logits in float32, as steady() has those of the target."""
    drafter = Eagle3Drafter(folder, model)
    head = drafter.head
    drafter.head = lambda x: head(x).float()
    return drafter


def with_rope(config, weights):
    config["transformer_layer_config"]["rope_parameters"] = LLAMA3
    del config["transformer_layer_config"]["rope_theta"]


def with_input_norm(config, weights):
    config["norm_before_fc"] = True
    weights["input_norm.weight"] = torch.rand(weights["fc.weight"].shape[1]) + 0.5


def with_norms_of_states(config, weights):
    config["fc_norm"] = True
    weights |= {f"fc_norm.{n}.weight": torch.rand(weights["fc.weight"].shape[1] // 3) + 0.5 for n in range(3)}


def with_window(config, weights):
    config["transformer_layer_config"] |= {
        "layer_types": ["sliding_attention"], "sliding_window": 3, "use_sliding_window": True,
    }  # fmt: skip


def step(wanted, **named):
    batch = len(wanted)
    each = {"seed": torch.zeros(batch, dtype=torch.int64), "position": torch.full((batch,), 5)}
    return Step(num_draft=wanted, temperature=1.0, **each, **named)


@pytest.mark.parametrize(
    "described",
    [
        {},
        {"norm_before_residual": True},
        {"norm_output": True},
        {"kind": "qwen3"},
        {"change": with_rope},
        {"change": with_input_norm},
        {"change": with_norms_of_states},
        {"change": with_window},
        {"kind": "qwen3", "change": with_window},
    ],
    ids=[
        "llama",
        "norm before residual",
        "norm of outputs",
        "qwen3",
        "rotary of llama 3",
        "norm before fc",
        "norms of hidden states",
        "window",
        "window of qwen3",
    ],
)
def test_drafts_are_those_of_the_layout(tmp_path, described):
    """Of two histories of different lengths, before and after a step that kept different numbers of tokens."""
    model, folder = target_model(), write(tmp_path / "drafter", **described)
    reference, drafter = Reference(folder, model), drafter_of(folder, model)
    assert drafter.feature_layers == LAYERS
    histories = [[1, 2, 3, 4, 5, 6, 7], [8, 9, 1]]
    states = [hidden_states(model, history[:-1], LAYERS) for history in histories]
    features = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
    session = drafter.begin(histories, features)
    for new in ([[3, 4, 2], [6]], [[5], [2, 1]], None):
        draft = session.propose(step([4, 4]))
        for slot, history in enumerate(histories):
            read = list(hidden_states(model, history[:-1], LAYERS))
            drafts = draft.tokens[slot].tolist()
            outputs = reference.rows([*history[1:], *drafts[:-1]], [*read, *[None] * (len(drafts) - 1)])
            for index, output in enumerate(outputs[len(read) - 1 :]):
                expected = reference.logits(output)[draft.vocabulary.draft_to_target]
                torch.testing.assert_close(draft.logits[slot, index].double(), expected, atol=1e-4, rtol=1e-4)
                assert drafts[index] in TARGETS
        if new is not None:
            histories = [history + own for history, own in zip(histories, new, strict=True)]
            rows = [hidden_states(model, h[:-1], LAYERS)[-len(own) :] for h, own in zip(histories, new, strict=True)]
            session.commit(new, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_what_is_saved_is_loaded(tmp_path, kind):
    """With its window and its norms."""
    model = steady(tiny(1, layers=5, hidden_size=WIDTH, num_attention_heads=4))
    folder = write(tmp_path / "one", kind=kind, norm_output=True, target_width=WIDTH, change=with_window)
    drafter = Eagle3Drafter(folder, model)
    drafter.network.save(tmp_path / "other", torch.tensor(TARGETS), model, LAYERS, torch.float64)
    again = Eagle3Drafter(tmp_path / "other", model)
    assert (again.kind, again.network.norms) == (drafter.kind, drafter.network.norms)
    assert drafter.kind.window == 3
    assert drafter.network.norms.norm_output
    weights = again.network.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in drafter.network.state_dict().items())


def test_embeddings_that_are_not_in_the_files_are_the_targets(tmp_path):
    def change(config, weights):
        del weights["embed_tokens.weight"]
        config["transformer_layer_config"]["hidden_size"] = 32

    model = target_model()
    with pytest.raises(ValueError, match=r"path must hold the weights .* of an EAGLE-3 drafter for this target, got"):
        Eagle3Drafter(write(tmp_path / "wide", change=change), model)
    with pytest.raises(ValueError, match=r"whose embeddings are \[11, 24\] for this target, got \[11, 32\]"):
        Eagle3Drafter(write(tmp_path / "none", change=lambda _, weights: weights.pop("embed_tokens.weight")), model)
    small = steady(tiny(1, layers=5, hidden_size=WIDTH, num_attention_heads=4))
    folder = write(tmp_path / "fits", target_width=WIDTH, change=lambda _, weights: weights.pop("embed_tokens.weight"))
    drafter, tokens = Eagle3Drafter(folder, small), torch.tensor([3, 7])
    assert torch.equal(drafter.embed(tokens), small.get_input_embeddings()(tokens))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("tree", [False, True])
def test_greedy_text_is_the_targets(tmp_path, kind, tree):
    model = target_model()
    if kind == "qwen3":
        torch.manual_seed(3)
        named = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "head_dim": 8}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
        model = steady(Qwen3ForCausalLM(Qwen3Config(**named, **heads, eos_token_id=None)).eval())
    drafter = drafter_of(write(tmp_path / "drafter", kind=kind), model)
    if tree:
        drafter = TreeDrafter(drafter, Growth(depth=3, width=2, children=2))
    prompts, statistics = [[1, 2, 3, 1, 2], [4], [5, 6, 7]], Statistics()
    results = generate(
        TransformersTarget(model), prompts, drafter=drafter, temperature=0, max_new_tokens=20, statistics=statistics
    )
    assert [result.tokens for result in results] == [slow_greedy(model, prompt, 20) for prompt in prompts]
    assert statistics.accepted > 0


def measured(drafter, model, rule):
    """(statistic, degrees of freedom) of texts of three tokens, of which some drafts were accepted."""
    length, requests, target = 3, 800, TransformersTarget(model)
    distribution = exact_distribution(model, [1, 2], 0.8, length)
    counts, statistics = dict.fromkeys(distribution, 0), Statistics()
    for first in range(0, requests, 200):
        for each in generate(
            target, [[1, 2]] * 200, drafter=drafter, num_draft=2, max_new_tokens=length, temperature=0.8,
            rule=rule, seed=list(range(first, first + 200)), statistics=statistics,
        ):  # fmt: skip
            counts[tuple(each.tokens)] += 1
    assert 0 < statistics.accepted < statistics.proposed
    observed = torch.tensor(list(counts.values())).double()
    return g_test(observed.numpy(), torch.tensor(list(distribution.values())).numpy())


def test_the_distribution_is_the_targets(tmp_path):
    """The target's ids that cannot be drafted keep their probabilities. The control: drafts that were drawn colder than
    they say have another distribution."""

    def warmer(draft, step):
        return draft if draft.logits is None else replace(draft, stats=None, temperature=0.8)

    model = tiny(4, vocab=4, layers=5, sharp=1.0)
    folder = write(tmp_path / "drafter", vocab=4, targets=[3, 1])
    drafter = Eagle3Drafter(folder, model, DraftConfig(temperature_scale=0.3))
    for rule in ("token", "block", "coupled"):
        statistic, freedom = measured(drafter, model, rule)
        assert statistic < limit(freedom)
    statistic, freedom = measured(Altered(drafter, warmer), model, "token")
    assert statistic > limit(freedom)


def test_layers_that_are_read(tmp_path):
    model = target_model()
    folder = write(tmp_path / "drafter", eagle_aux_hidden_state_layer_ids=None)
    assert Eagle3Drafter(folder, model).feature_layers == (2, 2, 2)
    assert Eagle3Drafter(folder, model, feature_layers=(0, 1, 4)).feature_layers == (0, 1, 4)
    for layers, got in (((0, 1, 5), 5), (torch.tensor([-1, 0, 1]), -1)):
        message = rf"feature_layers must hold layers of this target in \[0, 5\), got {got}"
        with pytest.raises(ValueError, match=message):
            Eagle3Drafter(folder, model, feature_layers=layers)
    with pytest.raises(ValueError, match=r"path must hold the weights"):
        Eagle3Drafter(folder, model, feature_layers=(0, 1))
    with pytest.raises(ValueError, match="feature_layers must hold layers of this target, got none"):
        Eagle3Drafter(folder, model, feature_layers=())
    with pytest.raises(TypeError, match=r"path must be a list of layers of this target, got 3"):
        Eagle3Drafter(write(tmp_path / "one", eagle_aux_hidden_state_layer_ids=3), model)


def test_hidden_states_of_another_dtype_are_read(tmp_path):
    """A target of llama.cpp has them in float32, whatever the drafter's weights are."""
    model = target_model()
    drafter, history = drafter_of(write(tmp_path / "drafter"), model), [1, 2, 3, 4]
    features = hidden_states(model, history[:-1], LAYERS)[None]
    own, single = (drafter.begin([history], x).propose(step([3])) for x in (features, features.float()))
    torch.testing.assert_close(single.logits, own.logits, atol=1e-4, rtol=1e-4)


def test_a_whole_vocabulary_needs_no_map(tmp_path):
    def change(config, weights):
        del weights["d2t"], weights["t2d"]

    drafter = Eagle3Drafter(write(tmp_path / "drafter", targets=list(range(VOCAB)), change=change), target_model())
    assert drafter.vocabulary is None


def edit(**fields):
    """A change of the layer's configuration."""
    return {"change": lambda config, weights: config["transformer_layer_config"].update(fields)}


def other(name, value):
    """A change of one tensor; None leaves it out."""

    def change(config, weights):
        if value is None:
            del weights[name]
        else:
            weights[name] = value

    return {"change": change}


@pytest.mark.parametrize(
    ("described", "message"),
    [
        (
            {"speculators_model_type": "eagle"},
            "EAGLE-3 config.json of speculators, .* got speculators_model_type 'eagle'",
        ),
        (
            {"norm_before_residual": None},
            "path must say norm_before_residual, true or false, in its config.json, got None",
        ),
        ({"norm_output": "yes"}, "path must say norm_output, true or false, in its config.json, got 'yes'"),
        ({"norm_before_fc": True}, r"the weights {'input_norm.weight': \[96\]} .* got .* norm_before_fc=True"),
        ({"norm_before_fc": True, "fc_norm": True}, "with norm_before_fc or fc_norm, got both"),
        ({"draft_vocab_size": 3}, "path must have a head of its draft_vocab_size, 3, got 5 rows"),
        ({"transformer_layer_config": []}, "with a transformer_layer_config, got"),
        (edit(num_attention_heads=5, head_dim=None), "a transformer_layer_config of llama, got"),
        (edit(layer_types=["sliding_attention"]), "its sliding_window .*, got 'sliding_attention' and None"),
        (edit(layer_types=["chunked_attention"]), "its sliding_window .*, got 'chunked_attention' and None"),
        (edit(partial_rotary_factor=0.5), "path must be of a drafter with partial_rotary_factor 1.0, got 0.5"),
        (
            edit(rope_parameters={"full_attention": {"rope_theta": 5.0}, "sliding_attention": {"rope_theta": 9.0}}),
            "with rope_parameters of one kind, by names, got {'full_attention': ",
        ),
        (edit(rope_parameters=[1]), r"with rope_parameters of one kind, by names, got \[1\]"),
        (edit(model_type=["llama"]), r"whose layer is one of \['llama', 'qwen3'\], got \['llama'\]"),
        (other("lm_head.weight", torch.tensor(1.0)), r"'lm_head.weight': \[5, 24\]} .* got {'lm_head.weight': \[\]}"),
        (edit(model_type="gemma"), r"whose layer is one of \['llama', 'qwen3'\], got 'gemma'"),
        (edit(num_hidden_layers=2), "path must be of a drafter with num_hidden_layers 1, got 2"),
        (edit(hidden_act="gelu"), "path must be of a drafter with hidden_act silu, got 'gelu'"),
        (edit(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5.0}), "rotary .*, got 'dynamic'"),
        (other("d2t", torch.tensor([7, -1, 1, 7, 7])), r"path must have a d2t \[5\] to ids .* got 5 to 0 .. 11"),
        (other("d2t", torch.tensor([0, -1, 1, 7, 1])), r"each once, got 5 to 0 .. 10"),
        (other("d2t", torch.zeros(4, dtype=torch.int64)), r"path must have a d2t \[5\] to ids .* got 4 to 0 .. 3"),
        (other("d2t", torch.zeros(0, dtype=torch.int64)), r"path must have a d2t \[5\], got int64 \[0\]"),
        (other("d2t", torch.tensor(1)), r"path must have a d2t \[5\], got int64 \[\]"),
        (other("d2t", None), "path must have a d2t for its 5 draft ids of the target's 11, got none"),
        (
            other("t2d", torch.ones(VOCAB, dtype=torch.bool)),
            "path must have a t2d that marks the target ids of its d2t",
        ),
        (other("fc.weight", None), r"path must hold the weights {'fc.weight': \[24, 96\]} .* got {'fc.weight': None}"),
        (other("extra.weight", torch.ones(2)), r"the weights {'extra.weight': None} .* got {'extra.weight': \[2\]}"),
        ({"vocab": 12}, r"whose embeddings are \[11, 24\] for this target, got \[12, 24\]"),
        (
            {"target_width": 16},
            r"path must hold the weights {'fc.weight': \[24, 96\]} .* got {'fc.weight': \[24, 48\]}",
        ),
    ],
)
def test_what_is_no_checkpoint_for_the_target(tmp_path, described, message):
    with pytest.raises(ValueError, match=message):
        Eagle3Drafter(write(tmp_path / "drafter", **described), target_model())


def test_files_that_are_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path must be a folder with a config.json, got '/nowhere'"):
        Eagle3Drafter("/nowhere", target_model())
    folder = write(tmp_path / "drafter")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"path must be a folder with a model.safetensors, got"):
        Eagle3Drafter(folder, target_model())


@pytest.mark.parametrize(("name", "content"), [("config.json", "{"), ("config.json", "[]"), ("model.safetensors", "x")])
def test_files_that_cannot_be_read(tmp_path, name, content):
    folder = write(tmp_path / "drafter")
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=f"path must have a {name} (that can be read|with names in it), got"):
        Eagle3Drafter(folder, target_model())


def test_what_is_read_can_be_told_from_what_is_drafted_from(tmp_path):
    """By its width alone."""
    model = steady(tiny(1, layers=5, hidden_size=8, num_attention_heads=4))
    folder = write(tmp_path / "drafter", target_width=8)
    with pytest.raises(ValueError, match="told from what it reads of the target by their width, got 24"):
        Eagle3Drafter(folder, model)
    drafter = Eagle3Drafter(write(tmp_path / "other"), target_model())
    with pytest.raises(ValueError, match="of its hidden states it reads 96 numbers a token, got 48"):
        drafter.begin([[1, 2, 3]], torch.zeros(1, 2, 48))
