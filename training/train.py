"""Train the feature drafter on what ``training.collect`` wrote.

    python -m training.train --data data --out demo_weights/specdec_demo_weights/smollm2-drafter.safetensors

The loss is the cross-entropy of the target's own distribution under the drafter's, at the first draft and, on the
drafter's own features, at the following ones (as HASS, arXiv:2408.15766): that is what drafting several tokens needs.
With ``--acceptance`` most of it is the chance of a rejection itself, the total variation of the two distributions at
the temperatures that texts are drawn at: the token rule accepts a draft with probability ``sum(min(target, draft))``.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from specdec_kernels.cli.models import load_target
from specdec_kernels.decode.drafters.feature_model import FeatureModel, FeatureNetwork
from specdec_kernels.decode.drafters.histories import placed_followers
from specdec_kernels.decode.drafters.suffix_index import SuffixIndex
from training.collect import FEATURE_LAYERS

STEP_WEIGHTS = (1.0, 0.8, 0.7)
#: Share of the time in which only the first draft is trained: three times as many batches, and most of the learning.
FIRST_STEP_ONLY = 0.45
TOKENS_A_BATCH = 2048
#: Share of positions that enter the loss: neighbours say much the same, and the head is what costs.
LOSS_SHARE = 0.5
#: Times the learning rate: what repetitions add to a logit is of another size than weights.
REPEATS_RATE = 30.0
#: Temperatures at which rejections count, and the share of the cross-entropy that stays beside them.
TEMPERATURES, CROSS_ENTROPY_SHARE = (0.4, 0.6, 0.8, 0.8, 1.0), 0.1

Conversation = tuple[Tensor, Tensor, int]


def batches(
    conversations: list[Conversation], rng: random.Random, tokens_a_batch: int = TOKENS_A_BATCH
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Padded (ids [B, T], hidden [B, T, H], loss mask [B, T]) of conversations of similar length, in random order."""
    order = sorted(range(len(conversations)), key=lambda i: len(conversations[i][1]) + rng.random() * 32)
    groups: list[list[int]] = [[]]
    for i in order:
        if groups[-1] and (len(groups[-1]) + 1) * len(conversations[i][1]) > tokens_a_batch:
            groups.append([])
        groups[-1].append(i)
    rng.shuffle(groups)
    for group in groups:
        length = max(len(conversations[i][1]) for i in group)
        ids = torch.zeros(len(group), length, dtype=torch.int64)
        hidden = torch.zeros(len(group), length, conversations[0][1].shape[1])
        mask = torch.zeros(len(group), length, dtype=torch.bool)
        for slot, i in enumerate(group):
            tokens, states, prompt = conversations[i]
            count = min(len(tokens), len(states))
            ids[slot, :count] = tokens[:count]
            hidden[slot, :count] = states[:count].float()
            mask[slot, prompt - 1 : count] = True
        yield ids, hidden, mask


def final(hidden: Tensor) -> Tensor:
    """The target's last layer, after the final norm."""
    return hidden.unflatten(-1, (len(FEATURE_LAYERS), -1))[..., -1, :]


def read_by(layers: Sequence[int], hidden: Tensor) -> Tensor:
    """The layers that a model reads, of those that were collected."""
    collected = hidden.unflatten(-1, (len(FEATURE_LAYERS), -1))
    return collected[..., [FEATURE_LAYERS.index(layer) for layer in layers], :].flatten(-2)


@dataclass(frozen=True)
class Training:
    """What is trained, and what it needs of the target."""

    network: FeatureNetwork
    layers: Sequence[int]
    """Of the target, that the network reads."""
    embed: Tensor
    """float32 [V, H]: the target's embeddings."""
    head: Tensor
    """[S, H]: the target's head, of the ids that can be drafted."""
    draft_logits: Callable[[Tensor], Tensor]
    """float32 [..., S] of the network's outputs [..., H]."""
    repeats: FeatureModel | None = None
    """What favours repetitions, if anything does."""

    @classmethod
    def of(cls, model: FeatureModel, target: Any) -> Training:
        """Of a model that drafts by the target's own head."""
        head = target.get_output_embeddings().weight.detach()[model.shortlist]
        embed = target.get_input_embeddings().weight.detach().float()
        return cls(model, model.layers, embed, head, lambda x: (x.to(head.dtype) @ head.T).float(), model)


def unrolled(model: FeatureNetwork, embeddings: Tensor, features: Tensor, steps: int) -> list[Tensor]:
    """The outputs after one draft, two, ...: at step j, position t has read its own outputs at t-j+1 .. t."""
    length = features.shape[1]
    positions = torch.arange(length)[None]
    keys: list[Tensor] = []
    values: list[Tensor] = []
    outputs: list[Tensor] = []
    for step in range(steps):
        x = model.inputs(embeddings, features)
        query, key, value = model.project(x, positions)
        keys.append(key.repeat_interleave(model.heads // model.kv_heads, 1))
        values.append(value.repeat_interleave(model.heads // model.kv_heads, 1))
        # True features up to t - step, then this drafter's own at t - step + 1 .. t.
        query = query * model.head_dim**-0.5
        unseen = torch.full((length, length), -torch.inf, dtype=query.dtype).triu(1 - step)
        scores = torch.baddbmm(unseen, query.flatten(0, 1), keys[0].flatten(0, 1).transpose(1, 2)).view(
            *query.shape[:2], length, length
        )
        own = [(query * _shift(keys[j], step - j)).sum(-1, keepdim=True) for j in range(1, step + 1)]
        weights = torch.cat([scores, *own], -1).softmax(-1, dtype=torch.float32).to(value.dtype)
        mixed = weights[..., :length] @ values[0]
        for j in range(1, step + 1):
            mixed = mixed + weights[..., length + j - 1, None] * _shift(values[j], step - j)
        outputs.append(model.finish(x, mixed))
        features = torch.cat([torch.zeros_like(outputs[-1][:, :1]), outputs[-1][:, :-1]], 1)
    return outputs


def _shift(x: Tensor, by: int) -> Tensor:
    """Position t of the result is position t - by of ``x`` [B, heads, T, D]; zeros before it."""
    return x if by == 0 else torch.cat([torch.zeros_like(x[:, :, :by]), x[:, :, :-by]], 2)


def repetitions(model: FeatureModel, ids: Tensor, mask: Tensor) -> Tensor:
    """int64 [4, N], of all drafts of a batch that :meth:`FeatureModel.favour` favours: the slot, the output that
    drafts, the draft's place in the short list, and how many tokens it followed before."""
    places, found = model.offsets(), []
    for slot, (tokens, wanted) in enumerate(zip(ids.tolist(), mask.tolist(), strict=True)):
        index = SuffixIndex()
        for position, token in enumerate(tokens):
            index.append(token)
            if wanted[position]:
                # An output has read the token after it.
                found += [(slot, position - 1, *follower) for follower in placed_followers(index, [], places)]
    return torch.tensor(found, dtype=torch.int64).reshape(-1, 4).T


def losses(
    training: Training,
    batch: tuple[Tensor, Tensor, Tensor],
    steps: int,
    share: float = 1.0,
    temperature: float | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The training loss, and for each draft step how often the drafter's first choice is the target's; with a
    temperature the loss is mostly the chance of a rejection there, and what is shown is that of an acceptance."""
    ids, hidden, mask = batch
    head, model = training.head, training.repeats
    embeddings = torch.nn.functional.embedding(ids[:, 1:], training.embed)
    outputs = unrolled(training.network, embeddings, read_by(training.layers, hidden[:, :-1]), steps)
    total, agreements = torch.zeros(()), []
    if model is not None:
        slot, position, *favoured = repetitions(model, ids, mask)
    for step, (weight, output) in enumerate(zip(STEP_WEIGHTS, outputs, strict=False)):
        keep = mask[:, 1:] & (torch.rand(mask[:, 1:].shape) < share)
        keep[:, :step] = False
        with torch.no_grad():
            target_logits = (final(hidden[:, 1:][keep]).to(head.dtype) @ head.T).float()
            target = target_logits.softmax(-1)
        draft_logits = training.draft_logits(output[keep])
        if model is not None:
            kept = keep[slot, position]
            row = keep.flatten().cumsum(0).view_as(keep)[slot, position] - 1
            draft_logits = model.favour(draft_logits, *(x[kept] for x in (row, *favoured)))
        loss = -(target * draft_logits.log_softmax(-1)).sum(-1).mean()
        if temperature is None:
            agreements.append((target.argmax(-1) == draft_logits.argmax(-1)).float().mean())
        else:
            cold = (target_logits / temperature).softmax(-1)
            accepted = torch.minimum(cold, (draft_logits / temperature).softmax(-1)).sum(-1).mean()
            loss = CROSS_ENTROPY_SHARE * loss + 1 - accepted
            agreements.append(accepted.detach())
        total = total + weight * loss
    return total / sum(STEP_WEIGHTS[:steps]), agreements


@torch.no_grad()
def start_from_last_layer(model: FeatureModel, target: Any) -> None:
    """Copy the target's last layer and final norm, the best guess there is."""
    layer = target.layers[-1]
    attention, mlp = layer.self_attn, layer.mlp
    model.attention_norm.weight.copy_(layer.input_layernorm.weight)
    model.qkv.weight.copy_(torch.cat([p.weight for p in (attention.q_proj, attention.k_proj, attention.v_proj)]))
    model.output.weight.copy_(attention.o_proj.weight)
    model.mlp_norm.weight.copy_(layer.post_attention_layernorm.weight)
    model.gate_up.weight.copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
    model.down.weight.copy_(mlp.down_proj.weight)
    model.norm.weight.copy_(target.norm.weight)


@torch.no_grad()
def widened(narrow: FeatureModel, middle: Sequence[int], sample: Tensor) -> FeatureModel:
    """A model that reads middle layers as well and begins by giving no weight to them; their channels are brought to
    one scale, as they have it in a ``sample`` [T, layers * H] of hidden states."""
    model = FeatureModel(narrow.config, narrow.shortlist, middle)
    model.load_state_dict(narrow.state_dict(), strict=False)
    states = read_by(model.layers, sample).unflatten(-1, (len(model.layers), -1))[:, :-1].float()
    normed = torch.nn.functional.rms_norm(states, states.shape[-1:])
    model.middle_norm.copy_(normed.square().mean(0).rsqrt())
    model.middle.weight.zero_()
    return model


def frequent(conversations: list[Conversation], most: int, among: Tensor | None = None) -> Tensor:
    """int64 [S]: the most frequent tokens of the answers, or of those ``among`` them, ascending."""
    counts = Counter(int(t) for ids, _, prompt in conversations for t in ids[prompt:])
    if among is not None:
        counts = Counter({token: counts[token] for token in among.tolist()})
    return torch.tensor(sorted(token for token, _ in counts.most_common(most)))


def main(
    data: Annotated[Path, typer.Option(help="What training.collect wrote.")] = Path("data"),
    out: Annotated[Path, typer.Option(help="Where to write the drafter.")] = Path("drafter.safetensors"),
    minutes: Annotated[float, typer.Option(help="Length of the learning-rate schedule.")] = 30.0,
    shortlist: Annotated[int, typer.Option(help="Tokens that can be drafted; a longer list is cut.")] = 4096,
    peak: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3,
    start_from: Annotated[Path | None, typer.Option(help="Weights to go on from, with all drafts at once.")] = None,
    acceptance: Annotated[bool, typer.Option("--acceptance", help="Train for acceptance at a temperature.")] = False,
    middle: Annotated[
        str | None, typer.Option(help="Layers of the target to read from now on beside the last, such as 10,20.")
    ] = None,
) -> None:
    """Train for a fixed time, print the held-out agreement, write the weights."""
    torch.manual_seed(0)
    rng = random.Random(0)
    target, _ = load_target()
    shards = [torch.load(path) for path in sorted(data.glob("*.pt"))]
    held_out, train = shards[-1], [conversation for shard in shards[:-1] for conversation in shard]
    if start_from is None:
        model = FeatureModel(target.config, frequent(train, shortlist))
        start_from_last_layer(model, target.model)
    else:
        model = FeatureModel.load(start_from, target.config, torch.float32)
        if shortlist < len(model.shortlist):
            model.shortlist = frequent(train, shortlist, among=model.shortlist)
        if middle is not None:
            sample = torch.cat([hidden for _, hidden, _ in held_out])
            model = widened(model, [int(layer) for layer in middle.split(",")], sample)
        model.train()
    training = Training.of(model, target)
    first_only = FIRST_STEP_ONLY if start_from is None else 0.0
    if start_from is not None:
        report(training, list(batches(held_out, rng)))
    fit(training, train, rng, minutes, peak, first_only, 0.0 if acceptance else 1.0, lambda: model.save(out))
    print("repeats " + " ".join(f"{favour:.2f}" for favour in model.repeats.tolist()))
    report(training, list(batches(held_out, rng)))


def fit(
    training: Training,
    conversations: list[Conversation],
    rng: random.Random,
    minutes: float,
    peak: float,
    first_only: float,
    entropy_only: float,
    save: Callable[[], None],
    tokens_a_batch: int = TOKENS_A_BATCH,
) -> None:
    """Train for a fixed time, its first share ``first_only`` on first drafts alone, its first share ``entropy_only`` by
    cross-entropy alone; save after every epoch and at last."""
    repeats = () if training.repeats is None else (training.repeats.repeats,)
    parameters = [each for each in training.network.parameters() if each.requires_grad]
    network = [each for each in parameters if all(each is not other for other in repeats)]
    groups = [{"params": network, "times": 1.0}, {"params": list(repeats), "times": REPEATS_RATE}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.01)
    start, step, epoch = time.time(), 0, 0
    while time.time() - start < 60 * minutes:
        for batch in batches(conversations, rng, tokens_a_batch):
            progress = (time.time() - start) / (60 * minutes)
            if progress >= 1:
                break
            rate = peak * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * progress))
            for group in optimizer.param_groups:
                group["lr"] = rate * group["times"]
            with torch.autocast("cpu", torch.bfloat16):
                steps = 1 if progress < first_only else len(STEP_WEIGHTS)
                temperature = None if progress < entropy_only else rng.choice(TEMPERATURES)
                loss, agreements = losses(training, batch, steps, LOSS_SHARE, temperature)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1
            if step % 20 == 0:
                shown = " ".join(f"{a:.3f}" for a in agreements)
                print(f"{time.time() - start:6.0f} s step {step} epoch {epoch} loss {loss:.3f} {shown}", flush=True)
        epoch += 1
        save()
    save()


@torch.inference_mode()
def report(training: Training, held_out: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Print how often the first choices agree, and how often a draft would be accepted at 0.8."""
    for name, temperature in (("agreement", None), ("acceptance at 0.8", 0.8)):
        with torch.autocast("cpu", torch.bfloat16):
            results = [losses(training, batch, len(STEP_WEIGHTS), 1.0, temperature) for batch in held_out]
        means = [sum(float(r[1][j]) for r in results) / len(results) for j in range(len(STEP_WEIGHTS))]
        print(f"held out: {name} " + " ".join(f"{m:.3f}" for m in means), flush=True)


if __name__ == "__main__":
    typer.run(main)
