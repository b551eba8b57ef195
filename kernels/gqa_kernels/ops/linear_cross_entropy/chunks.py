"""The logits of all tokens, one chunk of rows at a time.

The logits of a chunk are computed, replaced by their gradient in place, multiplied, and overwritten
by those of the next chunk. The size of a chunk: with R rows, the product for dweight, whose float32
sum over chunks is in memory, computes 2·R flops per 8 bytes moved. An H200 computes 206 flops (at
989 TFLOP/s in bfloat16) in the time that it moves one byte (at 4.8 TB/s), so from 824 rows on the
product is compute-bound. 256 MiB are 4096 rows of Llama 2's vocabulary and 1024 rows of a
vocabulary of 128256. The memory of the logits does not grow with the number of tokens.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gqa_kernels.ops.linear_cross_entropy.products import (
    rows_product_kernel,
    weight_product_kernel,
)
from gqa_kernels.ops.linear_cross_entropy.softmax import softmax_kernel
from gqa_kernels.runtime import configs, launch, layout, target

_launch_rows_product = launch.launcher(rows_product_kernel)
_launch_weight_product = launch.launcher(weight_product_kernel)
_launch_softmax = launch.launcher(softmax_kernel)


class Vectors(NamedTuple):
    """What `softmax_kernel` reads or writes: each one number per token, or None."""

    loss: Tensor | None = None
    maximum: Tensor | None = None
    log_sum: Tensor | None = None
    score: Tensor | None = None
    mean: Tensor | None = None
    dlog_sum: Tensor | None = None
    dscore: Tensor | None = None
    dmean: Tensor | None = None


class Scores(NamedTuple):
    """How logits become scores."""

    softcap: float | None
    temperature: float
    z_loss: float


class Problem:
    """The projection of hidden states onto a vocabulary, in chunks."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int | None
    ) -> None:
        self.hidden = layout.rows(hidden)
        self.weight = layout.contiguous_features(weight)
        self.targets = targets.reshape(-1).contiguous()
        self.num_rows, self.hidden_size = self.hidden.shape
        self.vocab_size = weight.shape[0]
        self.config = configs.linear_cross_entropy_config(
            target.current().arch, hidden.element_size()
        )
        self.order = self.count = None
        if ignore_index is not None and self.num_rows:
            # Rows that are not ignored come first, in order; the host does not read their number.
            counts = self.targets != ignore_index
            self.order = counts.sort(descending=True, stable=True).indices
            self.count = counts.sum(dtype=torch.int32)

    def logits_of_a_chunk(self) -> Tensor:
        """Allocates the logits of one chunk, with aligned rows."""
        stride = layout.cdiv(self.vocab_size, 64) * 64
        row_bytes = stride * self.hidden.element_size()
        block = self.config.block_m
        most = max(block, configs.LINEAR_CROSS_ENTROPY_BYTES // row_bytes // block * block)
        rows = min(most, self.config.max_rows, layout.cdiv(self.num_rows, block) * block)
        return torch.empty(rows, stride, dtype=self.hidden.dtype, device=self.hidden.device)

    def run(
        self,
        vectors: Vectors,
        scores: Scores,
        dhidden: Tensor | None,
        dweight: Tensor | None,
        *,
        known: bool = False,
    ) -> None:
        """Fills `vectors`, dhidden `[num_rows, hidden_size]` (rows that are not ignored) and
        dweight, float32 `[vocab_size, hidden_size]`, each unless None.

        Args:
            known: maximum, log_sum and mean are given.
        """
        if not self.num_rows:
            if dweight is not None:
                dweight.zero_()
            return
        gradient = dhidden is not None or dweight is not None
        logits = self.logits_of_a_chunk()
        with target.device_of(self.hidden):
            for first, num_rows in self._chunks(len(logits)):
                self._multiply(self.hidden, self.weight, logits, first, num_rows, forward=True)
                self._softmax(logits, vectors, scores, first, num_rows, known, gradient)
                if dhidden is not None:
                    self._multiply(logits, self.weight, dhidden, first, num_rows, forward=False)
                if dweight is not None:
                    self._add_weight_gradient(logits, dweight, first, num_rows)

    def _chunks(self, size: int) -> Iterator[tuple[int, int]]:
        for first in range(0, self.num_rows, size):
            yield first, min(size, self.num_rows - first)

    def _multiply(
        self, a: Tensor, weight: Tensor, c: Tensor, first: int, num_rows: int, *, forward: bool
    ) -> None:
        """logits = hidden · weightᵀ, or dhidden = dlogits · weight."""
        config = self.config
        width = self.vocab_size if forward else self.hidden_size
        strides = (1, weight.stride(0)) if forward else (weight.stride(0), 1)
        blocks = layout.cdiv(num_rows, config.block_m) * layout.cdiv(width, config.block_n)
        _launch_rows_product(
            (blocks,),
            a_ptr=a,
            b_ptr=weight,
            c_ptr=c,
            order_ptr=self.order,
            count_ptr=self.count,
            first=first,
            num_rows=num_rows,
            a_stride=a.stride(0),
            b_k_stride=strides[0],
            b_n_stride=strides[1],
            c_stride=c.stride(0),
            K=self.hidden_size if forward else self.vocab_size,
            N=width,
            A_WIDTH=a.shape[1],
            C_WIDTH=c.shape[1],
            A_NAMED=forward,
            C_NAMED=not forward,
            **config.launch(),
        )

    def _softmax(
        self,
        logits: Tensor,
        vectors: Vectors,
        scores: Scores,
        first: int,
        num_rows: int,
        known: bool,
        gradient: bool,
    ) -> None:
        softcap, slope = scores.softcap, 1.0 / scores.temperature
        _launch_softmax(
            (num_rows,),
            logits_ptr=logits,
            targets_ptr=self.targets,
            order_ptr=self.order,
            count_ptr=self.count,
            **{f"{name}_ptr": vector for name, vector in vectors._asdict().items()},
            first=first,
            num_rows=num_rows,
            logits_stride=logits.stride(0),
            cap_scale=None if softcap is None else 1.0 / softcap,
            unit=(1.0 if softcap is None else softcap) * slope,
            slope=slope,
            z_loss=scores.z_loss,
            VOCAB=self.vocab_size,
            WIDTH=logits.shape[1],
            BLOCK=min(configs.SOFTMAX_BLOCK, layout.power_of_2(self.vocab_size)),
            KNOWN=known,
            GRADIENT=gradient,
            num_warps=configs.SOFTMAX_NUM_WARPS,
        )

    def _add_weight_gradient(
        self, dlogits: Tensor, dweight: Tensor, first: int, num_rows: int
    ) -> None:
        config = self.config
        blocks = layout.cdiv(self.vocab_size, config.block_m)
        blocks *= layout.cdiv(self.hidden_size, config.block_n)
        _launch_weight_product(
            (blocks,),
            dlogits_ptr=dlogits,
            hidden_ptr=self.hidden,
            dweight_ptr=dweight,
            order_ptr=self.order,
            count_ptr=self.count,
            first=first,
            num_rows=num_rows,
            dlogits_stride=dlogits.stride(0),
            hidden_stride=self.hidden.stride(0),
            VOCAB=self.vocab_size,
            WIDTH=dlogits.shape[1],
            HIDDEN=self.hidden_size,
            ADD=first > 0,
            **config.launch(),
        )


def gradients_like(
    hidden: Tensor, weight: Tensor, ignore_index: int | None, need_dhidden: bool, need_dweight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Allocates dhidden, 0 in ignored rows, and dweight in float32, each if needed."""
    dhidden = dweight = None
    if need_dhidden:
        make = torch.empty if ignore_index is None else torch.zeros
        dhidden = make(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    if need_dweight:
        dweight = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
    return dhidden, dweight
