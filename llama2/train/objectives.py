"""What training minimises."""

from collections.abc import Callable

from torch import Tensor

from llama2.model import Llama2

# The loss of one micro-batch of rows, a scalar: a mean, of which that over the micro-batches of a
# step is the step's loss.
Objective = Callable[[Llama2, Tensor], Tensor]


def next_token(model: Llama2, tokens: Tensor) -> Tensor:
    """`Llama2.loss` of tokens `[batch, seq_len + 1]`, each row whole: pre-training."""
    return model.loss(tokens)
