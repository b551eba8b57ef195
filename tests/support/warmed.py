"""Checks of `warm_up`, for a process in which Triton compiles.

    PYTHONPATH=bench python tests/support/warmed.py FUNCTION [ARGUMENT …]

Prints the result of a function of this module as JSON.
"""

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import product

import idle_gpu
import torch
from triton import knobs

import gqa_kernels
from gqa_kernels import get_backend
from gqa_kernels.warming import recording, workers
from gqa_kernels.warming.recording import Kernel, record
from llama2 import cli
from llama2.cache.kv_cache import CACHE_DTYPES
from llama2.cache.paged_kv_cache import PagedKVCache
from llama2.config import ModelConfig
from llama2.evaluation.scoring import Window, scores
from llama2.finetune.packing import PackedRows, answer_loss
from llama2.generate import Generator
from llama2.model import Llama2
from llama2.requests import Request
from llama2.serving import serve
from llama2.speculation import DraftModel, PromptLookup
from llama2.train import pretrain
from llama2.warm_up import USES, _Uninitialised, _Zeros, call_all

SHAPE = ModelConfig(512, 256, 512, 3, 4, 2, 64, max_seq_len=256)
PAGE = 16
CACHES = ("auto", "int8")


# --- Of ops --------------------------------------------------------------------------------------


def _row_ops(dtype: torch.dtype) -> None:
    x = torch.zeros(3, 256, dtype=dtype)
    gqa_kernels.rms_norm(x, x[0])
    gqa_kernels.swiglu(x, x)


def warm_row_ops() -> list:
    """Warms up twice; returns both reports."""

    def warm() -> object:
        return gqa_kernels.warm_up(lambda: _row_ops(torch.bfloat16), arch="sm_90", jobs=1)

    return [warm(), warm()]


def launch_row_ops() -> list:
    """Returns what is compiled for the dtype that was warmed up, and for another."""
    dtypes = (torch.bfloat16, torch.float16)
    return [_launched(partial(_row_ops, dtype)) for dtype in dtypes]


def _launched(call: Callable[[], object]) -> dict:
    """Runs a call with Triton's own launcher; returns what it compiles and how much it launches."""
    compiled = []

    def listen(*, src, cache_hit: bool, **_) -> None:
        if not cache_hit:
            compiled.append(src.name)

    knobs.compilation.listener = listen
    before = idle_gpu.launches()
    call()
    return {"compiled": compiled, "launches": idle_gpu.launches() - before}


def fail() -> list:
    """Compiles two kernels, one of which has an invalid type, and one whose process dies."""
    good, other = record(lambda: _row_ops(torch.bfloat16), "sm_90")
    bad = other._replace(specialization=other.specialization.replace("*bf16", "*none"))
    outcomes = [*workers.compile_all([bad, good], 1)]
    start, dead = workers._start, [sys.executable, "-c", "import os; os._exit(3)"]

    def start_dead() -> object:
        workers._start = start  # the next process is a working one
        return workers.subprocess.Popen(
            dead, stdin=workers.subprocess.PIPE, stdout=workers.subprocess.PIPE, text=True
        )

    workers._start = start_dead
    outcomes += workers.compile_all([other, good], 1)
    return [(str(outcome.kernel), outcome.error) for outcome in outcomes]


def refusals() -> list:
    found = []
    for options in ({}, {"arch": "sm_75"}, {"arch": "gfx942"}, {"arch": "sm_90", "jobs": 0}):
        try:
            gqa_kernels.warm_up(lambda: None, **options)
        except ValueError as error:
            found.append(str(error))
    return found


# --- Of a model ----------------------------------------------------------------------------------


def _same(kernel: Kernel) -> str:
    """Everything on which a kernel's binary depends."""
    return json.dumps({**json.loads(kernel.specialization), "key": None})


def _generate(model: Llama2, cache_dtype: torch.dtype | None) -> None:
    # Capacities are multiples of 16, as on a GPU.
    for batch, (length, new) in product((1, 3), ((1, 16), (30, 3))):
        prompts = [[0] * max(length - row, 1) for row in range(batch)]
        generator = Generator(model, cache_dtype=cache_dtype, capture=False)
        generator.generate(prompts, max_new_tokens=new, temperature=0.7)


def _speculate(model: Llama2, cache_dtype: torch.dtype | None) -> None:
    for batch, speculation in product((1, 3), (PromptLookup(7), DraftModel(model, 2))):
        settings = {"cache_dtype": cache_dtype, "speculation": speculation}
        generator = Generator(model, capture=False, **settings)
        generator.generate([[0] * 30] * batch, max_new_tokens=19, temperature=0.7)


def _serve(model: Llama2, cache_dtype: torch.dtype | None) -> None:
    dtype = cache_dtype or model.lm_head.weight.dtype
    settings = {"page_size": PAGE, "dtype": dtype, "device": "cpu"}
    for batch, longest in ((1, 256), (3, 130), (4, 256), (6, 130)):
        config = replace(model.cache_config, max_seq_len=longest)
        cache = PagedKVCache(config, num_pages=40, max_batch=batch, **settings)
        requests = [
            Request([number % 3] * (7 * number + 1), max_new_tokens=3, temperature=0.7)
            for number in range(8)
        ]
        list(serve(model, requests, cache=cache, capture=False))


def _evaluate(model: Llama2) -> None:
    with torch.inference_mode():
        for batch, length in product((1, 3), (2, 17, 100)):
            tokens = torch.zeros(batch, length, dtype=torch.int64)
            model(tokens)
            model.token_losses(tokens[:, :-1], tokens[:, 1:])
    windows = [Window((0,) * (20 + number), [0] * 3) for number in range(5)]
    list(scores(model, windows, batch_size=2, greedy=True, show_progress=False))


def _train() -> None:
    for batch, length in product((1, 3), (16, 37)):
        recipe = pretrain.TrainConfig(1, batch, length, bf16=True)
        model = Llama2(SHAPE, get_backend("triton"))
        optimizer = pretrain.make_optimizer(model, recipe)
        tokens = torch.zeros(batch, length + 1, dtype=torch.int64)
        bounds = torch.tensor([[0, length // 2, length]] * batch, dtype=torch.int32)
        packed = PackedRows(tokens[:, :-1].clone(), tokens[:, 1:].clone(), bounds, 1.0)
        for rows, objective in ((tokens, pretrain.next_token), (packed, answer_loss)):
            pretrain.train_step(
                model, optimizer, rows, 0, recipe, None, objective, _Uninitialised()
            )


def _use(use: str, cache_dtype: torch.dtype | None) -> None:
    model = Llama2(SHAPE, get_backend("triton")).bfloat16()
    calls = {
        "generate": lambda: _generate(model, cache_dtype),
        "speculation": lambda: _speculate(model, cache_dtype),
        "serve": lambda: _serve(model, cache_dtype),
        "evaluate": lambda: _evaluate(model),
    }
    if use == "train":
        _train()
        return
    with _Zeros():
        calls[use]()


def _warmed(uses: Iterable[str], cache_dtype: torch.dtype | None = None) -> set[str]:
    settings = {"dtype": torch.bfloat16, "device": "cpu", "cache_dtype": cache_dtype}
    call = partial(call_all, SHAPE, get_backend("triton"), uses, page_size=PAGE, **settings)
    return set(map(_same, record(call, "sm_90")))


def left_out() -> list:
    """Returns, by use and cache, the number of kernels that a model's own calls launch, and those
    that no warm-up compiles."""
    found = []
    together = {"serve": ("serve", "prefixes"), "speculation": ("generate", "speculation")}
    caches = product(("generate", "serve"), CACHES)
    for use, cache in (*caches, *((x, "auto") for x in ("speculation", "evaluate", "train"))):
        needed = record(partial(_use, use, CACHE_DTYPES[cache]), "sm_90")
        known = _warmed(together.get(use, (use,)), CACHE_DTYPES[cache])
        found.append((use, cache, len(needed), [str(x) for x in needed if _same(x) not in known]))
    return found


def on_other_gpus() -> list:
    """Returns what a model launches on GPUs with other numbers of SMs."""
    found = []
    for number in (132, 1):
        recording._PROPERTIES["multiprocessor_count"] = number
        found.append(sorted(_warmed(USES)))
    return found


def complaints() -> list:
    """The command's (status, stderr) for invalid options."""
    found = []
    for options in (
        (),
        ("--arch", "hopper"),
        ("--arch", "sm_90", "--dtype", "float16", "--for", "train"),
        ("--arch", "sm_90", "--checkpoint", "/nowhere"),
    ):
        with contextlib.redirect_stderr(io.StringIO()) as said:
            found.append((cli.main(["warm-up", *options]), said.getvalue()))
    return found


def without_compiling() -> dict:
    """Results of calls that compile nothing, in one process."""
    return {
        "left_out": left_out(),
        "on_other_gpus": on_other_gpus(),
        "refusals": refusals(),
        "complaints": complaints(),
    }


def launch_model() -> dict:
    return {use: _launched(partial(_use, use, None)) for use in ("generate", "train", "evaluate")}


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    if name.startswith("launch_"):
        if idle_gpu.compiler() is None:
            print(json.dumps(None))
            sys.exit()
        idle_gpu.activate()
    print(json.dumps(globals()[name](*arguments)))
