"""The feature drafter with weights of eight bits, in C++."""

import copy

import pytest
import torch
from processes import run_python
from transformers import DynamicCache, LlamaConfig

from specdec_kernels.decode.drafters import FeatureModel
from specdec_kernels.decode.drafters.eight_bits import FEW, EightBitLinear, EightBitModel, rounded

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(1,), (3,), (FEW,), (FEW + 1,), (2, 2), (1, 1), (2, 5)])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 96), (33, 61), (5, 7), (1, 1), (70, 576)])
def test_a_product_is_the_one_of_the_rounded_weights(dtype, lead, outputs, inputs):
    torch.manual_seed(len(lead) + lead[0])
    weight, x = torch.randn(outputs, inputs).to(dtype), torch.randn(*lead, inputs).to(dtype)
    weight[outputs // 2] = 0
    weight[outputs - 1] *= 1e-4
    layer = EightBitLinear(weight)
    few = x[..., 0].numel() <= FEW
    read = layer.eight_bits.double() * layer.scale.double()[:, None] if few else weight.double()
    exact, size = x.double() @ read.T, x.double().abs() @ read.abs().T  # what rounding is relative to
    relative = 1e-6 if few else 2 * torch.finfo(dtype).eps
    assert layer(x).shape == (*lead, outputs)
    assert layer(x).dtype == torch.float32
    assert ((layer(x).double() - exact).abs() <= relative * size + 1e-7).all()


def test_a_rounded_weight_is_off_by_half_a_step_at_most():
    torch.manual_seed(1)
    weight = torch.randn(40, 50) * torch.logspace(-6, 6, 40)[:, None]
    weight[7] = 0
    eight_bits, scale = rounded(weight)
    assert ((eight_bits * scale.double()[:, None] - weight).abs() <= 0.501 * scale[:, None]).all()
    assert not eight_bits[7].any()


def models(middle=()):
    """One that reads eight bits, and the model in float32 that it is equivalent to."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=11, hidden_size=42, intermediate_size=72, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, head_dim=10, max_position_embeddings=64,
    )  # fmt: skip
    plain = FeatureModel(config, torch.tensor([0, 2, 3, 5, 8]), middle).requires_grad_(False).eval()
    for name, weight in plain.named_parameters():
        weight.copy_(torch.rand_like(weight) + 0.5 if "norm" in name else torch.randn_like(weight) * 0.2)
    eight_bits = EightBitModel(plain)
    plain = copy.deepcopy(plain)
    for norm, behind in (("attention_norm.weight", "qkv"), ("mlp_norm.weight", "gate_up"), ("middle_norm", "middle")):
        if behind == "middle" and not middle:
            continue
        getattr(plain, behind).weight.mul_(plain.get_parameter(norm).flatten())
        plain.get_parameter(norm).fill_(1.0)
    for name in ("fuse", "qkv", "output", "gate_up", "down", *(("middle",) if middle else ())):
        weight = getattr(plain, name).weight
        integers, scale = rounded(weight)
        weight.copy_(integers * scale[:, None])
    return eight_bits, plain


def caches(plain, batch, length, dtype):
    """Two caches that hold the same."""
    made = [DynamicCache(config=plain.config) for _ in range(2)]
    keys, values = torch.randn(2, batch, plain.kv_heads, length + 2, plain.head_dim).to(dtype)
    for cache in made:  # cropped, so that heads are not neighbours in memory
        cache.update(keys.clone(), values.clone(), 0)
        cache.crop(-2)
    return made


def masks(kind, batch, rows, length):
    """What :class:`RaggedCache` hands over."""
    if kind == "text" and batch == 1:
        return None
    if kind == "text":
        live = torch.rand(batch, 1, 1, length + rows).ge(0.3).index_fill(3, torch.tensor(0), True)
        return live & torch.ones(rows, length + rows, dtype=torch.bool).tril(length)
    return torch.rand(batch, 1, rows, length + rows).ge(0.4) | torch.eye(rows, length + rows, dtype=torch.bool)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["text", "tree"])
@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (1, 4), (2, 1), (2, 3), (FEW, 1)])
@pytest.mark.parametrize(("middle", "own"), [((), True), ((1, 3), True), ((1, 3), False)])
def test_the_layer_is_the_one_of_the_rounded_weights(dtype, kind, batch, rows, middle, own):
    eight_bits, plain = models(middle)
    layers = 1 if own else len(plain.layers)
    for length in (0, 1, 19):
        torch.manual_seed(length)
        embeddings, features = torch.randn(batch, rows, 42).to(dtype), torch.randn(batch, rows, 42 * layers).to(dtype)
        cache, other = caches(plain, batch, length, dtype)
        mask = masks(kind, batch, rows, length)
        positions = torch.randint(0, 64, (batch, rows))
        read = eight_bits(embeddings, features, mask, positions, cache)
        kept = cache.layers[0]
        layer = other.layers[0]
        layer.keys, layer.values = layer.keys.float(), layer.values.float()
        expected = plain(embeddings.float(), features.float(), mask, positions, other)
        torch.testing.assert_close(read, expected, rtol=1e-4, atol=1e-4)
        assert kept.keys.dtype == kept.values.dtype == dtype
        torch.testing.assert_close(kept.keys, layer.keys.to(dtype), rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(kept.values, layer.values.to(dtype), rtol=1e-2, atol=1e-3)


@torch.no_grad()
def test_many_rows_and_the_first_ones_are_read_by_the_model_itself():
    eight_bits, plain = models()
    wide = eight_bits.model
    for rows, empty in ((FEW + 1, False), (1, True)):
        cache, other = (
            [DynamicCache(config=plain.config) for _ in range(2)] if empty else caches(plain, 1, 5, torch.float32)
        )
        inputs = torch.randn(1, rows, 42), torch.randn(1, rows, 42), None, torch.arange(rows)[None]
        assert torch.equal(eight_bits(*inputs, cache), wide(*inputs, other))


@torch.no_grad()
@pytest.mark.parametrize("wrong", ["position", "mask", "keys", "features"])
def test_what_the_operator_could_not_read_is_refused(wrong):
    eight_bits, plain = models()
    cache, _ = caches(plain, 1, 5, torch.float32)
    inputs = {
        "embeddings": torch.randn(1, 2, 42),
        "features": torch.randn(1, 2, 45 if wrong == "features" else 42),
        "attention_mask": torch.ones(1, 1, 2, 6, dtype=torch.bool) if wrong == "mask" else None,
        "position_ids": torch.tensor([[3, 64 if wrong == "position" else 4]]),
    }
    if wrong == "keys":
        cache.layers[0].keys = cache.layers[0].keys.double()
    with pytest.raises(RuntimeError, match="not taken as it is"):
        eight_bits(**inputs, past_key_values=cache)


def test_a_model_elsewhere_is_refused():
    with pytest.raises(ValueError, match=r"eight_bits needs the C\+\+ for CPUs: got a model on meta"):
        EightBitLinear(torch.zeros(4, 4, device="meta"))


@pytest.mark.parametrize("isa", ["avx2", "scalar"])
def test_other_instruction_sets(isa):
    """The tests above, in a process of their own: the instruction set is chosen once."""
    command = ("-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", "rounded_weights")
    result = run_python(*command, SPECDEC_CPU_ISA=isa)
    if "run on this machine" in result.stdout:
        pytest.skip(f"this machine has no {isa}")
    assert result.returncode == 0, result.stdout[-3000:]
