"""Drafters of every kind, prompts and options for small random models."""

from __future__ import annotations

from itertools import product

import torch
from tiny import VOCAB, tiny

from specdec_kernels.decode import TreeDraft
from specdec_kernels.decode.drafters import (
    AdaptiveDrafter,
    AsyncDrafter,
    CallableDrafter,
    Costs,
    DraftConfig,
    FallbackDrafter,
    FeatureDrafter,
    FeatureModel,
    Growth,
    MedusaDrafter,
    MedusaModel,
    MergedDrafter,
    ModelDrafter,
    NGramDrafter,
    StaticDrafter,
    TreeDrafter,
)
from specdec_kernels.decode.drafters.feature_model import REPEATS

#: Two of a request's drafts lie beside each other; where it is unsure, drafting stops.
SIBLINGS = DraftConfig(min_confidence=0.3, temperature_scale=0.7, siblings=1)
SHORTLIST = [0, 2, 3, 5, 8]


def drafted(draft):
    """Of each request its drafts, each with the node that it hangs from; a chain is a tree too."""
    tree = draft if isinstance(draft, TreeDraft) else TreeDraft.of(draft)
    nodes = zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True)
    return [[(token, up) for token, up in zip(*row, strict=True) if up >= 0] for row in nodes]


def feature_drafter(model, middle=(), repeats=0.0, config=DraftConfig()):
    torch.manual_seed(5)
    network = FeatureModel(model.config, torch.tensor(SHORTLIST), middle).to(model.dtype).eval()
    drafter = FeatureDrafter(with_repeats(network, repeats), model, config)
    head = drafter.head
    drafter.head = lambda x: head(x).float()  # as steady() has it
    return drafter


@torch.no_grad()
def with_repeats(network, each):
    network.repeats.copy_(each * torch.arange(1.0, REPEATS + 1))
    return network


def medusa_drafter(model, shortlist=SHORTLIST):
    torch.manual_seed(6)
    paths = torch.tensor([[0, -1], [1, -1], [0, 0], [0, 1], [1, 0]])
    network = MedusaModel(model.config.hidden_size, torch.tensor(shortlist), paths).to(model.dtype)
    return MedusaDrafter(network.eval(), model)


class Made(dict):
    """Drafters that are made when they are looked up."""

    def __getitem__(self, name):
        return super().__getitem__(name)()


def drafters(model, tiny=tiny):
    """One of each kind and combination, with drafting models that ``tiny`` makes."""
    costs = Costs()
    return Made(
        {
            "model": lambda: ModelDrafter(tiny(2)),
            "small vocabulary": lambda: ModelDrafter(tiny(3, vocab=6), vocab_size=VOCAB),
            "self": lambda: ModelDrafter(model),
            "static": lambda: StaticDrafter(tiny(2)),
            "static, small vocabulary": lambda: StaticDrafter(tiny(3, vocab=6), vocab_size=VOCAB),
            "feature": lambda: feature_drafter(model),
            "feature of two layers": lambda: feature_drafter(model, (1,)),
            "feature with repeats": lambda: feature_drafter(model, repeats=0.5),
            "lookup": lambda: NGramDrafter(1),
            "rule": lambda: CallableDrafter(lambda history, count: [(history[-1] + i) % VOCAB for i in range(count)]),
            "first of": lambda: FallbackDrafter(NGramDrafter(2), ModelDrafter(tiny(2))),
            "nested": lambda: FallbackDrafter(
                CallableDrafter(lambda history, count: [1] * (count if history[-1] == 3 else 0)), feature_drafter(model)
            ),
            "confident": lambda: ModelDrafter(tiny(2), config=DraftConfig(min_confidence=0.3, temperature_scale=0.7)),
            "tree": lambda: TreeDrafter(ModelDrafter(tiny(2)), Growth(depth=3, width=2, children=3)),
            "tree of self": lambda: TreeDrafter(ModelDrafter(model), Growth(depth=2, width=3, children=4)),
            "feature tree": lambda: TreeDrafter(
                feature_drafter(model, repeats=0.5), Growth(depth=3, width=2, children=2)
            ),
            "medusa": lambda: medusa_drafter(model),
            "first of trees": lambda: FallbackDrafter(NGramDrafter(2), medusa_drafter(model)),
            "merged tree": lambda: MergedDrafter(NGramDrafter(1), ModelDrafter(tiny(2))),
            "siblings": lambda: ModelDrafter(tiny(2), config=SIBLINGS),
            "siblings of features": lambda: feature_drafter(model, repeats=0.5, config=DraftConfig(siblings=2)),
            "first of siblings": lambda: FallbackDrafter(NGramDrafter(2), ModelDrafter(tiny(2), config=SIBLINGS)),
            "ahead": lambda: AsyncDrafter(FallbackDrafter(NGramDrafter(2), ModelDrafter(tiny(2))), outcomes=2),
            "ahead of self": lambda: AsyncDrafter(ModelDrafter(model)),
            "adaptive": lambda: FallbackDrafter(
                AdaptiveDrafter(NGramDrafter(2), costs), AdaptiveDrafter(ModelDrafter(tiny(2)), costs)
            ),
            "adaptive siblings": lambda: AdaptiveDrafter(
                FallbackDrafter(NGramDrafter(2), ModelDrafter(model, config=SIBLINGS))
            ),
        }
    )


NAMES = list(drafters(tiny(1, layers=2)))
#: One of each kind of session.
SESSIONS = {
    "model", "static", "feature with repeats", "lookup", "nested", "tree", "medusa", "first of trees", "merged tree",
    "siblings", "ahead", "adaptive",
}  # fmt: skip
TREES = [name for name in NAMES if "tree" in name or "siblings" in name or name == "medusa"]
PROMPTS = [[1, 2, 3, 1, 2], [4], [5, 6, 7, 8, 9, 5, 6], [3, 3]]


@torch.no_grad()
def exact_distribution(model, prompt, temperature, length):
    distribution = {}
    for sequence in product(range(model.config.vocab_size), repeat=length):
        logits = model(torch.tensor([[*prompt, *sequence]])).logits[0].double() / temperature
        probs = logits.softmax(-1)
        distribution[sequence] = float(
            torch.stack([probs[len(prompt) - 1 + i, t] for i, t in enumerate(sequence)]).prod()
        )
    return distribution


OPTIONS = {
    "filters": {"temperature": 0.9, "top_k": [4, 5, 6, 0], "top_p": 0.9, "min_p": 0.05},
    "penalties": {
        "temperature": 0.9,
        "repetition_penalty": [1.3, 1.0, 1.0, 1.1],
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
    },
    "bias": {"temperature": 0.7, "logit_bias": {3: 2.0, 5: -50.0}},
    "greedy": {"repetition_penalty": 1.5, "logit_bias": [{}, {1: 3.0}, {}, {}]},
}


def only_even(tokens):
    """A grammar: even tokens, and the one behind an even number of tokens is not 0."""
    allowed = sum(1 << token for token in range(0, VOCAB, 2)) - (len(tokens) % 2 == 0)
    return torch.tensor([allowed], dtype=torch.int32)
