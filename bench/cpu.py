"""Compares CPU times of the backends "torch" and "eager" and of Transformers on the same weights.

    python bench/cpu.py [--out FOLDER] [--rounds 5] [--only generate] [--dry-run]

Generates, runs a forward pass, serves requests and trains with the small model of this package, on
one thread. Each workload is a line of the table. The contestants of a line take turns in one
process; the line gives ratios of the medians of their CPU times (`time.process_time`), which other
programs on the machine hardly change. Do not compare the times of different machines or runs.

Prints the table. `--out` also writes it to FOLDER/cpu.md and the figures to FOLDER/cpu.json, after
every line. `--dry-run` runs every line once, on a few tokens, and marks the result as no
measurement. Needs Transformers.
"""

# ruff: noqa: E402  (what makes the rest importable comes first)

import argparse
import functools
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import importable

importable.extend_path()

import numpy as np
import torch
import transformers
from ceilings import environment
from record import MEASUREMENT
from tqdm import tqdm
from transformers import LlamaForCausalLM

from gqa_kernels import get_backend
from llama2 import Generator, Llama2, PagedKVCache, Request, checkpoint, serve
from llama2.checkpoint import SHIPPED
from llama2.storage import write_text
from llama2.train.pretrain import TrainConfig, make_optimizer, make_worker, train_step

OURS, EAGER, PEER = "torch", "eager", "transformers"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROMPT = [1, *range(20, 36)]
SEED = 0
DRY_RUN = "dry run on a few tokens, not a measurement"

Call = Callable[[], Any]


@dataclass(frozen=True)
class Sizes:
    """The sizes of the workloads."""

    new_tokens: int = 100
    prompt_tokens: int = 200
    requests: int = 48
    longest_answer: int = 120
    rows: int = 4
    row_tokens: int = 255
    max_batch: int = 16


SHORT = Sizes(4, 20, 3, 9, 1, 15, 2)


def _ours(backend: str, dtype: torch.dtype) -> Llama2:
    return checkpoint.load(SHIPPED, get_backend(backend), device="cpu", dtype=dtype)


def _peer(dtype: torch.dtype) -> LlamaForCausalLM:
    model = LlamaForCausalLM.from_pretrained(SHIPPED, dtype=dtype).eval()
    # Without an end-of-sequence id, every contestant generates the requested number of tokens.
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


@torch.no_grad()
def _peer_tokens(model: LlamaForCausalLM, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy tokens of one batch, padded on the left, with the default cache of `generate`."""
    longest = max(map(len, prompts))
    padded = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    out = model.generate(
        torch.tensor(padded),
        attention_mask=torch.tensor(mask),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
    )
    return out[:, longest:].tolist()


def generating(batch: int, dtype: torch.dtype, sizes: Sizes) -> dict[str, Call]:
    count, prompts = sizes.new_tokens, [PROMPT] * batch
    calls: dict[str, Call] = {}
    for backend in (OURS, EAGER):
        generator = Generator(_ours(backend, dtype))
        calls[backend] = lambda g=generator: g.generate(prompts, max_new_tokens=count)
    model = _peer(dtype)
    return calls | {PEER: lambda: _peer_tokens(model, prompts, count)}


def forward(dtype: torch.dtype, sizes: Sizes) -> dict[str, Call]:
    tokens = torch.arange(20, 20 + sizes.prompt_tokens)[None]
    calls: dict[str, Call] = {}
    for backend in (OURS, EAGER):
        model = _ours(backend, dtype)
        calls[backend] = torch.inference_mode()(lambda m=model: m(tokens))
    peer = _peer(dtype)
    return calls | {PEER: torch.inference_mode()(lambda: peer(tokens, use_cache=False).logits)}


def serving(dtype: torch.dtype, sizes: Sizes) -> dict[str, Call]:
    """Prompts and answers of many lengths. Ours batches continuously, with up to `max_batch` rows;
    Transformers generates for `max_batch` prompts at a time, until the longest answer is done."""
    numbers, most = np.random.default_rng(SEED), sizes.max_batch
    lengths = numbers.integers(4, 60, sizes.requests)
    counts = numbers.integers(8, sizes.longest_answer, sizes.requests).tolist()
    prompts = [[1, *numbers.integers(20, 900, length - 1).tolist()] for length in lengths]

    def ours(model: Llama2) -> list[list[int]]:
        size = {"num_pages": 16 * most, "page_size": 16, "max_batch": most}
        cache = PagedKVCache(model.cache_config, **size, dtype=dtype, device="cpu")
        pairs = zip(prompts, counts, strict=True)
        requests = (Request(prompt, max_new_tokens=count) for prompt, count in pairs)
        results = sorted(serve(model, requests, cache=cache), key=lambda result: result.index)
        return [result.tokens for result in results]

    def peer() -> list[list[int]]:
        found = []
        for first in range(0, len(prompts), most):
            part = slice(first, first + most)
            answers = _peer_tokens(model, prompts[part], max(counts[part]))
            found += [x[:count] for x, count in zip(answers, counts[part], strict=True)]
        return found

    calls: dict[str, Call] = {}
    for backend in (OURS, EAGER):
        calls[backend] = functools.partial(ours, _ours(backend, dtype))
    model = _peer(dtype)
    return calls | {PEER: peer}


def training(dtype: torch.dtype, sizes: Sizes) -> dict[str, Call]:
    """A step with clipping and AdamW. In bfloat16 Transformers computes under autocast."""
    bf16 = dtype == torch.bfloat16
    size = {"batch_size": sizes.rows, "seq_len": sizes.row_tokens}
    config = TrainConfig(steps=100, warmup_steps=1, bf16=bf16, **size)
    shape = (sizes.rows, sizes.row_tokens + 1)
    batch = torch.randint(20, 900, shape, generator=torch.Generator().manual_seed(SEED))
    calls: dict[str, Call] = {}
    for backend in (OURS, EAGER):
        model = _ours(backend, torch.float32)
        state = model, make_optimizer(model, config), make_worker(model, config)
        calls[backend] = lambda s=state: train_step(*s[:2], batch, 5, config, s[2])
    peer = LlamaForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32).train()
    betas = (config.beta1, config.beta2)
    optimizer = torch.optim.AdamW(
        peer.parameters(), config.peak_lr, betas=betas, eps=config.adam_eps, fused=True
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = peer(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), config.max_grad_norm)
        optimizer.step()
        loss.item()

    return calls | {PEER: step}


def lines(sizes: Sizes) -> dict[str, Callable[[torch.dtype], dict[str, Call]]]:
    count, longest = sizes.new_tokens, sizes.longest_answer
    return {
        f"generate {count} tokens, batch 1": lambda dtype: generating(1, dtype, sizes),
        f"generate {count} tokens, batch 8": lambda dtype: generating(8, dtype, sizes),
        f"forward of {sizes.prompt_tokens} tokens": lambda dtype: forward(dtype, sizes),
        f"serve {sizes.requests} requests of 8 to {longest - 1} tokens, batch {sizes.max_batch}": (
            lambda dtype: serving(dtype, sizes)
        ),
        f"training step, {sizes.rows} × {sizes.row_tokens} tokens": (
            lambda dtype: training(dtype, sizes)
        ),
    }


def measure(calls: dict[str, Call], rounds: int, budget_s: float) -> dict[str, Any]:
    """Medians of the CPU seconds of each call and their ratios. The calls take turns: `rounds`
    rounds, and up to 20 until `budget_s` CPU seconds have passed."""
    answers = {name: call() for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    started = time.process_time()
    done = 0
    while done < rounds or (done < 20 and time.process_time() - started < budget_s):
        for name, call in calls.items():
            before = time.process_time()
            call()
            seconds[name].append(time.process_time() - before)
        done += 1
    row: dict[str, Any] = {"rounds": done, "seconds": {}}
    for name, values in seconds.items():
        row["seconds"][name] = statistics.median(values)
    ours = row["seconds"][OURS]
    row["ratios"] = {name: ours / row["seconds"][name] for name in (PEER, EAGER)}
    if isinstance(answers[OURS], list):
        row["same_tokens"] = {name: _same(answers[OURS], answers[name]) for name in (PEER, EAGER)}
    return row


def _same(first: list[list[int]], second: list[list[int]]) -> float:
    """The share of all tokens that come before the first difference in their answer."""
    same = 0
    for a, b in zip(first, second, strict=True):
        different = (i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
        same += next(different, len(a))
    return same / sum(map(len, first))


def made_on() -> dict[str, Any]:
    packages = {"transformers": transformers.__version__, "numpy": version("numpy")}
    return environment() | packages | {"processor": _processor(), "threads": 1}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    found = re.search(r"model name\s*: (.+)", text)
    return found[1].strip() if found else platform.machine()


def table(content: dict[str, Any]) -> str:
    """The result as markdown."""
    made = content["environment"]
    dry = "" if content["kind"] == MEASUREMENT else f"**{content['kind']}**\n\n"
    head = (
        f'# On a CPU: the backend "torch" beside Transformers\n\n{dry}'
        'CPU time of the backend "torch" divided by that of Transformers, and by that of the '
        'backend "eager", on one thread and the weights of `llama2/checkpoints/stdlib`. Below 1, '
        '"torch" takes less time. The times are medians; the contestants took turns in one run. '
        "Same tokens: the share of the greedily generated tokens that come before the first "
        "difference in their answer. Do not compare times with those of other runs.\n\n"
        f"{made['processor']}, PyTorch {made['torch']}, Transformers {made['transformers']}, "
        f"Python {made['python']}, at commit {made['commit']}. By `python bench/cpu.py`.\n\n"
        '| workload | dtype | ÷ Transformers | ÷ "eager" | rounds | '
        'same tokens as Transformers, as "eager" |\n'
        "|---|---|---|---|---|---|\n"
    )
    rows = []
    for row in content["rows"]:
        ratios, same = row["ratios"], row.get("same_tokens")
        shares = f"{same[PEER]:.0%}, {same[EAGER]:.0%}" if same else ""
        rows.append(
            f"| {row['what']} | {row['dtype']} | {ratios[PEER]:.2f} | {ratios[EAGER]:.2f} | "
            f"{row['rounds']} | {shares} |\n"
        )
    return head + "".join(rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where to write cpu.json and cpu.md"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="at least this many per line; default: 5"
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="go on with more rounds, up to 20, for this CPU time per line; default: 10",
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="only lines whose name or dtype contains it, such as generate or float32",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="every line once, on a few tokens: no measurement"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    sizes, rounds, budget_s = Sizes(), options.rounds, options.budget
    if options.dry_run:
        sizes, rounds, budget_s = SHORT, 1, 0.0
    content = {"kind": DRY_RUN if options.dry_run else MEASUREMENT, "environment": made_on()}
    content["rows"] = []
    chosen = [
        (what, dtype)
        for what in lines(sizes)
        for dtype in DTYPES
        if options.only in f"{what}, {dtype}"
    ]
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    for what, dtype in tqdm(chosen, unit="line", file=sys.stderr):
        row = measure(lines(sizes)[what](DTYPES[dtype]), rounds, budget_s)
        content["rows"].append({"what": what, "dtype": dtype, **row})
        if options.out is not None:
            write_text(options.out / "cpu.json", json.dumps(content, indent=1) + "\n")
            write_text(options.out / "cpu.md", table(content))
    print(table(content))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
