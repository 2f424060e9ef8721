"""A tokenizer.json tried out at build: a broken one is found before compiling, not at the first prompt.

Ids beyond the model's vocabulary are no error here: published models have them (unused special tokens). The runtime
refuses a prompt that brings one up.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..artifacts.errors import UsageError, VerificationError
from ..artifacts.files import read_small
from ..runtime.tokenizer import Tokenizer
from .strict_json import model_file

MAX_TOKENIZER_BYTES = 128 << 20
_PROBES = ("Hello, world! 123", " \n\tüñ 漢字 🙂\u200d", "a" * 300, "<s></s>", "")


def load_tokenizer(path: Path) -> Any:
    """tokenizers' own object for a tokenizer.json that was checked.

    Raises:
        ResourceError: the file cannot be read, which the library itself would not tell from a bug.
    """
    from tokenizers import Tokenizer as Loaded

    return Loaded.from_buffer(read_small(path, MAX_TOKENIZER_BYTES))


def check_tokenizer(folder: Path, vocab_size: int) -> Path | None:
    """The tokenizer.json of a model folder, found to load, encode and decode; None if the model has none.

    Raises:
        UsageError: it is too large, broken, or panics.
    """
    path = model_file(folder, "tokenizer.json")
    if path is None:
        return None
    if path.stat().st_size > MAX_TOKENIZER_BYTES:
        raise UsageError(f"{path}: too large", f"more than {MAX_TOKENIZER_BYTES >> 20} MiB", "check the file")
    try:
        # Ids are not held against the vocabulary here, see above.
        tokenizer = Tokenizer(path, 1 << 31)
        for text in _PROBES:
            ids = tokenizer.encode(text, add_special_tokens=True, limit=1 << 16)
            tokenizer.decode([token for token in ids if token < vocab_size])
    except (VerificationError, UsageError) as error:
        raise UsageError(
            f"{path}: not a working tokenizer", f"{error.what} {error.why}", "fetch the model again"
        ) from error
    return path
