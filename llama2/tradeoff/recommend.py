"""Which number of key/value heads a deployment asks for, and why: predicted, not measured.

The rule: among the counts whose cache fits and that keep at least `least_share` of the query heads,
the most key/value heads (the least change to an MHA model) that decode at least `keep` times as
many tokens per second as the fastest of these. Memory and speed are predicted; `least_share`
excludes shares of heads for which there are no figures of quality.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from llama2.accounting import head_counts, matched, num_parameters
from llama2.reporting.wording import short
from llama2.tradeoff.question import LEAST_SHARE, Question
from llama2.tradeoff.roofline import GIB, Deployment


@dataclass(frozen=True)
class Candidate:
    """One count of heads in the deployment.

    Attributes:
        batch: the one that was asked for, or the largest.
        tokens_per_s, bound: None where that batch does not fit.
        speed_up: tokens per second over MHA's, which need not fit at a batch that was asked for;
            None where either has no speed.
        verdict: "fits", "does not fit", or "cannot be shared by tp": then all that depends on the
            deployment is None.
    """

    num_kv_heads: int
    share: float
    parameters: int
    kv_heads_per_rank: int | None = None
    kv_bytes_per_token_per_rank: int | None = None
    largest_batch: int | None = None
    crossover_batch: int | None = None
    batch: int | None = None
    tokens_per_s: float | None = None
    speed_up: float | None = None
    bound: str | None = None
    verdict: str = "cannot be shared by tp"


@dataclass(frozen=True)
class Recommendation:
    num_kv_heads: int
    reasons: tuple[str, ...]  # sentences, with numbers
    candidates: tuple[Candidate, ...]  # every divisor of num_q_heads, fewest heads first


def recommend(question: Question) -> Recommendation:
    """Applies the rule of this module.

    Heads fewer than tp are duplicated: they cost what tp heads cost, so that the rule never goes
    below tp.

    Raises:
        ValueError: no count fits, with what would fit; sizes as `head_counts`.
    """
    found = candidates(question)
    chosen = pick(question, found)
    if chosen is None:
        raise ValueError(_refusal(question, found))
    return Recommendation(chosen.num_kv_heads, tuple(_reasons(question, found, chosen)), found)


def candidates(question: Question) -> tuple[Candidate, ...]:
    """Returns every divisor of num_q_heads in the deployment, fewest heads first."""
    deployments = question.deployments()
    mha = deployments[question.config.num_q_heads]
    batch = question.batch or mha.largest_batch(question.context)
    base = mha.decode_tokens_per_s(batch, question.context) if batch else None
    return tuple(
        _candidate(question, count, deployments.get(count), base)
        for count in head_counts(question.config)
    )


def pick(question: Question, found: Sequence[Candidate]) -> Candidate | None:
    """Returns the candidate that the rule chooses; None if none that it considers fits."""
    fitting = [
        each for each in found if each.verdict == "fits" and each.share >= question.least_share
    ]
    best = fastest(fitting)
    kept = [each for each in fitting if each.tokens_per_s >= question.keep * best.tokens_per_s]
    return kept[-1] if kept else None


def fastest(fitting: Sequence[Candidate]) -> Candidate | None:
    """Returns the fastest candidate, the one with most heads of several; None of none."""
    return max(fitting, key=lambda each: (each.tokens_per_s, each.num_kv_heads), default=None)


def _candidate(
    question: Question, count: int, deployment: Deployment | None, base: float | None
) -> Candidate:
    shape = matched(question.config, count, "same_ffn")
    share = count / question.config.num_q_heads
    if deployment is None:
        return Candidate(count, share, num_parameters(shape))
    context = question.context
    largest = deployment.largest_batch(context)
    batch = largest if question.batch is None else question.batch
    shared = Candidate(
        num_kv_heads=count,
        share=share,
        parameters=num_parameters(shape),
        kv_heads_per_rank=deployment.kv_heads_per_rank,
        kv_bytes_per_token_per_rank=deployment.kv_bytes_per_token_per_rank,
        largest_batch=largest,
        crossover_batch=deployment.crossover_batch(context),
        batch=batch,
        verdict="does not fit",
    )
    if not 0 < batch <= largest:
        return shared
    speed = deployment.decode_tokens_per_s(batch, context)
    return replace(
        shared,
        tokens_per_s=speed,
        speed_up=speed / base if base else None,
        bound=deployment.bound(batch, context),
        verdict="fits",
    )


def _reasons(question: Question, found: Sequence[Candidate], chosen: Candidate) -> Iterator[str]:
    deployment, context = question.deployment(chosen.num_kv_heads), question.context
    best = fastest(
        [each for each in found if each.tokens_per_s and each.share >= question.least_share]
    )
    others = "" if chosen is best else f", the fastest of which is {_heads(best)}: {_speed(best)}"
    yield (
        f"{_heads(chosen)}: {_speed(chosen)} at a context of {context:,}, the most heads with at "
        f"least {short(100 * question.keep)} % of the tokens per second of any count that fits and "
        f"keeps at least {share_name(question.least_share)} of the query heads{others}. Predicted "
        f"from the nominal rates of {question.gpu.name}, not measured."
    )
    memory, weights = question.gpu.memory_bytes / GIB, deployment.weight_bytes_per_rank / GIB
    yield (
        f"Memory: of {memory:.0f} GiB, weights take {weights:.1f} GiB and "
        f"{deployment.reserved_bytes / GIB:.1f} GiB are reserved; a token's keys and values take "
        f"{short(chosen.kv_bytes_per_token_per_rank / 1024)} KiB, so that {chosen.largest_batch:,} "
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
    yield from _neighbours(found, chosen)
    yield (
        "Quality is not predicted: judge it by the published tables and by the study, which have "
        f"no figures below {share_name(LEAST_SHARE)} of the heads except those of MQA. Nothing is "
        "extrapolated to this model."
    )


def _neighbours(found: Sequence[Candidate], chosen: Candidate) -> Iterator[str]:
    place = found.index(chosen)
    if place + 1 < len(found):
        yield f"Next higher, {_outlook(found[place + 1], chosen)}."
    else:
        yield "Next higher: none, this is MHA."
    if place > 0:
        lower = found[place - 1]
        same = lower.kv_heads_per_rank == chosen.kv_heads_per_rank
        yield f"Next lower, {_outlook(lower, chosen)}{', from as large a cache' if same else ''}."
    else:
        yield "Next lower: none, this is MQA."


def _outlook(candidate: Candidate, chosen: Candidate) -> str:
    heads = _heads(candidate)
    if candidate.verdict == "fits":
        share = candidate.tokens_per_s / chosen.tokens_per_s
        return f"{heads}: {_speed(candidate)}, {share:.0%} of the recommended count's"
    if candidate.verdict == "does not fit":
        return f"{heads}: does not fit; its largest batch is {candidate.largest_batch:,}"
    return f"{heads}: {candidate.verdict}"


def _heads(candidate: Candidate) -> str:
    return f"{candidate.num_kv_heads} key/value head{'s' * (candidate.num_kv_heads > 1)}"


def _speed(candidate: Candidate) -> str:
    return f"{candidate.tokens_per_s:,.0f} tokens/s at batch {candidate.batch:,}"


def share_name(share: float) -> str:
    """Returns a unit fraction as 1/n, another share in per cent."""
    if share and (1 / share).is_integer():
        return f"1/{1 / share:.0f}" if share < 1 else "all"
    return f"{short(100 * share)} %"


def _cache_share(deployment: Deployment, batch: int, context: int) -> float:
    return 1 - deployment.weight_bytes_per_rank / deployment.decode_bytes(batch, context)


def what_would_fit(question: Question, found: Sequence[Candidate]) -> list[str]:
    """Returns the changes to a question without a pick, one of which gives it a pick."""
    smallest = _smallest(question, found)
    context, wanted = question.context, question.batch or 1
    offers = []
    if longest := smallest.largest_context(wanted):
        offers.append(f"a context of {longest:,} at batch {wanted:,}")
    if largest := smallest.largest_batch(context):
        offers.append(f"a batch of {largest:,} at context {context:,}")
    for ranks in head_counts(question.config):
        wider = replace(question, tp=ranks, batch=wanted)
        if pick(wider, candidates(wider)):
            offers.append(f"tp={ranks}")
            break
    fewer = [each.num_kv_heads for each in found if each.verdict == "fits"]
    if fewer:
        offers.append(f"{max(fewer)} heads, below the least share")
    return offers


def _smallest(question: Question, found: Sequence[Candidate]) -> Deployment:
    """Returns a deployment that is as small as any that the rule considers: on every rank no more
    heads than the others."""
    count = min(
        each.num_kv_heads
        for each in found
        if each.verdict != "cannot be shared by tp" and each.share >= question.least_share
    )
    return question.deployment(count)


def _refusal(question: Question, found: Sequence[Candidate]) -> str:
    smallest, offers = _smallest(question, found), what_would_fit(question, found)
    weights, batch = smallest.weight_bytes_per_rank / GIB, question.batch or 1
    text = f"; what would fit: {', or '.join(offers)}" if offers else ""
    return (
        f"context: expected one at which some number of key/value heads of at least "
        f"{share_name(question.least_share)} of the query heads fits {question.gpu.name} with "
        f"tp={question.tp} at batch {batch:,}, beside {weights:.1f} GiB of weights per GPU; "
        f"got {question.context:,}{text}"
    )
