"""Text generation: a ragged batch, one key/value cache, one host synchronisation per step."""

import math
import secrets
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from llama2.config import ModelConfig
from llama2.kv_cache import KVCache
from llama2.model import Llama2


def generate(
    model: Llama2,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_ids: Iterable[int] = (),
    seed: int | None = None,
) -> list[list[int]]:
    """Continues every prompt, on the model's device and in its dtype.

    Args:
        prompts: token ids, of any lengths; a model expects BOS first (`Tokenizer.encode`).
        max_new_tokens: most tokens to add to each prompt; 0 adds none.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: draws among the fewest likeliest tokens whose probabilities reach this sum.
        stop_ids: tokens that end their sequence, usually `[tokenizer.eos_id]`.
        seed: what is drawn for prompt i depends on the seed and i alone: not on the rest of the
            batch, nor on the device. None takes a new seed at every call.
    Returns:
        The new tokens of each prompt. A sequence that was stopped ends with its stop token, which
        tells it from one that ran out of `max_new_tokens`.
    Raises:
        ValueError: no prompt, or an empty one; a token or stop id outside the vocabulary; a prompt
            that with `max_new_tokens` exceeds `max_seq_len`; a temperature that is negative or not
            finite; a top_p outside (0, 1]; a negative seed.
        FloatingPointError: the model's logits are NaN or infinite.
    """
    steps = stream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        stop_ids=stop_ids,
        seed=seed,
    )
    continuations: list[list[int]] = [[] for _ in prompts]
    for index, token in steps:
        continuations[index].append(token)
    return continuations


def stream(
    model: Llama2,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_ids: Iterable[int] = (),
    seed: int | None = None,
) -> Iterator[tuple[int, int]]:
    """`generate`, a token at a time: (index of the prompt, new token), step after step.

    The arguments are checked by the call itself, before the first token is asked for.
    """
    stop_ids = frozenset(stop_ids)
    _check_tokens(model.config, prompts, max_new_tokens, stop_ids)
    _check_sampling(temperature, top_p, seed)
    return _steps(model, prompts, max_new_tokens, temperature, top_p, stop_ids, seed)


@torch.inference_mode()
def _steps(
    model: Llama2,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    stop_ids: frozenset[int],
    seed: int | None,
) -> Iterator[tuple[int, int]]:
    if max_new_tokens == 0:
        return
    batch, longest = len(prompts), max(map(len, prompts))
    weight = model.lm_head.weight
    tokens = torch.tensor([[*p, *[0] * (longest - len(p))] for p in prompts], device=weight.device)
    num_valid = torch.tensor([len(p) for p in prompts], device=weight.device)
    uniform = _uniform(batch, max_new_tokens, seed).to(weight.device)
    # The last new token is never fed back, so it needs no room.
    capacity = longest + max_new_tokens - 1
    cache = KVCache(model.cache_config, batch, capacity, dtype=weight.dtype, device=weight.device)

    states = model.hidden_states(tokens, cache, num_valid)
    last = states[torch.arange(batch, device=weight.device), num_valid - 1]  # [batch, hidden_size]
    running = list(range(batch))
    for step in range(max_new_tokens):
        if step > 0:
            last = model.hidden_states(tokens[:, None], cache)[:, 0]
        tokens = sample(model.lm_head(last), uniform[:, step], temperature, top_p)
        on_host = tokens.tolist()  # the step's only synchronisation
        for index in running:
            if on_host[index] < 0:
                raise FloatingPointError(
                    f"model: expected finite logits; got NaN or infinity for prompts[{index}] at "
                    f"new token {step} in {weight.dtype}"
                )
            yield index, on_host[index]
        # Stopped sequences stay in the batch, unread: rows do not see each other.
        running = [index for index in running if on_host[index] not in stop_ids]
        if not running:
            return
        tokens = tokens.clamp(min=0)


def sample(logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Draws a token per row from softmax(logits / temperature), cut to its nucleus, in float32.

    The nucleus is the shortest run of tokens, likeliest first and the lower id first among equals,
    whose probabilities reach `top_p`: a token belongs if those before it sum to less. The draw
    inverts the cumulative distribution, so it is a function of its arguments.

    Args:
        logits: `[batch, vocab_size]`, any floating dtype.
        uniform: float32 `[batch]` in [0, 1).
        temperature: 0 takes the likeliest token.
    Returns:
        int64 `[batch]`; −1 for a row with NaN, with +infinity, or with −infinity only.
    Reference: Holtzman et al. 2020, arXiv:1904.09751.
    """
    logits = logits.float()
    highest = logits.amax(dim=-1, keepdim=True)
    if temperature == 0:
        tokens = logits.argmax(dim=-1)
    else:
        # Subtracting first keeps a small temperature from overflowing; tiny keeps it from being 0.
        scaled = (logits - highest) / max(temperature, torch.finfo(torch.float32).tiny)
        probabilities, order = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        reached = probabilities.cumsum(dim=-1)
        total = reached[:, -1:]  # 1 but for rounding
        size = (reached - probabilities < top_p * total).sum(dim=-1, keepdim=True)
        size = size.clamp(min=1)  # none where the probabilities are NaN
        target = uniform[:, None] * reached.gather(-1, size - 1)
        rank = (reached <= target).sum(dim=-1, keepdim=True).clamp(max=size - 1)
        tokens = order.gather(-1, rank).squeeze(-1)
    return tokens.where(highest.squeeze(-1).isfinite(), -1)


def _uniform(batch: int, max_new_tokens: int, seed: int | None) -> Tensor:
    """float32 `[batch, max_new_tokens]` in [0, 1), on the CPU; row i follows from (seed, i)."""
    seed = secrets.randbits(64) if seed is None else seed
    rows = [
        np.random.default_rng((seed, index)).random(max_new_tokens, dtype=np.float32)
        for index in range(batch)
    ]
    return torch.from_numpy(np.stack(rows))


def _check_tokens(
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Iterable[int],
) -> None:
    if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: expected an int of at least 0; got {max_new_tokens!r}")
    if len(prompts) == 0:
        raise ValueError("prompts: expected at least one; got none")
    for index, prompt in enumerate(prompts):
        name = f"prompts[{index}]"
        if not isinstance(prompt, Sequence) or isinstance(prompt, str):
            raise ValueError(f"{name}: expected a list of token ids; got a {type(prompt).__name__}")
        if not prompt:
            raise ValueError(f"{name}: expected at least one token (BOS); got none")
        for token in prompt:
            _check_id(name, token, config.vocab_size)
        if len(prompt) + max_new_tokens > config.max_seq_len:
            raise ValueError(
                f"{name}: expected at most max_seq_len ({config.max_seq_len}) tokens with "
                f"max_new_tokens; got {len(prompt)} + {max_new_tokens}"
            )
    for stop_id in stop_ids:
        _check_id("stop_ids", stop_id, config.vocab_size)


def _check_id(name: str, token: int, vocab_size: int) -> None:
    if not isinstance(token, int) or not 0 <= token < vocab_size:
        raise ValueError(f"{name}: expected token ids in [0, {vocab_size}); got {token!r}")


def _check_sampling(temperature: float, top_p: float, seed: int | None) -> None:
    if not 0 <= temperature < math.inf:  # false for NaN
        raise ValueError(f"temperature: expected a finite number ≥ 0; got {temperature!r}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1]; got {top_p!r}")
    if seed is not None and (not isinstance(seed, int) or seed < 0):
        raise ValueError(f"seed: expected an int of at least 0, or None; got {seed!r}")
