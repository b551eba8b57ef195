"""What a study found, in sentences made from its numbers.

A difference whose interval contains 0 is never called better or worse.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from llama2.accounting import num_parameters
from llama2.config import ModelConfig
from llama2.reporting.document import Sentence
from llama2.reporting.statistics import noise_floor, paired_difference
from llama2.tradeoff.report.wording import (
    MATCHING_NAMES,
    heads_name,
    interval,
    parameters_name,
    percent,
)
from llama2.tradeoff.study import comparisons, runs
from llama2.tradeoff.study.comparisons import NOT_TOLD_APART, Comparison


class Named(NamedTuple):
    """A comparison, and of what: a matching or a method, and a number of key/value heads."""

    kind: str
    num_kv_heads: int
    comparison: Comparison


def setting(results: dict[str, Any]) -> Iterator[Sentence]:
    """What was trained, on what, and how it was judged."""
    base, train, corpus = ModelConfig(**results["base"]), results["train_config"], results["corpus"]
    training, held_out = corpus["train"], corpus["held_out"]
    yield Sentence(
        f"The base is a model of {parameters_name(num_parameters(base))} parameters: "
        f"{base.num_layers} layers of width {base.hidden_size}, {base.num_q_heads} query heads and "
        "as many key/value heads.",
        "computed",
    )
    yield Sentence(
        f"Every model from scratch is trained for {train['steps']:,} steps of "
        f"{train['batch_size']} × {train['seq_len']} tokens, rows of the recall tasks among them, "
        f"{results['epochs']:.2g} times through the training text; "
        f"seeds {_list(map(str, results['seeds']))}.",
        "computed",
    )
    yield Sentence(
        f"The text is {corpus['name']}: {training['documents']:,} documents, "
        f"{training['bytes']:,} bytes; held out are {len(held_out['files'])} whole files, whose "
        f"beginnings are evaluated, {held_out['bytes']:,} bytes. Quality is bits per byte on "
        "those, less is better.",
        "measured",
    )


def noise(results: dict[str, Any]) -> Sentence:
    """The noise floor, or that one seed gives none."""
    floor = noise_floor(list(runs.values(runs.mha(results)).values()))
    if floor is None:
        return Sentence(
            "MHA was trained with one seed: there is no noise floor and no interval over seeds, "
            "and no difference is called better or worse."
        )
    return Sentence(
        f"Noise floor: MHA's bits per byte have a standard deviation of {floor.sd:.4f} over "
        f"{floor.n} seeds, so two models that differ in nothing but their seed are typically "
        f"{floor.typical_difference:.4f} (√2 times that) apart.",
        "measured",
    )


def from_scratch(results: dict[str, Any], *, numbers: bool = True) -> list[Sentence]:
    """Which models with fewer heads can be told apart from MHA, and which cannot."""
    found = [
        Named(MATCHING_NAMES[matching], count, comparison)
        for count in runs.fewer_heads(results, "scratch")
        for matching in runs.matchings(results)
        if (comparison := comparisons.from_scratch(results, count, matching))
    ]
    return list(_verdicts(results, "MHA from scratch", found, numbers))


def at_share(results: dict[str, Any], num_kv_heads: int, num_q_heads: int) -> Sentence | None:
    """What came of the study's model with the same share of key/value heads; None for MHA itself
    and where there is no such model."""
    full = results["base"]["num_q_heads"]
    count, rest = divmod(num_kv_heads * full, num_q_heads)
    verdicts = [
        f"{comparison.verdict} with {MATCHING_NAMES[matching]} ({interval(comparison.seeds)})"
        for matching in runs.matchings(results)
        if not rest
        and count < full
        and (comparison := comparisons.from_scratch(results, count, matching))
    ]
    if not verdicts:
        return None
    return Sentence(
        f"The study's model with the same share of key/value heads, {count} of {full}, against "
        f"MHA in bits per byte: {_list(verdicts)}.",
        "measured",
    )


def by_conversion(results: dict[str, Any]) -> list[Sentence]:
    """Converted models against the control at the largest α, and methods against mean pooling."""
    methods, alphas = runs.methods(results), runs.alphas(results)
    counts = runs.fewer_heads(results, "converted")
    found = [
        Named(method, count, comparison)
        for method in methods
        for count in counts
        if (comparison := comparisons.by_conversion(results, count, method, alphas[-1]))
    ]
    sentences = []
    if found:
        baseline = f"the control at α = {percent(alphas[-1])}"
        sentences = list(_verdicts(results, baseline, found, numbers=False))
    elif counts:
        sentences = [Sentence("There is no control: what training on alone gains is unknown.")]
    for alpha in alphas if "mean" in methods else []:
        pairs = [
            Named(method, count, comparison)
            for method in methods
            for count in counts
            if method != "mean" and (comparison := _against_mean(results, count, method, alpha))
        ]
        baseline = f"mean pooling at α = {percent(alpha)}"
        sentences += _verdicts(results, baseline, pairs, numbers=False)
    return sentences


def _against_mean(
    results: dict[str, Any], count: int, method: str, alpha: float
) -> Comparison | None:
    plain = runs.converted(results, count, "mean", alpha)
    return comparisons.compare(results, runs.converted(results, count, method, alpha), plain)


def recall(results: dict[str, Any]) -> list[Sentence]:
    """Per task: which counts from scratch recall less or more than MHA, over seeds."""
    sentences = []
    base = runs.mha(results)
    matchings = runs.matchings(results)
    for task in runs.tasks(results):
        kinds: dict[str, list[str]] = {}
        for count in runs.fewer_heads(results, "scratch"):
            found = runs.scratch(results, count, matchings[0])
            if not found.keys() & base.keys():
                continue
            sides = (
                {seed: 100 * run["recall"][task] for seed, run in side.items()}
                for side in (found, base)
            )
            difference = paired_difference(*sides)
            kind = NOT_TOLD_APART + " from MHA"
            if difference.excludes_zero is None:
                kind = "one seed, no verdict"
            elif difference.excludes_zero:
                kind = "less is right" if difference.mean < 0 else "more is right"
            kinds.setdefault(kind, []).append(
                f"{_heads(results, count)} ({interval(difference, 1)} points)"
            )
        sentences += [
            Sentence(f"{task}, {kind}: {_list(names)}.", "measured")
            for kind, names in kinds.items()
        ]
    if sentences:
        made = f"From scratch, {MATCHING_NAMES[matchings[0]]}, paired by seed:"
        sentences.insert(0, Sentence(made))
    return sentences


def chance(results: dict[str, Any]) -> Sentence | None:
    """How many verdicts to expect by chance alone."""
    scratch = [
        (count, matching)
        for count in runs.fewer_heads(results, "scratch")
        for matching in runs.matchings(results)
        if comparisons.from_scratch(results, count, matching)
    ]
    converted = [
        (count, method, alpha)
        for count in runs.fewer_heads(results, "converted")
        for method in runs.methods(results, count)
        for alpha in runs.alphas(results)
        if comparisons.by_conversion(results, count, method, alpha)
    ]
    number = len(scratch) + len(converted)
    if not number:
        return None
    return Sentence(
        f"A 95 % interval leaves 0 out by chance once in 20 times. This page compares {number} "
        f"kinds of models, so about {number / 20:.1f} of its intervals over seeds would do so if "
        "there were no difference anywhere.",
        "computed",
    )


def _heads(results: dict[str, Any], count: int) -> str:
    return heads_name(count, results["base"]["num_q_heads"])


def _verdicts(
    results: dict[str, Any], baseline: str, found: Sequence[Named], numbers: bool
) -> Iterator[Sentence]:
    """A sentence per verdict: which of `found` are worse or better than the baseline, and which
    are not told apart from it."""
    for verdict, beginning in (
        ("worse", f"Worse than {baseline}"),
        ("better", f"Better than {baseline}"),
        (NOT_TOLD_APART, f"Not told apart from {baseline}"),
        ("one seed", f"Compared with {baseline} on one seed, no verdict"),
    ):
        kinds: dict[str, list[str]] = {}
        for kind, count, comparison in found:
            if comparison.verdict == verdict:
                shown = f" ({interval(comparison.seeds)})" if numbers else ""
                kinds.setdefault(kind, []).append(_heads(results, count) + shown)
        if kinds:
            parts = (f"{kind} with {_list(heads)}" for kind, heads in kinds.items())
            yield Sentence(f"{beginning}: {'; '.join(parts)}.", "measured")


def _list(names: Iterable[str]) -> str:
    names = list(names)
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
