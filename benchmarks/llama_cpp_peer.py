"""The peer on a CPU: llama.cpp, through llama-cpp-python, with as many threads as there are cores.

`python -m ingot.benchmarks.llama_cpp_peer FILE.gguf CONTEXT` answers {"op": "decode" | "prefill", "prompt": [ids],
"tokens": n}. It is no dependency: `pip install --target DIR llama-cpp-python gguf` puts it into a folder of its own,
and --llama-cpp DIR of the harness onto the worker's path.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Sequence
from typing import Any

from ..artifacts.errors import ResourceError
from .children import serve
from .machine import core_count

NAME = "llama.cpp"


class Peer:
    """A loaded GGUF file and a context of `context` tokens."""

    def __init__(self, file: str, context: int) -> None:
        import llama_cpp
        import numpy

        self._api, self._numpy = llama_cpp, numpy
        self._log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise ResourceError(f"{NAME} cannot load {file}", "", "")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch = context, max(context, params.n_batch)
        params.n_threads = params.n_threads_batch = core_count()
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def _next(self, tokens: Sequence[int]) -> int:
        """Feed tokens; the likeliest next one."""
        api = self._api
        given = (api.llama_token * len(tokens))(*tokens)
        if api.llama_decode(self._context, api.llama_batch_get_one(given, len(tokens))):
            raise ResourceError(f"{NAME} cannot take {len(tokens)} more tokens", "", "")
        logits = api.llama_get_logits_ith(self._context, -1)
        return int(self._numpy.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())

    def _clear(self) -> None:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def decode(self, request: dict[str, Any]) -> dict[str, Any]:
        """Seconds for `tokens` tokens behind the first one."""
        self._clear()
        made = [self._next(request["prompt"])]
        begin = time.perf_counter()
        for _ in range(request["tokens"]):
            made.append(self._next(made[-1:]))
        return {"seconds": time.perf_counter() - begin, "token_ids": made}

    def prefill(self, request: dict[str, Any]) -> dict[str, Any]:
        """Seconds from a prompt to its first token."""
        self._clear()
        begin = time.perf_counter()
        token = self._next(request["prompt"])
        return {"seconds": time.perf_counter() - begin, "token_ids": [token]}


def main(file: str, context: int) -> None:
    """Serve until stdin closes."""
    peer = Peer(file, context)
    serve({"decode": peer.decode, "prefill": peer.prefill})


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
