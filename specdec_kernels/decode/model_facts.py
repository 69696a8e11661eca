"""What a transformers model says of itself, and the histories that it can score as the loop scores them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from specdec_kernels.checks import ids_of
from specdec_kernels.decode.layer_kinds import Kind, layer_kinds
from specdec_kernels.decode.prompts import SourcePrompt, read_lengths, refuse_sources
from specdec_kernels.decode.states import step_row_by_row


def text_config(model: Any) -> Any:
    """The configuration of the part that writes text, also of a multimodal model."""
    return model.config.get_text_config(decoder=True)


def vocab_size(model: Any) -> int:
    """Columns of its logits.

    Raises:
        ValueError: its configuration does not say.
    """
    size = getattr(text_config(model), "vocab_size", None)
    if not isinstance(size, int):
        raise ValueError(f"model must have a vocab_size in its text configuration, got {size!r} in {_name(model)}")
    return size


def stop_tokens(model: Any) -> frozenset[int]:
    """The end tokens of its generation configuration, else of its configuration."""
    for config in (getattr(model, "generation_config", None), text_config(model)):
        configured = getattr(config, "eos_token_id", None)
        if configured is not None:
            return frozenset(configured if isinstance(configured, (list, tuple)) else [configured])
    return frozenset()


def special_tokens(model: Any) -> frozenset[int]:
    """Ids that its configuration gives a meaning: padding, ends, places of images."""
    found = stop_tokens(model)
    for config in (model.config, text_config(model)):
        values = config.to_dict().items()
        found |= {value for name, value in values if name.endswith("token_id") and isinstance(value, int)}
    return found


def check_model(model: Any) -> list[Kind]:
    """Whether a model is one that the loop knows how to use.

    Returns:
        What its layers attend to. Those with states keep them row by row from now on, in this project's caches.

    Raises:
        TypeError, ValueError: with the reason why not.
    """
    is_module: bool = isinstance(model, torch.nn.Module)
    if not is_module or not hasattr(getattr(model, "config", None), "get_text_config"):
        raise TypeError(f"model must be a transformers model, got {_name(model)}")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        raise ValueError(f"model must have a language-modelling head, got {_name(model)}")
    if any(module.training for module in model.modules()):
        raise ValueError(f"model must be in evaluation mode (model.eval()), got {_name(model)} in training mode")
    kinds = layer_kinds(model.config)
    if any(kind.window is not None for kind in kinds):
        check_masks(model, "where layers have windows")
    if isinstance(columns := getattr(head, "out_features", None), int) and columns != vocab_size(model):
        raise ValueError(
            f"model must have as many logits as its configuration's vocab_size, {vocab_size(model)}, got {columns} in "
            f"{_name(model)}: set it, or resize_token_embeddings"
        )
    step_row_by_row(model, {index for index, kind in enumerate(kinds) if kind.states})
    return kinds


def is_encoder_decoder(model: Any) -> bool:
    """Whether it writes about a source that an encoder reads."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def decoder_start(model: Any) -> int:
    """The token that the decoder of an encoder-decoder starts with.

    Raises:
        ValueError: its configurations name none.
    """
    for config in (getattr(model, "generation_config", None), model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            if isinstance(token := getattr(config, name, None), int):
                return token
    raise ValueError(f"tokens must be passed: the configuration of {_name(model)} has no decoder_start_token_id")


def check_decoder_alone(model: Any, purpose: str, otherwise: str) -> None:
    """Whether a model has no encoder.

    Raises:
        ValueError: it has one; with what it must have none for, and what to do with it.
    """
    if is_encoder_decoder(model):
        raise ValueError(
            f"model must be a decoder alone {purpose}, got the encoder-decoder {_name(model)}: {otherwise}"
        )


def reads_ids(model: Any) -> bool:
    """Whether the encoder of an encoder-decoder reads token ids, and no sounds or images."""
    return bool(model.get_encoder().main_input_name == "input_ids")


def shares_ids(model: Any) -> bool:
    """Whether an encoder-decoder reads the ids that it writes, as far as its sizes and its configuration tell: some
    translators (Marian), and encoders and decoders that were put together, have a vocabulary each."""
    if not is_encoder_decoder(model) or not reads_ids(model):
        return False
    read: int = model.get_encoder().get_input_embeddings().num_embeddings
    return read == vocab_size(model) and getattr(model.config, "share_encoder_decoder_embeddings", True)


def source_length(model: Any) -> int | None:
    """Ids that a source may have, None for any number."""
    names = ("max_source_positions", "max_encoder_position_embeddings", "max_position_embeddings")
    limits = (getattr(model.config, name, None) for name in names)
    return next((limit for limit in limits if isinstance(limit, int)), None)


def check_sources(model: Any, prompts: Sequence[Sequence[int]]) -> None:
    """Whether prompts have sources that a model's encoder can read, or none where it has none.

    Raises:
        TypeError, ValueError: they do not.
    """
    if not is_encoder_decoder(model):
        refuse_sources(prompts, _name(model))
        return
    encoder = model.get_encoder()
    of_ids, limit = reads_ids(model), source_length(model)
    shapes = set()
    for index, prompt in enumerate(prompts):
        name = f"prompts[{index}]"
        if not isinstance(prompt, SourcePrompt):
            raise TypeError(
                f"{name} must be a SourcePrompt for {_name(model)}, which has an encoder: target.prompt(...)"
            )
        if isinstance(prompt.source, torch.Tensor) == of_ids:
            kind = "token ids" if of_ids else f"a floating tensor, its {encoder.main_input_name}"
            raise TypeError(f"{name}.source must be {kind} for {_name(model)}, got {type(prompt.source).__name__}")
        if isinstance(prompt.source, torch.Tensor):
            shapes.add(tuple(prompt.source.shape))
            continue
        ids_of(f"{name}.source", prompt.source, encoder.get_input_embeddings().num_embeddings)
        if limit is not None and len(prompt.source) > limit:
            raise ValueError(f"{name}.source must have at most {limit} tokens, got {len(prompt.source)}")
    if len(shapes) > 1:
        raise ValueError(f"sources of a batch must have one shape, got {sorted(shapes)}")


def check_no_states(layers: Sequence[Kind], purpose: str, otherwise: str) -> None:
    """Whether all layers keep keys and values.

    Raises:
        ValueError: they do not; with what they are for, and what to do without.
    """
    if any(kind.states for kind in layers):
        raise ValueError(f"model must have keys and values in every layer {purpose}, got states: {otherwise}")


def cache_argument(model: Any) -> str:
    """What its forward pass calls a cache."""
    return "cache_params" if takes(model, "cache_params") else "past_key_values"


def takes(model: Any, name: str) -> bool:
    """Whether a model's forward pass has an argument of this name; of a compiled one, the model's that was compiled."""
    return name in inspect.signature(getattr(model, "_orig_mod", model).forward).parameters


def context_length(model: Any) -> int | None:
    """Positions a history may have, None for any number."""
    config = text_config(model)
    # The third is Whisper's; beyond the last, what a row of Doge attends to depends on what it is read together with.
    names = ("max_position_embeddings", "max_seq_len", "max_target_positions", "keep_window_size",
             "max_decoder_position_embeddings")  # fmt: skip
    lengths = [length for name in names if isinstance(length := getattr(config, name, None), int)]
    return min((length for length in lengths if length > 0), default=None)  # XLNet has -1 for any number


def column_window(model: Any) -> int | None:
    """Tokens up to which it does not matter that a model looks at columns of its cache, whatever is there: local layers
    of GPT-Neo look back by column, and Llama 4 scales queries by it; else None."""
    config = text_config(model)
    if "local" in getattr(config, "attention_layers", ()):
        return int(config.window_size)
    return int(config.floor_scale) - 1 if getattr(config, "attn_temperature_tuning", False) else None


def unchanging_lengths(model: Any) -> list[int]:
    """Tokens of a history behind which something about the model is different, each for a reason of its own."""
    config = text_config(model)
    return [*_original_lengths(config), *(n for n in (context_length(model), column_window(model)) if n is not None)]


def check_lengths(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int]) -> None:
    """Whether a batch of prompts, each with so many tokens more, can be scored step by step.

    Raises:
        ValueError: a history gets longer than the model's context, or its rotary frequencies would change on the way.
    """
    lengths = read_lengths(prompts, max_new_tokens, context_length(model), _name(model))
    for original in _original_lengths(text_config(model)):
        longer = max(lengths) > original
        if longer and not all(len(prompt) - 1 > original for prompt in prompts):
            raise ValueError(
                f"max_new_tokens must keep every history of a batch within {original} tokens, or all prompts must be "
                f"longer than that: behind it the rotary frequencies of {_name(model)} are others (longrope), and what "
                f"was read before would have to be read again; got prompts of {[len(prompt) for prompt in prompts]} "
                f"tokens and {max(lengths)} at the end"
            )
    check_together(model, lengths)


def check_together(model: Any, lengths: Sequence[int]) -> None:
    """Whether histories of up to so many tokens that are read, each of which can be scored by itself, can be scored in
    one batch.

    Raises:
        ValueError: rotary frequencies, which a pass has in common, or local windows stand against it.
    """
    for original in _original_lengths(text_config(model)):
        if min(lengths) <= original < max(lengths):
            raise ValueError(
                f"prompts must be all within the original length of {original} tokens of {_name(model)} (longrope) to "
                f"the end, or none of them, got a batch with {min(lengths)} to {max(lengths)} tokens"
            )
    window = column_window(model)
    if window is not None and len(lengths) > 1 and max(lengths) > window:
        raise ValueError(
            f"prompts must be one at a time beyond the local window of {window} tokens of {_name(model)}, which it "
            f"measures by column of its cache, got a batch of {len(lengths)} with up to {max(lengths)} tokens"
        )


def mask_dtype(model: Any) -> torch.dtype | None:
    """How a model is told what each row attends to: the dtype of a mask [B, 1, R, columns], bool or one that is added
    to its scores; or None where it takes none but [B, columns]."""
    if attention(model) not in ("eager", "sdpa") or has_alibi(model):
        return None
    dtype: torch.dtype = model.dtype
    return dtype if attention(model) == "eager" else torch.bool


def has_alibi(model: Any) -> bool:
    """Whether a model adds to its scores how far tokens are from each other, which it counts in a mask [B, columns]."""
    config = text_config(model)
    return config.model_type in ("bloom", "mpt") or bool(getattr(config, "alibi", False))


def check_masks(model: Any, purpose: str, otherwise: str = "") -> None:
    """Whether a model takes masks that tell of every row what it attends to.

    Raises:
        ValueError: it does not; with what they are for, and what to do without.
    """
    if has_alibi(model):
        raise ValueError(f"model must have no ALiBi {purpose}, got {_name(model)}: {otherwise}")
    if mask_dtype(model) is None:
        raise ValueError(
            f"model must have attn_implementation 'eager' or 'sdpa' {purpose}, got {attention(model)!r}: "
            f"{otherwise and otherwise + ', or '}load it with one of these"
        )


def check_tree_lengths(model: Any, longest: int) -> None:
    """Whether trees behind histories of up to ``longest`` tokens can be scored.

    Raises:
        ValueError: they cannot.
    """
    window = column_window(model)
    if window is not None and longest > window:
        raise ValueError(
            f"drafts must be chains beyond the local window of {window} tokens of {_name(model)}, got a tree and "
            f"histories of up to {longest} tokens"
        )


def attention(model: Any) -> str:
    """Name of the attention implementation of the part that writes text."""
    return getattr(text_config(model), "_attn_implementation", None) or "eager"


def _original_lengths(config: Any) -> Iterator[int]:
    """Lengths at which rotary frequencies change. (Dynamic NTK scaling changes them at ``max_position_embeddings``.)"""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [parameters] if "rope_type" in parameters else parameters.values()  # or of each type of layer
    for kind in kinds:
        if isinstance(kind, Mapping) and kind.get("rope_type") == "longrope":
            original = kind.get("original_max_position_embeddings")
            yield original or config.original_max_position_embeddings


def _name(model: Any) -> str:
    return type(model).__name__
