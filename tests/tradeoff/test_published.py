"""The tables' shape, and the sums that the papers print beside their own numbers."""

import pytest

from llama2.tradeoff.published import GQA_TABLE_1, LLAMA2_TABLE_18, TABLES


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.source)
def test_every_row_is_whole(table):
    assert len(table.columns) == len(table.decimals) == len(set(table.columns))
    assert set(table.scores) <= set(table.columns)
    cells = list(table.cells())
    assert len({name for name, *_ in cells}) == len(table.rows)
    for (name, *texts), (row, values) in zip(cells, table.rows, strict=True):
        assert name == row
        assert tuple(float(text) for text in texts) == values  # nothing is lost by printing


def test_the_gqa_papers_averages():
    """The paper averaged unrounded scores, or others: its MQA row is 0.16 from its own columns."""
    gaps = {
        row: round(GQA_TABLE_1.mean_score(row) - GQA_TABLE_1.value(row, "Average"), 2)
        for row, _ in GQA_TABLE_1.rows
    }
    assert gaps == {"MHA-Large": -0.04, "MHA-XXL": 0.01, "MQA-XXL": 0.16, "GQA-8-XXL": 0.06}


def test_the_llama_2_papers_means():
    means = {row: round(LLAMA2_TABLE_18.mean_score(row), 2) for row, _ in LLAMA2_TABLE_18.rows}
    assert means == {"MHA": 44.15, "MQA": 43.76, "GQA": 44.28}


def test_values_by_name():
    assert GQA_TABLE_1.value("GQA-8-XXL", "T_infer") == 0.28
    assert LLAMA2_TABLE_18.value("MQA", "MMLU") == 26.5
    with pytest.raises(KeyError):
        GQA_TABLE_1.value("GQA-8-XXL", "MMLU")
    with pytest.raises(KeyError):
        GQA_TABLE_1.value("GQA-4-XXL", "Average")
