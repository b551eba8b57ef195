"""Cross-entropy and log-probabilities over a vocabulary, without the logits of all tokens.

Two ops process chunks of logits (`chunks.py`):

- The sum of all losses. Its gradients are one upstream number times values that the forward pass
  can compute. So, while autograd records, the forward pass computes them from the logits it has
  (three matrix products in all), and the backward pass multiplies by the upstream number. Saved in
  between: dhidden, and dweight in float32, which is rounded once, after that multiplication.
- Four numbers per token (`losses.TokenScores`). Their upstream gradients differ from token to token
  and are known only in the backward pass, which recomputes the logits of each chunk (four
  products). Losses per token, log-probabilities and entropies follow from these numbers, also for a
  vocabulary that is sharded over ranks.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from gqa_kernels import losses
from gqa_kernels.ops.linear_cross_entropy import arguments
from gqa_kernels.ops.linear_cross_entropy.chunks import Problem, Scores, Vectors, gradients_like
from gqa_kernels.ops.linear_cross_entropy.softmax import scale_kernel
from gqa_kernels.runtime import configs, launch, layout, library, target

_launch_scale = launch.launcher(scale_kernel)

# The target of an ignored row when the vocabulary is sharded over ranks.
_IGNORED = -1


def _rows(x: Tensor | None, width: int) -> Tensor | None:
    return None if x is None else x.view(-1, width)


# --- The sum of the losses ----------------------------------------------------------------------


def _sum_launch(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int | None,
    softcap: float | None,
    z_loss: float,
    need_dhidden: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns (sum, dhidden, dweight in float32); the gradients are None unless needed."""
    dhidden, dweight = gradients_like(hidden, weight, ignore_index, need_dhidden, need_dweight)
    problem = Problem(hidden, weight, targets, ignore_index)
    loss = torch.zeros(problem.num_rows, dtype=torch.float32, device=hidden.device)
    scores = Scores(softcap, 1.0, z_loss)
    problem.run(Vectors(loss=loss), scores, _rows(dhidden, hidden.shape[-1]), dweight)
    return loss.sum(), dhidden, dweight


def _sum_fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int | None,
    softcap: float | None,
    z_loss: float,
    need_dhidden: bool,
    need_dweight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dhidden = hidden.new_empty(hidden.shape) if need_dhidden else None
    dweight = weight.new_empty(weight.shape, dtype=torch.float32) if need_dweight else None
    return hidden.new_empty((), dtype=torch.float32), dhidden, dweight


def _sum_backward(
    dsum: Tensor, dhidden: Tensor | None, dweight: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Returns dhidden and dweight times dsum, in `dtype`."""

    def scaled(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        y = torch.empty(x.shape, dtype=dtype, device=x.device)
        if not x.numel():
            return y
        with target.device_of(x):
            _launch_scale(
                (layout.cdiv(x.numel(), configs.SCALE_BLOCK),),
                x_ptr=x.contiguous(),
                factor_ptr=dsum,
                y_ptr=y,
                num_elements=x.numel(),
                BLOCK=configs.SCALE_BLOCK,
                num_warps=configs.SCALE_NUM_WARPS,
            )
        return y

    return scaled(dhidden), scaled(dweight)


def _sum_backward_fake(
    dsum: Tensor, dhidden: Tensor | None, dweight: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    return tuple(
        None if x is None else x.new_empty(x.shape, dtype=dtype) for x in (dhidden, dweight)
    )


_SUM_BACKWARD = library.Op("linear_cross_entropy_backward", _sum_backward, _sum_backward_fake)


def _sum_setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
    hidden, weight, targets, *ctx.options, need_dhidden, need_dweight = inputs
    _, dhidden, dweight = output
    ctx.dtype = weight.dtype
    # While it is traced, a call may not know that it will be differentiated.
    needs_dhidden, needs_dweight = ctx.needs_input_grad[:2]
    ctx.is_ready = need_dhidden >= needs_dhidden and need_dweight >= needs_dweight
    # The inputs are saved too, so that the backward pass can refuse a second derivative.
    ctx.save_for_backward(
        hidden,
        weight,
        targets,
        dhidden if ctx.is_ready and needs_dhidden else None,
        dweight if ctx.is_ready and needs_dweight else None,
    )
    ctx.mark_non_differentiable(*(x for x in (dhidden, dweight) if x is not None))
    ctx.set_materialize_grads(False)


def _sum_differentiate(
    ctx: FunctionCtx, dsum: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 8
    if dsum is None:
        return nothing
    needs = ctx.needs_input_grad[:2]
    *inputs, dhidden, dweight = ctx.saved_tensors
    gradients = [dhidden, dweight]
    if not ctx.is_ready:
        _, *gradients = _SUM(*inputs, *ctx.options, *needs)
    gradients = [x if need else None for x, need in zip(gradients, needs, strict=True)]
    results = _SUM_BACKWARD(dsum, *gradients, ctx.dtype)
    return (*(x if need else None for x, need in zip(results, needs, strict=True)), *nothing[2:])


_SUM = library.Op(
    "linear_cross_entropy",
    _sum_launch,
    _sum_fake,
    check=arguments.check_tensors,
    setup_context=_sum_setup_context,
    backward=_sum_differentiate,
)


# --- Four numbers per token -----------------------------------------------------------------------


def _tokens_launch(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int | None,
    softcap: float | None,
    temperature: float,
    need_mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Returns (maximum, log_sum, score, mean), each 0 in ignored rows."""

    def vector() -> Tensor:
        return torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)

    outputs = vector(), vector(), vector(), vector() if need_mean else None
    problem = Problem(hidden, weight, targets, ignore_index)
    problem.run(Vectors(None, *outputs), Scores(softcap, temperature, 0.0), None, None)
    return outputs


def _tokens_fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int | None,
    softcap: float | None,
    temperature: float,
    need_mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    maximum, log_sum, score, mean = (
        hidden.new_empty(targets.shape, dtype=torch.float32) for _ in range(4)
    )
    return maximum, log_sum, score, mean if need_mean else None


def _tokens_backward(
    dlog_sum: Tensor | None,
    dscore: Tensor | None,
    dmean: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    mean: Tensor | None,
    ignore_index: int | None,
    softcap: float | None,
    temperature: float,
    need_dhidden: bool,
    need_dweight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    dhidden, dweight = gradients_like(hidden, weight, ignore_index, need_dhidden, need_dweight)
    given = (None, maximum, log_sum, None, mean, dlog_sum, dscore, dmean)
    vectors = Vectors(*(None if x is None else x.contiguous() for x in given))
    Problem(hidden, weight, targets, ignore_index).run(
        vectors,
        Scores(softcap, temperature, 0.0),
        _rows(dhidden, hidden.shape[-1]),
        dweight,
        known=True,
    )
    return dhidden, None if dweight is None else dweight.to(weight.dtype)


def _tokens_backward_fake(
    dlog_sum: Tensor | None,
    dscore: Tensor | None,
    dmean: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    mean: Tensor | None,
    ignore_index: int | None,
    softcap: float | None,
    temperature: float,
    need_dhidden: bool,
    need_dweight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    return (
        hidden.new_empty(hidden.shape) if need_dhidden else None,
        weight.new_empty(weight.shape) if need_dweight else None,
    )


_TOKENS_BACKWARD = library.Op("token_log_probs_backward", _tokens_backward, _tokens_backward_fake)


def _tokens_setup_context(ctx: FunctionCtx, inputs: tuple, output: tuple) -> None:
    hidden, weight, targets, *ctx.options, need_mean = inputs
    maximum, log_sum, _, mean = output
    ctx.save_for_backward(hidden, weight, targets, maximum, log_sum, mean if need_mean else None)
    ctx.mark_non_differentiable(maximum)
    ctx.set_materialize_grads(False)


def _tokens_differentiate(
    ctx: FunctionCtx,
    _: None,
    dlog_sum: Tensor | None,
    dscore: Tensor | None,
    dmean: Tensor | None,
) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 7
    *saved, mean = ctx.saved_tensors
    if mean is None:
        dmean = None
    if dlog_sum is None and dscore is None and dmean is None:
        return nothing
    needs = ctx.needs_input_grad[:2]
    results = _TOKENS_BACKWARD(dlog_sum, dscore, dmean, *saved, mean, *ctx.options, *needs)
    return (*(x if need else None for x, need in zip(results, needs, strict=True)), *nothing[2:])


_TOKENS = library.Op(
    "token_log_probs",
    _tokens_launch,
    _tokens_fake,
    check=arguments.check_tensors,
    setup_context=_tokens_setup_context,
    backward=_tokens_differentiate,
)


def _token_scores(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignored: Tensor | None,
    options: tuple[float | None, float, bool],
    part: losses.Part | None,
    ignore_index: int | None,
) -> losses.TokenScores:
    """The scores over the whole vocabulary; `options` are softcap, temperature and need_mean."""
    if part is None:
        return losses.TokenScores(*_TOKENS(hidden, weight, targets, ignore_index, *options))
    arguments.check_tensors(hidden, part.weight, targets)
    local = targets - part.first
    num_rows = part.weight.shape[0]
    local = local.masked_fill((local < 0) | (local >= num_rows), num_rows)
    if ignored is not None:
        local = local.masked_fill(ignored, _IGNORED)
    hidden = losses.shared(hidden, part)
    ignore_index = None if ignored is None else _IGNORED
    outputs = _TOKENS(hidden, part.weight, local, ignore_index, *options)
    return losses.of_all_parts(losses.TokenScores(*outputs), targets, part)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    num_predictions: Tensor | float | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor:
    """The loss of hidden · weightᵀ, without all logits in memory; see
    `reference.linear_cross_entropy`.

    Ignored rows cost no matrix product. Logits are computed in chunks of at most 256 MiB, or of one
    block of rows. While autograd records, the gradients of the mean and of the sum are computed in
    the forward pass (three products), those of the losses per token in the backward pass (four).

    Args:
        hidden: float32, float16 or bfloat16 `[..., hidden_size]`, any strides.
        weight: `[vocab_size, hidden_size]`, in hidden's dtype; a DTensor sharded over the
            vocabulary, or with `group` this rank's part of it.
        targets: int32 or int64 `[...]`. A target outside of the vocabulary other than
            `ignore_index` makes the loss NaN.
        ignore_index, reduction, num_predictions, softcap, z_loss, group: as in the reference. In
            float16 the gradient of the sum by a logit, at most 1 + 2 · z_loss · lse, has to stay
            below 65504.
    Returns:
        float32, a scalar, or `[...]` with reduction "none".
    Raises:
        TypeError, ValueError: an argument of another kind, dtype, shape or device.
        NotImplementedError: a DTensor with another sharding; a second derivative.
        RuntimeError: hidden is not on a GPU that Triton drives.
    """
    ignore_index = arguments.ignore_index(ignore_index)
    num_predictions = arguments.num_predictions(reduction, num_predictions)
    softcap, z_loss = arguments.softcap(softcap), arguments.z_loss(z_loss)
    part = losses.part_of(weight, group)
    if part is not None:
        hidden, targets = losses.whole(hidden), losses.whole(targets)
    if part is None and reduction != "none":
        needs = library.keeps_for_gradient(hidden), library.keeps_for_gradient(weight)
        total, *_ = _SUM(hidden, weight, targets, ignore_index, softcap, z_loss, *needs)
        return losses.mean_of(total, targets, ignore_index, reduction, num_predictions)
    ignored = None if ignore_index is None else targets == ignore_index
    options = (softcap, 1.0, False)
    scores = _token_scores(hidden, weight, targets, ignored, options, part, ignore_index)
    token_losses = losses.token_losses(scores, z_loss)
    vocab_size = weight.shape[0] if part is None else part.vocab_size
    token_losses = losses.of_predictions(token_losses, targets, ignored, vocab_size)
    return losses.reduce(token_losses, targets, ignore_index, reduction, num_predictions)


def token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log p(target) of each token, and the entropy, without all logits in memory; see
    `reference.token_log_probs`. Both have gradients; the backward pass recomputes the logits.

    Args:
        hidden, weight, targets, group: as in `linear_cross_entropy`. No target is ignored: a target
            outside of the vocabulary makes its row and the gradient of the weight NaN, even if the
            upstream gradient of the row is 0.
        temperature: positive.
        return_entropy: also return the entropy.
    Returns:
        float32 `[...]`; with return_entropy, (log_probs, entropy).
    Raises:
        As `linear_cross_entropy`.
    """
    temperature = arguments.temperature(temperature)
    options = (None, temperature, arguments.flag("return_entropy", return_entropy))
    part = losses.part_of(weight, group)
    if part is not None:
        hidden, targets = losses.whole(hidden), losses.whole(targets)
    scores = _token_scores(hidden, weight, targets, None, options, part, None)
    vocab_size = weight.shape[0] if part is None else part.vocab_size
    chosen = losses.without_unknown(scores.score - scores.log_sum, targets, vocab_size)
    return (chosen, scores.log_sum - scores.mean) if return_entropy else chosen
