"""Speculative decoding of batches inside transformers: ``model.generate(..., custom_generate=generate)``."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from specdec_kernels import checks
from specdec_kernels.extras import brought_by

with brought_by("decode"):
    from transformers import GenerationMixin
    from transformers.generation import GenerateDecoderOnlyOutput, GenerateEncoderDecoderOutput, GenerationMode
    from transformers.generation import logits_process as processors
    from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
    from transformers.generation.utils import is_deepspeed_zero3_enabled, is_fsdp_managed_module

from specdec_kernels.decode import Drafter, SourcePrompt, Statistics, TransformersTarget, stream
from specdec_kernels.decode.drafters import AdaptiveDrafter, ModelDrafter, NGramDrafter, RowCosts
from specdec_kernels.decode.model_facts import is_encoder_decoder, vocab_size
from specdec_kernels.decode.requests import packed_mask
from specdec_kernels.integrations.recording import RecordingTarget
from specdec_kernels.ops import RuleName

#: Processors that only forbid ids: what they leave finite of a row of zeros is allowed.
_MASKS: tuple[type, ...] = (
    processors.ForcedBOSTokenLogitsProcessor,
    processors.ForcedEOSTokenLogitsProcessor,
    processors.MinLengthLogitsProcessor,
    processors.MinNewTokensLengthLogitsProcessor,
    processors.NoBadWordsLogitsProcessor,
    processors.NoRepeatNGramLogitsProcessor,
    processors.PrefixConstrainedLogitsProcessor,
    processors.SuppressTokensAtBeginLogitsProcessor,
    processors.SuppressTokensLogitsProcessor,
)

#: Processors that are parameters of the operators, in the order in which these apply them.
_PARAMETERS: tuple[type, ...] = (
    processors.SequenceBiasLogitsProcessor,
    processors.RepetitionPenaltyLogitsProcessor,
    processors.TemperatureLogitsWarper,
    processors.TopKLogitsWarper,
    processors.TopPLogitsWarper,
    processors.MinPLogitsWarper,
    processors.LogitNormalization,
)
_FIRST_FILTER = _PARAMETERS.index(processors.TopKLogitsWarper)

#: What another row takes of the time of a pass over one, on a CPU, by which lookups are kept to what pays. SmolLM2 in
#: bfloat16, one thread: 50 ms over one row of one request, 59 over nine; 63 over four of four requests, 117 over 36.
_ROW = 1 / 35

_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION)

#: Options that ask for what the loop does not have.
_REFUSED = (
    "output_attentions",
    "output_hidden_states",
    "use_mtp",
    "assistant_early_exit",
    "speculation_type",
    "assistant_ensemble_weight",
)

#: What ``generate`` prepares for the model's passes. The loop makes its own: of the same prompts, with its own cache.
_PREPARED = ("attention_mask", "position_ids", "past_key_values", "cache_params", "use_cache", "logits_to_keep")

#: The same of an encoder-decoder, whose mask is that of the sources.
_PREPARED_WITH_SOURCES = ("attention_mask", "encoder_outputs", "past_key_values", "use_cache")

#: Models that hear all of a source, whatever their ``attention_mask`` says of it.
_WITHOUT_SOURCE_MASK = ("whisper",)


def generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Sequence[Any],
    stopping_criteria: Sequence[Any],
    generation_config: Any,
    *,
    drafter: Drafter | None = None,
    num_draft: int | None = None,
    rule: RuleName = "token",
    seeds: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    statistics: Statistics | None = None,
    inputs_tensor: Tensor | None = None,
    assistant_model: Any = None,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Decode a batch speculatively; for ``custom_generate=``, with arguments of ``model.generate`` beside its own.

    A greedy text is that of plain ``generate``, up to rounding; a drawn one has the same distribution. Batches may be
    padded on the left, the sources of an encoder-decoder on the right, and of several ``num_return_sequences``. The
    loop has its own cache, so ``use_cache`` and ``cache_implementation`` change nothing.

    Args:
        model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs: as transformers prepares
            them.
        drafter: see :mod:`specdec_kernels.decode.drafters`; ``None`` draws drafts from ``assistant_model=``, or looks
            them up in what was written before (``prompt_lookup_num_tokens=``); on a CPU as many as should pay, by what
            the texts accepted so far and how many there are.
        num_draft: drafts a step at most; ``None`` is ``prompt_lookup_num_tokens``, else 4.
        rule: of :func:`specdec_kernels.verify_chain`.
        seeds: one for each sequence that is returned, in [-2^63, 2^63); ``None`` draws them.
        generator: what seeds are drawn from; ``None`` is PyTorch's own on the CPU, so that ``torch.manual_seed`` fixes
            the texts.
        statistics: filled in as decoding goes.
        inputs_tensor: what ``model.generate`` was called with: of an encoder-decoder the sources, which are encoded
            once more here.
        assistant_model, streamer: as of ``model.generate``. It does not hand them on to a function (5.23), so they are
            read where it keeps them. An assistant has the model's vocabulary. A streamer takes a batch of one.

    Returns:
        int64 [B, L]: prompts and what they were continued with, then ``pad_token_id``; or, with
        ``return_dict_in_generate``, transformers' ``GenerateDecoderOnlyOutput`` or ``GenerateEncoderDecoderOutput``
        with ``sequences``, ``scores`` and ``logits`` (those of a sequence that has ended are 0). Of an encoder-decoder
        they begin with the decoder's first tokens.

    Raises:
        TypeError, ValueError: naming what cannot be honoured, before anything is decoded; while decoding, where a row
            of the model's logits is no distribution, or nothing is allowed.
    """
    found = _dropped_arguments()
    _check_processes(model, found.get("synced_gpus"))
    assistant_model = found.get("assistant_model") if assistant_model is None else assistant_model
    streamer = found.get("streamer") if streamer is None else streamer
    with_sources = is_encoder_decoder(model)
    _check_options(generation_config, assistant_model, model_kwargs, with_sources)
    batch, length = input_ids.shape
    if streamer is not None and batch != 1:
        raise ValueError(f"streamer takes a batch of one sequence, got {batch}")
    prompts: list[Sequence[int]]
    if with_sources:
        padding = [0] * batch
        sources = _sources(model, inputs_tensor, model_kwargs.get("attention_mask"), batch)
        prompts = [SourcePrompt(source, row) for source, row in zip(sources, input_ids.tolist(), strict=True)]
    else:
        padding = _padding(input_ids, model_kwargs.get("attention_mask"), model_kwargs.get("position_ids"))
        prompts = [row[pad:] for row, pad in zip(input_ids.tolist(), padding, strict=True)]
    target = TransformersTarget(model)
    drafter = _drafter(drafter, assistant_model, target)
    own = [[_of_row(processor, row) for processor in logits_processor] for row in range(batch)]
    sampling = _sampling(logits_processor, generation_config.do_sample, padding)
    if any(isinstance(processor, _MASKS) for processor in logits_processor):
        sampling["grammar"] = [
            _Mask([each for each in own[row] if isinstance(each, _MASKS)], input_ids[row : row + 1], target.vocab_size)
            for row in range(batch)
        ]
    limits = [each.max_length for each in stopping_criteria if type(each) is MaxLengthCriteria]
    ends = [each.eos_token_id for each in stopping_criteria if type(each) is EosTokenCriteria]
    others = [each for each in stopping_criteria if type(each) not in (MaxLengthCriteria, EosTokenCriteria)]
    pad_token = generation_config.pad_token_id
    if pad_token is None and ends:
        pad_token = int(ends[0].flatten()[0])
    if pad_token is None and others and batch > 1:
        raise ValueError("pad_token_id must be set where stopping_criteria end sequences of a batch")
    if seeds is None and generation_config.do_sample:
        device = "cpu" if generator is None else generator.device
        seeds = torch.randint(2**63 - 1, (batch,), generator=generator, device=device).tolist()
    if num_draft is None:
        num_draft = generation_config.prompt_lookup_num_tokens or 4

    returns_dict = bool(generation_config.return_dict_in_generate)
    with_scores = returns_dict and bool(generation_config.output_scores)
    with_logits = returns_dict and bool(generation_config.output_logits)
    rows = RecordingTarget(target) if with_scores or with_logits else None
    texts = _Texts(input_ids, own if with_scores else None, rows, others)
    longest = min(limits, default=generation_config.max_length)  # a criterion that is passed replaces the default
    for token in stream(
        target if rows is None else rows,
        prompts,
        drafter=drafter,
        num_draft=num_draft,
        max_new_tokens=max(longest - length, 1),  # criteria are first asked behind a token
        seed=None if seeds is None else list(seeds),
        stop_tokens={int(end) for tensor in ends for end in tensor.flatten() if end >= 0},  # -1 is no end
        stop_when=texts.ends if others else None,
        rule=rule,
        statistics=statistics,
        **sampling,
    ):
        if token.finished in ("invalid", "dead_end"):
            reason = "its row of logits is no distribution" if token.finished == "invalid" else "nothing is allowed"
            raise ValueError(f"sequence {token.request} cannot go on after {texts.generated[token.request]}: {reason}")
        texts.generated[token.request].append(token.token)
        if streamer is not None:
            streamer.put(torch.tensor([token.token]))
    if streamer is not None:
        streamer.end()
    sequences = texts.sequences(0 if pad_token is None else pad_token)
    if not returns_dict:
        return sequences
    return (GenerateEncoderDecoderOutput if with_sources else GenerateDecoderOnlyOutput)(
        sequences=sequences,
        scores=texts.steps(texts.scores) if with_scores else None,
        logits=texts.steps(texts.logits) if with_logits else None,
    )


def _dropped_arguments() -> dict[str, Any]:
    """What ``model.generate`` was called with and does not hand on to a function: ``assistant_model``, ``streamer`` and
    ``synced_gpus``. To leave them out would be slow without a sign of it, or have a reader of the streamer, or another
    process, wait for ever."""
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame = sys._getframe(1)
    while frame.f_code is not code:
        if frame.f_back is None:
            return {}
        frame = frame.f_back
    return {name: frame.f_locals.get(name) for name in ("assistant_model", "streamer", "synced_gpus")}


def _check_processes(model: Any, synced_gpus: bool | None) -> None:
    """Whether this process may end before the others do.

    Raises:
        ValueError: it may not, as passed or by transformers' default.
    """
    if synced_gpus is None:
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        shared = is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model)
        synced_gpus = shared and several and torch.distributed.get_world_size() > 1
    if synced_gpus:
        raise ValueError(
            "synced_gpus must be False here, got True, or None where several processes share a model (DeepSpeed "
            "ZeRO-3, FSDP): each process ends with its own sequences, and others would wait for it"
        )


def _drafter(drafter: Drafter | None, assistant_model: Any, target: TransformersTarget) -> Drafter:
    """The one that is passed, or of the assistant, or what looks drafts up.

    Raises:
        ValueError: there are two, or the assistant has another vocabulary.
    """
    if assistant_model is not None:
        if drafter is not None:
            raise ValueError("drafter and assistant_model must not both be passed")
        if (own := vocab_size(assistant_model)) != target.vocab_size:
            raise ValueError(
                f"assistant_model must have the model's vocab_size {target.vocab_size}, got {own}: with another "
                "tokenizer pass drafter=IntersectionDrafter(assistant, Translation(tokenizer, assistant_tokenizer), "
                "vocab_size); with the same one, of fewer ids, drafter=ModelDrafter(assistant, vocab_size)"
            )
        return ModelDrafter(assistant_model)
    if drafter is not None:
        return drafter
    # By assumed costs, so that seeds fix the texts. On a GPU a few rows more take no longer.
    return AdaptiveDrafter(NGramDrafter(), RowCosts(_ROW)) if target.device.type == "cpu" else NGramDrafter()


def _check_options(config: Any, assistant_model: Any, model_kwargs: dict[str, Any], with_sources: bool) -> None:
    """Whether the loop has what is asked for.

    Raises:
        ValueError: naming what it has not.
    """
    mode = config.get_generation_mode(assistant_model)
    if mode not in _MODES:
        raise ValueError(f"generation_config must ask for greedy decoding or sampling, got {mode.value}")
    for name in _REFUSED:
        if value := getattr(config, name, None):
            raise ValueError(f"{name} cannot be honoured here, got {value!r}")
    if config.cache_implementation == "quantized":
        raise ValueError("cache_implementation cannot be 'quantized' here: the loop has its own cache")
    prepared = _PREPARED_WITH_SOURCES if with_sources else _PREPARED
    for name, value in model_kwargs.items():
        if name not in prepared and value is not None:
            raise ValueError(f"{name} cannot be honoured here: the model is given token ids alone")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and (getattr(cache, "_is_user_defined", False) or cache.get_seq_length() > 0):
        raise ValueError("past_key_values cannot be honoured here: the loop has its own cache")


def _sources(model: Any, inputs: Tensor | None, mask: Tensor | None, batch: int) -> list[Any]:
    """The source of each sequence: ids without the padding behind them, or what a model hears or sees.

    Raises:
        ValueError: they are not to be had, or there is padding before one or within, or of what is no text.
    """
    if inputs is None:
        raise ValueError("model.generate must be called with the inputs of the encoder, got its outputs alone")
    each = inputs.repeat_interleave(batch // len(inputs), 0)  # of several sequences for each
    if each.is_floating_point():
        if mask is not None and (mask == 0).any() and model.config.model_type not in _WITHOUT_SOURCE_MASK:
            raise ValueError(
                "attention_mask must be 1 everywhere in sources that are no token ids, got 0 for "
                f"{type(model).__name__}: pass sources without padding"
            )
        return list(each)
    if mask is None:
        mask = torch.ones_like(each)
    if (mask[:, 1:] > mask[:, :-1]).any():
        raise ValueError("attention_mask must be 1 in each source and 0 behind it (padding_side='right')")
    return [row[:length] for row, length in zip(each.tolist(), mask.sum(1).tolist(), strict=True)]


def _padding(input_ids: Tensor, mask: Tensor | None, position_ids: Tensor | None) -> list[int]:
    """Columns of padding before each prompt.

    Raises:
        ValueError: there is padding elsewhere, or positions that do not count the tokens.
    """
    if mask is None:
        mask = torch.ones_like(input_ids)
    padding = (mask == 0).sum(1, keepdim=True)
    position = torch.arange(input_ids.shape[1], device=padding.device) - padding
    if ((mask != 0) != (position >= 0)).any():
        raise ValueError("attention_mask must be 0 to the left of each prompt and 1 in it (padding_side='left')")
    if position_ids is not None and ((position_ids.to(position.device) != position) & (position >= 0)).any():
        raise ValueError("position_ids must count the tokens of each prompt from 0")
    counts: list[int] = padding[:, 0].tolist()
    return counts


def _sampling(given: Sequence[Any], do_sample: bool, padding: Sequence[int]) -> dict[str, Any]:
    """Processors as parameters of :func:`specdec_kernels.decode.stream`, but for those that are masks.

    Raises:
        ValueError: naming one that is no parameter there, or comes in another order.
    """
    found: dict[str, Any] = {"temperature": 1.0}
    before = -1
    for processor in given:
        kind = type(processor)
        if kind not in (*_MASKS, *_PARAMETERS):
            raise ValueError(
                f"logits_processor {kind.__name__} cannot be honoured here; what can: "
                f"{', '.join(each.__name__ for each in (*_MASKS, *_PARAMETERS))}"
            )
        if kind in _MASKS:
            rank, in_order = before, before < _FIRST_FILTER
        else:
            rank = _PARAMETERS.index(kind)
            in_order = rank > before
        if not in_order:
            raise ValueError(f"logits_processor {kind.__name__} must not come behind {_PARAMETERS[before].__name__}")
        before = rank
        found |= _parameter(processor, padding)
    if not do_sample:  # the largest logit stays the largest, and stays
        for name in ("top_k", "top_p", "min_p"):
            found.pop(name, None)
        found["temperature"] = 0.0
    return found


def _parameter(processor: Any, padding: Sequence[int]) -> dict[str, Any]:
    """One processor as a parameter; nothing for one that changes no distribution, or is a mask."""
    kind = type(processor)
    if kind is processors.SequenceBiasLogitsProcessor:
        if any(len(ids) > 1 for ids in processor.sequence_bias):
            raise ValueError("sequence_bias of more than one token cannot be honoured here")
        return {"logit_bias": {int(ids[0]): float(bias) for ids, bias in processor.sequence_bias.items()}}
    if kind is processors.RepetitionPenaltyLogitsProcessor:
        ignored = processor.prompt_ignore_length
        each = ignored.tolist() if isinstance(ignored, Tensor) else [ignored or 0] * len(padding)
        if each != list(padding):
            raise ValueError(
                "logits_processor RepetitionPenaltyLogitsProcessor must ignore the padding and nothing else, got "
                f"prompt_ignore_length={ignored} where there are {list(padding)} columns of it: use repetition_penalty="
            )
        return {"repetition_penalty": float(processor.penalty)}
    if kind is processors.TemperatureLogitsWarper:
        return {"temperature": float(processor.temperature)}
    if kind in (processors.TopKLogitsWarper, processors.TopPLogitsWarper, processors.MinPLogitsWarper):
        least = 1 if kind is processors.TopKLogitsWarper else processor.min_tokens_to_keep
        if processor.filter_value != -torch.inf or least > 1:
            raise ValueError(f"logits_processor {kind.__name__} must have filter_value=-inf and min_tokens_to_keep=1")
        if kind is processors.TopKLogitsWarper:
            return {"top_k": int(processor.top_k)}
        if kind is processors.TopPLogitsWarper:
            return {"top_p": max(float(processor.top_p), checks.LEAST)}  # 0 is the likeliest alone
        return {"min_p": float(processor.min_p)}
    return {}


def _of_row(processor: Any, row: int) -> Any:
    """A processor of a batch as one of a row of it alone."""
    if type(processor) is processors.RepetitionPenaltyLogitsProcessor:
        processor = copy.copy(processor)
        if isinstance(processor.prompt_ignore_length, Tensor):
            processor.prompt_ignore_length = processor.prompt_ignore_length[row : row + 1]
    elif type(processor) is processors.PrefixConstrainedLogitsProcessor:
        allowed: Callable[..., Any] = processor._prefix_allowed_tokens_fn
        return processors.PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), 1)
    return processor


class _Mask:
    """What processors allow after a row's prompt and its generated tokens."""

    def __init__(self, given: Sequence[Any], prompt: Tensor, vocab: int) -> None:
        self._given, self._prompt, self._vocab = given, prompt, vocab

    def __call__(self, generated: Sequence[int]) -> Tensor:
        ids = _continued(self._prompt, generated)
        scores = torch.zeros((1, self._vocab), device=ids.device)
        for processor in self._given:
            scores = processor(ids, scores)
        return packed_mask((scores[0] > -torch.inf).cpu().numpy())


class _Texts:
    """The sequences of a batch as they grow, with the rows that they were drawn from."""

    def __init__(
        self,
        input_ids: Tensor,
        own: Sequence[Sequence[Any]] | None,
        rows: RecordingTarget | None,
        stopping_criteria: Sequence[Any],
    ) -> None:
        self._input_ids, self._own, self._rows, self._stopping_criteria = input_ids, own, rows, stopping_criteria
        self.generated: list[list[int]] = [[] for _ in input_ids]
        self._scores: list[list[Tensor]] = [[] for _ in input_ids]

    def ends(self, row: int, generated: Sequence[int]) -> bool:
        """Whether a criterion stops this row, asked as if it were alone."""
        ids = _continued(self._input_ids[row : row + 1], generated)
        scores = None if self._own is None else tuple(score[None] for score in self.scores(row, generated))
        return any(bool(criterion(ids, scores)) for criterion in self._stopping_criteria)

    def logits(self, row: int, generated: Sequence[int]) -> list[Tensor]:
        """The logits [V] of each token."""
        assert self._rows is not None
        return self._rows.rows[row][: len(generated)]

    def scores(self, row: int, generated: Sequence[int]) -> list[Tensor]:
        """The same after all processors."""
        assert self._own is not None
        for index in range(len(self._scores[row]), len(generated)):
            ids = _continued(self._input_ids[row : row + 1], generated[:index])
            score = self.logits(row, generated)[index][None]
            for processor in self._own[row]:
                score = processor(ids, score)
            self._scores[row].append(score[0])
        return self._scores[row]

    def sequences(self, pad_token: int) -> Tensor:
        """[B, L], padded behind the end of each."""
        longest = max(map(len, self.generated))
        rows = [[*text, *[pad_token] * (longest - len(text))] for text in self.generated]
        return torch.cat([self._input_ids, self._input_ids.new_tensor(rows)], 1)

    def steps(self, of: Callable[[int, Sequence[int]], list[Tensor]]) -> tuple[Tensor, ...]:
        """Rows of every sequence as transformers has them: [B, V] of each step."""
        every = [of(row, generated) for row, generated in enumerate(self.generated)]
        nothing = torch.zeros_like(every[0][0])
        longest = max(map(len, self.generated))
        return tuple(
            torch.stack([rows[step] if step < len(rows) else nothing for rows in every]) for step in range(longest)
        )


def _continued(prompt: Tensor, generated: Sequence[int]) -> Tensor:
    """A prompt [1, L] with tokens behind it."""
    return torch.cat([prompt, prompt.new_tensor([list(generated)], dtype=prompt.dtype)], 1)
