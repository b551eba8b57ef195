"""The op table, over which tests, compile checks, benchmarks and the demo iterate.

It consists of data and plain functions. Whatever is specific to one op is tested separately.
"""

from gqa_kernels.spec import attention, cache, losses, optimizer, prefill, rows, sampling
from gqa_kernels.spec.case import Case, Cost, OpSpec
from gqa_kernels.spec.structure import STRUCTURES

OPS = (*rows.OPS, *attention.OPS, *cache.OPS, *prefill.OPS, *losses.OPS, *sampling.OPS)
# Ops that write to their arguments: tests must not call them twice on the same inputs.
IN_PLACE_OPS = (*cache.IN_PLACE_OPS, *optimizer.IN_PLACE_OPS)

__all__ = ["IN_PLACE_OPS", "OPS", "STRUCTURES", "Case", "Cost", "OpSpec"]
