"""Products of tiles in parts (`pipeline.py`): scores have one accumulator, values one per part."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from gqa_kernels.ops.attention.hopper.pipeline import CONSUMER_ROWS, accumulator_layout


@gluon.jit
def start_scores(q, k, zero):
    """Starts q kᵀ of tiles `[row, feature]`: the products of the parts add up in one accumulator.

    Args:
        zero: of the accumulator's shape.
    """
    scores = warpgroup_mma(q[0], k[0].permute((1, 0)), zero, use_acc=False, is_async=True)
    for part in gl.static_range(1, len(q)):
        scores = warpgroup_mma(q[part], k[part].permute((1, 0)), scores, is_async=True)
    return scores


@gluon.jit
def start_values(weights, v, accumulators):
    """Starts accumulators + weights v, a product per part."""
    values = (warpgroup_mma(weights, v[0], accumulators[0], is_async=True),)
    for part in gl.static_range(1, len(v)):
        values += (warpgroup_mma(weights, v[part], accumulators[part], is_async=True),)
    return values


@gluon.jit
def await_all(products):
    """Waits for all products of this partition; returns the accumulators of these."""
    if len(products) == 1:
        return (warpgroup_mma_wait(0, deps=products),)
    else:
        return warpgroup_mma_wait(0, deps=products)


@gluon.jit
def zero_rows(stages):
    """Accumulators of CONSUMER_ROWS rows with the features of a ring's stages."""
    parts = (_zeros(stages[0].shape[2]),)
    for part in gl.static_range(1, len(stages)):
        parts += (_zeros(stages[part].shape[2]),)
    return parts


@gluon.jit
def _zeros(NUM_FEATURES: gl.constexpr):
    LAYOUT: gl.constexpr = accumulator_layout(NUM_FEATURES)
    return gl.zeros([CONSUMER_ROWS, NUM_FEATURES], gl.float32, layout=LAYOUT)


@gluon.jit
def scale_rows(accumulators, factors):
    """Multiplies the rows of all parts by factors."""
    scaled = (_scale_rows(accumulators[0], factors),)
    for part in gl.static_range(1, len(accumulators)):
        scaled += (_scale_rows(accumulators[part], factors),)
    return scaled


@gluon.jit
def _scale_rows(accumulator, factors):
    LAYOUT: gl.constexpr = accumulator_layout(accumulator.shape[1])
    factors = gl.convert_layout(factors, gl.SliceLayout(1, LAYOUT))
    return accumulator * gl.expand_dims(factors, 1)
