"""The command line, with a tokenizer and a model that are made here: text, streams, exit codes."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_cpp_stand_in import LlamaCpp
from rich.console import Console
from small_tokenizers import byte_fallback, byte_level, of_tokens
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from specdec_kernels.cli import compare, main
from specdec_kernels.cli import generate as commands
from specdec_kernels.cli import models as loading
from specdec_kernels.cli.tree_view import Watched
from specdec_kernels.decode import Token, TreeDraft, text_stream
from specdec_kernels.decode.drafters import NGramDrafter, SharedHistory
from specdec_kernels.decode.text_stream import TextStream
from specdec_kernels.version import __version__


def contracting():
    """Its decoder takes back a word when it sees the next one."""
    tokenizer = Tokenizer(models.WordLevel(vocab={"will": 0, " not": 1, "?": 2}, unk_token="?"))
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("will not", "won't")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = {make.__name__: make() for make in (byte_level, byte_fallback)}


def pieces(tokenizer, tokens):
    text = TextStream(tokenizer)
    return [*(text.add(token) for token in tokens), text.end()]


# --- the text of tokens as they come ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(list(TOKENIZERS)), st.data())
def test_pieces_are_the_text_of_all_tokens(name, data):
    """Of characters, halves of them and special tokens, in any order, cut anywhere."""
    tokenizer = TOKENIZERS[name]
    tokens = []
    for _ in range(data.draw(st.integers(0, 8))):
        character = data.draw(st.sampled_from(["é", "🙂", "日", "\ufffd", "a", " ", "\n"]))
        whole = tokenizer.encode(character, add_special_tokens=False)
        if name == "byte_fallback":
            whole = list(character.encode())
        tokens += data.draw(st.sampled_from([whole, whole[:-1], [data.draw(st.integers(0, len(tokenizer) - 1))]]))
    tokens = tokens[: data.draw(st.integers(0, len(tokens)))]
    assert "".join(pieces(tokenizer, tokens)) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_pieces_come_as_soon_as_a_character_is_whole():
    tokenizer = TOKENIZERS["byte_level"]
    tokens = tokenizer.encode("aé🙂")
    assert pieces(tokenizer, tokens) == ["a", "", "é", "", "", "", "🙂", ""]
    assert pieces(tokenizer, tokens[:-1]) == ["a", "", "é", "", "", "", "\ufffd"]


@pytest.mark.parametrize("between", [[], [TOKENIZERS["byte_fallback"].eos_token_id]])
def test_bytes_are_held_back_until_none_can_spoil_them(between):
    """A wrong byte spoils all bytes before it in its run, over special tokens."""
    tokenizer = TOKENIZERS["byte_fallback"]
    tokens = [*"é".encode(), *between, 0x94, 256]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "\ufffd\ufffd\ufffd a"
    assert "".join(pieces(tokenizer, tokens)) == "\ufffd\ufffd\ufffd a"


def test_a_word_that_a_decoder_takes_back():
    """It stands there already; what is right follows."""
    assert contracting().decode([0, 1]) == "won't"
    assert pieces(contracting(), [0, 1]) == ["will", "", "\nwon't"]
    assert pieces(contracting(), [0, 1, 2]) == ["will", "", "", "\nwon't?"]


def test_a_tokenizer_without_streams_gives_its_text_at_the_end():
    class Slow:
        all_special_ids = ()

        def get_vocab(self):
            return {}

        def decode(self, tokens, **_):
            return "".join(map(chr, tokens))

    assert pieces(Slow(), [104, 105]) == ["", "", "hi"]


def test_a_token_costs_the_same_wherever_it_stands(monkeypatch):
    """What is decoded a token does not grow with the text."""
    decoded = []

    class Counting:
        def __init__(self, stream):
            self.stream = stream

        def step(self, backend, tokens):
            decoded.append(len(tokens))
            return self.stream.step(backend, tokens)

    tokenizer = TOKENIZERS["byte_level"]
    real, whole = text_stream.DecodeStream, []
    monkeypatch.setattr(text_stream, "DecodeStream", lambda **named: Counting(real(**named)))
    monkeypatch.setattr(tokenizer, "decode", lambda tokens, **_: whole.append(len(tokens)) or "")
    text = TextStream(tokenizer)
    for token in tokenizer.encode("é" * 100):
        text.add(token)
    assert decoded == [1] * 200
    assert whole == []


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"), TOKENIZERS["byte_level"])


def saved(path, tokenizer):
    """A model whose greedy text goes through the bytes of one line, then ends."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, eos_token_id=tokenizer.eos_token_id, bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    after = [*tokenizer.encode(TEXT), tokenizer.eos_token_id]
    assert len(set(after)) == len(after)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.zero_().fill_diagonal_(1.0)
        model.lm_head.weight.zero_()
        for token, following in pairwise([tokenizer.encode("?")[0], *after]):
            model.lm_head.weight[following, token] = 1.0
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def as_gpt2_saved_it(path):
    """The tokenizer of a folder in a file of tokens and one of merges, in place of tokenizer.json."""
    tokens = json.loads((path / "tokenizer.json").read_text())["model"]["vocab"]
    (path / "vocab.json").write_text(json.dumps(tokens))
    (path / "merges.txt").write_text("#version: 0.2\n")
    (path / "tokenizer.json").unlink()
    named = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**named, "tokenizer_class": "GPT2Tokenizer"}))


@pytest.mark.parametrize("layout", ["tokenizer.json", "vocab.json"])
def test_a_drafting_model_with_another_tokenizer(checkpoint, tmp_path, layout):
    """The bytes are counted from the other end: its ids are translated, or none would be accepted."""
    other = saved(tmp_path, of_tokens(sorted(ByteLevel.alphabet(), reverse=True), end=True))
    if layout == "vocab.json":
        as_gpt2_saved_it(tmp_path)
    for kind in ("model", "tree"):
        result = generate(
            checkpoint, "--num-draft", 3, "--temperature", 0, drafter=("--drafter", kind, "--draft", other)
        )
        assert result.exit_code == 0, result.output
        assert TEXT in result.stdout
        assert float(re.search(r"accepted by position: (\S+)", result.stderr)[1]) > 0.5
        assert "no tokenizer" not in result.stderr


def test_a_drafting_model_without_a_tokenizer_is_told(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    result = generate(checkpoint, drafter=("--drafter", "model", "--draft", tmp_path))
    assert (result.exit_code, result.stdout) == (0, TEXT + "\n"), result.output
    assert f"{tmp_path} has no tokenizer: it is taken to have the target's\n" in result.stderr


def test_a_drafting_model_beside_a_target_of_images(checkpoint, tmp_path):
    """Whose configuration has the size of the vocabulary in the part for text alone."""
    tokenizer = TOKENIZERS["byte_level"]
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, boi_token_index=6, eoi_token_index=7,
        image_token_index=5,
    )  # fmt: skip
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for drafter in (("--drafter", "none"), ("--drafter", "model", "--draft", checkpoint)):
        result = generate(tmp_path, "--max-new-tokens", 4, drafter=drafter)
        assert result.exit_code == 0, result.output
        assert "4 tokens" in result.stderr


#: No byte occurs twice; a tab, and what a console would take for markup or an emoji.
TEXT = "[x]\té:ok🙂日."


def run(*arguments):
    return CliRunner().invoke(main.app, [str(argument) for argument in arguments])


def generate(checkpoint, *options, prompt=("?",), drafter=("--drafter", "lookup")):
    return run("generate", *prompt, "--target", checkpoint, *drafter, "--precision", "float32", *options)


@pytest.mark.parametrize(
    "options", [(), ("--drafter", "none"), ("--num-draft", 2, "--rule", "token"), ("--fixed-rows", 4)]
)
def test_the_text_alone_goes_to_the_standard_output(checkpoint, options):
    result = generate(checkpoint, *options)
    assert result.exit_code == 0, result.output
    assert result.stdout == TEXT + "\n"
    assert "tokens/s" in result.stderr


@pytest.mark.parametrize("drafter", ["lookup", "merged", "auto"])
def test_a_history_is_looked_up_the_next_time(checkpoint, tmp_path, drafter):
    """The text is the same, in fewer steps, and the file is of this tokenizer."""
    path, rates = tmp_path / "history", []
    model = () if drafter == "lookup" else ("--draft", checkpoint)
    for _ in range(2):
        result = generate(checkpoint, "--history", path, "--num-draft", 8, "--drafter", drafter, *model)
        assert result.stdout == TEXT + "\n", result.output
        rates.append(float(re.search(r"([0-9.]+) tokens a step", result.stderr)[1]))
    assert rates[1] > 3
    assert rates[0] == 1 or drafter != "lookup"
    assert [file.name for file in tmp_path.iterdir()] == ["history"]
    SharedHistory(tokenizer="another").save(path)
    result = generate(checkpoint, "--history", path)
    assert result.exit_code == 2
    assert "must be of the tokenizer" in result.stderr


@pytest.mark.parametrize("length", range(1, len(TEXT.encode()) + 1))
def test_characters_cut_in_half_are_those_of_the_tokenizer(checkpoint, length):
    tokenizer = TOKENIZERS["byte_level"]
    result = generate(checkpoint, "--max-new-tokens", length)
    assert result.stdout == tokenizer.decode(tokenizer.encode(TEXT)[:length]) + "\n"


def test_long_lines_are_not_wrapped(checkpoint):
    """At this temperature the text is noise: few new lines, many halves of characters."""
    result = generate(checkpoint, "--temperature", 1e4, "--max-new-tokens", 700, "--drafter", "none")
    assert max(map(len, result.stdout.split("\n"))) > 100


def test_a_terminal_sees_who_wrote_what():
    class Session:
        tokenizer = TOKENIZERS["byte_level"]

    first, second = Session.tokenizer.encode("a\t")
    tokens = [Token(0, first, True), Token(0, second, False)]
    for options, text in (
        ({"force_terminal": True}, "\x1b[32ma\x1b[0m\x1b[1;33m\t\x1b[0m\n"),
        ({"force_terminal": True, "no_color": True}, "a\t\n"),
        ({}, "a\t\n"),
    ):
        shown = io.StringIO()
        commands.print_stream(Session(), iter(tokens), Console(file=shown, **options))
        assert shown.getvalue() == text


def test_comparing_and_measuring_keep_text_and_notes_apart(checkpoint, monkeypatch):
    result = generate(checkpoint, "--compare")
    assert result.exit_code == 0, result.output
    assert result.stdout == TEXT + "\n"
    assert "Compared with plain decoding, this text came" in result.stderr
    monkeypatch.setattr(compare, "PROMPTS", {"chat": ["?"]})
    result = generate(checkpoint, "--compare", prompt=())
    assert result.exit_code == 0, result.output
    assert TEXT in result.stderr
    assert TEXT not in result.stdout
    assert "Compared with plain decoding, text came" in result.stdout


def test_short_texts_are_compared(checkpoint):
    result = generate(checkpoint, "--compare", "--max-new-tokens", 2)
    assert result.exit_code == 0, result.output
    assert result.stdout == TEXT[:2] + "\n"
    assert "Compared with plain decoding, this text came" in result.stderr


@pytest.fixture(scope="module")
def breaking(checkpoint, tmp_path_factory):
    """The same model, which makes nan of the second token of its text."""
    path = tmp_path_factory.mktemp("breaking")
    shutil.copytree(checkpoint, path, dirs_exist_ok=True)
    model = LlamaForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        model.model.embed_tokens.weight[TOKENIZERS["byte_level"].encode(TEXT[1])[0]] = torch.nan
    model.save_pretrained(path)
    return str(path)


def test_a_text_without_a_token_has_nothing_to_compare(breaking):
    """The drafts of the first step have what the model makes nan of."""
    drafter = "--drafter", "model", "--draft", breaking
    result = generate(breaking, "--compare", "--num-draft", 4, drafter=drafter)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("error: there is nothing to compare: texts ended without a token")


def test_a_pictured_tree_has_what_the_text_has(checkpoint, breaking):
    for model in (checkpoint, breaking):
        drafter = "--drafter", "tree", "--draft", checkpoint
        result = generate(model, "--show-tree", "--num-draft", 4, "--max-new-tokens", 5, drafter=drafter)
        assert result.exit_code == 0, result.output
        tree = result.stderr.split("…\n")[1]
        drafts, first = [repr(character) for character in TEXT[:4]], TOKENIZERS["byte_level"].decode([0])
        assert all(draft in tree for draft in drafts)
        assert (repr(first) in tree) is False
        assert len(tree.splitlines()) == (5 if model == checkpoint else 4)


def test_a_tree_is_the_best_by_what_the_text_took_of_it():
    """Its last step ends within, at the third of five tokens: more than the first step has, none of them drawn."""
    watched = Watched(NGramDrafter())
    tree = TreeDraft(torch.tensor([[0, 5, 6, 7, 8]]), torch.tensor([[-1, 0, 1, 2, 3]]))
    watched.steps = [(tree, [5, 9]), (tree, [5, 6, 7, 8, 9])]
    assert watched.best([5, 9]) == (tree, [5], 9)
    assert watched.best([5, 9, 5, 6, 7]) == (tree, [5, 6, 7], None)
    assert watched.best([5, 9, 5]) == (tree, [5], 9)
    assert watched.best([]) == (tree, [], None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--temperature", -1), "temperature must be finite and not negative, got -1.0"),
        (("--temperature", "nan"), "temperature must be finite and not negative, got nan"),
        (("--top-k", -3), "top_k must be at least 1"),
        (("--top-p", 0), "top_p must be in (0, 1]"),
        (("--min-p", 1.5), "min_p must be in [0, 1]"),
        (("--max-new-tokens", 0), "max_new_tokens must be at least 1, got 0"),
        (("--drafter", "model"), "drafter='model' needs a drafting model for"),
        (("--drafter", "medusa"), "drafter='medusa' has weights for smollm2 alone, got"),
        (("--drafter", "eagle3"), "drafter='eagle3' has weights for smollm2 alone, got"),
        (("--drafter", "model", "--draft", "/nowhere"), "a model must be 'smollm2' or the path of a transformers"),
        (("--draft", "/nowhere"), "draft must not be given with drafter='lookup', which has no drafting model"),
        (("--target", "/no/[red]where"), "got '/no/[red]where'"),
        (("--target", "/nowhere", "--drafter", "auto"), "a model must be 'smollm2' or the path of a transformers"),
        (("--target", "/nowhere.GGUF", "--drafter", "auto"), "or of a GGUF file, got '/nowhere.GGUF'"),
        (("--show-tree", "--compare"), "show_tree needs a prompt, a drafter, and no --compare"),
        (("--show-tree", "--drafter", "none"), "show_tree needs a prompt, a drafter, and no --compare"),
        (
            ("--compare", "--drafter", "none"),
            "drafter must be one that drafts where it is compared with plain decoding",
        ),
        (
            ("--fixed-rows", 4, "--drafter", "tree"),
            "fixed_rows must be left out with drafter='tree', which drafts trees",
        ),
        (("--fixed-rows", 4, "--drafter", "merged"), "fixed_rows must be left out with drafter='merged'"),
        (("--history", "/tmp/h", "--compare"), "history needs a prompt, and no --compare"),
        (
            ("--history", "/tmp/h", "--drafter", "none"),
            "history needs a drafter that looks texts up (auto, lookup, merged)",
        ),
        (("--history", "/no/folder/h"), "history must be a file in a folder that there is, got /no/folder/h"),
    ],
)
def test_what_is_wrong_is_one_line_before_a_model_is_loaded(checkpoint, monkeypatch, options, message):
    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("a model was loaded"))
    result = generate(checkpoint, *options)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_gguf_file_is_run_by_llama_cpp(checkpoint, monkeypatch, tmp_path):
    path = tmp_path / "model.gguf"
    path.touch()
    library = LlamaCpp(LlamaForCausalLM.from_pretrained(checkpoint).eval())
    monkeypatch.setitem(sys.modules, "llama_cpp", library)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: TOKENIZERS["byte_level"])
    for options in ((), ("--drafter", "none"), ("--drafter", "model", "--draft", checkpoint), ("--compare",)):
        result = generate(path, *options)
        assert result.exit_code == 0, result.output
        assert result.stdout == TEXT + "\n"
    assert max(library.reads) > 1, "drafts"
    with monkeypatch.context() as without_memory:
        without_memory.setattr(library, "llama_init_from_model", lambda *_: None)
        result = generate(path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: llama.cpp gave no context for 1 requests of")
    for options, message in (
        (("--fixed-rows", 8), "fixed_rows must be left out for a GGUF target, got 8"),
        (
            ("--drafter", "tree"),
            "drafter must be auto, model, eagle3, lookup or none for a GGUF target, which takes no trees",
        ),
        (("--drafter", "auto"), f"drafter='auto' needs a drafting model for {path}"),
        (
            ("--target", "/nowhere.gguf"),
            "a target must be 'smollm2' or the path of a transformers checkpoint or of a GGUF file",
        ),
    ):
        result = generate(path, *options)
        assert (result.exit_code, result.stdout) == (2, "")
        assert message in result.stderr


def test_measuring_no_drafter_is_an_error():
    result = run("generate", "--drafter", "none")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: drafter must be one that drafts")


def test_an_empty_prompt_is_an_error():
    result = run("generate", "")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: prompt must not be empty: leave it out to measure the built-in prompts\n"


def is_one_line(result, message):
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.output
    assert result.stderr.startswith("error: ")
    assert message in result.stderr


def test_a_checkpoint_that_is_none_is_one_line(tmp_path):
    is_one_line(generate(tmp_path), str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        ("model.safetensors", None),
        ("tokenizer_config.json", b"[]"),
        ("config.json", b'{"model_type": "llama", "hidden_size": "many"}'),
    ],
)
def test_files_that_cannot_be_read_are_one_line(checkpoint, tmp_path, name, content):
    """Of a target as of a drafting model; None is the first half of the file."""
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    file = tmp_path / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if content is None else content)
    message = f"a model or tokenizer must have files that can be read, got {tmp_path} ("
    is_one_line(generate(tmp_path), message)
    is_one_line(generate(checkpoint, drafter=("--drafter", "model", "--draft", tmp_path)), message)


def test_weights_of_the_package_that_cannot_be_read_are_one_line(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "weights").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    monkeypatch.setattr(loading, "weights", lambda name: tmp_path / "weights")
    monkeypatch.setattr(loading, "_is_smollm2", lambda target: True)
    for kind in ("model", "medusa", "eagle3"):
        is_one_line(generate(checkpoint, drafter=("--drafter", kind)), str(tmp_path / "weights"))


@pytest.mark.parametrize("template", ["{{ raise_exception('a system prompt is needed') }}", "{{ 1 + messages }}", "{{"])
def test_a_chat_template_that_fails_is_one_line(checkpoint, tmp_path, template):
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(template)
    is_one_line(generate(tmp_path), f"the chat template of {tmp_path} must take one message, of the user, got ")


def test_a_history_that_is_an_array_is_one_line(checkpoint, tmp_path):
    np.save(tmp_path / "history.npy", np.zeros(3))
    message = f"path must be of a file that SharedHistory.save wrote, got {tmp_path / 'history.npy'}"
    is_one_line(generate(checkpoint, "--history", tmp_path / "history.npy"), message)


@pytest.mark.parametrize(
    ("error", "said"), [(MemoryError(), "MemoryError"), (TypeError("x must be an int, got None"), "x must be an int")]
)
def test_errors_without_a_text_and_of_types_are_one_line(checkpoint, monkeypatch, error, said):
    def fails(*_):
        raise error

    monkeypatch.setattr(loading, "load_model", fails)
    is_one_line(generate(checkpoint), f"error: {said}")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("generate", "x", "--rule", "best"), "--rule"),
        (("generate", "x", "--num-draft", -1), "--num-draft"),
        (("generate", "x", "--fixed-rows", 0), "--fixed-rows"),
        (("bench", "sleep"), "sleep"),
    ],
)
def test_unknown_choices_are_usage_errors(arguments, named):
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Invalid value for" in result.stderr
    assert named in result.stderr


def test_help_shows_defaults():
    shown = " ".join(re.sub(r"[│╭╰─╮╯]", " ", run("generate", "--help").stdout).split())
    for default in (
        "smollm2", "auto", "128", "block", "bfloat16", "1.0", "0.0", "(chosen step by step; of a tree, 15)",
        "120.0", "(0; where the built-in prompts are measured, 0 and 0.8)", "(for smollm2 the one trained here)",
    ):  # fmt: skip
        assert f"[default: {default}]" in shown
    assert "eagle3: an EAGLE-3 drafter, for smollm2 alone" in shown
    assert "[default: (nothing is written)]" in " ".join(run("bench", "--help").stdout.replace("│", " ").split())


def test_the_version():
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"specdec-kernels {__version__}\n")


@pytest.mark.parametrize("told", [False, True])
def test_measurements_are_written_only_where_told(tmp_path, monkeypatch, told):
    from specdec_kernels.bench import run as kernels
    from specdec_kernels.bench.cases import cases

    small = next(iter(cases(True)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kernels, "cases", lambda quick: [small])
    monkeypatch.setattr(kernels, "SECONDS", 0.0)
    result = run("bench", *(["--out", tmp_path / "results"] if told else []))
    assert result.exit_code == 0, result.output
    head, line = result.stdout.splitlines()[:2]
    assert "stream" in head
    assert str(small.vocab) in line
    assert max(len(head), len(line)) <= 80
    written = sorted(path.name for path in tmp_path.rglob("*.*"))
    assert written == (["cpu.json", "cpu.png"] if told else [])


def test_a_directory_that_cannot_be_is_an_error_before_anything_is_timed(tmp_path):
    (tmp_path / "file").touch()
    result = run("bench", "--out", tmp_path / "file")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_errors_of_the_selftest():
    result = run("selftest", "--backend", "abacus")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: backend must be one of")
