"""The command `llama2 rejection-sample`: samples answers to each prompt and keeps the best for
training.

Source: Touvron et al. 2023, arXiv:2307.09288, section 3.2.3.
"""

import argparse
import contextlib
import sys
from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from llama2.checkpoint import weights_crc32
from llama2.checkpoint.files import require
from llama2.commands.dialogue_jobs import (
    WRITTEN,
    Key,
    Results,
    add_job_options,
    check_apart,
    form_of,
    key_of,
    option_of,
    place_of,
    read_data,
    results,
    sampler_for,
    weights_of,
    write_summary,
)
from llama2.commands.json_lines import Complaints
from llama2.commands.options import DTYPES, integer, load, path
from llama2.finetune.dialogues import read_dialogues, to_record
from llama2.model import Llama2
from llama2.placement import place
from llama2.rlhf.prompts import TaggedPrompt, read_prompts
from llama2.rlhf.rejection import (
    Earlier,
    Judge,
    Judged,
    asked_of,
    best_of,
    dialogue_of,
    earlier_answers,
    sample_answers,
)
from llama2.rlhf.scoring import Scorer, load_reward_model
from llama2.taught_format import taught_format
from llama2.terminal import counted
from llama2.tokenizer import Tokenizer

_BEST = ("messages", "source", "reward", "sample", "earlier", "rewards", "faults", "round")
_ALL = ("messages", "source", "samples", "round")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `run`."""
    add_job_options(
        parser,
        data="prompts, whose last message is from the user (an answer after it is dropped), or "
        '{"prompt": TEXT}; "safety": true marks a safety prompt, one that provokes unsafe answers',
        out="each prompt with its best answer, as sft reads it",
        sampled=True,
    )
    add = parser.add_argument
    add(
        "--samples",
        type=integer,
        required=True,
        metavar="K",
        help="answers to sample per prompt; the one with the highest reward is written",
    )
    add(
        "--reward",
        type=path,
        required=True,
        metavar="DIR",
        help="the reward model; of helpfulness if there are two",
    )
    add(
        "--safety-reward",
        type=path,
        metavar="DIR",
        help="a reward model of safety; its reward counts for safety prompts and for answers to "
        "which it gives a probability below 0.15",
    )
    add(
        "--earlier",
        type=path,
        action="append",
        default=[],
        metavar="PATH",
        help="--out of an earlier round, or other dialogues: their answers to the same prompts "
        "compete too; repeatable",
    )
    add(
        "--all-samples",
        type=path,
        metavar="FILE",
        help="write JSON lines with each prompt, all answers and their rewards",
    )
    add("--summary", type=path, metavar="FILE", help="write counts and mean rewards as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Samples answers to each prompt, writes the one with the highest reward, and prints the mean
    reward of the best of the first 1, 2, 4, … of them.

    An empty or truncated answer is never chosen; a prompt without another answer is reported and
    left out. An interrupted run resumes.

    Returns:
        0; 1 if a line was bad or a prompt ended in an error.
    Raises:
        OSError, ValueError, NotImplementedError, ImportError: about a file, an option or a model.
    """
    _check(arguments)
    complaints, checkpoint = Complaints(), arguments.checkpoint
    prompts = read_data(arguments, complaints, read_prompts)
    earlier = _read_earlier(arguments, complaints)
    settings = {"checkpoint": str(checkpoint), "round": _round(arguments)}
    keys, weights = [key_of(prompt, checkpoint) for prompt in prompts], weights_of(checkpoint)
    left_out: list[Judged] = []
    with contextlib.ExitStack() as files:
        out = files.enter_context(
            results(arguments.out, prompts, _BEST, weights, settings=settings)
        )
        written = [out]
        if arguments.all_samples is not None:
            every = results(
                *(arguments.all_samples, prompts, _ALL, weights),
                settings=settings,
                option="--all-samples",
            )
            written.append(files.enter_context(every))
        _check_tags(arguments, prompts, keys, out)
        num_before = sum(key in out.done for key in keys)
        todo = [
            prompt
            for prompt, key in zip(prompts, keys, strict=True)
            if any(key not in file.done for file in written)
        ]
        if todo:
            left_out = _sample(arguments, todo, earlier, written, settings["round"], complaints)
        records = [out.done[key] for key in keys if key in out.done]
    counted = count(records, prompts, left_out, arguments.samples)
    asked = {asked_of(prompt.messages) for prompt in prompts}
    num_other = sum(len(answers) for key, answers in earlier.items() if key not in asked)
    counted |= {"earlier_answers_to_other_prompts": num_other, "bad_lines": complaints.count}
    print(table(counted), end="")
    write_summary(arguments, settings | counted)
    print(
        f"{len(records) - num_before} prompts done, {num_before} were done before, {len(left_out)} "
        f"left out, {num_other} earlier answers to other prompts, {complaints.count} bad lines",
        file=sys.stderr,
    )
    return 1 if complaints.count else 0


def _check(arguments: argparse.Namespace) -> None:
    if arguments.samples < 1:
        raise ValueError(f"--samples: expected at least 1; got {arguments.samples}")
    if arguments.samples > 1 and arguments.temperature == 0:
        raise ValueError("--temperature: expected more than 0, so that answers differ; got 0")
    taught = taught_format(arguments.reward)
    if form_of(arguments) != taught:
        raise ValueError(
            f"--format: expected that of the reward model, {taught}; got {form_of(arguments)}"
        )
    for name in WRITTEN:
        written = getattr(arguments, name, None)
        for earlier in arguments.earlier if written is not None else ():
            check_apart(option_of(name), written, "--earlier", earlier)


def _check_tags(
    arguments: argparse.Namespace,
    prompts: Sequence[TaggedPrompt],
    keys: Sequence[Key],
    out: Results,
) -> None:
    """Raises ValueError if a prompt was judged with another "safety" than it has now."""
    for prompt, key in zip(prompts, keys, strict=True):
        found = out.done.get(key, {}).get("safety", prompt.is_safety)
        if found != prompt.is_safety:
            raise ValueError(
                f'--out: expected results of prompts with the same "safety"; got safety {found} '
                f"at {key.place} in {arguments.out}. Name another file"
            )


def _read_earlier(
    arguments: argparse.Namespace, complaints: Complaints
) -> dict[tuple[tuple[str, str], ...], list[Earlier]]:
    dialogues = (
        dialogue for file in arguments.earlier for dialogue in read_dialogues(file, complaints.add)
    )
    return earlier_answers(dialogues)


def _round(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns, in JSON's types, the settings on which a round's answers and rewards depend. A run
    resumes results only if they have the same settings."""
    names = ("samples", "temperature", "top_p", "seed", "max_new_tokens", "dtype")
    safety = arguments.safety_reward
    return {name: getattr(arguments, name) for name in (*names, "kv_cache_dtype")} | {
        "format": form_of(arguments),
        "reward_model": str(arguments.reward),
        "safety_reward_model": None if safety is None else str(safety),
        "earlier": [str(file) for file in arguments.earlier],
        "crc32": {
            "reward_model": weights_crc32(arguments.reward),
            "safety_reward_model": None if safety is None else weights_crc32(safety),
        },
    }


def _sample(
    arguments: argparse.Namespace,
    todo: Sequence[TaggedPrompt],
    earlier: dict[tuple[tuple[str, str], ...], list[Earlier]],
    files: Sequence[Results],
    settings: dict[str, Any],
    complaints: Complaints,
) -> list[Judged]:
    """Writes the missing results and returns the prompts without an answer that can be chosen.

    Args:
        files: the results of --out and, if given, of --all-samples.
        settings: those of `_round`.
    """
    tqdm = require("tqdm").tqdm
    model, tokenizer = load(arguments)
    judge = _judge(arguments, model, tokenizer)  # before the cache, which takes free memory
    asked = [(prompt.messages, 1) for prompt in todo]
    sampler = sampler_for(arguments, model, tokenizer, asked, num_samples=arguments.samples)
    num_unjudged = sum(prompt.is_safety for prompt in todo) if judge.safety is None else 0
    if num_unjudged:
        print(
            f"note: {counted(num_unjudged, 'safety prompt')} judged like all others, as there is "
            "no --safety-reward",
            file=sys.stderr,
        )
    for file in files:
        file.begin()
    out, *others = files
    left_out = []
    with tqdm(total=len(todo), unit="prompt", disable=None) as progress:
        for prompt, answers in sample_answers(sampler, todo, arguments.samples):
            key = key_of(prompt, arguments.checkpoint)
            try:
                if isinstance(answers, ValueError):
                    raise answers
                judged = judge(prompt, answers, earlier.get(asked_of(prompt.messages), ()))
            except ValueError as error:
                progress.clear()
                complaints.add(prompt.file, prompt.line, error)
                progress.update()
                continue
            # --out last: a prompt that --out has is then in the other file too.
            for file in others:
                if key not in file.done:
                    file.write(key, every_sample(judged) | {"round": settings})
            if judged.best is None:
                left_out.append(judged)
                progress.clear()
                faults = _counted(judged.faults)
                print(
                    f"{prompt.file}:{prompt.line}: left out: none of {len(answers)} answers can be "
                    "trained on: " + ", ".join(f"{n} {fault}" for fault, n in faults.items()),
                    file=sys.stderr,
                )
            elif key not in out.done:
                out.write(key, best_sample(judged) | {"round": settings})
            progress.update()
    return left_out


def _judge(arguments: argparse.Namespace, model: Llama2, tokenizer: Tokenizer) -> Judge:
    """Returns a judge of the reward models, on the device of the model whose answers they judge."""
    ops = place(arguments.backend, arguments.device).ops
    scorers = []
    for folder in (arguments.reward, arguments.safety_reward):
        if folder is not None:
            reward_model = load_reward_model(
                folder,
                ops,
                policy=arguments.checkpoint,
                dtype=arguments.dtype and DTYPES[arguments.dtype],
                device=model.lm_head.weight.device,
            )
            scorers.append(Scorer(reward_model))
    max_tokens = min(scorer.model.config.max_seq_len for scorer in scorers)
    return Judge(tokenizer, form_of(arguments), max_tokens, *scorers)


def best_sample(judged: Judged) -> dict[str, Any]:
    """Returns the record of a prompt with its best answer: a dialogue as `read_dialogues` reads it,
    in which only that answer has a loss."""
    number, num_samples = judged.best, len(judged.answers)
    earlier = judged.earlier[number - num_samples] if number >= num_samples else None
    answer = judged.answers[number] if earlier is None else earlier
    rewards = [*judged.rewards, *judged.earlier_rewards]
    return to_record(dialogue_of(judged.prompt, answer.text)) | {
        "safety": judged.prompt.is_safety,
        "reward": rewards[number],
        "sample": number if earlier is None else None,
        "earlier": None if earlier is None else earlier.place,
        "rewards": list(judged.rewards),
        "faults": _counted(judged.faults),
    }


def every_sample(judged: Judged) -> dict[str, Any]:
    """Returns the record of a prompt with all its answers."""
    prompt = judged.prompt
    return {
        "messages": list(prompt.messages),
        "source": prompt.source,
        "safety": prompt.is_safety,
        "samples": [
            {"answer": answer.text, "reward": reward, "fault": fault}
            | {"num_new_tokens": answer.num_new_tokens}
            for answer, reward, fault in zip(
                judged.answers, judged.rewards, judged.faults, strict=True
            )
        ],
        "earlier": [
            {"answer": answer.text, "reward": reward, "place": answer.place}
            for answer, reward in zip(judged.earlier, judged.earlier_rewards, strict=True)
        ],
    }


def count(
    records: Sequence[dict[str, Any]],
    prompts: Sequence[TaggedPrompt],
    left_out: Sequence[Judged],
    num_samples: int,
) -> dict[str, Any]:
    """Returns the counts and means of a round for its summary.

    Args:
        records: those of --out.
        prompts: those of --data.
        left_out: prompts without an answer that can be trained on.
        num_samples: answers to each prompt.
    """
    faults = sum((Counter(record["faults"]) for record in records), Counter())
    for judged in left_out:
        faults.update(_counted(judged.faults))
    rewards = [record["reward"] for record in records]
    return {
        "prompts": len(prompts),
        "safety_prompts": sum(prompt.is_safety for prompt in prompts),
        "answered": len(records),
        "left_out": [place_of(judged.prompt) for judged in left_out],
        "faults": dict(sorted(faults.items())),
        "from_earlier_rounds": sum(record["earlier"] is not None for record in records),
        "mean_reward": fmean(rewards) if rewards else None,
        "best_of": best_of((record["rewards"] for record in records), num_samples),
    }


def _counted(faults: Sequence[str | None]) -> dict[str, int]:
    return dict(sorted(Counter(fault for fault in faults if fault is not None).items()))


def table(counted: dict[str, Any]) -> str:
    """Returns a table of the mean reward of the best of the first 1, 2, 4, … answers, and of the
    chosen ones."""
    means = counted["best_of"]
    rows = [
        (str(number), f"{mean:.4f}")
        for number, mean in enumerate(means, 1)
        if number & (number - 1) == 0 or number == len(means)
    ]
    if counted["from_earlier_rounds"]:
        rows.append(("and earlier rounds", f"{counted['mean_reward']:.4f}"))
    rows.insert(0, ("best of", "mean reward"))
    width = max(len(name) for name, _ in rows)
    return "".join(f"{name:>{width}}  {mean:>11}\n" for name, mean in rows)
