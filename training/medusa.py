"""Train the Medusa heads on what ``training.collect`` wrote, and search the tree they draft.

    python -m training.medusa --data data --out demo_weights/specdec_demo_weights/smollm2-medusa.safetensors

The loss is the cross-entropy of the target's own distribution, 2, 3, ... tokens ahead on a text the target wrote, under
that of each head: its minimum is the marginal distribution of that token. The tree is the one that gains most on the
held-out shard, whose texts were drawn at temperatures 0 to 1.
"""

from __future__ import annotations

import math
import random
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.nn import functional

from specdec_kernels.cli.models import DRAFTER_WEIGHTS, load_target, weights
from specdec_kernels.decode.drafters.feature_model import FeatureModel
from specdec_kernels.decode.drafters.medusa_model import MedusaModel, best_paths
from training.train import batches, final

HEADS, NODES, GUESSES, LOSS_SHARE = 4, 63, 32, 0.3


def examples(batch: tuple[Tensor, Tensor, Tensor], share: float) -> tuple[Tensor, Tensor]:
    """(request, token) of the places whose tokens 1 to HEADS + 1 ahead are all there, a share of them."""
    _ids, _hidden, mask = batch
    keep = mask[:, : -1 - HEADS] & mask[:, 1 + HEADS :]
    return (keep & (torch.rand(keep.shape) < share)).nonzero(as_tuple=True)


def loss_of(
    model: MedusaModel, embed: Tensor, head: Tensor, batch: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, list[float]]:
    """The loss, and how often each head's first guess is the target's."""
    ids, hidden, _mask = batch
    hidden = final(hidden)
    request, token = examples(batch, LOSS_SHARE)
    guesses = model(hidden[request, token], functional.embedding(ids[request, token + 1], embed))
    total, agreements = torch.zeros(()), []
    for ahead in range(HEADS):
        with torch.no_grad():
            target = (hidden[request, token + 1 + ahead].to(head.dtype) @ head.T).float().softmax(-1)
        logits = (guesses[:, ahead].to(head.dtype) @ head.T).float()
        total = total - (target * logits.log_softmax(-1)).sum(-1).mean()
        agreements.append(float((target.argmax(-1) == logits.argmax(-1)).float().mean()))
    return total / HEADS, agreements


@torch.inference_mode()
def true_ranks(
    model: MedusaModel, embed: Tensor, head: Tensor, held_out: list[tuple[Tensor, Tensor, Tensor]]
) -> Tensor:
    """int64 [T, HEADS]: where the text's own tokens stand among the guesses; last where they are none."""
    found = []
    place = torch.full((len(embed),), -1)
    place[model.shortlist] = torch.arange(len(model.shortlist))
    for batch in held_out:
        ids, hidden, _mask = batch
        hidden = final(hidden)
        request, token = examples(batch, 1.0)
        guesses = model(hidden[request, token], functional.embedding(ids[request, token + 1], embed))
        logits = (guesses.to(head.dtype) @ head.T).float()
        true = torch.stack([place[ids[request, token + 2 + ahead]] for ahead in range(HEADS)], 1)
        ranks = (logits > logits.gather(2, true.clamp(min=0)[..., None])).sum(-1)
        found.append(torch.where(true < 0, len(model.shortlist), ranks))
    return torch.cat(found)


def main(
    data: Annotated[Path, typer.Option(help="What training.collect wrote.")] = Path("data"),
    out: Annotated[Path, typer.Option(help="Where to write the heads.")] = Path("medusa.safetensors"),
    minutes: Annotated[float, typer.Option(help="Length of the learning-rate schedule.")] = 15.0,
    peak: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3,
) -> None:
    """Train for a fixed time, search the tree on the held-out shard, write both."""
    torch.manual_seed(0)
    rng = random.Random(0)
    target, _ = load_target()
    shards = [torch.load(path) for path in sorted(data.glob("*.pt"))]
    held_out, train = shards[-1], [conversation for shard in shards[:-1] for conversation in shard]
    shortlist = FeatureModel.load(weights(DRAFTER_WEIGHTS), target.config, torch.float32).shortlist
    model = MedusaModel(target.config.hidden_size, shortlist, torch.full((1, HEADS), -1))
    torch.nn.init.zeros_(model.blocks.weight)
    torch.nn.init.zeros_(model.blocks.bias)
    embed = target.get_input_embeddings().weight.detach().float()
    head = target.get_output_embeddings().weight.detach()[shortlist]
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.01)
    start, step = time.time(), 0
    while (progress := (time.time() - start) / (60 * minutes)) < 1:
        for batch in batches(train, rng):
            progress = (time.time() - start) / (60 * minutes)
            if progress >= 1:
                break
            optimizer.param_groups[0]["lr"] = (
                peak * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * progress))
            )
            with torch.autocast("cpu", torch.bfloat16):
                loss, agreements = loss_of(model, embed, head, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step % 50 == 0:
                shown = " ".join(f"{a:.3f}" for a in agreements)
                print(f"{time.time() - start:6.0f} s step {step} loss {loss:.3f} agreement {shown}", flush=True)
        model.save(out)
    with torch.autocast("cpu", torch.bfloat16):
        ranks = true_ranks(model, embed, head, list(batches(held_out, rng)))
    model.paths = best_paths(ranks, NODES, GUESSES)
    model.save(out)
    for first in (1, 2, 4):
        hits = " ".join(f"{float((ranks[:, j] < first).float().mean()):.3f}" for j in range(HEADS))
        print(f"held out: the text's token is among the first {first} guesses: {hits}")
    for nodes in (7, 15, 31, 63):
        on_path = [(ranks[:, : len(p)] == torch.tensor(p)).all(1).float().mean() for p in _trimmed(model.paths[:nodes])]
        print(f"held out: {nodes} nodes gain {float(sum(on_path)):.3f} tokens a step")


def _trimmed(paths: Tensor) -> list[list[int]]:
    return [[rank for rank in path if rank >= 0] for path in paths.tolist()]


if __name__ == "__main__":
    typer.run(main)
