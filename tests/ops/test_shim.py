"""The stand-in for libtorch: tensors, constants and `ingot_run`, and that the library needs nothing of torch."""

from __future__ import annotations

import ctypes
import subprocess

import pytest
import torch

from .conftest import Handle, Kernels


def view(kernels: Kernels, handle: Handle, sizes: list[int], strides: list[int], offset: int) -> Handle:
    numbers, made = ctypes.c_int64 * len(sizes), Handle()
    status = kernels.library.aoti_torch__reinterpret_tensor(
        handle,
        ctypes.c_int64(len(sizes)),
        numbers(*sizes),
        numbers(*strides),
        ctypes.c_int64(offset),
        ctypes.byref(made),
    )
    assert status == 0, kernels.error()
    return made


def empty(kernels: Kernels, sizes: list[int], dtype: int = 6, device: int = 0) -> tuple[int, Handle]:
    strides = [1]
    for size in reversed(sizes[1:]):
        strides.insert(0, strides[0] * size)
    numbers, made = ctypes.c_int64 * len(sizes), Handle()
    status = kernels.library.aoti_torch_empty_strided(
        ctypes.c_int64(len(sizes)), numbers(*sizes), numbers(*strides), dtype, device, 0, ctypes.byref(made)
    )
    return status, made


def clone(kernels: Kernels, handle: Handle) -> Handle:
    made = Handle()
    assert kernels.library.aoti_torch_clone(handle, ctypes.byref(made)) == 0
    return made


def address(kernels: Kernels, handle: Handle) -> int:
    data = Handle()
    assert kernels.library.aoti_torch_get_data_ptr(handle, ctypes.byref(data)) == 0
    return data.value or 0


def test_a_view_counts_its_offset_from_the_tensor_it_views(kernels):
    base = torch.arange(60.0)
    outer = view(kernels, kernels.handle(base), [6, 5], [10, 1], 4)
    inner = view(kernels, outer, [2, 3], [20, 1], 11)
    numel = ctypes.c_int64()
    kernels.library.aoti_torch_get_numel(inner, ctypes.byref(numel))
    assert numel.value == 6
    # clone keeps the strides, gaps included, so the values are read back through a dense tensor.
    _, dense = empty(kernels, [2, 3])
    assert kernels.library.aoti_torch_copy_(dense, inner, 0) == 0
    assert torch.equal(kernels.read(dense), base.as_strided((2, 3), (20, 1), 15))


def test_a_view_keeps_the_memory_alive_and_freed_memory_is_used_again(kernels):
    _, owner = empty(kernels, [333, 7])
    first = address(kernels, owner)
    alias = view(kernels, owner, [7], [1], 0)
    kernels.free(owner)
    _, other = empty(kernels, [333, 7])
    assert address(kernels, other) != first
    kernels.free(alias)
    _, again = empty(kernels, [333, 7])
    assert address(kernels, again) == first
    assert first % 64 == 0
    for handle in (other, again):
        kernels.free(handle)
    kernels.library.ingot_release_memory()


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4, 5), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.int8])
def test_copy_and_clone_of_any_layout(kernels, shape, dtype):
    source = torch.randint(-100, 100, shape).to(dtype)
    for layout in (source, source.movedim(0, -1) if len(shape) > 1 else source):
        target = torch.zeros(layout.shape, dtype=dtype)
        assert kernels.library.aoti_torch_copy_(kernels.handle(target), kernels.handle(layout), 0) == 0
        assert torch.equal(target, layout)
        assert torch.equal(kernels.read(clone(kernels, kernels.handle(target))), target)


def test_zero_touches_nothing_but_the_tensor(kernels):
    base = torch.ones(40)
    assert kernels.library.aoti_torch_zero_(view(kernels, kernels.handle(base), [2, 5], [5, 1], 10)) == 0
    assert base.sum() == 30 and (base[10:20] == 0).all()


def test_the_constants_are_torchs(kernels):
    """Compared with libtorch's own answers: engines carry some of these numbers as literals."""
    torch_library = ctypes.CDLL(torch.__file__.replace("__init__.py", "lib/libtorch_cpu.so"))
    exported = subprocess.run(
        ["nm", "-D", "--defined-only", kernels.library._name], capture_output=True, text=True
    ).stdout
    names = [
        line.split()[-1]
        for line in exported.splitlines()
        if "aoti_torch_dtype_" in line or "aoti_torch_device_type_" in line or "aoti_torch_layout_" in line
    ]
    names = [n for n in names if not n.endswith("element_size")]
    assert len(names) > 20
    assert {n: getattr(kernels.library, n)() for n in names} == {n: getattr(torch_library, n)() for n in names}


def test_what_cannot_be_is_refused(kernels):
    assert empty(kernels, [2], device=1)[0] != 0 and "CPU" in kernels.error()
    assert empty(kernels, [2], dtype=9)[0] != 0 and "dtype" in kernels.error()
    a, b = torch.zeros(3), torch.zeros(4)
    assert kernels.library.aoti_torch_copy_(kernels.handle(a), kernels.handle(b), 0) != 0 and "sizes" in kernels.error()
    assert kernels.library.aoti_torch_copy_(kernels.handle(a), kernels.handle(a.int()), 0) != 0


ENGINE = ctypes.CFUNCTYPE(
    ctypes.c_int32,
    Handle,
    ctypes.POINTER(Handle),
    ctypes.c_size_t,
    ctypes.POINTER(Handle),
    ctypes.c_size_t,
    Handle,
    Handle,
)


def run(kernels: Kernels, engine: object, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> int:
    given = (Handle * len(inputs))(*(kernels.handle(t).value for t in inputs))
    wanted = (Handle * len(outputs))(*(kernels.handle(t).value for t in outputs))
    return kernels.library.ingot_run(
        None, engine, ctypes.c_int64(len(inputs)), given, ctypes.c_int64(len(outputs)), wanted
    )


def test_run_gives_fresh_handles_and_copies_results(kernels):
    """An engine consumes its inputs' handles; the caller's must serve the next step too."""

    def engine(container, inputs, n_inputs, outputs, n_outputs, stream, proxy):
        outputs[0] = clone(kernels, Handle(inputs[1]))
        for i in range(n_inputs):
            kernels.free(Handle(inputs[i]))
        return 0

    call = ENGINE(engine)
    inputs, output = [torch.ones(2), torch.arange(6.0)], torch.zeros(6)
    for step in range(3):
        inputs[1] += step
        assert run(kernels, call, inputs, [output]) == 0
        assert torch.equal(output, inputs[1])
    assert run(kernels, call, inputs, [torch.zeros(5)]) != 0 and "size" in kernels.error()
    failing = ENGINE(lambda *_: 1)
    assert run(kernels, failing, inputs, [output]) != 0 and "engine failed" in kernels.error()


@pytest.mark.parametrize("name,function", [("exp", torch.exp), ("tanh", torch.tanh), ("log", torch.log)])
def test_vector_functions_are_exported_for_engines(kernels, name, function):
    exported = subprocess.run(
        ["nm", "-D", "--defined-only", kernels.library._name], capture_output=True, text=True
    ).stdout
    assert f"Sleef_{name}f" in exported


def test_the_library_needs_no_torch(kernels):
    needed = subprocess.run(["ldd", kernels.library._name], capture_output=True, text=True).stdout
    missing = subprocess.run(
        ["nm", "-D", "--undefined-only", kernels.library._name], capture_output=True, text=True
    ).stdout
    assert "torch" not in needed and "aoti_torch" not in missing and "libgomp" in needed
