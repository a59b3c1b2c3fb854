"""The C++ kernels of backend "cpp": compiled once per machine, then loaded.

A library is built under a name of its own and renamed to one that follows from sources, compiler, flags and torch. So
nobody ever waits for a build, be it running or killed: who finds no library builds one.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

import torch

SOURCES = Path(__file__).with_name("csrc")
FEATURES = ("fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16", "amx-tile", "amx-bf16")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", *(f"-m{feature}" for feature in FEATURES))
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}  # as the functions' names end
COMPILE_SECONDS = 600  # that a compiler may take on a busy machine; 4 are usual

# Arguments of the functions: p a pointer, i a whole number. Those of a dtype are in the second table.
_COMMON = {"sort_copies_of": "piiippp", "top_k_of": "piiiip", "softmax_of": "ppiiiip"}
_BY_DTYPE = {
    "up": "ppppipppp",
    "down": "pppppp",
    "weight_grad": "ppppp",
    "bias_grad": "ppp",
    "scores": "ppiiiip",
    "scores_grad": "pppppiiiiipp",
}


def lacking(dtype: torch.dtype) -> str | None:
    """What this process would need to use the kernels with, None if nothing. Compiles nothing."""
    if dtype not in DTYPES:
        return f"fp32 or bf16, not {str(dtype).removeprefix('torch.')}"
    if (platform.system(), platform.machine()) != ("Linux", "x86_64") or not torch.cpu._is_avx512_supported():
        return "a Linux machine with AVX-512"
    if dtype == torch.bfloat16 and not _may_use_amx():
        return "AMX for bf16, which this CPU has not, or its system does not allow"
    if not _library_path().exists() and shutil.which(_compiler()) is None:
        return f"a C++ compiler ({_compiler()}, or what CXX names)"
    return None


@cache
def library() -> tuple[ctypes.CDLL, float]:
    """The kernels, and the seconds that this process has spent on compiling them.

    Raises:
        RuntimeError: they cannot be compiled or loaded.
    """
    started, path = time.perf_counter(), _library_path()
    seconds = 0.0
    try:
        if not path.exists():
            _compile(path)
            seconds = time.perf_counter() - started
        kernels = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        line = next((line for line in said.splitlines() if "error" in line), said.partition("\n")[0])
        raise RuntimeError(
            f"the C++ kernels cannot be built: {line} (in {path.parent}; XDG_CACHE_HOME moves it)"
        ) from error
    by_dtype = {f"{name}_{dtype}": kinds for name, kinds in _BY_DTYPE.items() for dtype in DTYPES.values()}
    for name, kinds in (_COMMON | by_dtype).items():
        function = getattr(kernels, name)
        function.argtypes = [{"p": ctypes.c_void_p, "i": ctypes.c_int64}[kind] for kind in kinds]
        function.restype = ctypes.c_int64
    _may_use_amx()
    return kernels, seconds


def spent(backend: str) -> str:
    """For the log: what compiling has cost this start, if it has."""
    seconds = library()[1] if backend == "cpp" else 0.0
    return f", compiled in {seconds:.0f} s, once per machine" if seconds else ""


def _may_use_amx() -> bool:
    """Asks the system for AMX, which each process must do before it uses it."""
    return torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _library_path() -> Path:
    hashed = hashlib.sha256(repr((_compiler(), FLAGS, torch.__version__)).encode())
    for source in sorted(SOURCES.iterdir()):
        hashed.update(source.read_bytes())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssd_megatron"
    return folder / f"sparse_ffn-{hashed.hexdigest()[:16]}.so"


def _compile(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as folder:
        built = Path(folder) / path.name
        subprocess.run(
            [_compiler(), *FLAGS, str(SOURCES / "sparse_ffn.cpp"), "-o", str(built)],
            check=True,
            capture_output=True,
            text=True,
            timeout=COMPILE_SECONDS,
        )
        built.replace(path)
