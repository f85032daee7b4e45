"""What the machine has: GPUs, memory, processors, disk space.

Sizes are in GiB. torch is imported only where a function needs it, so that a command line and a page can ask
without it.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

GIB = 1024**3


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
    if total:
        return Gpu(index, name, uuid, total / GIB, free / GIB, False, driver)
    # GB10 (DGX Spark) and Jetson have one memory for both processors, and NVML knows no total of it.
    host = host_memory()
    return Gpu(index, name, uuid, host.total_gib, host.available_gib, True, driver)


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
