"""Measures the peak rates of this GPU and describes it, in the same run as the benchmarks.

`python bench/ceilings.py` prints both.
"""

# ruff: noqa: E402  (what makes the rest importable comes first)

import argparse
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import importable

importable.extend_path()  # before anything of this package

import torch
from floors import Ceilings
from stub import StubDevice, stand_ins
from timing import Call, Clock, Timed

from llama2.checkout import commit_of

COPY_BYTES = 2 * 2**30  # read + written; much larger than any L2 cache
MATRIX_SIZE = 8192


def measure_ceilings(
    clock: Clock, copy_bytes: int = COPY_BYTES, matrix_size: int = MATRIX_SIZE
) -> Ceilings:
    """Measures a copy (bytes read + written per second), a read (a sum) and a square bfloat16
    matrix product on random data (zeros run faster because they need less power)."""
    device = "cpu" if isinstance(clock.device, StubDevice) else "cuda"
    source = torch.randn(copy_bytes // 2 // 2, device=device).bfloat16()
    target = torch.empty_like(source)
    words = source.view(torch.int32)
    a, b = (torch.randn(matrix_size, matrix_size, device=device).bfloat16() for _ in range(2))
    contenders: dict[str, Call] = {
        "copy": lambda: target.copy_(source),
        # int32 has the widest loads and an addition with a low latency.
        "read": lambda: torch.sum(words, dtype=torch.int32),
        "matrix": lambda: a @ b,
    }
    for call in contenders.values():
        call()
    timed = clock.measure(stand_ins(clock.device, contenders), "events")
    failed = {name: result for name, result in timed.items() if not isinstance(result, Timed)}
    if failed:
        raise RuntimeError(f"ceilings: expected all three to run; got {failed}")
    return Ceilings(
        copy_bytes_per_s=copy_bytes / timed["copy"].median,
        read_bytes_per_s=copy_bytes / 2 / timed["read"].median,
        mma_flops_per_s=2 * matrix_size**3 / timed["matrix"].median,
    )


def simulated(clock: Clock) -> Ceilings:
    """The ceilings of a dry run: the same arithmetic on a simulated device's times."""
    return measure_ceilings(clock, copy_bytes=2**16, matrix_size=16)


def ask(question: Call) -> Any:
    """Returns the result of a call, or None if the driver, a library or a permission is missing."""
    try:
        return question()
    except Exception:
        return None


def sensors() -> dict[str, float | None]:
    """The current SM clock in MHz, power in W, temperature in °C; None if unavailable."""
    power = ask(torch.cuda.power_draw)
    return {
        "sm_mhz": ask(torch.cuda.clock_rate),
        "power_w": None if power is None else power / 1000,
        "temperature_c": ask(torch.cuda.temperature),
    }


def version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    found = Path("/proc/driver/nvidia/version")
    if found.is_file():
        words = found.read_text(encoding="utf-8").split("\n")[0].split()
        return next((word for word in words if word.count(".") >= 1 and word[0].isdigit()), None)
    return None


def commit() -> str | None:
    return commit_of(Path(__file__))


def environment() -> dict[str, Any]:
    """The environment in the header of a report; it names no person and no host."""
    found: dict[str, Any] = {
        "gpu": None,
        "driver": _driver(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": ask(torch.backends.cudnn.version),
        "triton": version("triton"),
        "python": platform.python_version(),
        "commit": commit(),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties()
        found |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "num_sms": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            **sensors(),
        }
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="simulated numbers, no GPU")
    options = parser.parse_args(arguments)
    if options.dry_run:
        found, kind = simulated(Clock(StubDevice())), "dry run: simulated"
    else:
        from cuda_device import CudaDevice

        found, kind = measure_ceilings(Clock(CudaDevice())), "measurement"
    content = {"kind": kind, "environment": environment(), "ceilings": found._asdict()}
    print(json.dumps(content, indent=1))
    if options.json:
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
