"""Encoder-decoders copy their source: a small BART learns to copy sentences with another hero, and drafts are looked up
in the source. The sentences are from "Alice's Adventures in Wonderland" (Lewis Carroll, 1865)."""

import random

import torch
from transformers import BartConfig, BartForConditionalGeneration

from specdec_kernels.decode import Statistics, TransformersTarget, generate
from specdec_kernels.decode.drafters import NGramDrafter

SENTENCES = """
Alice was beginning to get very tired of sitting
once or twice she had peeped into the book her sister was reading
but it had no pictures or conversations in it
what is the use of a book thought Alice
suddenly a White Rabbit with pink eyes ran close by her
there was nothing so very remarkable in that
nor did Alice think it so very much out of the way
burning with curiosity she ran across the field after it
in another moment down went Alice after it
""".strip().splitlines()
EDITS = {"Alice": "Tom", "she": "he", "her": "his", "sister": "brother"}
STEPS = 400  # four seconds on one core

PAD, END = 0, 1
names = ["<pad>", "</s>", *sorted({word for line in SENTENCES for word in line.split()} | {*EDITS.values()})]
ids = {name: index for index, name in enumerate(names)}
replaced = {ids[word]: ids[other] for word, other in EDITS.items()}


def pair(words):
    """Source and text of some words."""
    return [*words, END], [*(replaced.get(word, word) for word in words), END]


def train(model, steps):
    """On random words, so that what it learns is to copy, not these sentences."""
    rng, optimizer = random.Random(0), torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    for _ in range(steps):
        length = rng.randint(3, 13)
        batch = [pair(rng.sample(range(2, len(names)), length)) for _ in range(16)]
        sources, texts = (torch.tensor(side) for side in zip(*batch, strict=True))
        optimizer.zero_grad()
        model(input_ids=sources, labels=texts).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


torch.manual_seed(0)
torch.set_num_threads(1)
config = BartConfig(
    vocab_size=len(names), d_model=64, max_position_embeddings=64, init_std=0.05, dropout=0.0,
    encoder_layers=1, encoder_ffn_dim=128, encoder_attention_heads=4,
    decoder_layers=1, decoder_ffn_dim=128, decoder_attention_heads=4,
    decoder_start_token_id=PAD, pad_token_id=PAD, bos_token_id=None, eos_token_id=END, forced_eos_token_id=None,
)  # fmt: skip
model = BartForConditionalGeneration(config)
train(model, STEPS)
target = TransformersTarget(model.eval())
prompts = [target.prompt(pair([ids[word] for word in line.split()])[0]) for line in SENTENCES]
texts = {}
for name, drafter in {
    "without drafts": None,
    "looked up in the text alone": NGramDrafter(1, sources=False),
    "looked up in the source too": NGramDrafter(1),
}.items():
    statistics = Statistics()
    results = generate(
        target, prompts, drafter=drafter, num_draft=6, max_new_tokens=24, temperature=0.0, statistics=statistics
    )
    texts[name] = [" ".join(names[token] for token in result.tokens if token != END) for result in results]
    print(f"{name}: {statistics.tokens_per_step:.2f} tokens a step")
assert len(set(map(tuple, texts.values()))) == 1, "drafts change no text"
right = sum(
    text.split() == [EDITS.get(word, word) for word in line.split()]
    for text, line in zip(texts["without drafts"], SENTENCES, strict=True)
)
print(f"{right} of {len(SENTENCES)} sentences as they should be, such as: {texts['without drafts'][0]}")
