"""Every candidate of every CUDA kernel in the shapes of real models: microseconds, GB/s or TFLOP/s.

`python -m ingot.benchmarks.kernels [--models llama-3.2-1b …] [--format int8] [--only qkv]` on a machine with a GPU,
torch and triton. It is what the order of the providers' candidates is decided by.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..compiler.backends.cuda.kernels import KernelStore
from ..compiler.backends.cuda.lower import Call
from ..compiler.backends.cuda.tune import compile_ahead, measure
from ..runtime.ops.cuda import attention_step, linear, paged_attention, sample
from ..runtime.ops.cuda.spec import Operands, TensorSpec

CONFIGS = Path(__file__).resolve().parent.parent / "recipes" / "configs"


# By name: the op's format, dtypes of values and scales, values in a stored element, columns of a scale (0: the row).
FORMATS = {
    "": ("", "bfloat16", "", 1, 0),
    "int8": ("int8", "int8", "float32", 1, 0),
    "fp8": ("fp8", "float8_e4m3fn", "float32", 1, 0),
    "fp8-dynamic": ("fp8", "float8_e4m3fn", "float32", 1, 0),
    "int8-dynamic": ("int8", "int8", "float32", 1, 0),
    "int4": ("int4_halves", "uint8", "float16", 2, 128),
}


@dataclass(frozen=True)
class Case:
    """One call to measure: bytes that must move, or operations to do."""

    name: str
    provider: Any
    operands: Operands
    nbytes: int = 0
    flops: int = 0
    context: int = 1024


def dense(*shape: int, dtype: str = "bfloat16") -> TensorSpec:
    """A contiguous tensor."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= size
    return TensorSpec(tuple(shape), tuple(strides), dtype)


def linear_case(name: str, m: int, n: int, k: int, *, norm: bool = False, act: str = "", res: bool = False,
                wide: bool = False, format: str = "") -> Case:  # fmt: skip
    """A product of m rows; its weight is read once. `format`: "" or a key of FORMATS."""
    columns = n // 2 if act else n
    kind, stored, scale_dtype, packed, group = FORMATS[format]
    weight = dense(n, k // packed, dtype=stored)
    scale = dense(n, k // (group or k), dtype=scale_dtype) if format else None
    tensors = {
        "x": dense(1, m, k), "weight": weight, "bias": None, "norm_weight": dense(k) if norm else None,
        "residual": dense(1, m, columns) if res else None, "scale": scale, "zero": None,
    }  # fmt: skip
    values = {
        "eps": 1e-5, "offset": 0.0, "narrow_first": True, "activation": act, "gate_first": True, "wide": wide,
        "format": kind, "group": [1, group or k] if format else [],
        # As QuantizeWeights does: of few rows, activations stay as they are.
        "activations": kind if format.endswith("-dynamic") and m > 64 else "",
    }  # fmt: skip
    out = dense(1, m, columns, dtype="float32" if wide else "bfloat16")
    return Case(
        f"{name} m{m} {n}x{k} {format}".strip(),
        linear,
        Operands(tensors, values, {"out": out}, frozenset({"weight", "norm_weight", "scale"})),
        sum(math.prod(t.shape) * getattr(torch, t.dtype).itemsize for t in (weight, scale) if t),
        2 * m * n * k,
    )


def cases(model: str, batches: list[int], lengths: list[int], contexts: list[int], format: str = "") -> list[Case]:
    """The products, attentions and sampler of one model, its weights of one format."""
    config = json.loads((CONFIGS / f"{model}.json").read_text())
    hidden, inter, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    kv = config.get("num_key_value_heads", heads)
    dim, vocab = config.get("head_dim") or hidden // heads, config["vocab_size"]
    found = []
    for m in [*batches, *lengths]:
        norm = m <= 64 or format.endswith("-dynamic")
        found += [
            linear_case("qkv", m, (heads + 2 * kv) * dim, hidden, norm=norm, format=format),
            linear_case("o", m, hidden, heads * dim, res=True, format=format),
            linear_case("gate_up", m, 2 * inter, hidden, norm=norm, act="silu", format=format),
            linear_case("down", m, hidden, inter, res=True, format=format),
        ]
        if m <= 64:
            found.append(linear_case("head", m, vocab, hidden, norm=True, wide=True, format=format))
    for batch in batches:
        for context in contexts:
            if batch * context > 1 << 17:
                continue
            found.append(step_case(batch, heads, kv, dim, context))
        logits = {"logits": dense(batch, vocab, dtype="float32"), "temperature": dense(batch, dtype="float32"),
                  "top_k": dense(batch, dtype="int32"), "top_p": dense(batch, dtype="float32"),
                  "min_p": dense(batch, dtype="float32"), "seeds": dense(batch, dtype="int64"),
                  "positions": dense(batch, dtype="int64")}  # fmt: skip
        outputs = {"out0": dense(batch, dtype="int64"), "out1": dense(batch, dtype="float32")}
        operands = Operands(logits, {}, outputs, frozenset(logits) - {"logits"})
        found.append(Case(f"sample b{batch}", sample, operands, batch * vocab * 4))
    for length in lengths:
        found.append(prefill_case(length, heads, kv, dim))
    return found


def _cache(blocks: int, kv: int, dim: int) -> TensorSpec:
    return dense(blocks, 16, kv, dim)


def step_case(batch: int, heads: int, kv: int, dim: int, context: int) -> Case:
    """A decode step's attention with every row at `context`."""
    width = (heads + 2 * kv) * dim
    tables = -(-(context + 16) // 16)

    def part(count: int) -> TensorSpec:
        return TensorSpec((batch, count, 1, dim), (width, dim, width, 1), "bfloat16")

    cache = _cache(batch * tables + 1, kv, dim)
    tensors: dict[str, TensorSpec | None] = {
        "q": part(heads), "k": part(kv), "v": part(kv), "k_cache": cache, "v_cache": cache,
        "block_tables": dense(batch, tables, dtype="int32"), "positions": dense(batch, 1, dtype="int64"),
        "cos": dense(tables * 16, dim), "sin": dense(tables * 16, dim), "q_norm": None, "k_norm": None, "sinks": None,
    }  # fmt: skip
    values = {"eps": 0.0, "offset": 0.0, "narrow_first": False, "scale": dim**-0.5, "window": 0, "softcap": 0.0}
    stable = frozenset({"k_cache", "v_cache", "block_tables", "positions", "cos", "sin"})
    operands = Operands(tensors, values, {"out": dense(batch, 1, heads, dim)}, stable)
    return Case(f"step b{batch} ctx{context}", attention_step, operands, batch * context * kv * dim * 4,
                context=context)  # fmt: skip


def prefill_case(length: int, heads: int, kv: int, dim: int) -> Case:
    """Causal attention of a whole chunk."""
    tables = length // 16 + 1
    cache = _cache(tables + 1, kv, dim)
    tensors: dict[str, TensorSpec | None] = {
        "q": TensorSpec((1, heads, length, dim), (heads * dim * length, dim, heads * dim, 1), "bfloat16"),
        "k_cache": cache, "v_cache": cache, "block_tables": dense(1, tables, dtype="int32"),
        "positions": dense(1, length, dtype="int64"), "sinks": None,
    }  # fmt: skip
    values = {"scale": dim**-0.5, "window": 0, "softcap": 0.0}
    operands = Operands(tensors, values, {"out": dense(1, length, heads, dim)})
    return Case(f"attention {length}", paged_attention, operands, flops=2 * length * length * heads * dim,
                context=length - 1)  # fmt: skip


def main() -> int:
    """Measure and print; the fastest candidate of each case is marked."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=["llama-3.2-1b", "llama-3.1-8b"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--lengths", nargs="*", type=int, default=[])
    parser.add_argument("--contexts", nargs="*", type=int, default=[1024])
    parser.add_argument("--format", choices=[name for name in FORMATS if name], default="", help="of the weights")
    parser.add_argument("--only", default="")
    parser.add_argument("--seconds", type=float, default=240.0)
    args = parser.parse_args()
    begin = time.monotonic()
    # A plain read of 4 GB: what "share" is a share of.
    big = torch.randn(1 << 30, device="cuda").view(-1)
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        big.sum()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    ceiling = big.numel() * 4 / min(times) / 1e6
    del big
    print(f"{torch.cuda.get_device_name()}: torch sum reads {ceiling:.0f} GB/s", flush=True)
    asked = (args.batches, args.lengths, args.contexts, args.format)
    every = [case for model in args.models for case in cases(model, *asked) if args.only in case.name]
    major, minor = torch.cuda.get_device_capability()
    store = KernelStore(10 * major + minor)
    compile_ahead(store, [Call("", c.provider, c.operands) for c in every])
    print(f"[{time.monotonic() - begin:.0f} s] kernels of {len(every)} calls compiled", file=sys.stderr, flush=True)
    for case in every:
        if time.monotonic() - begin > args.seconds:
            print("out of time")
            break
        configs = case.provider.candidates(case.operands)
        rows = list(zip(measure(store, case.provider, case.operands, configs, case.context), configs))
        best = min(t for t, _ in rows)
        print(f"{case.name}:")
        for microseconds, config in rows:
            rate = f"{case.nbytes / microseconds / 1e3:6.0f} GB/s" if case.nbytes else ""
            if case.flops and (not case.nbytes or case.flops / max(case.nbytes, 1) > 100):
                rate = f"{case.flops / microseconds / 1e6:6.0f} TFLOP/s"
            mark = "*" if microseconds == best else " "
            print(f"  {mark} {microseconds:9.2f} us {rate}  { {k: v for k, v in config.items()} }", flush=True)
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
