"""Settings and statistics of speculative decoding.

A drafter guesses the next tokens of every sequence, and the model computes its logits at all of
them in one step. At each place the model draws its own token, with the uniform number of that place
(`sampling.sample`); the guesses are accepted up to the first that differs from the model's token,
which takes that guess's place. So every step gives from 1 to num_tokens + 1 new tokens, and they
are the tokens that the model draws without a drafter, greedy or sampled.

A draft model draws with the same uniform numbers as the model. Where the two distributions are
equal, so are the tokens. Rejection sampling (Leviathan et al. 2023, arXiv:2211.17192; Chen et al.
2023, arXiv:2302.01318) would accept a sampled guess more often, with probability 1 − TV, TV the
total variation distance of the distributions, but draws other tokens than decoding without a
drafter, and other ones for every drafter. The guess of a prompt look-up is accepted with the
probability that the model gives it, under either rule.
"""

from dataclasses import dataclass

from gqa_kernels.reference import MAX_NEW_TOKENS
from llama2.decoding.sampling import is_whole
from llama2.model import Llama2

MOST_DRAFTED = MAX_NEW_TOKENS - 1  # with the latest token, what decode_attention takes


@dataclass(frozen=True)
class PromptLookup:
    """Drafts what followed the latest occurrence of the sequence's last tokens, in the prompt or in
    the new tokens (Saxena 2023, prompt lookup decoding). It needs no second model.

    Of the earlier places of a sequence it chooses the one before which most tokens, up to
    `max_ngram`, equal the sequence's last ones, and the latest of equal ones.

    Args:
        num_tokens: tokens drafted per step, from 1 to 15.
        max_ngram: the most last tokens that are compared, at least 1.
    Raises:
        ValueError: a number outside its range.
    """

    num_tokens: int = 7
    max_ngram: int = 3

    def __post_init__(self) -> None:
        check_num_tokens(self.num_tokens)
        if not is_whole(self.max_ngram) or self.max_ngram < 1:
            raise ValueError(f"max_ngram: expected an int of at least 1; got {self.max_ngram!r}")


@dataclass(frozen=True)
class DraftModel:
    """Drafts with a second, usually much smaller, model of the same vocabulary.

    The draft model keeps a cache of its own. A step makes `num_tokens` calls of it.

    Args:
        model: the draft model, in any dtype and with any backend.
        num_tokens: tokens drafted per step, from 1 to 15.
    Raises:
        TypeError: `model` is not a `Llama2`.
        ValueError: a number outside its range.
    """

    model: Llama2
    num_tokens: int = 4

    def __post_init__(self) -> None:
        if not isinstance(self.model, Llama2):
            raise TypeError(f"model: expected a Llama2; got a {type(self.model).__name__}")
        check_num_tokens(self.num_tokens)


Speculation = PromptLookup | DraftModel


@dataclass
class Statistics:
    """What speculation gained: counts of a call, each sequence by itself.

    Attributes:
        num_steps: steps of the model, summed over the sequences that took part in them. The call
            on the prompts, which gives the first new token of each, is not included.
        num_new_tokens: the new tokens of these steps.
    """

    num_steps: int = 0
    num_new_tokens: int = 0

    @property
    def tokens_per_step(self) -> float:
        """New tokens of a sequence per step of the model, from 1 to num_tokens + 1; NaN before the
        first step."""
        return self.num_new_tokens / self.num_steps if self.num_steps else float("nan")


def check_num_tokens(num_tokens: int) -> None:
    """Raises ValueError unless it is a number of tokens that a step can draft."""
    if not is_whole(num_tokens) or not 1 <= num_tokens <= MOST_DRAFTED:
        raise ValueError(
            f"num_tokens: expected an int from 1 to {MOST_DRAFTED}; got {num_tokens!r}"
        )


def check_speculation(speculation: Speculation | None, model: Llama2, longest: int = 0) -> None:
    """Raises TypeError or ValueError if sequences of the model, of up to `longest` tokens, cannot
    be decoded with `speculation`."""
    if speculation is None or isinstance(speculation, PromptLookup):
        return
    if not isinstance(speculation, DraftModel):
        raise TypeError(
            f"speculation: expected a PromptLookup, a DraftModel or None; got {speculation!r:.60}"
        )
    draft, own = speculation.model, model.config.vocab_size
    if draft.config.vocab_size != own:
        raise ValueError(
            f"speculation: expected a draft model with the model's vocabulary of {own}; got one "
            f"with {draft.config.vocab_size}"
        )
    device, found = model.lm_head.weight.device, draft.lm_head.weight.device
    if found != device:
        raise ValueError(
            f"speculation: expected a draft model on {device}, like the model; got one on {found}"
        )
    if draft.config.max_seq_len < longest:
        raise ValueError(
            f"speculation: expected a draft model with a max_seq_len of at least {longest}, the "
            f"longest prompt with max_new_tokens; got {draft.config.max_seq_len}"
        )
