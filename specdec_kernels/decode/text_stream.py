"""The text of tokens as they come."""

from __future__ import annotations

import re
from typing import Any

from tokenizers.decoders import DecodeStream

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class TextStream:
    """Pieces of text that, joined, are what the tokenizer makes of all tokens, special ones left out.

    A piece ends with a character: tokens that end within one are held back, at most until the end. So are tokens that
    are single bytes, since a tokenizer that falls back to them takes back all of a run in which one is wrong, and all
    tokens where the tokenizer is none of the ``tokenizers`` library.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._stream: DecodeStream | None = None if self._backend is None else DecodeStream(skip_special_tokens=True)
        self._silent = {token for name, token in tokenizer.get_vocab().items() if _BYTE.fullmatch(name)}
        self._silent.update(tokenizer.all_special_ids)
        self._tokens: list[int] = []
        self._pending: list[int] = []
        self._shown = ""

    def add(self, token: int) -> str:
        """What may be shown once there is this token; often nothing."""
        self._tokens.append(token)
        self._pending.append(token)
        if self._backend is None or self._stream is None or token in self._silent:
            return ""
        pending, self._pending = self._pending, []
        try:
            piece: str = self._stream.step(self._backend, pending) or ""
        except Exception:  # tokenizers has no other class: what the decoder had made of earlier tokens it takes back
            self._stream, piece = None, ""
        self._shown += piece
        return piece

    def end(self) -> str:
        """The rest. After a new line the whole text, where the decoder took back what it had made of its beginning."""
        whole: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return whole.removeprefix(self._shown) if whole.startswith(self._shown) else "\n" + whole
