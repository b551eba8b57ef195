"""Tests of what `hopper_report.py` concludes from results, and of the variants."""

import hopper_calls
import hopper_report
import hopper_variants as variants
import pytest
import record

from gqa_kernels.runtime import hopper_configs
from gqa_kernels.runtime.hopper_configs import HopperBackwardConfig, HopperConfig

FORWARD, BACKWARD = variants.TABLE[:2]
TABLES = (hopper_configs.HOPPER_FORWARD, hopper_configs.HOPPER_BACKWARD)


def shapes_of(variant):
    return variants.shape_names(variant.pass_, variant.head_dim, dry=False)


def end(job, status="ok", **figures):
    return {"op": job, "pass": "end", "shape": "", "status": status, "reason": "", **figures}


def race(variant, gain, shapes=None):
    """The rows of a race in which the variant is `gain` times as fast as the portable kernel."""
    times = {"triton": 100.0, "hopper": 100.0 / gain, "sdpa_cudnn": 90.0}
    return [
        {
            **{"op": "flash_attention", "pass": variant.pass_, "shape": shape},
            "status": "ok",
            **{"backend": backend, "median_us": us, "p20_us": us, "p80_us": us},
            **{"tflops": 5e4 / us, "starved": False, "reason": "", "job": f"race {variant.name}"},
        }
        for shape in shapes or shapes_of(variant)
        for backend, us in times.items()
    ]


def content(*rows, kind=record.MEASUREMENT):
    names = ("gpu", "driver", "torch", "cudnn", "triton", "commit")
    environment = {name: f"the {name}" for name in names}
    return {"kind": kind, "environment": environment, "started": "today", "rows": list(rows)}


def checks(variant):
    names = [variants.check_job("portable").name]
    names += [variants.check_job(variant.name, run).name for run in (1, 2)]
    return [end(name, cases=80) for name in names]


def good(variant, gain=1.2):
    return [*checks(variant), *race(variant, gain)]


def pasted(found):
    """The tables that the printed rows define."""
    names = {"HopperConfig": HopperConfig, "HopperBackwardConfig": HopperBackwardConfig}
    exec(hopper_report.rows_to_paste(found), names)
    return names["HOPPER_FORWARD"], names["HOPPER_BACKWARD"]


@pytest.mark.parametrize("variant", [FORWARD, BACKWARD], ids=["forward", "backward"])
def test_a_row_that_is_right_and_faster_everywhere_is_measured(variant):
    assert pasted(content(*good(variant))) == tuple(
        tuple(row._replace(measured=row == variant.config) for row in table) for table in TABLES
    )
    page = hopper_report.markdown(content(*good(variant)))
    assert "1.20 to 1.20 × the portable kernel" in page and "600 (1.20)" in page
    assert f"| {shapes_of(variant)[0]} | sdpa_cudnn | 90.0 |" in page


def changed(variant, index, row):
    """Good results, in which one of the checks is another row, or missing if it is None."""
    rows = good(variant)
    rows[index : index + 1] = [] if row is None else [row | {"op": rows[index]["op"]}]
    return rows


@pytest.mark.parametrize("variant", [FORWARD, BACKWARD], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("rows", "objection"),
    [
        (lambda v: good(v, 1.09), "1.090 × the portable kernel"),
        (lambda v: [*checks(v), *race(v, 1.2, shapes_of(v)[:-1])], "not timed"),
        (lambda v: changed(v, 0, None), "check portable: not run"),
        (lambda v: changed(v, 1, None), "VARIANT: not run"),
        (lambda v: changed(v, 2, None), ", run 2: not run"),
        (lambda v: changed(v, 0, end("", "fail")), "check portable"),
        (lambda v: changed(v, 2, end("", "fail", cases=90) | {"reason": "bits"}), "run 2: bits"),
        (lambda v: changed(v, 2, end("", cases=19)), "99 cases, fewer"),
        (
            lambda v: [*good(v), end("consan x", "fail", complaints=["a race"]) | {"what": v.name}],
            "a race",
        ),
    ],
)
def test_any_objection_leaves_the_row_unmeasured(variant, rows, objection):
    found = content(*rows(variant))
    objection = objection.replace("VARIANT", variant.name)
    assert objection in "; ".join(hopper_report.objections(found, variant))
    assert pasted(found) == TABLES
    assert objection in hopper_report.markdown(found)


def test_the_sanitizer_objects_to_its_own_pass_only():
    traced = end("consan x", "fail", complaints=["a race"]) | {"what": FORWARD.name}
    assert not hopper_report.objections(content(*good(BACKWARD), traced), BACKWARD)


def test_a_dry_run_measures_nothing():
    assert pasted(content(*good(FORWARD), kind=record.DRY_RUN)) == TABLES


def test_the_fastest_variant_that_a_row_can_ask_for_wins():
    same = (FORWARD.pass_, FORWARD.head_dim)
    others = [v for v in variants.VARIANTS.values() if (v.pass_, v.head_dim) == same][1:]
    better = next(v for v in others if v.fits_table)
    outside = next(v for v in others if not v.fits_table)
    more = [row for v in (better, outside) for row in checks(v)]
    found = content(*good(FORWARD), *more, *race(better, 1.3), *race(outside, 1.4))
    assert better.config._replace(measured=True) in pasted(found)[0]
    assert hopper_report.objections(found, outside) == []


def test_variants_fit_the_machine():
    for variant in variants.VARIANTS.values():
        (calls,) = hopper_calls.calls_of(variant, dry=False)
        row, consumers = variant.config, getattr(variant.config, "num_consumers", 2)
        assert calls.support.shared_bytes(row) <= 232448, variant.name
        assert 128 * (consumers * row.consumer_registers + row.copy_registers) <= 65536


def test_an_error_of_several_lines_stays_in_its_cell():
    wrong = end("", "fail", cases=3) | {"reason": "CUDA error:\n a | b"}
    page = hopper_report.markdown(content(*changed(FORWARD, 1, wrong)))
    assert "CUDA error: a \\| b" in page
