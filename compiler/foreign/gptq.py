"""GPTQ's layout, as AutoGPTQ and GPTQModel write it, and AWQ's, as AutoAWQ writes it.

Both store per module qweight, qzeros and scales, transposed: [k, n], with k / group size rows of scales and zero
points. GPTQ packs codes into int32 along k, AWQ along n in an order of its own. GPTQ's first version stores zero
points less one; `g_idx` gives each column's group where columns were quantized in the order of their activations.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...artifacts.errors import UsageError
from ...passes.weights import Load
from ...runtime.ops.quantized import pack_nibbles
from .fields import FETCH, Fields, module_pattern, names_module
from .layer import FLOATS, Layer, Stored, group_columns, grouped_order
from .packing import awq_codes, codes_of, word_bytes

# What the quantizers write down about how they worked.
_HISTORY = (
    "act_group_aware", "amp", "autoround_version", "batch_size", "block_name_to_quantize",
    "cache_block_outputs", "cache_examples_on_gpu", "damp_auto_increment", "damp_percent", "data_type", "dataset",
    "disable_exllama", "enable_minmax_tuning", "enable_norm_bias_tuning", "enable_quanted_input", "exllama_config",
    "exllama_version", "fuse_max_seq_len", "do_fuse", "gradient_accumulate_steps", "hyb_act", "iters",
    "low_gpu_mem_usage", "lr", "max_input_length", "meta", "minmax_lr", "model_file_base_name",
    "model_name_or_path", "model_seqlen", "module_name_preceding_first_block", "n_samples", "nsamples", "pack_impl",
    "pad_token_id", "quant_block_list", "scale_dtype", "seqlen", "static_groups", "to_quant_block_names", "tokenizer",
    "train_bs", "true_sequential", "use_cuda_fp16", "use_exllama",
)  # fmt: skip


@dataclass(frozen=True)
class _Packed(Layer):
    """What both layouts share: three tensors, transposed."""

    def scale(self, load: Load) -> Tensor:
        """[n, k / group], from the stored [k / group, n]."""
        return self.checked_scale(load(f"{self.prefix}.scales").t())


@dataclass(frozen=True)
class GPTQLayer(_Packed):
    """Codes in int32 words along k; `first_version` stores zero points less one."""

    bits: int = 4
    first_version: bool = True

    def values(self, load: Load) -> Tensor:
        """The words turned round have their codes along k; int8 less 128."""
        self._check_symmetric(load)
        return self.from_codes(word_bytes(load(f"{self.prefix}.qweight").t()))

    def zero(self, load: Load) -> Tensor | None:
        """[n, k / group] of an asymmetric weight."""
        return self._zeros(load).t().contiguous() if self.asymmetric else None

    def _zeros(self, load: Load) -> Tensor:
        """Zero points, uint8 [k / group, n]."""
        stored = codes_of(load(f"{self.prefix}.qzeros"), self.bits)
        if not self.first_version:
            return stored
        if bool((stored == (1 << self.bits) - 1).any()):
            raise self.refused(
                f"a stored zero point is {(1 << self.bits) - 1}",
                "checkpoint_format gptq stores it less one, so that this is 0 to some programs and out of range to"
                " others; gptq_v2 has no such doubt",
            )
        return stored + 1

    def _check_symmetric(self, load: Load) -> None:
        middle = 1 << (self.bits - 1)
        if not self.asymmetric and not bool((self._zeros(load) == middle).all()):
            raise self.refused(
                f"a zero point is not {middle}", "quantization_config says that the weights are symmetric (sym)"
            )


@dataclass(frozen=True)
class AWQLayer(_Packed):
    """Codes in int32 words along n, columns of a word in AWQ's order."""

    def values(self, load: Load) -> Tensor:
        """Codes unpacked, turned round and packed along k."""
        return pack_nibbles(awq_codes(load(f"{self.prefix}.qweight")).t().contiguous())

    def zero(self, load: Load) -> Tensor:
        """[n, k / group]."""
        return awq_codes(load(f"{self.prefix}.qzeros")).t().contiguous()


@dataclass(frozen=True)
class _Scheme:
    """How a module is quantized, as the config says and `dynamic` overrides."""

    bits: int
    group_size: int
    symmetric: bool
    by_activations: bool


class GPTQReader:
    """`quant_method: gptq` (and AutoRound's export to it)."""

    method = "gptq"

    def __init__(self, fields: Fields) -> None:
        self.base = _scheme(fields, None)
        version = fields.one_of("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
        if fields.one_of("format", ("gptq", "gptq_v2"), version) != version:
            raise UsageError(
                f"{fields.where}: format and checkpoint_format disagree", "", "take the model's own config.json"
            )
        self.first_version = version == "gptq"
        fields.one_of("pack_dtype", ("int32",), "int32")
        fields.one_of("lm_head", (True, False), False)
        fields.one_of("is_marlin_format", (False,), False)
        self.skipped = fields.strings("modules_to_not_convert")
        self.overrides = []
        for text, inner in fields.tables("dynamic", {}).items():
            pattern = module_pattern(text.removeprefix("-:").removeprefix("+:"), f"{fields.where}.dynamic")
            scheme = None if text.startswith("-:") else _scheme(inner, self.base)
            self.overrides.append((pattern, scheme))
            if scheme is not None:
                inner.finish(*_HISTORY)
        fields.absent("adapter", "weights with an adapter beside them are not what was quantized")
        # A list of lists of names inside a block; what is stored tells the same.
        fields.finish("backend", "modules_in_block_to_quantize", *_HISTORY)

    def layer(
        self, module: str, kinds: Collection[str], prefix: str, shape: tuple[int, int], stored: Stored
    ) -> Layer | None:
        """A layer is quantized where qweight is stored; the config only says where it must not be."""
        scheme = self._scheme(module)
        if not stored.has(f"{prefix}.qweight"):
            return None
        if scheme is None:
            raise _left_dense(prefix, "qweight")
        (n, k), bits = shape, scheme.bits
        size = group_columns(scheme.group_size, k, prefix)
        groups, word = k // size, 32 // bits
        why = f"{bits} bits in groups of {size} for [{n}, {k}]"
        if k % word or n % word:
            raise UsageError(
                f"{prefix}: {bits}-bit codes of [{n}, {k}] do not fill int32 words", why, "fetch the model again"
            )
        stored.need(f"{prefix}.qweight", [(k // word, n)], [torch.int32], why)
        stored.need(f"{prefix}.qzeros", [(groups, n // word)], [torch.int32], why)
        info = stored.need(f"{prefix}.scales", [(groups, n)], FLOATS, why)
        names, columns = [f"{prefix}.{part}" for part in ("qweight", "qzeros", "scales")], None
        if scheme.by_activations or stored.has(f"{prefix}.g_idx"):
            name = f"{prefix}.g_idx"
            stored.need(name, [(k,)], [torch.int32, torch.int64], why)
            names.append(name)
            columns = grouped_order(stored.load(name), groups, prefix)
        return GPTQLayer(
            prefix, shape, f"int{bits}", (1, size), info.dtype if bits == 4 else torch.float32, tuple(names),
            asymmetric=not scheme.symmetric, columns=columns, bits=bits, first_version=self.first_version,
        )  # fmt: skip

    def _scheme(self, module: str) -> _Scheme | None:
        if any(names_module(name, module) for name in self.skipped):
            return None
        return next((scheme for pattern, scheme in self.overrides if pattern.match(module)), self.base)


class AWQReader:
    """`quant_method: awq`, version gemm."""

    method = "awq"

    def __init__(self, fields: Fields) -> None:
        fields.one_of("bits", (4,))
        self.group_size = fields.integer("group_size")
        fields.one_of("zero_point", (True,), True)
        for key in ("version", "format", "checkpoint_format"):
            fields.one_of(key, ("gemm", "GEMM"), "gemm")
        fields.one_of("backend", ("auto", "autoawq"), "autoawq")
        fields.one_of("pack_dtype", ("int32",), "int32")
        fields.one_of("desc_act", (False,), False)
        fields.one_of("sym", (True, False), False)  # zero points are stored either way
        fields.one_of("lm_head", (False,), False)
        fields.absent("dynamic", "modules that differ are understood in GPTQ's format only")
        self.skipped = fields.strings("modules_to_not_convert")
        fields.finish("modules_in_block_to_quantize", *_HISTORY)

    def layer(
        self, module: str, kinds: Collection[str], prefix: str, shape: tuple[int, int], stored: Stored
    ) -> Layer | None:
        """A layer is quantized where qweight is stored; the config only says where it must not be."""
        if not stored.has(f"{prefix}.qweight"):
            return None
        if any(names_module(name, module) for name in self.skipped):
            raise _left_dense(prefix, "qweight")
        n, k = shape
        size = group_columns(self.group_size, k, prefix)
        groups = k // size
        why = f"4 bits in groups of {size} for [{n}, {k}]"
        if n % 8 or k % 2:
            raise UsageError(
                f"{prefix}: 4-bit codes of [{n}, {k}] do not fill int32 words", why, "fetch the model again"
            )
        stored.need(f"{prefix}.qweight", [(k, n // 8)], [torch.int32], why)
        stored.need(f"{prefix}.qzeros", [(groups, n // 8)], [torch.int32], why)
        info = stored.need(f"{prefix}.scales", [(groups, n)], FLOATS, why)
        names = tuple(f"{prefix}.{part}" for part in ("qweight", "qzeros", "scales"))
        return AWQLayer(prefix, shape, "int4", (1, size), info.dtype, names, asymmetric=True)


def _scheme(fields: Fields, base: _Scheme | None) -> _Scheme:
    """Bits, groups and symmetry; without `base` the first two must be there."""
    given: dict[str, Any] = {"default": base.bits} if base else {}
    bits = fields.one_of("bits", (4, 8), **given)
    size = fields.integer("group_size", **({"default": base.group_size} if base else {}))
    symmetric = fields.one_of("sym", (True, False) if bits == 4 else (True,), base.symmetric if base else True)
    by_activations = fields.one_of("desc_act", (True, False), base.by_activations if base else False)
    return _Scheme(bits, size, symmetric, by_activations)


def _left_dense(prefix: str, part: str) -> UsageError:
    return UsageError(
        f"{prefix}.{part} is stored",
        "quantization_config leaves this module as it is",
        FETCH,
    )
