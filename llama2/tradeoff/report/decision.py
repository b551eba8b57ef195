"""What the page opens with: the pick, its rule, and a table of all numbers of key/value heads.

`page.js` says the same, in the same words and digits, for the settings that a reader chooses.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from llama2.accounting import head_counts
from llama2.reporting.document import MISSING, Block, Column, Paragraph, Sentence, Table
from llama2.reporting.wording import short
from llama2.tradeoff.published import GQA_TABLE_1, LLAMA2_TABLE_18
from llama2.tradeoff.question import LEAST_SHARE, Question
from llama2.tradeoff.recommend import Candidate, candidates, pick, share_name, what_would_fit
from llama2.tradeoff.report import quality
from llama2.tradeoff.report.wording import heads_name

COMMON_HEADS = 8  # of most released models
_PREDICTED = {  # the columns that depend on the setting, by their keys
    "speed_up": "speed-up over MHA",
    "tokens_per_s": "tokens per second",
    "kib_per_token": "KiB of cache per token and GPU",
    "largest_batch": "largest batch",
    "crossover_batch": "cache outweighs weights from batch",
}


def headline(question: Question, results: dict[str, Any] | None) -> Iterator[Block]:
    """Yields the pick, what supports it, and the rule."""
    found = candidates(question)
    chosen = pick(question, found)
    yield Paragraph([Sentence(pick_sentence(question, found, chosen))], lead=True, name="pick")
    yield Paragraph([Sentence(published_sentence(question, found, chosen))], name="published")
    if results is not None:
        told = quality.evidence(results, question.config)
        said = told[chosen.num_kv_heads] if chosen else ""
        yield Paragraph([Sentence(said)], name="evidence")
    yield Paragraph([Sentence(rule_sentence(question))], name="rule")


def counts(
    question: Question, results: dict[str, Any] | None, rows: Sequence[dict[str, Any]]
) -> Iterator[Block]:
    """Yields the table of all counts; `rows` are measured decode steps."""
    found = candidates(question)
    chosen = pick(question, found)
    yield decision_table(question, found, chosen, results, rows)
    yield Paragraph(
        [
            Sentence(
                f"Below {share_name(LEAST_SHARE)} of the heads there are no figures of quality "
                "but those of MQA. Change the rule and the setting in the fields of the HTML "
                "page, or by options of “llama2 tradeoff”: --keep, --least-share, --context, "
                "--batch, --gpu, --tp, --kv-cache-dtype, --shape."
            )
        ]
    )


def pick_sentence(question: Question, found: Sequence[Candidate], chosen: Candidate | None) -> str:
    if chosen is None:
        least = share_name(question.least_share)
        offers = what_would_fit(question, found)
        fitting = f" What would fit: {', or '.join(offers)}." if offers else ""
        return (
            f"No count with at least {least} of the query heads fits: {question.setting}.{fitting}"
        )
    heads = heads_name(chosen.num_kv_heads, question.config.num_q_heads)
    return f"Take {heads}: {_speed(chosen, found[-1])}. Predicted for {question.setting}."


def _speed(each: Candidate, mha: Candidate) -> str:
    """Returns the speed of a count that fits, relative to MHA's only if MHA fits."""
    speed = f"{each.tokens_per_s:,.0f} tokens per second"
    if each is mha:
        return speed
    if mha.verdict == "fits":
        return f"{each.speed_up:,.2f} times as many tokens per second as MHA"
    most = mha.largest_batch
    fits = f"fits at most {most:,} sequence{'s' * (most > 1)}" if most else "does not fit"
    return f"{speed} at batch {each.batch:,}; MHA {fits}"


def published_sentence(
    question: Question, found: Sequence[Candidate], chosen: Candidate | None
) -> str:
    """Returns the speed of the fewest heads above MQA's with published figures; "" without them,
    where they do not fit, or where the rule picks them."""
    heads, count = question.config.num_q_heads, published_heads(question)
    each = next((each for each in found if each.num_kv_heads == count), None)
    if chosen is None or each is None or each is chosen or each.tokens_per_s is None:
        return ""
    return (
        f"The speed rule picks {heads_name(chosen.num_kv_heads, heads)}. Apart from MQA, "
        f"{heads_name(count, heads)} has the fewest heads with published quality figures: "
        f"{_speed(each, found[-1])}."
    )


def published_heads(question: Question) -> int | None:
    """Returns the fewest key/value heads, more than MQA's and fewer than MHA's, that the published
    tables have figures for; None without such a count."""
    heads = question.config.num_q_heads
    counts = [
        count
        for count in head_counts(question.config)
        if 1 < count < heads and _published(count, heads) != (MISSING, MISSING)
    ]
    return min(counts, default=None)


def rule_sentence(question: Question) -> str:
    return (
        "The rule takes the most key/value heads that decode at least "
        f"{short(100 * question.keep)} % as fast as the fastest count with at least "
        f"{share_name(question.least_share)} of the query heads."
    )


def cells(question: Question, each: Candidate, chosen: Candidate | None) -> dict[str, str]:
    """Returns the cells that depend on the setting, by the keys of their columns."""
    tp = question.tp
    shared = each.verdict != "cannot be shared by tp"
    notes = [
        "the pick" if each is chosen else "",
        "most released models" if _is_common(question, each.num_kv_heads) else "",
        "does not fit" if each.verdict == "does not fit" else "",
        "" if shared else f"cannot be shared by {tp} GPUs",
        f"costs what {tp} heads cost" if shared and each.num_kv_heads < tp else "",
    ]
    kib = short(each.kv_bytes_per_token_per_rank / 1024) if shared else MISSING
    return {
        "note": "; ".join(filter(None, notes)),
        "speed_up": MISSING if each.speed_up is None else f"{each.speed_up:,.2f}×",
        "tokens_per_s": MISSING if each.tokens_per_s is None else f"{each.tokens_per_s:,.0f}",
        "kib_per_token": kib,
        "largest_batch": f"{each.largest_batch:,}" if shared else MISSING,
        "crossover_batch": f"{each.crossover_batch:,}" if shared else MISSING,
    }


def _is_common(question: Question, num_kv_heads: int) -> bool:
    return num_kv_heads == COMMON_HEADS < question.config.num_q_heads


def decision_table(
    question: Question,
    found: Sequence[Candidate],
    chosen: Candidate | None,
    results: dict[str, Any] | None,
    rows: Sequence[dict[str, Any]],
) -> Table:
    """Returns all counts, most heads first: speed, memory, published quality and the study's."""
    heads = question.config.num_q_heads
    counts = [each.num_kv_heads for each in reversed(found)]
    measured = measured_speed_ups(question, rows)
    studied = {each.column: each.cells(heads) for each in quality.losses(results, heads)}
    columns = [
        Column("key/value heads", key="heads"),
        Column("", key="note"),
        *(Column(name, "predicted", key=key) for key, name in _PREDICTED.items()),
        *(Column(name, "measured") for name in measured),
        Column("Llama 2, 30B: mean of 11 scores", "published"),
        Column("T5 XXL: average of 7 scores", "published"),
        *(Column(name, "this study") for name in studied),
    ]

    def row(each: Candidate) -> list[str]:
        count = each.num_kv_heads
        return [
            heads_name(count, heads),
            *cells(question, each, chosen).values(),
            *(by_count.get(count, MISSING) for by_count in measured.values()),
            *_published(count, heads),
            *(by_count.get(count, MISSING) for by_count in studied.values()),
        ]

    return Table(
        "All numbers of key/value heads",
        columns,
        [row(each) for each in reversed(found)],
        " ".join(_notes(question, results)),
        name="decision",
        row_keys=[str(count) for count in counts],
        marked=None if chosen is None else counts.index(chosen.num_kv_heads),
    )


def _notes(question: Question, results: dict[str, Any] | None) -> Iterator[str]:
    yield (
        "Speed: an upper bound from the data sheet's bandwidth and peak, tokens of all sequences "
        f"together. {MISSING}: does not fit, or no figure."
    )
    if _is_common(question, COMMON_HEADS):
        yield (
            f"{COMMON_HEADS} heads are what most released models ship, among them Llama 2 70B, "
            "Code Llama 34B, Llama 3 and Mistral 7B."
        )
    yield (
        f"Published ({LLAMA2_TABLE_18.source}; {GQA_TABLE_1.source}): more is better; other "
        "models, in the row with as many heads; MHA's figures are in MHA's row, whatever its "
        "number of heads."
    )
    yield from quality.notes(results)


def _published(count: int, heads: int) -> tuple[str, str]:
    llama, t5 = LLAMA2_TABLE_18.row_with(count, heads), GQA_TABLE_1.row_with(count, heads)
    return (
        f"{LLAMA2_TABLE_18.mean_score(llama):.2f}" if llama else MISSING,
        f"{GQA_TABLE_1.value(t5, 'Average'):.1f}" if t5 else MISSING,
    )


def measured_speed_ups(
    question: Question, rows: Sequence[dict[str, Any]]
) -> dict[str, dict[int, str]]:
    """Returns the measured speed-up of the layers over MHA's, by column name and by count.

    Of the measured contexts and batches, those nearest to the question's are taken; without rows of
    the question's shape the result is empty.
    """
    heads = question.config.num_q_heads
    times = {
        (row["context"], row["batch"], row["num_kv_heads"]): row["microseconds"]
        for row in rows
        if row["tag"] == "measured" and row["shape"] == question.published_name
    }
    places = {(context, batch) for context, batch, count in times if count == heads}
    if not places:
        return {}
    wanted = question.batch or max(batch for _, batch in places)
    context, batch = min(
        places, key=lambda at: (abs(at[0] - question.context), abs(at[1] - wanted), at)
    )
    name = f"speed-up of the layers, batch {batch:,}, context {context:,}"
    base = times[context, batch, heads]
    return {
        name: {
            count: f"{base / time:,.2f}×"
            for (*place, count), time in times.items()
            if tuple(place) == (context, batch)
        }
    }
