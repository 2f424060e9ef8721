"""The peer: eager transformers on the same checkpoint, in the same dtype, with as many threads as there are cores.

`python -m ingot.benchmarks.transformers_peer SOURCE DTYPE` answers {"op": "decode" | "generate" | "prefill", "prompt":
[ids], "tokens": n}. SOURCE is a checkpoint's folder, or a config.json for random weights. "decode" is a bare loop over
the model with its cache, the least transformers can take; "generate" is what its users call.
"""

from __future__ import annotations

import inspect
import sys
import time
from pathlib import Path
from typing import Any

from .children import serve
from .machine import core_count

LOOP, GENERATE = "transformers loop", "transformers generate"

# The same program as ours.START for a user of transformers.
START = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
prompt = json.loads(sys.argv[2])
if isinstance(prompt, str):
    prompt = AutoTokenizer.from_pretrained(sys.argv[1])(prompt).input_ids
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=sys.argv[3])
ids = torch.tensor([prompt])
output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=1)
token = int(output[0, -1])
now = time.monotonic()
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
print(json.dumps({"first_token": now, "token": token, "peak": peak}))
"""


class Peer:
    """A loaded model."""

    def __init__(self, source: Path, dtype: str) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.set_num_threads(core_count())
        self._torch = torch
        if source.is_dir():
            model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
        else:
            torch.manual_seed(0)
            config = AutoConfig.from_pretrained(source)
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        self.model = model.eval().requires_grad_(False)
        # Generate as many tokens as asked for: no end of sequence.
        self.model.generation_config.eos_token_id = None
        # Without this the LM head runs over all tokens of a prompt; ours runs over the last.
        last = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if last else {}

    def decode(self, request: dict[str, Any]) -> dict[str, Any]:
        """Seconds for `tokens` tokens behind the first one, in a bare loop."""
        torch = self._torch
        with torch.inference_mode():
            output = self.model(torch.tensor([request["prompt"]]), use_cache=True, **self._last_only)
            token = output.logits[:, -1:].argmax(-1)
            tokens = [token]
            begin = time.perf_counter()
            for _ in range(request["tokens"]):
                output = self.model(token, past_key_values=output.past_key_values, use_cache=True)
                token = output.logits[:, -1:].argmax(-1)
                tokens.append(token)
            seconds = time.perf_counter() - begin
        return {"seconds": seconds, "token_ids": torch.cat(tokens, 1)[0].tolist()}

    def generate(self, request: dict[str, Any]) -> dict[str, Any]:
        """The same through `generate`, from the arrival of the first token to that of the last."""
        ids, arrivals = self._torch.tensor([request["prompt"]]), _Arrivals()
        output = self.model.generate(
            ids, attention_mask=self._torch.ones_like(ids), do_sample=False, max_new_tokens=request["tokens"] + 1,
            pad_token_id=0, streamer=arrivals,
        )  # fmt: skip
        tokens = output[0, ids.shape[1] :].tolist()
        if len(tokens) != request["tokens"] + 1:
            raise RuntimeError(f"{len(tokens)} tokens instead of {request['tokens'] + 1}")
        # The first thing to arrive is the prompt.
        return {"seconds": arrivals.times[-1] - arrivals.times[1], "token_ids": tokens}

    def prefill(self, request: dict[str, Any]) -> dict[str, Any]:
        """Seconds from a prompt to its first token."""
        with self._torch.inference_mode():
            begin = time.perf_counter()
            ids = self._torch.tensor([request["prompt"]])
            token = self.model(ids, use_cache=True, **self._last_only).logits[0, -1].argmax().item()
            return {"seconds": time.perf_counter() - begin, "token_ids": [token]}


class _Arrivals:
    """A streamer that notes when tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Called by `generate` with the prompt, then with each token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called by `generate` at the end."""


def main(source: str, dtype: str) -> None:
    """Serve until stdin closes."""
    peer = Peer(Path(source), dtype)
    serve({"decode": peer.decode, "generate": peer.generate, "prefill": peer.prefill})


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
