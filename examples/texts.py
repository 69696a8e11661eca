"""Texts in, texts out: two samples of one prompt, which is read once; stop strings; pieces of text as they come."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from specdec_kernels.decode import SamplingParams, TextGenerator, TransformersTarget
from specdec_kernels.decode.drafters import NGramDrafter

# A tokenizer with a token a byte, and random weights: with real ones AutoTokenizer and AutoModelForCausalLM.
vocab = {letter: token for token, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
bytes_alone = Tokenizer(models.BPE(vocab=vocab, merges=[]))
bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
bytes_alone.decoder = decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_alone)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2, eos_token_id=None,
    bos_token_id=None,
)  # fmt: skip
target = TransformersTarget(LlamaForCausalLM(config).eval())

generator = TextGenerator(target, tokenizer, NGramDrafter(1), logprobs=True)
letters = {token: 10.0 for letter, token in vocab.items() if letter in "abc d"}
params = SamplingParams(
    n=2, temperature=0.8, logit_bias=letters, seed=1, stop=["dab", "cc"], min_new_tokens=4, max_new_tokens=60,
    prompt_logprobs=True,
)  # fmt: skip
for completion in generator.generate(["abc abd"], params)[0]:
    total = sum(completion.logprobs)
    print(f"{completion.text!r} ends by {completion.finished}, {completion.stop!r}; log-probability {total:.1f}")
print(f"log-probability of the prompt: {sum(completion.prompt_logprobs[1:]):.1f}")
for piece in generator.submit("cab", params)[0]:  # whole characters, and no beginning of a stop string
    print(repr(piece), end=" ")
print()
