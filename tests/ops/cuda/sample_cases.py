"""Cases of the CUDA sampler against the plain reference, on a GPU or (run as a script) in Triton's interpreter.

`run_cases(device)` gives for every case the rows whose token or its logit is wrong; an empty list is right.
"""

from __future__ import annotations

import json
import math

import torch
from ingot.runtime.ops import reference
from ingot.runtime.ops.cuda.sample import candidates, lower, with_advance
from ingot.runtime.ops.cuda.spec import Lowering, Operands, TensorSpec
from torch import Tensor

PARAMETERS = (
    ("temperature", torch.float32),
    ("top_k", torch.int32),
    ("top_p", torch.float32),
    ("min_p", torch.float32),
    ("seeds", torch.int64),
    ("positions", torch.int64),
)
# temperature, top_k, top_p, min_p
MIXED = (
    (0.0, 0, 1.0, 0.0),
    (0.0, 5, 0.1, 0.05),
    (1.0, 0, 1.0, 0.0),
    (2.0, 1 << 20, 1.0, 0.0),
    (0.3, 1, 1.0, 0.0),
    (1.0, 5, 1.0, 0.0),
    (2.0, 50, 1.0, 0.0),
    (2.0, 400, 0.9, 0.0),
    (1.0, 0, 0.1, 0.0),
    (0.3, 0, 0.9, 0.0),
    (2.0, 0, 0.9, 0.0),
    (1.0, 0, 0.9999, 0.0),
    (1.0, 0, 0.0, 0.0),
    (1.0, 0, 1.0, 0.05),
    (2.0, 50, 0.9, 0.05),
    (1.0, 5, 0.5, 1.0),
    (2.0, 0, 0.9, 0.001),
)
SMALL = {"chunk": 512, "block": 1024, "num_warps": 4}


def spec(tensor: Tensor) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), tuple(tensor.stride()), str(tensor.dtype).removeprefix("torch."))


def launch(lowering: Lowering, tensors: dict[str, Tensor]) -> None:
    """Run it on a scratch that holds anything, except where it asks for zeros, which it must leave."""
    device = next(iter(tensors.values())).device
    scratch = {}
    for name, wanted in lowering.scratch.items():
        fill = 0 if wanted.zeroed else 0x7F
        scratch[name] = torch.full(wanted.shape, fill, dtype=getattr(torch, wanted.dtype), device=device)
    for call in lowering.calls:
        pointers = {k: tensors[v] if v in tensors else scratch[v] for k, v in call.pointers.items()}
        call.function[call.grid](**pointers, **{**call.constants, "PDL": False}, num_warps=call.num_warps)
    for name, wanted in lowering.scratch.items():
        assert not (wanted.zeroed and scratch[name].any()), f"{name} is not left zero"


def given(logits: Tensor, rows: list[tuple], device: str, apart: int = 1) -> tuple[dict[str, Tensor], Operands]:
    """All tensors of a call; the parameters of neighbouring rows lie `apart` elements apart."""
    tensors = {"logits": logits.to(device)}
    for (name, dtype), column in zip(PARAMETERS, zip(*rows)):
        wide = torch.full((len(rows), apart), -77, dtype=dtype)
        wide[:, 0] = torch.tensor(column, dtype=dtype)
        tensors[name] = wide.to(device)[:, 0]
    outputs = {"out0": torch.full((len(rows),), -1, dtype=torch.int64, device=device)}
    outputs["out1"] = torch.full((len(rows),), -77.0, device=device)
    specs = [{k: spec(v) for k, v in some.items()} for some in (tensors, outputs)]
    return tensors | outputs, Operands(specs[0], {}, specs[1])


def draw(
    logits: Tensor, rows: list[tuple], device: str, config: dict | None = None, apart: int = 1
) -> list[tuple[int, float]]:
    """The kernel's tokens and their logits."""
    tensors, operands = given(logits, rows, device, apart)
    launch(lower(operands, config or candidates(operands)[0]), tensors)
    return list(zip(tensors["out0"].tolist(), tensors["out1"].tolist()))


def expect(logits: Tensor, rows: list[tuple]) -> list[int]:
    columns = [torch.tensor(column, dtype=dtype) for (_, dtype), column in zip(PARAMETERS, zip(*rows))]
    return reference.sample(logits, *columns).tolist()


def wrong(got: list[tuple[int, float]], wanted: list[int], logits: Tensor, rows: list[tuple]) -> list:
    """Rows that got another token than wanted, or another number than the token's logit."""
    found = []
    for row, (token, logit), right, own in zip(rows, got, wanted, logits):
        value = own[right].item()
        if token != right or (logit != value and not (math.isnan(logit) and math.isnan(value))):
            found.append((row, token, right, logit, value))
    return found


def mixed_rows(count: int, seed: int, step: int = 1) -> list[tuple]:
    """`count` draws of every step-th mixture of parameters, with seeds and positions that use all of their bits."""
    numbers = torch.Generator().manual_seed(seed)
    mixtures = MIXED[::step] * count
    seeds = torch.randint(-(2**63), 2**63 - 1, (len(mixtures),), generator=numbers).tolist()
    positions = torch.randint(0, 2**33, (len(mixtures),), generator=numbers).tolist()
    return [(*mixture, *rest) for mixture, *rest in zip(mixtures, seeds, positions)]


def random_logits(rows: int, vocabulary: int, spread: float, seed: int) -> Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def against_reference(
    device: str, vocabulary: int, count: int, spread: float, config: dict | None = None, step: int = 1
) -> list:
    rows = mixed_rows(count, vocabulary, step)
    logits = random_logits(len(rows), vocabulary, spread, vocabulary)
    return wrong(draw(logits, rows, device, config), expect(logits, rows), logits, rows)


def ties(device: str) -> list:
    """Few distinct values, both zeros among them: every tie at a threshold is kept, greedy takes the lowest index."""
    rows = mixed_rows(1, 3)
    logits = (random_logits(len(rows), 700, 2.0, 3)).round()
    logits[::2] -= 4
    assert ((logits == 0) & torch.signbit(logits)).any()
    return wrong(draw(logits, rows, device, SMALL), expect(logits, rows), logits, rows)


def masked_logits(device: str) -> list:
    """Rows of which most tokens, or all but two, are -inf."""
    rows = mixed_rows(1, 4, 2)
    logits = random_logits(len(rows), 3000, 3.0, 4)
    logits[logits < 1] = float("-inf")
    logits[::2] = float("-inf")
    logits[::2, [1500, 2999]] = torch.tensor([-3.0, -2.0])
    return wrong(draw(logits, rows, device, SMALL), expect(logits, rows), logits, rows)


def non_finite(device: str) -> list:
    """The first NaN, else the first infinity, wins whatever the parameters; a row of -inf alone gives 0."""
    parameters = [(*row, 5, 7) for row in MIXED[::4]]
    logits = random_logits(4, 2100, 1.0, 5)
    logits[0, [77, 1900]] = float("nan")
    logits[0, 50] = float("inf")
    logits[1, [1005, 2000]] = float("inf")
    logits[2] = float("-inf")
    logits[3, 2099] = -torch.tensor(float("nan"))
    rows = [row for row in parameters for _ in range(4)]
    logits = logits.repeat(len(parameters), 1)
    return wrong(draw(logits, rows, device, SMALL), [77, 1005, 0, 2099] * len(parameters), logits, rows)


def strided(device: str) -> list:
    """Logits that are part of a wider tensor, parameters that are columns."""
    rows = mixed_rows(1, 6, 3)
    logits = random_logits(len(rows), 1500, 2.0, 6)[:, :1001]
    return wrong(draw(logits, rows, device, SMALL, apart=3), expect(logits, rows), logits, rows)


def alone(device: str) -> list:
    """A row's token does not depend on the batch it is drawn in."""
    rows = mixed_rows(1, 8)[5:9]
    logits = random_logits(len(rows), 5000, 1.0, 8)
    single = [draw(logits[i : i + 1], rows[i : i + 1], device)[0][0] for i in range(len(rows))]
    return wrong(draw(logits, rows, device), single, logits, rows)


def largest_uniform(device: str) -> list:
    """A draw that float32 rounds up to 1 is no certain win: such a token is outvoted by a likelier one."""
    size = 1 << 16
    for seed in range(2000):
        noise = reference.gumbel_noise(torch.tensor([seed]), torch.tensor([0]), size)
        if noise.max() > 16.6:
            break
    logits = torch.zeros(1, size)
    winner = (int(noise.argmax()) + 1) % size
    logits[0, winner] = 40.0
    rows = [(1.0, 0, 1.0, 0.0, seed, 0)]
    return wrong(draw(logits, rows, device), [winner], logits, rows)


def advance(device: str) -> list:
    """Each live row takes its token and moves by one position, padding stays as it is; the tokens are the same ones.

    As in an engine, the positions that rows are drawn for are those that move.
    """
    rows = [(*row[:5], -1 if i % 4 == 1 else row[5]) for i, row in enumerate(mixed_rows(1, 9))]
    logits = random_logits(len(rows), 1300, 1.0, 9)
    tensors, operands = given(logits, rows, device)
    inputs = {"input.tokens": torch.full((len(rows), 1), 9, dtype=torch.int64, device=device)}
    inputs["input.positions"] = tensors["positions"][:, None]
    launch(with_advance(lower(operands, SMALL), *inputs), tensors | inputs)
    tokens = tensors["out0"].tolist()
    moved = list(zip(tokens, *(tensor[:, 0].tolist() for tensor in inputs.values())))
    wanted = [(t, 9, -1) if row[5] < 0 else (t, t, row[5] + 1) for t, row in zip(tokens, rows)]
    found: list = [(a, b) for a, b in zip(moved, wanted) if a != b]
    return found + wrong(list(zip(tokens, tensors["out1"].tolist())), expect(logits, rows), logits, rows)


def run_cases(device: str) -> dict[str, list]:
    # A truncated row takes the interpreter about 0.2 s.
    large, many, step = (128256, 8, 1) if device == "cuda" else (20001, 1, 2)
    return {
        "vocabulary 1": against_reference(device, 1, 1, 1.0, step=3),
        "vocabulary 50": against_reference(device, 50, many, 3.0),
        "vocabulary 8192": against_reference(device, 8192, 1, 2.0, step=3),
        "vocabulary 9001, many steps": against_reference(device, 9001, many, 2.0, SMALL | {"block": 2048}),
        "large vocabulary, flat": against_reference(device, large, many, 1.0),
        "large vocabulary, peaked": against_reference(device, large, many, 4.0, step=step),
        "ties": ties(device),
        "masked logits": masked_logits(device),
        "non-finite logits": non_finite(device),
        "strided": strided(device),
        "alone": alone(device),
        "largest uniform": largest_uniform(device),
        "advance": advance(device),
    }


if __name__ == "__main__":
    print(json.dumps(run_cases("cpu")))
