"""generation.json: the model's special tokens and the sampling defaults that its authors recommend."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..artifacts.errors import UsageError, VerificationError
from ..artifacts.files import read_small
from .params import SamplingParams

_MAX_BYTES = 1 << 20
_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class GenerationConfig:
    """What the runtime needs to know of a model beyond its manifest.

    bos_token and eos_token are the strings that chat templates may use; None when the file does not give them.
    """

    eos_token_ids: frozenset[int] = frozenset()
    bos_token_id: int | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    defaults: SamplingParams = field(default_factory=SamplingParams)

    @classmethod
    def load(cls, path: Path, vocab_size: int) -> GenerationConfig:
        """Read and check the file.

        Raises:
            VerificationError: naming the field. ResourceError: the system does not let us read it.
        """
        try:
            value = json.loads(read_small(path, _MAX_BYTES))
        except (ValueError, RecursionError) as error:
            raise _broken(path, str(error)) from error
        if not isinstance(value, dict):
            raise _broken(path, "it is no JSON object")
        ends = value.get("eos_token_ids", [])
        if not isinstance(ends, list):
            raise _broken(path, "eos_token_ids is no list")
        for token in [*ends, *([value["bos_token_id"]] if value.get("bos_token_id") is not None else [])]:
            if type(token) is not int or not 0 <= token < vocab_size:
                raise _broken(path, f"the token id {token!r} is outside of the vocabulary of {vocab_size}")
        for name in ("bos_token", "eos_token"):
            if not isinstance(value.get(name), str | None):
                raise _broken(path, f"{name} is no string")
        return cls(
            eos_token_ids=frozenset(ends),
            bos_token_id=value.get("bos_token_id"),
            bos_token=value.get("bos_token"),
            eos_token=value.get("eos_token"),
            defaults=_defaults(path, value.get("defaults", {})),
        )


def _defaults(path: Path, value: Any) -> SamplingParams:
    if not isinstance(value, dict) or not set(value) <= set(_DEFAULTS):
        raise _broken(path, f"defaults may hold only {', '.join(_DEFAULTS)}")
    try:
        return SamplingParams(**value)
    except UsageError as error:
        raise _broken(path, f"{error.what} {error.why}") from error


def _broken(path: Path, why: str) -> VerificationError:
    return VerificationError(f"{path} is not valid.", why, "Build the artifact again from a sound checkpoint.")
