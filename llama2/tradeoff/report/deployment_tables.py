"""Speed and memory on paper as tables, and the published tables beside them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llama2 import accounting
from llama2.config import PUBLISHED
from llama2.reporting.document import MISSING, Column, Table
from llama2.reporting.wording import short
from llama2.tradeoff.published import PublishedTable
from llama2.tradeoff.question import Question, parameters_name, shares
from llama2.tradeoff.report.wording import heads_name
from llama2.tradeoff.roofline import Deployment
from llama2.tradeoff.study.result_form import COUNT, Number, check_entry

SHOWN_BATCH = 32
SHOWN_TP = (2, 4, 8)
_MEASURED = ("microseconds", "microseconds_p20", "microseconds_p80", "percent_of_floor")
_POSITIVE = Number(float, 1e-9, 1e30)
_ROW = {  # of `measured.measure_decode`, with the shape beside
    **dict.fromkeys(("num_q_heads", "num_kv_heads", "batch", "context", "num_layers"), COUNT),
    "shape": tuple(PUBLISHED),
    "gpu": str,
    "tag": ("measured", "does not fit"),
    "floor_microseconds": _POSITIVE,
    **dict.fromkeys(_MEASURED, replace(_POSITIVE, optional=True)),
}


def memory_table(question: Question) -> Table:
    """Returns the cache per token, whole and as each rank holds it under tensor parallelism."""
    heads = question.config.num_q_heads

    def cell(count: int, tp: int) -> str:
        if heads % tp or not shares(count, tp):
            return MISSING
        deployment = replace(question, tp=tp).deployment(count)
        return f"{deployment.kv_heads_per_rank}: {_kib(deployment)} KiB"

    return Table(
        f"Keys and values of one token, in {question.cache.name}; per GPU: heads and bytes",
        [
            Column("key/value heads"),
            Column("KiB per token", "predicted"),
            *(Column(f"on each of {tp} GPUs", "predicted") for tp in SHOWN_TP),
        ],
        [
            [
                heads_name(count, heads),
                _kib(replace(question, tp=1).deployment(count)),
                *(cell(count, tp) for tp in SHOWN_TP),
            ]
            for count in reversed(accounting.head_counts(question.config))
        ],
        "A GPU holds at least one head: with fewer heads than GPUs they are duplicated and save "
        f"nothing more. {MISSING}: the GPUs cannot share so many evenly.",
    )


def _kib(deployment: Deployment) -> str:
    return short(deployment.kv_bytes_per_token_per_rank / 1024)


def shapes_table(question: Question) -> Table:
    """Returns the table of the published shapes with MHA, 8 heads and MQA, on the same GPUs."""
    rows = [
        [name, *_shape_cells(replace(question, config=config), count)]
        for name, config in PUBLISHED.items()
        if config.num_q_heads % question.tp == 0
        for count in (config.num_q_heads, 8, 1)
        if shares(count, question.tp)
    ]
    return Table(
        f"Llama 2's shapes at a context of {question.context:,} tokens on {question.gpus_name}",
        [
            Column("shape"),
            Column("key/value heads"),
            *(
                Column(name, "predicted")
                for name in (
                    "parameters",
                    "KiB per token and GPU",
                    "largest batch",
                    f"tokens/s, batch {SHOWN_BATCH}",
                    "cache outweighs weights from batch",
                )
            ),
        ],
        rows,
        "The shapes are published (arXiv:2307.09288, table 1; Code Llama's for 34B) and had MHA at "
        "7B and 13B, 8 heads at 34B and 70B: the other rows change the key/value heads alone. "
        f"{MISSING}: does not fit.",
    )


def _shape_cells(question: Question, count: int) -> list[str]:
    deployment, context = question.deployment(count), question.context
    largest = deployment.largest_batch(context)
    fits = largest >= SHOWN_BATCH
    return [
        heads_name(count, question.config.num_q_heads),
        parameters_name(accounting.num_parameters(deployment.config)),
        _kib(deployment),
        f"{largest:,}" if largest else MISSING,
        f"{deployment.decode_tokens_per_s(SHOWN_BATCH, context):,.0f}" if fits else MISSING,
        f"{deployment.crossover_batch(context):,}" if largest else MISSING,
    ]


def published_table(table: PublishedTable) -> Table:
    """Returns a paper's table and, in a further column, the mean of its scores."""
    columns = [Column("model"), *(Column(name, "published") for name in table.columns)]
    rows = [[*cells, f"{table.mean_score(cells[0]):.2f}"] for cells in table.cells()]
    return Table(
        f"{table.title} ({table.source})",
        [*columns, Column("mean of the scores", "published")],
        rows,
        " ".join((*table.setting, "The mean of the scores is computed here.")),
    )


def check_measured(rows: Sequence[dict[str, Any]]) -> None:
    """Raises ValueError, which names the entry: no list of rows, one without an entry or with one
    of another kind, or one that says "measured" and has a figure that is not a positive number, or
    a median outside of its percentiles."""
    check_entry("measured_rows", rows, [_ROW])
    for index, row in enumerate(rows):
        if row["tag"] != "measured":
            continue
        where = f"measured_rows[{index}]"
        check_entry(where, row, dict.fromkeys(_MEASURED, _POSITIVE))
        p20, median, p80 = (row[f"microseconds{end}"] for end in ("_p20", "", "_p80"))
        if not p20 <= median <= p80:
            raise ValueError(
                f"{where}.microseconds: expected {p20} to {p80}, its percentiles; got {median}"
            )


def measured_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Returns the table of rows of `measured.measure_decode` of one shape."""

    def cells(row: dict[str, Any]) -> list[str]:
        if row["tag"] != "measured":
            return [row["tag"], MISSING, f"{row['floor_microseconds']:.1f}", MISSING]
        p20, p80 = row["microseconds_p20"], row["microseconds_p80"]
        return [
            f"{row['microseconds']:.1f}",
            f"{p20:.1f} to {p80:.1f}",
            f"{row['floor_microseconds']:.1f}",
            f"{row['percent_of_floor']:.0f} %",
        ]

    return Table(
        f"A decode step of {rows[0]['num_layers']} layers of the {rows[0]['shape']} shape on "
        f"{rows[0]['gpu']}",
        [
            *(Column(name) for name in ("key/value heads", "batch", "context")),
            Column("microseconds, median", "measured"),
            Column("20th to 80th percentile", "measured"),
            Column("floor, microseconds", "measured"),
            Column("floor over time", "measured"),
        ],
        [
            [
                heads_name(row["num_kv_heads"], row["num_q_heads"]),
                f"{row['batch']:,}",
                f"{row['context']:,}",
                *cells(row),
            ]
            for row in rows
        ],
        "The floor: the step's bytes and flops at the rates that this GPU reached in the same run. "
        "Without the head, and not scaled to a whole model.",
    )
