"""Measures on a CPU what speculative decoding gains with the shipped model of Python source.

    python bench/speculation.py [--results FILE] [--texts 16] [--new-tokens 128]

The prompts are 128 tokens each from files of this Python's standard library, most of which the
model was trained on. Prints, and with `--results` writes as JSON:

- look-up: new tokens per step of the model, and the CPU time (`time.process_time`) over that
  without speculation, measured in turns in one process on one thread, greedy and sampled, for all
  texts as one batch and for each alone;
- drafts: the probability that a drafted token is accepted, at every token of the texts, for draft
  models that are the model with noise on its weights. `same_uniform` is the rule of this package: a
  draft is accepted if the model draws it too, with the same uniform number. `rejection` is 1 − TV,
  the probability under rejection sampling, TV the total variation distance.

Takes some minutes.
"""

# ruff: noqa: E402  (what makes the rest importable comes first)

import argparse
import copy
import json
import sysconfig
import time
from itertools import product
from pathlib import Path
from typing import Any

import importable

importable.extend_path()

import torch
from ceilings import environment
from torch import Tensor

from gqa_kernels import get_backend
from llama2 import Generator, Llama2, PromptLookup, checkpoint
from llama2.checkpoint import SHIPPED
from llama2.storage import write_text
from llama2.tokenizer import Tokenizer

PROMPT_TOKENS, ROUNDS, SEED = 128, 3, 0
DRAFTED = (3, 7, 15)
SAMPLING = ({}, {"temperature": 0.6, "top_p": 0.9, "seed": SEED})
NOISE = (0.02, 0.05, 0.1)  # in standard deviations of a weight matrix
TEMPERATURES = ((1.0, 1.0), (0.6, 0.9))  # with top_p
CONFIDENT = 0.8


def texts(count: int, num_tokens: int) -> list[list[int]]:
    """Token ids from the middle of large files, in alphabetical order of the files."""
    tokenizer, found = Tokenizer(SHIPPED / "tokenizer.model"), []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if len(text) > 20000:
            found.append(tokenizer.encode(text[len(text) // 2 :][:4000])[:num_tokens])
    return found[:count]


def lookup(model: Llama2, prompts: list[list[int]], new_tokens: int) -> list[dict[str, Any]]:
    kinds = {0: None, **{number: PromptLookup(number) for number in DRAFTED}}
    generators = {number: Generator(model, speculation=kind) for number, kind in kinds.items()}
    rows = []
    for sampling, batches in product(SAMPLING, ([prompts], [[prompt] for prompt in prompts])):
        seconds, steps, tokens = (dict.fromkeys(kinds, 0.0) for _ in range(3))
        same = True
        for _, batch in product(range(ROUNDS), batches):
            expected = None
            for number, generator in generators.items():
                begin = time.process_time()
                new = generator.generate(batch, max_new_tokens=new_tokens, **sampling)
                seconds[number] += time.process_time() - begin
                expected = expected or new
                same &= new == expected
                if generator.statistics is not None:
                    steps[number] += generator.statistics.num_steps
                    tokens[number] += generator.statistics.num_new_tokens
        for number in DRAFTED:
            rows.append(
                {
                    "batch": len(batches[0]),
                    "sampling": sampling,
                    "num_tokens": number,
                    "tokens_per_step": round(tokens[number] / steps[number], 2),
                    "cpu_time_over_plain": round(seconds[number] / seconds[0], 2),
                    "same_tokens": same,
                }
            )
    return rows


def distribution(logits: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns each token's probability in the nucleus, and the interval of uniform numbers for
    which `sample_tokens` draws it."""
    ordered, order = (logits / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    nucleus = ordered * (ordered.cumsum(-1) - ordered < top_p)
    nucleus /= nucleus.sum(-1, keepdim=True)
    ends = nucleus.cumsum(-1)
    return tuple(
        torch.zeros_like(logits).scatter(-1, order, x) for x in (nucleus, ends - nucleus, ends)
    )


@torch.no_grad()
def drafts(model: Llama2, tokens: Tensor) -> list[dict[str, Any]]:
    rows = []
    for noise in NOISE:
        torch.manual_seed(SEED)
        draft = copy.deepcopy(model)
        for weight in draft.parameters():
            if weight.dim() == 2:
                weight += noise * weight.std() * torch.randn_like(weight)
        for temperature, top_p in TEMPERATURES:
            (p, p_begin, p_end), (q, q_begin, q_end) = (
                distribution(one(tokens).flatten(0, 1), temperature, top_p)
                for one in (model, draft)
            )
            rejection = torch.minimum(p, q).sum(-1)
            overlap = torch.minimum(p_end, q_end) - torch.maximum(p_begin, q_begin)
            same, confident = overlap.clamp(min=0).sum(-1), p.amax(-1) > CONFIDENT
            rows.append(
                {
                    "noise": noise,
                    "temperature": temperature,
                    "top_p": top_p,
                    "same_uniform": round(float(same.mean()), 3),
                    "rejection": round(float(rejection.mean()), 3),
                    "share_confident": round(float(confident.float().mean()), 3),
                    "same_uniform_confident": round(float(same[confident].mean()), 3),
                    "rejection_confident": round(float(rejection[confident].mean()), 3),
                }
            )
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, metavar="FILE")
    parser.add_argument("--texts", type=int, default=16, metavar="N")
    parser.add_argument("--new-tokens", type=int, default=128, metavar="N")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model = checkpoint.load(SHIPPED, get_backend("torch"), dtype=torch.float32)
    made = environment()
    content: dict[str, Any] = {
        "kind": "measurement on a CPU with the shipped model in float32; it says nothing of a GPU",
        "environment": {name: made[name] for name in ("torch", "python", "commit")},
        "settings": {
            "texts": options.texts,
            "prompt_tokens": PROMPT_TOKENS,
            "new_tokens": options.new_tokens,
            "confident": CONFIDENT,
        },
    }
    prompts = texts(options.texts, PROMPT_TOKENS)
    content["lookup"] = lookup(model, prompts, options.new_tokens)
    content["drafts"] = drafts(model, torch.tensor(prompts))
    for row in (*content["lookup"], *content["drafts"]):
        print(json.dumps(row))
    if options.results:
        write_text(options.results, json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
