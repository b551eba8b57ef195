"""The trade-off page: its numbers and their origins, what it says of them, and its files."""

import copy
import html
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean

import matplotlib
import pytest
from combinations import long
from tradeoff_sample import synthetic_result

from llama2.config import PUBLISHED
from llama2.conversion import METHODS
from llama2.reporting import drawing
from llama2.reporting.document import (
    MISSING,
    Column,
    Figures,
    Paragraph,
    Sentence,
    Table,
    to_html,
    to_markdown,
)
from llama2.tradeoff.question import Question
from llama2.tradeoff.recommend import candidates, pick
from llama2.tradeoff.report import (
    decision,
    deployment,
    deployment_tables,
    quality,
    study_plots,
    study_sections,
    study_tables,
)
from llama2.tradeoff.report.folder import TITLE
from llama2.tradeoff.report.page import page_blocks, write_page
from llama2.tradeoff.report.wording import METHOD_NOTES
from llama2.tradeoff.roofline import GPUS, Deployment
from llama2.tradeoff.study import comparisons, runs

CONFIG, GPU = PUBLISHED["7B"], GPUS["H100"]
QUESTION = Question(CONFIG, GPU, 4096, 16)
ROWS = [
    {
        "shape": "7B",
        "num_q_heads": 32,
        "num_kv_heads": heads,
        "batch": batch,
        "context": 4096,
        "num_layers": 2,
        "gpu": "synthetic",
        "tag": "measured" if heads < 32 or batch < 64 else "does not fit",
        "floor_microseconds": 10.0,
        "microseconds": 20.0 + batch * heads,
        "microseconds_p20": 19.0 + batch * heads,
        "microseconds_p80": 22.0 + batch * heads,
        "percent_of_floor": 1000 / (20 + batch * heads),
    }
    for heads in (32, 8)
    for batch in (1, 64)
]
# Columns of names and settings: all others must say where their numbers come from.
UNTAGGED = {
    *("", "key/value heads", "share", "measure", "method", "shape", "model", "batch", "context"),
    *("arm", "fields", "steps", "peak learning rate", "seeds"),
}
VOID = {"meta", "br", "hr", "img", "input"}
PLOTS = {
    *("speed-batch", "speed-context", "memory", "pareto", "pareto-recall"),
    *("recall", "learning"),
}


class Page(HTMLParser):
    """Tags, attributes, ids and the tables' cells of an HTML file; fails on unbalanced tags."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.ids = [], set(), [], []
        self.text, self.tables = [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data
        if not {"script", "style", "pre"} & set(self.open):
            self.text.append(data)


@pytest.fixture(scope="module")
def result():
    return synthetic_result()


@pytest.fixture(scope="module")
def written(result, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return folder, write_page(result, folder, QUESTION, measured_rows=ROWS, command="llama2 x")


@pytest.fixture(scope="module")
def folder(written):
    return written[0]


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def markdown(folder):
    return (folder / "report.md").read_text(encoding="utf-8")


def rows_of(table, names=1):
    return {tuple(row[:names]) if names > 1 else row[0]: row[names:] for row in table.rows}


@pytest.fixture
def undrawn(monkeypatch):
    """Plots are empty: most of a page's time is theirs."""
    monkeypatch.setattr(drawing, "svg", lambda draw: "<svg></svg>")


# The renderings


def test_every_table_and_plot_says_where_its_numbers_come_from(result, page, markdown, undrawn):
    blocks = list(page_blocks(result, QUESTION, ROWS, None))
    tables = [block for block in blocks if isinstance(block, Table)]
    assert len(tables) == 11
    for table in tables:
        tags = {column.tag for column in table.columns} - {None}
        assert tags and {c.name for c in table.columns if c.tag is None} <= UNTAGGED
        row = re.search(rf"\*\*{re.escape(table.title)[:20]}.*\n\n.*", markdown)
        assert row is None or all(f"*({tag})*" in row.group() for tag in tags)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert len(captions) == len(PLOTS) + 1 and all('class="badge ' in one for one in captions)
    sentences = [sentence for block in blocks for sentence in getattr(block, "sentences", ())]
    assert {sentence.tag for sentence in sentences} == {None}
    # One for each table and origin, and one or two for a plot.
    assert page.count('class="badge ') < 35


def test_html_markdown_and_json_have_the_same_cells(written, page, markdown):
    printed = json.loads(json.dumps(written[1]))
    tables = [block for block in printed["blocks"] if block["kind"] == "table"]
    from_html = [
        [row for row in table if len(row) == len(there["columns"])][-len(there["rows"]) :]
        for table, there in zip(Page(page).tables, tables, strict=True)
    ]
    assert from_html == [table["rows"] for table in tables]
    lines = [
        [html.unescape(re.sub(r"\\(.)", r"\1", cell)).strip() for cell in line[2:-2].split(" | ")]
        for line in markdown.splitlines()
        if line.startswith("| ") and not line.startswith("| ---")
    ]
    for table in tables:
        for row in table["rows"]:
            assert row in lines
    for block in printed["blocks"]:
        for sentence in block.get("sentences", ()):
            assert html.escape(sentence["text"]) in page
    assert {
        figure["name"] for block in printed["blocks"] for figure in block.get("figures", [])
    } == PLOTS


def test_minus_signs_are_minus_signs(page, markdown):
    text = "\n".join(Page(page).text)
    assert len(re.findall(r"−\d", text)) > 10
    assert not re.findall(r"(?<![\w−-])-[\d.]", text)
    outside_code = re.sub(r"^    .*$", "", markdown, flags=re.MULTILINE)
    assert not re.findall(r"(?<![\w−-])-[\d.]", outside_code)


def test_the_page_stands_alone(page):
    parsed = Page(page)
    assert not parsed.tags & {"link", "img", "iframe", "image"}
    for name, value in parsed.attributes:
        assert name != "src" and not name.startswith("on")
        assert "href" not in name or value.startswith("#")
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    assert not re.search("fetch|XMLHttpRequest|import\\(", page)
    assert len(parsed.ids) == len(set(parsed.ids))
    referred = set(re.findall(r'(?:href="#|url\(#)([^")]+)', page))
    assert referred and referred <= set(parsed.ids)
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_the_decision_comes_first_and_contents_name_every_section(page):
    ids = ("pick", "published", "evidence", "rule", "setting", "command", "decision")
    order = [*(f'id="{name}"' for name in ids), "<h2"]
    places = [page.index(text) for text in order]
    assert places == sorted(places)
    headings = re.findall('<h2 id="(.*?)">(.*?)</h2>', page)
    assert re.findall('<a href="#(.*?)">(.*?)</a>', page) == headings
    assert [heading for _, heading in headings] == [
        "Speed and memory",
        "What this study tells",
        "Quality against speed",
        "Text",
        "Recall",
        "Conversion",
        "Other shapes and several GPUs",
        "Measured speed",
        "Published tables",
        "Limits",
        "How to reproduce",
    ]


def test_the_committed_page_is_of_the_committed_result(undrawn):
    folder = Path(__file__).parents[2] / "bench" / "results" / "tradeoff"
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    question = Question(PUBLISHED["7B"], GPUS["H200"], 4096, 32)  # the command's defaults
    made = to_markdown(TITLE, list(page_blocks(results, question, [], None)))
    assert made == (folder / "report.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"\]\(([\w-]+\.svg)\)", made))
    assert shown == {path.name for path in folder.glob("*.svg")}


def test_sections_that_the_fields_do_not_change_say_so(markdown):
    sections = dict(re.findall(r"^## (.*)\n\n((?:(?!## ).*\n)*)", markdown, re.MULTILINE))
    told = {name for name, text in sections.items() if "ts fields do not change" in text}
    assert told == {"Quality against speed", "Other shapes and several GPUs", "How to reproduce"}


def test_markdown_shows_every_plot_and_whole_tables(markdown, folder):
    shown = re.findall(r"\]\(([\w-]+)\.svg\)", markdown)
    assert set(shown) == {path.stem for path in folder.glob("*.svg")} == PLOTS | {"measured-7B"}
    for block in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_the_same_input_gives_the_same_bytes_in_another_process(folder, result, tmp_path):
    (tmp_path / "input.json").write_text(json.dumps([result, ROWS]), encoding="utf-8")
    code = (
        "import json; from pathlib import Path\n"
        "from llama2.config import PUBLISHED\n"
        "from llama2.tradeoff.question import Question\n"
        "from llama2.tradeoff.report.page import write_page\n"
        "from llama2.tradeoff.roofline import GPUS\n"
        "result, rows = json.loads(Path('input.json').read_text())\n"
        "question = Question(PUBLISHED['7B'], GPUS['H100'], 4096, 16)\n"
        "write_page(result, Path('again'), question, measured_rows=rows, command='llama2 x')\n"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "MPLBACKEND": "banana"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    again = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert first == again


def test_readers_own_plot_settings_change_nothing(folder, result):
    with matplotlib.rc_context({"axes.titlesize": 30, "lines.markersize": 20}):
        blocks = deployment.curves(QUESTION)
        figure = next(block for block in blocks if isinstance(block, Figures)).figures[0]
        assert matplotlib.rcParams["axes.titlesize"] == 30
    assert (folder / f"{figure.name}.svg").read_text(encoding="utf-8") == figure.svg


def test_hostile_names_are_text(result, tmp_path, undrawn):
    hostile = copy.deepcopy(result)
    name = "</script><script>alert('1')</script>|`x`*_[a](b)\n\x00\udcff$x^$"
    hostile["corpus"]["name"] = hostile["command"] = name
    hostile["environment"]["device"] = name
    for run in hostile["runs"]:
        run["method"] = "<b>$x^$" if run["method"] == "low_rank" else run["method"]
    write_page(hostile, tmp_path, replace(QUESTION, gpu=replace(GPU, name="</script><script>")))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("</script>") == page.count("<script>") == 1
    assert "&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt;|`x`*_[a](b)�" in page
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    outside_code = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    assert "\\<script\\>alert('1')\\</script\\>\\|\\`x\\`\\*\\_\\[a\\](b)���$x^$" in outside_code
    assert "<script" not in re.sub(r"\\<", "", outside_code)
    assert "\x00" not in text + page


def test_renderings_escape_and_tag_a_table():
    one = Table("a & b", [Column("x"), Column("y", "predicted")], [["<i>", "1|2"]])
    several = replace(one, columns=[Column("x", "published"), Column("y", "this study")])
    page, markdown = to_html("t", [one, several]), to_markdown("t", [one, several])
    assert '<th scope="row">&lt;i&gt;</th>' in page
    assert 'a &amp; b <span class="badge predicted">predicted</span></h3>' in page
    assert '<th class="group" colspan="1"><span class="badge study">this study</span></th>' in page
    assert "**a & b** *(predicted)*\n\n| x | y |\n| --- | ---: |" in markdown.replace("\\&", "&")
    assert "| x *(published)* | y *(this study)* |" in markdown
    assert Sentence("x").tag is None


# A page of a study that lacks parts, or of none


@pytest.mark.parametrize(
    ("parts", "absent"),
    [
        ({"seeds": (3,), "controls": False}, set()),
        ({"methods": (), "shipped": False}, set()),
        long({"arms": (), "kv_heads": (1,)}, {"recall", "learning", "pareto-recall"}),
        long({"kv_heads": (), "methods": ()}, {"pareto"}),
        ({"alphas": (0.0,), "kv_heads": (4,)}, set()),
    ],
    ids=("one seed", "no conversion", "no records", "no fewer heads", "one of each"),
)
def test_a_study_may_lack_parts(parts, absent, tmp_path):
    write_page(synthetic_result(**parts), tmp_path, replace(QUESTION, batch=None))
    assert {path.stem for path in tmp_path.glob("*.svg")} == PLOTS - absent
    Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_without_a_study_the_page_says_so(tmp_path):
    write_page(None, tmp_path, QUESTION, command="llama2 tradeoff --none")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "No study was run: the page says nothing of its own on quality." in page
    assert "llama2 tradeoff --none" in page and 'id="evidence"' not in page
    assert {path.stem for path in tmp_path.glob("*.svg")} == {
        *("speed-batch", "speed-context", "memory")
    }


def test_where_nothing_fits_the_page_says_so(tmp_path, undrawn):
    small = Question(PUBLISHED["70B"], GPUS["RTX 4090"], 4096)
    blocks = write_page(synthetic_result(), tmp_path, small)["blocks"]
    assert blocks[0]["sentences"][0]["text"] == (
        "No count with at least 1/8 of the query heads fits: the 70B shape on RTX 4090 with 4,096 "
        "tokens per sequence, the largest batch that fits and a cache in 16 bits. What would fit: "
        "tp=8."
    )
    table = next(block for block in blocks if block["kind"] == "table")
    assert table["marked"] is None
    assert all(row[2:4] == [MISSING] * 2 and row[5] == "0" for row in table["rows"])


@pytest.mark.parametrize(
    ("gpu", "batch", "said"),
    [
        ("H200", 32, "Take GQA (4): 4.07 times as many tokens per second as MHA. Predicted"),
        ("RTX 4090", 32, "Take GQA (4): 1,598 tokens per second at batch 32; MHA fits at most 3 "),
        ("L40S", 100_000, "No count with at least 1/8"),
    ],
)
def test_the_pick_is_compared_with_mha_only_if_mha_fits(gpu, batch, said):
    question = Question(CONFIG, GPUS[gpu], 4096, batch)
    found = candidates(question)
    assert decision.pick_sentence(question, found, pick(question, found)).startswith(said)


@pytest.mark.parametrize(
    ("shape", "changes", "said"),
    [
        (
            "7B",
            {},
            "The speed rule picks GQA (4). Apart from MQA, GQA (8) has the fewest heads with "
            "published quality figures: 2.83 times as many tokens per second as MHA.",
        ),
        ("7B", {"batch": 200}, "8,051 tokens per second at batch 200; MHA fits at most 62 seq"),
        ("7B", {"batch": 1_000, "least_share": 0}, ""),  # 8 heads do not fit
        ("70B", {"tp": 8}, ""),  # 8 heads are the pick
        ("13B", {"tp": 5, "least_share": 0.5}, ""),  # 8 heads cannot be shared
    ],
)
def test_the_fewest_heads_with_published_figures_stand_with_the_pick(shape, changes, said):
    question = replace(Question(PUBLISHED[shape], GPUS["H200"], 4096, 32), **changes)
    found = candidates(question)
    chosen = pick(question, found)
    assert chosen is not None
    told = decision.published_sentence(question, found, chosen)
    assert said in told if said else not told


def test_one_seed_gives_no_verdict(undrawn):
    result = synthetic_result(seeds=(3,))
    blocks = study_sections.sections(result, QUESTION)
    paragraphs = [block for block in blocks if isinstance(block, Paragraph)]
    text = " ".join(sentence.text for block in paragraphs for sentence in block.sentences)
    assert "there is no interval over seeds and no verdict" in text
    for table in (study_tables.primary_table(result), study_tables.text_table(result)):
        cells = [cell for row in table.rows for cell in row]
        assert "one seed" in cells and not any("±" in c or c == "worse" for c in cells)


def test_a_damaged_result_is_refused_and_nothing_written(result, tmp_path):
    damaged = copy.deepcopy(result)
    damaged["runs"][3]["bits_per_byte"] = 1.0
    with pytest.raises(ValueError, match="expected the sum of its bits"):
        write_page(damaged, tmp_path / "page", QUESTION)
    rows = [ROWS[0], ROWS[1] | {"microseconds": math.nan, "tag": "measured"}]
    message = r"measured_rows\[1\].microseconds: expected a finite number; got nan"
    with pytest.raises(ValueError, match=message):
        write_page(None, tmp_path / "page", QUESTION, measured_rows=rows)
    assert not (tmp_path / "page").exists()


# Numbers


def test_the_decision_has_every_count_and_marks_the_pick(result):
    found = candidates(QUESTION)
    chosen = pick(QUESTION, found)
    table = decision.decision_table(QUESTION, found, chosen, result, ROWS)
    rows = rows_of(table)
    assert list(rows) == ["MHA (32)", "GQA (16)", "GQA (8)", "GQA (4)", "GQA (2)", "MQA (1)"]
    deployment = Deployment(replace(CONFIG, num_kv_heads=8), GPU)
    speed = deployment.decode_tokens_per_s(16, 4096)
    mha = Deployment(CONFIG, GPU).decode_tokens_per_s(16, 4096)
    assert rows["GQA (8)"][:8] == [
        "most released models",
        f"{speed / mha:.2f}×",
        f"{speed:,.0f}",
        "128",
        f"{deployment.largest_batch(4096):,}",
        f"{deployment.crossover_batch(4096):,}",
        f"{(20 + 32) / (20 + 8):.2f}×",  # at batch 1: at 64 MHA was not measured
        "44.28",
    ]
    assert rows["GQA (8)"][8] == "47.1" and rows["MQA (1)"][7:9] == ["43.76", "46.6"]
    assert rows["GQA (4)"][0] == "the pick" and table.rows[table.marked][0] == "GQA (4)"
    assert len(table.columns) == len(rows["MHA (32)"]) + 1 == 13


def test_the_study_stands_in_the_rows_of_the_same_share(result):
    """2 of the study's 8 heads are 8 of 32, and 5 of 13B's 40 are its one."""
    for shape, counts in (("7B", {8: 2, 4: 1}), ("13B", {10: 2, 5: 1})):
        text, recall, longer = quality.losses(result, PUBLISHED[shape].num_q_heads)
        for here, there in counts.items():
            assert text.found[here] == comparisons.from_scratch(result, there)
            assert recall.found[here] == comparisons.records(result, "main", there)
            assert longer.found[here] == comparisons.records(result, "longer", there)
    cells = text.cells(40)
    mean = fmean(runs.values(runs.mha(result)).values())
    assert cells[40] == f"({mean:.3f})" and 8 not in cells
    resolved, unresolved = text.found[5], text.found[10]
    half = resolved.seeds.high - resolved.seeds.mean
    assert resolved.verdict == "worse" and unresolved.verdict == comparisons.NOT_TOLD_APART
    assert cells[5] == f"+{resolved.seeds.mean:.4f} ± {half:.4f}"
    assert cells[10] == f"≤ +{unresolved.largest_loss:.4f}"
    assert longer.cells(40)[5] == f"≥ −{longer.found[5].largest_loss:.1f}"
    told = quality.evidence(result, PUBLISHED["13B"])
    assert told[8] == "The study trained no models with 1/5 of the heads."
    assert f"a loss above {unresolved.largest_loss:.4f} bits per byte is excluded" in told[10]
    assert "with 1/8 of the heads" in told[5] and cells[5] in told[5]


@pytest.mark.parametrize("shape", PUBLISHED)
@pytest.mark.parametrize("batch", [None, 1, 8, 32])
def test_the_pick_is_never_below_what_the_study_trained(result, shape, batch):
    question = Question(PUBLISHED[shape], GPUS["B200"], 4096, batch)
    chosen = pick(question, candidates(question))
    least = min(min(each.found) for each in quality.losses(result, question.config.num_q_heads))
    assert chosen is None or chosen.num_kv_heads >= least


def test_measured_speed_ups_are_of_the_nearest_rows():
    assert decision.measured_speed_ups(QUESTION, ()) == {}
    assert decision.measured_speed_ups(replace(QUESTION, config=PUBLISHED["70B"]), ROWS) == {}
    rows = [*ROWS, *(row | {"context": 8192, "microseconds": 9.0} for row in ROWS)]
    far = decision.measured_speed_ups(replace(QUESTION, context=7000), rows)
    assert far == {"speed-up of the layers, batch 1, context 8,192": {32: "1.00×", 8: "1.00×"}}


def test_primary_comparisons_have_bounds_and_powers(result):
    rows = study_tables.primary_table(result).rows
    assert [row[:3] for row in rows] == [
        ["MQA (1)", "1/8", "text, bits per byte"],
        ["GQA (2)", "1/4", "recall, points"],
        ["MQA (1)", "1/8", "recall, points"],
    ]
    comparison = comparisons.records(result, "main", 2)
    seeds = comparison.seeds
    assert rows[1][3] == f"−{-seeds.mean:.1f} [−{-seeds.low:.1f}, −{-seeds.high:.1f}]"
    assert rows[1][4:] == ["6", "worse", f"{comparison.resolvable:.1f}"]


def test_what_is_not_resolved_is_a_bound(result):
    table = rows_of(study_tables.text_table(result))
    comparison = comparisons.from_scratch(result, 2)
    assert table["GQA (2)"][-1] == (
        f"not resolved (a loss above {comparison.largest_loss:.4f} is excluded)"
    )
    assert table["GQA (2)"][5] == (
        f"[{comparison.files.low:+.4f}, {comparison.files.high:+.4f}]".replace("-", "−")
    )
    assert table["MQA (1)"][-1] == "worse" and table["MHA (8)"][4:] == [MISSING] * 4
    assert table["MQA (1)"][2] == "64" and table["MHA (8)"][2] == "512"


def test_records_are_shown_for_every_arm(result):
    table = study_tables.records_table(result)
    rows = rows_of(table)
    assert [row[1:5] for row in table.rows] == [
        ["3", "400", "0.0025", "6"],
        ["3", "400", "0.005", "4"],
        ["3", "800", "0.0025", "4"],
        ["2", "400", "0.0025", "3"],
    ]
    shares = [run["accuracy"] for run in runs.records(result, "longer", 1).values()]
    assert rows["twice the steps"][-1].startswith(f"{100 * fmean(shares):.1f} (")
    assert rows["twice the steps"][-1].endswith(") ≈")
    assert "≈" not in rows["the primary setting"][-1]
    assert rows["a control that needs one match only"][5] == MISSING


def test_conversion_is_a_matrix_of_heads_methods_and_alphas(result):
    table = study_tables.conversion_table(result)
    rows = rows_of(table, names=2)
    assert list(rows) == [
        ("MHA (8)", "none (control)"),
        *(("GQA (2)", method) for method in ("low_rank", "mean")),
        *(("MQA (1)", method) for method in ("low_rank", "mean")),
    ]
    for column, alpha in enumerate(runs.alphas(result)):
        found, plain, control = (
            fmean(runs.values(each).values())
            for each in (
                runs.converted(result, 1, "low_rank", alpha),
                runs.converted(result, 1, "mean", alpha),
                {s: r for s, r in runs.control(result, alpha).items() if s < 14},
            )
        )
        half = comparisons.by_conversion(result, 1, "low_rank", alpha).seeds
        cell = f"{found:.3f} (+{found - control:.3f} ± {half.high - half.mean:.3f})"
        assert rows["MQA (1)", "low_rank"][column] == cell
        closed = 100 * (plain - found) / (plain - control)
        assert rows["MQA (1)", "low_rank"][2 + column] == f"{closed:.0f} %"
        assert rows["MQA (1)", "mean"][2 + column] == MISSING
    assert set(METHOD_NOTES) == set(METHODS)
    assert all(f"{method}: {METHOD_NOTES[method]}" in table.note for method in ("low_rank", "mean"))


def test_without_controls_only_alpha_zero_is_compared():
    rows = rows_of(study_tables.conversion_table(synthetic_result(controls=False)), names=2)
    at_zero, later, *_ = rows["GQA (2)", "low_rank"]
    assert "(+" in at_zero and "(" not in later and rows["MHA (8)", "none (control)"][1] == MISSING


def test_the_shipped_model_has_an_interval_over_files_alone(result):
    rows = rows_of(study_tables.shipped_table(result), names=2)
    difference = comparisons.shipped(result, 1, 0.05)
    cell = f"{runs.shipped(result, 1, 0.05)['bits_per_byte']:.3f} (+{difference.mean:.3f} ["
    assert rows["MQA (1)", "low_rank"][1].startswith(cell)
    assert study_tables.shipped_table(synthetic_result(shipped=False)) is None


def test_speed_is_of_the_same_share_of_heads():
    def speed(heads):
        return Deployment(replace(CONFIG, num_kv_heads=heads), GPU).decode_tokens_per_s(16, 4096)

    shape = replace(QUESTION, config=CONFIG)
    assert study_plots.relative_speeds(shape, 8).keys() == {8, 4, 2, 1}
    mqa = study_plots.relative_speeds(shape, 8)[1]
    exact = Deployment(QUESTION.deployment(4).config, GPU).decode_tokens_per_s(16, 4096)
    assert mqa == exact / speed(32)
    odd = replace(CONFIG, num_q_heads=12, num_kv_heads=12)
    assert set(study_plots.relative_speeds(replace(QUESTION, config=odd), 8)) == {8, 4, 2}
    crowded = replace(QUESTION, config=PUBLISHED["70B"], batch=None)
    assert study_plots.relative_speeds(crowded, 8) == {}


def test_other_shapes_and_ranks_are_the_roofline_s():
    memory = rows_of(deployment_tables.memory_table(QUESTION))
    assert memory["GQA (8)"] == ["128", "4: 64 KiB", "2: 32 KiB", "1: 16 KiB"]
    assert memory["MQA (1)"] == ["16", *["1: 16 KiB"] * 3]
    rows = deployment_tables.shapes_table(QUESTION).rows
    crowded = [row for row in rows if row[:2] == ["70B", "MHA (64)"]]
    assert crowded[0][4:] == [MISSING] * 3


def test_measured_rows_are_shown_as_they_are():
    table = deployment_tables.measured_table(ROWS)
    assert table.rows[0] == ["MHA (32)", "1", "4,096", "52.0", "51.0 to 54.0", "10.0", "19 %"]
    assert table.rows[1][3:] == ["does not fit", MISSING, "10.0", MISSING]
