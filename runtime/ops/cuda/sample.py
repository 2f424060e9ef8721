"""CUDA provider of `ingot::sample_with_logit`: a token and its logit per row in a single launch, see `sample_kernels`.

Rows choose what is done for them at run time, from their parameters, so one plan serves greedy and sampled requests.
In decode engines the same launch turns the tokens into the next step's input, so that steps follow each other on the
device and the host reads tokens behind it: `with_advance`.
"""

from __future__ import annotations

from dataclasses import replace

from .sample_kernels import sample_kernel
from .spec import Config, KernelCall, Lowering, Operands, Scratch, TensorSpec

# Neighbouring logits that are kept or skipped together where a threshold is searched: 128 bytes.
GROUP = 32
_MAX_VOCABULARY = 1 << 20
_PER_ROW = (
    ("temperature", "float32"),
    ("top_k", "int32"),
    ("top_p", "float32"),
    ("min_p", "float32"),
    ("seeds", "int64"),
    ("positions", "int64"),
)


def candidates(operands: Operands) -> list[Config]:
    """One configuration alone: the order of sums, and with it the last bit of a threshold, depends on it.

    So a row's token is the same in the engines of all batch sizes.
    """
    return [{"chunk": 8192, "block": 8192, "num_warps": 16}]


def lower(operands: Operands, config: Config) -> Lowering:
    """The launch of one call.

    Args:
        operands: logits [batch, vocabulary] float32, the vocabulary without gaps; temperature, top_p and min_p float32,
            top_k int32, seeds and positions int64, [batch] each and of any stride; "out0" [batch] int64, the tokens;
            "out1" [batch] float32, their logits.
        config: "chunk", logits per program; "block", logits per step of a threshold's search (both powers of two, at
            least 32); "num_warps".

    Raises:
        ValueError: the operands are not of this kind, or the vocabulary is above 2^20.
    """
    batch, vocabulary, strides = _check(operands)
    smallest = max(GROUP, _power_of_two(vocabulary))
    chunk, block = min(int(config["chunk"]), smallest), min(int(config["block"]), smallest)
    chunks = -(-vocabulary // chunk)
    peaks = _power_of_two(chunks * (chunk // GROUP))
    scratch = {
        "best": Scratch((batch, chunks), "int64"),
        "masses": Scratch((batch, chunks), "float32"),
        "peaks": Scratch((batch, peaks), "int32"),
        "listed": Scratch((batch, peaks), "int32"),
        "arrived": Scratch((batch,), "int32", zeroed=True),
    }
    pointers = {name: name for name in ("logits", *(name for name, _ in _PER_ROW))}
    pointers |= {"tokens": "out0", "logit": "out1", **{name: name for name in scratch}}
    call = KernelCall(
        sample_kernel,
        (chunks, batch, 1),
        # The last two are touched with ADVANCE alone.
        {**pointers, "input_tokens": "out0", "input_positions": "out0"},
        {
            "V": vocabulary,
            **{f"{name.upper()}_STRIDE": stride for name, stride in strides.items()},
            "CHUNK": chunk,
            "CHUNKS": chunks,
            "CHUNKS_PADDED": _power_of_two(chunks),
            "GROUP": GROUP,
            "PEAKS": peaks,
            "BLOCK": block,
            "ADVANCE": False,
            "EARLY": all(name in operands.stable for name, _ in _PER_ROW),
            "PDL": True,
        },
        num_warps=int(config["num_warps"]),
        dependent=True,
        label="sample",
    )
    return Lowering((call,), scratch)


def with_advance(lowering: Lowering, tokens: str, positions: str) -> Lowering:
    """What `lower` gave, as the last launch of a decode step: it also prepares the next one.

    Each row that has a position takes its sampled token as its input and moves on by one position; padding (-1) stays
    as it is. `tokens` and `positions` name these inputs, both [batch, 1] int64 and contiguous; the operand positions
    may be a view of the latter.
    """
    (call,) = lowering.calls
    pointers = {**call.pointers, "input_tokens": tokens, "input_positions": positions}
    call = replace(call, pointers=pointers, constants={**call.constants, "ADVANCE": True})
    return replace(lowering, calls=(call,))


def _check(operands: Operands) -> tuple[int, int, dict[str, int]]:
    """(batch, vocabulary, stride in elements from row to row by operand)."""
    logits = _tensor(operands, "logits", "float32", 2)
    batch, vocabulary = logits.shape
    if not 0 < vocabulary <= _MAX_VOCABULARY or (vocabulary > 1 and logits.strides[1] != 1):
        raise ValueError(f"sample: logits {logits.shape} need 1 to {_MAX_VOCABULARY} neighbouring numbers in a row")
    strides = {"logits": logits.strides[0]}
    for name, dtype in _PER_ROW:
        spec = _tensor(operands, name, dtype, 1)
        if spec.shape != (batch,):
            raise ValueError(f"sample: {name} has the shape {spec.shape}; expected ({batch},)")
        strides[name] = spec.strides[0]
    return batch, vocabulary, strides


def _tensor(operands: Operands, name: str, dtype: str, rank: int) -> TensorSpec:
    spec = operands.tensors.get(name)
    if spec is None or spec.dtype != dtype or len(spec.shape) != rank:
        raise ValueError(f"sample: {name} is {spec}; expected a tensor of {dtype} with {rank} dimensions")
    return spec


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
