"""The network of the feature drafter: one decoder layer over the target's hidden states (EAGLE, arXiv:2401.15077).

At token t it reads the embedding of token t + 1 and the target's hidden states at t, of several layers (EAGLE-3,
arXiv:2503.01840), and predicts what the target's own head, cut to a short list of frequent tokens, turns into a draft
distribution. Further drafts read the drafter's own output in place of the hidden states.

Texts repeat themselves, and one layer is not enough to copy well. So what followed the same tokens before has its logit
raised, by how many tokens these were: a cache (Grave et al., arXiv:1612.04426) with exact matches in place of similar
hidden states.

Written out rather than taken from transformers, whose generic layer takes twice as long for one row on a CPU.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

#: Lengths of a repetition that are told apart; longer ones count as the last.
REPEATS = 8


class FeatureNetwork(nn.Module, ABC):
    """One decoder layer that reads the target's hidden states at first, and its own outputs from then on."""

    heads: int
    kv_heads: int
    head_dim: int

    @abstractmethod
    def inputs(self, embeddings: Tensor, features: Tensor) -> Any:
        """What the layer reads, for :meth:`project` and :meth:`finish`: from the next tokens' embeddings [..., H] and
        the features before them, the target's [..., layers * H] or this network's own [..., H]."""

    @abstractmethod
    def project(self, x: Any, position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values: [B, heads or kv_heads, R, head_dim]."""

    @abstractmethod
    def finish(self, x: Any, attended: Tensor) -> Tensor:
        """The outputs [B, R, H] of the layer after attention [B, heads, R, head_dim]."""

    def forward(
        self,
        embeddings: Tensor,
        features: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor,
        past_key_values: Any,
        use_cache: bool = True,
    ) -> Tensor:
        """Features [B, R, H] of R new rows: of :meth:`inputs`' arguments, and those of a transformers decoder, of which
        the mask is bool [B, 1, R, L], or None where every row attends to all up to itself."""
        x = self.inputs(embeddings, features)
        queries, keys, values = self.project(x, position_ids)
        keys, values = past_key_values.update(keys, values, 0)
        return self.finish(x, attend(queries, keys, values, attention_mask))


class FeatureModel(FeatureNetwork):
    """A Llama decoder layer (grouped heads, rotary positions, gated MLP) behind a projection of two inputs.

    Args:
        config: the target's transformers config; the layer takes its sizes.
        shortlist: int64 [S], the ids that can be drafted, ascending.
        middle: layers of the target whose outputs are read beside the last one's.
    """

    shortlist: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, config: Any, shortlist: Tensor, middle: Sequence[int] = ()) -> None:
        super().__init__()
        self.layers = (*middle, -1)
        self.config = copy.deepcopy(config)
        width, head = config.hidden_size, config.head_dim
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, head
        if middle:
            self.middle_norm = nn.Parameter(torch.ones(len(middle), width))
            self.middle = nn.Linear(len(middle) * width, width, bias=False)
        self.fuse = nn.Linear(2 * width, width, bias=False)
        self.attention_norm = nn.RMSNorm(width, config.rms_norm_eps)
        self.qkv = nn.Linear(width, (self.heads + 2 * self.kv_heads) * head, bias=False)
        self.output = nn.Linear(self.heads * head, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width, config.rms_norm_eps)
        self.gate_up = nn.Linear(width, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, width, bias=False)
        self.norm = nn.RMSNorm(width, config.rms_norm_eps)
        self.repeats = nn.Parameter(torch.zeros(REPEATS))
        self.register_buffer("shortlist", shortlist)
        inverse = config.rope_parameters["rope_theta"] ** (-torch.arange(0, head, 2).float() / head)
        angles = torch.outer(torch.arange(config.max_position_embeddings).float(), inverse).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def inputs(self, embeddings: Tensor, features: Tensor) -> Tensor:
        """[..., H]: as of :meth:`FeatureNetwork.inputs`."""
        width = embeddings.shape[-1]
        if features.shape[-1] != width:
            middle, features = features[..., :-width].unflatten(-1, (-1, width)), features[..., -width:]
            normed = functional.rms_norm(middle, (width,), eps=self.config.rms_norm_eps) * self.middle_norm
            features = features + self.middle(normed.flatten(-2))
        fused: Tensor = self.fuse(torch.cat([embeddings, features], -1))
        return fused

    def project(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As of :meth:`FeatureNetwork.project`."""
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        rotated, values = heads.split([self.heads + self.kv_heads, self.kv_heads], 1)
        cos, sin = self.cos[position_ids][:, None], self.sin[position_ids][:, None]
        half = self.head_dim // 2
        turned = torch.cat([-rotated[..., half:], rotated[..., :half]], -1)
        rotated = rotated * cos.to(x.dtype) + turned * sin.to(x.dtype)
        queries, keys = rotated.split([self.heads, self.kv_heads], 1)
        return queries, keys, values

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer after attention [B, heads, R, head_dim], and the final norm."""
        x = x + self.output(attended.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        normed: Tensor = self.norm(x + self.down(functional.silu(gate) * up))
        return normed

    def offsets(self) -> dict[int, int]:
        """The offset in the short list of every id that can be drafted."""
        return {token: offset for offset, token in enumerate(self.shortlist.tolist())}

    def favour(self, logits: Tensor, row: Tensor, token: Tensor, length: Tensor) -> Tensor:
        """Logits [R, S] of which ``logits[row[i], token[i]]`` is higher, for a token that followed ``length[i]`` tokens
        before as it would follow the last of row ``row[i]``'s; int64 [N] each."""
        favour = self.repeats[length.clamp(max=REPEATS) - 1].to(logits.dtype)
        return logits.index_put((row, token), favour, accumulate=True)

    def save(self, path: Path) -> None:
        """Write the weights in bfloat16, the short list and the middle layers in int32."""
        state = {name: tensor.to(torch.bfloat16) for name, tensor in self.state_dict().items() if name != "shortlist"}
        lists = {"shortlist": self.shortlist, "middle": torch.tensor(self.layers[:-1])}
        save_file({**state, **{name: ids.to(torch.int32) for name, ids in lists.items()}}, path)

    @classmethod
    def load(cls, path: Path, config: Any, dtype: torch.dtype) -> FeatureModel:
        """Read what :meth:`save` wrote."""
        state = load_file(path)
        shortlist = state.pop("shortlist").long()
        model = cls(config, shortlist, state.pop("middle", torch.empty(0)).tolist())
        model.load_state_dict({"repeats": model.repeats, **state, "shortlist": shortlist})
        return model.to(dtype).eval()


def attend(queries: Tensor, keys: Tensor, values: Tensor, attention_mask: Tensor | None) -> Tensor:
    """[B, heads, R, D]: attention of the last R rows, ``queries [B, heads, R, D]``, over ``keys`` and ``values [B,
    kv_heads, L, D]``; by a mask bool [B, 1, R, L], or all that come before."""
    batch, heads, rows, width = queries.shape
    length, mask = keys.shape[2], None
    if attention_mask is None and rows > 1:
        causal = torch.ones(rows, length, dtype=torch.bool, device=keys.device)
        attention_mask = causal.tril(length - rows).expand(batch, 1, -1, -1)
    if attention_mask is not None:
        mask = attention_mask.repeat(1, 1, heads // keys.shape[1], 1)
    # The query heads that share keys become rows of one head, so that no key is copied.
    grouped = queries.reshape(batch, keys.shape[1], -1, width)
    attended = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
    return attended.reshape(batch, heads, rows, width)
