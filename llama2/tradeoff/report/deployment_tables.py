"""Speed and memory on paper as tables, and the published tables beside them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llama2 import accounting
from llama2.config import PUBLISHED, ModelConfig
from llama2.reporting.document import MISSING, Column, Table
from llama2.tradeoff.published import PublishedTable
from llama2.tradeoff.report.wording import heads_name, parameters_name
from llama2.tradeoff.roofline import Deployment, Gpu

SHOWN_BATCHES = (1, 32)
SHOWN_TP = (1, 2, 4, 8)
_MEASURED = (
    *("floor_microseconds", "microseconds", "microseconds_p20", "microseconds_p80"),
    "percent_of_floor",
)


@dataclass(frozen=True)
class Question:
    """The deployment that the page is about.

    Attributes:
        context: tokens that a sequence is expected to have while it decodes.
        batch: sequences that decode together; None is each count's largest.
        tp: GPUs that share the model.
    """

    config: ModelConfig
    gpu: Gpu
    context: int
    batch: int | None = None
    tp: int = 1

    def deployments(self) -> dict[int, Deployment]:
        """A deployment per number of key/value heads that `tp` can share, from many to few; the
        feed-forward layers are unchanged."""
        return {
            count: Deployment(accounting.matched(self.config, count, "same_ffn"), self.gpu, self.tp)
            for count in reversed(accounting.head_counts(self.config))
            if shares(count, self.tp)
        }

    def tokens_per_s(self, deployment: Deployment) -> float | None:
        """At the batch that was asked for, or else the largest; None where it does not fit."""
        largest = deployment.largest_batch(self.context)
        batch = self.batch or largest
        return deployment.decode_tokens_per_s(batch, self.context) if 0 < batch <= largest else None

    @property
    def shape_name(self) -> str:
        """The published name where only the key/value heads and the length may differ."""
        for name, shape in PUBLISHED.items():
            same = ("hidden_size", "intermediate_size", "num_layers", "num_q_heads", "vocab_size")
            if all(getattr(shape, field) == getattr(self.config, field) for field in same):
                return f"the {name} shape"
        layers, width = self.config.num_layers, self.config.hidden_size
        size = parameters_name(accounting.num_parameters(self.config))
        return f"a model of {layers} layers of width {width} ({size})"

    @property
    def batch_name(self) -> str:
        return f"batch {self.batch:,}" if self.batch else "the largest batch that fits"

    @property
    def gpus_name(self) -> str:
        return f"{self.tp} × {self.gpu.name}" if self.tp > 1 else self.gpu.name


def shares(num_kv_heads: int, tp: int) -> bool:
    """Whether `tp` ranks can share that many heads evenly, or duplicate them evenly."""
    return num_kv_heads % tp == 0 or tp % num_kv_heads == 0


def speed_table(question: Question) -> Table:
    """Decoding on paper for every number of key/value heads."""
    context = question.context
    asked = question.batch
    batches = sorted({*SHOWN_BATCHES, *([asked] if asked else [])})

    def row(count: int, deployment: Deployment) -> list[str]:
        largest = deployment.largest_batch(context)
        speeds = [_speed(deployment, batch, context) for batch in [*batches, largest]]
        return [
            heads_name(count, question.config.num_q_heads),
            parameters_name(accounting.num_parameters(deployment.config)),
            *speeds,
            f"{largest:,}",
            f"{deployment.crossover_batch(context):,}",
        ]

    speeds = [f"tokens/s, batch {batch:,}" for batch in batches] + ["tokens/s, largest batch"]
    names = ["parameters", *speeds, "largest batch", "crossover batch"]
    return Table(
        f"Decoding at a context of {context:,} tokens on {question.gpus_name}",
        [Column("key/value heads"), *(Column(name, "computed") for name in names)],
        [row(count, deployment) for count, deployment in question.deployments().items()],
        "Tokens of all sequences together, at the bandwidth and the peak of the data sheet: an "
        "upper bound. From the crossover batch on, a step reads more keys and values than weights. "
        f"{MISSING}: does not fit.",
    )


def _speed(deployment: Deployment, batch: int, context: int) -> str:
    if not 0 < batch <= deployment.largest_batch(context):
        return MISSING
    return f"{deployment.decode_tokens_per_s(batch, context):,.0f}"


def memory_table(question: Question) -> Table:
    """The cache per token, whole and as each rank holds it under tensor parallelism."""
    config = question.config

    def cell(count: int, tp: int) -> str:
        if config.num_q_heads % tp or not shares(count, tp):
            return MISSING
        deployment = Deployment(accounting.matched(config, count, "same_ffn"), question.gpu, tp)
        kib = deployment.kv_bytes_per_token_per_rank / 1024
        return f"{deployment.kv_heads_per_rank}: {kib:g} KiB"

    rows = [
        [
            heads_name(count, config.num_q_heads),
            f"{_kv_kib(accounting.matched(config, count, 'same_ffn')):g}",
            *(cell(count, tp) for tp in SHOWN_TP),
        ]
        for count in reversed(accounting.head_counts(config))
    ]
    return Table(
        "Keys and values of one token; per rank: heads and bytes",
        [
            Column("key/value heads"),
            Column("KiB per token", "computed"),
            *(Column(f"a rank of tp = {tp}", "computed") for tp in SHOWN_TP),
        ],
        rows,
        "Two bytes a value. A rank holds at least one head: with fewer heads than ranks they are "
        f"duplicated and save nothing more. {MISSING}: the ranks cannot share so many evenly.",
    )


def _kv_kib(config: ModelConfig) -> float:
    return accounting.kv_bytes_per_token(config) / 1024


def shapes_table(question: Question) -> Table:
    """The published shapes with MHA, 8 heads and MQA, on the same GPUs at the same context."""
    rows = [
        [name, *_shape_cells(config, count, question)]
        for name, config in PUBLISHED.items()
        for count in (config.num_q_heads, 8, 1)
        if config.num_q_heads % question.tp == 0 and shares(count, question.tp)
    ]
    return Table(
        f"Llama 2's shapes at a context of {question.context:,} tokens on {question.gpus_name}",
        [
            Column("shape"),
            Column("key/value heads"),
            Column("parameters", "computed"),
            Column("KiB per token", "computed"),
            Column("largest batch", "computed"),
            Column("tokens/s, batch 32", "computed"),
            Column("crossover batch", "computed"),
        ],
        rows,
        "The shapes are published (arXiv:2307.09288, table 1; Code Llama's for 34B) and had MHA at "
        "7B and 13B, 8 heads at 34B and 70B: the other rows change the key/value heads alone. "
        f"{MISSING}: does not fit.",
    )


def _shape_cells(config: ModelConfig, count: int, question: Question) -> list[str]:
    shape = accounting.matched(config, count, "same_ffn")
    deployment = Deployment(shape, question.gpu, question.tp)
    largest = deployment.largest_batch(question.context)
    return [
        heads_name(count, config.num_q_heads),
        parameters_name(accounting.num_parameters(shape)),
        f"{_kv_kib(shape):g}",
        f"{largest:,}" if largest else MISSING,
        _speed(deployment, 32, question.context),
        f"{deployment.crossover_batch(question.context):,}" if largest else MISSING,
    ]


def published_table(table: PublishedTable) -> Table:
    """A paper's table as it stands, with the plain mean of its scores computed beside it."""
    columns = [Column("model"), *(Column(name, "published") for name in table.columns)]
    rows = [[*cells, f"{table.mean_score(cells[0]):.2f}"] for cells in table.cells()]
    return Table(
        f"{table.title} ({table.source})",
        [*columns, Column("mean of the scores", "computed")],
        rows,
        " ".join(table.setting),
    )


def check_measured(rows: Sequence[dict[str, Any]]) -> None:
    """Raises ValueError: a row that says "measured" has a figure that is not finite."""
    for index, row in enumerate(rows):
        for name in _MEASURED if row["tag"] == "measured" else ():
            if not isinstance(row[name], int | float) or not math.isfinite(row[name]):
                raise ValueError(
                    f"measured_rows[{index}].{name}: expected a finite number; got {row[name]!r}"
                )


def measured_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Rows of `measured.measure_decode`, of one shape, as they are."""

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
            Column("floor, microseconds", "computed"),
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
