"""What the machine has: GPUs, memory, processors, disk space.

Sizes are in GiB. torch is imported only where a function needs it, so that a command line and a page can ask
without it.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch
    from torch import Tensor

GIB = 1024**3
# By name, because some drivers tell a total for memory that is shared, and none tells what is coherent.
_SHARED = re.compile(r"\b(GB10|Thor|Orin|Xavier)\b")
_COHERENT = re.compile(r"\b(GH200|GB200|GB300)\b")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as its driver sees it; `index` is the driver's, which CUDA_VISIBLE_DEVICES may reorder."""

    index: int
    name: str
    uuid: str
    total_gib: float
    free_gib: float
    is_unified: bool  # shares the host's memory, as DGX Spark and Apple silicon do
    driver: str
    capability: tuple[int, int] | None = None  # NVIDIA's compute capability
    is_coherent: bool = (
        False  # has its own memory and reads the host's as fast as a copy, as Grace Hopper does
    )


@dataclass(frozen=True, slots=True)
class HostMemory:
    total_gib: float
    available_gib: float


@dataclass(frozen=True, slots=True)
class DiskSpace:
    """Of the volume that `path` is on, or will be on once it is made."""

    path: Path
    free_gib: float
    is_writable: bool


@dataclass(frozen=True, slots=True)
class TorchDevices:
    """What the installed torch can use."""

    version: str
    cuda: str | None  # the CUDA version torch was built for; None for a CPU build
    is_cuda_ready: bool
    is_mps_ready: bool


def host_memory() -> HostMemory:
    memory = psutil.virtual_memory()
    return HostMemory(memory.total / GIB, memory.available / GIB)


def gpus() -> tuple[list[Gpu], str]:
    """Every GPU, and why there may be more or "": no driver, no permission."""
    found, trouble = _nvidia_gpus()
    return [*found, *_apple_gpus()], trouble


def _nvidia_gpus() -> tuple[list[Gpu], str]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        return [], ""  # no NVIDIA driver: nothing is wrong with that
    except pynvml.NVMLError as error:
        return [], f"the NVIDIA driver does not answer: {error}"
    try:
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        return [_nvidia_gpu(index, driver) for index in range(pynvml.nvmlDeviceGetCount())], ""
    except pynvml.NVMLError as error:
        return [], f"the NVIDIA driver does not answer: {error}"
    finally:
        pynvml.nvmlShutdown()


def _nvidia_gpu(index: int, driver: str) -> Gpu:
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    name, uuid = str(pynvml.nvmlDeviceGetName(handle)), str(pynvml.nvmlDeviceGetUUID(handle))
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        total, free = int(memory.total), int(memory.free)
    except pynvml.NVMLError_NotSupported:
        total, free = 0, 0
    try:
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
        capability = (int(major), int(minor))
    except pynvml.NVMLError_NotSupported:
        capability = None
    is_unified = not total or bool(_SHARED.search(name))
    if is_unified:
        # GB10 (DGX Spark) and Jetson have one memory for both processors: what the system can still give is free,
        # page cache that it would drop included, of which NVML and CUDA know nothing.
        host = host_memory()
        total, free = round(host.total_gib * GIB), round(host.available_gib * GIB)
    return Gpu(
        index,
        name,
        uuid,
        total / GIB,
        free / GIB,
        is_unified,
        driver,
        capability,
        is_coherent(name),
    )


def is_coherent(name: str) -> bool:
    """Whether a GPU of this name has its own memory and reads the host's over a coherent link."""
    return bool(_COHERENT.search(name))


def _apple_gpus() -> list[Gpu]:
    if sys.platform != "darwin" or platform.machine() != "arm64":
        return []
    host = host_memory()
    return [
        Gpu(0, processor_name(), "apple", host.total_gib, host.available_gib, True, platform.mac_ver()[0])
    ]


def processor_name() -> str:
    """The processor's marketing name, or its architecture where the system does not tell."""
    if sys.platform == "darwin":
        command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        try:
            told = subprocess.run(
                command, capture_output=True, text=True, timeout=5, check=False
            ).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            told = ""
        return told or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def usable_processors() -> int:
    """Logical processors this process may use: fewer than the machine's in a container or under taskset."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows have no affinity
        return os.cpu_count() or 1


def disk_space(path: Path) -> DiskSpace:
    """Of the volume that holds `path`, or its nearest folder that exists."""
    folder = path.expanduser().absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free / GIB
    return DiskSpace(path.expanduser().absolute(), free, os.access(folder, os.W_OK))


def torch_devices() -> TorchDevices:
    """What torch can use; imports torch.

    Raises:
        ImportError, OSError: torch is not installed, or a library it needs is missing.
    """
    import torch

    return TorchDevices(
        torch.__version__, torch.version.cuda, torch.cuda.is_available(), torch.backends.mps.is_available()
    )


def shares_memory(device: torch.device) -> bool:
    """Whether this device and the host have one memory, between which nothing is worth moving."""
    if device.type != "cuda":
        return True
    import torch

    return bool(torch.cuda.get_device_properties(device).is_integrated)


def profits_from_pinning(device: torch.device) -> bool:
    """Whether copies to this device are faster, or can run beside computing, from pinned memory."""
    if shares_memory(device):
        return False
    import torch

    return not is_coherent(torch.cuda.get_device_name(device))


def free_bytes(device: torch.device) -> int:
    """Memory that a run could still take on this device, what torch holds without using it left aside."""
    if shares_memory(device):
        # CUDA counts page cache, which the system gives back when asked, as taken.
        return int(psutil.virtual_memory().available)
    import torch

    return int(torch.cuda.mem_get_info(device)[0])


def sent(tensor: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """A copy on `device`, without waiting for what a GPU still has to compute.

    From plain host memory that is safe: CUDA takes the bytes before it returns (CUDA Driver API, "API synchronization
    behavior"). Copies back to the host are waited for, as ever.
    """
    import torch

    return tensor.to(device, dtype, non_blocking=torch.device(device).type == "cuda")
