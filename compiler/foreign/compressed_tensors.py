"""compressed-tensors' formats, as llm-compressor writes them: int8, packed int4 and int8, fp8, MXFP4.

The config names which modules are quantized and how, so both are known before a tensor is looked at: a module that is
targeted must be stored quantized, one that is not must not be. A packed weight has its codes along k in int32, its zero
points along n, both shifted to be unsigned. https://github.com/neuralmagic/compressed-tensors
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ...artifacts.errors import UnsupportedModelError, UsageError
from ...passes.weights import Load
from .fields import FETCH, FIX, Fields, module_pattern
from .layer import FLOATS, Layer, Stored, group_columns, grouped_order
from .packing import codes_of, word_bytes

_FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mxfp4-pack-quantized", "mixed-precision",
)  # fmt: skip
_OBSERVED = ("observer", "observer_kwargs", "scale_dtype", "zp_dtype")


@dataclass(frozen=True)
class PlainLayer(Layer):
    """Values in a dtype of their own: int8, or float8_e4m3fn."""

    def values(self, load: Load) -> Tensor:
        """As they are."""
        self.check_centred(load)
        return load(f"{self.prefix}.weight")

    def scale(self, load: Load) -> Tensor:
        """One per row or per block; one for the whole weight is repeated for each row."""
        scale = load(f"{self.prefix}.weight_scale")
        return self.checked_scale(scale if scale.dim() == 2 else scale.reshape(-1, 1))

    def check_centred(self, load: Load) -> None:
        """Raise UsageError if zero points are stored with symmetric weights and are not zero."""
        name = f"{self.prefix}.weight_zero_point"
        if name in self.names and not self.asymmetric and bool(load(name).any()):
            raise self.refused("a zero point is not 0", "quantization_config says that the weights are symmetric")


@dataclass(frozen=True)
class PackedLayer(PlainLayer):
    """Codes of 4 or 8 bits in int32 words along k."""

    def values(self, load: Load) -> Tensor:
        """The bytes of the words: int4 as they are, int8 less 128."""
        n, k = self.shape
        if self.stored_shape(load) != [n, k]:
            raise self.refused(f"weight_shape is {self.stored_shape(load)}", f"the model's config says {[n, k]}")
        self.check_centred(load)
        raw = word_bytes(load(f"{self.prefix}.weight_packed"))
        return self.from_codes(raw[:, : k // 2 if self.format == "int4" else k])

    def zero(self, load: Load) -> Tensor | None:
        """Zero points [n, k / group], stored packed along n."""
        if not self.asymmetric:
            return None
        return codes_of(load(f"{self.prefix}.weight_zero_point").t(), 4)[:, : self.shape[0]].t().contiguous()

    def stored_shape(self, load: Load) -> list[int]:
        """[n, k] as the checkpoint writes it beside the words, which alone do not tell."""
        return [int(size) for size in load(f"{self.prefix}.weight_shape")]


@dataclass(frozen=True)
class MXFP4Layer(PlainLayer):
    """e2m1 codes two to a byte, and e8m0 scales of 32 columns: the layout of the ops."""

    def values(self, load: Load) -> Tensor:
        """As they are."""
        return load(f"{self.prefix}.weight_packed")

    def scale(self, load: Load) -> Tensor:
        """As it is; 255 is e8m0's NaN."""
        scale = load(f"{self.prefix}.weight_scale")
        if bool((scale == 255).any()):
            raise self.refused("a scale is NaN", "no quantizer makes such a one")
        return scale


@dataclass(frozen=True)
class _Scheme:
    """One config group: what its weights are, and what happens to activations."""

    format: str  # of the ops
    packed: bool
    strategy: str
    group_size: int
    symmetric: bool
    reordered: bool
    activations: str
    note: str


class CompressedTensorsReader:
    """`quant_method: compressed-tensors`."""

    method = "compressed-tensors"

    def __init__(self, fields: Fields) -> None:
        common = fields.one_of("format", _FORMATS)
        # Published checkpoints say frozen too; that they are compressed is seen in what they store.
        fields.one_of("quantization_status", ("compressed", "frozen"), "compressed")
        fields.absent("kv_cache_scheme", "the KV cache's scales are made while it is written: shapes.kv_cache_dtype")
        fields.absent("moe_sparsity_config", "pruned experts are not understood")
        fields.absent("transform_config", "transforms of activations are not understood")
        if sparse := fields.table("sparsity_config"):
            sparse.one_of("format", ("dense",), "dense")
        self.ignored = [self._pattern(text, fields.where) for text in fields.strings("ignore")]
        self.schemes: dict[str, _Scheme] = {}
        for group in fields.tables("config_groups").values():
            scheme = _scheme(group, common)
            self.schemes.update(dict.fromkeys(group.strings("targets", None), scheme))
            group.finish()
        fields.finish("global_compression_ratio", "version", "run_compressed", "dequantize", "use_optimized_inference")
        # Names win over patterns and these over classes, each in order of the alphabet, as the library itself has it.
        order = sorted(self.schemes, key=lambda target: (target.startswith("re:"), target))
        self.targets = [(self._pattern(text, fields.where), text) for text in order]

    @staticmethod
    def _pattern(text: str, where: str) -> re.Pattern[str] | str:
        return module_pattern(text[3:], where) if text.startswith("re:") else text

    def layer(
        self, module: str, kinds: Collection[str], prefix: str, shape: tuple[int, int], stored: Stored
    ) -> Layer | None:
        """A layer is quantized where the config says so."""
        parts = [f"{prefix}.{part}" for part in ("weight_packed", "weight_scale", "weight_zero_point")]
        scheme = self._scheme(module, kinds)
        if scheme is None:
            if held := next((name for name in parts if name in stored.tensors), None):
                raise UsageError(
                    f"{held} is stored",
                    "quantization_config's targets leave this module as it is",
                    FETCH,
                )
            return None
        make = _packed_layer if scheme.packed else _plain_layer
        return make(prefix, shape, scheme, stored)

    def _scheme(self, module: str, kinds: Collection[str]) -> _Scheme | None:
        def named(pattern: re.Pattern[str] | str) -> bool:
            return pattern == module if isinstance(pattern, str) else pattern.match(module) is not None

        if any(named(pattern) or pattern in kinds for pattern in self.ignored):
            return None
        hits = [text for pattern, text in self.targets if named(pattern)]
        hits += [text for pattern, text in self.targets if pattern in kinds]
        return self.schemes[hits[0]] if hits else None


def _scheme(group: Fields, common: str) -> _Scheme:
    """A config group's scheme, or a refusal that names what is not supported of it."""
    layout = group.one_of("format", _FORMATS, common)
    weights = group.table("weights")
    if weights is None:
        raise UnsupportedModelError(f"{group.where}.weights is empty", "only weights are loaded quantized", FIX)
    bits, kind = weights.one_of("num_bits", (4, 8), 8), weights.one_of("type", ("int", "float"), "int")
    symmetric = weights.one_of("symmetric", (True, False), True)
    size, block = weights.integer("group_size", -1), weights.integers("block_structure")
    strategy = weights.one_of("strategy", ("tensor", "channel", "group", "block"))
    weights.one_of("dynamic", (False,), False)
    order = weights.one_of("actorder", (False, "weight", "static", "group", "dynamic"), False)
    weights.finish(*_OBSERVED)
    name = {("int", 8): "int8", ("int", 4): "int4", ("float", 8): "fp8", ("float", 4): "mxfp4"}[kind, bits]
    fitting = {
        "int8": ("pack-quantized", "int-quantized", "naive-quantized"), "int4": ("pack-quantized",),
        "fp8": ("float-quantized", "naive-quantized"), "mxfp4": ("mxfp4-pack-quantized",),
    }[name]  # fmt: skip
    reason = ""
    if layout not in fitting:
        reason = f"{name} weights in the format {layout} (they come as {' or '.join(fitting)})"
    elif not symmetric and name != "int4":
        reason = f"asymmetric {name} weights"
    elif (strategy == "block") != (block is not None) or (block is not None and (block != [128, 128] or name != "fp8")):
        reason = f"{name} weights in blocks of {block}"
    elif (strategy == "group" and name == "fp8") or (name == "mxfp4" and (strategy, size) != ("group", 32)):
        reason = f"{name} weights with strategy {strategy} and group_size {size}"
    if reason:
        raise UnsupportedModelError(f"{group.where}: {reason} are not supported", "", FIX)
    activations, note = _activations(group, name, strategy)
    group.absent("output_activations", "quantized outputs are not understood")
    return _Scheme(
        name, layout not in ("int-quantized", "float-quantized", "naive-quantized"), strategy,
        size if strategy == "group" else -1, symmetric, order in ("group", "dynamic"), activations, note,
    )  # fmt: skip


def _activations(group: Fields, name: str, strategy: str) -> tuple[str, str]:
    """What `linear_quantized` does to activations, and what the config asks for besides that."""
    given = group.table("input_activations")
    if given is None:
        return "", ""
    bits, kind = given.one_of("num_bits", (4, 8), 8), given.one_of("type", ("int", "float"), "int")
    given.one_of("symmetric", (True,), True)
    dynamic = given.one_of("dynamic", (True, False), False)
    scope = given.one_of("strategy", ("token", "tensor", "group"), "token" if dynamic else "tensor")
    given.integer("group_size", -1)
    given.one_of("actorder", (False,), False)
    given.finish("block_structure", *_OBSERVED)
    asked = f"{'dynamic' if dynamic else 'static'} {bits}-bit {kind} activations per {scope}"
    same = (bits, kind) == {"int8": (8, "int"), "fp8": (8, "float")}.get(name)
    if not same or strategy not in ("channel", "tensor"):
        return "", f"{asked} are asked for; activations stay as they are, which is more exact"
    if dynamic and scope == "token":
        return name, ""
    return name, f"{asked} are asked for; they are quantized per token, which is more exact"


def _scale_shapes(scheme: _Scheme, shape: tuple[int, int], size: int) -> tuple[tuple[int, int], list[tuple[int, ...]]]:
    """Rows and columns per scale in the ops, and the shapes a stored scale may have."""
    n, k = shape
    if scheme.strategy == "tensor":
        return (1, k), [(), (1,), (1, 1)]
    if scheme.strategy == "block":
        return (128, 128), [(-(-n // 128), -(-k // 128))]
    return (1, size), [(n, k // size)]


def _plain_layer(prefix: str, shape: tuple[int, int], scheme: _Scheme, stored: Stored) -> Layer:
    dtype = torch.int8 if scheme.format == "int8" else torch.float8_e4m3fn
    why = f"{scheme.format} per {scheme.strategy} for {list(shape)}"
    size = group_columns(scheme.group_size, shape[1], prefix)
    group, scales = _scale_shapes(scheme, shape, size)
    stored.need(f"{prefix}.weight", [shape], [dtype], why)
    stored.need(f"{prefix}.weight_scale", scales, FLOATS, why)
    names = (f"{prefix}.weight", f"{prefix}.weight_scale", *_beside(prefix, stored))
    return PlainLayer(prefix, shape, scheme.format, group, torch.float32, names, scheme.activations, note=scheme.note)


def _beside(prefix: str, stored: Stored) -> list[str]:
    """What may be stored and is not needed: static scales of activations, zero points of symmetric weights."""
    parts = ("input_scale", "input_zero_point", "weight_zero_point")
    return [name for part in parts if (name := f"{prefix}.{part}") in stored.tensors]


def _packed_layer(prefix: str, shape: tuple[int, int], scheme: _Scheme, stored: Stored) -> Layer:
    n, k = shape
    size = group_columns(scheme.group_size, k, prefix)
    why = f"{scheme.format} per {scheme.strategy} in groups of {size} columns for [{n}, {k}]"
    group, scales = _scale_shapes(scheme, shape, size)
    if k % 2:
        raise UsageError(f"{prefix}: 4-bit codes of {k} columns do not fill bytes", why, "fetch the model again")
    if scheme.format == "mxfp4":
        stored.need(f"{prefix}.weight_packed", [(n, k // 2)], [torch.uint8], why)
        stored.need(f"{prefix}.weight_scale", scales, [torch.uint8], why)
        both = (f"{prefix}.weight_packed", f"{prefix}.weight_scale")
        return MXFP4Layer(prefix, shape, "mxfp4", (1, 32), torch.uint8, both, note=scheme.note)
    bits = 4 if scheme.format == "int4" else 8
    stored.need(f"{prefix}.weight_packed", [(n, -(-k * bits // 32))], [torch.int32], why)
    stored.need(f"{prefix}.weight_shape", [(2,)], [torch.int32, torch.int64], why)
    info = stored.need(f"{prefix}.weight_scale", scales, FLOATS, why)
    names, columns = [f"{prefix}.{part}" for part in ("weight_packed", "weight_shape", "weight_scale")], None
    if not scheme.symmetric:
        names.append(f"{prefix}.weight_zero_point")
        stored.need(names[-1], [(-(-n * bits // 32), k // size)], [torch.int32], why)
    names += [name for name in _beside(prefix, stored) if name not in names]
    if scheme.reordered:
        names.append(f"{prefix}.weight_g_idx")
        stored.need(names[-1], [(k,)], [torch.int32, torch.int64], why)
        columns = grouped_order(stored.load(names[-1]), k // size, prefix)
    return PackedLayer(
        prefix, shape, scheme.format, group, info.dtype if bits == 4 else torch.float32, tuple(names),
        scheme.activations, not scheme.symmetric, columns, scheme.note,
    )  # fmt: skip
