"""Kernels that are broken on purpose exceed the error budget, and by how much.

Each mutant is a copy of the package in which one expression of a kernel is replaced, measured in a
process of its own on small cases of the op table. `pytest -s` of this file prints how many times
its budget each one's error is.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import gqa_kernels

PACKAGE = Path(gqa_kernels.__file__).parent
# Prints the largest part of a budget that any output or gradient of an op's small cases uses.
MEASURE = """
import json, sys, torch
from gqa_kernels import interpreter
if not torch.cuda.is_available():
    interpreter.enable()
from gqa_kernels import accuracy, spec
op, dtypes, *sources = sys.argv[1:]
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
(table,) = [s for s in (*spec.OPS, *spec.IN_PLACE_OPS) if s.name == op]
cases = [case for case in table.test_cases() if case.source in sources]
assert len(cases) == len(sources), "expected one case of each source"
found = {}
for name in dtypes.split(","):
    dtype = getattr(torch, name)
    measured = [m for case in cases for m in accuracy.measure(table, case, dtype, device)]
    found[name] = max(m.share for m in measured)
print(json.dumps(found))
"""


class Mutant(NamedTuple):
    what: str
    file: str
    before: str
    after: str
    op: str
    cases: tuple[str, ...]  # by their sources
    dtypes: tuple[str, ...] = ("float32",)  # in which it is seen


# What is one rounding more is seen where the dtype has many bits, what is wrong everywhere.
ALL = ("float32", "bfloat16")
FINE = ("float32", "float16")
ROUNDED = ".to(tl.bfloat16).to(tl.float32)"
MUTANTS = (
    Mutant(
        "the accumulator is not rescaled when the maximum grows",
        "primitives/tiles.py",
        "accumulator * rescale[:, None]",
        "accumulator",
        "flash_attention",
        ("GQA 3, keys before the queries",),
        ALL,
    ),
    Mutant(
        "the causal mask hides one key too many",
        "primitives/scores.py",
        "keys <= visible.own_keys + visible.window_right",
        "keys < visible.own_keys + visible.window_right",
        "flash_attention",
        ("GQA 3, keys before the queries",),
        ALL,
    ),
    Mutant(
        "the window shows one key too many",
        "primitives/scores.py",
        "keys >= visible.own_keys - visible.window_left",
        "keys >= visible.own_keys - visible.window_left - 1",
        "flash_attention",
        ("Mistral's window",),
        ALL,
    ),
    Mutant(
        "the last key is forgotten",
        "primitives/scores.py",
        "seen = keys < visible.seq_len_kv",
        "seen = keys < visible.seq_len_kv - 1",
        "decode_attention",
        ("MQA 8, three chunks",),
        ALL,
    ),
    Mutant(
        "chunks are combined without their weights",
        "ops/cache/splits.py",
        "weights = tl.math.exp2((lse - largest[None, :]) * LOG2_E) * unit[None, :]",
        "weights = tl.where(written, 1.0 / (end_split - first_split), 0.0)",
        "decode_attention",
        ("MQA 8, three chunks",),
        ALL,
    ),
    Mutant(
        "the new tokens of a sequence are aligned with its first keys",
        "ops/cache/prefill_kernel.py",
        "own_keys = new.seq_len - new.num_tokens + queries.token",
        "own_keys = queries.token",
        "prefill_attention",
        ("MQA 5",),
        ALL,
    ),
    Mutant(
        "the tiles before the mask are one too many",
        "ops/cache/prefill_kernel.py",
        "first_masked = first_tile + num_free\n",
        "first_masked = first_tile + num_free + 1\n",
        "prefill_attention",
        ("a chunk with decode steps",),
        ALL,
    ),
    Mutant(
        "a split has a tile too many",
        "ops/cache/prefill_kernel.py",
        "end_tile = tl.minimum(end_tile, (split + 1) * SPLIT_TILES)",
        "end_tile = tl.minimum(end_tile, (split + 1) * SPLIT_TILES + 1)",
        "prefill_attention",
        ("a chunk with decode steps",),
        ALL,
    ),
    Mutant(
        "attention accumulates in bfloat16",
        "primitives/tiles.py",
        "softmax.rounded_sum, accumulator)",
        f"softmax.rounded_sum, accumulator{ROUNDED})",
        "flash_attention",
        ("GQA 3, keys before the queries",),
        FINE,
    ),
    Mutant(
        "weights are rounded to bfloat16, whatever the dtype of v",
        "primitives/tiles.py",
        "weights.to(value.dtype), value, softmax.accumulator",
        "weights.to(tl.bfloat16).to(value.dtype), value, softmax.accumulator",
        "flash_attention",
        ("GQA 3, keys before the queries",),
    ),
    Mutant(
        "lse is rounded to bfloat16",
        "ops/attention/forward.py",
        "lse = softmax.running_max + log_sum / score_unit",
        f"lse = (softmax.running_max + log_sum / score_unit){ROUNDED}",
        "flash_attention",
        ("GQA 3, keys before the queries",),
        ALL,
    ),
    Mutant(
        "the gradient of k accumulates in bfloat16",
        "ops/attention/dkdv.py",
        'dk = tl.dot(d_scores.to(query.dtype), query, dk, input_precision="ieee")',
        f'dk = tl.dot(d_scores.to(query.dtype), query, dk, input_precision="ieee"){ROUNDED}',
        "flash_attention",
        ("MQA 8",),
        FINE,
    ),
    Mutant(
        "the tiles without a mask begin one too early",
        "ops/attention/dkdv.py",
        "tl.cdiv(first_free, BLOCK_M)",
        "first_free // BLOCK_M",
        "flash_attention",
        ("MHA, one short of two blocks",),
        ALL,
    ),
    Mutant(
        "a block of two documents has tiles without a mask",
        "ops/attention/dkdv.py",
        "tl.where(all_see_all, end_row, 0)",
        "end_row",
        "flash_attention",
        ("documents in a row",),
        ALL,
    ),
    Mutant(
        "a hidden key keeps its gradient",
        "ops/attention/dkdv.py",
        "dk = tl.where(seen, dk, 0.0)",
        "dk = tl.where(seen, dk, dk)",
        "flash_attention",
        ("padded on the left",),
        ALL,
    ),
    Mutant(
        "delta is rounded to bfloat16",
        "ops/attention/backward.py",
        "tl.store(delta_ptr + offsets, delta, mask=exists)",
        f"tl.store(delta_ptr + offsets, delta{ROUNDED}, mask=exists)",
        "flash_attention",
        ("MHA",),
    ),
    Mutant(
        "delta is left out",
        "ops/attention/backward.py",
        "delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)",
        "delta = 0.0 * tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)",
        "flash_attention",
        ("MHA",),
        ALL,
    ),
    Mutant(
        "rstd is rounded to bfloat16",
        "ops/norm.py",
        "rstd = tl.rsqrt(tl.sum(h * h) / WIDTH + eps)",
        f"rstd = tl.rsqrt(tl.sum(h * h) / WIDTH + eps){ROUNDED}",
        "rms_norm",
        ("odd width: no 16-byte accesses",),
    ),
    Mutant(
        "squares are rounded to bfloat16",
        "ops/norm.py",
        "tl.sum(h * h)",
        f"tl.sum((h * h){ROUNDED})",
        "rms_norm",
        ("the widest row",),
    ),
    Mutant(
        "epsilon is left out",
        "ops/norm.py",
        "tl.sum(h * h) / WIDTH + eps",
        "tl.sum(h * h) / WIDTH",
        "rms_norm",
        ("the widest row",),
    ),
    Mutant(
        "the gradient of the weight accumulates in bfloat16",
        "ops/norm.py",
        "partial += dy * normalized",
        f"partial = (partial + dy * normalized){ROUNDED}",
        "rms_norm",
        ("more rows than persistent programs",),
    ),
    Mutant(
        "the mean of g · n is left out",
        "ops/norm.py",
        "(g - normalized * (tl.sum(g * normalized) / WIDTH))",
        "g",
        "add_rms_norm",
        ("13B: not a power of two",),
        FINE,
    ),
    Mutant(
        "the sigmoid is rounded to bfloat16",
        "ops/glu.py",
        "y = gate / (1.0 + tl.exp(-gate)) * up",
        f"y = gate * (1.0 / (1.0 + tl.exp(-gate))){ROUNDED} * up",
        "swiglu",
        ("odd width",),
        FINE,
    ),
    Mutant(
        "a token is drawn from all, not from the nucleus",
        "ops/sampling.py",
        "goal = uniform * (above + num_last * weight)",
        "goal = uniform * total",
        "sample_tokens",
        ("greedy, nucleus and whole",),
        ALL,
    ),
    Mutant(
        "angles are rounded to bfloat16",
        "primitives/rotation.py",
        "return a * cos - b * sin, b * cos + a * sin",
        f"return a * cos{ROUNDED} - b * sin, b * cos{ROUNDED} + a * sin",
        "apply_rope",
        ("MHA",),
        FINE,
    ),
    Mutant(
        "chunks of the weight's gradient are added in bfloat16",
        "ops/linear_cross_entropy/products.py",
        "total = tl.load(ptrs, mask=mask, other=0.0)",
        f"total = tl.load(ptrs, mask=mask, other=0.0){ROUNDED}",
        "linear_cross_entropy",
        ("several chunks and blocks",),
        FINE,
    ),
    Mutant(
        "the gradient of the z-loss is left out",
        "ops/linear_cross_entropy/softmax.py",
        "dlog_sum, dscore = 1.0 + 2.0 * z_loss * (maximum + log_sum), -1.0",
        "dlog_sum, dscore = 1.0, -1.0",
        "linear_cross_entropy",
        ("odd width, z-loss",),
        ALL,
    ),
    Mutant(
        "the entropy's gradient forgets the mean",
        "ops/linear_cross_entropy/softmax.py",
        "(1.0 + (x - mean))",
        "(1.0 + x)",
        "token_log_probs",
        ("odd width, entropy",),
        ALL,
    ),
    Mutant(
        "the second moment is not corrected for its start at zero",
        "ops/adamw.py",
        "tl.sqrt(exp_avg_sq) / second_correction + eps",
        "tl.sqrt(exp_avg_sq) + eps",
        "adamw_update",
        ("whole blocks",),
        ALL,
    ),
)


@pytest.mark.mutants
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what.replace(" ", "_"))
def test_it_is_seen(mutant, tmp_path):
    package = tmp_path / "gqa_kernels"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    source = (package / mutant.file).read_text(encoding="utf-8")
    assert mutant.before in source, f"{mutant.file} no longer has this line: choose another"
    (package / mutant.file).write_text(
        source.replace(mutant.before, mutant.after), encoding="utf-8"
    )
    arguments = [mutant.op, ",".join(mutant.dtypes), *mutant.cases]
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    print(f"\n{mutant.what}: " + ", ".join(f"{d} {x:,.1f} × its budget" for d, x in found.items()))
    assert found.keys() == set(mutant.dtypes) and min(found.values()) > 1.0, found
