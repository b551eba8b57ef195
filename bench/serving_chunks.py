"""Measures what `prefill_budget` of `serve` does to pauses and throughput.

    python bench/serving_chunks.py [--model 7B] [--budgets 512 2048] [--results FILE]

Some requests generate tokens all the time, while long prompts arrive one after another in one more
row of the batch. For each budget a line of JSON says how long the running requests wait between two
of their tokens, and how many tokens of prompts and new tokens there are per second:

    {"prefill_budget": 512, "median_ms": …, "p99_ms": …, "longest_ms": …, "prompt_tokens_per_s": …,
     "new_tokens_per_s": …, "longest_ms_over_unchunked": …, "prompt_tokens_per_s_over_unchunked": …}

`…_over_unchunked` are ratios to budget 0, which computes every prompt at once. The runs of all
budgets alternate, and a figure is the median of the runs. On a GPU times are those of the clock; on
a CPU they are CPU time of one thread, which other processes disturb less. Weights are random.
Without a GPU a small model is used, for about two minutes.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from gqa_kernels import get_backend
from llama2 import PUBLISHED, Llama2, ModelConfig, PagedKVCache, Request, serve
from llama2.checkout import made_with
from llama2.storage import replacing, write_text
from llama2.tradeoff.measured import random_model

SMALL = ModelConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=704,
    num_layers=4,
    num_q_heads=8,
    num_kv_heads=2,
    head_dim=32,
    max_seq_len=2048,
)
PAGE_SIZE, SHORT, NEW_TOKENS = 16, 32, 4  # tokens of a page, of a short prompt, after a long one


def run(model: Llama2, budget: int, *, running: int, prompts: int, length: int) -> dict[str, float]:
    """Serves `running` short prompts until `prompts` long ones of `length` tokens are done."""
    on_gpu = model.lm_head.weight.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.thread_time
    config = model.config
    random = np.random.default_rng(0)
    times: dict[int, list[float]] = {index: [] for index in range(running)}
    num_done = 0

    def short(index: int) -> Request:
        def stop(_: object) -> bool:
            times[index].append(clock())
            return num_done == prompts

        tokens = random.integers(config.vocab_size, size=SHORT).tolist()
        return Request(tokens, config.max_seq_len - SHORT, stop=stop)

    requests = [short(index) for index in range(running)]
    for _ in range(prompts):
        tokens = random.integers(config.vocab_size, size=length).tolist()
        requests.append(Request(tokens, NEW_TOKENS))
    cache = PagedKVCache(
        config,
        num_pages=(running + 1) * config.max_seq_len // PAGE_SIZE,
        page_size=PAGE_SIZE,
        max_batch=running + 1,
        dtype=model.lm_head.weight.dtype,
        device=model.lm_head.weight.device,
    )
    start, num_new = clock(), 0
    for result in serve(model, requests, cache=cache, prefill_budget=budget):
        if result.index < running and num_done < prompts:
            raise RuntimeError(
                f"max_seq_len: expected room until the last prompt is done; got request "
                f"{result.index} finished after {num_done} prompts"
            )
        num_done += result.index >= running
        num_new += len(result.tokens)
    seconds = clock() - start
    pauses = 1e3 * np.concatenate([np.diff(found) for found in times.values()])
    return {
        "median_ms": float(np.median(pauses)),
        "p99_ms": float(np.quantile(pauses, 0.99)),
        "longest_ms": float(pauses.max()),
        "prompt_tokens_per_s": (running * SHORT + prompts * length) / seconds,
        "new_tokens_per_s": num_new / seconds,
    }


def measure(model: Llama2, budgets: list[int], runs: int, **load: int) -> list[dict[str, Any]]:
    """Returns a row per budget, the first one 0: medians of the runs, after one that is not
    counted."""
    found: dict[int, list[dict[str, float]]] = {budget: [] for budget in (0, *budgets)}
    for number in range(runs + 1):
        for budget, measured in found.items():
            one = run(model, budget, **load)
            if number:
                measured.append(one)
    rows = []
    for budget, measured in found.items():
        row = {name: median(one[name] for one in measured) for name in measured[0]}
        whole = rows[0] if rows else row
        for name in ("longest_ms", "prompt_tokens_per_s"):
            row[f"{name}_over_unchunked"] = row[name] / whole[name]
        rows.append({"prefill_budget": budget} | row)
    return [
        {name: float(f"{x:.4g}") if isinstance(x, float) else x for name, x in row.items()}
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_gpu = torch.cuda.is_available()
    parser.add_argument(
        "--model",
        choices=["small", *PUBLISHED],
        default="7B" if on_gpu else "small",
        help="default: 7B on a GPU, otherwise small",
    )
    numbers = {"type": int, "metavar": "N"}
    parser.add_argument(
        "--budgets",
        nargs="+",
        default=[512, 2048] if on_gpu else [64, 256],
        help="compared with 0; default: 512 2048, for the small model 64 256",
        **numbers,
    )
    parser.add_argument("--running", default=8, help="requests that generate", **numbers)
    parser.add_argument("--prompts", default=4, help="long prompts", **numbers)
    parser.add_argument(
        "--length", help="tokens of a long prompt; default: 3/4 of max_seq_len", **numbers
    )
    parser.add_argument("--runs", default=3, **numbers)
    parser.add_argument("--results", type=Path, metavar="FILE", help="write a JSON file too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = SMALL if arguments.model == "small" else PUBLISHED[arguments.model]
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    torch.manual_seed(0)
    model = random_model(config, get_backend("triton" if on_gpu else "torch"), device, dtype)
    load = {name: getattr(arguments, name) for name in ("running", "prompts", "length")}
    load["length"] = load["length"] or config.max_seq_len * 3 // 4
    rows = measure(model, arguments.budgets, arguments.runs, **load)
    for row in rows:
        print(json.dumps(row), flush=True)
    if arguments.results is not None:
        content = {
            "kind": "clock on a GPU" if on_gpu else "CPU time of one thread; no GPU",
            "environment": made_with(arguments, ("numpy",)),
            "settings": {"model": arguments.model, "runs": arguments.runs} | load,
            "rows": rows,
        }
        with replacing(arguments.results) as partial:
            write_text(partial, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
