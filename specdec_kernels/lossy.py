"""Rules that change the distribution of the text, apart from those that do not. Each has ``lossless = False``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from specdec_kernels import checks
from specdec_kernels.decode.protocols import Scores, Target, TargetSession, joinable, shares_ids
from specdec_kernels.ops import validate, verify_chain
from specdec_kernels.ops.backends import BackendName
from specdec_kernels.ops.results import VerifiedTree
from specdec_kernels.ops.tree_rules import checked_tokens
from specdec_kernels.ops.trees import checked, tree_paths, tree_positions
from specdec_kernels.reference.distributions import Sampling, distributions, scale_of

__all__ = ["BlankTarget", "SyntheticAcceptance", "typical_acceptance"]


def typical_acceptance(
    target_logits: Tensor,
    draft_tokens: Tensor,
    parents: Tensor,
    *,
    seed: Tensor | int,
    position: Tensor | int,
    temperature: float = 1.0,
    epsilon: float = 0.09,
    delta: float = 0.3,
    backend: BackendName | None = None,
) -> VerifiedTree:
    """Medusa's rule: a draft is accepted where the target does not find it surprising, whatever it was drawn from.

    A node is accepted iff its parent is and ``target(token) > min(epsilon, delta * exp(-entropy(target)))``; the text
    goes on along the longest accepted path, the first of equals, and with a draw from the target. **The distribution of
    the text is not the target's**: how far from it, :func:`specdec_kernels.oracle.typical_distribution` says exactly
    for small vocabularies.

    Args:
        target_logits: float32, bfloat16 or float16 [B, N, V]; row n is the target's after the path to node n.
        draft_tokens: int64 or int32 [B, N]; of the root not looked at.
        parents: int64 or int32 [B, N], as for :func:`specdec_kernels.verify_tree`.
        seed, position: as for :func:`specdec_kernels.verify_tree`.
        temperature: of the target, positive.
        epsilon: probability that is always enough, in (0, 1].
        delta: share of the typical probability that is enough, positive.
        backend: of the draw.

    Returns:
        :class:`specdec_kernels.VerifiedTree`, without log-probabilities.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Equivalent to, for each node::

        probs = torch.softmax(target_logits[parent] / temperature, -1)
        accepted = probs[token] > min(epsilon, delta * torch.exp(-torch.special.entr(probs).sum()))

    Source: Cai et al., Medusa, arXiv:2401.10774, section 2.3.1.
    """
    for name, value in (("temperature", temperature), ("epsilon", epsilon), ("delta", delta)):
        checks.real(name, value)
        most = 1 if name == "epsilon" else checks.MOST
        if not 0 < value <= most:
            raise ValueError(f"{name} must be positive and at most {most:.8g}, got {value!r}")
    check = validate.ArgumentChecker("parents", parents)
    tree = checked(parents, check)
    batch, nodes = tree.shape
    target_logits = check.logits("target_logits", target_logits, "B, N, V")
    draft_tokens = checked_tokens(check, draft_tokens, tree)
    scale = scale_of(torch.full((batch, nodes), temperature, dtype=torch.float32, device=tree.device))
    probs = distributions(target_logits.double(), Sampling.plain(scale)).probs  # nan, and below nothing, if not valid
    entropy = torch.special.entr(probs).sum(-1)
    enough = (delta * torch.exp(-entropy)).clamp(max=epsilon)
    up, at = tree.clamp(min=0), draft_tokens.clamp(0, probs.shape[2] - 1)  # a GPU's ids are not checked
    prob = probs.gather(1, up[..., None].expand_as(probs)).gather(2, at[..., None])[..., 0]
    good = (tree >= 0) & (at == draft_tokens) & (prob > enough.gather(1, up))
    good[:, 0] = True
    for node in range(1, nodes):
        good[:, node] &= good.gather(1, up[:, node, None])[:, 0]
    depth = tree_positions(tree).long().masked_fill(~good, -1)
    last = depth.argmax(1)
    accepted = depth.gather(1, last[:, None])[:, 0]
    row = target_logits[torch.arange(batch, device=tree.device), last]
    nothing = torch.empty((batch, 0), dtype=torch.int64, device=tree.device)
    drawn = verify_chain(row[:, None], nothing, seed=seed, position=position, temperature=temperature, backend=backend)
    path = tree_paths(tree, nodes - 1)[torch.arange(batch, device=tree.device), last]
    index = torch.arange(nodes, device=tree.device)
    tokens = draft_tokens.gather(1, path.roll(-1, 1).clamp(min=0).long())
    tokens = torch.where(index < accepted[:, None], tokens, -1)
    tokens = torch.where(index == accepted[:, None], drawn.tokens, tokens)
    none = target_logits.new_empty((0,), dtype=torch.float32)
    return VerifiedTree(tokens, path, accepted.int(), drawn.valid, none, none)


typical_acceptance.lossless = False  # type: ignore[attr-defined]


class SyntheticAcceptance:
    """A target that accepts drafts at given rates, whatever they are: for load tests without a drafter that is good.

    **The text is not the target's.** In each step of a request so many of its drafts are accepted that the i-th is in
    ``rates[i]`` of all steps that have one, under every rule, where temperature times repetition penalty is at most
    1e28 (1,000 for float16); behind the last rate none is. Drafts must be chains. What a grammar or a bias of -inf
    forbids is rejected.

    Args:
        target: what scores the rows, at its own cost.
        rates: by index of the draft in its step, in [0, 1], none above the one before. (vLLM:
            ``synthetic_acceptance_rates``.)
        seed: of the steps' draws.

    Raises:
        ValueError: rates that are none, or rise.
    """

    lossless = False

    def __init__(self, target: Target, rates: Sequence[float], seed: int = 0) -> None:
        falls = all(after <= before for before, after in pairwise(rates))
        if not falls or not all(0 <= rate <= 1 for rate in rates):
            raise ValueError(f"rates must be in [0, 1], none above the one before, got {list(rates)}")
        self.target, self.rates = target, list(rates)
        self.device, self.vocab_size, self.stop_tokens = target.device, target.vocab_size, target.stop_tokens
        self.shares_ids = shares_ids(target)
        self._generator = torch.Generator().manual_seed(seed)

    def begin(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], feature_layers: Sequence[int] = ()
    ) -> _SyntheticSession:
        """As of :class:`specdec_kernels.decode.Target`."""
        session = self.target.begin(prompts, max_new_tokens, feature_layers)
        return _SyntheticSession(session, torch.tensor(self.rates), self._generator)


class _SyntheticSession:
    """One stream of a :class:`SyntheticAcceptance`."""

    def __init__(self, session: TargetSession, rates: Tensor, generator: torch.Generator) -> None:
        self._session, self._rates, self._generator = session, rates, generator
        self.features, self.max_rows, self.commit, self.select = (
            session.features, session.max_rows, session.commit, session.select
        )  # fmt: skip

    def score(self, tokens: Tensor, counts: Sequence[int]) -> Scores:
        """The target's rows, with the logit of each draft set in place."""
        scores, drafts = self._session.score(tokens, counts), tokens[:, 1:, None]
        index, real = torch.arange(drafts.shape[1]), torch.tensor(counts)[:, None] - 1
        uniform = torch.rand(len(counts), 1, generator=self._generator)
        accepted = index < (uniform < self._rates).sum(1, keepdim=True)
        # As large as the dtype has it, so that heat leaves nothing to the others; penalties may still enlarge it.
        certain = min(torch.finfo(scores.logits.dtype).max / 2, 1e30)
        logit = torch.where(accepted, certain, -torch.inf).to(scores.logits)[..., None]
        logit = torch.where((index < real).to(logit.device)[..., None], logit, scores.logits.gather(2, drafts))
        scores.logits.scatter_(2, drafts, logit)
        return scores

    def score_tree(self, tokens: Tensor, parents: Tensor) -> Scores:
        """Nothing of the kind.

        Raises:
            ValueError: always.
        """
        raise ValueError("SyntheticAcceptance takes chains of drafts, got a tree")

    def commit_path(self, paths: Sequence[Sequence[int]]) -> None:
        """Of no tree."""

    def join(self, other: _SyntheticSession) -> None:
        joinable(self._session).join(other._session)


class BlankTarget:
    """A target without a model: to it all ids are equally likely. For load tests of everything else.

    Args:
        vocab_size: columns of its logits.
        device, dtype: of its logits.
    """

    lossless = False
    stop_tokens: frozenset[int] = frozenset()

    def __init__(self, vocab_size: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.vocab_size, self.device, self._dtype = vocab_size, torch.device(device), dtype

    def begin(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], feature_layers: Sequence[int] = ()
    ) -> _BlankSession:
        """As of :class:`specdec_kernels.decode.Target`.

        Raises:
            ValueError: there are ``feature_layers``, which it has not.
        """
        if feature_layers:
            raise ValueError(f"feature_layers must be none of a BlankTarget, got {list(feature_layers)}")
        return _BlankSession(self.vocab_size, self.device, self._dtype)


class _BlankSession:
    """One stream of a :class:`BlankTarget`, which has no state."""

    features = None

    def __init__(self, vocab: int, device: torch.device, dtype: torch.dtype) -> None:
        self._row = torch.zeros(vocab, device=device, dtype=dtype)

    def max_rows(self) -> int:
        return sys.maxsize

    def score(self, tokens: Tensor, counts: Sequence[int]) -> Scores:
        return Scores(self._row.expand(*tokens.shape, -1).contiguous(), None)

    def score_tree(self, tokens: Tensor, parents: Tensor) -> Scores:
        return self.score(tokens, ())

    def commit(self, counts: Sequence[int]) -> None:
        pass

    def commit_path(self, paths: Sequence[Sequence[int]]) -> None:
        pass

    def select(self, slots: Sequence[int]) -> None:
        pass

    def join(self, other: _BlankSession) -> None:
        pass
