"""The operators in a loop of your own, as an engine uses them: ragged rows, one workspace, statistics of acceptance."""

import torch

from specdec_kernels import verify_chain, verify_chain_workspace

VOCAB, MOST, LENGTH = 512, 5, 60
torch.manual_seed(0)
table = 2.5 * torch.randn(VOCAB, VOCAB)  # stands for the model: logits after each token
table[:, 16:] -= 8  # which says little but sixteen tokens, so that n-grams repeat


def lookup(history):
    """What followed the last token the last time, at most MOST tokens."""
    before = [index for index, token in enumerate(history[:-1]) if token == history[-1]]
    return history[before[-1] + 1 :][:MOST] if before else []


histories = [[1, 2, 3], [4, 5], [6]]
seed = torch.tensor([11, 12, 13])
temperature = torch.tensor([0.5, 0.7, 0.0])
workspace = torch.zeros(verify_chain_workspace(len(histories), MOST, VOCAB), dtype=torch.uint8)
proposed, accepted = torch.zeros(2, MOST, dtype=torch.int64)
steps = 0
while min(map(len, histories)) < LENGTH:
    drafts = [lookup(history) for history in histories]
    rows = [[history[-1], *draft] for history, draft in zip(histories, drafts, strict=True)]
    cu_rows = torch.tensor([0, *map(len, rows)]).cumsum(0)  # request b has rows cu_rows[b] to cu_rows[b + 1]
    target_logits = table[torch.tensor([token for row in rows for token in row])]  # the rows of all requests, [N, V]
    padded = torch.tensor([draft + [-1] * (MOST - len(draft)) for draft in drafts])
    position = torch.tensor([len(history) for history in histories])
    request = {"seed": seed, "position": position, "temperature": temperature}
    verified = verify_chain(target_logits, padded, cu_rows=cu_rows, workspace=workspace, **request)
    for history, tokens in zip(histories, verified.tokens.tolist(), strict=True):
        history.extend(token for token in tokens if token >= 0)  # and the cache keeps num_accepted + 1 of its rows
    at = verified.by_position()
    proposed, accepted, steps = proposed + at[0], accepted + at[1], steps + 1
print(f"{sum(map(len, histories)) / steps / len(histories):.2f} tokens a step of a request")
print("drafts accepted, by index:", accepted.tolist(), "of", proposed.tolist())
