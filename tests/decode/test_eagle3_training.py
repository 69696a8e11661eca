"""Training of an EAGLE-3 drafter, on a tiny target of random weights: what is trained is what drafts."""

from __future__ import annotations

import itertools
import json
import random

import pytest
import torch
from eagle3_layout import Reference, hidden_states
from safetensors import safe_open
from tiny import VOCAB, tiny

from specdec_kernels.decode.drafters import Eagle3Drafter, FeatureModel
from specdec_kernels.decode.drafts import Step
from training import eagle3, train
from training.eagle3 import started, training_of

LAYERS, SHORTLIST, STEPS = (1, 2, 3), [0, 3, 5, 7, 10], 12


@pytest.fixture(scope="module")
def target():
    return tiny(1, layers=5)


@pytest.fixture
def conversations(target, monkeypatch):
    """As collected, but of a target with fewer layers."""
    monkeypatch.setattr(train, "FEATURE_LAYERS", (*LAYERS, -1))
    monkeypatch.setattr(eagle3, "LAYERS", LAYERS)
    torch.manual_seed(2)
    every = [torch.randint(VOCAB, (count,)) for count in (20, 24, 24, 30)]
    return [(ids.int(), hidden_states(target, ids.tolist(), (*LAYERS, -1))[:-1], 4) for ids in every]


def test_a_model_begins_with_what_the_feature_drafter_reads(target, conversations):
    """By one matrix, which is all that it takes where the drafter reads nothing but the same layers."""
    torch.manual_seed(3)
    drafter = FeatureModel(target.config, torch.tensor(SHORTLIST), (1, 2))
    drafter.middle.weight.data.zero_()
    states = torch.cat([states for _, states, _ in conversations])
    # The last layer, as if it were the third.
    same = [(ids, torch.cat([s[:, :64], s[:, 96:], s[:, 96:]], 1), prompt) for ids, s, prompt in conversations]
    model = started(target, drafter, same)
    made = drafter.inputs(torch.zeros(len(states), 32), states[:, [*range(64), *range(96, 128)]])
    fused = model.fc(model.input_norm(torch.cat([states[:, :64], states[:, 96:]], 1)))
    assert torch.nn.functional.cosine_similarity(fused, made, dim=-1).min() > 0.8
    assert torch.equal(model.lm_head.weight, target.lm_head.weight[SHORTLIST])


@torch.no_grad()
def test_a_model_begins_with_the_outputs_of_a_feature_drafter_that_reads_no_embeddings(target, conversations):
    """As far as its inputs have one scale, which is all that the layout's norm leaves of them."""
    torch.manual_seed(3)
    drafter = FeatureModel(target.config, torch.tensor(SHORTLIST))
    drafter.fuse.weight[:, :32] = 0
    for weight in (drafter.qkv.weight, drafter.output.weight, drafter.gate_up.weight, drafter.down.weight):
        weight.mul_(3)
    ids, states, _ = conversations[3]
    # All that is read is of the last layer, as if it were the third.
    same = [(i, torch.cat([s[:, :64], s[:, 96:], s[:, 96:]], 1), prompt) for i, s, prompt in conversations]
    model = started(target, drafter, same)
    last, embedded = states[None, :, 96:], target.get_input_embeddings()(ids[None, 1:].long())
    (own,) = train.unrolled(model, embedded, torch.cat([states[None, :, :64], last], -1), 1)
    (expected,) = train.unrolled(drafter, embedded, last, 1)
    assert torch.nn.functional.cosine_similarity(model.norm(own), expected, dim=-1).min() > 0.95


def test_a_step_lowers_the_loss_and_what_is_written_drafts_as_it_was_trained(
    target, conversations, monkeypatch, tmp_path
):
    torch.manual_seed(4)
    drafter = FeatureModel(target.config, torch.tensor(SHORTLIST))
    model = started(target, drafter, conversations)
    training = training_of(model, target)
    (batch,) = train.batches(conversations, random.Random(0))
    before = float(train.losses(training, batch, 3)[0].detach())
    clock = itertools.count()
    monkeypatch.setattr(train.time, "time", lambda: next(clock))  # a second each time that somebody looks
    saved = []
    train.fit(training, conversations, random.Random(0), STEPS / 20, 0.05, 0.0, 1.0, lambda: saved.append(None))
    after = float(train.losses(training, batch, 3)[0].detach())
    assert after < before - 0.1
    assert saved
    assert torch.equal(model.lm_head.weight, target.lm_head.weight[SHORTLIST]), "the head is not trained"

    model.save(tmp_path, drafter.shortlist, target, LAYERS, torch.float32)
    loaded = Eagle3Drafter(tmp_path, target)
    assert loaded.feature_layers == LAYERS
    assert loaded.vocabulary.draft_to_target.tolist() == SHORTLIST
    history = [1, 2, 3, 4, 5, 6, 7]
    features = hidden_states(target, history[:-1], LAYERS)
    named = {"seed": torch.zeros(1, dtype=torch.int64), "position": torch.tensor([5])}
    draft = loaded.begin([history], features[None]).propose(Step(num_draft=[3], temperature=1.0, **named))
    ids = history + draft.tokens[0].tolist()
    outputs = Reference(tmp_path, target).rows(ids[1:-1], [*features, None, None])
    embedded = target.get_input_embeddings()(torch.tensor(ids[1:-1]))[None]
    padded = torch.nn.functional.pad(features, (0, 0, 0, 2), value=9.0)[None]  # what is not there is not read
    unrolled = train.unrolled(model, embedded, padded, 3)
    for index in range(3):
        at = len(history) - 2 + index
        expected = draft.logits[0, index]  # columns of the drafter
        torch.testing.assert_close(model.head(unrolled[index][0, at]), expected, atol=1e-4, rtol=1e-4)
        plain = Reference(tmp_path, target).logits(outputs[at])[SHORTLIST]
        torch.testing.assert_close(plain.float(), expected, atol=1e-3, rtol=1e-3)


def test_eight_bits_are_what_is_written(target, conversations, tmp_path):
    torch.manual_seed(5)
    drafter = FeatureModel(target.config, torch.tensor(SHORTLIST))
    model = started(target, drafter, conversations)
    model.save(tmp_path, drafter.shortlist, target, LAYERS, torch.float8_e4m3fn, "some/target")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert {kinds.pop(name) for name in ("d2t", "t2d")} == {"I64", "BOOL"}
    assert {name.endswith("norm.weight"): kind for name, kind in kinds.items()} == {True: "BF16", False: "F8_E4M3"}
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["norm_before_residual"], written["draft_vocab_size"]) == (True, len(SHORTLIST))
    verifier = {"name_or_path": "some/target", "architectures": ["LlamaForCausalLM"]}
    assert written["speculators_config"]["verifier"] == verifier
    read = Eagle3Drafter(tmp_path, target).network.state_dict()
    for name, weight in model.state_dict().items():
        narrow = torch.float8_e4m3fn if weight.dim() == 2 else torch.bfloat16
        assert torch.equal(read[name], weight.detach().to(narrow).float()), name
