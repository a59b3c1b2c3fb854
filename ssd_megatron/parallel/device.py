"""The accelerator at hand, and what is missing on this machine and what that costs."""

import ctypes
import importlib.util
import os
import resource
import shutil
from pathlib import Path

import torch

from ssd_megatron.config.load import Hardware

IS_CUDA = torch.cuda.is_available()

# Dense bf16 peak of one device without sparsity, TFLOP/s, by a part of its name (vendors' data sheets).
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "GH200": 989.0, "A100": 312.0, "L40S": 362.0, "B200": 2250.0}

# Optional packages: what they would speed up.
OPTIONAL_PACKAGES = {
    "apex": "fused layer norm (CUDA) falls back to torch's",
}


def local_device() -> torch.device:
    """Device of this process: the GPU of its local rank, or the CPU."""
    if IS_CUDA:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def detect_hardware() -> Hardware:
    """What `"auto"` values of the configuration are resolved with."""
    if IS_CUDA:
        return Hardware(
            device="cuda",
            bf16=torch.cuda.is_bf16_supported(including_emulation=False),
            name=torch.cuda.get_device_name(),
            fp16=True,
        )
    fp16 = bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return Hardware(device="cpu", bf16=torch.cpu._is_amx_tile_supported(), name=_cpu_name(), fp16=fp16)


def peak_tflops(hardware: Hardware) -> float | None:
    """Peak of one device for MFU in TFLOP/s, where it is known."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in hardware.name), None)


def missing_packages() -> list[str]:
    """One line for each optional package or program that is not here, with what it costs."""
    lines = [
        f"{package} is not installed: {cost}"
        for package, cost in OPTIONAL_PACKAGES.items()
        if importlib.util.find_spec(package) is None
    ]
    if shutil.which("numactl") is None:
        lines.append("numactl is not installed: ranks are not bound to cores (deepspeed --bind_cores_to_rank needs it)")
    return lines


def lacking_for_compile() -> str | None:
    """What torch.compile needs and does not find here; None if nothing."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"a C++ compiler, and {compiler} is not installed"
    if IS_CUDA and importlib.util.find_spec("triton") is None:
        return "the package triton, which is not installed"
    return None


def share_cores() -> None:
    """Divide the cores of this machine between its ranks, unless OMP_NUM_THREADS already says how many threads."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    if not IS_CUDA and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held so far: tensors on a GPU, on a CPU all that is resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks: on a CPU, page faults of fresh activations cost more than the arithmetic.

    Sets mallopt's M_MMAP_MAX to 0, M_TRIM_THRESHOLD and M_TOP_PAD high; the resident size then stays at its peak. Not
    fewer arenas: threads inside an operator would wait for each other's small blocks (docs/log.md). Does nothing on a
    GPU machine, and on a C library without mallopt.
    """
    if IS_CUDA:
        return
    libc = ctypes.CDLL(None)
    try:
        mallopt = libc.mallopt
    except AttributeError:
        return
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    for option, value in ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_top_pad, 2**26)):
        mallopt(option, value)


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return "CPU"
