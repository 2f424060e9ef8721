"""Makes a GGUF file with random weights in the shape of a Llama config, for the peer that reads nothing else.

`python -m ingot.benchmarks.llama_cpp_model CONFIG.json TYPE FILE.gguf`, TYPE being BF16, Q8_0 or Q4_0 of every matrix.
There is no tokenizer in it: the peer is given token ids.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

_FILE_TYPES = {"BF16": 32, "Q8_0": 7, "Q4_0": 2}  # general.file_type


def write(config: dict[str, Any], kind: str, file: Path) -> None:
    """Write `file`, aside first, so that an interrupted run leaves no half of one.

    Raises:
        ValueError: the config is no Llama with tied embeddings.
    """
    import gguf
    import numpy

    if config.get("model_type") != "llama" or not config.get("tie_word_embeddings"):
        raise ValueError(f"only Llama configs with tied embeddings are written, not {config.get('model_type')}")
    hidden, inner, layers = (config[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    heads, kv_heads, vocab = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "vocab_size"))
    dim = config.get("head_dim") or hidden // heads
    aside = file.with_name(f"{file.name}.part")
    writer = gguf.GGUFWriter(str(aside), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(dim)
    writer.add_vocab_size(vocab)
    writer.add_tokenizer_model("none")
    writer.add_file_type(_FILE_TYPES[kind])
    random, dtype = numpy.random.default_rng(0), gguf.GGMLQuantizationType[kind]

    def matrix(name: str, rows: int, columns: int) -> None:
        values = random.standard_normal((rows, columns), dtype=numpy.float32) * 0.02
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, dtype), raw_dtype=dtype)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", numpy.ones(hidden, numpy.float32))

    matrix("token_embd", vocab, hidden)
    norm("output_norm")
    for block in (f"blk.{i}." for i in range(layers)):
        norm(f"{block}attn_norm")
        norm(f"{block}ffn_norm")
        matrix(f"{block}attn_q", heads * dim, hidden)
        matrix(f"{block}attn_k", kv_heads * dim, hidden)
        matrix(f"{block}attn_v", kv_heads * dim, hidden)
        matrix(f"{block}attn_output", hidden, heads * dim)
        matrix(f"{block}ffn_gate", inner, hidden)
        matrix(f"{block}ffn_up", inner, hidden)
        matrix(f"{block}ffn_down", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(aside, file)


if __name__ == "__main__":
    write(json.loads(Path(sys.argv[1]).read_text("utf-8")), sys.argv[2], Path(sys.argv[3]))
