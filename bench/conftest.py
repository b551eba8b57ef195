"""`pytest bench/`: options, the clock, and device times replayed into pytest-benchmark.

When the first test of a group (op, pass, shape) runs, the session measures the whole group, with
all backends in alternating rounds; each test then reports its row. pytest-benchmark would time the
launch, not the kernel, so the device's samples are replayed to it on a virtual clock. That way its
JSON, save and compare work. pytest-benchmark is optional; without it, only the raw samples are
missing from the results.
"""

# ruff: noqa: E402  (what makes the rest importable comes first)

import itertools
import time
from collections import defaultdict
from pathlib import Path

import importable
import pytest
import torch

importable.make_importable()  # without a GPU, in Triton's interpreter

import ceilings as ceilings_module
import grid
import model_grid
import models
import peers
import record
from cuda_device import CudaDevice
from record import Row
from runner import OpContest, Runner
from stub import StubDevice
from timing import Clock

NO_GPU = "no GPU: nothing timed"
# Compiling these takes minutes and tests nothing that the others do not.
NOT_IN_DRY_RUN = ("compile", "flex")


def pytest_addoption(parser):
    group = parser.getgroup("bench")
    group.addoption("--bench-tier", choices=grid.TIERS, default="core", help="how many shapes")
    group.addoption(
        "--bench-budget",
        type=float,
        default=float("inf"),
        metavar="SECONDS",
        help="start no further group after this time",
    )
    group.addoption(
        "--bench-json", type=Path, metavar="PATH", help="result file, rewritten after every row"
    )
    group.addoption(
        "--bench-resume",
        action="store_true",
        help="keep the rows of --bench-json and measure only missing groups",
    )
    group.addoption(
        "--bench-backends", metavar="A,B", help="only these backends, such as triton,sdpa_flash"
    )
    group.addoption(
        "--bench-kernels",
        action="store_true",
        help="list every kernel that a row runs; the profiler slows later launches down",
    )
    group.addoption(
        "--bench-dry-run",
        action="store_true",
        help="without a GPU: tiny shapes, the gate on the CPU, times of a simulated device",
    )


def pytest_configure(config):
    # The plugin pytest-benchmark registers the marker too if it is installed.
    config.addinivalue_line("markers", "benchmark: timed; see pytest-benchmark")
    if config.getoption("--bench-dry-run") and torch.cuda.is_available():
        raise pytest.UsageError("--bench-dry-run: expected no GPU; set CUDA_VISIBLE_DEVICES=''")
    known = {*peers.BY_NAME, "hf"}
    for name in (config.getoption("--bench-backends") or "triton").split(","):
        if name not in known:
            raise pytest.UsageError(
                f"--bench-backends: expected some of {', '.join(sorted(known))}; got {name!r}"
            )
    config.stash[SESSION] = _Session(config)


SESSION = pytest.StashKey["_Session"]()


class _Session:
    """The state that the timed tests share."""

    def __init__(self, config):
        self.config = config
        self.dry = config.getoption("--bench-dry-run")
        self.start = time.monotonic()
        self.members = defaultdict(list)  # backends that are selected, by group
        self.rows = {}
        self.before = set()  # groups that are already in a resumed file
        self._runner = self._record = None

    @property
    def can_time(self):
        return self.dry or torch.cuda.is_available()

    @property
    def record(self):
        if self._record is None:
            kind = record.DRY_RUN if self.dry else record.MEASUREMENT
            found = ceilings_module.environment()
            if self.dry:
                found["gpu"] = StubDevice.name
            self._record = record.Record(self.config.getoption("--bench-json"), kind, found)
            if self.config.getoption("--bench-resume"):
                self.before = self._record.resume()
        return self._record

    @property
    def runner(self):
        if self._runner is None:
            clock = Clock(StubDevice() if self.dry else CudaDevice())
            measure = ceilings_module.simulated if self.dry else ceilings_module.measure_ceilings
            measured = measure(clock)
            self._runner = Runner(clock, measured)
            self.record.set_ceilings(measured._asdict())
        return self._runner

    def workloads(self, ops):
        tier = self.config.getoption("--bench-tier")
        if ops == "models":
            return model_grid.TINY if self.dry else model_grid.select(tier)
        if self.dry:
            return tuple(work for work in grid.TINY if work.op in ops)
        return grid.select(tier, ops)

    def backends(self, workload):
        is_model = isinstance(workload, model_grid.ModelWorkload)
        names = workload.backends if is_model else peers.for_op(workload.op)
        wanted = self.config.getoption("--bench-backends")
        if wanted is None:
            names = [name for name in names if name not in peers.ON_REQUEST]
        else:
            names = [name for name in names if name in wanted.split(",")]
        return [name for name in names if not (self.dry and name in NOT_IN_DRY_RUN)]

    def row(self, workload, backend):
        """Returns the row of one test; the first call for a group measures the whole group."""
        if (workload.group, backend) not in self.rows:
            self._measure(workload)
        return self.rows[workload.group, backend]

    def _measure(self, workload):
        device = torch.device("cpu" if self.dry else "cuda")
        names = self.members[workload.group]
        runner = self.runner  # creating it reads a resumed file
        over = time.monotonic() - self.start > self.config.getoption("--bench-budget")
        if workload.group in self.before:
            found = {name: Row("skip", {}, "measured before") for name in names}
        elif over:
            found = {name: Row("skip", {}, "budget") for name in names}
            self.record.content["groups_left"] += 1
            self.record.write()
        elif isinstance(workload, model_grid.ModelWorkload):
            contest = models.ModelContest(workload, device, runner.clock.device)
            found = runner.run(contest, names)
        else:
            contest = OpContest(
                workload,
                device,
                runner.clock.device.l2_bytes,
                names_kernels=self.config.getoption("--bench-kernels") and not self.dry,
            )
            found = runner.run(contest, names)
        for name, row in found.items():
            self.rows[workload.group, name] = row
            if row.info:
                self.record.add(row)


def pytest_generate_tests(metafunc):
    """Parametrises `workload` and `backend` over the ops in the test module's OPS."""
    if "workload" not in metafunc.fixturenames:
        return
    session = metafunc.config.stash[SESSION]
    table = [
        pytest.param(work, name, id=f"{work.op}-{work.pass_}-{work.shape}-{name}")
        for work in session.workloads(metafunc.module.OPS)
        for name in session.backends(work)
    ]
    if not session.can_time or not table:
        reason = f"{NO_GPU} ({len(table)} rows)" if table else "no row of this tier and backend"
        table = [pytest.param(None, None, id="none", marks=pytest.mark.skip(reason=reason))]
    metafunc.parametrize(("workload", "backend"), table)


def pytest_collection_modifyitems(items):
    """Sorts tests: those of the bench itself first, then timed groups, the most important first."""

    def rank(item):
        work = getattr(item, "callspec", None) and item.callspec.params.get("workload")
        return grid.TIERS.index(work.tier) if work else -1

    items.sort(key=rank)
    for item in items:
        work = getattr(item, "callspec", None) and item.callspec.params.get("workload")
        if work:
            simulated = item.config.stash[SESSION].dry
            group = f"SIMULATED TIMES|{work.group}" if simulated else work.group
            item.add_marker(pytest.mark.benchmark(group=group, timer=device_seconds))


def pytest_collection_finish(session):
    members = session.config.stash[SESSION].members
    for item in session.items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if params.get("workload") and params.get("backend"):
            members[params["workload"].group].append(params["backend"])


_device_time = 0.0


def device_seconds():
    """pytest-benchmark's timer: seconds of device time, advanced only by the replay."""
    return _device_time


@pytest.fixture
def timed(request):
    """Measures one row and reports it."""
    session = request.config.stash[SESSION]

    def run(workload, backend):
        row = session.row(workload, backend)
        if row.status == "skip":
            pytest.skip(row.reason)
        if row.status == "fail":
            ours = backend in ("triton", "eager")
            (pytest.fail if ours else pytest.xfail)(row.reason)
        if request.config.pluginmanager.hasplugin("benchmark"):
            _replay(request.getfixturevalue("benchmark"), row)

    return run


def _replay(benchmark, row):
    samples = itertools.chain(row.samples, itertools.repeat(0.0))

    def one():
        global _device_time
        _device_time += next(samples)

    benchmark.extra_info.update(row.info)
    benchmark.pedantic(one, rounds=len(row.samples), iterations=1)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)  # results must not name the host
    session = config.stash[SESSION]
    if session.can_time:
        machine_info.update(session.record.content["environment"])


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config, benchmarks, output_json):
    content = config.stash[SESSION].record.content
    output_json["bench"] = {name: content[name] for name in ("kind", "ceilings", "started")}


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_compare_machine_info(
    config, benchmarksession, machine_info, compared_benchmark
):
    mine, theirs = machine_info.get("gpu"), compared_benchmark["machine_info"].get("gpu")
    if mine != theirs:
        raise pytest.UsageError(f"--benchmark-compare: that run was on {theirs}; this is {mine}")


def pytest_terminal_summary(terminalreporter, config):
    session = config.stash[SESSION]
    rows = session.record.content["rows"] if session._record is not None else []
    ok = [row for row in rows if row["status"] == "ok"]
    if not rows:
        return
    terminalreporter.section("device times")
    terminalreporter.line(f"{len(ok)} of {len(rows)} rows timed on {_where(session)}")
    if session.record.path:
        terminalreporter.line(
            f"python bench/report.py {session.record.path} --out FOLDER builds the report"
        )


def _where(session):
    content = session.record.content
    note = "" if content["kind"] == record.MEASUREMENT else f" ({content['kind']})"
    return f"{content['environment']['gpu']}{note}"
