"""The public functional API: documentation, validation, and the choice of a backend."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from specdec_kernels import checks
from specdec_kernels.contract import MAX_ROWS, Rule, numbers_of
from specdec_kernels.ops import processing, validate
from specdec_kernels.ops.backends import BACKENDS, BackendName, call, function, try_fast_path
from specdec_kernels.ops.draft_vocabulary import DraftVocabulary
from specdec_kernels.ops.processing import NO_ADJUSTMENTS, LogitBias, Penalties
from specdec_kernels.ops.results import Sample, Verified
from specdec_kernels.ops.token_counts import TokenCounts
from specdec_kernels.reference.verify import check_ids
from specdec_kernels.workspace import ALIGNMENT, verify_chain_workspace

__all__ = [
    "BACKENDS", "BackendName", "DraftVocabulary", "LogitBias", "Penalties", "RuleName", "TokenCounts", "noise_words",
    "sample", "verify_chain",
]  # fmt: skip

RuleName = Literal["token", "block", "coupled"]

_RULES = numbers_of(Rule)


def sample(
    logits: Tensor,
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
    coupled: bool = False,
    draft_to_target: DraftVocabulary | None = None,
    backend: BackendName | None = None,
) -> Sample:
    """Draw one token from each row of logits, and hand over the scalars that verification needs.

    The draw is an exponential race (Gumbel-max) in two levels, tiles of 128 ids and ids inside the tile, so that it
    costs one exponential per 128 tokens; it is exact, and the same in every backend, batch slot and launch shape.

    The order is: bias, penalties, mask, temperature, top-k, top-p, min-p, as in transformers; vLLM has min-p before
    top-k, which makes a difference where top-p is on too. Top-k keeps what is not below the k-th largest logit. Top-p
    keeps an id when the ids with larger logits hold less than ``top_p`` of what top-k left. Min-p keeps an id when its
    probability is at least ``min_p`` of the largest one. Ids with equal logits stay or go together, in all three.

    Args:
        logits: float32, bfloat16 or float16 [R, V]; any row stride; not changed.
        seed: int64 [R] or int. One per request.
        position: int64 [R] or int. Tokens of the request before this step, in tokens.
        row: int64 [R] or int, in [0, 65536). Index of the drafted token in its step.
        temperature: float32 [R] or float, at least 0. 0 (and below 1e-5) is greedy: the largest logit, lowest id on
            ties, whatever the filters.
        top_k: int64 or int32 [R] or int, at least 1; None, 0 and whatever is not below V are off.
        top_p: float32 [R] or float, in (0, 1]; None or 1 is off.
        min_p: float32 [R] or float, in [0, 1]; None or 0 is off.
        bitmask: int32 [R, ceil(V/32)]: bit ``v % 32`` of word ``v // 32`` is set where id v is allowed (as xgrammar's).
        penalties, logit_bias: see :class:`Penalties` and :class:`LogitBias`, with R requests.
        coupled: draw with the noise of the absolute position ``position + row``, the draft side of
            ``verify_chain(rule="coupled")``; it must not be used with the other rules.
        draft_to_target: the logits are [R, Vd], of a drafter with fewer ids than its target. Tokens, ``bitmask``
            and whatever else names ids are the target's; so is the noise, which two rows that are ``coupled`` share.
            Where they are not, ``draft_to_target[tokens]`` of a call without is a draw from the same distribution.
        backend: ``None`` follows the device; a name forces that backend.

    Returns:
        :class:`Sample`. A row with a nan, a +inf or no finite logit gives its largest finite logit (0 if there is
        none), logprob nan and stats nan.

    Equivalent to::

        scores = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(top_k)(None, logits.float() / temperature))
        probs = torch.softmax(scores, -1)
        tokens = torch.multinomial(probs, 1)[:, 0]          # in distribution; the noise is docs/noise.md's
        logprobs = probs.gather(-1, tokens[:, None])[:, 0].log()

    Example:
        >>> drawn = sample(torch.tensor([[0.0, 9.0, 0.0]]), seed=1, position=7, temperature=0.0)
        >>> drawn.tokens.tolist()
        [1]

    Source: two-level race, docs/noise.md; races and Gumbel-max, Maddison et al., arXiv:1411.0030; top-k, Fan et al.,
    arXiv:1805.04833; top-p, Holtzman et al., arXiv:1904.09751; min-p, Nguyen et al., arXiv:2407.01082; coupling, Daliri
    et al., arXiv:2408.07978.
    """
    checks.flags(coupled=coupled)
    return processing.draw(
        Sample, logits, draft_to_target, (seed, position, row), (temperature, top_k, top_p, min_p), bitmask,
        penalties, logit_bias, backend, coupled,
    )  # fmt: skip


def verify_chain(
    target_logits: Tensor,
    draft_tokens: Tensor,
    draft_logits: Tensor | None = None,
    draft_stats: Tensor | None = None,
    *,
    seed: Tensor | int,
    position: Tensor | int,
    draft_temperature: Tensor | float | None = None,
    draft_to_target: Tensor | DraftVocabulary | None = None,
    num_draft: Tensor | None = None,
    cu_rows: Tensor | None = None,
    temperature: Tensor | float = 1.0,
    top_k: Tensor | int | None = None,
    top_p: Tensor | float | None = None,
    min_p: Tensor | float | None = None,
    bitmask: Tensor | None = None,
    penalties: Penalties | None = None,
    logit_bias: LogitBias | None = None,
    rule: RuleName = "token",
    logprobs: bool = False,
    count_independent: bool = False,
    workspace: Tensor | None = None,
    backend: BackendName | None = None,
) -> Verified:
    """Decide how many drafts to keep and draw the next token: the text has exactly the target's distribution.

    ``"token"``: draft ``x`` of row i is accepted iff ``uniform * draft(x) < target(x)``. At the first rejection a token
    is drawn from the residual ``(target - draft)+``; after K acceptances from target row K (the bonus). Rows after the
    first rejection are not read, and with ``draft_stats`` no draft row is but the rejected one.

    ``"block"`` judges the drafts together and never accepts fewer in expectation: a later good token rescues an earlier
    poor one. It reads all target rows, and the draft rows behind the kept prefix.

    ``"coupled"`` accepts a draft iff it is what the target draws with the same noise: the text is a function of seed
    and target logits, the same with any drafter, any K, or none. Drafts of ``sample(coupled=True)`` are accepted most.

    Ids and ``cu_rows`` are checked on the CPU; elsewhere, as looking would synchronise, a wrong id ends the draft.

    Args:
        target_logits: float32, bfloat16 or float16 [B, K+1, V]; row i is the target's after i drafts. With ``cu_rows``
            [N, V], the rows of all requests one after the other.
        draft_tokens: int64 or int32 [B, K]. -1 ends a request's draft.
        draft_logits: logits [B, K, V] the drafts were drawn from. ``None``: each draft is a point mass (n-gram,
            argmax). With them comes one of the next two; rule ``"coupled"`` reads none of the three.
        draft_stats: float32 [B, K, 3], as :func:`sample` gave them: the drafts were drawn with those scalars, which
            carry the draft's own temperature and filters.
        draft_temperature: float32 [B] or float, at least 0: the drafts were drawn from ``softmax(draft_logits /
            draft_temperature)``, without filters; 0 (and below 1e-5) is greedy: each is a point mass.
        draft_to_target: ``draft_logits`` are [B, K, Vd], of a drafter with fewer ids than the target: see
            :class:`DraftVocabulary`. An int64 or int32 tensor [Vd] of target ids is checked and inverted in every
            call, for which a GPU is waited for. ``draft_tokens`` are ids of the target.
        seed: int64 [B] or int. One per request.
        position: int64 [B] or int. Tokens of the request before this step; it must grow with every step.
        num_draft: int64 or int32 [B], or None for K. Drafts beyond it are not looked at.
        cu_rows: int64 or int32 [B+1], ascending from 0: request b has rows ``cu_rows[b]`` to ``cu_rows[b+1]``, at least
            one, and one draft fewer.
        temperature, top_k, top_p, min_p: of the target, one for all or [B]; as in :func:`sample`.
        bitmask: int32 [B, K+1, ceil(V/32)], or [N, ceil(V/32)] with ``cu_rows``: the ids allowed in each row, the bonus
            row included; layout as in :func:`sample`.
        penalties: see :class:`Penalties`; row i counts the i drafts before it as output.
        logit_bias: see :class:`LogitBias`.
        rule: ``"token"``, ``"block"`` or ``"coupled"``.
        logprobs: also return the log-probabilities of the tokens. The raw ones cost a pass over each emitted row.
        count_independent: also count the drafts that would be accepted each by itself; reads every row. Not with
            ``"block"``, where a draft is not judged by itself.
        workspace: uint8 [bytes], zeroed once, of at least :func:`verify_chain_workspace` bytes: scratch, which is
            allocated otherwise. It is left as the next call expects it.
        backend: ``None`` follows the device; a name forces that backend.

    Returns:
        :class:`Verified`. A target row that has a nan, a +inf or no finite logit stops its request there: nothing more
        is accepted, the largest finite logit is emitted (0 if there is none), ``valid`` is False. A draft row that is
        not usable stops it as well, with a draw from the target's row. Other requests are bitwise unchanged.

    Equivalent to, for one request and rule ``"token"``::

        target = torch.softmax(target_logits / temperature, -1)
        draft = torch.softmax(draft_logits / draft_temperature, -1)
        for i, x in enumerate(draft_tokens):
            if not torch.rand(()) * draft[i, x] < target[i, x]:
                return [*draft_tokens[:i], torch.multinomial((target[i] - draft[i]).clamp(min=0), 1)]
        return [*draft_tokens, torch.multinomial(target[-1], 1)]

    Example:
        >>> target = torch.eye(4)[[1, 2, 3]][None] * 50
        >>> verify_chain(target, torch.tensor([[1, 0]]), seed=1, position=7).tokens.tolist()
        [[1, 2, -1]]

    Source: token, Leviathan et al., arXiv:2211.17192, algorithm 1, and Chen et al., arXiv:2302.01318, algorithm 2;
    block, Sun et al., arXiv:2403.10444, algorithm 2; coupled, Daliri et al., arXiv:2408.07978.
    """
    own = checks.choice("rule", rule, _RULES), logprobs, count_independent
    if count_independent and rule == "block":
        raise ValueError("count_independent must be False with rule='block', where no draft is judged alone, got True")
    reads = rule != "coupled"
    drafts = processing.drafts(target_logits, draft_logits, draft_stats, draft_temperature, draft_to_target, reads)
    keys, read = validate.per_request("B", draft_tokens, (seed, position), temperature, top_k, top_p, min_p)
    if penalties is None and logit_bias is None:
        given = (
            target_logits, draft_tokens, *drafts, *keys, num_draft, cu_rows, *read, bitmask, *NO_ADJUSTMENTS, *own,
            workspace,
        )  # fmt: skip
        if (verified := try_fast_path(Verified, backend, given)) is not None:
            return verified
    checks.flags(logprobs=logprobs, count_independent=count_independent)
    check = validate.ArgumentChecker("target_logits", target_logits)
    draft_tokens = check.ids("draft_tokens", draft_tokens, "B, K")
    longest = draft_tokens.shape[1]
    if longest >= MAX_ROWS:
        raise ValueError(f"draft_tokens must have fewer than {MAX_ROWS} drafts, got {checks.describe(draft_tokens)}")
    check.sizes["K+1"] = longest + 1
    rows = "B, K+1" if cu_rows is None else "N"
    target_logits = check.logits("target_logits", target_logits, f"{rows}, V")
    if cu_rows is not None:
        cu_rows = _row_offsets(check, cu_rows)
    drafts = processing.checked_drafts(check, "B, K", drafts)
    keys = tuple(map(check.integers, ("seed", "position"), keys))
    num_draft = check.optional("num_draft", num_draft, validate.ID_DTYPES, "B")
    read = processing.distribution(check, rows, read, bitmask, penalties, logit_bias, draft_tokens)
    if workspace is not None:
        workspace = _checked_workspace(check, workspace, longest)
    arguments = (target_logits, draft_tokens, *drafts, *keys, num_draft, cu_rows, *read, *own, workspace)
    try:
        return call(Verified, backend, arguments)
    except RuntimeError:  # C++ cannot raise a ValueError across the stable ABI
        if target_logits.is_cpu:
            check_ids(draft_tokens, num_draft, cu_rows, check.sizes["V"])
        raise


def _row_offsets(check: validate.ArgumentChecker, value: object) -> Tensor:
    """Where the rows of each request begin and end: int64 [B+1], 1 to K + 1 rows each."""
    check.sizes["B+1"], rows, most = check.sizes["B"] + 1, check.sizes["N"], check.sizes["K+1"]
    offsets = check.ids("cu_rows", value, "B+1").long()
    if validate.readable(offsets):
        counts = offsets.diff()
        if not (offsets[0] == 0 and offsets[-1] <= rows and (counts >= 1).all() and (counts <= most).all()):
            raise ValueError(
                f"cu_rows must ascend from 0 to at most {rows} in steps of 1 to {most}, got {offsets.tolist()}"
            )
    return offsets


def _checked_workspace(check: validate.ArgumentChecker, workspace: object, num_draft: int) -> Tensor:
    """A workspace that is large enough."""
    given = check.tensor("workspace", workspace, (torch.uint8,), "bytes")
    size = verify_chain_workspace(check.sizes["B"], num_draft, check.sizes["V"])
    if given.shape[0] < size:
        raise ValueError(f"workspace must have at least {size} bytes, got {checks.describe(given)}")
    if not torch.compiler.is_compiling() and (not given.is_contiguous() or given.storage_offset() % ALIGNMENT):
        raise ValueError(
            f"workspace must be contiguous from a multiple of {ALIGNMENT} bytes on, got strides "
            f"{list(given.stride())} from {given.storage_offset()} on"
        )
    return given


def noise_words(
    seed: Tensor, position: Tensor, tag: int, *, first: int = 0, counters: int = 1, backend: BackendName | None = None
) -> Tensor:
    """The raw words of the noise contract (docs/noise.md), to hold an integration against its known-answer vectors.

    Args:
        seed, position: int64 [R].
        tag: last word of the Philox counter, ``purpose | level << 8 | row << 16``, in [0, 2^32).
        first: index of the first counter, in [0, 2^32).
        counters: how many counters.
        backend: as everywhere.

    Returns:
        int64 [R, 4 * counters], each in [0, 2^32).

    Source: Philox4x32-10, Salmon et al., SC 2011.
    """
    check = validate.ArgumentChecker("seed", seed, "R")
    seed = check.tensor("seed", seed, (torch.int64,), "R").contiguous()
    position = check.integers("position", position)
    for name, value in (("tag", tag), ("first", first), ("counters", counters)):
        checks.whole(name, value, 0, 1 << 32)
    words: Tensor = function("noise_words", backend, seed.device)(seed, position, tag, first, counters)
    return words
