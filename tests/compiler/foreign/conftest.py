"""Checkpoints of every kind, each made once per session; nobody may change them, who wants to takes a copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from .checkpoints import (
    GPT_OSS,
    LLAMA,
    QWEN3,
    Made,
    make_awq,
    make_compressed_tensors,
    make_fp8,
    make_gptq,
    make_mxfp4,
)

_INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
_INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
_FP8 = {**_INT8, "type": "float"}
_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
_MXFP4 = {**_INT4, "type": "float", "scale_dtype": torch.uint8}
# Blocks of 128 rows and columns that end within the matrices, and rows that cannot be stacked.
_WIDE = {**QWEN3, "hidden_size": 192, "intermediate_size": 320}

MAKERS: dict[str, Callable[[Path], Made]] = {
    "ct-int4": lambda folder: make_compressed_tensors(folder, LLAMA, _INT4),
    "ct-int4-asymmetric": lambda folder: make_compressed_tensors(folder, QWEN3, {**_INT4, "symmetric": False}),
    "ct-int4-channel-bf16": lambda folder: make_compressed_tensors(
        folder, LLAMA, {**_INT4, "strategy": "channel", "group_size": None, "symmetric": False}, dtype=torch.bfloat16
    ),
    "ct-int8": lambda folder: make_compressed_tensors(folder, LLAMA, _INT8),
    "ct-int8-grouped": lambda folder: make_compressed_tensors(folder, LLAMA, {**_INT4, "num_bits": 8}),
    "ct-int8-activations": lambda folder: make_compressed_tensors(folder, LLAMA, _INT8, _TOKEN),
    "ct-fp8": lambda folder: make_compressed_tensors(folder, QWEN3, _FP8, {**_TOKEN, "type": "float"}),
    "ct-fp8-static": lambda folder: make_compressed_tensors(
        folder, LLAMA, {**_FP8, "strategy": "tensor"},
        {**_TOKEN, "type": "float", "dynamic": False, "strategy": "tensor"},
    ),
    "ct-fp8-blocks": lambda folder: make_compressed_tensors(
        folder, _WIDE, {**_FP8, "strategy": "block", "block_structure": [128, 128]},
        {**_TOKEN, "type": "float", "strategy": "group", "group_size": 64},
    ),
    "ct-mxfp4": lambda folder: make_compressed_tensors(folder, LLAMA, _MXFP4),
    "ct-mixed": lambda folder: make_compressed_tensors(
        folder, LLAMA, _INT4, groups={
            "group_0": {"targets": ["re:.*self_attn.(q|k|o)_proj$"], "weights": {**_FP8}},
            "group_1": {"targets": ["Linear"], "weights": {**_INT4, "symmetric": False}},
        },
    ),
    "gptq": lambda folder: make_gptq(folder, LLAMA),
    "gptq-by-activations": lambda folder: make_gptq(folder, QWEN3, by_activations=True, symmetric=False),
    "gptq-v2": lambda folder: make_gptq(folder, LLAMA, version="gptq_v2", symmetric=False, group=-1),
    "gptq-int8": lambda folder: make_gptq(folder, LLAMA, bits=8, by_activations=True),
    "gptq-some-dense": lambda folder: make_gptq(folder, LLAMA, skip="k_proj"),
    "awq": lambda folder: make_awq(folder, QWEN3),
    "fp8-blocks": lambda folder: make_fp8(folder, _WIDE),
    "fp8-static": lambda folder: make_fp8(folder, LLAMA, block=None, static=True),
    "mxfp4-experts": lambda folder: make_mxfp4(folder, GPT_OSS),
}  # fmt: skip


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """A checkpoint by the name of its maker."""
    made: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in made:
            made[name] = MAKERS[name](tmp_path_factory.mktemp(name) / "model")
        return made[name]

    return get


@pytest.fixture
def copied(checkpoint: Callable[[str], Made], tmp_path: Path) -> Callable[[str], Made]:
    """A checkpoint's copy, to be changed."""

    def get(name: str) -> Made:
        made = checkpoint(name)
        return Made(Path(shutil.copytree(made.folder, tmp_path / "model")), made.model, dict(made.tensors))

    return get
