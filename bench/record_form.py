"""The form of a result file, as a report needs it; `record.py` writes it."""

from pathlib import Path
from typing import Any

from record import read

from llama2.tradeoff.study.result_form import Number, check_entry

_POSITIVE, _AMOUNT = Number(float, 1e-12, 1e30), Number(float, 0, 1e30)
_PERHAPS = Number(float, 0, 1e30, optional=True)
_ROW = {
    "status": ("ok", "skip", "fail"),
    **dict.fromkeys(("reason", "op", "pass", "shape", "backend"), str),
}
_TIMED = {
    "model": str | None,
    "sizes": dict,
    "bound": str,
    "method": str,
    "starved": bool,
    **dict.fromkeys(("floor_us", "median_us", "p20_us", "p80_us", "sol"), _POSITIVE),
    **dict.fromkeys(("host_us", "peak_mem_mib", "spread", "tbps", "tflops"), _AMOUNT),
    **dict.fromkeys(("bytes", "flops"), _AMOUNT),
    "noise": _PERHAPS,
}
_SENSORS = dict.fromkeys(("sm_mhz", "power_w", "tokens_per_s"), _PERHAPS)  # not in every row
_CONTENT = {
    "kind": str,
    "started": str,
    "environment": dict,
    "ceilings": dict | None,
    "rows": [_ROW],
}
_CEILINGS = dict.fromkeys(("copy_bytes_per_s", "read_bytes_per_s", "mma_flops_per_s"), _POSITIVE)


def read_checked(path: Path) -> dict[str, Any]:
    """`record.read` of a file that a report can be made of.

    Raises:
        OSError: the file cannot be read.
        ValueError: not a result file, or an entry is missing or of another kind; the message names
            the file and the entry.
    """
    content = read(path)
    try:
        check_entry("", content, _CONTENT)
        if content["ceilings"] is not None:
            check_entry("ceilings", content["ceilings"], _CEILINGS)
        for index, row in enumerate(content["rows"]):
            known = {name: form for name, form in _SENSORS.items() if name in row}
            timed = _TIMED if row["status"] == "ok" else {}
            check_entry(f"rows[{index}]", row, known | timed)
    except ValueError as error:
        raise ValueError(f"{path}: expected a result file of `pytest bench`; {error}") from error
    return content
