"""Tiny checkpoints as other people's quantizers write them, each with the dense model it stands for.

compressed-tensors checkpoints are made by that library. The other layouts are packed here element by element, from
their descriptions alone: slow loops that share nothing with the code under test.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ingot.compiler.families import save_random_model
from ingot.compiler.load_model import make_config
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 320,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
QWEN3 = {**LLAMA, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True}
GPT_OSS = {
    **LLAMA, "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "num_local_experts": 4,
    "num_experts_per_tok": 2, "sliding_window": 32,
}  # fmt: skip
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Made:
    """A checkpoint folder, and the model that it stands for with its weights dense, float32."""

    folder: Path
    model: Any
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def save(self, quantization: Any) -> None:
        """Write the tensors, and the config with this `quantization_config`."""
        path = self.folder / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "quantization_config": quantization}))
        save_file({k: v.contiguous() for k, v in self.tensors.items()}, self.folder / "model.safetensors")

    def quantization(self) -> dict[str, Any]:
        """Its `quantization_config`."""
        found: dict[str, Any] = json.loads((self.folder / "config.json").read_text())["quantization_config"]
        return found


def linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Every Linear but the LM head."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            yield name, module


def start(folder: Path, config: dict[str, Any]) -> Made:
    """A dense checkpoint to be quantized."""
    model = save_random_model(config, folder)
    return Made(folder, model, load_file(folder / "model.safetensors"))


def pack_words(codes: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Codes [rows, m] as int32 [rows, m * bits / 32]; `order` says which column stands in each place of a word."""
    per_word = 32 // bits
    order = order or tuple(range(per_word))
    words = np.zeros((codes.shape[0], codes.shape[1] // per_word), dtype=np.uint32)
    for row in range(words.shape[0]):
        for word in range(words.shape[1]):
            for place in range(per_word):
                words[row, word] |= np.uint32(int(codes[row, word * per_word + order[place]]) << (bits * place))
    return torch.from_numpy(words.view(np.int32).copy())


def make_gptq(
    folder: Path, config: dict[str, Any], *, bits: int = 4, group: int = 32, symmetric: bool = True,
    version: str = "gptq", by_activations: bool = False, skip: str = "",
) -> Made:  # fmt: skip
    """A checkpoint as AutoGPTQ (`version` gptq) or GPTQModel (gptq_v2) writes it; modules with `skip` stay dense."""
    made, rng = start(folder, config), np.random.default_rng(3)
    columns: dict[int, np.ndarray] = {}
    for name, module in linears(made.model):
        if skip and skip in name:
            continue
        n, k = module.weight.shape
        size = k if group == -1 else group
        codes = rng.integers(0, 1 << bits, (k, n))
        middle = 1 << (bits - 1)
        zeros = np.full((k // size, n), middle) if symmetric else rng.integers(1, 1 << bits, (k // size, n))
        scales = torch.from_numpy(rng.uniform(0.5, 1.5, (k // size, n)) * 0.08 / (1 << bits)).half()
        g_idx = np.arange(k) // size
        if by_activations:
            # Modules of one input are quantized in the order of the same activations.
            g_idx = columns.setdefault(k if "down" in name or "o_proj" in name else -k, rng.permutation(g_idx))
        weight = torch.empty(n, k)
        for column in range(k):
            at = g_idx[column]
            weight[:, column] = torch.from_numpy(codes[column] - zeros[at]).float() * scales[at].float()
        del made.tensors[f"{name}.weight"]
        made.tensors[f"{name}.qweight"] = pack_words(codes.T, bits).T
        made.tensors[f"{name}.qzeros"] = pack_words(zeros - (version == "gptq"), bits)
        made.tensors[f"{name}.scales"] = scales
        made.tensors[f"{name}.g_idx"] = torch.from_numpy(g_idx.astype(np.int32))
        module.weight.data.copy_(weight)
    made.save({
        "bits": bits, "group_size": group, "desc_act": by_activations, "sym": symmetric, "lm_head": False,
        "quant_method": "gptq", "checkpoint_format": version, "pack_dtype": "int32", "damp_percent": 0.01,
        "meta": {"quantizer": ["gptqmodel:5.0.0"]}, **({"dynamic": {f"-:.*{skip}.*": {}}} if skip else {}),
    })  # fmt: skip
    return made


def make_awq(folder: Path, config: dict[str, Any], *, group: int = 32) -> Made:
    """A checkpoint as AutoAWQ writes it, version gemm."""
    made, rng = start(folder, config), np.random.default_rng(4)
    for name, module in linears(made.model):
        n, k = module.weight.shape
        codes, zeros = rng.integers(0, 16, (k, n)), rng.integers(0, 16, (k // group, n))
        scales = torch.from_numpy(rng.uniform(0.002, 0.006, (k // group, n))).half()
        for column in range(k):
            at = column // group
            weight = torch.from_numpy(codes[column] - zeros[at]).float() * scales[at].float()
            module.weight.data[:, column] = weight
        del made.tensors[f"{name}.weight"]
        made.tensors[f"{name}.qweight"] = pack_words(codes, 4, AWQ_ORDER)
        made.tensors[f"{name}.qzeros"] = pack_words(zeros, 4, AWQ_ORDER)
        made.tensors[f"{name}.scales"] = scales
    made.save({
        "quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": None,
    })  # fmt: skip
    return made


def make_fp8(folder: Path, config: dict[str, Any], *, block: int | None = 128, static: bool = False) -> Made:
    """A checkpoint as DeepSeek and Qwen ship it, or with one scale per matrix."""
    made = start(folder, config)
    for name, module in linears(made.model):
        weight = module.weight.data
        n, k = weight.shape
        rows = range(0, n, block or n)
        scales = torch.empty(len(rows), len(range(0, k, block or k)))
        values, dense = torch.empty(n, k, dtype=torch.float8_e4m3fn), torch.empty(n, k)
        for i, top in enumerate(rows):
            for j, left in enumerate(range(0, k, block or k)):
                part = (slice(top, top + (block or n)), slice(left, left + (block or k)))
                scales[i, j] = weight[part].abs().max() / 448
                values[part] = (weight[part] / scales[i, j]).to(torch.float8_e4m3fn)
                dense[part] = values[part].float() * scales[i, j]
        made.tensors[f"{name}.weight"] = values
        if block:
            made.tensors[f"{name}.weight_scale_inv"] = scales
        else:
            made.tensors[f"{name}.weight_scale"] = scales[0, 0]
        if static:
            made.tensors[f"{name}.input_scale"] = torch.tensor(0.1)
        weight.copy_(dense)
    made.save({
        "quant_method": "fp8", "activation_scheme": "static" if static else "dynamic", "fmt": "e4m3",
        **({"weight_block_size": [block, block]} if block else {}), "modules_to_not_convert": ["lm_head"],
    })  # fmt: skip
    return made


def make_compressed_tensors(
    folder: Path, config: dict[str, Any], weights: dict[str, Any], activations: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32, groups: dict[str, Any] | None = None,
) -> Made:  # fmt: skip
    """A checkpoint that the compressed-tensors library compresses and saves.

    The dense model is what transformers' own loading makes of it, dequantized. (It knows one group only: of several
    groups the library's own decompression is taken.)
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    one = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}}
    model: Any = save_random_model(config, folder).to(dtype)
    asked = QuantizationConfig(config_groups=groups or one, ignore=["lm_head"], quantization_status="frozen")
    apply_quantization_config(model, asked)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None or scheme.weights is None:
            continue
        low, high = _ranges(module.weight.data.float(), scheme.weights)
        scale, zero = calculate_qparams(low, high, scheme.weights)
        module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
        if getattr(module, "weight_zero_point", None) is not None:
            module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    tensors = load_file(folder / "model.safetensors")
    if groups:
        compressor.decompress_model(model)
        plain = AutoModelForCausalLM.from_config(make_config(config), dtype=dtype).eval()
        state = model.state_dict()
        plain.load_state_dict({name: state[name] for name in plain.state_dict()})
        return Made(folder, plain, tensors)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        loaded = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, quantization_config=CompressedTensorsConfig(dequantize=True)
        )
    return Made(folder, loaded, tensors)


def _ranges(weight: Tensor, args: Any) -> tuple[Tensor, Tensor]:
    """Smallest and largest element of what shares a scale."""
    if args.strategy == "group":
        parts = weight.unflatten(1, (-1, args.group_size))
        return parts.amin(-1), parts.amax(-1)
    if args.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if args.strategy == "block":
        n, k = weight.shape
        padded = nn.functional.pad(weight, (0, -k % 128, 0, -n % 128))
        parts = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
        return parts.amin((1, 3)), parts.amax((1, 3))
    return weight.amin().reshape(1), weight.amax().reshape(1)


def make_mxfp4(folder: Path, config: dict[str, Any]) -> Made:
    """gpt-oss with its experts in MXFP4; the dense model is what transformers' own loading makes of it."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    made, rng = start(folder, config), np.random.default_rng(6)
    for name, parameter in made.model.named_parameters():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            continue
        experts, k, n = parameter.shape
        del made.tensors[name]
        codes = rng.integers(0, 256, (experts, n, k // 32, 16), dtype=np.uint8)
        made.tensors[f"{name}_blocks"] = torch.from_numpy(codes)
        exponents = rng.integers(117, 122, (experts, n, k // 32), dtype=np.uint8)
        made.tensors[f"{name}_scales"] = torch.from_numpy(exponents)
    made.save({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]})
    made.model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
    )
    return made
