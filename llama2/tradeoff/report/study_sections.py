"""The sections on the study: its setting, comparisons, plots and tables."""

from collections.abc import Iterator
from typing import Any

from llama2.accounting import num_parameters
from llama2.config import ModelConfig
from llama2.reporting.document import Block, Figure, Figures, Heading, Paragraph, Sentence
from llama2.reporting.statistics import noise_floor
from llama2.tradeoff.question import Question, parameters_name
from llama2.tradeoff.report import study_plots, study_tables
from llama2.tradeoff.report.figures import figure
from llama2.tradeoff.report.wording import FIXED_SETTING, heads_name, listed
from llama2.tradeoff.study import runs


def sections(results: dict[str, Any], question: Question) -> Iterator[Block]:
    yield Heading("What this study tells")
    yield Paragraph([Sentence(text) for text in _setting(results)])
    yield study_tables.primary_table(results)
    yield from _pareto(results, question)
    yield Heading("Text")
    yield Paragraph([Sentence(_noise(results))])
    yield study_tables.text_table(results)
    if runs.arms(results):
        yield from _recall(results)
    if runs.methods(results):
        yield from _conversion(results)


def _setting(results: dict[str, Any]) -> Iterator[str]:
    text, corpus = results["text"], results["corpus"]
    base, train = ModelConfig(**text["base"]), text["train_config"]
    held_out = corpus["held_out"]
    yield (
        f"Models of {parameters_name(num_parameters(base))} parameters, {base.num_layers} layers "
        f"of width {base.hidden_size} with {base.num_q_heads} query heads, are trained from "
        "scratch with all, some and one of the key/value heads. Those of one seed start from the "
        "same weights and read the same batches; wider feed-forward layers make up for the "
        "parameters of the heads."
    )
    yield (
        f"Every comparison is at equal training budget, for text {train['steps']:,} steps of "
        f"{train['batch_size']} × {train['seq_len']} tokens at a peak learning rate of "
        f"{train['peak_lr']:g}: a model that loses may only learn more slowly."
    )
    yield (
        f"The text is {corpus['name']}: {corpus['train']['documents']:,} documents, "
        f"{corpus['train']['bytes']:,} bytes, read {text['epochs']:.2g} times; held out are the "
        f"beginnings of {len(held_out['files'])} other files, {held_out['bytes']:,} bytes."
    )


def _noise(results: dict[str, Any]) -> str:
    floor = noise_floor(list(runs.values(runs.mha(results)).values()))
    if floor is None:
        return "MHA was trained with one seed: there is no interval over seeds and no verdict."
    return (
        f"MHA's bits per byte have a standard deviation of {floor.sd:.4f} over {floor.n} seeds, so "
        "two models that differ in nothing but their seed are typically "
        f"{floor.typical_difference:.4f} (√2 times that) apart. Comparisons are paired by "
        "seed."
    )


def _pareto(results: dict[str, Any], question: Question) -> Iterator[Block]:
    """Yields the plots of quality against speed; none if no count of the deployment that fits has
    a share that was trained."""
    kinds = {
        "pareto": (
            results["text"]["base"]["num_q_heads"],
            study_plots.text_series,
            "bits per byte over MHA",
            "Text: up is worse.",
        ),
        "pareto-recall": (
            results["records"]["shape"]["num_q_heads"],
            study_plots.records_series,
            "points over MHA",
            "Recall: down is worse. A line per arm.",
        ),
    }
    shown: list[Figure] = []
    for name, (heads, made, ylabel, caption) in kinds.items():
        speeds = study_plots.relative_speeds(question, heads)
        if len(speeds) > 1 and (lines := made(results, speeds)):
            shown.append(
                figure(
                    name,
                    lambda lines=lines, speeds=speeds, ylabel=ylabel: study_plots.pareto(
                        lines, speeds, ylabel
                    ),
                    f"{caption} Bars: 95 % over seeds.",
                    "this study",
                    "predicted",
                )
            )
    if shown:
        yield Heading("Quality against speed")
        yield Paragraph(
            [
                Sentence(
                    "Up or down: what the study's models with fewer heads lose. Right: how much "
                    f"faster {question.setting} is predicted to decode with the same share of "
                    "heads and unchanged feed-forward layers. That model need not lose what the "
                    "small ones lose."
                ),
                Sentence(FIXED_SETTING),
            ]
        )
        yield Figures(shown)


def _recall(results: dict[str, Any]) -> Iterator[Block]:
    shape = results["records"]["shape"]
    yield Heading("Recall")
    yield Paragraph(
        [
            Sentence(
                "The task: a row shows items, each one token with several fields of "
                f"{shape['values']} values, and asks {shape['questions']} times for one field of "
                "the item that has a given value in another. A query head needs the key of its "
                "field and the value of the field that is asked for; fewer key/value heads have "
                "less room for them."
            ),
            Sentence(_budget(results)),
        ]
    )
    figures = [
        figure(
            "recall",
            lambda: study_plots.recall(results),
            "Answers that are right, mean over seeds and numbers of items, with the 95 % interval "
            "over seeds.",
            "this study",
        )
    ]
    if lengths := runs.lengths(results):
        figures.append(
            figure(
                "learning",
                lambda: study_plots.learning(results, lengths),
                "Training loss against steps, means over seeds.",
                "this study",
            )
        )
    yield Figures(figures)
    yield study_tables.records_table(results)


def _budget(results: dict[str, Any]) -> str:
    """Returns the accuracy of MHA and of the fewest heads after each number of steps."""
    full = results["records"]["shape"]["num_q_heads"]
    told = []
    for arm in runs.lengths(results):
        fewest = runs.fewer_heads(results, "records", arm["name"])[-1:]
        shares = [
            f"{heads_name(count, full)} is right in "
            f"{100 * study_tables.accuracy(results, arm, count):.1f} %"
            for count in (full, *fewest)
        ]
        told.append(f"after {arm['steps']:,} steps {listed(shares)}")
    return (
        "A gap is one of learning at equal budget and does not say what the heads can hold: "
        f"{'; '.join(told)}."
    )


def _conversion(results: dict[str, Any]) -> Iterator[Block]:
    yield Heading("Conversion")
    yield study_tables.conversion_table(results)
    shipped = study_tables.shipped_table(results)
    if shipped is not None:
        yield shipped
