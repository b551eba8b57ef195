"""What a result of a study must be, and what its comparisons say."""

import copy
import json
import math
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev

import pytest
from tradeoff_sample import synthetic_result

from llama2.checkpoint import SHIPPED, load_config
from llama2.reporting.statistics import t_critical
from llama2.tradeoff.study import comparisons, runs
from llama2.tradeoff.study.comparisons import ACCURACY, NOT_TOLD_APART
from llama2.tradeoff.study.jobs import Job, jobs
from llama2.tradeoff.study.presets import PRESETS, described


@pytest.fixture(scope="module")
def result():
    return synthetic_result()


def index_of(result, part, **fields):
    return next(
        index
        for index, run in enumerate(result["runs"])
        if run["part"] == part and all(run[name] == value for name, value in fields.items())
    )


# What cannot be believed is refused.


def set_run(part, name, value, **fields):
    return lambda r: r["runs"][index_of(r, part, **fields)].__setitem__(name, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(kind="recipe"), "kind: expected 'study'; got 'recipe'"),
        (lambda r: r.pop("corpus"), "results: expected an entry 'corpus'; got none"),
        (set_run("text", "bits_per_byte", math.nan), "bits_per_byte: expected a finite number"),
        (set_run("text", "bits_per_byte", 1.0), "bits_per_byte: expected the sum of its bits"),
        (set_run("text", "bits", [1.0]), r"bits: expected 12, one per held-out file; got 1"),
        (set_run("text", "bits", [math.inf]), r"bits\[0\]: expected a finite number; got inf"),
        (set_run("text", "part", "speech"), "part: expected one of text, records, conversion, sh"),
        (set_run("text", "arm", "main"), r"arm: expected one of \[None\] for text; got 'main'"),
        (
            set_run("records", "arm", None),
            r"arm: expected one of \['main', 'higher_lr', .* for records",
        ),
        (
            set_run("records", "accuracy", 0.5),
            "accuracy: expected the mean over numbers of items, ",
        ),
        (set_run("records", "accuracy", 1.5), "accuracy: expected 0 to 1; got 1.5"),
        (
            set_run("records", "accuracy_by_items", {}),
            "accuracy: expected the mean over numbers of items, nan",
        ),
        (
            set_run("records", "accuracy_by_items", {"2": 1.5}),
            "accuracy_by_items.2: expected 0 to 1; got 1.5",
        ),
        (set_run("text", "method", "mean"), "expected method and alpha of a text run; got 'mean'"),
        (
            set_run("conversion", "alpha", None, method="mean"),
            "expected method and alpha of a conversion run; got 'mean' and None",
        ),
        (set_run("text", "num_kv_heads", 3), "expected a divisor of the 8 query heads; got 3"),
        (set_run("shipped", "num_kv_heads", 8), "expected a divisor of the 4 query heads; got 8"),
        (lambda r: r["runs"].append(r["runs"][3]), "expected another run of"),
        (lambda r: r["runs"][3].pop("seed"), r"runs\[3\]: expected an entry 'seed'; got none"),
        (lambda r: r["runs"][3].pop("tokens"), r"runs\[3\]: expected an entry 'tokens'; got none"),
        (set_run("text", "seed", -1), "seed: expected 0 to 9223372036854775807; got -1"),
        (set_run("text", "steps", True), "steps: expected a finite number; got True"),
        (set_run("text", "seconds", 10**400), "seconds: expected a finite number; got 1000"),
        (
            lambda r: r["corpus"]["held_out"].update(bytes=7),
            "corpus.held_out.bytes: expected the sum over its files, 60246; got 7",
        ),
        (lambda r: r["text"]["base"].update(head_dim=3), "text.base.head_dim: expected an even"),
        (
            lambda r: r["shipped"]["model"].update(depth=3),
            "shipped.model: expected the fields of ModelConfig; got 'depth'",
        ),
        (
            lambda r: r["records"]["arms"][1].pop("steps"),
            r"records.arms\[1\]: expected an entry 'steps'; got none",
        ),
        (
            lambda r: r["primary"][0].update(measure="speed"),
            r"primary\[0\].measure: expected one of text, records; got 'speed'",
        ),
        (
            lambda r: r.update(
                runs=[x for x in r["runs"] if x["part"] != "text" or x["num_kv_heads"] < 8]
            ),
            "runs: expected MHA from scratch among them; got none",
        ),
        (
            lambda r: r.update(
                runs=[x for x in r["runs"] if x["arm"] != "longer" or x["num_kv_heads"] < 4]
            ),
            "runs: expected MHA among those of the arm 'longer' of records; got none",
        ),
    ],
)
def test_a_damaged_result_is_refused(result, change, message):
    damaged = copy.deepcopy(result)
    change(damaged)
    with pytest.raises(ValueError, match=message):
        runs.check(damaged)


@pytest.mark.parametrize(
    "parts",
    [
        {"seeds": (3,), "controls": False, "shipped": False},
        {"kv_heads": ()},
        {"arms": ()},
        {"methods": ()},
        {"alphas": (0.05,)},
    ],
    ids=["one seed", "MHA alone", "no records", "no conversion", "one alpha"],
)
def test_a_study_may_lack_parts(parts):
    found = synthetic_result(**parts)
    runs.check(found)
    assert len(comparisons.primary(found)) <= 3


def test_the_committed_result_is_of_the_preset():
    file = Path(__file__).parents[2] / "bench" / "results" / "tradeoff" / "results.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    runs.check(found)
    shipped_model = load_config(SHIPPED)
    planned = json.loads(json.dumps(described(PRESETS["cpu"], shipped_model)))
    found["text"].pop("epochs")
    assert {name: found[name] for name in planned} == planned
    expected = [job for phase in jobs(PRESETS["cpu"], shipped_model) for job in phase]
    assert [Job(**{name: run[name] for name in asdict(expected[0])}) for run in found["runs"]] == (
        expected
    )


# Numbers.


def with_levels(levels):
    """A study of MHA and MQA: bits per byte of every file per seed, for (MHA, MQA)."""
    result = synthetic_result(seeds=range(len(levels)), kv_heads=(1,), methods=(), arms=())
    files = result["corpus"]["held_out"]["files"]
    for run in result["runs"]:
        if run["part"] == "text":
            level = levels[run["seed"]][run["num_kv_heads"] == 1]
            per_file = level if isinstance(level, list) else [level] * len(files)
            run["bits"] = [each * file["bytes"] for each, file in zip(per_file, files, strict=True)]
            run["bits_per_byte"] = sum(run["bits"]) / sum(file["bytes"] for file in files)
    runs.check(result)
    return result


@pytest.mark.parametrize(
    ("levels", "verdict"),
    [
        ([(2.0, 2.1), (2.1, 2.2), (1.9, 2.01)], "worse"),
        ([(2.0, 1.9), (2.1, 2.0), (1.9, 1.79)], "better"),
        ([(2.0, 2.1), (2.1, 2.0), (1.9, 2.01)], NOT_TOLD_APART),
        # Every seed agrees, but the difference is that of one file of twelve.
        ([(2.0, [2.0] * 11 + [2.1 + seed / 1e3]) for seed in range(3)], NOT_TOLD_APART),
        ([(2.0, 2.1)], "one seed"),
    ],
)
def test_verdicts_on_text(levels, verdict):
    assert comparisons.from_scratch(with_levels(levels), 1).verdict == verdict


def test_a_difference_is_paired_with_its_interval():
    levels = [(2.0, 2.1), (2.2, 2.32), (1.9, 1.98)]
    found = comparisons.from_scratch(with_levels(levels), 1)
    differences = [0.1, 0.12, 0.08]
    half = t_critical(2) * stdev(differences) / math.sqrt(3)
    assert found.seeds.mean == pytest.approx(0.1)
    assert (found.seeds.low, found.seeds.high) == pytest.approx((0.1 - half, 0.1 + half))
    assert found.largest_loss == found.seeds.high > found.files.high
    # (t(0.975, 2) + t(0.9, 2)) · sd / √n, from the tables.
    expected = (4.303 + 1.886) * 0.02 / math.sqrt(3)
    assert found.resolvable == pytest.approx(expected, rel=1e-3)


def with_accuracies(accuracies):
    """A study of MHA and MQA in the arm "main": (MHA, MQA) by seed."""
    seeds = range(len(accuracies))
    result = synthetic_result(seeds=seeds, kv_heads=(1,), methods=())
    for run in result["runs"]:
        if run["part"] == "records" and run["arm"] == "main" and run["num_kv_heads"] in (8, 1):
            run["accuracy"] = accuracies[run["seed"]][run["num_kv_heads"] == 1]
            run["accuracy_by_items"] = {"2": run["accuracy"]}
    runs.check(result)
    return result


@pytest.mark.parametrize(
    ("accuracies", "verdict", "mean"),
    [
        ([(0.9, 0.7), (0.92, 0.71), (0.91, 0.73)], "worse", -59 / 3),
        ([(0.7, 0.9), (0.71, 0.92), (0.73, 0.91)], "better", 59 / 3),
        ([(0.9, 0.7), (0.9, 0.95), (0.9, 0.88)], NOT_TOLD_APART, -17 / 3),
    ],
)
def test_less_accuracy_is_worse(accuracies, verdict, mean):
    found = comparisons.records(with_accuracies(accuracies), "main", 1)
    assert found.measure is ACCURACY and found.files is None
    assert found.verdict == verdict and found.seeds.mean == pytest.approx(mean)
    # A greater loss than the lower end of the interval is excluded, in points.
    assert found.largest_loss == -found.seeds.low
    assert (found.largest_loss > 0) == (verdict != "better")


def test_records_may_be_compared_with_other_heads_than_mha(result):
    found = comparisons.records(result, "main", 1, baseline=2)
    sides = (runs.values(runs.records(result, "main", count), "accuracy") for count in (1, 2))
    variant, baseline = sides
    expected = 100 * fmean(variant[seed] - baseline[seed] for seed in variant)
    assert found.seeds.mean == pytest.approx(expected) and found.seeds.n == 6


def test_primary_comparisons_are_those_of_the_plan(result):
    found = comparisons.primary(result)
    assert [entry for entry, _ in found] == result["primary"]
    (_, text), (_, gqa), (_, mqa) = found
    assert text == comparisons.from_scratch(result, 1)
    assert gqa == comparisons.records(result, "main", 2)
    assert mqa == comparisons.records(result, "main", 1)
    assert len(comparisons.primary(synthetic_result(arms=()))) == 1


def test_conversions_are_compared_with_the_control_of_the_same_alpha(result):
    for alpha in result["conversion"]["alphas"]:
        converted = runs.values(runs.converted(result, 2, "mean", alpha))
        control = runs.values(
            runs.select(result, part="conversion", method=None, alpha=alpha)
            if alpha
            else runs.mha(result)
        )
        assert len(converted) == 4
        expected = fmean(converted[seed] - control[seed] for seed in converted)
        assert comparisons.by_conversion(result, 2, "mean", alpha).seeds.mean == expected


def test_without_controls_only_alpha_zero_has_a_baseline():
    result = synthetic_result(controls=False)
    assert comparisons.by_conversion(result, 2, "mean", 0.05) is None
    at_zero = comparisons.by_conversion(result, 2, "mean", 0.0)
    mha, converted = runs.mha(result), runs.converted(result, 2, "mean", 0.0)
    assert at_zero == comparisons.compare(result, converted, mha)


def test_the_shipped_model_is_compared_with_itself(result):
    for alpha in (0.0, 0.05):
        before, after = (runs.shipped(result, count, alpha) for count in (2, 1))
        assert before["method"] is None and after["method"] == "low_rank"
        found = comparisons.shipped(result, 1, alpha)
        difference = after["bits_per_byte"] - before["bits_per_byte"]
        assert found.mean == pytest.approx(difference)
    assert comparisons.shipped(result, 1, 0.5) is None
    assert comparisons.shipped(synthetic_result(shipped=False), 1, 0.0) is None


def test_seeds_that_one_side_lacks_are_left_out(result):
    partial = copy.deepcopy(result)
    partial["runs"] = [x for x in partial["runs"] if x["seed"] < 12 or x["num_kv_heads"] == 8]
    assert comparisons.from_scratch(partial, 1).seeds.n == 2
    assert comparisons.records(partial, "main", 1).seeds.n == 2


def test_what_there_is_in_the_order_of_the_plan(result):
    assert [arm["name"] for arm in runs.arms(result)] == [
        "main",
        "higher_lr",
        "longer",
        "two_fields",
    ]
    assert runs.fewer_heads(result, "records", "main") == [4, 2, 1]
    assert runs.fewer_heads(result, "records", "two_fields") == [1]
    assert runs.fewer_heads(result, "text") == runs.fewer_heads(result, "conversion") == [2, 1]
    assert runs.fewer_heads(result, "shipped") == [1]
    assert runs.methods(result) == ["low_rank", "mean"] and runs.alphas(result) == [0.0, 0.05]
