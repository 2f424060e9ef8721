"""`LLM`: the story of a request. Open the artifact, check prompts and parameters, step until done, hand out the text.

Everything that can be refused is refused before any work is done; the loop itself is in core.py.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from ..artifacts.errors import UsageError
from ..artifacts.store import OpenArtifact
from ..artifacts.trust import Trust
from .chat import ChatTemplate
from .core import Core
from .detokenizer import Detokenizer
from .engines.base import EngineGroup
from .generation_config import GenerationConfig
from .loader import load_engines, open_verified
from .outputs import RequestOutput
from .params import SamplingParams
from .phases import Phases
from .prompts import Prompt, check_token_ids, split_conversations, split_prompts
from .sampling import Penalties, wrap_seed
from .sequence import Request, Sequence
from .tokenizer import Tokenizer

Params = SamplingParams | Items[SamplingParams] | None


class LLM:
    """A compiled model, ready to generate. Use it as a context manager, or call `close`.

    Args:
        model: the artifact's folder.
        verify: "full" compares every file's digest before anything runs; "sizes" leaves out the weights' digests.
        trust: whose native code may run: "local", "signed", "signed:KEY.pub", "digest:sha256:…", or several of these.
            None is what was built on this host, or is signed by a configured key.
        gpu_memory_utilization: the share of a GPU's memory that may be in use once the KV cache has been taken.
        engine_group: engines to use in place of the artifact's (tests).
        phases: told where the time of loading goes.

    Raises:
        UsageError: no such folder. VerificationError: the artifact is not what it says, is of unknown origin, or does
            not fit this machine.
        ResourceError: not enough memory.
    """

    def __init__(
        self,
        model: str | Path | OpenArtifact,
        *,
        verify: Literal["full", "sizes"] = "full",
        trust: str | Items[str] | None = None,
        gpu_memory_utilization: float = 0.9,
        engine_group: EngineGroup | None = None,
        phases: Phases | None = None,
    ) -> None:
        phases = phases or Phases()
        # A build hands over an artifact that is not published yet; everybody else gives a folder to verify.
        accepted = Trust.parse(trust)
        self._artifact = model if isinstance(model, OpenArtifact) else open_verified(model, verify, accepted)
        manifest = self._artifact.manifest
        phases.mark("verification")
        self._model = manifest.model
        config = self._artifact.path("generation.json")
        self._generation = GenerationConfig.load(config, self._model.vocab_size)
        if engine_group is None:
            engine_group = load_engines(self._artifact, gpu_memory_utilization, phases)
        self._engines = engine_group
        self._core = Core(self._engines, manifest)
        self._ids = itertools.count()
        self._closed = False

    def generate(
        self, prompts: str | list[str] | list[int] | list[list[int]], sampling_params: Params = None
    ) -> list[RequestOutput]:
        """Complete prompts, given as text or as token ids; returns when all are done, in their order.

        Args:
            sampling_params: for all prompts, or one per prompt; None takes `get_default_sampling_params()`.

        Raises:
            UsageError: any prompt or parameter is refused; nothing has been generated then.
        """
        return self._finish(self._requests([Prompt(p) for p in split_prompts(prompts)], sampling_params))

    def chat(
        self,
        messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
        sampling_params: Params = None,
        *,
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several, through the model's chat template.

        Raises:
            UsageError: as `generate`, or the artifact has no chat template, or it refuses the messages.
        """
        texts = [self.render_chat(c, add_generation_prompt, tools) for c in split_conversations(messages)]
        return self._finish(self._requests([Prompt(text, chat=True) for text in texts], sampling_params))

    def stream(
        self, prompt: str | list[int] | list[dict[str, Any]], sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Complete one prompt (text or token ids) or one conversation (messages), piece by piece.

        Each output holds only what is new since the last; the last has `finished` and the times. The request is
        checked now and starts with the first `next`; closing the iterator ends it and frees its row and blocks.
        """
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], Mapping):
            item = Prompt(self.render_chat(prompt), chat=True)
        else:
            item = Prompt(split_prompts(prompt, single=True)[0])
        return self._stream(*self._requests([item], sampling_params))

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        """The prompt's text that `chat` makes of a conversation."""
        return self._template.render(messages, add_generation_prompt, tools)

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's authors recommend, from generation.json."""
        return self._generation.defaults

    def get_tokenizer(self) -> Tokenizer:
        """The artifact's tokenizer, loaded at the first call."""
        return self._tokenizer

    def close(self) -> None:
        """Give weights, cache and engines back; unfinished streams end. Calling it twice is harmless."""
        if not self._closed:
            self._closed = True
            if "_template" in self.__dict__:
                self._template.close()
            self._core.close()
            self._engines.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer(self._artifact.path("tokenizer.json"), self._model.vocab_size)

    @cached_property
    def _template(self) -> ChatTemplate:
        if all(entry.path != "chat_template.jinja" for entry in self._artifact.manifest.files):
            raise UsageError(
                f"The model {self._artifact.manifest.name} has no chat template.",
                "It was not trained to chat, or its checkpoint came without chat_template.jinja.",
                "Use generate() with a plain prompt.",
            )
        source = self._artifact.path("chat_template.jinja").read_text(encoding="utf-8")
        config = self._generation
        bos = config.bos_token or (None if config.bos_token_id is None else self._tokenizer.token(config.bos_token_id))
        eos = config.eos_token or next((self._tokenizer.token(i) for i in sorted(config.eos_token_ids)), None)
        tokens = {"bos_token": bos, "eos_token": eos}
        return ChatTemplate(source, {name: token for name, token in tokens.items() if token is not None})

    def _requests(self, prompts: list[Prompt], sampling_params: Params) -> list[Request]:
        """Check all prompts and parameters, and make requests of them."""
        if self._closed:
            raise UsageError("This LLM is closed.", "close() has given its engines back.", "Make a new LLM.")
        if sampling_params is None:
            sampling_params = self._generation.defaults
        each = [sampling_params] * len(prompts) if isinstance(sampling_params, SamplingParams) else sampling_params
        fine = isinstance(each, (list, tuple)) and all(isinstance(params, SamplingParams) for params in each)
        if not fine or len(each) != len(prompts):
            raise UsageError(
                f"The sampling parameters do not go with {len(prompts)} prompts.",
                "They are neither one SamplingParams nor a list of one per prompt.",
                "Give one SamplingParams for all prompts, or a list as long as that of the prompts.",
            )
        return [self._request(prompt, params) for prompt, params in zip(prompts, each)]

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        arrived = time.perf_counter()
        max_length, vocab_size = self._model.max_length, self._model.vocab_size
        if isinstance(prompt.value, str):
            ids = self._tokenizer.encode(prompt.value, add_special_tokens=not prompt.chat, limit=max_length)
        else:
            ids = prompt.value
        check_token_ids(ids, vocab_size, max_length)
        for token in params.stop_ids:
            if token >= vocab_size:
                raise UsageError(
                    f"Sampling parameter stop_token_ids holds {token}.",
                    f"The model's vocabulary ends at {vocab_size - 1}.",
                    "Leave that id out.",
                )
        seed = int.from_bytes(os.urandom(8)) if params.seed is None else params.seed
        sequences = [
            Sequence(
                prompt=ids,
                params=params,
                # Consecutive seeds, as vLLM's: the random numbers hash the seed, so neighbours have nothing in common,
                # and completion i of a request is what a request of its own with seed + i gives.
                seed=wrap_seed(seed + index),
                max_new=min(params.max_tokens, max_length - len(ids)),
                end_ids=frozenset() if params.ignore_eos else self._generation.eos_token_ids,
                detokenizer=Detokenizer(self._tokenizer, ids, params.skip_special_tokens)
                if params.detokenize
                else None,
                penalties=Penalties(params, ids, vocab_size) if params.penalized else None,
            )
            for index in range(params.n)
        ]
        text = prompt.value if isinstance(prompt.value, str) else None
        return Request(str(next(self._ids)), text, ids, sequences, arrived)

    def _finish(self, requests: list[Request]) -> list[RequestOutput]:
        self._core.submit(requests)
        try:
            for request in requests:
                while not request.finished:
                    self._core.step()
        finally:
            self._core.abort(requests)
        return [request.output() for request in requests]

    def _stream(self, request: Request) -> Iterator[RequestOutput]:
        marks = request.marks()
        request.arrived = time.perf_counter()
        self._core.submit([request])
        try:
            while True:
                # Another caller's steps bring this request further too, up to its end: look first, then step.
                if (now := request.marks()) != marks:
                    output = request.output(since=marks)
                    marks = now
                    yield output
                elif request.finished:
                    return
                else:
                    self._core.step()
        finally:
            self._core.abort([request])
