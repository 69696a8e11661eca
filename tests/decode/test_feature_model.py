"""The network of the feature drafter."""

import pytest
import torch
from transformers import LlamaConfig

from specdec_kernels.decode.drafters import FeatureModel
from specdec_kernels.decode.drafters.feature_model import REPEATS


def model(middle=()):
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=11, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    made = FeatureModel(config, torch.tensor([0, 2, 3, 5, 8]), middle)
    return made.to(torch.bfloat16).eval(), config


@torch.no_grad()
@pytest.mark.parametrize("middle", [(), (1,), (1, 3)])
def test_what_is_saved_is_what_is_read(tmp_path, middle):
    made, config = model(middle)
    made.repeats.uniform_()
    made.save(tmp_path / "model.safetensors")
    read = FeatureModel.load(tmp_path / "model.safetensors", config, torch.bfloat16)
    assert read.layers == made.layers == (*middle, -1)
    assert torch.equal(read.shortlist, made.shortlist)
    assert torch.equal(read.repeats, made.repeats)
    embeddings, features = torch.randn(1, 5, 32).bfloat16(), torch.randn(1, 5, 32 * len(made.layers)).bfloat16()
    assert torch.equal(read.inputs(embeddings, features), made.inputs(embeddings, features))


@torch.no_grad()
def test_middle_layers_add_to_the_last():
    """Whatever their scale; its own features, which stand in for the last layer's, have none."""
    made, _ = model((1, 3))
    embeddings, middle, last = torch.randn(1, 5, 32), torch.randn(1, 5, 64), torch.randn(1, 5, 32)
    inputs = [x.bfloat16() for x in (embeddings, torch.cat([middle, last], -1), torch.cat([1024 * middle, last], -1))]
    both, larger = made.inputs(inputs[0], inputs[1]), made.inputs(inputs[0], inputs[2])
    torch.testing.assert_close(larger, both, atol=1e-2, rtol=1e-2)
    alone = made.inputs(inputs[0], inputs[1][..., -32:])
    assert not torch.allclose(both, alone, atol=1e-2, rtol=1e-2)
    made.middle.weight.zero_()
    assert torch.equal(made.inputs(inputs[0], inputs[1]), alone)


@torch.no_grad()
def test_what_followed_before_is_favoured():
    """By how much of the text it followed; at most as many tokens as are told apart."""
    made, _ = model()
    made.repeats.copy_(torch.arange(1.0, REPEATS + 1))
    row, token, length = torch.tensor([[0, 4, 1], [2, 0, 3], [2, 1, REPEATS + 9]]).T
    logits = torch.zeros(3, 5).bfloat16()
    expected = torch.zeros(3, 5)
    expected[0, 4], expected[2, 0], expected[2, 1] = 1, 3, REPEATS
    assert torch.equal(made.favour(logits, row, token, length), expected.bfloat16())
