"""Numeric cases of the CUDA kernels of `fused_linear`: on the GPU, or on the CPU in Triton's interpreter.

Run as a program (TRITON_INTERPRET=1), it prints one JSON object: case -> largest error as a share of what is allowed.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import torch
import triton
from ingot.runtime.ops import fused_reference, quantized, reference
from ingot.runtime.ops.cuda import linear
from ingot.runtime.ops.cuda.spec import Config, KernelCall, Lowering, Operands, TensorSpec


@dataclass(frozen=True)
class Case:
    """One call. `strided`: x and the residual are columns of a wider tensor whose rest is NaN."""

    m: int
    n: int
    k: int
    dtype: torch.dtype = torch.bfloat16
    norm: bool = False
    offset: float = 0.0
    activation: str = ""
    gate_first: bool = True
    bias: bool = False
    residual: bool = False
    wide: bool = False
    strided: bool = False
    format: str = ""
    group: tuple[int, int] = (1, 0)
    zero: bool = False
    activations: str = ""

    def __str__(self) -> str:
        extra = [field.name for field in dataclasses.fields(self)[4:] if getattr(self, field.name) is True]
        form = f"{self.format}{list(self.group)}{self.activations}" if self.format else ""
        return "-".join([f"{self.m}x{self.n}x{self.k}", str(self.dtype)[6:], self.activation, form, *extra])


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = (
    Case(1, 1, 1, FP32),
    Case(1, 24, 64),
    Case(1, 37, 100, norm=True, offset=1.0, bias=True),
    Case(1, 34, 600, norm=True, activation="silu", residual=True, strided=True),
    Case(1, 20, 2304, FP32, norm=True, activation="gelu_tanh", gate_first=False),
    Case(1, 9, 4200, norm=True, residual=True, wide=True),
    Case(2, 40, 264, FP16, activation="gelu", bias=True),
    Case(3, 33, 1024, norm=True, bias=True, residual=True, strided=True),
    Case(3, 64, 96, FP32, norm=True, offset=1.0, activation="relu", residual=True),
    Case(4, 36, 257, norm=True, offset=1.0, activation="silu", gate_first=False),
    Case(5, 70, 257, norm=True, activation="silu", gate_first=False, strided=True),
    Case(6, 40, 500, norm=True, residual=True, strided=True),
    Case(8, 48, 512, norm=True, bias=True),
    Case(8, 48, 250, FP32, norm=True, bias=True, residual=True),
    Case(17, 140, 320, norm=True, offset=1.0, activation="silu", bias=True, strided=True),
    Case(17, 66, 100, FP32, norm=True, activation="gelu"),
    Case(40, 136, 512, norm=True, offset=1.0, activation="silu", gate_first=False),
    Case(64, 130, 200, wide=True, bias=True),
    Case(64, 64, 128, residual=True),
    Case(64, 128, 72, FP16, norm=True, activation="relu"),
    Case(100, 128, 256, bias=True, residual=True, strided=True),
    Case(100, 150, 250, activation="silu", bias=True),
    Case(100, 66, 70, FP32, activation="gelu_tanh", gate_first=False, residual=True),
    Case(200, 132, 64, FP16, activation="gelu"),
    Case(300, 140, 64, wide=True),
    Case(150, 264, 136, bias=True, residual=True, strided=True),
    Case(130, 528, 200, activation="silu", gate_first=False, strided=True),
    Case(600, 256, 72, FP16, activation="gelu_tanh"),
)
INT4 = "int4_halves"
QUANTIZED = (
    Case(1, 24, 64, format="int8"),
    Case(1, 37, 100, norm=True, offset=1.0, bias=True, format="int8"),
    Case(1, 34, 608, norm=True, activation="silu", residual=True, strided=True, format="int8"),
    Case(1, 20, 2304, FP32, norm=True, activation="gelu_tanh", gate_first=False, format="int8"),
    Case(1, 9, 9216, norm=True, residual=True, wide=True, format="int8"),
    Case(2, 40, 264, FP16, activation="gelu", bias=True, format="int8"),
    Case(5, 70, 264, norm=True, activation="silu", gate_first=False, strided=True, format="int8"),
    Case(40, 136, 512, norm=True, activation="silu", format="int8"),
    Case(100, 128, 256, bias=True, residual=True, strided=True, format="int8"),
    Case(1, 24, 64, format="fp8"),
    Case(1, 66, 1000, norm=True, bias=True, residual=True, format="fp8"),
    Case(1, 140, 384, norm=True, activation="silu", format="fp8", group=(128, 128)),
    Case(3, 64, 96, FP32, norm=True, offset=1.0, activation="relu", residual=True, format="fp8"),
    Case(17, 140, 320, norm=True, activation="silu", bias=True, strided=True, format="fp8", group=(128, 128)),
    Case(100, 150, 256, activation="silu", bias=True, format="fp8"),
    Case(1, 24, 64, format=INT4, group=(1, 32)),
    Case(1, 40, 256, norm=True, offset=1.0, bias=True, format=INT4, group=(1, 128), zero=True),
    Case(1, 34, 640, norm=True, activation="silu", residual=True, strided=True, format=INT4, group=(1, 64)),
    Case(1, 20, 896, FP32, norm=True, activation="gelu_tanh", format=INT4, group=(1, 128), zero=True),
    Case(1, 9, 18432, residual=True, wide=True, format=INT4, group=(1, 128)),
    Case(4, 36, 192, FP16, norm=True, format=INT4, group=(1, 192), zero=True),
    Case(6, 40, 512, norm=True, residual=True, strided=True, format=INT4, group=(1, 128)),
    Case(17, 66, 256, FP32, norm=True, activation="gelu", format=INT4, group=(1, 32), zero=True),
    Case(40, 136, 512, norm=True, activation="silu", gate_first=False, format=INT4, group=(1, 64), zero=True),
    Case(100, 150, 256, activation="silu", bias=True, format=INT4, group=(1, 128)),
    Case(300, 140, 128, wide=True, format=INT4, group=(1, 64), zero=True),
    Case(100, 150, 256, norm=True, activation="silu", bias=True, strided=True, format="int8", activations="int8"),
    Case(70, 66, 1000, FP16, residual=True, format="int8", activations="int8"),
    Case(100, 150, 256, norm=True, activation="silu", bias=True, strided=True, format="fp8", activations="fp8"),
    Case(70, 66, 1008, residual=True, wide=True, format="fp8", activations="fp8"),
    Case(5, 130, 128, FP32, norm=True, format="fp8", activations="fp8"),
)


def run_cases(device: str) -> dict[str, float]:
    """The largest error of every case over all its candidates, as a share of what is allowed: at most 1 is right."""
    errors = {str(case): _run(case, device) for case in (*CASES, *QUANTIZED)}
    errors["a row sees no other"] = float(not _rows_apart(device))
    return errors


def scratch_of(lowering: Lowering, device: str) -> dict[str, torch.Tensor]:
    """A lowering's scratch: zero where it must be, else NaN, or all bits set where there is none."""
    made = {}
    for name, each in lowering.scratch.items():
        dtype = getattr(torch, each.dtype)
        fill = 0 if each.zeroed else float("nan") if dtype.is_floating_point else -1
        made[name] = torch.full(each.shape, fill, dtype=torch.float32, device=device).to(dtype)
    return made


def compute(lowering: Lowering, tensors: dict[str, torch.Tensor]) -> None:
    """All launches of a lowering.

    Raises:
        RuntimeError: scratch that the next run wants to find zero is not.
    """
    for call in lowering.calls:
        launch(call, tensors)
    for name, each in lowering.scratch.items():
        if each.zeroed and tensors[name].any():
            raise RuntimeError(f"{name} is left behind without zeroing it")


def launch(call: KernelCall, tensors: dict[str, torch.Tensor]) -> None:
    """Launch a kernel on torch tensors; outside of the interpreter as the plan would, a dependent launch."""
    gpu = tensors["out"].is_cuda
    constants = dict(call.constants) | {"PDL": gpu}
    options: dict[str, Any] = {"num_warps": call.num_warps, "num_stages": call.num_stages}
    if gpu:
        options["launch_pdl"] = call.dependent
        # Where kernels make tensor descriptors; an engine's arena has that memory.
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    pointers = {parameter: tensors[name] for parameter, name in call.pointers.items()}
    call.function[call.grid](**pointers, **constants, **options)


def make(case: Case, device: str) -> tuple[Operands, dict[str, torch.Tensor]]:
    """The call's operands, and its tensors, the output full of NaN."""
    generator = torch.Generator().manual_seed(case.m * 1000003 + case.n * 1009 + case.k)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, case.dtype)

    def rows(width: int) -> torch.Tensor:
        if not case.strided:
            return random(case.m, 1, width)
        wider = torch.full((case.m, 1, width + 48), float("nan"), device=device, dtype=case.dtype)
        wider[..., 16 : 16 + width] = random(case.m, 1, width)
        return wider[..., 16 : 16 + width]

    columns = case.n // 2 if case.activation else case.n
    tensors = {"x": rows(case.k), **_weight(case, generator, device)}
    if case.bias:
        tensors["bias"] = random(case.n)
    if case.norm:
        tensors["norm_weight"] = random(case.k)
    if case.residual:
        tensors["residual"] = rows(columns)
    out_dtype = torch.float32 if case.wide else case.dtype
    out = torch.full((case.m, 1, columns), float("nan"), device=device, dtype=out_dtype)
    operands = Operands(
        tensors={name: _spec(tensors[name]) if name in tensors else None for name in _NAMES},
        values=_values(case),
        outputs={"out": _spec(out)},
        stable=frozenset({"weight", "norm_weight", "scale", "zero"}),
    )
    return operands, tensors | {"out": out}


# What sums of values that are raised above 0 lose, as a share of all terms' sizes.
_SUM_LOSS = {"int8": 2e-4, INT4: 2e-5}
_WIDENED = ("x", "bias", "norm_weight", "residual")
_NAMES = ("x", "weight", "bias", "norm_weight", "residual", "scale", "zero")


def _weight(case: Case, generator: torch.Generator, device: str) -> dict[str, torch.Tensor]:
    """A weight of about unit columns; quantized ones of random bytes, scales and zero points."""
    n, k = case.n, case.k
    if not case.format:
        return {"weight": torch.randn(n, k, generator=generator).to(device, case.dtype) * k**-0.5}
    rows, columns = _group(case)
    blocks = (-(-n // rows), -(-k // columns))
    size = {"int8": 64.0, "fp8": 1.0, INT4: 5.0}[case.format]
    scale = (torch.rand(blocks, generator=generator) + 0.5) * k**-0.5 / size
    made = {"scale": scale.to(torch.bfloat16 if case.zero else torch.float16) if case.format == INT4 else scale}
    if case.format == "int8":
        made["weight"] = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    elif case.format == "fp8":
        made["weight"] = torch.randn(n, k, generator=generator).to(torch.float8_e4m3fn)
    else:
        made["weight"] = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8)
    if case.zero:
        made["zero"] = torch.randint(0, 16, blocks, generator=generator, dtype=torch.uint8)
    return {name: tensor.to(device) for name, tensor in made.items()}


def _group(case: Case) -> list[int]:
    return [case.group[0], case.group[1] or case.k]


def _values(case: Case) -> dict[str, Any]:
    return {
        "eps": 1e-5, "offset": case.offset, "narrow_first": not case.offset, "activation": case.activation,
        "gate_first": case.gate_first, "wide": case.wide, "format": case.format,
        "group": _group(case) if case.format else [], "activations": case.activations,
    }  # fmt: skip


def _spec(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), tuple(tensor.stride()), str(tensor.dtype)[6:])


def _configs(operands: Operands, device: str) -> list[Config]:
    """The candidates; those that differ in warps, stages and hints alone are one to the interpreter.

    Splits of k pay for large products only, so tests add them to the first of these candidates.
    """
    configs = linear.candidates(operands)
    weight = operands.tensors["weight"]
    assert weight is not None
    gemm = next((config for config in configs if config.get("splits") == 1), None)
    steps = -(-operands.tensors["x"].shape[-1] // int((gemm or configs[0])["block_k"]))  # type: ignore[union-attr]
    if gemm is not None and steps % 2 == 0:
        configs = [*configs, {**gemm, "splits": 2}]
    if device != "cpu":
        return configs
    same = {"num_warps": 0, "num_stages": 0, "ahead": 0, "wave": 0}
    return list({json.dumps({**config, **same}, sort_keys=True): config for config in configs}.values())


def _run(case: Case, device: str) -> float:
    operands, tensors = make(case, device)
    exact, allowed = _oracle(case, tensors)
    worst = 0.0
    for config in _configs(operands, device):
        out = tensors["out"].fill_(float("nan"))
        lowering = linear.lower(operands, config)
        compute(lowering, tensors | scratch_of(lowering, device))
        share = ((out.double() - exact).abs() / allowed).max().item()
        worst = share if share != share or share > worst else worst
    return worst


def _oracle(case: Case, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference in float32 on the same values, and what a kernel may differ from it at each element."""
    given: dict[str, Any] = {name: tensors.get(name) for name in _NAMES}
    if not case.format:
        given["weight"] = given["weight"].float()
    given |= {name: tensors[name].float() for name in _WIDENED if name in tensors}
    if case.activations:
        given |= _quantized_rows(case, tensors)
    if case.format:
        matrix = quantized.dequantize(given["weight"], given["scale"], given["zero"], case.format, _group(case))
        given |= {"weight": matrix, "scale": None, "zero": None}
    lost = _SUM_LOSS.get(case.format if case.dtype != FP32 else "", 2e-6)
    exact = fused_reference.fused_linear(**given, **_values(case) | {"format": "", "activations": ""}).double()
    # The linear layer itself, in float64: `size` bounds what sums in any order can lose.
    x = given["x"].double()
    if case.activations:
        # The norm's rounding moves some numbers to their neighbours, and sums of small floats are kept short.
        lost = 8e-3 if case.norm else 4e-3 if case.activations == "fp8" else 2e-6
    if given["norm_weight"] is not None:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * (given["norm_weight"].double() + case.offset)
    weight, bias = given["weight"].double(), 0.0 if given["bias"] is None else given["bias"].double()
    linear_out, size = x @ weight.t() + bias, x.abs() @ weight.abs().t()
    half_step = 0.51 * torch.finfo(case.dtype).eps
    # Normalized rows may be rounded once on their way into the tensor cores.
    loss = lost * size + (half_step * size / 2 if case.norm and case.dtype != FP32 else 0.0)
    loss = loss + (0.0 if case.wide else half_step * linear_out.abs())
    if case.activation:
        first, second = linear_out.chunk(2, -1)
        lost_gate, lost_up = loss.chunk(2, -1)
        gate, up = (first, second) if case.gate_first else (second, first)
        lost_gate, lost_up = (lost_gate, lost_up) if case.gate_first else (lost_up, lost_gate)
        # No activation is steeper than 1.2 or larger than its input.
        loss = (1.2 * lost_gate + half_step * gate.abs()) * (up.abs() + lost_up) + gate.abs() * lost_up
        loss = loss + (half_step + 1e-6) * (gate * up).abs()
    if given["residual"] is not None:
        loss = loss + (half_step if not case.wide else 1e-6) * exact.abs()
    return exact, loss + 1e-6


def _quantized_rows(case: Case, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """x as the reference normalizes and quantizes it, in float32, with no norm left to do."""
    x = tensors["x"]
    if case.norm:
        x = reference.rms_norm(x, tensors["norm_weight"], 1e-5, case.offset, not case.offset)
    values, scale = quantized.quantize_rows(x, case.activations)
    return {"x": values * scale, "norm_weight": None}


def _rows_apart(device: str) -> bool:
    """Whether rows stay as they were, bit for bit, when another row turns into NaN."""
    same = True
    for case in (
        Case(3, 20, 64, norm=True),
        Case(20, 40, 512, norm=True, activation="silu"),
        Case(70, 64, 128),
        Case(3, 20, 64, norm=True, format="int8"),
        Case(5, 40, 512, norm=True, format=INT4, group=(1, 64)),
    ):
        operands, tensors = make(case, device)
        for config in _configs(operands, device):
            results = []
            before = tensors["x"].clone()
            lowering = linear.lower(operands, config)
            everything = tensors | scratch_of(lowering, device)
            for poison in (False, True):
                if poison:
                    tensors["x"][1] = float("nan")
                compute(lowering, everything)
                results.append(tensors["out"].clone())
            tensors["x"].copy_(before)
            others = [row for row in range(case.m) if row != 1]
            same = same and torch.equal(results[0][others], results[1][others]) and bool(results[1][1].isnan().all())
    return same


if __name__ == "__main__":
    from interpreter_repairs import repair

    repair()
    print(json.dumps(run_cases("cpu")))
