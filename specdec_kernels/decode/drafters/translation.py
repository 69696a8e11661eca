"""From one tokenizer's ids to another's, by the bytes of the text that they stand for."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary:
    """What the tokens of a tokenizer stand for.

    Args:
        tokenizer: of transformers, byte-level (GPT-2, Llama 3, Qwen) or with SentencePiece's sign for a space (Llama 2,
            Gemma, T5).

    Raises:
        ValueError: it is of another kind.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.byte_level = _is_byte_level(tokenizer)
        special = set(tokenizer.all_special_ids)
        names: dict[str, int] = tokenizer.get_vocab()
        added: set[int] = set(tokenizer.get_added_vocab().values())
        self.texts: dict[int, bytes] = {}
        """By id; special tokens are not among them, nor what is no whole piece of text."""
        self.ids: dict[bytes, int] = {}
        """The other way round: one id of each text, of several the lowest, and no byte where there is a letter."""
        fallbacks = []
        for name, token in sorted(names.items(), key=lambda item: item[1]):
            if token in special:
                continue
            text = name.encode() if token in added else self._text(name)
            if not text:
                continue
            self.texts[token] = text
            if not self.byte_level and _BYTE.fullmatch(name):
                fallbacks.append(token)
            else:
                self.ids.setdefault(text, token)
        for token in fallbacks:
            self.ids.setdefault(self.texts[token], token)
        self._longest = max(map(len, self.ids), default=0)

    def _text(self, name: str) -> bytes:
        if self.byte_level:
            letters = _byte_letters()
            return bytes(letters[letter] for letter in name) if set(name) <= letters.keys() else b""
        if byte := _BYTE.fullmatch(name):
            return bytes([int(byte[1], 16)])
        return name.replace("▁", " ").encode()

    def split(self, text: bytes) -> tuple[list[int], bool]:
        """Tokens of a text, the longest first that fits, and whether they are all of it: bytes without any token are
        left out."""
        tokens, whole, start = [], True, 0
        while start < len(text):
            ends = range(min(len(text), start + self._longest), start, -1)
            end = next((end for end in ends if text[start:end] in self.ids), None)
            if end is None:
                whole, start = False, start + 1
            else:
                tokens.append(self.ids[text[start:end]])
                start = end
        return tokens, whole

    def roles(self) -> dict[str, int]:
        """Special tokens that mean the same in every vocabulary: how a text begins and ends."""
        named = {name: getattr(self.tokenizer, name, None) for name in ("bos_token_id", "eos_token_id")}
        return {name: token for name, token in named.items() if isinstance(token, int)}


class Translation:
    """Tokens of one tokenizer in another one's ids.

    A token is translated alone, whatever stands around it, so that a translation depends on the tokens and not on how
    many of them come at a time: exactly, to the token of the same bytes, else to several tokens of the same text. The
    token that ends a text is translated to the one that ends it there.

    Args:
        source, destination: tokenizers of transformers, or their vocabularies.

    Raises:
        ValueError: as of :class:`Vocabulary`.
    """

    def __init__(self, source: Any, destination: Any) -> None:
        self.source, self.destination = (
            side if isinstance(side, Vocabulary) else Vocabulary(side) for side in (source, destination)
        )
        self._roles = {
            token: self.destination.roles()[name]
            for name, token in self.source.roles().items()
            if name in self.destination.roles()
        }
        self._known: dict[int, tuple[list[int], bool]] = {}

    def reversed(self) -> Translation:
        """The other way."""
        return Translation(self.destination, self.source)

    def of(self, token: int) -> tuple[list[int], bool]:
        """What stands for a token, and whether that is all of its text."""
        if token not in self._known:
            if token in self._roles:
                self._known[token] = [self._roles[token]], True
            elif (text := self.source.texts.get(token)) is None:
                self._known[token] = [], False
            else:
                self._known[token] = self.destination.split(text)
        return self._known[token]

    def tokens(self, tokens: Sequence[int]) -> list[int]:
        """Of each token what stands for it, as far as there is anything."""
        return [other for token in tokens for other in self.of(token)[0]]

    def prompt(self, tokens: Sequence[int]) -> list[int]:
        """Of a prompt, as the other tokenizer cuts its text; what that begins every text with comes first."""
        translated, text = list[int](), b""
        tokenizer = self.destination.tokenizer
        begin = self.destination.roles().get("bos_token_id")
        if begin is not None and tokenizer.encode("")[:1] == [begin]:
            translated.append(begin)
        for token in [*tokens, None]:
            piece = None if token is None else self.source.texts.get(token)
            if piece is not None:
                text += piece
                continue
            if text:
                if not self.source.byte_level:  # SentencePiece begins with a space that is none of the text's
                    text = text.removeprefix(b" ")
                translated += tokenizer.encode(text.decode(errors="ignore"), add_special_tokens=False)
                text = b""
            role = None if token is None else self._roles.get(token)
            if role is not None and translated[-1:] != [role]:
                translated.append(role)
        return translated

    def shared(self, source_size: int, destination_size: int) -> dict[int, int]:
        """The ids that stand for the same bytes, or end a text, one to one; below the sizes of the vocabularies."""
        pairs = {
            token: self.destination.ids[text] for text, token in self.source.ids.items() if text in self.destination.ids
        }
        taken = set(pairs.values())
        pairs |= {token: other for token, other in self._roles.items() if other not in taken}
        return {
            token: other for token, other in sorted(pairs.items()) if token < source_size and other < destination_size
        }


@cache
def _byte_letters() -> dict[str, int]:
    """The letters that byte-level tokenizers write bytes with: printable ones stand for themselves, the others are
    counted from 256 on."""
    alphabet = set(ByteLevel.alphabet())
    own = [byte for byte in range(256) if chr(byte) in alphabet]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + index): byte for index, byte in enumerate(others)}


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.dumps(json.loads(backend.to_str())["decoder"], ensure_ascii=False) if backend is not None else ""
    if '"ByteLevel"' in decoder:
        return True
    if '"Metaspace"' in decoder or "▁" in decoder:
        return False
    raise ValueError(
        "tokenizer must be byte-level or have SentencePiece's sign for a space, to know the text of its tokens, got "
        f"{type(tokenizer).__name__} with the decoder {decoder or 'of Python'}"
    )
