"""Text out of tokens as they come: never half a character, never the start of a stop string that may still complete.

Tokens are decoded in a sliding window that begins before the new ones, as in vLLM and HF's TextStreamer: decoders
treat the first token of a text differently (sentencepiece drops its leading space), so new tokens must never be first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

# Enough of the prompt for its last character to be whole: four bytes and what lies before them.
_CONTEXT_TOKENS = 6
# Bytes that never become a character must not let the window grow forever; no character takes more than four tokens.
_MAX_HELD = 64


class Decoder(Protocol):
    """The part of `Tokenizer` needed here."""

    @property
    def special_ids(self) -> frozenset[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class Detokenizer:
    """Incremental decoding of one sequence: the pieces put together are the text that follows the prompt's."""

    def __init__(self, decoder: Decoder, prompt: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        self._decoder = decoder
        self._skipped = decoder.special_ids if skip_special_tokens else frozenset()
        # Tokens [:_read] are out; [_read:] are held. Special tokens never enter, so they cannot hold anything back.
        self._window, self._before = self._context(
            [t for t in prompt[-4 * _CONTEXT_TOKENS :] if t not in self._skipped]
        )
        self._read = len(self._window)

    def add(self, token: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        if token in self._skipped:
            return ""
        self._window.append(token)
        text = self._decoder.decode(self._window)
        if text.endswith("\ufffd") or len(text) <= len(self._before):
            return self._give_up() if len(self._window) - self._read > _MAX_HELD else ""
        return self._emit(text, len(self._window))

    def flush(self) -> str:
        """What is still held, as it is: incomplete characters come out as U+FFFD."""
        return self._emit(self._decoder.decode(self._window), len(self._window)) if self._window else ""

    def alone(self, token: int) -> str:
        """The text of one token by itself, as logprobs show it."""
        return self._decoder.decode((token,))

    def _context(self, prompt: list[int]) -> tuple[list[int], str]:
        """The last tokens of the prompt and their text, beginning with a whole character.

        A byte-fallback decoder spells a whole run of bytes as U+FFFD if its first character is cut, also what follows.
        """
        found: list[tuple[int, list[int], str]] = []
        for size in range(_CONTEXT_TOKENS, _CONTEXT_TOKENS + 4):
            window = prompt[-size:]
            text = self._decoder.decode(window) if window else ""
            found.append((text.count("\ufffd"), window, text))
            if not found[-1][0]:
                break
        _, window, text = min(found, key=lambda each: each[0])
        return window, text

    def _emit(self, text: str, end: int) -> str:
        """Give out the text of tokens [_read:end]; `text` is that of [:end]. Those tokens become the next context."""
        piece = text[len(self._before) :]
        if end > self._read:
            self._window = self._window[self._read :]
            self._read = end - self._read
            self._before = self._decoder.decode(self._window[: self._read])
        return piece

    def _give_up(self) -> str:
        """Give out all but the last few tokens although the text ends in U+FFFD.

        It may be garbage, or U+FFFD itself many times over. The cut is made where the text is shortest: a decoder
        writes more U+FFFDs for a broken character than for a whole one, so that is where one ends.
        """
        ends = range(len(self._window) - 4, len(self._window))
        texts = {end: self._decoder.decode(self._window[:end]) for end in ends}
        end = min(ends, key=lambda end: (len(texts[end]), -end))
        return self._emit(texts[end], end)


class StopMatcher:
    """Finds stop strings in text that comes in pieces, wherever the pieces are cut.

    The stop that ends first wins; of those that end together, the longest. Text is held back only while it is the
    beginning of some stop string.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        """include: give the stop string out too; then nothing needs to be held back."""
        self._stops = stops
        self._include = include
        self._longest = max(map(len, stops), default=0)
        self._first = frozenset(stop[0] for stop in stops)
        self._tail = ""

    def add(self, piece: str) -> tuple[str, str | None]:
        """The text that may go out now, and the stop string found, if any; nothing after a stop is ever given out."""
        if not self._stops or not piece:
            return piece, None
        text = self._tail + piece
        # Whatever ends within the tail alone would have been found before.
        found = [(at + len(stop), -len(stop), stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            end, negative, stop = min(found)
            shown = text[len(self._tail) : end] if self._include else text[: end + negative]
            self._tail = ""
            return shown, stop
        kept = self._held(text)
        out = piece if self._include else text[: len(text) - kept]
        self._tail = text[len(text) - kept :]
        return out, None

    def flush(self) -> str:
        """What was held back, once it is known that no stop string will complete."""
        tail, self._tail = self._tail, ""
        return "" if self._include else tail

    def _held(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._first:
                tail = text[start:]
                if any(stop.startswith(tail) for stop in self._stops):
                    return len(tail)
        return 0
