"""A peer on the GPU: transformers with a static cache and torch.compile, the fastest way its documents describe.

`python -m ingot.benchmarks.transformers_gpu_peer CONFIG DTYPE` answers {"op": "decode" | "prefill" | "compiled
prefill", "batch": n, "context": n, "tokens": n} with the seconds of one run. Weights are random and made on the device.
The first request of each shape compiles, which takes minutes. Where the peer could go either way it is spared work:
the cache is just long enough, prompts fill none, the LM head sees the last token alone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .children import serve

COMPILED, EAGER = "transformers compiled", "transformers eager"
_WARM_UP = 8  # steps before the first that counts: CUDA graphs are recorded in the first few


class Stopwatch:
    """Seconds of what a function puts on the device, by its events; by the clock where there is no GPU (tests)."""

    def __init__(self, torch: Any, device: str) -> None:
        self._torch, self._gpu = torch, device == "cuda"

    def time(self, work: Callable[[], object]) -> float:
        """Run `work` once and wait for it."""
        if not self._gpu:
            begin = time.perf_counter()
            work()
            return time.perf_counter() - begin
        start, end = (self._torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        self._torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1000


class Peer:
    """A model on the device, and what was compiled of it."""

    def __init__(self, config: Path, dtype: str, device: str = "cuda") -> None:
        import torch
        import torch._dynamo
        from transformers import AutoConfig, AutoModelForCausalLM

        # Each shape is compiled by itself; by default the third one would give up compiling.
        torch._dynamo.config.recompile_limit = 64
        torch.manual_seed(0)
        self.torch, self.device, self.watch = torch, device, Stopwatch(torch, device)
        kind = getattr(torch, dtype)
        with torch.device(device):  # no copy of the weights on the host
            model: Any = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(config), dtype=kind, attn_implementation="sdpa"
            )
        self.model = model.eval().requires_grad_(False)
        self._step = torch.compile(self._decode_step, mode="reduce-overhead", fullgraph=True, dynamic=False)
        self._prefill = torch.compile(self._first_token, dynamic=False)
        self._shape: tuple[int, int, int] | None = None

    def decode(self, request: dict[str, Any]) -> dict[str, Any]:
        """Seconds of `tokens` steps of `batch` rows that see `context` tokens and more."""
        torch, batch, context, tokens = self.torch, request["batch"], request["context"], request["tokens"]
        with torch.no_grad():
            if self._shape != (batch, context, tokens):
                self._make_cache(batch, context + tokens + 1)
                self._shape = (batch, context, tokens)
                self._seek(context)
                self._steps(min(_WARM_UP, tokens))
            self._seek(context)
            return {"seconds": self.watch.time(lambda: self._steps(tokens))}

    def prefill(self, request: dict[str, Any]) -> dict[str, Any]:
        """Seconds from a prompt of `tokens` tokens to its first token, eagerly."""
        return self._run_prefill(self._first_token, request)

    def compiled_prefill(self, request: dict[str, Any]) -> dict[str, Any]:
        """The same, compiled."""
        return self._run_prefill(self._prefill, request)

    def _run_prefill(self, first_token: Callable[[Any], Any], request: dict[str, Any]) -> dict[str, Any]:
        ids = self._tokens(1, request["tokens"])
        with self.torch.no_grad():
            return {"seconds": self.watch.time(lambda: first_token(ids))}

    def _tokens(self, batch: int, length: int) -> Any:
        vocab = self.model.config.get_text_config().vocab_size
        return self.torch.randint(3, vocab, (batch, length), device=self.device)

    def _first_token(self, ids: Any) -> Any:
        return self.model(ids, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1)

    def _decode_step(self, token: Any, cache: Any) -> Any:
        # Positions are the cache's own count, which moves on with each step.
        output = self.model(token, past_key_values=cache, use_cache=True)
        return output.logits[:, -1:].argmax(-1)

    def _steps(self, count: int) -> None:
        token = self._token
        for _ in range(count):
            # A replayed graph's result lies where its next replay writes.
            token = self._step(token, self._cache).clone()

    def _make_cache(self, batch: int, length: int) -> None:
        from transformers import StaticCache

        self._cache: Any = None  # the one before it is given back first
        self._cache = StaticCache(config=self.model.config, max_cache_len=length)
        self._token = self._tokens(batch, 1)
        self.model(self._tokens(batch, 2), past_key_values=self._cache, use_cache=True, logits_to_keep=1)

    def _seek(self, context: int) -> None:
        """Let the cache believe that it holds so many tokens; their values do not matter to the time."""
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(context)
            if hasattr(layer, "cumulative_length_int"):
                layer.cumulative_length_int = context


def main(config: str, dtype: str, device: str = "cuda") -> None:
    """Serve until stdin closes."""
    peer = Peer(Path(config), dtype, device)
    serve({"decode": peer.decode, "prefill": peer.prefill, "compiled prefill": peer.compiled_prefill})


if __name__ == "__main__":
    main(*sys.argv[1:])
