"""Prints as JSON what `dkdv_specialized.py` compiles to on sm_90; needs bench/ on the path.

    PYTHONPATH=bench python tests/support/specialized_binaries.py [--fewer]

Every row of the table, causal and full; --fewer: head_dim 128, causal.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import capture
import torch
from hopper_binaries import call_of, read

from gqa_kernels.ops.attention.dkdv_specialized import key_value_gradients
from gqa_kernels.runtime.hopper_configs import SPECIALIZED_DKDV


def entries(fewer: bool) -> Iterator[dict]:
    for row in SPECIALIZED_DKDV[-1:] if fewer else SPECIALIZED_DKDV:
        for causal in (True,) if fewer else (True, False):
            call = call_of(row.head_dim, causal)
            lse = torch.empty(1, 64, 8192, dtype=torch.float32)
            (launch,) = capture.capture(
                "sm_90",
                lambda call=call, lse=lse, row=row: key_value_gradients(
                    call, call.q, lse, lse, row
                ),
            )
            ttgir = Path(launch.files()["ttgir"]).read_text(encoding="utf-8")
            specialised = "ttg.warp_specialize" in ttgir
            entry = {"row": row._asdict(), "causal": causal, "specialised": specialised}
            yield entry | read(launch)


if __name__ == "__main__":
    print(json.dumps(list(entries("--fewer" in sys.argv))))
