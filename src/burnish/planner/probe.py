"""What this machine reaches, measured in about two seconds, where a data sheet only says what it could."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from burnish.atomic import atomic_write_text
from burnish.memory.formats import has_kernel
from burnish.planner.rates import Rates
from burnish.planner.version import PLANNER_VERSION

REPEATS = 5


def measured_rates(
    device: torch.device, folder: Path | None, *, unified: bool = False, side: int = 4096
) -> Rates:
    """The rates of a device, kept in `folder` by its name and the versions of torch and the planner.

    Args:
        side: of the square matrix products; attention is over as many tokens in 8 heads of 128.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    known = f"rates-{name}-{torch.__version__}-{side}-{PLANNER_VERSION}.json".replace(" ", "-")
    path = folder / known if folder else None
    if path is not None and path.is_file():
        return Rates(**json.loads(path.read_text(encoding="utf-8")))
    rates = replace(_measured(device, side), unified=unified)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, json.dumps(asdict(rates)))
    return rates


def _measured(device: torch.device, side: int) -> Rates:
    # A GPU before sm_80 takes bf16, too, and makes it of float32.
    slow = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.float16 if slow else torch.bfloat16
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = 2.0 * side**3
    heads = torch.randn(1, 8, side, 128, device=device, dtype=dtype, requires_grad=True)
    upstream = torch.randn_like(heads)
    whole = torch.randn(side * side, device=device)
    on_host = torch.empty(side * side, pin_memory=device.type == "cuda")

    def attend() -> None:
        F.scaled_dot_product_attention(heads, heads, heads).backward(upstream)  # type: ignore[no-untyped-call]

    attention = 3.5 * 4 * 8 * side**2 * 128  # forward, and 2.5 times as much backward
    return Rates(
        matmul=product / _seconds(lambda: a @ b, device),
        fp8=_eight_bit("fp8", a, b, product),
        int8=_eight_bit("int8", a, b, product),
        attention=attention / _seconds(attend, device),
        memory=2 * whole.nbytes / _seconds(lambda: whole.clone(), device),
        from_host=on_host.nbytes / _seconds(lambda: whole.copy_(on_host, non_blocking=True), device),
    )


def _eight_bit(name: str, a: torch.Tensor, b: torch.Tensor, product: float) -> float | None:
    """Rate of the format's products; None where there is no kernel."""
    if a.device.type == "cpu" or not has_kernel(name, a.device):
        return None
    return product / _seconds(_eight_bit_product(name, a, b), a.device)


def _eight_bit_product(name: str, a: torch.Tensor, b: torch.Tensor) -> Callable[[], torch.Tensor]:
    """a (M, K) times b (K, N), rounding not included; the second factor lies by columns, as cuBLAS wants it."""
    by_columns = b.t().contiguous()
    if name == "int8":
        left, right = (one.mul(30).to(torch.int8) for one in (a, by_columns))
        return lambda: torch._int_mm(left, right.t())
    left, right = (one.to(torch.float8_e4m3fn) for one in (a, by_columns))
    rows, columns = (torch.ones(len(one), 1, device=a.device) for one in (left, right))
    return lambda: torch._scaled_mm(left, right.t(), rows, columns.t(), out_dtype=torch.bfloat16)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    wait()
    began = time.perf_counter()
    for _ in range(REPEATS):
        work()
    wait()
    return (time.perf_counter() - began) / REPEATS
