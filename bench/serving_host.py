"""Measures the host's CPU time per step of `serve`, without the model and sampling.

    python bench/serving_host.py [--before CHECKOUT] [--results FILE]

Empty functions replace the model's step and sampling. What remains is the host's bookkeeping: rows,
pages, and copies to and from the device. Prints a line of JSON per batch size:

    {"batch": 32, "now_us": …, "before_us": …, "now_over_before": …}

`now_us` is the thread's CPU time per step in microseconds, the minimum of several runs, each in a
separate process. With `--before`, another checkout of this repository is measured too, alternating
with this one; `before_us` is its time and `now_over_before` the ratio. `--results` also writes the
rows to a JSON file, such as the committed bench/results/serving_host.json. Takes one to two
minutes.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BATCHES = (1, 8, 32, 128)
NEW_TOKENS, RUNS = 200, 5


def seconds_per_step(batch: int) -> float:
    """CPU seconds per step of a run with one request per row, all of equal length, including the
    admission of the requests."""
    import torch

    from gqa_kernels import get_backend
    from llama2 import Llama2, PagedKVCache, Request, serve
    from llama2.config import ModelConfig
    from llama2.decoding.paged_decode import PagedDecode

    torch.set_num_threads(1)
    config = ModelConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_layers=1,
        num_q_heads=1,
        num_kv_heads=1,
        head_dim=32,
        max_seq_len=512,
    )
    model = Llama2(config, get_backend("eager"))
    states = torch.zeros(1, 1, config.hidden_size)

    def nothing(tokens: torch.Tensor, cache: Any) -> torch.Tensor:
        cache.reserve(*tokens.shape)
        cache.advance(tokens.shape[1])
        return states.expand(1, tokens.shape[1], -1)

    model.hidden_states = nothing  # computes prompts
    PagedDecode._run_model = lambda self: None
    PagedDecode._sample = lambda self, greedy: None
    requests = [Request([1, 5, 7, 2 + i % 50], NEW_TOKENS) for i in range(batch)]
    times = []
    for _ in range(2):  # the first one warms up
        cache = PagedKVCache(
            model.cache_config,
            num_pages=32 * batch,
            page_size=16,
            max_batch=batch,
            dtype=torch.float32,
            device="cpu",
        )
        start = time.thread_time()
        for _ in serve(model, requests, cache=cache):
            pass
        times.append(time.thread_time() - start)
    return times[-1] / NEW_TOKENS


def _measured(checkout: Path, batch: int) -> float:
    """`seconds_per_step` of a checkout, in a separate process."""
    paths = os.pathsep.join(map(str, (checkout / "kernels", checkout)))
    command = [sys.executable, str(Path(__file__).resolve()), "--batch", str(batch)]
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout)


def measure(before: Path | None, runs: int) -> list[dict[str, Any]]:
    """Returns a row per batch size with the host's microseconds per step."""
    checkouts = {"now": ROOT} | ({} if before is None else {"before": before})
    rows = []
    for batch in BATCHES:
        times: dict[str, list[float]] = {name: [] for name in checkouts}
        for _ in range(runs):
            for name, checkout in checkouts.items():
                times[name].append(_measured(checkout, batch))
        row: dict[str, Any] = {"batch": batch}
        row |= {f"{name}_us": round(1e6 * min(found), 1) for name, found in times.items()}
        if before is not None:
            row["now_over_before"] = round(min(times["now"]) / min(times["before"]), 3)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def _commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--before",
        type=Path,
        metavar="CHECKOUT",
        help="another checkout to measure, alternating with this one",
    )
    parser.add_argument("--results", type=Path, metavar="FILE", help="write a JSON file too")
    parser.add_argument(
        "--runs", type=int, default=RUNS, metavar="N", help=f"per batch size; default: {RUNS}"
    )
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)  # for the separate processes
    arguments = parser.parse_args()
    if arguments.batch is not None:
        print(seconds_per_step(arguments.batch))
        return
    rows = measure(arguments.before, arguments.runs)
    if arguments.results is None:
        return
    import numpy
    import torch

    from llama2.storage import replacing, write_text

    commits = {"now": _commit(ROOT)}
    if arguments.before is not None:
        commits["before"] = _commit(arguments.before)
    versions = {"torch": torch.__version__, "numpy": numpy.__version__}
    content = {
        "kind": "measurement on a CPU: thread time of the host per step; no GPU, no model",
        "environment": versions | {"python": platform.python_version(), "commits": commits},
        "settings": {"new_tokens": NEW_TOKENS, "runs": arguments.runs},
        "rows": rows,
    }
    with replacing(arguments.results) as partial:
        write_text(partial, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
