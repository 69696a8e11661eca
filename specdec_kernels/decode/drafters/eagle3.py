"""Published EAGLE-3 drafters (arXiv:2503.01840), in the layout of ``speculators``: a folder of ``config.json`` and
``model.safetensors``.

One decoder layer, of Llama or of Qwen3, reads the embedding of token t + 1 beside the target's hidden states at token
t, of three layers, which ``fc`` makes one of; further drafts read the layer's own output in their place. Its head has
fewer ids than the target: ``d2t [Vd]`` is how far each is from its target id, ``t2d [V]`` which target ids there are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from specdec_kernels.checks import describe, ids_of
from specdec_kernels.decode import model_facts
from specdec_kernels.decode.drafters.autoregressive import DraftConfig
from specdec_kernels.decode.drafters.feature import FeatureSession
from specdec_kernels.decode.drafters.feature_model import FeatureModel, FeatureNetwork
from specdec_kernels.decode.layer_kinds import WHOLE, Kind
from specdec_kernels.ops import DraftVocabulary

_CONFIGS = {"llama": LlamaConfig, "qwen3": Qwen3Config}

#: What a written config says of the layer.
_LAYER_FIELDS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "attention_bias", "mlp_bias", "vocab_size",
    "max_position_embeddings", "rope_parameters",
)  # fmt: skip

#: Kinds of rotary frequencies that are the same at every length.
_ROTARY = ("default", "linear", "llama3", "yarn")


class Norms(NamedTuple):
    """Where the network has norms, by the names of ``config.json``."""

    norm_before_residual: bool
    """What the layer adds to is what it reads after the norm."""
    norm_before_fc: bool = False
    """One before ``fc``, over all hidden states that are read."""
    fc_norm: bool = False
    """One before ``fc`` for each of them, in its place."""
    norm_output: bool = False
    """Further drafts read the layer's output behind the final norm (EAGLE-3.1)."""


class Eagle3Model(FeatureNetwork):
    """The network, with its parameters named as in the files.

    Args:
        config: of transformers, of the one layer.
        states: hidden states of the target that are read at each token.
        target_width: numbers of each.
        draft_vocab: columns of the head, Vd.
        norms: where there are any beside those of the layer.
    """

    def __init__(self, config: Any, states: int, target_width: int, draft_vocab: int, norms: Norms) -> None:
        super().__init__()
        self.config, self.norms, self.kind = config, norms, _kind(config)
        width, bias, eps = config.hidden_size, config.attention_bias, config.rms_norm_eps
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        heads, kv_heads, head = self.heads, self.kv_heads, self.head_dim
        attention: dict[str, nn.Module] = {
            "q_proj": nn.Linear(2 * width, heads * head, bias),
            "k_proj": nn.Linear(2 * width, kv_heads * head, bias),
            "v_proj": nn.Linear(2 * width, kv_heads * head, bias),
            "o_proj": nn.Linear(heads * head, width, bias),
        }
        self._head_norms = config.model_type == "qwen3"
        if self._head_norms:
            attention |= {"q_norm": nn.RMSNorm(head, eps), "k_norm": nn.RMSNorm(head, eps)}
        inner, mlp_bias = config.intermediate_size, getattr(config, "mlp_bias", False)
        layer: dict[str, nn.Module] = {
            "input_layernorm": nn.RMSNorm(width, eps),
            "hidden_norm": nn.RMSNorm(width, eps),
            "self_attn": nn.ModuleDict(attention),
            "post_attention_layernorm": nn.RMSNorm(width, eps),
            "mlp": nn.ModuleDict(
                {
                    "gate_proj": nn.Linear(width, inner, mlp_bias),
                    "up_proj": nn.Linear(width, inner, mlp_bias),
                    "down_proj": nn.Linear(inner, width, mlp_bias),
                }
            ),
        }
        if norms.norm_before_fc:
            self.input_norm = nn.RMSNorm(states * target_width, eps)
        if norms.fc_norm:
            self.fc_norm = nn.ModuleList(nn.RMSNorm(target_width, eps) for _ in range(states))
        self.fc = nn.Linear(states * target_width, width, bias=False)
        self.layers = nn.ModuleList([nn.ModuleDict(layer)])
        self.norm = nn.RMSNorm(width, eps)
        self.lm_head = nn.Linear(width, draft_vocab, bias=False)
        self.rotary = LlamaRotaryEmbedding(config)  # of float32, whatever the weights are

    def inputs(self, embeddings: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """What the layer adds to, [..., H], and what it attends by, [..., 2 * H]."""
        layer: Any = self.layers[0]
        features = features.to(embeddings.dtype)  # llama.cpp's are float32
        if features.shape[-1] == self.fc.in_features:
            features = self.fc(self._normed(features))
        elif features.shape[-1] != self.config.hidden_size:
            raise ValueError(
                "drafter must be used with the target that it was made for: of its hidden states it reads "
                f"{self.fc.in_features} numbers a token, got {features.shape[-1]}"
            )
        normed: Tensor = layer["hidden_norm"](features)
        read = torch.cat([layer["input_layernorm"](embeddings), normed], -1)
        return (normed if self.norms.norm_before_residual else features), read

    def _normed(self, features: Tensor) -> Tensor:
        """The target's hidden states as ``fc`` reads them."""
        if self.norms.fc_norm:
            states = features.chunk(len(self.fc_norm), -1)
            return torch.cat([norm(state) for norm, state in zip(self.fc_norm, states, strict=True)], -1)
        normed: Tensor = self.input_norm(features) if self.norms.norm_before_fc else features
        return normed

    def project(self, x: tuple[Tensor, Tensor], position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As of :meth:`FeatureNetwork.project`."""
        layer: Any = self.layers[0]
        attention, (_, read) = layer["self_attn"], x
        queries, keys, values = (
            attention[name](read).unflatten(-1, (-1, self.head_dim)) for name in ("q_proj", "k_proj", "v_proj")
        )
        if self._head_norms:
            queries, keys = attention["q_norm"](queries), attention["k_norm"](keys)
        queries, keys, values = (each.transpose(1, 2) for each in (queries, keys, values))
        queries, keys = apply_rotary_pos_emb(queries, keys, *self.rotary(read, position_ids))
        return queries, keys, values

    def finish(self, x: tuple[Tensor, Tensor], attended: Tensor) -> Tensor:
        """As of :meth:`FeatureNetwork.finish`: the outputs as further drafts read them."""
        layer: Any = self.layers[0]
        mlp, (residual, _) = layer["mlp"], x
        hidden = residual + layer["self_attn"]["o_proj"](attended.transpose(1, 2).flatten(2))
        y = layer["post_attention_layernorm"](hidden)
        outputs: Tensor = hidden + mlp["down_proj"](functional.silu(mlp["gate_proj"](y)) * mlp["up_proj"](y))
        return self.norm(outputs) if self.norms.norm_output else outputs

    def head(self, features: Tensor) -> Tensor:
        """The Vd logits after each output."""
        logits: Tensor = self.lm_head(features if self.norms.norm_output else self.norm(features))
        return logits

    @torch.no_grad()
    def save(
        self,
        folder: Path,
        shortlist: Tensor,
        target: Any,
        feature_layers: Sequence[int],
        dtype: torch.dtype = torch.bfloat16,
        name: str | None = None,
    ) -> None:
        """Write ``config.json`` and ``model.safetensors``, without the embeddings, which are the target's.

        Args:
            folder: made if there is none.
            shortlist: int64 [Vd], the target ids of the draft ids.
            target: the target's transformers model.
            feature_layers: of it, as of :class:`Eagle3Drafter`.
            dtype: of the matrices; of eight bits, ``torch.float8_e4m3fn``, weights should be of an ordinary size, since
                its numbers are no closer than 2^-9. Norms are in bfloat16 then.
            name: of the target, where others look for it; ``None`` is the path that it came from.
        """
        narrow = dtype if dtype.itemsize > 1 else torch.bfloat16
        state = self.state_dict()
        weights = {name: tensor.to(dtype if tensor.dim() == 2 else narrow) for name, tensor in state.items()}
        vocab = model_facts.vocab_size(target)
        weights["d2t"] = shortlist - torch.arange(len(shortlist))
        weights["t2d"] = torch.zeros(vocab, dtype=torch.bool).scatter(0, shortlist, True)
        layer = {name: getattr(self.config, name, None) for name in _LAYER_FIELDS}
        if self.kind.window is not None:
            layer |= {"layer_types": [self.kind.name], "sliding_window": self.kind.window, "use_sliding_window": True}
        config = {
            "architectures": ["Eagle3DraftModel"],
            "speculators_model_type": "eagle3",
            "draft_vocab_size": len(shortlist),
            **self.norms._asdict(),
            "target_hidden_size": model_facts.text_config(target).hidden_size,
            "eagle_aux_hidden_state_layer_ids": list(feature_layers),
            "tie_word_embeddings": False,
            "speculators_config": {
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 4}],
                "verifier": {
                    "name_or_path": target.name_or_path if name is None else name,
                    "architectures": [type(target).__name__],
                },
            },
            "transformer_layer_config": {name: value for name, value in layer.items() if value is not None},
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "model.safetensors")


class Eagle3Drafter:
    """An EAGLE-3 checkpoint with its target; embeddings that are not in the files are the target's.

    Args:
        path: of the folder.
        target: the target's transformers model, the one that it was trained for.
        config: when to stop, how boldly to draw.
        feature_layers: the three layers of the target that are read, numbered as transformers numbers its
            ``hidden_states``, where the files do not say or say it in another way: there are checkpoints that were
            converted with the numbers of layers whose outputs are meant, one less. ``None`` takes those of the files,
            or the three that EAGLE-3 has: 2, half of them, and all but 3.

    Raises:
        FileNotFoundError: there are no such files.
        ValueError: they hold something else, or are for another target.
    """

    #: See :class:`FeatureReader`.
    repetitions: tuple[FeatureModel, dict[int, int]] | None = None

    def __init__(
        self,
        path: str | Path,
        target: Any,
        config: DraftConfig = DraftConfig(),
        feature_layers: Sequence[int] | None = None,
    ) -> None:
        model_facts.check_model(target)
        folder = Path(path)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"path must be a folder with a {name}, got {str(path)!r}")
        written = _read(folder / "config.json", lambda path: json.loads(path.read_text()))
        state = _read(folder / "model.safetensors", load_file)
        self.config, self.model_config = config, _layer_config(written)
        text = model_facts.text_config(target)
        self.feature_layers = _feature_layers(feature_layers, written, text.num_hidden_layers)
        self.vocab_size = model_facts.vocab_size(target)
        shortlist = _targets(state, written, self.vocab_size)
        self.device, self.vocabulary = target.device, None
        if not torch.equal(shortlist, torch.arange(self.vocab_size)):
            self.vocabulary = DraftVocabulary(shortlist.to(target.device), self.vocab_size)
        lengths = [model_facts.context_length(target), self.model_config.max_position_embeddings]
        self.context: int | None = min(length for length in lengths if length is not None)
        embeddings = state.pop("embed_tokens.weight", None)
        if embeddings is None:
            embeddings = target.get_input_embeddings().weight.detach()
        width = self.model_config.hidden_size
        if embeddings.shape != (self.vocab_size, width):
            raise ValueError(
                f"path must be of a drafter whose embeddings are [{self.vocab_size}, {width}] for this target, got "
                f"{list(embeddings.shape)}"
            )
        embeddings = embeddings.to(target.device, target.dtype)
        self.embed: Callable[[Tensor], Tensor] = lambda tokens: functional.embedding(tokens, embeddings)
        if len(self.feature_layers) * text.hidden_size == width:
            raise ValueError(
                "path must be of a drafter whose own outputs are told from what it reads of the target by their width, "
                f"got {width} for both"
            )
        self.network = Eagle3Model(
            self.model_config, len(self.feature_layers), text.hidden_size, len(shortlist), _norms(written)
        )
        self.kind = self.network.kind
        _load(self.network, {name: weight.to(target.dtype) for name, weight in state.items()})
        self.network.to(target.device).eval()
        self.forward: Callable[..., Tensor] = self.network
        self.head: Callable[[Tensor], Tensor] = self.network.head

    @property
    def siblings(self) -> int:
        return self.config.siblings

    def begin(self, prompts: Sequence[Sequence[int]], features: Tensor | None) -> FeatureSession:
        return FeatureSession(self, prompts, features)


def _read(path: Path, reader: Callable[[Path], Any]) -> dict[str, Any]:
    """What a file has by names."""
    try:
        content = reader(path)
    except Exception as error:  # a file that was cut off, or is a pointer to another
        raise ValueError(f"path must have a {path.name} that can be read, got ({error}) of {str(path)!r}") from error
    if not isinstance(content, dict):
        raise ValueError(f"path must have a {path.name} with names in it, got {type(content).__name__}")
    return content


def _norms(written: dict[str, Any]) -> Norms:
    """As the files say it. Readers differ in what they take for a missing ``norm_before_residual``."""
    said: dict[str, Any] = {name: written.get(name, Norms._field_defaults.get(name)) for name in Norms._fields}
    for name, value in said.items():
        if not isinstance(value, bool):
            raise ValueError(f"path must say {name}, true or false, in its config.json, got {value!r}")
    if said["norm_before_fc"] and said["fc_norm"]:
        raise ValueError("path must be of a drafter with norm_before_fc or fc_norm, got both")
    return Norms(**said)


def _layer_config(written: dict[str, Any]) -> Any:
    """The transformers configuration of the layer."""
    layer = written.get("transformer_layer_config")
    if written.get("speculators_model_type") != "eagle3" or not isinstance(layer, dict):
        raise ValueError(
            "path must have an EAGLE-3 config.json of speculators, with a transformer_layer_config, got "
            f"speculators_model_type {written.get('speculators_model_type')!r}"
        )
    kind, rotary = layer.get("model_type", "llama"), layer.get("rope_parameters") or {}
    if kind not in list(_CONFIGS):  # whatever it is
        raise ValueError(f"path must be of a drafter whose layer is one of {list(_CONFIGS)}, got {kind!r}")
    if not isinstance(rotary, dict) or any(isinstance(value, dict) for value in rotary.values()):
        raise ValueError(f"path must be of a drafter with rope_parameters of one kind, by names, got {rotary!r}")
    try:
        config = _CONFIGS[kind](**{name: value for name, value in layer.items() if name != "model_type"})
    except Exception as error:  # transformers' own checks
        raise ValueError(f"path must have a transformer_layer_config of {kind}, got ({error})") from error
    rotary = config.rope_parameters or {}
    partial = rotary.get("partial_rotary_factor", layer.get("partial_rotary_factor"))
    known = {
        "num_hidden_layers": (config.num_hidden_layers, 1),
        "hidden_act": (config.hidden_act, "silu"),
        "partial_rotary_factor": (1.0 if partial is None else partial, 1.0),
    }
    for name, (got, expected) in known.items():
        if got != expected:
            raise ValueError(f"path must be of a drafter with {name} {expected}, got {got!r}")
    if (frequencies := rotary.get("rope_type", "default")) not in _ROTARY:
        raise ValueError(f"path must be of a drafter with rotary frequencies of {_ROTARY}, got {frequencies!r}")
    return config


def _kind(config: Any) -> Kind:
    """What the layer attends to."""
    name, window = (getattr(config, "layer_types", None) or [WHOLE.name])[0], getattr(config, "sliding_window", None)
    if name == WHOLE.name:
        return WHOLE
    if name != "sliding_attention" or not isinstance(window, int) or window < 1:
        raise ValueError(
            "path must be of a drafter with full_attention, or with sliding_attention and its sliding_window (of Qwen3 "
            f"with use_sliding_window too), got {name!r} and {window!r}"
        )
    return Kind(name, window)


def _feature_layers(requested: Sequence[int] | None, written: dict[str, Any], count: int) -> tuple[int, ...]:
    """The layers of the target that are read, of which it has ``count``."""
    name, layers = "feature_layers", requested
    if layers is None and (layers := written.get("eagle_aux_hidden_state_layer_ids")) is not None:
        name = "path"
    layers = (2, count // 2, count - 3) if layers is None else layers
    # The output of the last layer before the norm, number `count` for others, is none of transformers' hidden states.
    found = ids_of(name, layers, count, "layers of this target")
    if not found:
        raise ValueError(f"{name} must hold layers of this target, got none")
    return tuple(found)


def _targets(state: dict[str, Tensor], written: dict[str, Any], vocab_size: int) -> Tensor:
    """int64 [Vd]: the target id of every draft id; taken from the weights."""
    offsets, mask = state.pop("d2t", None), state.pop("t2d", None)
    head = state.get("lm_head.weight")
    rows = written.get("draft_vocab_size") if head is None or head.dim() != 2 else len(head)
    if (said := written.get("draft_vocab_size", rows)) != rows:
        raise ValueError(f"path must have a head of its draft_vocab_size, {said}, got {rows} rows")
    if offsets is None:
        if rows != vocab_size:
            raise ValueError(f"path must have a d2t for its {rows} draft ids of the target's {vocab_size}, got none")
        return torch.arange(vocab_size)
    if offsets.dim() != 1 or len(offsets) == 0:
        raise ValueError(f"path must have a d2t [{rows}], got {describe(offsets)}")
    targets = torch.arange(len(offsets)) + offsets.long()
    if len(offsets) != rows or len(targets.unique()) != rows or targets.min() < 0 or targets.max() >= vocab_size:
        raise ValueError(
            f"path must have a d2t [{rows}] to ids of this target, in [0, {vocab_size}) and each once, got "
            f"{len(offsets)} to {int(targets.min())} .. {int(targets.max())}"
        )
    if mask is not None and not torch.equal(mask.nonzero()[:, 0], targets.sort().values):
        raise ValueError("path must have a t2d that marks the target ids of its d2t, got others")
    return targets


def _load(network: Eagle3Model, state: dict[str, Tensor]) -> None:
    """Use the weights, which have to be those of the network and no others.

    Raises:
        ValueError: they are not.
    """
    expected = {name: list(weight.shape) for name, weight in network.state_dict().items()}
    found = {name: list(weight.shape) for name, weight in state.items()}
    if expected != found:
        wrong = {
            name: found.get(name) for name in sorted(expected.keys() | found) if expected.get(name) != found.get(name)
        }
        wanted = {name: expected.get(name) for name in wrong}
        raise ValueError(
            f"path must hold the weights {wanted} of an EAGLE-3 drafter for this target, got {wrong}; its config has "
            f"{network.norms}"
        )
    network.load_state_dict(state, assign=True)
