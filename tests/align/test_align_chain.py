"""Chains: their command lines, what is done stays done, and processes that end with the first."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from combinations import long

from llama2 import cli
from llama2.align import chain
from llama2.align.chain import ChainError, folder_of, log_of, run_chain, run_chains
from llama2.align.recipe import PRESETS
from llama2.align.stages import Files, models, stages

SMOKE = PRESETS["smoke"]


def test_every_stage_reads_what_an_earlier_one_wrote(tmp_path):
    made = {tmp_path}
    for stage in stages(SMOKE, 0, tmp_path):
        words = dict(pairwise(stage.command))
        # What --held-out, --data and others name is a file or lies in a folder that was an --out.
        for option, word in pairwise(stage.command):
            if str(tmp_path) in word and option not in ("--out", "--work", "--summary"):
                assert {Path(word), Path(word).parent} & made - {tmp_path}, (stage.name, word)
        made.add(Path(words["--out"]))
    names = [stage.name for stage in stages(SMOKE, 0, tmp_path)]
    assert len(set(names)) == len(names)
    assert models(SMOKE) == ["sft", "round-1", "round-2", "ppo"]


@pytest.mark.parametrize("name", PRESETS)
def test_the_command_lines_are_those_of_the_commands(name, tmp_path):
    parser = cli._parser()
    for stage in stages(PRESETS[name], 5, tmp_path):
        program, *words = stage.command
        if program == "llama2":
            found = parser.parse_args(words)
            assert getattr(found, "seed", 5) in (5, None)


def recorded(monkeypatch, status=lambda stage: 0):
    ran = []

    def main(command):
        ran.append(command)
        return status(command)

    monkeypatch.setattr(chain, "_main", main)
    return ran


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    planned = stages(SMOKE, 0, tmp_path)
    ran = recorded(monkeypatch, lambda command: 0 if len(ran) < 5 else 1)
    with pytest.raises(ChainError, match=f"{planned[4].name}: expected exit status 0"):
        list(run_chain(SMOKE, 0, tmp_path))
    assert ran == [stage.command for stage in planned[:5]]
    ran = recorded(monkeypatch)
    assert list(run_chain(SMOKE, 0, tmp_path)) == planned[4:]
    assert ran == [stage.command for stage in planned[4:]]
    record = json.loads(Files(tmp_path).done(planned[0]).read_text(encoding="utf-8"))
    assert record.keys() == {"command", "seconds", "cpu_seconds"}
    assert list(run_chain(SMOKE, 0, tmp_path)) == []


def test_an_interrupted_stage_interrupts_its_chain(tmp_path, monkeypatch):
    recorded(monkeypatch, lambda command: 130)
    with pytest.raises(KeyboardInterrupt):
        list(run_chain(SMOKE, 0, tmp_path))
    assert not Files(tmp_path).done(stages(SMOKE, 0, tmp_path)[0]).exists()


def test_a_stage_of_another_command_is_refused(tmp_path, monkeypatch):
    recorded(monkeypatch)
    list(run_chain(SMOKE, 0, tmp_path))
    with pytest.raises(ChainError, match="Use another folder for another chain"):
        list(run_chain(SMOKE, 1, tmp_path))


def failing(out, seed):
    """A folder in which a chain fails at its first stage: tasks cannot be written to a file."""
    folder = folder_of(out, seed)
    folder.mkdir(parents=True)
    (folder / "tasks").write_text("mine", encoding="utf-8")


def finished(out, seed):
    """A folder in which all stages of a chain are done."""
    folder = folder_of(out, seed)
    for stage in stages(SMOKE, seed, folder):
        done = Files(folder).done(stage)
        done.parent.mkdir(parents=True, exist_ok=True)
        record = {"command": list(stage.command), "seconds": 1.0, "cpu_seconds": 1.0}
        done.write_text(json.dumps(record), encoding="utf-8")


def test_a_failing_chain_says_why_in_its_log_and_leaves_the_others(tmp_path):
    failing(tmp_path, 3)
    finished(tmp_path, 4)
    seen = []
    assert run_chains(SMOKE, [3, 4], tmp_path, seen.append) == [3]
    assert seen[-1] == len(stages(SMOKE, 4, tmp_path))
    log = log_of(tmp_path, 3).read_text(encoding="utf-8")
    assert "$ python -m llama2.align.tasks --preset smoke --seed 3" in log
    assert "tasks: expected exit status 0; got 2" in log
    assert not log_of(tmp_path, 4).exists()


def _is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").split()[2] != "Z"


def _chains_of(pid):
    """The processes of chains that a process has begun."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    commands = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
    return [child for child, command in commands.items() if b"spawn_main" in command]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, long(signal.SIGINT)])
def test_chains_end_with_their_parent(tmp_path, how):
    command = [sys.executable, "-m", "llama2", "align", "--preset", "cpu", "--seeds", "0", "1"]
    # A shell that has no job control starts what runs in the background without interrupts.
    interruptible = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        [*command, "--out", str(tmp_path)], stderr=subprocess.PIPE, preexec_fn=interruptible
    ) as parent:
        limit = time.monotonic() + 60
        while len(children := _chains_of(parent.pid)) < 2:
            assert time.monotonic() < limit and parent.poll() is None
            time.sleep(0.1)
        parent.send_signal(how)
        told = parent.stderr.read().decode()
    while any(map(_is_alive, children)):
        assert time.monotonic() < limit
        time.sleep(0.1)
    assert parent.returncode == (-9 if how == signal.SIGKILL else 130)
    assert ("interrupted; the same command resumes" in told) == (how == signal.SIGINT)
