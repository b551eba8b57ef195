"""The page's own arithmetic against Python's: in node, and in a browser with the page itself."""

import html
import json
import random
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
from combinations import long
from small_llama import small_config
from tradeoff_sample import synthetic_result

from llama2.config import PUBLISHED
from llama2.tradeoff.question import Question
from llama2.tradeoff.recommend import candidates, pick
from llama2.tradeoff.report import decision, interactive, quality
from llama2.tradeoff.report.page import write_page
from llama2.tradeoff.roofline import CACHE_FORMATS, GPUS, Deployment, Gpu

NODE = shutil.which("node")
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
needs_node = pytest.mark.skipif(NODE is None, reason="no `node` on the path to run page.js in")
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no chromium, chromium-browser or google-chrome to show the page in"
)
QUESTION = Question(PUBLISHED["7B"], GPUS["H200"], 4096, 32)
SHAPES = [
    *PUBLISHED.values(),
    replace(small_config(), num_q_heads=12, num_kv_heads=12, head_dim=8, tie_word_embeddings=True),
]


def drawn(generator):
    """A question, from settings in which everything fits to those in which nothing does."""
    config = generator.choice(SHAPES)
    ranks = [tp for tp in (1, 2, 3, 4, 8) if config.num_q_heads % tp == 0]
    return Question(
        config,
        generator.choice([*GPUS.values(), Gpu("odd", 3 * 2**30 + 1, 1.1e12 / 3, 7e14 / 3, "")]),
        context=round(2 ** generator.uniform(0, 20)),
        batch=generator.choice([None, round(2 ** generator.uniform(0, 11))]),
        tp=generator.choice(ranks),
        cache=generator.choice(list(CACHE_FORMATS.values())),
        keep=generator.choice([0.05, 0.55, 0.8, 1.0]),
        least_share=generator.choice([0, 1 / 8, 0.3, 1]),
    )


def in_node(script, given):
    program = f"{interactive.code()}\nconst page = module.exports;\n"
    program += "const given = JSON.parse(require('fs').readFileSync(0));\n"
    program += f"console.log(JSON.stringify(given.map((data) => {{ {script} }})));"
    done = subprocess.run(
        [NODE, "-e", program], input=json.dumps(given), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@needs_node
def test_numbers_and_words_are_python_s_to_the_last_bit():
    generator = random.Random(24)
    questions = [drawn(generator) for _ in range(400)]
    script = """
        const setting = page.parseSetting(data, {});
        const found = page.candidates(data, setting);
        const chosen = page.pick(found, setting);
        return {
          found,
          cells: found.map((each) => page.cells(data, setting, each, chosen)),
          pick: page.pickSentence(data, setting, found, chosen),
          published: page.publishedSentence(data, found, chosen),
          rule: page.ruleSentence(setting),
          command: page.commandOf(data, setting),
        };
    """
    answers = in_node(script, [interactive.data(question, None) for question in questions])
    picks = set()
    for question, answer in zip(questions, answers, strict=True):
        found = candidates(question)
        chosen = pick(question, found)
        picks.add(chosen and chosen.share)
        for each, other in zip(found, answer["found"], strict=True):
            assert (each.num_kv_heads, each.share) == (other["heads"], other["share"])
            assert each.verdict == other["verdict"]
            assert (each.tokens_per_s, each.speed_up) == (other["speed"], other["speedUp"])
            assert each.batch == other.get("batch")
            assert each.kv_bytes_per_token_per_rank == other.get("kvBytes")
            assert each.largest_batch == other.get("largestBatch")
            assert each.crossover_batch == other.get("crossoverBatch")
        assert answer["cells"] == [decision.cells(question, each, chosen) for each in found]
        assert answer["pick"] == decision.pick_sentence(question, found, chosen)
        assert answer["published"] == decision.published_sentence(question, found, chosen)
        assert answer["command"] == interactive.command(question)
        assert answer["rule"] == decision.rule_sentence(question)
    assert len(picks) > 6 and None in picks  # the settings were worth asking


@needs_node
def test_curves_are_the_roofline_s_and_end_where_memory_does():
    questions = [QUESTION, replace(QUESTION, batch=None, tp=4, cache=CACHE_FORMATS["int8"])]
    script = "return page.curves(data, page.parseSetting(data, {}));"
    for question, plots in zip(
        questions, in_node(script, [interactive.data(q, None) for q in questions]), strict=True
    ):
        batch = question.batch or 32
        deployments = question.deployments()
        for plot in plots.values():
            assert [line["heads"] for line in plot["lines"]] == list(deployments)
        for count, deployment in deployments.items():
            by_batch, by_context, memory = (
                next(line for line in plots[name]["lines"] if line["heads"] == count)
                for name in ("speed-batch", "speed-context", "memory")
            )
            for x, y in by_batch["points"]:
                assert y == deployment.decode_tokens_per_s(x, question.context)
            for x, y in by_context["points"]:
                assert y == deployment.decode_tokens_per_s(batch, x)
            for x, y in memory["points"]:
                used = deployment.decode_bytes(batch, x) + deployment.reserved_bytes
                assert y == pytest.approx(used / 2**30, rel=1e-12)
            assert by_batch["points"][0][0] == 1
            assert by_batch["points"][-1][0] == deployment.largest_batch(question.context)
            assert by_context["points"][-1][0] == deployment.largest_context(batch)
            assert by_batch["dot"][0] == deployment.crossover_batch(question.context)


@needs_node
def test_rounding_is_python_s():
    generator = random.Random(5)
    numbers = [0.5, 1.5, 2.5, 0.125, 0.375, 0.625, 1e6 + 0.5, 1234567.891, 0.0, 1e-9, 1.005, 99.995]
    numbers += [generator.uniform(0, 10 ** generator.randrange(9)) for _ in range(300)]
    numbers += [generator.randrange(10**6) / 8 for _ in range(300)]
    found = in_node("return [0, 1, 2].map((digits) => page.fixed(data, digits));", numbers)
    assert found == [[f"{x:,.{digits}f}" for digits in (0, 1, 2)] for x in numbers]


@needs_node
@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("context", "0", "context: expected a whole number from 1 on; got 0"),
        ("context", "", "context: expected a whole number from 1 on; got "),
        ("batch", "many", "batch: expected a whole number from 1 on, or max; got many"),
        ("batch", "1.5", "batch: expected a whole number from 1 on, or max; got 1.5"),
        ("gpu", "constructor", "gpu: expected one of H200, H100, A100"),
        ("tp", "3", "tp: expected a divisor of the 32 query heads; got 3"),
        ("kv-cache-dtype", "int4", "kv-cache-dtype: expected one of auto, fp8, int8; got int4"),
        ("keep", "0", "keep: expected a share above 0, up to 1; got 0"),
        ("least-share", "2", "least-share: expected a share from 0 to 1; got 2"),
        ("cache", "int8", "address: expected context=, batch=, gpu=, tp=, kv-cache-dtype=, keep="),
        ("constructor", "1", "address: expected context=, "),
    ],
)
def test_fields_say_what_is_wrong(field, text, message):
    texts = json.dumps({field: text})
    script = (
        f"try {{ page.parseSetting(data, {texts}); }} catch (error) {{ return error.message; }}"
    )
    (found,) = in_node(script, [interactive.data(QUESTION, None)])
    assert found.startswith(message)


def test_what_is_not_embedded_is_not_assumed():
    """The script computes with a deployment's defaults: those of Python are what it is given."""
    data = interactive.data(QUESTION, None)
    deployment = Deployment(QUESTION.config, QUESTION.gpu)
    assert data["reserved_bytes"] == deployment.reserved_bytes
    assert data["weight_bytes_per_value"] == deployment.weight_bytes_per_value
    odd = replace(QUESTION, gpu=Gpu("odd", 1, 1.0, 1.0, ""), least_share=0.3)
    assert interactive.data(odd, None)["setting"]["gpu"] == "custom"
    assert '<option value="custom" selected>odd</option>' in interactive.form(odd)
    assert '<option value="0.3" selected>30 %</option>' in interactive.form(odd)
    for file in interactive.SCRIPTS:
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 400


# In a browser


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shown")
    write_page(synthetic_result(), folder, QUESTION)
    return folder / "report.html"


def shown(file, *flags):
    """The document that a browser has made of a file or its address."""
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        *flags,
        "--dump-dom",
        file,
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def text_of(document, name):
    return html.unescape(re.search(rf'<p id="{name}"[^>]*>(.*?)</p>', document).group(1))


def rows_of(document):
    """The cells of the decision table that have keys, by the key of their row."""
    table = re.search(r'<table id="decision".*?</table>', document, re.DOTALL).group()
    return {
        row: dict(re.findall(r'data-key="(\w+)">([^<]*)<', cells))
        for row, cells in re.findall(r'<tr data-key="(\d+)"[^>]*>(.*?)</tr>', table)
    }


@needs_browser
@pytest.mark.parametrize(
    ("address", "changes"),
    [
        ("", {}),
        (
            "#context=8192&batch=16&gpu=H100&tp=2&kv-cache-dtype=int8",
            {"context": 8192, "batch": 16, "gpu": "H100", "tp": 2, "cache": "int8"},
        ),
        long(
            "#context=100000&batch=max&gpu=RTX+4090&keep=0.5&least-share=0",
            {"context": 100_000, "batch": None, "gpu": "RTX 4090", "keep": 0.5, "least_share": 0},
        ),
        long("#batch=100000", {"batch": 100_000}),
    ],
    ids=("as written", "several", "largest batch", "nothing fits"),
)
def test_a_browser_shows_python_s_numbers(page, address, changes):
    changes = dict(changes)
    if "gpu" in changes:
        changes["gpu"] = GPUS[changes["gpu"]]
    if "cache" in changes:
        changes["cache"] = CACHE_FORMATS[changes["cache"]]
    question = replace(QUESTION, **changes)
    document = shown(page.as_uri() + address)
    found = candidates(question)
    chosen = pick(question, found)
    assert text_of(document, "pick") == decision.pick_sentence(question, found, chosen)
    told = decision.published_sentence(question, found, chosen)
    assert text_of(document, "published") == told
    assert text_of(document, "rule") == decision.rule_sentence(question)
    told = quality.evidence(synthetic_result(), question.config)
    assert text_of(document, "evidence") == (told[chosen.num_kv_heads] if chosen else "")
    assert text_of(document, "message") == ""
    told = html.unescape(re.search(r'<pre id="command">(.*?)</pre>', document).group(1))
    assert told == interactive.command(question)
    rows = rows_of(document)
    assert list(rows) == [str(each.num_kv_heads) for each in reversed(found)]
    for each in found:
        cells = dict(rows[str(each.num_kv_heads)])
        del cells["heads"]
        assert cells == decision.cells(question, each, chosen)
    marked = re.findall(r'<tr data-key="(\d+)" class="marked">', document)
    assert marked == ([str(chosen.num_kv_heads)] if chosen else [])
    assert 'id="setting"' in document and not re.search(r'id="setting"[^>]*hidden', document)
    assert document.count("<polyline") >= (6 if chosen else 1)


@needs_browser
@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("#tp=3&gpu=H100", "tp: expected a divisor of the 32 query heads; got 3"),
        long("#context=abc&gpu=H100", "context: expected a whole number from 1 on; got abc"),
        long("#gpu=H100&cache=int8", "address: expected context=, batch=, gpu=, tp=, "),
        long("#nowhere", "address: expected context=, "),
        ("#gpu=<img src=x>", "gpu: expected one of H200, "),
    ],
)
def test_a_wrong_address_is_told_and_changes_nothing(page, address, message):
    document = shown(page.as_uri() + address)
    assert f"in its address. {message}" in text_of(document, "message")
    found = candidates(QUESTION)
    assert text_of(document, "pick") == decision.pick_sentence(
        QUESTION, found, pick(QUESTION, found)
    )
    assert "<img" not in document


FIELDS = 'return [...page.getElementById("setting").elements].map((f) => f.value).join(" ");'


@needs_browser
@pytest.mark.parametrize(
    ("address", "values"),
    [
        ("#context=abc&gpu=H100", "4096 32 H200 1 auto 0.8 0.125"),
        long("#context=0x10&batch=max&least-share=0.3", "16 max H200 1 auto 0.8 0.3"),
        ("#text", "4096 32 H200 1 auto 0.8 0.125"),
    ],
)
def test_the_fields_have_the_setting_that_is_shown(page, tmp_path, address, values):
    assert in_frame(page, 800, FIELDS, tmp_path, address) == values


@needs_browser
def test_the_fields_stand_between_the_headline_and_the_table(page, tmp_path):
    script = "const at = (name) => page.getElementById(name).getBoundingClientRect();"
    script += 'return at("rule").bottom < at("setting").top && at("setting").bottom < '
    script += 'at("decision").top && at("setting").bottom < 900;'
    assert in_frame(page, 1280, script, tmp_path) == "true"


def in_frame(page, width, script, folder, address=""):
    """The text that a script writes of the page in a frame of that width: a browser's own window is
    not as narrow as a telephone."""
    frame = folder / "frame.html"
    frame.write_text(
        f'<iframe id="f" style="width:{width}px;height:900px;border:0" '
        f'src="{page.as_uri()}{address}"></iframe>'
        '<p id="told"></p><script>document.getElementById("f").onload = (event) => {\n'
        "const page = event.target.contentDocument;\n"
        f'document.getElementById("told").textContent = (() => {{ {script} }})();\n'
        "};</script>",
        encoding="utf-8",
    )
    flags = ("--disable-web-security", f"--user-data-dir={folder / 'user'}")
    return text_of(shown(frame.as_uri(), *flags), "told")


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_only_tables_scroll_sideways(page, width, tmp_path):
    script = "const { scrollWidth, clientWidth } = page.documentElement;"
    script += "return `${scrollWidth} ${clientWidth}`;"
    scrolled, there = map(int, in_frame(page, width, script, tmp_path).split())
    assert width - 20 < there <= width and scrolled == there


@needs_browser
def test_a_field_changes_the_page_and_its_address(page, tmp_path):
    script = """
        const form = page.getElementById("setting");
        form.elements.context.value = "8192";
        form.dispatchEvent(new Event("input"));
        return `${page.getElementById("pick").textContent} ${page.location.hash}`;
    """
    found = candidates(replace(QUESTION, context=8192))
    said = decision.pick_sentence(
        replace(QUESTION, context=8192), found, pick(replace(QUESTION, context=8192), found)
    )
    address = "#context=8192&batch=32&gpu=H200&tp=1&kv-cache-dtype=auto&keep=0.8&least-share=0.125"
    assert in_frame(page, 800, script, tmp_path) == f"{said} {address}"
