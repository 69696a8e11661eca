"""Draft a tree of seven nodes, verify it, and move the keys and values of the accepted path into place."""

import torch

from specdec_kernels import compact_kv, sample_children, tree_mask, tree_positions, verify_tree

VOCAB, CONTEXT = 1000, 12
torch.manual_seed(0)
table = 2 * torch.randn(VOCAB, VOCAB)  # a target that looks at the last token alone
draft_table = table + 0.4 * torch.randn(VOCAB, VOCAB)
parents = torch.tensor([[-1, 0, 0, 1, 1, 2, 2]])  # the root is the last token; two children, two children each
request = {"seed": 7, "position": CONTEXT, "temperature": 0.8}

tokens = torch.tensor([[5, 0, 0, 0, 0, 0, 0]])
stats = torch.zeros(1, 7, 3)
for node, first_child in ((0, 1), (1, 3), (2, 5)):
    drawn = sample_children(draft_table[tokens[:, node]], 2, row=first_child - 1, **request)
    tokens[:, first_child : first_child + 2], stats[:, node] = drawn.tokens, drawn.stats

print("positions", tree_positions(parents).tolist())
print("mask", tree_mask(parents)[0].int().tolist())
verified = verify_tree(
    table[tokens],  # what the target says after each node
    tokens,
    parents,
    draft_table[tokens],  # row n: what the children of node n were drawn from
    stats,
    siblings="without_replacement",
    rule="traversal",
    **request,
)
print("tree", tokens.tolist(), "verified", verified.tokens.tolist(), "nodes", verified.nodes.tolist())

# A cache [B, H, S, D] with the tree's rows behind the context, the root's at CONTEXT - 1.
cache = torch.arange(float(CONTEXT + 6)).reshape(1, 1, -1, 1)
compact_kv([cache], verified.nodes, CONTEXT - 1)
print("rows kept", cache.flatten()[CONTEXT - 1 :][: int(verified.num_accepted) + 1].int().tolist())
