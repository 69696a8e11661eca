"""Verification inside SGLang 0.5.23, a plugin of ``sglang.srt.plugins`` that comes with this package; and its trees.

SGLang's trees are linked lists of nodes, and its results indices into the rows of a whole batch. The names are its own,
with their spelling.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from specdec_kernels import checks
from specdec_kernels.integrations.plugins import draft_rows, fits
from specdec_kernels.ops import validate, verify_chain
from specdec_kernels.ops.results import Verified, VerifiedTree
from specdec_kernels.ops.tree_rules import verify_tree
from specdec_kernels.ops.trees import tree_links

VERSIONS = ("0.5.23",)
"""The releases whose interface this was written against."""


class SGLangTree(NamedTuple):
    """A batch of trees; int64 [B, N], -1 where there is none."""

    retrive_index: Tensor
    """The row of each node among the B * N rows of the batch."""
    retrive_next_token: Tensor
    """First child of each node."""
    retrive_next_sibling: Tensor


class SGLangResults(NamedTuple):
    """What SGLang's verification of trees gives."""

    predict: Tensor
    """int32 [B * N]: at the row of each node that was kept, the token behind it; 0 elsewhere."""
    accept_index: Tensor
    """int32 [B, D]: the rows of the nodes that were kept, the root first, then -1."""
    accept_token_num: Tensor
    """int32 [B]: accepted drafts."""


def from_parents(parents: Tensor) -> SGLangTree:
    """Trees of this library as linked lists.

    Args:
        parents: int64 or int32 [B, N], as for :func:`specdec_kernels.verify_tree`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> import torch
        >>> tree = from_parents(torch.tensor([[-1, 0, 0, 1]]))
        >>> tree.retrive_next_token.tolist(), tree.retrive_next_sibling.tolist()
        ([[1, 3, -1, -1]], [[-1, 2, -1, -1]])
    """
    links = tree_links(parents)
    rows = torch.arange(parents.numel(), device=parents.device).reshape(parents.shape)
    return SGLangTree(rows, links.first_child.long(), links.next_sibling.long())


def to_parents(retrive_next_token: Tensor, retrive_next_sibling: Tensor) -> Tensor:
    """Linked lists as trees of this library.

    Args:
        retrive_next_token, retrive_next_sibling: int64 or int32 [B, N].

    Returns:
        int64 [B, N] as for :func:`specdec_kernels.verify_tree`, -1 for the root. A tree ends before its first node that
        hangs nowhere, with -1 from there on: without the nodes behind it fewer drafts are accepted, and the text is the
        same in distribution where it is verified by the target alone. A node's parent comes before the node, as SGLang
        has it.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> import torch
        >>> to_parents(torch.tensor([[1, 3, -1, -1]]), torch.tensor([[-1, 2, -1, -1]])).tolist()
        [[-1, 0, 0, 1]]
        >>> to_parents(torch.tensor([[1, 3, -1, -1]]), torch.tensor([[-1, -1, -1, -1]])).tolist()  # where is node 2?
        [[-1, 0, -1, -1]]
    """
    check = validate.ArgumentChecker("retrive_next_token", retrive_next_token)
    children = check.ids("retrive_next_token", retrive_next_token, "B, N")
    siblings = check.ids("retrive_next_sibling", retrive_next_sibling, "B, N")
    nodes = children.shape[1]
    before, node = _came_from(siblings), torch.arange(nodes, device=children.device)
    eldest = torch.where(before >= 0, before, node)
    for _ in range(nodes.bit_length()):  # each time twice as far back
        eldest = eldest.gather(1, eldest)
    parents = _came_from(children).gather(1, eldest)
    ended = (parents < 0).long().cumsum(1) > 1  # the root is the first that has none
    return parents.masked_fill(ended, -1)


def _came_from(links: Tensor) -> Tensor:
    """Of each node the one that links to it, int64 [B, N]; -1 where none does."""
    batch, nodes = links.shape
    found = links.new_full((batch, nodes + 1), -1, dtype=torch.int64)
    index = torch.arange(nodes, device=links.device).expand(batch, nodes)
    return found.scatter(1, links.long().where(links >= 0, nodes), index)[:, :nodes]


def results(verified: VerifiedTree, retrive_index: Tensor, depth: int) -> SGLangResults:
    """What :func:`specdec_kernels.verify_tree` gave, in SGLang's form.

    Args:
        verified: of a batch of trees of N nodes.
        retrive_index: int64 or int32 [B, N], as of :func:`from_parents`.
        depth: columns D of ``accept_index``: nodes of the longest path, the root among them, or more; at least 1.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    batch, nodes = verified.nodes.shape
    checks.whole("depth", depth, 1)
    check = validate.ArgumentChecker("nodes", verified.nodes, B=batch, N=nodes)
    rows = check.ids("retrive_index", retrive_index, "B, N").long()
    kept = verified.nodes >= 0
    index = rows.gather(1, verified.nodes.long().clamp(min=0)).masked_fill(~kept, -1)
    predict = torch.zeros(rows.numel() + 1, dtype=torch.int32, device=rows.device)
    predict[index.where(kept, rows.numel())] = verified.tokens.int()
    accept_index = functional.pad(index, (0, depth - nodes), value=-1)  # cut off where there are more
    return SGLangResults(predict[:-1], accept_index.int(), verified.num_accepted)


def register() -> None:
    """Hook the operators into SGLang, which calls this in each of its processes.

    With a release that is not one of :data:`VERSIONS`, or where only the PyTorch reference runs, nothing is changed,
    and a warning says so.
    """
    if not fits("sglang", VERSIONS):
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    dspark = "sglang.kernels.ops.speculative.dspark.blockwise_rejection"
    HookRegistry.register(f"{dspark}.blockwise_rejection_triton", blockwise_rejection, HookType.REPLACE)
    HookRegistry.register("sglang.srt.speculative.eagle_utils.eagle_sample", eagle_sample, HookType.AROUND)


def blockwise_rejection(
    *,
    candidates: Tensor,
    target_logits: Tensor,
    draft_logits: Tensor | None,
    target_temperatures: Tensor,
    draft_temperatures: Tensor,
    noise: Any,
    cutoff_verify_lens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``blockwise_rejection_triton`` of DSpark by :func:`specdec_kernels.verify_chain`, rule ``"token"``. SGLang passes
    it no filters, and does not call it where there is top-k or top-p.

    Args:
        candidates: ids [B, K+1]; the first is the last token of the text.
        target_logits: [B * (K+1), V].
        draft_logits: [at least B, at least K, Vd], before temperature; None for drafts that are argmaxes. Where Vd < V,
            what is outside has draft probability 0 and the target's mass there stays.
        target_temperatures, draft_temperatures: B numbers each.
        noise: SGLang's ``RejectionNoise``: the key of the server, and a counter on the device that each call advances.
        cutoff_verify_lens: [B]: candidates that may be kept, the first among them.

    Returns:
        Accepted drafts int32 [B]; the token behind them int64 [B]; accepted drafts that were cut off int32 [B].
    """
    batch, rows = candidates.shape
    target = target_logits.view(batch, rows, -1)
    drafts: dict[str, Any] = {}
    if draft_logits is not None:
        drafts = {
            **draft_rows(draft_logits[:batch, : rows - 1], target.shape[2]),
            "draft_temperature": draft_temperatures.reshape(-1).float(),
        }
    # Requests share the key and differ by their slot, which the position carries beside the step.
    slot = torch.arange(batch, device=candidates.device)
    verified = verify_chain(
        target,
        candidates[:, 1:],
        **drafts,
        seed=noise.key,
        position=noise.counter * (1 << 20) + slot,
        temperature=target_temperatures.reshape(-1).float(),
    )
    noise.counter.add_(1)
    accepted = verified.num_accepted
    kept = accepted if cutoff_verify_lens is None else torch.minimum(accepted, cutoff_verify_lens.to(accepted) - 1)
    # Where some were cut off, the first of them is the token behind.
    return kept, verified.tokens.gather(1, kept.long()[:, None])[:, 0], accepted - kept


def eagle_sample(
    original: Callable[..., tuple[Tensor, Tensor, Tensor]],
    verify_input: Any,
    batch: Any,
    logits_output: Any,
    grammar_mask: Any = None,
    uno_target_max_top_k: int | None = None,
    *,
    watermark_state: Any = None,
    watermark_full_mask: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """``eagle_sample`` from logits: no softmax, no renormalisation, no rows of zeros.

    Chains under ``--speculative-use-rejection-sampling`` by :func:`specdec_kernels.verify_chain`; other trees, which
    SGLang verifies by the target alone, by rule ``"walk"`` of :func:`specdec_kernels.verify_tree`. ``min_p`` is
    honoured, which SGLang's own drops here. Requests with seeds have noise of their own; others draw a seed each.

    What this does not do stays with ``original``, SGLang's own: all requests greedy, watermarks, simulated acceptance,
    acceptance thresholds below 1 (which change the distribution), UNO's sparse sampling.

    Args:
        original: SGLang's own.
        verify_input, batch, logits_output, grammar_mask, uno_target_max_top_k, watermark_state, watermark_full_mask: as
            SGLang's.

    Returns:
        ``predict`` int32 [B * N], ``accept_lens`` int32 [B], ``accept_index`` int32 [B, D], as SGLang's.
    """
    from sglang.srt.runtime_context import get_spec

    info, spec = batch.sampling_info, get_spec()
    if _is_sglangs(batch, spec, uno_target_max_top_k, watermark_state):
        return original(
            verify_input, batch, logits_output, grammar_mask, uno_target_max_top_k, watermark_state=watermark_state,
            watermark_full_mask=watermark_full_mask,
        )  # fmt: skip
    logits = _adjusted(logits_output.next_token_logits, verify_input.draft_token_num, info, grammar_mask)
    size, nodes = len(batch.seq_lens), verify_input.draft_token_num
    rows, candidates = logits.view(size, nodes, -1), verify_input.draft_token.view(size, nodes)
    seeds = info.sampling_seed
    settings: dict[str, Any] = {
        "seed": torch.randint(2**63 - 1, (size,), device=rows.device) if seeds is None else seeds.long(),
        "position": batch.seq_lens.long(),
        "temperature": info.temperatures.reshape(-1).float(),
        "top_k": info.top_ks if info.need_top_k_sampling else None,
        "top_p": info.top_ps if info.need_top_p_sampling else None,
        "min_p": info.min_ps if info.need_min_p_sampling else None,
    }
    if spec.speculative_use_rejection_sampling:
        probs = verify_input.draft_probs
        if probs is None or probs.shape[-1] != rows.shape[-1]:
            raise ValueError(
                f"draft_probs must be float32 [B, K, V] with V = {rows.shape[-1]} for rejection sampling, got "
                f"{checks.describe(probs)}"
            )
        normalised = probs.new_tensor([1.0, -torch.inf, 0.0]).expand(*probs.shape[:2], 3)
        rule = "block" if spec.speculative_use_block_verification else "token"
        chain = verify_chain(rows, candidates[:, 1:], probs.log(), normalised, rule=rule, **settings)  # type: ignore[arg-type]
        verified = _as_path(chain)
    else:
        parents = to_parents(verify_input.retrieve_next_token, verify_input.retrieve_next_sibling)
        verified = verify_tree(rows, candidates, parents, rule="walk", **settings)
    found = results(verified, verify_input.retrieve_index, verify_input.max_tree_depth)
    _from_first_rank(found)
    return found.predict, found.accept_token_num + 1, found.accept_index


def _is_sglangs(batch: Any, spec: Any, max_top_k: int | None, watermark_state: Any) -> bool:
    """Whether SGLang's own ``eagle_sample`` has to do it."""
    from sglang.srt.speculative import eagle_utils, spec_utils

    info = batch.sampling_info
    return bool(
        batch.forward_mode.is_idle()
        or spec_utils.SIMULATE_ACC_LEN > 0
        or (watermark_state is not None and info.has_watermark_candidates)
        or eagle_utils._verify_uses_greedy(
            is_all_greedy=info.is_all_greedy,
            is_cpu=eagle_utils._is_cpu,
            is_hip=eagle_utils._is_hip,
            is_xpu=eagle_utils._is_xpu,
            use_rejection_sampling=spec.speculative_use_rejection_sampling,
        )
        or eagle_utils._can_use_sparse_uno_tree_target_sampling(max_top_k, info)
        or (
            not spec.speculative_use_rejection_sampling
            and (spec.speculative_accept_threshold_single < 1 or spec.speculative_accept_threshold_acc < 1)
        )
    )


def _adjusted(logits: Tensor, nodes: int, info: Any, grammar_mask: Any) -> Tensor:
    """The rows with what SGLang adds to them, in place: log-probabilities are read from them afterwards."""
    from sglang.srt.sampling.penaltylib.repetition_penalty import apply_scaling_penalties
    from sglang.srt.utils.async_probe import sanitize_nan_logits

    sanitize_nan_logits(logits, "verify: target model logits")
    of_nodes = functools.partial(torch.repeat_interleave, repeats=nodes, dim=0)
    if info.acc_additive_penalties is not None:
        logits.add_(of_nodes(info.acc_additive_penalties))
    if info.acc_scaling_penalties is not None:
        apply_scaling_penalties(logits, of_nodes(info.acc_scaling_penalties))
    if info.logit_bias is not None:
        logits.add_(of_nodes(info.logit_bias))
    if grammar_mask is not None:
        grammar_mask.apply(logits)
    return logits


def _as_path(chain: Verified) -> VerifiedTree:
    """A verified chain as the tree of which each node has one child."""
    slots = torch.arange(chain.tokens.shape[1], dtype=torch.int32, device=chain.tokens.device)
    nodes = slots.where(slots <= chain.num_accepted[:, None], -1)
    return VerifiedTree(chain.tokens, nodes, chain.num_accepted, chain.valid, chain.logprobs, chain.raw_logprobs)


def _from_first_rank(found: SGLangResults) -> None:
    """Ranks that share a model go on with the same tokens: their logits may differ in a last bit."""
    from sglang.srt.layers.dp_attention import is_dp_attention_enabled
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    group = parallel.attn_tp_group if is_dp_attention_enabled() else parallel.tp_group
    if group.world_size > 1:
        for result in found:
            group.broadcast(result, src=0)
