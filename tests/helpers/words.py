"""What is not to be written, and what the field says instead; see CONTRIBUTING.md, "Words".

    python tests/helpers/words.py  # part of `make lint`

Words of the table that are ordinary English elsewhere (text, place, room, look, held, taken, given, direct, found,
above, enter) only a reader can judge: they are not here.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: Words, in prose or inside of identifiers, and what to write.
WORDS = {
    "law": "distribution",
    "laws": "distributions",
    "coin": "uniform",
    "coins": "uniforms",
    "reach": "path_prob, the acceptance probability of the path",
    "team": "block, cluster or group of threads",
    "teams": "blocks, clusters or groups of threads",
    "straight": "fast path, native entry point",
    "edits": "logit adjustments",
    "edited": "with logit adjustments",
    "crew": "cooperating blocks, group of blocks",
    "crews": "cooperating blocks, groups of blocks",
    "recall": "load_state",
    "remember": "store_state",
    "cooling": "temperature_scale",
}
#: Names and phrases as they stand, and what to write.
EXACTLY = {
    r"[Ee]mitted token": "bonus token, recovered token",
    r"\bAside\b(?! from)": "CallerTask",
    r"\bOutlook\b": "PrefetchHint",
    r"\bTaken\b": "ArgumentChecker",
    "some_large": "estimate_max",
    "one_by_one": "verify_token_rule",
    "all_together": "verify_block_rule",
    "pays_ahead": "should_precompute",
    "at_rest": "zeroed_counters",
    r"\bedit_(ids|counts|bias)": "adjusted_ids, id_counts, id_bias",
    "largest_reaching": "threshold_for_mass",
    "RuleDrafter": "CallableDrafter",
    "LookupDrafter": "NGramDrafter",
    "FirstOf": "FallbackDrafter",
    r"\bDrafting\(": "DraftConfig",
    r"\bhow=": "method=",
    r"\bindependent=": "count_independent=",
    r"(?<!_)\b(repetition|presence|frequency)=": "repetition_penalty, presence_penalty, frequency_penalty",
    r"\bkeep_path\b": "commit_path",
    "gone down to": "visited, evaluated",
    r"\bas ever\b|nobody waits for anybody|held to its word": "what happens, in one plain sentence",
}
#: Names that other projects gave.
OTHERS = ("_verify_coins",)
#: Where they are still found. This can only shrink: what is clean has to leave the list.
REMAINING: tuple[str, ...] = ()


def patterns() -> dict[re.Pattern[str], str]:
    """What to look for, and what to write."""
    words = {
        rf"(?:(?<![A-Za-z])[{word[0].upper()}{word[0]}]|(?<=[a-z]){word[0].upper()}){word[1:]}(?![a-z])": instead
        for word, instead in WORDS.items()
    }
    return {re.compile(pattern): instead for pattern, instead in (words | EXACTLY).items()}


def found(text: str) -> Iterator[tuple[int, str, str]]:
    """(line, word, what to write) of each in a text."""
    for name in OTHERS:
        text = text.replace(name, "")
    for pattern, instead in patterns().items():
        for match in pattern.finditer(text):
            yield text.count("\n", 0, match.start()) + 1, match[0], instead


def files() -> Iterator[Path]:
    """Everything that is written here, but for this and its test, and for what models are asked."""
    suffixes = (".py", ".pyi", ".md", ".h", ".cpp", ".cu", ".toml")
    for folder, folders, names in os.walk(ROOT):  # which follows no links
        folders[:] = sorted(each for each in folders if each[0] != "." and each not in ("build", "results", "data"))
        for path in (Path(folder, name) for name in sorted(names)):
            written = path.suffix in suffixes or path.name == "CMakeLists.txt"
            if written and path.name[0] != "." and path.name not in ("words.py", "test_words.py", "prompts.py"):
                yield path.relative_to(ROOT)


def complaints() -> list[str]:
    """A line for each word where none should be, and for each folder that has none any more."""
    wrong, unclean = [], set()
    for path in files():
        remaining = next((each for each in REMAINING if path.is_relative_to(each)), None)
        for number, word, instead in found((ROOT / path).read_text()):
            unclean.add(remaining)
            if remaining is None:
                wrong.append(f"{path}:{number}: {word!r}: write {instead}")
    clean = [each for each in REMAINING if each not in unclean]
    return wrong + [f"{each} is clean: take it off the list in tests/helpers/words.py" for each in clean]


if __name__ == "__main__":
    print(*(said := complaints()), sep="\n")
    sys.exit(bool(said))
