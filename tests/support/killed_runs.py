"""Compares a training command that is killed at random moments with one that is not."""

import os
import random
import subprocess
import sys
from pathlib import Path

import torch

from llama2.train.state import read_log

# Forks, because new interpreters would spend most of the test's time on imports.
_KILLER = """
import argparse, importlib, os, random, signal, sys, threading, time
import safetensors.torch, sentencepiece, torch._dynamo  # what a run would import
from pathlib import Path
from tqdm import tqdm

command = importlib.import_module(f"llama2.commands.{sys.argv[1]}")
options = importlib.import_module(f"llama2.commands.{sys.argv[1]}_options")

# All processes share tqdm's own lock, and a killed child would never release it.
tqdm.set_lock(threading.RLock())

def parse(folder):
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    folders = ["--work", f"{folder}/work", "--out", f"{folder}/out"]
    return parser.parse_args([*folders, *sys.argv[5:]])

def start(folder):
    process = os.fork()
    if not process:
        try:
            status = command.run(parse(folder))
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            status = 1
        os._exit(status)
    return process

draw, whole, cut = random.Random(int(sys.argv[2])), sys.argv[3], sys.argv[4]
log = Path(cut, "work", "log.jsonl")

def logged():
    return log.read_bytes().count(b"\\n") if log.exists() else 0

assert os.waitpid(start(whole), 0)[1] == 0
for _ in range(20):
    moment, process = logged() + draw.randrange(12), start(cut)
    ended = 0
    while not ended and logged() < moment:  # steps, not seconds: a machine may be busy
        time.sleep(0.001)
        ended, status = os.waitpid(process, os.WNOHANG)
    if not ended:
        time.sleep(draw.uniform(0, 0.02))
        os.kill(process, signal.SIGKILL)
        status = os.waitpid(process, 0)[1]
    if os.WIFEXITED(status):
        assert status == 0
        break
    print(logged())
"""


def check_killed_runs(command: str, options: tuple, folder: Path) -> int:
    """Asserts that both runs end with the same bits, and returns their number of steps.

    Args:
        command: a command of `llama2` whose options are in COMMAND_options.py.
        options: those of the run except `--work` and `--out`; on the CPU.
        folder: the folder of the test.
    """
    seed = random.SystemRandom().randrange(10**6)
    whole, cut = folder / "whole", folder / "cut"
    options = [str(option) for option in options]

    def python(*arguments: object) -> str:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        called = [sys.executable, *map(str, arguments), *options]
        result = subprocess.run(called, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, f"seed {seed}: {result.stderr}"
        return result.stdout

    lines = python("-c", _KILLER, command, seed, whole, cut).splitlines()
    steps = [int(line) for line in lines if line.isdigit()]  # logged before a kill
    assert max(steps) > 0, f"seed {seed}: none was killed while it trained"
    python("-m", "llama2", command, "--work", cut / "work", "--out", cut / "out")

    results = []
    for place in (whole, cut):
        log = read_log(place / "work" / "log.jsonl")
        log = [{key: line[key] for key in line if "seconds" not in key} for line in log]
        weights = torch.load(place / "work" / "state.pt", weights_only=True)["model"]
        files = {path.name for path in (place / "work").iterdir()}
        results.append((log, weights, (place / "out" / "model.safetensors").read_bytes(), files))
    (log, weights, stored, files), (other_log, other_weights, other_stored, other_files) = results
    assert other_log == log, f"seed {seed}"
    assert weights.keys() == other_weights.keys()
    assert all(other_weights[key].equal(value) for key, value in weights.items()), f"seed {seed}"
    assert other_stored == stored and other_files == files, f"seed {seed}"
    return len(log)
