"""The GPU's peers on the CPU, uncompiled and tiny: that they can be asked, not how fast they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from ingot.benchmarks import gpt_fast_peer, transformers_gpu_peer
from ingot.benchmarks.children import Worker

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 128,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "tie_word_embeddings": True,
}  # fmt: skip
# The names that the adapter relies on, each doing the least.
GPT_FAST = {
    "tokenizer.py": "raise ImportError('nobody has this installed')\n",
    "model.py": """
from dataclasses import dataclass
import torch

@dataclass
class ModelArgs:
    block_size: int; vocab_size: int; n_layer: int; n_head: int; n_local_heads: int; dim: int
    intermediate_size: int; norm_eps: float; rope_base: float; rope_scaling: dict

class Transformer(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.output = torch.nn.Linear(config.dim, config.vocab_size)
        self.max_seq_length = self.max_batch_size = -1
    def setup_caches(self, max_batch_size, max_seq_length):
        if self.max_seq_length < max_seq_length or self.max_batch_size < max_batch_size:
            self.max_batch_size, self.max_seq_length = max_batch_size, max_seq_length
""",
    "generate.py": """
import torch
from model import Transformer
from tokenizer import get_tokenizer

def causal_mask(b, h, q, kv):
    return q >= kv

def create_block_mask(rule, b, h, q, kv, device):
    return (q, kv)

def decode_one_token(model, x, input_pos, block_mask, temperature=1.0):
    assert model.output.weight.dtype == torch.bfloat16 and model.max_batch_size == len(x)
    assert int(input_pos) < model.max_seq_length == block_mask[0]
    return x + 1, model.output.weight
""",
}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    yield path


def test_transformers_decodes_and_prefills(config: Path) -> None:
    with Worker(transformers_gpu_peer.__name__, str(config), "bfloat16", "cpu") as worker:
        for request in (
            {"op": "decode", "batch": 1, "context": 20, "tokens": 4},
            {"op": "decode", "batch": 1, "context": 20, "tokens": 4},
            {"op": "decode", "batch": 3, "context": 9, "tokens": 12},
            {"op": "prefill", "tokens": 8},
            {"op": "compiled prefill", "tokens": 8},
        ):
            assert worker.ask(request, 120)["seconds"] > 0


def test_gpt_fast_is_driven_as_its_own_script_does(config: Path, tmp_path: Path) -> None:
    for name, text in GPT_FAST.items():
        (tmp_path / name).write_text(text)
    with Worker(gpt_fast_peer.__name__, str(tmp_path), str(config), "cpu") as worker:
        for batch in (1, 1, 4):
            assert worker.ask({"op": "decode", "batch": batch, "context": 20, "tokens": 10}, 120)["seconds"] > 0


def test_gpt_fasts_words_for_a_config(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    path.write_text(json.dumps({**CONFIG, "rope_scaling": {**scaling, "rope_type": "llama3"}}))
    found = gpt_fast_peer.model_arguments(path)
    assert (found["dim"], found["n_local_heads"], found["rope_scaling"]) == (64, 2, scaling)
    assert gpt_fast_peer.refusal(path) == ""
    path.write_text(json.dumps({**CONFIG, "head_dim": 32}))
    assert "heads" in gpt_fast_peer.refusal(path)
    path.write_text(json.dumps({**CONFIG, "model_type": "qwen3"}))
    assert "qwen3" in gpt_fast_peer.refusal(path)
