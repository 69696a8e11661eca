"""Targets: transformers models, causal and encoder-decoders."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from specdec_kernels.checks import flags, whole
from specdec_kernels.decode import model_facts
from specdec_kernels.decode.model_cache import ModelCache
from specdec_kernels.decode.probe import Use, probe
from specdec_kernels.decode.prompts import SourcePrompt
from specdec_kernels.decode.protocols import Scores
from specdec_kernels.ops.trees import tree_mask, tree_positions
from specdec_kernels.tensors import padded


class TransformersTarget:
    """A ``transformers`` language model as a :class:`~specdec_kernels.decode.Target`, for any number of streams.

    Of an encoder-decoder (T5, BART, Whisper) the prompts have sources, see :meth:`prompt`; each is encoded once.

    Whether the model scores rows as the loop needs it is not taken for granted: before it is first used for chains, for
    batches and for trees, a few rows that are scored as the loop scores them are compared with a plain pass.

    Args:
        model: any causal model, or encoder-decoder, whose layers keep keys and values of tokens, or states (Mamba,
            Qwen3-Next, LFM2), in evaluation mode.
        fixed_rows: score in windows of exactly this many rows, at fixed offsets of the history. Passes over different
            numbers of rows, or of keys, round differently, so that a greedy text depends on how it was drafted, sooner
            or later: in bfloat16 after a few tokens. In a window every token is always scored in the same row of the
            same shape, whatever was drafted, so it does not. The price: rows of the window that are known already are
            scored again, and drafts end with the window. For chains of a batch of one.
        check: compare with a plain pass before first use, which costs a few passes over some tokens.

    Raises:
        TypeError, ValueError: a model that the loop cannot use, with the reason; ``fixed_rows`` below 1; a ``check``
            that is no bool.
    """

    def __init__(self, model: Any, fixed_rows: int | None = None, *, check: bool = True) -> None:
        self.layers = model_facts.check_model(model)
        if fixed_rows is not None:
            whole("fixed_rows", fixed_rows, 1, expected="None or an int")
        flags(check=check)
        self.model, self.fixed_rows, self.check = model, fixed_rows, check
        self.vocab_size = model_facts.vocab_size(model)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def stop_tokens(self) -> frozenset[int]:
        return model_facts.stop_tokens(self.model)

    @property
    def shares_ids(self) -> bool:
        return model_facts.shares_ids(self.model)

    def prompt(self, source: Sequence[int] | Tensor, tokens: Sequence[int] | None = None) -> SourcePrompt:
        """A prompt of an encoder-decoder.

        Args:
            source: what its encoder reads: see :class:`~specdec_kernels.decode.SourcePrompt`.
            tokens: what the text begins with; ``None`` for the decoder's start token alone.

        Raises:
            TypeError, ValueError: the model has no encoder, or no start token; or as of ``SourcePrompt``.
        """
        if not model_facts.is_encoder_decoder(self.model):
            raise TypeError(f"model must be an encoder-decoder to have sources, got {type(self.model).__name__}")
        return SourcePrompt(source, [model_facts.decoder_start(self.model)] if tokens is None else tokens)

    def begin(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], feature_layers: Sequence[int] = ()
    ) -> TransformersSession:
        if self.fixed_rows is not None:  # windows are scored whole
            max_new_tokens = [-(-count // self.fixed_rows) * self.fixed_rows for count in max_new_tokens]
        self.check_use(prompts, max_new_tokens)
        if feature_layers:
            model_facts.check_decoder_alone(self.model, "where a drafter reads hidden states", "use another drafter")
        if self.fixed_rows is None:
            return TransformersSession(self, prompts, feature_layers, max_new_tokens)
        if len(prompts) != 1:
            raise ValueError(f"fixed_rows needs a batch of one prompt, got {len(prompts)}")
        return WindowSession(self, prompts, feature_layers, max_new_tokens)

    def check_use(self, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int]) -> None:
        """Check that prompts can be continued by so many tokens each.

        Raises:
            ValueError: they cannot, before anything is read.
        """
        model_facts.check_model(self.model)
        model_facts.check_sources(self.model, prompts)
        model_facts.check_lengths(self.model, prompts, max_new_tokens)
        self.try_out("batches" if len(prompts) > 1 else "chains", prompts[0])

    def check_batch(self, longest: Sequence[int], prompt: Sequence[int] = ()) -> None:
        """Check that streams can go on in one batch, each with requests of up to so many tokens; ``prompt`` as of
        :meth:`try_out`.

        Raises:
            ValueError: they cannot.
        """
        model_facts.check_together(self.model, [length - 1 for length in longest])
        self.try_out("batches", prompt)

    def try_out(self, use: Use, prompt: Sequence[int] = ()) -> None:
        """Check that the model can be used so, unless that was done before or is not wanted; with the source of a
        prompt, where the model needs one that is no text.

        Raises:
            ValueError: it cannot.
        """
        if self.check:
            try_out(self, use, prompt, " (or have no check: TransformersTarget(model, check=False))")

    def session_class(self) -> type[Any]:
        """Of its streams, those in windows apart."""
        return TransformersSession


def try_out(target: TransformersTarget, use: Use, prompt: Sequence[int], otherwise: str = "") -> None:
    """Check that a target's model can be used so, unless that was done before; with the source of a prompt, where the
    model needs one that is no text.

    Raises:
        ValueError: it cannot; with what to do, and what to do otherwise.
    """
    unchecked = copy(target)
    unchecked.check = False
    kind = target.session_class()
    source = prompt.source if isinstance(prompt, SourcePrompt) else None
    probe(
        target.model,
        use,
        kind.__name__,
        lambda prompts: kind(unchecked, prompts, (), [0] * len(prompts)),
        otherwise,
        source if isinstance(source, Tensor) else None,
    )


class TransformersSession:
    """One stream of a :class:`TransformersTarget`."""

    def __init__(
        self,
        target: TransformersTarget,
        prompts: Sequence[Sequence[int]],
        feature_layers: Sequence[int],
        max_new_tokens: Sequence[int],
    ) -> None:
        self._target, self._model, self._feature_layers = target, target.model, feature_layers
        self._longest = max(map(len, prompts)) + max(max_new_tokens)
        self._cache = ModelCache(self._model, target.layers, prompts)
        self._prompt = prompts[0]
        read = [list(prompt[:-1]) for prompt in prompts]
        self.features: Tensor | None = None
        if any(read):
            tokens = padded(read, 0, device=target.device)
            last = {"logits_to_keep": 1} if model_facts.takes(self._model, "logits_to_keep") else {}
            self.features = self._run(tokens, [len(tokens) for tokens in read], decided=True, **last).features

    @property
    def lengths(self) -> list[int]:
        """Tokens of each request that were read."""
        return self._cache.lengths

    def max_rows(self) -> int:
        return sys.maxsize

    def score(self, tokens: Tensor, counts: Sequence[int]) -> Scores:
        return self._run(tokens, counts)

    def commit(self, counts: Sequence[int]) -> None:
        self._cache.commit(counts)

    @torch.inference_mode()
    def score_tree(self, tokens: Tensor, parents: Tensor) -> Scores:
        self._check_trees()
        depth = tree_positions(parents).clamp(min=0)
        outputs = self._cache.run_tree(
            tree_mask(parents), depth, input_ids=tokens, output_hidden_states=bool(self._feature_layers)
        )
        return self._scores(outputs)

    def commit_path(self, paths: Sequence[Sequence[int]]) -> None:
        self._cache.commit_path(paths)

    def select(self, slots: Sequence[int]) -> None:
        if len(slots) > len(self.lengths):  # several that go on from one
            self._target.check_batch([self._longest] * len(slots), self._prompt)
        self._cache.select(slots)

    def join(self, other: TransformersSession) -> None:
        self._target.check_batch([self._longest, other._longest], self._prompt)
        self._cache.join(other._cache)  # which may refuse
        self._longest = max(self._longest, other._longest)

    def _check_trees(self) -> None:
        model_facts.check_no_states(self._target.layers, "to score trees", "draft chains")
        model_facts.check_masks(self._model, "to score trees", "draft chains")
        model_facts.check_tree_lengths(self._model, self._longest)
        self._target.try_out("trees", self._prompt)

    @torch.inference_mode()
    def _run(self, tokens: Tensor, counts: Sequence[int], **options: Any) -> Scores:
        outputs = self._cache.run(
            counts, tokens.shape[1], input_ids=tokens, output_hidden_states=bool(self._feature_layers), **options
        )
        return self._scores(outputs)

    def _scores(self, outputs: Any) -> Scores:
        return Scores(outputs.logits, features_of(outputs, self._feature_layers))


class WindowSession(TransformersSession):
    """One stream that is scored in windows of fixed rows."""

    def __init__(self, target: TransformersTarget, *arguments: Any) -> None:
        assert target.fixed_rows is not None, "that is what makes it one"
        self._rows = target.fixed_rows
        self._window = torch.empty((1, 0), dtype=torch.int64, device=target.device)
        super().__init__(target, *arguments)

    def max_rows(self) -> int:
        return self._rows - self._window.shape[1]

    @torch.inference_mode()
    def score(self, tokens: Tensor, counts: Sequence[int]) -> Scores:
        self._known, rows = self._window.shape[1], tokens.shape[1]
        if self._known == 0:  # once for all passes over these rows, which are to have as many columns before them
            self._cache.settle()
        self._window = torch.cat([self._window, tokens], 1)
        padding = (0, self._rows - self._known - rows)
        scores = self._run(functional.pad(self._window, padding), [self._rows])
        new = slice(self._known, self._known + rows)
        return Scores(scores.logits[:, new], None if scores.features is None else scores.features[:, new])

    def commit(self, counts: Sequence[int]) -> None:
        self._window = self._window[:, : self._known + counts[0]]
        if self._window.shape[1] == self._rows:
            self._window = self._window[:, :0]
        else:
            self._cache.commit([0])

    def select(self, slots: Sequence[int]) -> None:
        if len(slots) > 1:
            self._refuse_batches()
        super().select(slots)

    def join(self, other: TransformersSession) -> None:
        self._refuse_batches()

    def _refuse_batches(self) -> None:
        raise ValueError(
            f"fixed_rows needs a batch of one prompt, which no other can join; got fixed_rows={self._rows}"
        )

    def score_tree(self, tokens: Tensor, parents: Tensor) -> Scores:
        raise ValueError(f"fixed_rows takes chains of drafts, not trees; got fixed_rows={self._rows}")


def features_of(outputs: Any, layers: Sequence[int]) -> Tensor | None:
    """[B, R, H]: the outputs of some layers side by side; None if there are none."""
    return torch.cat([outputs.hidden_states[layer] for layer in layers], -1) if layers else None
