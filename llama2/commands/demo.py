"""The command `llama2 demo`: runs one model on the backends "eager" and "triton" and shows the
kernels' errors and, on a GPU, their speed."""

import argparse
import statistics
import time
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from llama2 import checkpoint
from llama2.checkpoint import SHIPPED
from llama2.generate import Generator, stream
from llama2.model import Llama2
from llama2.placement import Placement, place
from llama2.stops import stop_ids
from llama2.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gqa_kernels.accuracy import Measured

WIDTH = 100
PROMPTS = ("    def __repr__(self):\n        return ",)
NEW_TOKENS = 48
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CASES_PER_OP = 2
SPEED_TOKENS, SPEED_RUNS = 128, 5


def run(arguments: argparse.Namespace) -> int:
    """Runs the shipped model on `--device` and prints the comparison.

    Returns:
        0; 1 if the backends give different tokens or an error exceeds its budget.
    """
    folder = SHIPPED
    eager, triton = (place(backend, arguments.device) for backend in ("eager", "triton"))
    models = [_load(folder, placement, torch.float32) for placement in (eager, triton)]
    _introduce(models[0], triton)
    same = _compare_tokens(*models, Tokenizer(folder / "tokenizer.model"))
    within = _compare_errors(triton.device)
    if not triton.interpreted:
        _compare_speed(folder, eager, triton)
    return 0 if same and within else 1


def _load(folder: Path, placement: Placement, dtype: torch.dtype) -> Llama2:
    return checkpoint.load(folder, placement.ops, dtype=dtype, device=placement.device)


def _introduce(model: Llama2, placement: Placement) -> None:
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"Llama 2 with {parameters / 1e6:.1f} million parameters, trained on Python's standard "
        f"library:\n{config.num_layers} layers of width {config.hidden_size}, "
        f"{config.num_q_heads} query heads on {config.num_kv_heads} key/value heads of "
        f"{config.head_dim}."
    )
    if placement.interpreted:
        print(
            "The Triton kernels run in Triton's interpreter on the CPU, which checks their "
            "results."
            "\nIt says nothing about their speed: that takes a GPU."
        )
    else:
        print(f"The Triton kernels run on {torch.cuda.get_device_name(placement.device)}.")


# Tokens.


def _compare_tokens(eager: Llama2, triton: Llama2, tokenizer: Tokenizer) -> bool:
    _heading("Greedy decoding on the backends eager and triton, float32")
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    on_eager = _continue(eager, prompts, tokenizer, "eager")
    on_triton = _continue(triton, prompts, tokenizer, "triton")
    for prompt, new in zip(prompts, on_eager, strict=True):
        _quote(tokenizer.decode(prompt + new))
    for number, (theirs, ours) in enumerate(zip(on_eager, on_triton, strict=True)):
        step = _first_difference(theirs, ours)
        if step is not None:
            gap = _logit_gap(eager, prompts[number] + theirs[:step], theirs[step], ours[step])
            print(
                f"✗ text {number + 1} differs at new token {step + 1}: eager takes "
                f"{tokenizer.decode([theirs[step]])!r},\n  triton "
                f"{tokenizer.decode([ours[step]])!r}, whose logit on eager is {gap:.2e} lower."
            )
    if on_eager == on_triton:
        counts = " and ".join(str(len(new)) for new in on_eager)
        print(f"✓ {counts} new tokens: eager and triton agree.")
    return on_eager == on_triton


def _continue(
    model: Llama2, prompts: Sequence[Sequence[int]], tokenizer: Tokenizer, name: str
) -> list[list[int]]:
    steps = stream(model, prompts, max_new_tokens=NEW_TOKENS, stop_ids=stop_ids(tokenizer, SHIPPED))
    continuations: list[list[int]] = [[] for _ in prompts]
    for index, token in _progress(steps, name, "token", len(prompts) * NEW_TOKENS):
        continuations[index].append(token)
    return continuations


def _first_difference(theirs: list[int], ours: list[int]) -> int | None:
    """Returns the first place at which two lists differ; None if they are equal. Neither is a
    prefix of the other, as both end at the same stop token."""
    pairs = enumerate(zip(theirs, ours, strict=False))
    return next((step for step, (one, other) in pairs if one != other), None)


@torch.inference_mode()
def _logit_gap(model: Llama2, tokens: list[int], chosen: int, other: int) -> float:
    logits = model(torch.tensor([tokens], device=model.lm_head.weight.device))[0, -1]
    return (logits[chosen] - logits[other]).item()


# Errors.


def _compare_errors(device: torch.device) -> bool:
    # Imported late: these modules import Triton, whose mode `place` has to set first.
    from gqa_kernels.accuracy import measure
    from gqa_kernels.spec import IN_PLACE_OPS, OPS

    _heading("Error of each output and gradient against float64, and its budget")
    print(
        "The budget is twice the error of the same maths in eager PyTorch, plus one "
        f"rounding.\nShown is the worse of {CASES_PER_OP} shapes per kernel.\n"
    )
    jobs = [
        (spec, case, dtype)
        for spec in (*OPS, *IN_PLACE_OPS)  # their results do not depend on a cache
        # Every third small case, so that wide rows and grouped heads are among them.
        for case, dtype in product(spec.test_cases()[::3][:CASES_PER_OP], DTYPES)
    ]
    worst: dict[tuple[str, str], dict[torch.dtype, Measured]] = {}
    for spec, case, dtype in _progress(jobs, "errors", "case"):
        for measured in measure(spec, case, dtype, device):
            row = worst.setdefault((spec.name, measured.what), {})
            row[dtype] = max(row.get(dtype, measured), measured, key=lambda m: m.share)
    _print_table(worst)
    exceeded = any(not measured.ok for row in worst.values() for measured in row.values())
    print("✗ an error exceeds its budget." if exceeded else "✓ every error is within its budget.")
    return not exceeded


def _print_table(worst: "dict[tuple[str, str], dict[torch.dtype, Measured]]") -> None:
    names = (str(dtype).removeprefix("torch.") for dtype in DTYPES)
    print((" " * 34 + "".join(f"{name:^22}" for name in names)).rstrip())
    previous = None
    for (op, what), row in worst.items():
        cells = []
        for measured in (row[dtype] for dtype in DTYPES):
            sign = "≤" if measured.ok else ">"
            cells.append(f"{measured.error:.1e} {sign} {measured.budget:.1e}")
        label = f"{'' if op == previous else op:<23}{what:<11}"
        print((label + "".join(f"{cell:^22}" for cell in cells)).rstrip())
        previous = op


# Speed.


def _compare_speed(folder: Path, eager: Placement, triton: Placement) -> None:
    _heading(f"Tokens per second on {torch.cuda.get_device_name(triton.device)}, bfloat16")
    print(
        f"Greedy, prompts of 128 tokens, {SPEED_TOKENS} new ones; prefill included; median of "
        f"{SPEED_RUNS} runs after a warm-up. A decode step is a CUDA graph.\nA model this small "
        "shows the cost of launches, not of arithmetic.\n"
    )
    print(f"{'batch':>8}{'eager':>14}{'triton':>14}")
    models = [_load(folder, placement, torch.bfloat16) for placement in (eager, triton)]
    for batch in (1, 8, 64):
        rates = [_tokens_per_second(model, batch) for model in models]
        print(f"{batch:>8}" + "".join(f"{rate:>14,.0f}" for rate in rates))


def _tokens_per_second(model: Llama2, batch: int) -> float:
    prompts = torch.randint(model.config.vocab_size, (batch, 128), device="cpu").tolist()
    generator = Generator(model)

    def seconds() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        generator.generate(prompts, max_new_tokens=SPEED_TOKENS)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds()  # compiles the kernels and captures a decode step
    return batch * SPEED_TOKENS / statistics.median(seconds() for _ in range(SPEED_RUNS))


# Layout.


def _progress(items: Iterable, name: str, unit: str, total: int | None = None) -> Iterable:
    return tqdm(items, name, total, unit=unit, leave=False, disable=None, ncols=WIDTH)


def _heading(text: str) -> None:
    print()
    print(f"── {text} ".ljust(WIDTH, "─"))


def _quote(text: str) -> None:
    for line in text.splitlines():
        for start in range(0, max(len(line), 1), WIDTH - 2):
            print(f"│ {line[start : start + WIDTH - 2]}")
    print()
