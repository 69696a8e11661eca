"""A module ``llama_cpp`` for tests: the part of its low-level interface that the target uses, over a small model.

Every row is scored by a plain pass over the whole history of its sequence, so a token too many, too few or in another
sequence is seen in the logits. It refuses what llama.cpp refuses (positions that do not follow, more than a context
holds), and gives its results in memory that the next pass overwrites.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import torch

_SET = "_Z30llama_set_embeddings_layer_inpP13llama_contextjb"
_GET = "_Z30llama_get_embeddings_layer_inpP13llama_contextj"


class LlamaCpp:
    """The module, which loads ``model`` whatever file it is shown."""

    def __init__(self, model, *, context=128, ends=(), kind="", architecture="llama", sequences=8, gpu=False):
        self.model, self.context, self.ends, self.kind = model, context, ends, kind
        self.architecture, self.sequences, self.gpu = architecture, sequences, gpu
        self.threads, self.gpu_layers = None, None
        self.contexts, self.freed = [], []
        self.reads = []
        """Tokens of each pass."""
        layers = {_SET: lambda own, layer, value: own.layers.add(layer), _GET: self._layer_inputs}
        functions = {name: _Function(function) for name, function in layers.items()}
        self.llama_cpp = SimpleNamespace(_lib=SimpleNamespace(**functions))
        for name in ("is_recurrent", "is_hybrid", "is_diffusion", "has_encoder"):
            setattr(self, f"llama_model_{name}", lambda model, name=name: name == self.kind)

    # --- models ---

    def llama_supports_gpu_offload(self):
        return self.gpu

    def llama_max_parallel_sequences(self):
        return self.sequences

    def llama_model_default_params(self):
        return SimpleNamespace(n_gpu_layers=None)

    def llama_model_load_from_file(self, path, parameters):
        self.gpu_layers = parameters.n_gpu_layers
        return None if b"broken" in path else self.model

    def llama_model_free(self, model):
        self.freed.append("model")

    def llama_model_get_vocab(self, model):
        return model.config

    def llama_vocab_n_tokens(self, config):
        return config.vocab_size

    def llama_vocab_is_eog(self, config, token):
        return token in self.ends

    def llama_model_n_ctx_train(self, model):
        return self.context

    def llama_model_n_embd(self, model):
        return model.config.hidden_size

    def llama_model_n_layer(self, model):
        return model.config.num_hidden_layers

    def llama_model_meta_val_str(self, model, key, text, size):
        assert key == b"general.architecture"
        text.value = self.architecture.encode()

    # --- contexts ---

    def llama_context_default_params(self):
        return SimpleNamespace(n_threads=4)

    def llama_init_from_model(self, model, parameters):
        each = parameters.n_ctx // parameters.n_seq_max
        made = SimpleNamespace(
            histories=[[] for _ in range(parameters.n_seq_max)], n_ctx_seq=each, layers=set(), parameters=parameters
        )
        self.contexts.append(made)
        return made

    def llama_free(self, context):
        self.freed.append("context")

    def llama_n_ctx_seq(self, context):
        return context.n_ctx_seq

    def llama_get_memory(self, context):
        return context

    def llama_memory_seq_rm(self, memory, sequence, start, end):
        assert end == -1
        del memory.histories[sequence][start:]
        return True

    # --- batches ---

    def llama_batch_init(self, tokens, embeddings, sequences):
        lists = {name: [None] * tokens for name in ("token", "pos", "n_seq_id", "logits")}
        return SimpleNamespace(n_tokens=0, seq_id=[[None] * sequences for _ in range(tokens)], **lists)

    def llama_batch_free(self, batch):
        self.freed.append("batch")

    @torch.no_grad()
    def llama_decode(self, context, batch):
        self.reads.append(batch.n_tokens)
        if batch.n_tokens > context.parameters.n_batch:
            return -1
        logits, hidden = [], []
        for index in range(batch.n_tokens):
            (sequence,) = batch.seq_id[index][: batch.n_seq_id[index]]
            history = context.histories[sequence]
            if batch.pos[index] != len(history):
                return -1
            if len(history) == context.n_ctx_seq:
                return 1
            history.append(batch.token[index])
            if batch.logits[index]:
                outputs = self.model(torch.tensor([history]), output_hidden_states=True)
                logits.append(outputs.logits[0, -1].float())
                hidden.append([layer[0, -1].float() for layer in outputs.hidden_states])
        for old in getattr(context, "buffers", []):
            old.fill_(torch.nan)
        context.logits = logits
        context.hidden = [torch.stack(layer) for layer in zip(*hidden, strict=True)]
        context.buffers = [*logits, *context.hidden]
        return 0

    def llama_get_logits_ith(self, context, index):
        return _address(context.logits[index])

    def llama_get_embeddings_ith(self, context, index):
        assert context.parameters.embeddings, "else there are none"
        return _address(context.hidden[-1][index])

    def _layer_inputs(self, context, layer):
        assert layer in context.layers, "else the process ends"
        return _address(context.hidden[layer])


class _Function:
    """Something to call that has types, as ctypes has them."""

    def __init__(self, function):
        self._function = function

    def __call__(self, *arguments):
        return self._function(*arguments)


def _address(tensor):
    return ctypes.c_void_p(tensor.data_ptr())
