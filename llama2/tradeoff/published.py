"""What papers have published about fewer key/value heads: their tables, number by number.

Published, not reproduced: other models, data and machines than a reader's. They say what happened
there, and nothing is extrapolated from them here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class PublishedTable:
    """One table of a paper: `rows` pairs a model's name with a value for each of `columns`."""

    title: str
    source: str
    setting: tuple[str, ...]  # sentences without which the numbers mislead
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float, ...]], ...]
    decimals: tuple[int, ...]  # to print each column as the paper does
    scores: tuple[str, ...]  # the columns that are scores of tasks; more is better
    heads: tuple[tuple[int | None, str], ...]  # the row of a number of key/value heads; None: MHA

    def value(self, row: str, column: str) -> float:
        """Raises KeyError for a row or a column that is not there."""
        values = dict(self.rows)[row]
        return dict(zip(self.columns, values, strict=True))[column]

    def cells(self) -> Iterator[tuple[str, ...]]:
        """Rows of text, name first, with the paper's decimals; their head is ("", *columns)."""
        for name, values in self.rows:
            pairs = zip(values, self.decimals, strict=True)
            yield name, *(f"{value:.{decimals}f}" for value, decimals in pairs)

    def mean_score(self, row: str) -> float:
        """The plain mean of a row's scores, computed here from rounded values, not published."""
        return fmean(self.value(row, column) for column in self.scores)

    def row_with(self, num_kv_heads: int, num_q_heads: int) -> str | None:
        """The name of the row of the model with that many heads; None without one. MHA is MHA, of
        however many heads."""
        return dict(self.heads).get(None if num_kv_heads == num_q_heads else num_kv_heads)


_GQA_TASKS = ("CNN", "arXiv", "PubMed", "MediaSum", "MultiNews", "WMT", "TriviaQA")
GQA_TABLE_1 = PublishedTable(
    title="T5 1.1 Large and XXL with multi-head, multi-query and grouped-query attention",
    source="Ainslie et al. 2023, arXiv:2305.13245, table 1",
    setting=(
        "Encoder-decoder models, fine-tuned on each task; not decoders such as Llama.",
        "MQA and GQA-8 are converted from MHA-XXL and trained for 5 % of its pre-training steps "
        "(alpha = 0.05).",
        "T_infer: seconds per sample and TPUv4 chip.",
        "The averages are the paper's; the means of its rounded columns differ from them by up "
        "to 0.2.",
    ),
    columns=("T_infer", "Average", *_GQA_TASKS),
    rows=(
        ("MHA-Large", (0.37, 46.0, 42.9, 44.6, 46.2, 35.5, 46.6, 27.7, 78.2)),
        ("MHA-XXL", (1.51, 47.2, 43.8, 45.6, 47.5, 36.4, 46.9, 28.4, 81.9)),
        ("MQA-XXL", (0.24, 46.6, 43.0, 45.0, 46.9, 36.1, 46.5, 28.5, 81.3)),
        ("GQA-8-XXL", (0.28, 47.1, 43.5, 45.4, 47.7, 36.3, 47.2, 28.4, 81.6)),
    ),
    decimals=(2, *(1,) * 8),
    scores=_GQA_TASKS,
    heads=((None, "MHA-XXL"), (8, "GQA-8-XXL"), (1, "MQA-XXL")),
)

_LLAMA2_TASKS = (
    *("BoolQ", "PIQA", "SIQA", "HellaSwag", "ARC-e", "ARC-c"),
    *("NQ", "TQA", "MMLU", "GSM8K", "HumanEval"),
)
LLAMA2_TABLE_18 = PublishedTable(
    title="A 30B decoder with multi-head, multi-query and grouped-query attention",
    source="Touvron et al. 2023, arXiv:2307.09288, table 18",
    setting=(
        "Trained from scratch on 150B tokens, one run each.",
        "GQA has 8 key/value heads. The feed-forward layers are 1.33 times as wide with MQA and "
        "1.3 times with GQA, to make up for the parameters of the heads.",
        "0-shot, but MMLU 5-shot and GSM8K 8-shot.",
    ),
    columns=_LLAMA2_TASKS,
    rows=(
        ("MHA", (71.0, 79.3, 48.2, 75.1, 71.2, 43.0, 12.4, 44.7, 28.0, 4.9, 7.9)),
        ("MQA", (70.6, 79.0, 47.9, 74.5, 71.6, 41.9, 14.5, 42.8, 26.5, 4.8, 7.3)),
        ("GQA", (69.4, 78.8, 48.6, 75.4, 72.1, 42.5, 14.0, 46.2, 26.9, 5.3, 7.9)),
    ),
    decimals=(1,) * 11,
    scores=_LLAMA2_TASKS,
    heads=((None, "MHA"), (8, "GQA"), (1, "MQA")),
)

TABLES = (GQA_TABLE_1, LLAMA2_TABLE_18)
