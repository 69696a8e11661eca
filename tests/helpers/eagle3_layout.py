"""The layout of EAGLE-3 checkpoints, written out: what drafters of it are held against."""

from __future__ import annotations

import json
import math

import torch
from safetensors import safe_open


@torch.no_grad()
def hidden_states(model, tokens, layers):
    """[T, layers * H]: the outputs of some layers side by side."""
    states = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    return torch.cat([states[layer][0] for layer in layers], -1)


class Reference:
    """The layout, written out: every row alone, every key of its history, in float64."""

    def __init__(self, folder, target):
        self.config = json.loads((folder / "config.json").read_text())
        with safe_open(folder / "model.safetensors", "pt") as file:
            self.weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.weights = {name: w.double() if w.is_floating_point() else w for name, w in self.weights.items()}
        self.vocab = target.config.vocab_size
        self.weights.setdefault("embed_tokens.weight", target.get_input_embeddings().weight.detach().double())
        self.layer = layer = self.config["transformer_layer_config"]
        rope = layer.get("rope_parameters", layer)
        frequencies = rope["rope_theta"] ** (-torch.arange(0, layer["head_dim"], 2).double() / layer["head_dim"])
        if rope.get("rope_type") == "llama3":
            frequencies = torch.tensor([self.stretched(float(f)) for f in frequencies], dtype=torch.float64)
        self.frequencies = frequencies
        self.window = layer["sliding_window"] if layer.get("layer_types") == ["sliding_attention"] else math.inf

    @staticmethod
    def stretched(frequency):
        """Llama 3's: long waves are four times as long, short ones stay, those between are mixed."""
        wave = 2 * math.pi / frequency
        if wave < 16 / 4:
            return frequency
        if wave > 16 / 1:
            return frequency / 4
        smooth = (16 / wave - 1) / (4 - 1)
        return (1 - smooth) * frequency / 4 + smooth * frequency

    def norm(self, name, x):
        return x / (x.square().mean() + self.layer["rms_norm_eps"]).sqrt() * self.weights[name]

    def turned(self, x, position):
        first, second = x.chunk(2)
        angles = position * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin])

    def rows(self, tokens, features):
        """Outputs of rows: ``tokens[i]`` read with ``features[i]``, the target's (three layers) or this network's."""
        own, keys, values, outputs = "layers.0.", [], [], []
        w = self.weights
        width, size = self.layer["hidden_size"], self.layer["head_dim"]
        group = self.layer["num_attention_heads"] // self.layer["num_key_value_heads"]
        for position, (token, feature) in enumerate(zip(tokens, features, strict=True)):
            hidden = feature
            if feature is None:
                hidden = outputs[-1]
                if self.config.get("norm_output"):
                    hidden = self.norm("norm.weight", hidden)
            elif len(feature) != width:
                if self.config.get("norm_before_fc"):
                    feature = self.norm("input_norm.weight", feature)
                if self.config.get("fc_norm"):
                    states = feature.chunk(3)
                    feature = torch.cat([self.norm(f"fc_norm.{n}.weight", state) for n, state in enumerate(states)])
                hidden = w["fc.weight"] @ feature
            embedded = self.norm(own + "input_layernorm.weight", w["embed_tokens.weight"][token])
            normed = self.norm(own + "hidden_norm.weight", hidden)
            x = torch.cat([embedded, normed])
            heads = {n: (w[f"{own}self_attn.{n}_proj.weight"] @ x).view(-1, size) for n in "qkv"}
            if own + "self_attn.q_norm.weight" in w:
                heads |= {
                    n: torch.stack([self.norm(f"{own}self_attn.{n}_norm.weight", h) for h in heads[n]]) for n in "qk"
                }
            keys.append([self.turned(h, position) for h in heads["k"]])
            values.append(heads["v"])
            seen = slice(int(max(0, position + 1 - self.window)), None)
            attended = []
            for head, query in enumerate(heads["q"]):
                shared = head // group
                scores = [self.turned(query, position) @ key[shared] for key in keys[seen]]
                weights = (torch.stack(scores) / math.sqrt(size)).softmax(0)
                attended.append(sum(p * value[shared] for p, value in zip(weights, values[seen], strict=True)))
            residual = normed if self.config["norm_before_residual"] else hidden
            x = residual + w[own + "self_attn.o_proj.weight"] @ torch.cat(attended)
            y = self.norm(own + "post_attention_layernorm.weight", x)
            gate, up = w[own + "mlp.gate_proj.weight"] @ y, w[own + "mlp.up_proj.weight"] @ y
            outputs.append(x + w[own + "mlp.down_proj.weight"] @ (gate * gate.sigmoid() * up))
        return outputs

    def logits(self, output):
        """Over the target's ids."""
        draft = self.weights["lm_head.weight"] @ self.norm("norm.weight", output)
        ids = torch.arange(len(draft)) + self.weights["d2t"]
        return torch.full((self.vocab,), -torch.inf, dtype=torch.float64).scatter(0, ids, draft)
