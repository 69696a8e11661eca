"""The feature drafter with weights of eight bits, in C++."""

import copy

import pytest
import torch
from forms import pairwise
from processes import run_python
from torch import nn
from transformers import DynamicCache, LlamaConfig

from specdec_kernels.decode.drafters import FeatureDrafter, FeatureModel
from specdec_kernels.decode.drafters.eight_bits import FEW, EightBitLinear, rounded, with_eight_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


LEADS = [(1,), (3,), (FEW,), (FEW + 1,), (2, 2), (1, 1), (2, 5)]
SIZES = [(64, 96), (33, 61), (5, 7), (1, 1), (70, 576)]


@pytest.mark.parametrize(("dtype", "lead", "size"), pairwise(DTYPES, LEADS, SIZES))
def test_a_product_is_the_one_of_the_rounded_weights(dtype, lead, size):
    outputs, inputs = size
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
    """One that reads eight bits, the one that it is equivalent to for few rows, and the one that it was made of."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=11, hidden_size=42, intermediate_size=72, num_hidden_layers=4, num_attention_heads=6,
        num_key_value_heads=2, head_dim=10, max_position_embeddings=64,
    )  # fmt: skip
    plain = FeatureModel(config, torch.tensor([0, 2, 3, 5, 8]), middle).requires_grad_(False).eval()
    for name, weight in plain.named_parameters():
        weight.copy_(torch.rand_like(weight) + 0.5 if "norm" in name else torch.randn_like(weight) * 0.2)
    few = copy.deepcopy(plain)
    for layer in few.children():
        if isinstance(layer, nn.Linear):
            integers, scale = rounded(layer.weight)
            layer.weight.copy_(integers * scale[:, None])
    return with_eight_bits(plain), few, plain


def caches(plain, batch, length):
    """Two caches that hold the same."""
    made = [DynamicCache(config=plain.config) for _ in range(2)]
    keys, values = torch.randn(2, batch, plain.kv_heads, length + 2, plain.head_dim)
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


ROWS = [(1, 1), (2, 3), (FEW, 1), (1, FEW + 1)]
LAYERS = [((), True), ((1, 3), True), ((1, 3), False)]


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "kind", "shape", "layers"), pairwise(DTYPES, ["text", "tree"], ROWS, LAYERS))
def test_the_layer_is_the_one_of_the_rounded_weights(dtype, kind, shape, layers):
    """For few rows; of more it is the one of the weights as they were."""
    (batch, rows), (middle, own) = shape, layers
    eight_bits, few, plain = models(middle)
    expected = few if batch * rows <= FEW else plain
    width = 42 if own else 42 * len(plain.layers)
    embeddings, features = torch.randn(batch, rows, 42).to(dtype), torch.randn(batch, rows, width).to(dtype)
    inputs = masks(kind, batch, rows, 19), torch.randint(0, 64, (batch, rows))
    cache, other = caches(plain, batch, 19)
    read = eight_bits(embeddings, features, *inputs, cache)
    near = 1e-4 if dtype == torch.float32 else 2e-2  # norms in the dtype of the features
    wanted = expected(embeddings.float(), features.float(), *inputs, other)
    torch.testing.assert_close(read, wanted, rtol=near, atol=near)


def test_what_the_operator_could_not_read_is_refused():
    product = torch.ops.specdec.eight_bit_product
    x, weight, scale = torch.zeros(2, 6), torch.zeros(4, 6, dtype=torch.int8), torch.zeros(4)
    assert product(x, weight, scale).shape == (2, 4)
    for wrong in (
        (x[0], weight, scale), (x.double(), weight, scale), (x.T.contiguous().T, weight, scale),
        (x[:, :5], weight, scale), (x, weight.int(), scale), (x, weight[:, :5], scale), (x, weight[0], scale),
        (x, weight, scale[:3]), (x, weight, scale.double()), (x, weight, scale[:, None]),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="not taken as it is"):
            product(*wrong)


def test_a_model_elsewhere_is_refused():
    with pytest.raises(ValueError, match=r"eight_bits needs the C\+\+ for CPUs: got a weight on meta"):
        EightBitLinear(torch.zeros(4, 4, device="meta"))
    with pytest.raises(TypeError, match="eight_bits must be True or False, got 8"):
        FeatureDrafter(None, None, eight_bits=8)


@pytest.mark.parametrize("isa", ["avx2", "scalar"])
def test_other_instruction_sets(isa):
    """The tests above, in a process of their own: the instruction set is chosen once."""
    command = ("-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", "rounded_weights")
    result = run_python(*command, SPECDEC_CPU_ISA=isa)
    if "run on this machine" in result.stdout:
        pytest.skip(f"this machine has no {isa}")
    assert result.returncode == 0, result.stdout[-3000:]
