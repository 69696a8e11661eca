"""Verify chains of drafts from raw logits: drawn drafts, drafts that were not drawn, and the three rules."""

import torch

from specdec_kernels import sample, verify_chain

BATCH, DRAFTS, VOCAB = 2, 4, 32_000
torch.manual_seed(0)
target_logits = 3 * torch.randn(BATCH, DRAFTS + 1, VOCAB)
draft_logits = target_logits[:, :DRAFTS] + 0.5 * torch.randn(BATCH, DRAFTS, VOCAB)
temperature = torch.tensor([0.7, 1.0])  # of each request; a float is one for all
request = {"seed": torch.tensor([7, 8]), "position": torch.tensor([100, 57])}  # tokens of each request so far

for rule in ("token", "block", "coupled"):
    # A drafter draws token after token; here all rows are known, so one call a position does.
    drawn = [
        sample(draft_logits[:, row], row=row, temperature=temperature, coupled=rule == "coupled", **request)
        for row in range(DRAFTS)
    ]
    verified = verify_chain(
        target_logits,
        torch.stack([each.tokens for each in drawn], 1),
        draft_logits,
        torch.stack([each.stats for each in drawn], 1),  # the scalars of each draft's distribution
        temperature=temperature,
        top_p=0.95,
        rule=rule,
        **request,
    )
    print(f"{rule:8}", "accepted", verified.num_accepted.tolist(), "tokens", verified.tokens.tolist())

# Drafts of an n-gram table or an argmax are point masses: tokens without logits. -1 ends a request's draft.
guesses = target_logits[:, :DRAFTS].argmax(-1)
guesses[1, 2:] = -1
verified = verify_chain(target_logits, guesses, temperature=0.7, **request)
print("guesses ", "accepted", verified.num_accepted.tolist(), "of", verified.num_proposed.tolist())
