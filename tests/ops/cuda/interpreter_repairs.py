"""Repairs of Triton's interpreter (3.6), for a process that runs kernels in it and nothing else.

It keeps bfloat16 as bit patterns, which its `tl.dot` multiplies as integers; it cuts float32 off to bfloat16 where the
GPU rounds, and forgets to carry where it rounds to float8; and loop bounds that are known at run time alone fail with
numpy from 2.4 on, which no longer turns an array of one element into an int.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from triton import language as tl
from triton.runtime import interpreter


def repair() -> None:
    """Change the interpreter of this process."""
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    create_dot = interpreter.InterpreterBuilder.create_dot

    def create_wide_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, _widened(a), _widened(b), *rest)

    cast = interpreter.InterpreterBuilder.cast_impl

    def rounding_cast(self: Any, source: Any, wanted: Any) -> Any:
        if source.dtype.scalar != tl.float32 or wanted.scalar != tl.bfloat16:
            return cast(self, source, wanted)
        bits = np.ascontiguousarray(source.data).view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return interpreter.TensorHandle(np.where(np.isnan(source.data), np.uint16(0x7FC0), rounded), tl.bfloat16)

    narrow = interpreter.InterpreterBuilder.create_fp_to_fp

    def carrying_narrow(self: Any, source: Any, wanted: Any, mode: Any) -> Any:
        if source.dtype.scalar != tl.float32 or wanted.scalar != tl.float8e4nv:
            return narrow(self, source, wanted, mode)
        small = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.float8_e4m3fn)
        return interpreter.TensorHandle(small.view(torch.uint8).numpy(), tl.float8e4nv)

    interpreter.InterpreterBuilder.cast_impl = rounding_cast
    interpreter.InterpreterBuilder.create_fp_to_fp = carrying_narrow
    interpreter._patch_lang_tensor = patch_tensor_and_index
    interpreter.InterpreterBuilder.create_dot = create_wide_dot


def _widened(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return interpreter.TensorHandle(wide, tl.float32)
