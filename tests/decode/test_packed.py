"""Packed linear layers multiply as the others do, whatever becomes of their weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny import tiny
from torch import nn
from torch.nn.utils import parametrize, prune

from specdec_kernels.decode import TransformersTarget, generate, pack_linear
from specdec_kernels.decode.packed import PackedLinear, cannot_pack

packs = pytest.mark.skipif(
    bool(reason := cannot_pack(nn.Parameter(torch.empty(1, dtype=torch.bfloat16)))),
    reason=f"bfloat16 is not packed: {reason}",
)


def linear(bias=True, seed=1):
    torch.manual_seed(seed)
    return nn.Linear(40, 24, bias=bias, dtype=torch.bfloat16)


def packed(bias=True):
    layer = pack_linear(linear(bias))
    assert is_packed(layer)
    return layer


def is_packed(layer):
    """Whether the last call, or `pack_linear`, left a packed weight."""
    return isinstance(layer, PackedLinear) and layer._packed is not None


def check(layer, shape=(3, 40)):
    """The layer multiplies by the weight and the bias that it shows."""
    x = torch.randn(shape, dtype=layer.weight.dtype)
    exact = nn.functional.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    with torch.no_grad():
        got = layer(x)
    assert got.dtype == x.dtype
    assert got.shape == exact.shape
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=2**-8)


@packs
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(0, 40), (1, 40), (40,), (2, 3, 40), (37, 40)])
def test_products_are_those_of_the_layer(shape, bias):
    layer = linear(bias)
    weight = layer.weight
    assert pack_linear(layer) is layer
    assert is_packed(layer)
    check(layer, shape)
    assert layer.weight is weight


@packs
def test_a_packed_model_goes_on_as_it_did():
    model = tiny(1, layers=2).bfloat16()
    tied = model.get_input_embeddings().weight
    model.lm_head.weight = tied
    prompt = torch.arange(1, 9)[None]
    with torch.inference_mode():
        before = model(prompt).logits
        assert pack_linear(model) is model
        assert is_packed(model.get_output_embeddings())
        assert model.get_output_embeddings().weight is tied
        torch.testing.assert_close(model(prompt).logits, before, rtol=0.02, atol=0.1)
    assert len(generate(TransformersTarget(model), [[1, 2, 3]], max_new_tokens=8, seed=1)[0].tokens) == 8


# --- weights that change ----------------------------------------------------------------------------------------------


def other():
    return linear(seed=2).weight.detach()


def merge_by_data(layer):
    layer.weight.data.copy_(other())


def merge_in_place(layer):
    with torch.no_grad():
        layer.weight.add_(other())


def merge_under_inference_mode(layer):
    with torch.inference_mode():
        layer.weight.add_(other())


def merge_a_row(layer):
    layer.weight.data[7] *= 2


def load(layer):
    layer.load_state_dict(linear(seed=2).state_dict())


def load_and_assign(layer):
    layer.load_state_dict(linear(seed=2).state_dict(), assign=True)


def write_to_the_state(layer):
    layer.state_dict()["weight"].mul_(3)


def replace_the_parameter(layer):
    layer.weight = linear(seed=2).weight


def replace_the_data(layer):
    layer.weight.data = other()


def initialise(layer):
    nn.init.ones_(layer.weight)


def step(layer):
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    layer.train()(torch.ones(2, 40, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()


def swap(layer):
    torch.utils.swap_tensors(layer.weight, linear(seed=2).weight)


CHANGES = [
    merge_by_data, merge_in_place, merge_under_inference_mode, merge_a_row, load, load_and_assign, write_to_the_state,
    replace_the_parameter, replace_the_data, initialise, step, swap,
]  # fmt: skip


@packs
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_weights_are_multiplied_by(change):
    layer = packed()
    before = layer.weight.detach().clone()
    for _ in range(2):  # what a change was noticed by is there for the next one, too
        change(layer)
        check(layer)
        assert is_packed(layer)
    assert not torch.equal(layer.weight, before)


def assign_data(layer, memory):
    layer.weight.data = memory


def assign_parameter(layer, memory):
    layer.weight = nn.Parameter(memory.data)


@packs
@pytest.mark.parametrize("assign", [assign_data, assign_parameter])
def test_other_values_at_the_address_of_the_old_ones_are_multiplied_by(assign):
    layer, memory = packed(), other()
    assign(layer, memory)
    check(layer)
    assign(layer, other())
    memory.mul_(2)  # as if it had been freed, and had come to another tensor
    assign(layer, memory)
    check(layer)


@packs
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_tied_weights_change_together(change):
    """By way of the embedding that has the same parameter."""
    embedding, layer = nn.Embedding(24, 40), linear(bias=False)
    embedding.weight = layer.weight
    model = pack_linear(nn.ModuleList([embedding, layer]))
    if change is step:
        embedding.forward = lambda x: x @ embedding.weight.T
    if change in (load, load_and_assign):
        state = {"weight": other()}
        embedding.load_state_dict(state, assign=change is load_and_assign)
    else:
        change(embedding)
    check(layer)
    if change not in (load_and_assign, replace_the_parameter):  # which untie them, in any module
        assert layer.weight is embedding.weight
        assert is_packed(model[1])


@packs
def test_parameters_with_the_same_memory_are_left_alone():
    """A change of one is no change of the other's version."""
    layers = [linear(), linear(), linear()]
    layers[1].weight.data = layers[0].weight.data
    model = pack_linear(nn.Sequential(*layers))
    assert [is_packed(layer) for layer in model] == [False, False, True]
    layers[1].weight.data.copy_(other())
    check(model[0])


# --- modules that move ------------------------------------------------------------------------------------------------


@packs
@pytest.mark.parametrize("swapping", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_cast_layer_is_an_ordinary_one_and_packs_again_when_it_comes_back(dtype, swapping):
    layer = packed()
    torch.__future__.set_swap_module_params_on_conversion(swapping)
    try:
        assert layer.to(dtype) is layer
        check(layer)
        assert not is_packed(layer)
        layer.bfloat16()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    check(layer)
    assert is_packed(layer)


@packs
def test_a_layer_on_another_device_is_an_ordinary_one():
    layer = packed().to("meta")
    with torch.no_grad():
        assert layer(torch.empty(2, 40, dtype=torch.bfloat16, device="meta")).shape == (2, 24)
    layer.to_empty(device="cpu").load_state_dict(linear(seed=2).state_dict())
    check(layer)
    assert is_packed(layer)


@packs
@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "deepcopy", "pickle"]
)
def test_copies_multiply_by_the_weights_that_they_show(copied):
    layer = packed()
    twin = copied(layer)
    check(twin)
    assert is_packed(twin)
    layer.weight.data.mul_(-1)
    check(twin)
    check(layer)


@packs
def test_a_state_goes_round(tmp_path):
    layer = packed()
    torch.save(layer.state_dict(), tmp_path / "state.pt")
    ordinary = linear(seed=2)
    ordinary.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert list(ordinary.state_dict()) == list(layer.state_dict()) == ["weight", "bias"]
    assert torch.equal(ordinary.weight, layer.weight)


@packs
def test_hooks_and_names_stay():
    layer, seen = linear(), []
    layer.register_forward_hook(lambda *_: seen.append(1))
    layer.note = "kept"
    pack_linear(nn.Sequential(layer))
    check(layer)
    assert seen == [1]
    assert layer.note == "kept"
    assert isinstance(layer, nn.Linear)
    assert repr(layer) == "PackedLinear(in_features=40, out_features=24, bias=True)"


@packs
def test_computed_weights_are_multiplied_by():
    """Neither pruned nor parametrized weights are parameters; they are made anew when they are requested."""
    pruned, doubled = packed(), packed()
    prune.l1_unstructured(pruned, "weight", 0.5)
    check(pruned)
    assert (pruned.weight == 0).sum() == pruned.weight.numel() // 2

    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    before = doubled.weight.detach().clone()
    parametrize.register_parametrization(doubled, "weight", Double())
    check(doubled)
    assert torch.equal(doubled.weight, 2 * before)


# --- gradients, compilers, and what is wrong --------------------------------------------------------------------------


@packs
@pytest.mark.parametrize("wanted", ["x", "weight", "bias"])
def test_gradients_are_those_of_the_layer(wanted):
    x = torch.randn(3, 40, dtype=torch.bfloat16)
    layers = [linear(), packed()]
    gradients = []
    for layer in layers:
        own = x.clone()
        tensors = {"x": own, "weight": layer.weight, "bias": layer.bias}
        for name, tensor in tensors.items():
            tensor.requires_grad_(name == wanted)
        layer(own).square().sum().backward()
        gradients.append(tensors[wanted].grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)


@packs
def test_a_packed_layer_compiles():
    layer, x = packed(), torch.randn(2, 40, dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x), rtol=0.02, atol=0.02
        )


@packs
def test_errors_are_those_of_the_layer():
    layer = packed()
    for x in (torch.ones(2, 39, dtype=torch.bfloat16), torch.ones(2, 40), torch.tensor(1.0, dtype=torch.bfloat16)):
        messages = []
        for asked in (linear(), layer):
            with pytest.raises(RuntimeError) as error, torch.no_grad():
                asked(x)
            messages.append(str(error.value))
        assert messages[0] == messages[1]


def test_what_cannot_be_packed_stays_as_it_was():
    with torch.inference_mode():
        traceless = linear()
    shared = linear()
    shared.weight.share_memory_()
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta", dtype=torch.bfloat16), traceless, shared)
    before = list(model)
    assert list(pack_linear(model)) == before
    assert [type(layer) for layer in model] == [nn.Linear] * 4
    reasons = [cannot_pack(layer.weight) for layer in model]
    assert reasons[:2] == ["its dtype is torch.float32, not torch.bfloat16", "it is on meta"]
    assert "inference_mode" in reasons[2]
    assert "other processes" in reasons[3]
    assert cannot_pack(torch.ones(1)) == "it is a Tensor, not a Parameter"
