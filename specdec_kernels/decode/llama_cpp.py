"""llama.cpp as a target, through the low-level interface of ``llama-cpp-python``, which is imported when it is used.

llama.cpp scores rows and keeps keys and values; what follows, from the logits to the tokens, is done here as for every
target. Its names: a *context* is caches and buffers, a *sequence* a request in them, a *batch* what one pass reads.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from specdec_kernels.checks import whole
from specdec_kernels.decode.prompts import read_lengths, refuse_sources
from specdec_kernels.decode.protocols import Scores
from specdec_kernels.extras import brought_by
from specdec_kernels.tensors import CPU

#: Tokens that one pass reads at most: llama.cpp's own default.
PASS = 512

#: Architectures whose middle layers llama.cpp hands out; it ends the process when it is asked for another one's.
_MIDDLE_LAYERS = ("llama", "qwen3")


def load_library() -> Any:
    """The module ``llama_cpp``.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    with brought_by("llama"):
        return importlib.import_module("llama_cpp")


class LlamaCppTarget:
    """A GGUF file that llama.cpp runs, as a :class:`~specdec_kernels.decode.Target`, for any number of streams.

    A stream has a context of its own, as large as its requests need. (That decides whether a model with short and long
    rotary frequencies uses the ones or the others, as ``n_ctx`` does in llama.cpp.) Logits are float32 on the CPU,
    wherever the layers are. For chains of drafts.

    Args:
        path: of the file; where it is split, of its first part.
        threads: of llama.cpp; ``None`` for as many as PyTorch has.
        gpu_layers: layers to put on a GPU, -1 for all; 0 keeps them on the CPU.

    Raises:
        ModuleNotFoundError: ``llama-cpp-python`` is not installed.
        FileNotFoundError: there is no such file.
        TypeError, ValueError: llama.cpp cannot load it, or cannot take back tokens from a model of this kind; or
            ``gpu_layers`` where it was built without a GPU.
    """

    device = CPU

    def __init__(self, path: str | Path, *, threads: int | None = None, gpu_layers: int = 0) -> None:
        whole("gpu_layers", gpu_layers)
        if threads is not None:
            whole("threads", threads, 1)
        if not Path(path).is_file():
            raise FileNotFoundError(f"path must be a GGUF file, got {str(path)!r}")
        self.path, self.threads, self.library = Path(path), threads, load_library()
        if gpu_layers and not self.library.llama_supports_gpu_offload():
            raise ValueError(f"gpu_layers must be 0 where llama.cpp was built without a GPU, got {gpu_layers}")
        parameters = self.library.llama_model_default_params()
        parameters.n_gpu_layers = gpu_layers
        self.model = self.library.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            raise ValueError(f"path must be a GGUF file that llama.cpp can load, got {str(path)!r}")
        weakref.finalize(self, self.library.llama_model_free, self.model)
        for kind in ("is_recurrent", "is_hybrid", "is_diffusion", "has_encoder"):
            if getattr(self.library, f"llama_model_{kind}")(self.model):
                raise ValueError(f"path must be a decoder whose layers all attend to tokens, got {path} ({kind})")
        vocabulary = self.library.llama_model_get_vocab(self.model)
        self.vocab_size: int = self.library.llama_vocab_n_tokens(vocabulary)
        ends = self.library.llama_vocab_is_eog
        self.stop_tokens = frozenset(token for token in range(self.vocab_size) if ends(vocabulary, token))

    def begin(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: Sequence[int], feature_layers: Sequence[int] = ()
    ) -> LlamaCppSession:
        refuse_sources(prompts, "llama.cpp")
        most, limit = self.library.llama_max_parallel_sequences(), self.library.llama_model_n_ctx_train(self.model)
        if len(prompts) > most:
            raise ValueError(f"prompts must be at most {most}, llama.cpp's sequences of a context, got {len(prompts)}")
        lengths = read_lengths(prompts, max_new_tokens, limit, self.path.name)
        return LlamaCppSession(self, prompts, max(lengths), feature_layers)


class LlamaCppSession:
    """One stream of a :class:`LlamaCppTarget`: slot b is the sequence ``self._sequences[b]``.

    Raises:
        ValueError: llama.cpp does not give the layers that are requested.
        MemoryError: nor a context of this size.
    """

    features: Tensor | None = None

    def __init__(
        self, target: LlamaCppTarget, prompts: Sequence[Sequence[int]], capacity: int, feature_layers: Sequence[int]
    ) -> None:
        library = target.library
        self._target, self._library = target, library
        self._sequences = list(range(len(prompts)))
        self.lengths = [0] * len(prompts)
        """Tokens of each request that were read."""
        self._scored = [0] * len(prompts)
        self._layers = _Layers(target, feature_layers) if feature_layers else None
        parameters = library.llama_context_default_params()
        parameters.n_seq_max = len(prompts)
        parameters.n_ctx = -(-capacity // 256) * 256 * len(prompts)  # it gives each sequence a multiple of 256
        parameters.n_batch = parameters.n_ubatch = PASS
        parameters.n_threads = parameters.n_threads_batch = target.threads or torch.get_num_threads()
        parameters.kv_unified = False  # else every request would attend to all, through a mask
        parameters.swa_full = True  # else a local layer forgets what a rejection takes it back to
        parameters.no_perf = True
        parameters.embeddings = -1 in feature_layers
        self._context = library.llama_init_from_model(target.model, parameters)
        if not self._context or library.llama_n_ctx_seq(self._context) < capacity:
            raise MemoryError(f"llama.cpp gave no context for {len(prompts)} requests of {capacity} tokens")
        weakref.finalize(self, library.llama_free, self._context)
        if self._layers is not None:
            self._layers.request(self._context)
        self._memory = library.llama_get_memory(self._context)
        self._batch = library.llama_batch_init(PASS, 0, 1)
        weakref.finalize(self, library.llama_batch_free, self._batch)
        read = [list(prompt[:-1]) for prompt in prompts]
        features = self._append(read)
        if any(read):
            self.features = features

    def max_rows(self) -> int:
        return sys.maxsize

    def score(self, tokens: Tensor, counts: Sequence[int]) -> Scores:
        self._scored = list(counts)
        logits = torch.empty((sum(counts), self._target.vocab_size), dtype=torch.float32, device=CPU)
        rows = [own[:count] for own, count in zip(tokens.tolist(), counts, strict=True)]
        features = self._append(rows, logits)
        return Scores(pad_sequence(logits.split(self._scored), batch_first=True), features)

    def commit(self, counts: Sequence[int]) -> None:
        self.lengths = [
            length - scored + count for length, scored, count in zip(self.lengths, self._scored, counts, strict=True)
        ]
        for sequence, length in zip(self._sequences, self.lengths, strict=True):
            self._forget(sequence, length)

    def score_tree(self, tokens: Tensor, parents: Tensor) -> Scores:
        raise ValueError("drafter must draft chains for LlamaCppTarget, got a tree")

    def commit_path(self, paths: Sequence[Sequence[int]]) -> None:
        raise ValueError("drafter must draft chains for LlamaCppTarget, got a tree")

    def select(self, slots: Sequence[int]) -> None:
        kept = [self._sequences[slot] for slot in slots]
        for sequence in set(self._sequences) - set(kept):
            self._forget(sequence, 0)
        self._sequences, self.lengths = kept, [self.lengths[slot] for slot in slots]

    def _forget(self, sequence: int, length: int) -> None:
        """Take back the tokens of a sequence from this position on."""
        if not self._library.llama_memory_seq_rm(self._memory, sequence, length, -1):
            raise RuntimeError(f"llama.cpp cannot take back the tokens of {self._target.path.name}")

    def _append(self, rows: Sequence[Sequence[int]], logits: Tensor | None = None) -> Tensor | None:
        """Read tokens behind those of each request; their features [B, R, H], if any are wanted. If the logits after
        them are, these are written to ``logits [N, V]``, one request's after the other's."""
        library, batch, layers = self._library, self._batch, self._layers
        tokens = [
            (token, length + offset, sequence)
            for sequence, length, own in zip(self._sequences, self.lengths, rows, strict=True)
            for offset, token in enumerate(own)
        ]
        features = None if layers is None else layers.empty(len(tokens))
        for start in range(0, len(tokens), PASS):
            part = tokens[start : start + PASS]
            batch.n_tokens = len(part)
            for index, (batch.token[index], batch.pos[index], sequence) in enumerate(part):
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, sequence
                batch.logits[index] = logits is not None or layers is not None
            if status := library.llama_decode(self._context, batch):
                raise RuntimeError(f"llama.cpp could not read {len(part)} tokens: llama_decode gave {status}")
            if logits is not None:
                for index, row in enumerate(logits[start : start + PASS]):
                    _copy(library.llama_get_logits_ith(self._context, index), row)
            if layers is not None and features is not None:
                layers.read(self._context, features[start : start + PASS])
        counts = [len(own) for own in rows]
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]
        return None if features is None else pad_sequence(features.split(counts), batch_first=True)


class _Layers:
    """Outputs of some of a target's layers, numbered as transformers numbers them.

    The last one's, after the final norm, are what llama.cpp calls embeddings. Any other's are what the next layer
    reads, which llama.cpp has for drafters of its own, in a C++ header that it does not call settled.
    """

    def __init__(self, target: LlamaCppTarget, layers: Sequence[int]) -> None:
        library = target.library
        self._library, self._layers = library, layers
        self._width: int = library.llama_model_n_embd(target.model)
        self._middle = [layer for layer in layers if layer != -1]
        if not self._middle:
            return
        count, text = library.llama_model_n_layer(target.model), ctypes.create_string_buffer(64)
        library.llama_model_meta_val_str(target.model, b"general.architecture", text, len(text))
        if not all(0 <= layer < count for layer in self._middle):
            raise ValueError(f"feature_layers must be -1 or in [0, {count}), got {tuple(layers)}")
        if (architecture := text.value.decode()) not in _MIDDLE_LAYERS:
            raise ValueError(
                f"feature_layers must be (-1,) unless the architecture is one of {_MIDDLE_LAYERS}, got "
                f"{tuple(layers)} of {architecture!r}"
            )
        self._set = _unbound(library, "llama_set_embeddings_layer_inp", "P13llama_contextjb")
        self._get = _unbound(library, "llama_get_embeddings_layer_inp", "P13llama_contextj")
        self._set.argtypes, self._set.restype = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_bool], None
        self._get.argtypes, self._get.restype = [ctypes.c_void_p, ctypes.c_uint32], ctypes.c_void_p

    def request(self, context: Any) -> None:
        """Have a context keep them."""
        for layer in self._middle:
            self._set(context, layer, True)

    def empty(self, count: int) -> Tensor:
        """Where they are written, [N, layers * H]."""
        return torch.empty((count, len(self._layers) * self._width), dtype=torch.float32, device=CPU)

    def read(self, context: Any, features: Tensor) -> None:
        """Write those of the pass before."""
        for layer, own in zip(self._layers, features.split(self._width, 1), strict=True):
            read = torch.empty(own.shape, dtype=torch.float32, device=CPU)
            if layer == -1:
                for index, row in enumerate(read):
                    _copy(self._library.llama_get_embeddings_ith(context, index), row)
            else:
                _copy(self._get(context, layer), read)
            own.copy_(read)


def _copy(source: Any, to: Tensor) -> None:
    """Copy numbers from llama.cpp's memory."""
    ctypes.memmove(to.data_ptr(), source, to.numel() * to.element_size())


def _unbound(library: Any, name: str, arguments: str) -> Any:
    """A function of llama.cpp's that the package does not bind, by its name in C++.

    Raises:
        ValueError: this build has none of this name with these arguments.
    """
    try:
        return getattr(library.llama_cpp._lib, f"_Z{len(name)}{name}{arguments}")
    except AttributeError:
        raise ValueError(f"feature_layers must be (-1,) for a llama.cpp without {name}") from None
