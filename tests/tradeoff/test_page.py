"""The trade-off page: its numbers, its tags, what it dares to say, and files that stand alone."""

import copy
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from statistics import fmean

import matplotlib
import pytest
from tradeoff_sample import synthetic_result

from llama2.config import PUBLISHED
from llama2.conversion import METHODS
from llama2.reporting import drawing
from llama2.reporting.document import MISSING, Sentence, Table, to_html, to_markdown
from llama2.reporting.statistics import t_critical
from llama2.tradeoff.recommend import recommend
from llama2.tradeoff.report import (
    deployment_tables,
    detail_tables,
    findings,
    plots,
    tables,
)
from llama2.tradeoff.report.deployment_tables import Question
from llama2.tradeoff.report.page import _blocks, write_page
from llama2.tradeoff.report.wording import METHOD_NOTES
from llama2.tradeoff.roofline import GPUS, Deployment
from llama2.tradeoff.study import comparisons, runs

CONFIG, GPU = PUBLISHED["7B"], GPUS["H100"]
SETTINGS = {"config": CONFIG, "gpu": GPU, "context": 4096, "batch": 16}
QUESTION = Question(**SETTINGS)
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
        "microseconds": 20.0 + batch,
        "microseconds_p20": 19.0 + batch,
        "microseconds_p80": 22.0 + batch,
        "percent_of_floor": 1000 / (20 + batch),
    }
    for heads in (32, 8)
    for batch in (1, 64)
]
# Columns of names and settings: all others must say where their numbers come from.
UNTAGGED = {
    *("key/value heads", "matching", "method", "made"),
    *("held-out file", "shape", "model", "batch", "context"),
}
VOID = {"meta", "br", "hr", "img"}


class Page(HTMLParser):
    """Headers with their badges, attributes and ids of an HTML file; fails on unbalanced tags."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.ids, self.headers = [], set(), [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        if tag == "th":
            self.headers.append([])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "th" in self.open:
            self.headers[-1].append(data.strip())


@pytest.fixture(scope="module")
def result():
    return synthetic_result()


@pytest.fixture(scope="module")
def folder(result, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    advice = recommend(CONFIG, GPU, context=4096, batch=16)
    path = write_page(result, folder, **SETTINGS, recommendation=advice, measured_rows=ROWS)
    assert path == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def markdown(folder):
    return (folder / "report.md").read_text(encoding="utf-8")


def rows_of(table):
    return {tuple(row[:2]): row for row in table.rows}


def text_of(sentences):
    return " ".join(sentence.text for sentence in sentences)


# The page


def test_every_column_of_numbers_says_where_they_come_from(page):
    headers = Page(page).headers
    tags = {tag for _, *tag in map(tuple, headers) for tag in tag}
    assert tags == {"measured", "computed", "published"}
    assert {header[0] for header in headers if len(header) == 1} <= UNTAGGED
    assert len(headers) > 60


def test_every_sentence_with_a_result_says_where_it_comes_from(result, monkeypatch):
    monkeypatch.setattr(drawing, "svg", lambda draw: "")
    advice = recommend(CONFIG, GPU, context=4096, batch=16)
    sentences = [
        sentence
        for block in _blocks(result, QUESTION, advice, ROWS, None)
        for sentence in getattr(block, "sentences", ())
    ]
    untagged = [sentence.text for sentence in sentences if sentence.tag is None]
    with_decimals = [text for text in untagged if re.search(r"\d\.\d", text)]
    assert len(with_decimals) == 1 and with_decimals[0].startswith("Study “synthetic”")
    assert {sentence.tag for sentence in sentences} == {None, "measured", "computed", "published"}


def test_every_figure_says_where_its_numbers_come_from(page):
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert len(captions) == 6
    assert all('class="badge ' in caption for caption in captions)


def test_the_page_stands_alone(page):
    parsed = Page(page)
    assert not parsed.tags & {"script", "link", "img", "iframe", "image"}
    for name, value in parsed.attributes:
        assert name != "src" and not name.startswith("on")
        assert "href" not in name or value.startswith("#")
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    assert len(parsed.ids) == len(set(parsed.ids))
    referred = set(re.findall(r'(?:href="#|url\(#)([^")]+)', page))
    assert referred and referred <= set(parsed.ids)
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_order_of_the_sections(page):
    places = [
        page.index(text)
        for text in (
            "How many key/value heads should the 7B shape have",
            "By speed and memory: ",
            "Quality, of the study&#x27;s small models only.",
            *re.findall("<h2>.*?</h2>", page),
        )
    ]
    assert places == sorted(places)
    assert re.findall("<h2>(.*?)</h2>", page) == [
        "Quality against speed",
        "Quality from scratch",
        "Quality by conversion",
        "Recall",
        "Speed",
        "Memory",
        "Published tables",
        "Limits",
        "How to reproduce",
    ]


def test_markdown_shows_every_plot_and_whole_tables(markdown, folder):
    shown = re.findall(r"\]\(([\w-]+\.svg)\)", markdown)
    assert sorted(shown) == sorted(path.name for path in folder.glob("*.svg"))
    assert len(shown) == 6
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines() if "|" in line]
    starts = [i for i, line in enumerate(markdown.splitlines()) if line.startswith("| ---")]
    assert len(starts) > 10 and min(cells) > 3
    for block in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_the_same_input_gives_the_same_bytes_in_another_process(folder, result, tmp_path):
    (tmp_path / "input.json").write_text(json.dumps([result, ROWS]), encoding="utf-8")
    code = (
        "import json; from pathlib import Path\n"
        "from llama2.config import PUBLISHED\n"
        "from llama2.tradeoff.report.page import write_page\n"
        "from llama2.tradeoff.recommend import recommend\n"
        "from llama2.tradeoff.roofline import GPUS\n"
        "result, rows = json.loads(Path('input.json').read_text())\n"
        "config, gpu = PUBLISHED['7B'], GPUS['H100']\n"
        "advice = recommend(config, gpu, context=4096, batch=16)\n"
        "write_page(result, Path('again'), config=config, gpu=gpu, context=4096, batch=16,\n"
        "           recommendation=advice, measured_rows=rows)\n"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "MPLBACKEND": "banana"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    again = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert first == again


def test_readers_own_plot_settings_change_nothing(folder, result):
    with matplotlib.rc_context({"axes.titlesize": 30, "lines.markersize": 20}):
        figure = next(b for b in _blocks(result, QUESTION, None, [], None) if hasattr(b, "svg"))
        assert matplotlib.rcParams["axes.titlesize"] == 30
    assert (folder / "pareto.svg").read_text(encoding="utf-8") == figure.svg


def test_hostile_names_are_text(result, tmp_path):
    hostile = copy.deepcopy(result)
    name = "<script>alert('1')</script>|`x`*_[a](b)\n\x00\udcff$x^$"
    hostile["corpus"]["held_out"]["files"][0]["path"] = name
    hostile["corpus"]["name"] = hostile["command"] = name
    hostile["environment"]["device"] = name
    for run in hostile["runs"]:
        run["method"] = "<b>$x^$" if run["method"] == "aligned" else run["method"]
    write_page(hostile, tmp_path, **SETTINGS)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "script" not in Page(page).tags
    assert "&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt;|`x`*_[a](b)�" in page
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    outside_code = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    assert "\\<script\\>alert('1')\\</script\\>\\|\\`x\\`\\*\\_\\[a\\](b)���$x^$" in outside_code
    assert "<script" not in re.sub(r"\\<", "", outside_code)
    assert "\x00" not in text + page


# A page of a study that lacks parts, or of none


@pytest.mark.parametrize(
    ("parts", "absent"),
    [
        ({"seeds": (3,), "controls": False, "methods": ("aligned", "mean")}, set()),
        ({"methods": (), "matchings": ("exact",)}, {"conversion"}),
        ({"matchings": (), "methods": ("first",), "alphas": (0.0,)}, set()),
        ({"matchings": ("paper",), "kv_heads": (1,), "alphas": (0.05,)}, set()),
        ({"kv_heads": (), "methods": ()}, {"conversion", "pareto"}),
    ],
    ids=("one seed", "no conversion", "no scratch", "one of each", "only MHA"),
)
def test_a_study_may_lack_parts(parts, absent, tmp_path):
    write_page(synthetic_result(**parts), tmp_path, **SETTINGS | {"batch": None})
    names = {path.stem for path in tmp_path.glob("*.svg")}
    assert names == {"pareto", "conversion", "recall", "speed", "memory"} - absent
    Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_without_a_study_the_page_is_of_speed_and_memory(tmp_path):
    write_page(None, tmp_path, **SETTINGS, command="llama2 tradeoff --none")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "No study was run: this page says nothing measured of quality." in page
    assert "llama2 tradeoff --none" in page
    assert {path.stem for path in tmp_path.glob("*.svg")} == {"speed", "memory"}
    assert re.findall("<h2>(.*?)</h2>", page)[0] == "Speed"
    assert "measured" not in {tag for _, *tags in Page(page).headers for tag in tags}


def test_where_nothing_fits_the_page_says_so(tmp_path):
    small = {"config": PUBLISHED["70B"], "gpu": GPUS["RTX 4090"], "context": 4096}
    write_page(None, tmp_path, **small)
    rows = deployment_tables.speed_table(Question(**small)).rows
    assert all(set(row[2:5]) == {MISSING} and row[5] == "0" for row in rows)


def test_one_seed_gives_no_verdict():
    result = synthetic_result(seeds=(3,))
    sentences = [*findings.from_scratch(result), *findings.by_conversion(result)]
    sentences += [*findings.recall(result), findings.noise(result)]
    text = text_of(sentences)
    assert "no verdict" in text and "there is no noise floor" in text
    assert not re.search("Worse|Better|Not told apart|is right", text)
    cells = [cell for row in tables.scratch_table(result).rows for cell in row]
    assert not any("±" in cell for cell in cells)
    assert "one seed" in cells and not {"worse", "better"} & set(cells)


# What cannot be believed is refused


def broken(result, change):
    damaged = copy.deepcopy(result)
    change(damaged)
    return damaged


def set_run(name, value, index=3):
    return lambda result: result["runs"][index].__setitem__(name, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(kind="recipe"), "kind: expected 'study'; got 'recipe'"),
        (lambda r: r.pop("corpus"), "results: expected an entry 'corpus'; got none"),
        (
            set_run("bits_per_byte", math.nan),
            r"runs\[3\].bits_per_byte: expected a finite number; got nan",
        ),
        (set_run("parameters", None), r"runs\[3\].parameters: expected a finite number; got None"),
        (set_run("bits_per_byte", 1.0), r"runs\[3\].bits_per_byte: expected the sum of its bits"),
        (set_run("bits", [1.0]), r"runs\[3\].bits: expected 12, one per held-out file; got 1"),
        (
            lambda r: r["runs"][3]["bits"].__setitem__(2, math.inf),
            r"runs\[3\].bits of 'synthetic/file_02.py': expected a finite number; got inf",
        ),
        (
            set_run("recall", {"lookup": math.nan, "copy": 0.5}),
            r"runs\[3\].recall.lookup: expected a finite number; got nan",
        ),
        (
            set_run("recall", {"lookup": 0.5}),
            r"runs\[3\].recall: expected \['copy', 'lookup'\], which have a chance level; got",
        ),
        (lambda r: r["runs"].append(r["runs"][3]), "expected another run of"),
        (lambda r: r["runs"][3].pop("seed"), r"runs\[3\]: expected an entry 'seed'; got none"),
        (set_run("seed", "x"), r"runs\[3\].seed: expected int; got 'x'"),
        (set_run("alpha", "x"), r"runs\[3\].alpha: expected a finite number; got 'x'"),
        (set_run("method", 1), r"runs\[3\].method: expected str \| None; got 1"),
        (set_run("steps", True), r"runs\[3\].steps: expected a finite number; got True"),
        (set_run("num_kv_heads", True), r"runs\[3\].num_kv_heads: expected int; got True"),
        (set_run("origin", "elsewhere"), r"runs\[3\].origin: expected one of scratch, control, "),
        (
            set_run("matching", "none"),
            r"runs\[3\].matching: expected one of same_ffn, exact, paper",
        ),
        (set_run("method", "mean", 0), r"runs\[0\].method: .* alone; got 'mean' for scratch"),
        (set_run("alpha", None), r"runs\[3\].alpha: .* alone; got None for control"),
        (
            set_run("num_kv_heads", 3),
            r"runs\[3\].num_kv_heads: expected a divisor of .*\(8\); got 3",
        ),
        (
            set_run("flops_per_token", -1e300),
            r"runs\[3\].flops_per_token: expected 0 to 1e\+30; got",
        ),
        (set_run("seconds", 10**400), r"runs\[3\].seconds: expected a finite number; got 1000"),
        (set_run("seed", -1), r"runs\[3\].seed: expected 0 to 9223372036854775807; got -1"),
        (
            set_run("recall", {"lookup": 1.5, "copy": 0.5}),
            r"runs\[3\].recall.lookup: expected 0 to 1; got 1.5",
        ),
        (lambda r: r.update(seconds=-1), r"seconds: expected 0 to 1e\+30; got -1"),
        (
            lambda r: r["recall_chance"].update(copy=math.inf),
            "recall_chance.copy: expected a finite number; got inf",
        ),
        (
            lambda r: r["corpus"]["held_out"].update(bytes=0),
            "corpus.held_out.bytes: expected 1 to 9223372036854775807; got 0",
        ),
        (
            lambda r: r["corpus"]["held_out"].update(bytes=7),
            "corpus.held_out.bytes: expected the sum over its files, 60246; got 7",
        ),
        (
            lambda r: r["base"].update(num_layers=10**400),
            "base.num_layers: expected 1 to 9223372036854775807; got 1000",
        ),
        (lambda r: r["base"].update(head_dim=3), "base.head_dim: expected an even number"),
        (lambda r: r.update(runs=None), "runs: expected list; got None"),
        (lambda r: r.update(seconds="x"), "seconds: expected a finite number; got 'x'"),
        (lambda r: r["environment"].pop("commit"), "environment: expected an entry 'commit'"),
        (lambda r: r["corpus"].pop("held_out"), "corpus: expected an entry 'held_out'"),
        (
            lambda r: r["corpus"]["held_out"]["files"][1].pop("path"),
            r"corpus.held_out.files\[1\]: expected an entry 'path'; got none",
        ),
        (lambda r: r["base"].pop("head_dim"), "base: expected an entry 'head_dim'; got none"),
        (
            lambda r: r["base"].update(depth=3),
            "base: expected the fields of ModelConfig; got 'depth'",
        ),
        (
            lambda r: r.update(runs=[run for run in r["runs"] if run["num_kv_heads"] < 8]),
            "runs: expected MHA from scratch among them; got none",
        ),
    ],
)
def test_a_damaged_result_is_refused_and_nothing_written(result, change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_page(broken(result, change), tmp_path / "page", **SETTINGS)
    assert not (tmp_path / "page").exists()


def test_a_result_may_be_older_than_a_field_of_the_config(result):
    older = broken(result, lambda r: r["base"].pop("tie_word_embeddings"))
    runs.check(older)


def test_measured_rows_must_be_finite(tmp_path):
    rows = [ROWS[0], ROWS[1] | {"microseconds": math.nan, "tag": "measured"}]
    message = r"measured_rows\[1\].microseconds: expected a finite number; got nan"
    with pytest.raises(ValueError, match=message):
        write_page(None, tmp_path / "page", **SETTINGS, measured_rows=rows)
    assert not (tmp_path / "page").exists()


# Numbers


def with_levels(levels):
    """One study of MHA and MQA: bits per byte of every file per seed, for (MHA, MQA)."""
    result = synthetic_result(seeds=range(len(levels)), kv_heads=(1,), matchings=("same_ffn",))
    files = result["corpus"]["held_out"]["files"]
    result["runs"] = [run for run in result["runs"] if run["origin"] == "scratch"]
    for run in result["runs"]:
        level = levels[run["seed"]][run["num_kv_heads"] == 1]
        per_file = level if isinstance(level, list) else [level] * len(files)
        run["bits"] = [each * file["bytes"] for each, file in zip(per_file, files, strict=True)]
        run["bits_per_byte"] = sum(run["bits"]) / sum(file["bytes"] for file in files)
    runs.check(result)
    return result


def test_verdicts_by_chance_are_counted_over_the_comparisons_that_there_are():
    result = synthetic_result(kv_heads=(2, 1), methods=("low_rank", "mean", "first"))
    result["runs"] = [
        run for run in result["runs"] if run["method"] != "first" or run["num_kv_heads"] == 1
    ]
    # 2 counts · 3 matchings from scratch; (2 counts · 2 methods + 1) · 4 alphas converted.
    assert "compares 26 kinds of models, so about 1.3 of" in findings.chance(result).text


def test_steps_are_said_beside_their_share():
    result = synthetic_result()
    for run in result["runs"]:
        run["steps"] = {0.01: 1, 0.05: 1}.get(run["alpha"], run["steps"])
    note = tables.conversion_table(result).note
    assert "in steps 0 for 0 %, 1 for 1 %, 1 for 5 %, 100 for 10 %." in note


def test_scratch_table_has_the_numbers_of_the_runs():
    levels = [(2.0, 2.1), (2.2, 2.32), (1.9, 1.98)]
    result = with_levels(levels)
    rows = rows_of(tables.scratch_table(result))
    assert rows["MHA (8)", MISSING][5:8] == ["2,048", "2.033 ± 0.153", MISSING]
    half = t_critical(2) * 0.02 / math.sqrt(3)  # the differences are 0.10, 0.12 and 0.08
    row = rows["MQA (1)", "same FFN"]
    assert row[5:8] == ["256", "2.133 ± 0.172", f"+0.1000 [{0.1 - half:+.4f}, {0.1 + half:+.4f}]"]
    assert row[8:] == ["[+0.1000, +0.1000]", "12 of 12", "worse"]


@pytest.mark.parametrize(
    ("levels", "verdict", "said"),
    [
        ([(2.0, 2.1), (2.1, 2.2), (1.9, 2.01)], "worse", "Worse than MHA"),
        ([(2.0, 1.9), (2.1, 2.0), (1.9, 1.79)], "better", "Better than MHA"),
        ([(2.0, 2.1), (2.1, 2.0), (1.9, 2.01)], "not told apart", "Not told apart from MHA"),
        # Every seed agrees, but the difference is that of one file of twelve.
        (
            [(2.0, [2.0] * 11 + [2.1 + seed / 1e3]) for seed in range(3)],
            "not told apart",
            "Not told apart from MHA",
        ),
    ],
)
def test_nothing_inside_an_interval_is_called_better_or_worse(levels, verdict, said):
    result = with_levels(levels)
    comparison = comparisons.from_scratch(result, 1, "same_ffn")
    assert comparison.verdict == verdict
    if isinstance(levels[0][1], list):
        assert comparison.seeds.excludes_zero and comparison.files.low == 0
    text = text_of(findings.from_scratch(result))
    assert said in text
    assert len(re.findall("Worse|Better|Not told", text)) == 1


def test_conversions_are_compared_with_the_control_of_the_same_alpha(result):
    for alpha in result["alphas"]:
        converted = runs.values(runs.converted(result, 2, "aligned", alpha))
        control = runs.values(runs.select(result, origin="control", alpha=alpha))
        expected = fmean(converted[seed] - control[seed] for seed in (0, 1, 2))
        assert comparisons.by_conversion(result, 2, "aligned", alpha).seeds.mean == expected
        column = 2 + result["alphas"].index(alpha)
        cell = rows_of(tables.conversion_table(result))["GQA (2)", "aligned"][column]
        assert cell.startswith(f"{fmean(converted.values()):.3f} ({expected:+.3f} ± ")


def test_without_controls_only_alpha_zero_has_a_baseline():
    result = synthetic_result(controls=False)
    assert comparisons.by_conversion(result, 2, "mean", 0.05) is None
    at_zero = comparisons.by_conversion(result, 2, "mean", 0.0)
    mha, converted = runs.mha(result), runs.converted(result, 2, "mean", 0.0)
    assert at_zero == comparisons.compare(result, converted, mha)
    assert "There is no control" in text_of(findings.by_conversion(result))


def test_seeds_that_one_side_lacks_are_left_out(result):
    partial = copy.deepcopy(result)
    partial["runs"] = [
        run for run in partial["runs"] if run["seed"] < 2 or run["num_kv_heads"] == 8
    ]
    assert comparisons.from_scratch(partial, 1, "exact").seeds.n == 2
    partial["runs"] = [run for run in partial["runs"] if run["seed"] < 2 or run["num_kv_heads"] < 8]
    assert comparisons.from_scratch(partial, 1, "exact").seeds.n == 2


def test_gap_closed_by_alignment(result):
    plain, better, control = (
        fmean(runs.values(found).values())
        for found in (
            runs.converted(result, 1, "mean", 0.05),
            runs.converted(result, 1, "aligned", 0.05),
            runs.control(result, 0.05),
        )
    )
    cell = rows_of(tables.gap_table(result))["MQA (1)", "aligned"][4]
    assert cell.startswith(f"{(plain - better) / (plain - control):.0%} (")
    assert tables.gap_table(synthetic_result(methods=("aligned",))) is None
    assert tables.gap_table(synthetic_result(methods=("mean",))) is None


def test_no_gap_is_closed_where_none_can_be_seen(result):
    """Mean pooling is worse than the control on average, but not so that seeds could tell."""
    unclear = copy.deepcopy(result)
    for run in unclear["runs"]:
        if run["method"] == "mean" and run["alpha"] == 0.05 and run["num_kv_heads"] == 1:
            factor = (1.03, 0.99, 1.01)[run["seed"]]
            control = runs.control(unclear, 0.05)[run["seed"]]
            run["bits"] = [factor * bits for bits in control["bits"]]
            run["bits_per_byte"] = factor * control["bits_per_byte"]
    runs.check(unclear)
    comparison = comparisons.by_conversion(unclear, 1, "mean", 0.05)
    assert comparison.seeds.mean > 0 and comparison.verdict == comparisons.NOT_TOLD_APART
    assert rows_of(tables.gap_table(unclear))["MQA (1)", "aligned"][4] == MISSING
    assert rows_of(tables.conversion_table(unclear))["MQA (1)", "mean"][4].endswith(") ≈")


def test_recall_table(result):
    rows = rows_of(detail_tables.recall_table(result, "lookup"))
    shares = [run["recall"]["lookup"] for run in runs.converted(result, 1, "mean", 0.1).values()]
    assert rows["MQA (1)", "converted, mean"][-1].startswith(f"{100 * fmean(shares):.1f} [")
    assert rows["MQA (1)", "converted, mean"][2] == MISSING
    assert rows["MQA (1)", "from scratch, same FFN"][3:] == [MISSING] * 4


def test_recall_differences_are_paired(result):
    text = text_of(findings.recall(result))
    differences = [
        100
        * (runs.scratch(result, 1, "same_ffn")[seed]["recall"]["lookup"] - run["recall"]["lookup"])
        for seed, run in runs.mha(result).items()
    ]
    assert f"MQA (1) ({fmean(differences):+.1f} [" in text
    assert "lookup, less is right: " in text


def test_recall_inside_the_interval_is_not_called_less(result):
    unclear = copy.deepcopy(result)
    for run in unclear["runs"]:
        run["recall"]["copy"] = 0.9 if run["num_kv_heads"] == 8 else (0.89, 0.91, 0.88)[run["seed"]]
    text = text_of(findings.recall(unclear))
    assert "copy, not told apart from MHA: GQA (4) (-0.7 [" in text
    assert "copy, less" not in text and "copy, more" not in text


def test_the_files_that_change_most_come_first(result):
    changed = copy.deepcopy(result)
    files = changed["corpus"]["held_out"]["files"]
    for run in changed["runs"]:
        if run["num_kv_heads"] == 1:
            for index, change in ((7, -2.0), (9, 3.0)):
                run["bits"][index] += change * files[index]["bytes"]
    table = detail_tables.file_table(changed, largest=2)
    assert [row[0] for row in table.rows] == [files[9]["path"], files[7]["path"]]
    assert [float(row[-1]) for row in table.rows] == pytest.approx([3, -2], abs=0.2)  # the noise
    base = fmean(run["bits"][9] / files[9]["bytes"] for run in runs.mha(result).values())
    assert table.rows[0][1:3] == [f"{files[9]['bytes']:,}", f"{base:.3f}"]
    assert detail_tables.file_table(synthetic_result(matchings=())) is None


def test_speed_over_mha_is_of_the_same_share_of_heads(result):
    speeds = plots.relative_speeds(result, QUESTION)

    def speed(heads):
        shape = replace(CONFIG, num_kv_heads=heads)
        return Deployment(shape, GPU).decode_tokens_per_s(16, 4096)

    assert list(speeds) == ["same_ffn", "exact", "paper"]
    expected = {8: 1.0, 4: speed(16) / speed(32), 2: speed(8) / speed(32), 1: speed(4) / speed(32)}
    assert speeds["same_ffn"] == expected
    assert speeds["paper"][1] < speeds["exact"][1] < speeds["same_ffn"][1]


def test_the_plot_leaves_out_the_poor_methods(result):
    from_scratch, converted = plots.pareto_panels(
        result, plots.relative_speeds(result, QUESTION)
    ).values()
    assert [kind.matching for kind in from_scratch] == ["same_ffn", "exact", "paper"]
    names = [kind.name for kind in converted]
    assert names == ["converted, low_rank", "converted, aligned", "converted, mean"]
    assert converted[1].points[2] == comparisons.by_conversion(result, 2, "aligned", 0.1)


def test_every_method_is_explained(result):
    assert set(METHOD_NOTES) == set(METHODS)
    note = tables.conversion_table(result).note
    assert all(f"{method}: {METHOD_NOTES[method]}" in note for method in METHODS)


def test_counts_without_a_place_in_the_deployment_have_no_speed(result):
    odd = replace(CONFIG, num_q_heads=12, num_kv_heads=12)
    assert set(plots.relative_speeds(result, replace(QUESTION, config=odd))["same_ffn"]) == {
        8,
        4,
        2,
    }
    # 10 and 5 heads cannot be shared by 8 ranks.
    wide = replace(QUESTION, config=PUBLISHED["13B"], tp=8)
    assert set(plots.relative_speeds(result, wide)["same_ffn"]) == {8}
    crowded = replace(QUESTION, config=PUBLISHED["70B"], batch=None)
    assert plots.relative_speeds(result, crowded) == {"same_ffn": {}, "exact": {}, "paper": {}}


def test_speed_and_memory_tables_are_the_roofline_s():
    deployment = Deployment(replace(CONFIG, num_kv_heads=8), GPU)
    row = {row[0]: row for row in deployment_tables.speed_table(QUESTION).rows}["GQA (8)"]
    largest = deployment.largest_batch(4096)
    speeds = [deployment.decode_tokens_per_s(batch, 4096) for batch in (1, 16, 32, largest)]
    assert row[2:] == [
        *(f"{speed:,.0f}" for speed in speeds),
        f"{largest:,}",
        f"{deployment.crossover_batch(4096):,}",
    ]
    memory = {row[0]: row for row in deployment_tables.memory_table(QUESTION).rows}
    assert memory["GQA (8)"] == [
        "GQA (8)",
        "128",
        "8: 128 KiB",
        "4: 64 KiB",
        "2: 32 KiB",
        "1: 16 KiB",
    ]
    assert memory["MQA (1)"][1:] == ["16", *["1: 16 KiB"] * 4]


def test_what_does_not_fit_has_no_speed():
    rows = deployment_tables.shapes_table(QUESTION).rows
    crowded = [row for row in rows if row[:2] == ["70B", "MHA (64)"]]
    assert crowded[0][4:] == [MISSING] * 3


def test_measured_rows_are_shown_as_they_are():
    table = deployment_tables.measured_table(ROWS)
    assert table.rows[0] == ["MHA (32)", "1", "4,096", "21.0", "20.0 to 23.0", "10.0", "48 %"]
    assert table.rows[1][3:] == ["does not fit", MISSING, "10.0", MISSING]


def test_advice_is_held_against_the_model_with_the_same_share(result):
    sentence = findings.at_share(result, 8, 32)
    assert sentence.tag == "measured" and "2 of 8" in sentence.text
    assert comparisons.from_scratch(result, 2, "exact").verdict in sentence.text
    assert findings.at_share(result, 32, 32) is None  # MHA itself
    assert findings.at_share(result, 2, 32) is None  # half a head of eight


def test_renderings_escape_and_tag_a_table():
    table = Table(
        "a & b",
        [deployment_tables.Column("x"), deployment_tables.Column("y", "computed")],
        [["<i>", "1|2"]],
    )
    page, markdown = to_html("t", [table]), to_markdown("t", [table])
    assert "<td>&lt;i&gt;</td>" in page and '<span class="badge computed">computed</span>' in page
    assert "| x | y *(computed)* |\n| --- | ---: |\n| \\<i\\> | 1\\|2 |" in markdown
    assert Sentence("x").tag is None
