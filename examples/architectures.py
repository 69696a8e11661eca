"""Windows of attention, convolutions and recurrent states: the texts of transformers' own `generate`, with drafts."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, logging

from specdec_kernels.decode import Statistics, TransformersTarget, generate
from specdec_kernels.decode.drafters import NGramDrafter

logging.set_verbosity_error()  # of kernels for GPUs that are not installed
SIZES = {
    "vocab_size": 23, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
MODELS = {
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"sliding_window": 4},
    "mamba": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}
prompts = [[1, 2, 3, 1, 2], [5, 6, 7, 8, 9, 5, 6, 11, 12]]
for kind, named in MODELS.items():
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZES, **named), attn_implementation="eager").eval()
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.normal_(0, 0.3)  # so that the text depends on all of its history
    statistics = Statistics()
    results = generate(
        TransformersTarget(model), prompts, drafter=NGramDrafter(1), temperature=0.0, max_new_tokens=20,
        statistics=statistics,
    )  # fmt: skip
    for prompt, result in zip(prompts, results, strict=True):
        ids = torch.tensor([prompt])
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20)
        assert result.tokens == alone[0, len(prompt) :].tolist(), kind
    print(f"{kind}: {statistics.accepted} of {statistics.proposed} drafts accepted, the texts are those of generate()")
