"""Tests of `hopper.py` without a GPU: its jobs in one process, limits, resumption, the verdict."""

import contextlib
import sys
import time

import hopper
import hopper_child
import hopper_report
import hopper_sensors
import hopper_variants as variants
import launches
import peers
import poison
import pytest
import record
import torch

from gqa_kernels.runtime import hopper_configs
from gqa_kernels.runtime.hopper_configs import HopperConfig

TABLE = next(iter(variants.VARIANTS.values()))
SHAPES = variants.shape_names(TABLE.head_dim, dry=False)


# --- The verdict -----------------------------------------------------------------------------


def end(job, status="ok", **figures):
    return {"op": job, "pass": "end", "shape": "", "status": status, "reason": "", **figures}


def race(variant, gain, shapes=SHAPES):
    """The rows of a race in which the variant is `gain` times as fast as the portable kernel."""
    times = {"triton": 100.0, "hopper": 100.0 / gain, "sdpa_cudnn": 90.0}
    return [
        {
            **{"op": "flash_attention", "pass": "fwd", "shape": shape, "status": "ok"},
            **{"backend": backend, "median_us": us, "p20_us": us, "p80_us": us},
            **{"tflops": 5e4 / us, "starved": False, "reason": "", "job": f"race {variant.name}"},
        }
        for shape in shapes
        for backend, us in times.items()
    ]


def content(*rows, kind=record.MEASUREMENT):
    names = ("gpu", "driver", "torch", "cudnn", "triton", "commit")
    environment = {name: f"the {name}" for name in names}
    return {"kind": kind, "environment": environment, "started": "today", "rows": list(rows)}


CHECKS = [end(f"check {what}", cases=300) for what in ("portable", TABLE.name)]
GOOD = [*CHECKS, *race(TABLE, 1.2)]


def pasted(found):
    """The table that the printed rows define."""
    names = {"HopperConfig": HopperConfig}
    exec(hopper_report.rows_to_paste(found), names)
    return names["HOPPER_FORWARD"]


def test_a_row_that_is_right_and_faster_everywhere_is_measured():
    table = hopper_configs.HOPPER_FORWARD
    rows = tuple(row._replace(measured=row == TABLE.config) for row in table)
    assert pasted(content(*GOOD)) == rows
    page = hopper_report.markdown(content(*GOOD))
    assert "1.20 to 1.20 × the portable kernel" in page and "600 (1.20)" in page
    assert f"| {SHAPES[0]} | sdpa_cudnn | 90.0 |" in page


@pytest.mark.parametrize(
    ("rows", "objection"),
    [
        ([*CHECKS, *race(TABLE, 1.09)], "1.090 × the portable kernel"),
        ([*CHECKS, *race(TABLE, 1.2, SHAPES[:-1])], "not timed"),
        ([*GOOD[1:]], "check portable: not run"),
        ([GOOD[0], *GOOD[2:]], "not run"),
        ([end("check portable", "fail"), *GOOD[1:]], "check portable"),
        ([GOOD[0], end(GOOD[1]["op"], cases=99), *GOOD[2:]], "99 cases"),
        ([*GOOD, end("consan D64", "fail", complaints=["a race"])], "a race"),
    ],
)
def test_any_objection_leaves_the_row_unmeasured(rows, objection):
    found = content(*rows)
    assert objection in "; ".join(hopper_report.objections(found, TABLE))
    assert pasted(found) == hopper_configs.HOPPER_FORWARD
    assert objection in hopper_report.markdown(found)


def test_a_dry_run_measures_nothing():
    assert not any(row.measured for row in pasted(content(*GOOD, kind=record.DRY_RUN)))


def test_the_fastest_variant_that_a_row_can_ask_for_wins():
    others = [v for v in variants.VARIANTS.values() if v.head_dim == 128 and v != TABLE]
    better = next(v for v in others if v.fits_table)
    outside = next(v for v in others if not v.fits_table)
    more = [end(f"check {v.name}", cases=300) for v in (better, outside)]
    found = content(*GOOD, *more, *race(better, 1.3), *race(outside, 1.4))
    assert better.config._replace(measured=True) in pasted(found)
    assert hopper_report.objections(found, outside) == []


def test_variants_fit_the_machine():
    for variant in variants.VARIANTS.values():
        row = variant.config
        assert hopper_child.hopper_forward.shared_bytes(row) <= 232448, variant.name
        assert 128 * (row.num_consumers * row.consumer_registers + row.copy_registers) <= 65536


# --- Processes -------------------------------------------------------------------------------


def test_a_process_that_hangs_is_ended_and_its_results_stay(tmp_path):
    found = []
    script = "import time; print('@{\"n\": 1}', flush=True); print('case 2', flush=True)"
    with (tmp_path / "log").open("w", encoding="utf-8") as log:
        command = [sys.executable, "-S", "-c", f"{script}; time.sleep(60)"]
        failure = hopper.run_child(command, {}, 4.0, log, found.append)
        assert found == [{"n": 1}] and "case 2" in failure and "after 4 s" in failure
        command = [sys.executable, "-S", "-c", f"{script}; raise SystemExit(3)"]
        assert "exit status 3" in hopper.run_child(command, {}, 20.0, log, found.append)


@pytest.fixture
def in_process(monkeypatch):
    """Jobs run in this process; returns the list of their command lines."""
    if torch.cuda.is_available():
        pytest.skip("the packages' kernels run on the GPU of this process")
    started = []

    def run(command, environment, seconds, log, add):
        started.append(command[2:])
        monkeypatch.setattr(hopper_child, "emit", add)
        with contextlib.redirect_stdout(log):
            hopper_child.main(command[2:])
        return ""

    monkeypatch.setattr(hopper, "run_child", run)
    monkeypatch.setattr(peers, "BY_NAME", dict(peers.BY_NAME))
    for module in poison.op_modules():  # so that poisoned memory is undone
        monkeypatch.setattr(module, "torch", torch)
    return started


def test_dry_run_and_resumption(in_process, tmp_path, capsys):
    out = tmp_path / "hopper.json"
    arguments = ["--dry-run", "--out", str(out)]
    assert hopper.main(arguments) == 0
    assert [command[0] for command in in_process] == [
        *("describe", "consan", "check", "check", "race"),
    ]
    before = record.read(out)
    assert before["kind"] == record.DRY_RUN
    ends = [row for row in before["rows"] if row["pass"] == hopper.END]
    assert [row["status"] for row in ends] == ["ok"] * 4
    assert [row.get("cases") for row in ends] == [1, 2, 2, None]
    timed = {
        (row["backend"], row["shape"])
        for row in before["rows"]
        if row["status"] == "ok" and "job" in row
    }
    shapes = variants.shape_names(64, dry=True)
    assert timed == {(name, s) for name in ("emulator", "triton", "sdpa_flash") for s in shapes}
    assert "SIMULATED TIMES" in out.with_suffix(".md").read_text(encoding="utf-8")

    # As if the command had been killed within the race: one shape is missing, and its end.
    cut = record.read(out)
    cut["rows"] = [
        row for row in before["rows"] if row["shape"] != shapes[1] and row["op"][:5] != "race "
    ]
    results = record.Record(out, record.DRY_RUN, {})
    results.content = cut
    results.write()
    in_process.clear()
    assert hopper.main(arguments) == 0
    assert [command[0] for command in in_process] == ["describe", "race"]
    assert f"--skip={shapes[0]}" in in_process[1]
    again = record.read(out)["rows"]
    assert [(r["op"], r["shape"], r["status"]) for r in again] == [
        (r["op"], r["shape"], r["status"]) for r in before["rows"]
    ]
    capsys.readouterr()


def test_results_of_another_gpu_are_not_continued(in_process, tmp_path, capsys):
    out = tmp_path / "hopper.json"
    results = record.Record(out, record.DRY_RUN, {"gpu": "another"})
    results.set_ceilings({})
    with pytest.raises(SystemExit):
        hopper.main(["--dry-run", "--out", str(out)])
    assert "another" in capsys.readouterr().err
    results.content["kind"] = record.MEASUREMENT
    results.write()
    with pytest.raises(SystemExit):
        hopper.main(["--dry-run", "--out", str(out)])
    assert record.MEASUREMENT in capsys.readouterr().err


def test_without_time_jobs_are_left_and_said(in_process, tmp_path, capsys):
    assert hopper.main(["--dry-run", "--minutes", "0.1", "--out", str(tmp_path / "x.json")]) == 1
    assert [command[0] for command in in_process] == ["describe"]
    assert capsys.readouterr().out.count("no time was left for") == 4


def test_a_variant_that_fails_its_check_is_not_raced(in_process, monkeypatch, tmp_path):
    variant = next(iter(variants.TINY_VARIANTS.values()))
    out = tmp_path / "hopper.json"
    results = record.Record(out, record.DRY_RUN, {})
    for job in variants.jobs(dry=True)[:3]:
        status = "fail" if job.what == variant.name and job.kind == "check" else "ok"
        results.add(record.Row(status, hopper._head(job) | {"cases": 2, "complaints": []}))
    hopper.main(["--dry-run", "--out", str(out)])
    assert [command[0] for command in in_process] == ["describe"]
    assert record.read(out)["rows"][-1]["reason"] == "its check failed"


# --- The jobs --------------------------------------------------------------------------------


def test_a_wrong_kernel_is_a_complaint(in_process, monkeypatch):
    """Out is 2 % too large."""
    right, wrong = "seen, 1.0 / softmax.running_sum", "seen, 1.02 / softmax.running_sum"
    monkeypatch.setattr(hopper_child, "_unpinned", lambda _, text: text.replace(right, wrong))
    monkeypatch.setattr(hopper_child, "FORMS", [(1, 0, 0, 1, 0)])
    found = hopper_child.check(next(iter(variants.TINY_VARIANTS.values())), 60.0, 1, dry=True)
    assert found["cases"] == 1 and found["worst_share"] > 1
    assert any("output 0" in complaint for complaint in found["complaints"])


def test_other_bits_in_the_second_call_are_a_complaint():
    results = iter([torch.zeros(2), torch.ones(2)])
    with pytest.raises(AssertionError, match="other bits"):
        hopper_child._twice(*[lambda: next(results)] * 2)()
    results = iter([torch.zeros(2), torch.ones(2)])
    with pytest.raises(AssertionError, match="other bits"):
        hopper_child._repeated(lambda inputs: lambda: next(results))({})


def test_an_error_of_several_lines_stays_in_its_cell():
    wrong = end(GOOD[1]["op"], "fail", cases=3) | {"reason": "CUDA error:\n a | b"}
    page = hopper_report.markdown(content(GOOD[0], wrong, *GOOD[2:]))
    assert "CUDA error: a \\| b" in page and not pasted(content(GOOD[0], wrong))[1].measured


def test_a_variant_is_what_runs_on_a_gpu(in_process, monkeypatch):
    from gqa_kernels.ops.attention.hopper import forward

    seen, pin = [], forward.pin
    monkeypatch.setattr(forward, "launch_forward", lambda *given, **_: seen.append(given[2]))
    monkeypatch.setattr(forward, "pin", pin)
    measured = tuple(row._replace(measured=True) for row in hopper_configs.HOPPER_FORWARD)
    monkeypatch.setattr(hopper_configs, "HOPPER_FORWARD", measured)
    hopper_child.install(None)
    assert not any(row.measured for row in hopper_configs.HOPPER_FORWARD) and forward.pin is pin
    variant = next(iter(variants.TINY_VARIANTS.values()))
    hopper_child.install(variant)
    assert (variant.config,) == hopper_configs.HOPPER_FORWARD and forward.pin is not pin
    forward.launch_forward("call", variant.config, 132)
    assert seen == [2**30]


def test_forms_meet_all_pairs():
    pairs = {(i, f[i], j, f[j]) for f in hopper_child.FORMS for i in range(5) for j in range(i)}
    assert len(pairs) == 4 * 10


def test_the_backend_runs_its_own_kernel_only():
    own = "gqa_kernels.ops.attention.hopper.forward._forward_kernel"
    other = "gqa_kernels.ops.attention.forward._forward_kernel"
    delta = "gqa_kernels.ops.attention.backward._prepare_kernel"
    launches.check("hopper", [own])
    launches.check("hopper", [delta, "gqa_kernels.ops.attention.hopper.dq._dq_kernel"])
    for launched in ([], [other], [own, other]):
        with pytest.raises(launches.NotWhatItSays, match="hopper"):
            launches.check("hopper", launched)


def test_samples_of_a_span_are_those_of_its_contender():
    sensors = hopper_sensors.Sensors()
    lines = ("1980, 600.5, 50", "1500, [N/A], 60", "900, 100.0, 40")
    sensors.samples = [(when, hopper_sensors.parse(line)) for when, line in enumerate(lines)]
    found = sensors.over([(-0.5, 0.5), (0.9, 1.1)])
    assert found == {"sm_mhz": 1740.0, "power_w": 600.5, "temperature_c": 55.0}
    assert sensors.over([]) == {}


def test_nvidia_smi_is_read_while_the_context_is_open(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 1755, 650.25, 61\nexec sleep 60\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setattr(hopper_sensors.shutil, "which", lambda _: str(program))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with hopper_sensors.Sensors() as sensors:
        end = time.monotonic() + 20
        while not sensors.samples and time.monotonic() < end:
            time.sleep(0.01)
    found = sensors.over([(0.0, time.monotonic())])
    assert found == {"sm_mhz": 1755.0, "power_w": 650.25, "temperature_c": 61.0}
