"""Train an EAGLE-3 drafter on what ``training.collect`` wrote, in the layout of ``speculators``.

    python -m training.eagle3 --data data --out demo_weights/specdec_demo_weights/smollm2-eagle3 --minutes 45

It begins as the feature drafter, as far as the layout allows. The loop and the losses are those of ``training.train``:
cross-entropy with the target's distribution, at the first draft and, on the drafter's own outputs, at the following
ones (the training-time test of EAGLE-3, arXiv:2503.01840); towards the end mostly the chance of a rejection. The head
and the embeddings are the target's and are not trained.
"""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from specdec_kernels.cli.models import DRAFTER_WEIGHTS, load_target, weights
from specdec_kernels.decode.drafters.eagle3 import Eagle3Model, Norms
from specdec_kernels.decode.drafters.feature_model import FeatureModel
from training.collect import FEATURE_LAYERS
from training.train import Conversation, Training, batches, fit, read_by, report

#: Of the target, beside the last one that the loss is computed from.
LAYERS = FEATURE_LAYERS[:3]
#: Share of the time in which the chance of a rejection is no part of the loss.
CROSS_ENTROPY_ONLY = 0.6
#: Of the target, for other readers of the files.
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
#: Conversations that are not trained on.
HELD_OUT = 24
#: Fewer than where there is more to learn from: what is scarce here is steps.
TOKENS_A_BATCH = 1024
#: Of the squares of the inputs: keeps the least squares from fitting noise.
RIDGE = 1e-4


@torch.no_grad()
def started(target: Any, drafter: FeatureModel, conversations: list[Conversation]) -> Eagle3Model:
    """A model that attends and ends as a feature drafter does: ``fc`` gives, by least squares over the hidden states of
    some conversations, what the drafter makes of its own. The layout has no place for what the drafter adds of the
    next token's embedding, nor for the matrix by which it reads its own outputs: that is to be learnt."""
    config = copy.deepcopy(target.config)
    config.num_hidden_layers = 1
    width, embeddings = config.hidden_size, target.get_input_embeddings().weight.detach().float()
    norms = Norms(norm_before_residual=True, norm_before_fc=True)
    model = Eagle3Model(config, len(LAYERS), width, len(drafter.shortlist), norms)
    counts = [min(len(hidden), len(ids) - 1) for ids, hidden, _ in conversations]
    pairs = list(zip(counts, conversations, strict=True))
    hidden = torch.cat([states[:count] for count, (_, states, _) in pairs]).float()
    embedded = embeddings[torch.cat([ids[1 : count + 1] for count, (ids, _, _) in pairs]).long()]
    states, made = read_by(LAYERS, hidden), drafter.inputs(torch.zeros_like(embedded), read_by(drafter.layers, hidden))
    # Channels are brought to one scale.
    model.input_norm.weight.copy_(_rms(states / _rms(states, -1), 0).reciprocal()[0])
    x = model.input_norm(states)
    gram = x.T @ x
    gram.diagonal().add_(RIDGE * len(x))
    model.fc.weight.copy_(torch.linalg.solve(gram, x.T @ made).T)
    first, _second = drafter.fuse.weight.split(width, 1)
    layer: Any = model.layers[0]
    # What is read keeps its usual scale, and so does the drafter's own output, which is larger and stands in for it.
    layer["input_layernorm"].weight.fill_(_rms(embedded, -1).median())
    layer["hidden_norm"].weight.fill_(_rms(made, -1).median())
    read = torch.cat([first, torch.eye(width)], 1) / _rms(embedded @ first.T + made, -1).median()
    sizes = [heads * drafter.head_dim for heads in (drafter.heads, drafter.kv_heads, drafter.kv_heads)]
    attending = (drafter.qkv.weight * drafter.attention_norm.weight).split(sizes)
    for name, matrix in zip(("q_proj", "k_proj", "v_proj"), attending, strict=True):
        layer["self_attn"][name].weight.copy_(matrix @ read)
    layer["self_attn"]["o_proj"].weight.copy_(drafter.output.weight)
    layer["post_attention_layernorm"].weight.copy_(drafter.mlp_norm.weight)
    for name, matrix in zip(("gate_proj", "up_proj"), drafter.gate_up.weight.chunk(2), strict=True):
        layer["mlp"][name].weight.copy_(matrix)
    layer["mlp"]["down_proj"].weight.copy_(drafter.down.weight)
    model.norm.weight.copy_(drafter.norm.weight)
    model.lm_head.weight.copy_(target.get_output_embeddings().weight[drafter.shortlist])
    model.lm_head.weight.requires_grad_(False)
    return model


def _rms(x: Tensor, dim: int) -> Tensor:
    return x.square().mean(dim, keepdim=True).sqrt()


def training_of(model: Eagle3Model, target: Any) -> Training:
    """What ``training.train`` trains a model by."""
    embed = target.get_input_embeddings().weight.detach().float()
    head = model.lm_head.weight.detach().to(target.dtype)
    return Training(model, LAYERS, embed, head, lambda x: model.head(x).float())


def main(
    data: Annotated[Path, typer.Option(help="What training.collect wrote.")] = Path("data"),
    out: Annotated[Path, typer.Option(help="Folder to write the drafter to.")] = Path("eagle3"),
    minutes: Annotated[float, typer.Option(help="Length of the learning-rate schedule.")] = 45.0,
    peak: Annotated[float, typer.Option(help="Highest learning rate.")] = 6e-4,
) -> None:
    """Train for a fixed time, print the held-out agreement, write the weights in eight bits."""
    torch.manual_seed(0)
    rng = random.Random(0)
    target, _ = load_target()
    conversations = [conversation for path in sorted(data.glob("*.pt")) for conversation in torch.load(path)]
    rng.shuffle(conversations)
    held_out, conversations = conversations[:HELD_OUT], conversations[HELD_OUT:]
    drafter = FeatureModel.load(weights(DRAFTER_WEIGHTS), target.config, torch.float32)
    model = started(target, drafter, conversations[: 4 * HELD_OUT])
    training, shown = training_of(model, target), list(batches(held_out, rng))
    report(training, shown)

    def save() -> None:
        model.save(out, drafter.shortlist, target, LAYERS, torch.float8_e4m3fn, NAME)

    fit(training, conversations, rng, minutes, peak, 0.0, CROSS_ENTROPY_ONLY, save, TOKENS_A_BATCH)
    report(training, shown)


if __name__ == "__main__":
    typer.run(main)
