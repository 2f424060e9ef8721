"""The forms a prompt may take, told apart and checked before anything is done with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..artifacts.errors import UsageError

_FORMS = "A prompt is text or a list of token ids; a call takes one prompt or a list of prompts."
_FIX = 'For example generate("Once upon a time") or generate([[1, 403, 407]]).'


class Prompt(NamedTuple):
    """One prompt: text or token ids; `chat` when a template wrote it, with its own special tokens."""

    value: str | list[int]
    chat: bool = False


def split_prompts(prompts: Any, single: bool = False) -> list[str | list[int]]:
    """A call's prompts as a list; `single` when it may hold one only.

    Raises:
        UsageError: none of the forms, naming the prompt; or an empty one.
    """
    if isinstance(prompts, str) or _is_ids(prompts):
        items: list[Any] = [prompts]
    elif isinstance(prompts, (list, tuple)) and not single:
        items = list(prompts)
    else:
        raise UsageError(f"The prompt is {type(prompts).__name__} of an unknown form.", _FORMS, _FIX)
    if single and not prompts:
        raise _empty(0)
    for index, item in enumerate(items):
        if isinstance(item, (str, list, tuple)) and not item:
            raise _empty(index)
        if not isinstance(item, str) and not _is_ids(item):
            raise UsageError(f"Prompt {index} is {type(item).__name__} of an unknown form.", _FORMS, _FIX)
    return [item if isinstance(item, str) else [int(token) for token in item] for item in items]


def split_conversations(messages: Any) -> list[list[dict[str, Any]]]:
    """A chat call's conversations as a list of lists of messages.

    Raises:
        UsageError: neither messages nor lists of messages; or an empty conversation.
    """
    if isinstance(messages, (list, tuple)) and messages and isinstance(messages[0], Mapping):
        messages = [messages]
    fine = isinstance(messages, (list, tuple)) and bool(messages)
    if not fine or not all(isinstance(c, (list, tuple)) and c for c in messages):
        raise UsageError(
            "These are no messages.",
            "A conversation is a list of at least one message; a call takes one conversation or a list of them.",
            'For example chat([{"role": "user", "content": "Hello"}]).',
        )
    return [list(conversation) for conversation in messages]


def check_token_ids(ids: Sequence[int], vocab_size: int, max_length: int) -> None:
    """A prompt's token ids against the model.

    Raises:
        UsageError: none, too many (at least one new token must fit), or one out of the vocabulary.
    """
    if not ids:
        raise _empty(0)
    if len(ids) >= max_length:
        raise UsageError(
            f"The prompt has {len(ids)} tokens; the artifact takes at most {max_length - 1}.",
            f"Its max_length is {max_length} tokens, of which at least one must be left for the answer.",
            "Shorten the prompt, or build the artifact with a larger max_length.",
        )
    if wrong := [token for token in (min(ids), max(ids)) if not 0 <= token < vocab_size]:
        raise UsageError(
            f"The prompt holds the token id {wrong[0] if abs(wrong[0]) < 2**64 else 'of more than 64 bits'}.",
            f"The model's vocabulary goes from 0 to {vocab_size - 1}.",
            "Encode the prompt with the artifact's own tokenizer.",
        )


def _is_ids(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(type(token) is int for token in value)


def _empty(index: int) -> UsageError:
    why = "Generation continues a text of at least one token."
    return UsageError(f"Prompt {index} is empty.", why, "Give it some text, or the id of the beginning-of-text token.")
