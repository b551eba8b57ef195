"""Tests of `hopper.py` without a GPU: its plan, its jobs in one process, limits, resumption."""

import contextlib
import itertools
import re
import signal
import subprocess
import sys
import time

import hopper
import hopper_calls
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
from test_hopper_verdict import FORWARD, TABLES, content, race, shapes_of

from gqa_kernels.runtime import hopper_configs

# --- The plan --------------------------------------------------------------------------------


def test_the_plan_of_the_tables_takes_13_minutes():
    jobs, rest = variants.plan(dry=False)
    assert variants.DESCRIPTION.planned + sum(job.planned for job in jobs) <= 13 * 60
    names = [job.name for job in jobs]
    for variant in variants.TABLE:
        first, second = (names.index(variants.check_job(variant.name, run).name) for run in (1, 2))
        assert first < names.index(f"race {variant.name}") and first < second
    assert {variants.pass_of(job.what) for job in jobs if job.kind == "consan"} == {"fwd", "bwd"}
    assert len({job.name for job in (*jobs, *rest)}) == len(jobs) + len(rest)
    assert {job.what for job in (*jobs, *rest)} == {*variants.VARIANTS, "portable"}
    assert all(job.planned < job.limit for job in (*jobs, *rest))


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


def test_what_is_compiled_beside_the_jobs_ends_with_them(monkeypatch, tmp_path):
    child = tmp_path / "child.py"
    # One write per process: Python may write a print's text and the end of its line in two.
    line = "sys.stdout.write(f'{sys.argv[1:]}\\n'); sys.stdout.flush()"
    child.write_text(f"import sys, time; {line}; time.sleep(60)")
    monkeypatch.setattr(hopper, "CHILD", child)
    (jobs, _), log = variants.plan(dry=False), tmp_path / "log"
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as file, hopper.compiling_beside(jobs, file, dry=False):
        while (
            log.read_text(encoding="utf-8").count("compile") < 2 and time.monotonic() < start + 20
        ):
            time.sleep(0.05)
    compiled = [str(["compile", job.what]) for job in jobs if job.kind == "consan"]
    assert sorted(log.read_text(encoding="utf-8").split("\n")[:-1]) == sorted(compiled)
    assert time.monotonic() < start + 50 and len(compiled) == 2


def test_a_job_ends_with_the_command_from_its_first_import_on():
    script = """if True:
        import ctypes, runpy, sys, types

        def report():
            found = ctypes.c_int()
            ctypes.CDLL(None).prctl(2, ctypes.byref(found))  # PR_GET_PDEATHSIG
            raise SystemExit(found.value)

        sys.modules["importable"] = types.SimpleNamespace(make_importable=report)
        runpy.run_path(sys.argv[1], run_name="__main__")
    """
    done = subprocess.run([sys.executable, "-S", "-c", script, str(hopper.CHILD)], check=False)
    assert done.returncode == signal.SIGKILL


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
    (jobs, _), tiny = variants.plan(dry=True), list(variants.TINY_VARIANTS)
    assert [command[0] for command in in_process] == ["describe", *(job.kind for job in jobs)]
    assert [(job.kind, job.what, job.run) for job in jobs] == [
        ("check", "portable", 1),
        *((kind, name, 1) for name in tiny for kind in ("check", "race")),
        *(("consan", name, 1) for name in tiny),
        *(("check", name, 2) for name in tiny),
    ]
    before = record.read(out)
    assert before["kind"] == record.DRY_RUN
    ends = {row["op"]: row for row in before["rows"] if row["pass"] == hopper.END}
    assert [ends[job.name]["status"] for job in jobs] == ["ok"] * len(jobs)
    cases = {"consan": 1, "check": 2, "race": None}
    assert [ends[job.name].get("cases") for job in jobs] == [cases[job.kind] for job in jobs]
    timed = {
        (row["backend"], row["pass"], row["shape"])
        for row in before["rows"]
        if row["status"] == "ok" and "job" in row
    }
    shapes = variants.shape_names("fwd", 64, dry=True)  # those of both passes
    assert timed == {
        (name, pass_, shape)
        for name in ("emulator", "triton", "sdpa_flash")
        for pass_ in ("fwd", "bwd")
        for shape in shapes
    }
    page = out.with_suffix(".md").read_text(encoding="utf-8")
    assert "SIMULATED TIMES" in page and "## Backward, head_dim 64" in page

    # As if the command had been killed within a race: one shape is missing, and its end.
    race = f"race {tiny[1]}"
    cut = record.read(out)
    cut["rows"] = [
        row
        for row in before["rows"]
        if row["op"] != race and (row.get("job"), row["shape"]) != (race, shapes[1])
    ]
    assert len(cut["rows"]) < len(before["rows"]) - 1
    results = record.Record(out, record.DRY_RUN, {})
    results.content = cut
    results.write()
    in_process.clear()
    assert hopper.main(arguments) == 0
    assert [command[0] for command in in_process] == ["describe", "race"]
    assert f"--skip={shapes[0]}" in in_process[1]
    found, expected = (
        sorted((r["op"], r["pass"], r["shape"], r.get("backend", ""), r["status"]) for r in rows)
        for rows in (record.read(out)["rows"], before["rows"])
    )
    assert found == expected
    capsys.readouterr()


def test_a_race_short_of_time_goes_on_before_less_important_jobs(monkeypatch, tmp_path, capsys):
    """Each process times one shape; every check finds nothing."""
    started = []

    def run(command, environment, seconds, log, add):
        kind, what, *options = command[2:]
        started.append(f"{kind} {what}")
        if kind == "check":
            add({"cases": 80, "complaints": []})
        elif kind == "race":
            head_dim = variants.VARIANTS[what].head_dim
            shapes = variants.shape_names(variants.pass_of(what), head_dim, dry=False)
            done = next(x for x in options if x.startswith("--skip="))[7:].split(",")
            missing = [shape for shape in shapes if shape not in done]
            times = race(variants.VARIANTS[what], 1.2, missing[:1])
            add({"rows": times})
            if missing[1:]:
                add({"left": len(missing) - 1, "complaints": []})
        return ""

    monkeypatch.setattr(hopper, "run_child", run)
    results = record.Record(tmp_path / "x.json", record.MEASUREMENT, content()["environment"])
    check, raced = variants.check_job(FORWARD.name), variants.race_job(FORWARD, dry=False)
    with (tmp_path / "log").open("w", encoding="utf-8") as log:
        left = [check, raced]
        for turn in range(len(shapes_of(FORWARD))):
            assert left, turn
            left = hopper.run_jobs(left, results, time.monotonic() + 600, log, dry=False)
    assert not left
    assert started == [check.name, *[raced.name] * len(shapes_of(FORWARD))]
    assert hopper_report.end_of(results.content, raced.name)["status"] == "ok"
    assert (tmp_path / "x.md").exists()


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


@pytest.mark.parametrize(
    ("name", "minutes", "complaint"),
    [
        ("x.json", "nan", "--minutes: expected a positive number; got nan"),
        ("x.json", "-1", "--minutes: expected a positive number; got -1"),
        ("x.md", "1", r"--out: expected another suffix .*x\.md"),  # the page's own name
        ("x.log", "1", r"--out: expected another suffix .*x\.log"),
        ("broken.json", "1", r"--out: .*broken\.json: expected a result file"),
        (".", "1", "--out: .*Is a directory"),
        ("broken.json/x.json", "1", "--out: .*broken"),
    ],
)
def test_wrong_options_are_named_before_anything_runs(
    in_process, tmp_path, capsys, name, minutes, complaint
):
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(SystemExit):
        hopper.main(["--dry-run", "--minutes", minutes, "--out", str(tmp_path / name)])
    assert re.search(complaint, capsys.readouterr().err) and not in_process
    assert (tmp_path / "broken.json").read_text() == "{"


def test_without_time_jobs_are_left_and_said(in_process, tmp_path, capsys):
    assert hopper.main(["--dry-run", "--minutes", "0.1", "--out", str(tmp_path / "x.json")]) == 1
    assert [command[0] for command in in_process] == ["describe"]
    (jobs, _) = variants.plan(dry=True)
    assert capsys.readouterr().out.count("no time was left for") == len(jobs)


def test_a_variant_that_fails_its_check_is_not_raced(in_process, monkeypatch, tmp_path):
    out = tmp_path / "hopper.json"
    results = record.Record(out, record.DRY_RUN, {})
    (jobs, _), skipped = variants.plan(dry=True), []
    for job in jobs:
        if job.kind == "race" or job.run > 1:
            skipped.append(job.name)
            continue
        status = "fail" if job.what in variants.TINY_VARIANTS and job.kind == "check" else "ok"
        results.add(record.Row(status, hopper._head(job) | {"cases": 2, "complaints": []}))
    hopper.main(["--dry-run", "--out", str(out)])
    assert [command[0] for command in in_process] == ["describe"]
    ended = {row["op"]: row["reason"] for row in record.read(out)["rows"]}
    assert {ended[name] for name in skipped} == {"its check failed"} and len(skipped) == 4


# --- The jobs --------------------------------------------------------------------------------


def test_a_wrong_kernel_is_a_complaint(in_process, monkeypatch):
    """Out is 2 % too large."""
    right, wrong = "seen, 1.0 / total", "seen, 1.02 / total"
    monkeypatch.setattr(hopper_calls, "unpinned", lambda _, text: text.replace(right, wrong))
    monkeypatch.setattr(hopper_calls.Forward, "forms", ((1, 0, 0, 1, 0),))
    found = hopper_child.check(next(iter(variants.TINY_VARIANTS.values())), 60.0, 1, dry=True)
    assert found["cases"] == 1 and found["worst_share"] > 1
    assert any("output 0" in complaint for complaint in found["complaints"])


def test_a_wrong_gradient_is_a_complaint(in_process, monkeypatch):
    """dk is 2 % too large."""
    right, wrong = "dk * softmax_scale,", "dk * softmax_scale * 1.02,"

    def as_written(case, seed):
        return written(case, seed, lambda _, text: text.replace(right, wrong))

    written = hopper_calls.hopper_backward.as_written
    monkeypatch.setattr(hopper_calls.hopper_backward, "as_written", as_written)
    variant = list(variants.TINY_VARIANTS.values())[1]
    found = hopper_child.check(variant, 60.0, 1, dry=True)
    assert found["cases"] == 1 and found["worst_share"] > 1
    assert [complaint for complaint in found["complaints"] if "d k" in complaint]


@pytest.mark.parametrize(
    ("kind", "what"), [("check", "unknown"), ("check", ""), ("race", "portable"), ("describe", "x")]
)
def test_an_unknown_variant_is_refused(in_process, capsys, kind, what):
    with pytest.raises(SystemExit):
        hopper_child.main([kind, what, "--dry-run"])
    assert f"got {what!r}" in capsys.readouterr().err


def test_two_runs_make_different_calls():
    for calls in hopper_calls.calls_of(None, dry=True):
        first, second = (list(itertools.islice(calls.cases(seed), 4)) for seed in (0, 1))
        assert first != second


def test_other_bits_in_the_second_call_are_a_complaint():
    results = iter([torch.zeros(2), torch.ones(2)])
    with pytest.raises(AssertionError, match="other bits"):
        hopper_calls.twice(*[lambda: next(results)] * 2)()
    results = iter([torch.zeros(2), torch.ones(2)])
    with pytest.raises(AssertionError, match="other bits"):
        hopper_child._repeated(lambda inputs: lambda: next(results))({})


class Unsteady(torch.autograd.Function):
    """The gradient differs from call to call."""

    count = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dout):
        Unsteady.count += 1
        return dout * Unsteady.count


def test_other_bits_of_a_gradient_are_a_complaint():
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(AssertionError, match="other bits"):
        hopper_child._repeated(lambda inputs: lambda: Unsteady.apply(inputs["x"]))({"x": x})
    hopper_child._repeated(lambda inputs: lambda: inputs["x"] * 2)({"x": x})


def test_a_variant_is_what_runs_on_a_gpu(in_process, monkeypatch):
    from gqa_kernels.ops.attention.hopper import consumer, forward

    seen, pin = [], consumer.pin
    monkeypatch.setattr(forward, "launch_forward", lambda *given, **_: seen.append(given[2]))
    monkeypatch.setattr(consumer, "pin", pin)
    for name, table in zip(("HOPPER_FORWARD", "HOPPER_BACKWARD"), TABLES, strict=True):
        measured = tuple(row._replace(measured=True) for row in table)
        monkeypatch.setattr(hopper_configs, name, measured)
    hopper_calls.Forward(None, dry=False).install()
    for table in (hopper_configs.HOPPER_FORWARD, hopper_configs.HOPPER_BACKWARD):
        assert table and not any(row.measured for row in table)
    assert consumer.pin is pin
    variant, backward = variants.TINY_VARIANTS.values()
    hopper_calls.Backward(backward, dry=False).install()
    assert hopper_configs.HOPPER_FORWARD == ()
    assert (backward.config,) == hopper_configs.HOPPER_BACKWARD
    hopper_calls.Forward(variant, dry=False).install()
    assert (variant.config,) == hopper_configs.HOPPER_FORWARD and consumer.pin is not pin
    forward.launch_forward("call", variant.config, 132)
    assert seen == [2**30]


@pytest.mark.parametrize("calls", [hopper_calls.Forward, hopper_calls.Backward])
def test_forms_meet_all_pairs(calls):
    size = len(calls.forms[0])
    pairs = {(i, f[i], j, f[j]) for f in calls.forms for i in range(size) for j in range(i)}
    assert len(pairs) == 4 * size * (size - 1) // 2


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
