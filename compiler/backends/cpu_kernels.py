"""Builds Ingot's C++ CPU kernels (runtime/ops/cpu) into one shared object, and tells Inductor how to call them.

The library is compiled for one instruction set when an artifact is built and travels in the artifact; the runtime has
no compiler. With the shim it also stands in for libtorch, so that a CPU artifact runs on a machine without torch.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ...artifacts.errors import UsageError
from .commands import reproducible, run_compiler

SOURCE_FOLDER = Path(__file__).resolve().parents[2] / "runtime" / "ops" / "cpu"

_KERNELS = (
    *("linear.cpp", "linear_packed.cpp"),
    *("linear_quantized.cpp", "linear_int8.cpp", "linear_int4.cpp", "linear_fp8.cpp", "linear_mxfp4.cpp"),
    *("attention.cpp", "sample.cpp", "run.cpp"),
)
_SHIM = ("shim.cpp", "memory.cpp", "sleef.cpp")
_ISA_FLAGS = {"native": "-march=native", "portable": "-march=x86-64-v3"}
# -fno-math-errno and -fno-trapping-math free the vectorizer; values, NaN and infinities among them, keep their meaning.
_FLAGS = [
    "-std=gnu++17",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
]

C_SHIMS: dict[str, list[str]] = {
    "linear_dense": [
        "AOTITorchError aoti_torch_cpu_linear_dense("
        "AtenTensorHandle x, AtenTensorHandle w, AtenTensorHandle* bias, AtenTensorHandle* ret)"
    ],
    "linear_quantized": [
        "AOTITorchError aoti_torch_cpu_linear_quantized(AtenTensorHandle x, AtenTensorHandle w, "
        "AtenTensorHandle scale, AtenTensorHandle* zero, AtenTensorHandle* bias, const char* format, "
        "const int64_t* group, int64_t group_size, const char* activations, AtenTensorHandle* ret)"
    ],
    "linear_packed": [
        "AOTITorchError aoti_torch_cpu_linear_packed(AtenTensorHandle x, AtenTensorHandle w, AtenTensorHandle* scale, "
        "AtenTensorHandle* zero, AtenTensorHandle* bias, int64_t rows, const char* format, int64_t group, "
        "const char* activations, AtenTensorHandle* ret)"
    ],
    "paged_attention": [
        "AOTITorchError aoti_torch_cpu_paged_attention(AtenTensorHandle q, AtenTensorHandle k_cache, "
        "AtenTensorHandle v_cache, AtenTensorHandle block_tables, AtenTensorHandle positions, double scale, "
        "int64_t window, double softcap, AtenTensorHandle* sinks, AtenTensorHandle* k_scale, "
        "AtenTensorHandle* v_scale, AtenTensorHandle* ret)"
    ],
    "sample": [
        "AOTITorchError aoti_torch_cpu_sample(AtenTensorHandle logits, AtenTensorHandle temperature, "
        "AtenTensorHandle top_k, AtenTensorHandle top_p, AtenTensorHandle min_p, AtenTensorHandle seeds, "
        "AtenTensorHandle positions, AtenTensorHandle* ret)"
    ],
}
"""For Inductor's `aot_inductor.custom_ops_to_c_shims`: the C declaration behind each op of the namespace `ingot`."""


def compile_kernels(output: Path, *, isa: str = "native", with_shim: bool = True, timeout: float = 300.0) -> None:
    """Compile the kernels into the shared object `output`.

    Args:
        output: path of the library; its folder must exist. Written only when all of it has compiled.
        isa: "native" for the machine at hand, "portable" for x86-64-v3 (AVX2 and FMA).
        with_shim: also define the tensor functions that engines otherwise need libtorch for.
        timeout: seconds that one run of the compiler may take.

    Raises:
        UsageError: an unknown `isa`.
        ResourceError: no C++ compiler, or it failed, crashed or took too long.
    """
    if isa not in _ISA_FLAGS:
        raise UsageError(f"Unknown instruction set '{isa}'.", fix=f"Use one of: {', '.join(_ISA_FLAGS)}.")
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    soname = kernels_soname(isa=isa, with_shim=with_shim)
    flags = [*_FLAGS, _ISA_FLAGS[isa], f'-DINGOT_KERNELS_ID="{soname}"']
    paths, what = {str(SOURCE_FOLDER): "ingot"}, "the CPU kernels"
    sources = [*_KERNELS, *(_SHIM if with_shim else ())]
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".kernels-") as folder:
        objects = [str(Path(folder) / f"{name}.o") for name in sources]

        def compile_one(source: str, target: str) -> None:
            command = [*compiler, *flags, "-c", str(SOURCE_FOLDER / source), "-o", target]
            run_compiler(reproducible(command, paths), what, timeout)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_one, sources, objects))
        library = Path(folder) / output.name
        link = ["-shared", "-fopenmp", "-Wl,--exclude-libs,ALL", f"-Wl,-soname,{soname}"]
        run_compiler(reproducible([*compiler, *link, *objects, "-o", str(library)], paths), what, timeout)
        library.replace(output)


def kernels_soname(*, isa: str = "native", with_shim: bool = True) -> str:
    """The library's name and identity: it changes whenever the kernels' source or flags do.

    Two artifacts in one process share a library only when it is the same one; the loader compares.
    """
    digest = hashlib.sha256(f"{isa} {with_shim} {_FLAGS}".encode())
    for path in sorted(SOURCE_FOLDER.iterdir()):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return f"libingot_kernels-{digest.hexdigest()[:16]}.so"
