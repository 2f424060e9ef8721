"""A peer on the GPU: gpt-fast (github.com/meta-pytorch/gpt-fast), from a folder with its model.py and generate.py.

`python -m ingot.benchmarks.gpt_fast_peer FOLDER CONFIG [DEVICE [int8]]` answers
{"op": "decode", "batch": n, "context": n, "tokens": n} with the seconds of `tokens` steps. Its model is built with
random weights in the shape of a config.json, with "int8" in its own weight-only form, and its decode_one_token is
compiled and called as its own generate.py does; nothing of it is part of this repository.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

from .children import serve
from .transformers_gpu_peer import Stopwatch

_WARM_UP = 8


def refusal(config: Path) -> str:
    """Why gpt-fast cannot have the model of this config; empty if it can. Its one architecture is Llama's."""
    facts = json.loads(config.read_text("utf-8"))
    if facts["model_type"] != "llama":
        return f"it has no {facts['model_type']} models"
    if facts.get("head_dim") not in (None, facts["hidden_size"] // facts["num_attention_heads"]):
        return "its heads are always as wide as the model divided by their number"
    return ""


def model_arguments(config: Path) -> dict[str, Any]:
    """A config.json in the words of gpt-fast's ModelArgs."""
    facts = json.loads(config.read_text("utf-8"))
    scaling = facts.get("rope_scaling")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return {
        "block_size": facts["max_position_embeddings"], "vocab_size": facts["vocab_size"],
        "n_layer": facts["num_hidden_layers"], "n_head": facts["num_attention_heads"],
        "n_local_heads": facts["num_key_value_heads"], "dim": facts["hidden_size"],
        "intermediate_size": facts["intermediate_size"], "norm_eps": facts["rms_norm_eps"],
        "rope_base": facts.get("rope_theta", 10_000.0),
        "rope_scaling": {name: scaling[name] for name in names} if scaling else None,
    }  # fmt: skip


def load(folder: Path) -> Any:
    """gpt-fast's generate module. Its tokenizers, which it imports with it, are not needed and may be missing."""
    tokenizer: Any = types.ModuleType("tokenizer")
    tokenizer.get_tokenizer = None
    sys.modules["tokenizer"] = tokenizer
    sys.path.insert(0, str(folder))
    return importlib.import_module("generate")


class Peer:
    """A model on the device, its decode_one_token compiled."""

    def __init__(self, folder: Path, config: Path, device: str = "cuda", mode: str = "") -> None:
        import torch

        self.generate = load(folder)
        model_module = sys.modules["model"]
        torch.manual_seed(0)
        self.torch, self.device, self.watch = torch, device, Stopwatch(torch, device)
        torch.set_default_dtype(torch.bfloat16)  # the weights are made in it: no float32 copy on the device
        try:
            with torch.device(device), torch.no_grad():
                self.model: Any = model_module.Transformer(model_module.ModelArgs(**model_arguments(config)))
                for parameter in self.model.parameters():
                    if parameter.dim() > 1:
                        parameter.normal_(0.0, 0.02)
        finally:
            torch.set_default_dtype(torch.float32)
        if mode == "int8":
            self._quantize()
        self.model.eval()
        self.step = torch.compile(self.generate.decode_one_token, mode="reduce-overhead", fullgraph=True)
        self._shape: tuple[int, int, int] | None = None

    def _quantize(self) -> None:
        """Its own int8 weights with a scale per row, of random values."""
        handler = importlib.import_module("quantize").WeightOnlyInt8QuantHandler(self.model)
        self.model = handler.convert_for_runtime().to(self.device)
        for name, buffer in self.model.named_buffers():
            if name.endswith(".weight"):
                buffer.random_(-127, 128)
            elif name.endswith(".scales"):
                buffer.fill_(2e-4)

    def decode(self, request: dict[str, Any]) -> dict[str, Any]:
        """Seconds of `tokens` steps of `batch` rows that see `context` tokens and more."""
        torch, shape = self.torch, (request["batch"], request["context"], request["tokens"])
        batch, context, tokens = shape
        with torch.no_grad():
            if self._shape != shape:
                self._shape = shape
                self._make_caches(batch, context + tokens + 1)
                self._steps(batch, context, min(_WARM_UP, tokens))
            return {"seconds": self.watch.time(lambda: self._steps(batch, context, tokens))}

    def _make_caches(self, batch: int, length: int) -> None:
        model, generate = self.model, self.generate
        model.max_batch_size = model.max_seq_length = -1  # or it would keep what is large enough
        with self.torch.device(self.device):
            model.setup_caches(max_batch_size=batch, max_seq_length=length)
        longest = model.max_seq_length
        self._mask = generate.create_block_mask(generate.causal_mask, 1, 1, longest, longest, device=self.device)

    def _steps(self, batch: int, context: int, count: int) -> None:
        """What its decode_n_tokens does, without the callback and without top-k, which would take it longer."""
        torch = self.torch
        token = torch.full((batch, 1), 17, dtype=torch.int, device=self.device)
        position = torch.tensor([context], dtype=torch.int, device=self.device)
        for _ in range(count):
            token, _probabilities = self.step(self.model, token, position, self._mask, temperature=0.8)
            position += 1
            token = token.clone()


def main(folder: str, config: str, device: str = "cuda", mode: str = "") -> None:
    """Serve until stdin closes."""
    peer = Peer(Path(folder), Path(config), device, mode)
    serve({"decode": peer.decode})


if __name__ == "__main__":
    main(*sys.argv[1:])
