"""The op table: what tests, compile checks, benchmarks and the demo iterate over.

Data and ordinary functions; what is peculiar to one op is an ordinary test of that op.
"""

from gqa_kernels.spec import attention, cache, losses, optimizer, rows, sampling
from gqa_kernels.spec.case import Case, Cost, OpSpec
from gqa_kernels.spec.structure import STRUCTURES

OPS = (*rows.OPS, *attention.OPS, *cache.OPS, *losses.OPS, *sampling.OPS)
# Ops that write to their arguments: not for what calls an op twice on the same inputs.
IN_PLACE_OPS = (*cache.IN_PLACE_OPS, *optimizer.IN_PLACE_OPS)

__all__ = ["IN_PLACE_OPS", "OPS", "STRUCTURES", "Case", "Cost", "OpSpec"]
