"""Text to token ids and back: `tokenizers` loaded from the artifact's tokenizer.json, with its panics made errors.

The Rust library panics on some broken files and inputs, and pyo3 raises those as a BaseException that would pass
every `except Exception`; this is the one place that knows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..artifacts.errors import IngotError, UsageError, VerificationError

# No token of a sane vocabulary is longer than this many characters, so a text beyond it times the limit cannot fit.
_CHARS_PER_TOKEN = 1024


class Tokenizer:
    """One tokenizer.json.

    Args:
        path: the file. vocab_size: of the model; ids beyond it are refused when they come up.

    Raises:
        VerificationError: the file is no tokenizer.
    """

    def __init__(self, path: Path, vocab_size: int) -> None:
        # Imported here: token-id requests need no tokenizer, and the library costs some 20 ms of start-up.
        from tokenizers import Tokenizer as Loaded

        with _panics_as(lambda why: _broken(path, why)):
            self._inner: Any = Loaded.from_file(str(path))
            self._inner.no_truncation()
            self._inner.no_padding()
            added = self._inner.get_added_tokens_decoder()
        self._vocab_size = vocab_size
        self.special_ids = frozenset(index for index, token in added.items() if token.special)

    def encode(self, text: str, *, add_special_tokens: bool, limit: int) -> list[int]:
        """Token ids of a text.

        Args:
            add_special_tokens: let the tokenizer's own post-processor add its BOS; False for rendered chats.
            limit: in tokens; texts that are certainly longer are refused before the work of encoding them.

        Raises:
            UsageError: not encodable, too long, or an id that the model has no embedding for.
        """
        if len(text) > limit * _CHARS_PER_TOKEN:
            raise UsageError(
                f"A prompt of {len(text)} characters is too long.",
                f"The artifact takes at most {limit} tokens.",
                "Shorten the prompt, or build the artifact with a larger max_length.",
            )
        with _panics_as(
            lambda why: UsageError(f"The prompt {_quote(text)} cannot be encoded.", why, "Send valid text.")
        ):
            ids: list[int] = self._inner.encode(text, add_special_tokens=add_special_tokens).ids
        if ids and max(ids) >= self._vocab_size:
            raise UsageError(
                f"The prompt {_quote(text)} holds the token id {max(ids)}.",
                f"The tokenizer knows it, but the model's vocabulary ends at {self._vocab_size - 1}.",
                "Leave that special token out, or build from a checkpoint whose embeddings match its tokenizer.",
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included; incomplete characters come out as U+FFFD."""
        with _panics_as(
            lambda why: VerificationError("Token ids cannot be decoded.", why, "Build the artifact again.")
        ):
            return str(self._inner.decode(ids, skip_special_tokens=False))

    def token(self, index: int) -> str | None:
        """The token as it stands in the vocabulary (for templates: bos_token, eos_token), or None."""
        found = self._inner.id_to_token(index)
        return None if found is None else str(found)


@contextmanager
def _panics_as(make: Callable[[str], IngotError]) -> Iterator[None]:
    """Turn the library's exceptions and panics into the error that `make` builds from the reason."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        # pyo3_runtime.PanicException derives from BaseException and cannot be imported to be named here.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise make(str(error)[:500] or type(error).__name__) from error


def _broken(path: Path, why: str) -> VerificationError:
    return VerificationError(f"{path} is not a tokenizer.", why, "Build the artifact again from a sound checkpoint.")


def _quote(text: str) -> str:
    return ascii(text if len(text) <= 40 else text[:37] + "...")
