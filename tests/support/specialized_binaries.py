"""Prints as JSON what `dkdv_specialized.py` compiles to on sm_90; needs bench/ on the path.

    PYTHONPATH=bench python tests/support/specialized_binaries.py [--fewer]

Every row of the table, causal and full; --fewer: head_dim 128, causal.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import capture
import torch
from binary import examine, product_loops

from gqa_kernels.ops.attention.call import Call, prepared
from gqa_kernels.ops.attention.dkdv_specialized import key_value_gradients
from gqa_kernels.runtime.hopper_configs import SPECIALIZED_DKDV


def entries(fewer: bool) -> Iterator[dict]:
    for row in SPECIALIZED_DKDV[-1:] if fewer else SPECIALIZED_DKDV:
        for causal in (True,) if fewer else (True, False):
            q = torch.empty(1, 8192, 64, row.head_dim, dtype=torch.bfloat16)
            k = torch.empty(1, 8192, 8, row.head_dim, dtype=torch.bfloat16)
            call = prepared(Call(q, k, k, *[None] * 8, 0 if causal else None, None))
            lse = torch.empty(1, 64, 8192, dtype=torch.float32)
            (launch,) = capture.capture(
                "sm_90",
                lambda call=call, lse=lse, row=row: key_value_gradients(
                    call, call.q, lse, lse, row
                ),
            )
            binary, files = examine(launch), launch.files()
            ptx = Path(files["ptx"]).read_text(encoding="utf-8")
            yield {
                "row": row._asdict(),
                "causal": causal,
                "specialised": "ttg.warp_specialize" in Path(files["ttgir"]).read_text("utf-8"),
                "shared": launch.shared,
                "mix": binary.mix,
                "serialized": binary.serialized,
                "local": binary.spills,
                "loops": [loop.mix for loop in product_loops(launch)],
                "threads": int(re.search(r"\.reqntid\s+(\d+)", ptx)[1]),
                "max_registers": int(re.search(r"\.maxnreg\s+(\d+)", ptx)[1]),
            }


if __name__ == "__main__":
    print(json.dumps(list(entries("--fewer" in sys.argv))))
