"""Which number of key/value heads a deployment asks for, and why: computed, not measured.

The rule: among the counts that divide num_q_heads and whose cache fits, the most key/value heads
(the least change to an MHA model) that decode at least `keep` times as many tokens per second as
the best of them. It knows memory and speed on paper; quality it does not know.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from llama2.accounting import head_counts, matched, num_parameters
from llama2.config import ModelConfig
from llama2.tradeoff.roofline import GIB, Deployment, Gpu


@dataclass(frozen=True)
class Candidate:
    """One count of heads in the deployment. `batch` is the one that was asked for, or the largest;
    `tokens_per_s` and `bound` are None where it does not fit, all but the first two fields where
    tp cannot share the heads."""

    num_kv_heads: int
    parameters: int
    kv_heads_per_rank: int | None = None
    kv_bytes_per_token_per_rank: int | None = None
    largest_batch: int | None = None
    crossover_batch: int | None = None
    batch: int | None = None
    tokens_per_s: float | None = None
    bound: str | None = None
    verdict: str = "cannot be shared by tp"  # or "fits", "does not fit"


@dataclass(frozen=True)
class Recommendation:
    num_kv_heads: int
    reasons: tuple[str, ...]  # sentences, with numbers
    candidates: tuple[Candidate, ...]  # every divisor of num_q_heads, fewest heads first


def recommend(
    config: ModelConfig,
    gpu: Gpu,
    *,
    context: int,
    batch: int | None = None,
    tp: int = 1,
    keep: float = 0.8,
) -> Recommendation:
    """Applies the rule of this module to `config` with every other count, feed-forward layers
    unchanged, as a conversion leaves them.

    Heads fewer than tp are duplicated: they cost what tp heads cost, so that the rule never goes
    below tp.

    Args:
        context: tokens that a sequence is expected to have while it decodes.
        batch: sequences that decode together; None takes each count's largest batch, which is the
            question of throughput alone, and nearly always answered by the fewest heads.
        keep: the share of the best speed that must be kept, in (0, 1].
    Raises:
        ValueError: a size or share out of range, or as `head_counts`; no count fits, with what
            would fit.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep: expected a number in (0, 1]; got {keep}")
    if batch is not None and batch < 1:
        raise ValueError(f"batch: expected at least 1, or None for the largest; got {batch}")
    deployments = dict(_deployments(config, gpu, tp))
    candidates = tuple(
        _candidate(config, count, deployments.get(count), context, batch)
        for count in head_counts(config)
    )
    fitting = [candidate for candidate in candidates if candidate.verdict == "fits"]
    if not fitting:
        raise ValueError(_what_would_fit(config, gpu, deployments, context, batch, tp))
    best = max(fitting, key=lambda c: (c.tokens_per_s, c.num_kv_heads))
    chosen = [c for c in fitting if c.tokens_per_s >= keep * best.tokens_per_s][-1]
    reasons = _reasons(chosen, best, candidates, deployments[chosen.num_kv_heads], context, keep)
    return Recommendation(chosen.num_kv_heads, tuple(reasons), candidates)


def _deployments(config: ModelConfig, gpu: Gpu, tp: int) -> Iterator[tuple[int, Deployment]]:
    if tp < 1 or config.num_q_heads % tp:
        raise ValueError(f"tp: expected a divisor of num_q_heads ({config.num_q_heads}); got {tp}")
    for count in head_counts(config):
        if count % tp == 0 or tp % count == 0:
            yield count, Deployment(matched(config, count, "same_ffn"), gpu, tp)


def _candidate(
    config: ModelConfig, count: int, deployment: Deployment | None, context: int, batch: int | None
) -> Candidate:
    parameters = num_parameters(matched(config, count, "same_ffn"))
    if deployment is None:
        return Candidate(count, parameters)
    largest = deployment.largest_batch(context)
    wanted = largest if batch is None else batch
    fits = 0 < wanted <= largest
    return Candidate(
        num_kv_heads=count,
        parameters=parameters,
        kv_heads_per_rank=deployment.kv_heads_per_rank,
        kv_bytes_per_token_per_rank=deployment.kv_bytes_per_token_per_rank,
        largest_batch=largest,
        crossover_batch=deployment.crossover_batch(context),
        batch=wanted,
        tokens_per_s=deployment.decode_tokens_per_s(wanted, context) if fits else None,
        bound=deployment.bound(wanted, context) if fits else None,
        verdict="fits" if fits else "does not fit",
    )


def _reasons(
    chosen: Candidate,
    best: Candidate,
    candidates: tuple[Candidate, ...],
    deployment: Deployment,
    context: int,
    keep: float,
) -> Iterator[str]:
    others = "" if chosen is best else f", whose best is {best.num_kv_heads} with {_speed(best)}"
    yield (
        f"{_heads(chosen)}: {_speed(chosen)} at a context of {context:,}, the most heads with at "
        f"least {keep:.0%} of the tokens per second of any count that fits{others}. Computed from "
        f"the nominal rates of {deployment.gpu.name}, not measured."
    )
    memory, weights = deployment.gpu.memory_bytes / GIB, deployment.weight_bytes_per_rank / GIB
    yield (
        f"Memory: of {memory:.0f} GiB, weights take {weights:.1f} GiB and "
        f"{deployment.reserved_bytes / GIB:.1f} GiB are reserved; a token's keys and values take "
        f"{chosen.kv_bytes_per_token_per_rank / 1024:,.0f} KiB, so that {chosen.largest_batch:,} "
        f"sequences of {context:,} tokens fit."
    )
    yield (
        f"Crossover: from a batch of {chosen.crossover_batch:,} on, a step reads more keys and "
        f"values than weights at this context; at a batch of {chosen.batch:,}, "
        f"{_cache_share(deployment, chosen.batch, context):.0%} of its bytes are keys and values, "
        f"and it waits for {chosen.bound}."
    )
    if deployment.tp > 1:
        yield (
            f"Tensor parallelism: each of {deployment.tp} ranks holds {chosen.kv_heads_per_rank} "
            f"of the key/value heads; fewer than {deployment.tp} in all would be duplicated and "
            f"save nothing. Communication is not modelled."
        )
    yield from _neighbours(chosen, best, candidates)
    yield (
        "Quality is not computed: judge it by the published tables and by the study. Neither is "
        "extrapolated to this model."
    )


def _neighbours(
    chosen: Candidate, best: Candidate, candidates: tuple[Candidate, ...]
) -> Iterator[str]:
    place = candidates.index(chosen)
    if place + 1 < len(candidates):
        yield f"Next higher, {_outlook(candidates[place + 1], best)}."
    else:
        yield "Next higher: none, this is MHA."
    if place > 0:
        lower = candidates[place - 1]
        same = lower.kv_heads_per_rank == chosen.kv_heads_per_rank
        yield f"Next lower, {_outlook(lower, best)}{', from as large a cache' if same else ''}."
    else:
        yield "Next lower: none, this is MQA."


def _outlook(candidate: Candidate, best: Candidate) -> str:
    heads = _heads(candidate)
    if candidate.verdict == "fits":
        share = candidate.tokens_per_s / best.tokens_per_s
        return f"{heads}: {_speed(candidate)}, {share:.1%} of the best"
    if candidate.verdict == "does not fit":
        return f"{heads}: does not fit; its largest batch is {candidate.largest_batch:,}"
    return f"{heads}: {candidate.verdict}"


def _heads(candidate: Candidate) -> str:
    return f"{candidate.num_kv_heads} key/value head{'s' * (candidate.num_kv_heads > 1)}"


def _speed(candidate: Candidate) -> str:
    return f"{candidate.tokens_per_s:,.0f} tokens/s at batch {candidate.batch:,}"


def _cache_share(deployment: Deployment, batch: int, context: int) -> float:
    return 1 - deployment.weight_bytes_per_rank / deployment.decode_bytes(batch, context)


def _what_would_fit(
    config: ModelConfig,
    gpu: Gpu,
    deployments: dict[int, Deployment],
    context: int,
    batch: int | None,
    tp: int,
) -> str:
    smallest = deployments[1]  # as small as any: one head shared by, or duplicated on, every rank
    wanted = batch or 1
    longest = smallest.largest_context(wanted)
    offers = []
    if longest:
        offers.append(f"a context of {longest:,} at batch {wanted:,}")
    if largest := smallest.largest_batch(context):
        offers.append(f"a batch of {largest:,} at context {context:,}")
    for ranks in head_counts(config):
        if Deployment(smallest.config, gpu, ranks).largest_batch(context) >= wanted:
            offers.append(f"tp={ranks}")
            break
    found = f"; what would fit: {', or '.join(offers)}" if offers else ""
    return (
        f"context: expected one at which some number of key/value heads fits {gpu.name} with "
        f"tp={tp} at batch {wanted:,}, beside {smallest.weight_bytes_per_rank / GIB:.1f} GiB of "
        f"weights per GPU; got {context:,}{found}"
    )
