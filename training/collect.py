"""Collect distillation data: the target's own answers, with the hidden state it had at every token.

    python -m training.collect --out data --minutes 30

Each shard holds, for a batch of conversations, the token ids and the target's hidden states at the layers that a
drafter may read, the last of them after the final norm, that is, what the LM head reads; so training never runs the
target again. A third of the prompts are sampled from the target itself, by letting it write the user's turn.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import DynamicCache

from specdec_kernels import sample
from specdec_kernels.cli.models import load_target
from training import prompts

#: Layers of the target whose outputs are kept, side by side, -1 the last.
FEATURE_LAYERS = (10, 20, 29, -1)
BATCH = 128
NEW_TOKENS = 192
#: Of the conversations of a shard: how many of each kind from templates, how many from the target's own prompts; the
#: rest corrects the spelling of earlier answers.
KINDS, OWN = {prompts.chat: 16, prompts.code: 24, prompts.story: 20}, 40


@torch.inference_mode()
def generate(
    model, tokenizer, texts: list[str], temperatures: torch.Tensor, new_tokens: int, stop: int, seed: int
) -> list[tuple[list[int], torch.Tensor, int]]:
    """Sample one continuation a text; return for each its ids (prompt and answer), the hidden states [T, layers * H]
    before each but the first, and the length of its prompt."""
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    prompt_lengths = mask.sum(1).tolist()
    rows = list(range(len(texts)))
    tokens = [ids[i, mask[i].bool()].tolist() for i in rows]
    hidden: list[list[torch.Tensor]] = [[] for _ in rows]
    cache = DynamicCache(config=model.config)
    current = ids
    for _ in range(new_tokens):
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, -current.shape[1] :]
        outputs = model.model(
            current, attention_mask=mask, position_ids=position_ids, past_key_values=cache, output_hidden_states=True
        )
        states = torch.cat([outputs.hidden_states[layer] for layer in FEATURE_LAYERS], -1)
        for slot, row in enumerate(rows):
            hidden[row].append(states[slot, mask[slot, -current.shape[1] :].bool()].clone())
        drawn = sample(
            model.lm_head(outputs.last_hidden_state[:, -1]),
            seed=torch.tensor(rows) + seed,
            position=mask.shape[1],
            temperature=temperatures[rows],
        )
        current = drawn.tokens[:, None]
        for slot, row in enumerate(rows):
            tokens[row].append(int(current[slot]))
        mask = torch.cat([mask, torch.ones(len(rows), 1, dtype=mask.dtype)], 1)
        alive = [slot for slot in range(len(rows)) if int(current[slot]) != stop]
        if not alive:
            break
        # Finished conversations leave the batch, in groups: selecting copies the cache.
        if len(alive) <= 0.8 * len(rows):
            keep = torch.tensor(alive)
            cache.batch_select_indices(keep)
            mask, current, rows = mask[keep], current[keep], [rows[slot] for slot in alive]
    return [_until_stop(tokens[i], torch.cat(hidden[i]), prompt_lengths[i], stop) for i in range(len(texts))]


def _until_stop(tokens: list[int], hidden: torch.Tensor, prompt_length: int, stop: int):
    if stop in tokens[prompt_length:]:
        tokens = tokens[: tokens.index(stop, prompt_length) + 1]
    return tokens, hidden[: len(tokens)], prompt_length


def main(
    out: Annotated[Path, typer.Option(help="Directory for the shards.")] = Path("data"),
    minutes: Annotated[float, typer.Option(help="Stop after the batch that passes this time.")] = 30.0,
    seed: Annotated[int, typer.Option(help="Seed of prompts and sampling.")] = 0,
    temperatures: Annotated[
        str, typer.Option(help="What an answer's temperature is drawn from, each as often as it is named.")
    ] = "0,0.5,0.8,0.8,1",
) -> None:
    """Generate until the time is up, one shard a batch."""
    model, tokenizer = load_target()
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    choices = [float(temperature) for temperature in temperatures.split(",")]
    out.mkdir(parents=True, exist_ok=True)
    start, shard, answers = time.time(), 0, []
    while time.time() - start < 60 * minutes:
        rng = random.Random(f"{seed}/{shard}")
        noise = 1_000_000 * seed + 2 * BATCH * shard
        requests = [kind(rng) for kind, count in KINDS.items() for _ in range(count)]
        system = tokenizer.apply_chat_template([{"role": "user", "content": "@"}], tokenize=False).split("@")[0]
        own = generate(model, tokenizer, [system] * OWN, torch.ones(OWN), 48, stop, noise)
        requests += [text for ids, _, n in own if (text := tokenizer.decode(ids[n:], skip_special_tokens=True).strip())]
        while answers and len(requests) < BATCH:
            requests.append(prompts.edit(rng.choice(answers), rng))
        texts = [
            tokenizer.apply_chat_template([{"role": "user", "content": r}], tokenize=False, add_generation_prompt=True)
            for r in requests
        ]
        drawn_at = torch.tensor([rng.choice(choices) for _ in texts])
        data = generate(model, tokenizer, texts, drawn_at, NEW_TOKENS, stop, noise + BATCH)
        answers = [tokenizer.decode(ids[n : n + 100], skip_special_tokens=True).strip() for ids, _, n in data[:100]]
        torch.save(
            [(torch.tensor(ids, dtype=torch.int32), h, n) for ids, h, n in data], out / f"{seed:02}-{shard:04}.pt"
        )
        shard += 1
        count = sum(len(ids) for ids, _, _ in data)
        print(f"shard {shard}: {count} tokens, {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    typer.run(main)
