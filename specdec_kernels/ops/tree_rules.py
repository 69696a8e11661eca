"""Trees of drafts: drawing the children of a node, and verifying a whole tree."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from specdec_kernels import checks
from specdec_kernels.contract import MAX_ROWS, Children, TreeRule, numbers_of
from specdec_kernels.ops import processing, validate
from specdec_kernels.ops.backends import BackendName, call, try_fast_path
from specdec_kernels.ops.draft_vocabulary import DraftVocabulary
from specdec_kernels.ops.processing import NO_ADJUSTMENTS, LogitBias, Penalties
from specdec_kernels.ops.results import DrawnChildren, VerifiedTree
from specdec_kernels.ops.trees import checked

TreeRuleName = Literal["walk", "recursive", "traversal", "coupled"]
ChildrenName = Literal["top", "iid", "without_replacement", "race"]
SiblingsName = Literal["iid", "without_replacement"]

_RULES, _CHILDREN = numbers_of(TreeRule), numbers_of(Children)
CHILDREN: tuple[ChildrenName, ...] = get_args(ChildrenName)
#: Whether they were drawn with replacement.
SIBLINGS = {"iid": True, "without_replacement": False}


def sample_children(
    logits: Tensor,
    count: int,
    method: ChildrenName = "without_replacement",
    *,
    seed: Tensor | int,
    position: Tensor | int,
    row: Tensor | int = 0,
    temperature: Tensor | float = 1.0,
    top_k: Tensor | int | None = None,
    top_p: Tensor | float | None = None,
    min_p: Tensor | float | None = None,
    bitmask: Tensor | None = None,
    penalties: Penalties | None = None,
    logit_bias: LogitBias | None = None,
    draft_to_target: DraftVocabulary | None = None,
    backend: BackendName | None = None,
) -> DrawnChildren:
    """Choose the children of one node of a tree from each row of logits, and hand over what verification needs.

    ===========================  ====================================================================================
    ``"top"``                    the largest logits that the filters keep, in falling order, lower id on ties. Point
                                 masses: verify them without ``draft_logits``, by ``"walk"``
    ``"iid"``                    ``count`` draws, the same id perhaps more than once
    ``"without_replacement"``    draws from what earlier siblings left
    ``"race"``                   the first arrivals of the race that the target will hold: verify by ``"coupled"``
    ===========================  ====================================================================================

    Draw j of "iid" and "without_replacement" is the two-level race of :func:`sample` with row ``row + j``. A
    distribution gives no more children once what is left of it is below 2^-60.

    Args:
        logits: float32, bfloat16 or float16 [R, V]; any row stride; not changed.
        count: children wanted, at least 1.
        method: see above.
        seed, position: int64 [R] or int, as in :func:`sample`.
        row: int64 [R] or int: the index of the first child among the drafts of the step, that is its node minus 1, for
            "iid" and "without_replacement"; for "race" the depth of the node in the tree.
        temperature, top_k, top_p, min_p, bitmask, penalties, logit_bias, draft_to_target, backend: as in
            :func:`sample`. At temperature 0 there is one child.

    Returns:
        :class:`DrawnChildren`. A row with a nan, a +inf or no finite logit gives its largest finite logit (0 if there
        is none) as its one child, logprobs nan and stats nan.

    Equivalent to, in distribution and without filters::

        probs = torch.softmax(logits / temperature, -1)
        top = probs.topk(count).indices
        iid = torch.multinomial(probs, count, replacement=True)
        without_replacement = torch.multinomial(probs, count)

    Example:
        >>> import torch
        >>> sample_children(torch.tensor([[0.0, 9.0, 5.0]]), 2, "top", seed=1, position=7).tokens.tolist()
        [[1, 2]]

    Source: draws without replacement, Jeon et al., arXiv:2402.14160; races, Daliri et al., arXiv:2408.07978.
    """
    number = checks.choice("method", method, _CHILDREN)
    checks.whole("count", count, 1, MAX_ROWS)
    return processing.draw(
        DrawnChildren, logits, draft_to_target, (seed, position, row), (temperature, top_k, top_p, min_p), bitmask,
        penalties, logit_bias, backend, count, number,
    )  # fmt: skip


def verify_tree(
    target_logits: Tensor,
    draft_tokens: Tensor,
    parents: Tensor,
    draft_logits: Tensor | None = None,
    draft_stats: Tensor | None = None,
    *,
    seed: Tensor | int,
    position: Tensor | int,
    draft_temperature: Tensor | float | None = None,
    draft_to_target: Tensor | DraftVocabulary | None = None,
    siblings: SiblingsName | None = None,
    temperature: Tensor | float = 1.0,
    top_k: Tensor | int | None = None,
    top_p: Tensor | float | None = None,
    min_p: Tensor | float | None = None,
    bitmask: Tensor | None = None,
    penalties: Penalties | None = None,
    logit_bias: LogitBias | None = None,
    rule: TreeRuleName = "walk",
    logprobs: bool = False,
    backend: BackendName | None = None,
) -> VerifiedTree:
    """Decide which path of a tree to keep and draw the next token: the text has exactly the target's distribution.

    ``"walk"`` draws from the target at the root and goes down to the child that was drawn, as long as there is one:
    exact for any children, and the best there is for those that were drawn from nothing (``method="top"``, n-grams).

    ``"recursive"`` tests the children of a node in turn, each against what its rejected siblings left of the target;
    draws from what the last one left. On a chain it is rule ``"token"`` of :func:`verify_chain`, bit for bit.

    ``"traversal"`` goes bottom-up: a node's children first, then the node itself, by a chance that takes all of them
    into account. On a chain it is rule ``"block"``, bit for bit.

    ``"coupled"`` walks with the noise of the absolute position: the text is a function of seed and target logits, the
    same with any tree or none. Children of ``method="race"`` are met most often.

    Rows of nodes that are not visited are not read. Ids and ``parents`` are checked on the CPU; elsewhere, as looking
    would synchronise, an id out of range is never accepted and a parent that is no earlier node ends the tree.

    Args:
        target_logits: float32, bfloat16 or float16 [B, N, V]; row n is the target's after the path to node n.
        draft_tokens: int64 or int32 [B, N]; of the root it is the last token of the text, and not looked at.
        parents: int64 or int32 [B, N]: -1 for node 0, the root; an earlier node for every other; -1 behind the last.
            The children of a node are tested in the order of their indices, which must be the order they were drawn in.
        draft_logits: logits [B, N, V]; row n is what the children of node n were drawn from. ``None``: point masses.
            With them comes one of the next two, and ``siblings``; "walk" and "coupled" read none of the four.
        draft_stats: float32 [B, N, 3], as :func:`sample_children` gave them.
        draft_temperature, draft_to_target: as in :func:`verify_chain`; with the latter ``draft_logits`` are [B, N, Vd].
        siblings: how the children of a node were drawn, "without_replacement" or "iid". Children of ``"top"`` were not
            drawn: hand them over without ``draft_logits``.
        position: int64 [B] or int. Tokens of the request before this step, the root among them; grows with every step.
        bitmask: int32 [B, N, ceil(V/32)]: the ids allowed after each node.
        penalties: see :class:`Penalties`; row n counts the drafts on the path to node n as output.
        rule: see above.
        seed, temperature, top_k, top_p, min_p, logit_bias, logprobs, backend: as in :func:`verify_chain`.

    Returns:
        :class:`VerifiedTree`. A node whose target row has a nan, a +inf or no finite logit is the end of its path: none
        of its children is accepted, the largest finite logit is emitted there (0 if there is none), ``valid`` is False.
        A draft row that is not usable ends a path as well, with a draw from the target's row. Other requests are
        bitwise unchanged.

    Equivalent to, for one request and rule ``"walk"``::

        node = 0
        while True:
            token = torch.multinomial(torch.softmax(target_logits[node] / temperature, -1), 1)
            following = [c for c in range(N) if parents[c] == node and draft_tokens[c] == token]
            if not following:
                return token
            node = following[0]

    Example:
        >>> import torch
        >>> target = torch.eye(4)[[1, 2, 3]][None] * 50
        >>> tokens, parents = torch.tensor([[0, 3, 1]]), torch.tensor([[-1, 0, 0]])
        >>> verify_tree(target, tokens, parents, seed=1, position=7).tokens.tolist()
        [[1, 3, -1]]

    Source: recursive, Miao et al., arXiv:2305.09781, and Jeon et al., arXiv:2402.14160; traversal, Weng et al.,
    arXiv:2505.12398; coupled, Daliri et al., arXiv:2408.07978.
    """
    number = checks.choice("rule", rule, _RULES)
    replacement = siblings is not None and checks.choice("siblings", siblings, SIBLINGS)
    reads = rule not in ("walk", "coupled")
    drafts = processing.drafts(target_logits, draft_logits, draft_stats, draft_temperature, draft_to_target, reads)
    if reads and siblings is None and draft_logits is not None:
        raise ValueError(
            f"siblings must be one of {sorted(SIBLINGS)} with draft_logits, got None: how children were drawn cannot "
            "be guessed, and top-k children handed over as drawn ones are the usual mistake (these go without "
            "draft_logits)"
        )
    keys, read = validate.per_request("B", draft_tokens, (seed, position), temperature, top_k, top_p, min_p)
    own = number, replacement, logprobs
    if penalties is None and logit_bias is None:
        given = (target_logits, draft_tokens, parents, *drafts, *keys, *read, bitmask, *NO_ADJUSTMENTS, *own)
        if (verified := try_fast_path(VerifiedTree, backend, given)) is not None:
            return verified
    checks.flags(logprobs=logprobs)
    check = validate.ArgumentChecker("target_logits", target_logits)
    tree = checked(parents, check)
    if tree.shape[1] > MAX_ROWS:
        raise ValueError(f"parents must have at most {MAX_ROWS} nodes, got {checks.describe(tree)}")
    target_logits = check.logits("target_logits", target_logits, "B, N, V")
    tokens = checked_tokens(check, draft_tokens, tree)
    drafts = processing.checked_drafts(check, "B, N", drafts)
    keys = tuple(map(check.integers, ("seed", "position"), keys))
    read = processing.distribution(check, "B, N", read, bitmask, penalties, logit_bias, tokens)
    return call(VerifiedTree, backend, (target_logits, tokens, tree, *drafts, *keys, *read, *own))


def checked_tokens(check: validate.ArgumentChecker, tokens: object, tree: Tensor) -> Tensor:
    """On the CPU, where looking is free, a node's id outside [0, V) is an error; elsewhere it is never accepted."""
    ids, vocab = check.ids("draft_tokens", tokens, "B, N").long(), check.sizes["V"]
    validate.within("draft_tokens", ids.masked_fill(tree < 0, 0), 0, vocab - 1, f"in [0, {vocab})")
    return ids
