"""The command `llama2 evaluate`: runs tasks of lm-eval on a checkpoint."""

import argparse
import json
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table

from llama2.checkout import made_with
from llama2.evaluation.harness import Llama2LM
from llama2.storage import reading, write_text

_PACKAGES = ("lm-eval", "datasets")


def run(arguments: argparse.Namespace) -> int:
    """Runs the tasks, prints the table of results, writes them to a file and returns 0.

    Raises:
        OSError, ValueError, NotImplementedError, ImportError, FloatingPointError: about an option,
            a task, its data or the model.
    """
    _check_sizes(arguments)
    _check_out(arguments.out)
    manager, names = _tasks(arguments.task_path, arguments.tasks)
    lm = Llama2LM(
        arguments.checkpoint,
        backend=arguments.backend,
        device=arguments.device,
        dtype=arguments.dtype or "auto",
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
    )
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=names,
        num_fewshot=arguments.num_fewshot,
        batch_size=arguments.batch_size,
        device=str(lm.device),
        use_cache=arguments.cache and str(_answers(arguments.cache, lm)),
        limit=arguments.limit,
        log_samples=False,
        system_instruction=arguments.system_instruction,
        apply_chat_template=arguments.apply_chat_template,
        fewshot_as_multiturn=arguments.apply_chat_template,
        task_manager=manager,
    )
    record = _record(arguments, results)
    text = json.dumps(record, indent=2, ensure_ascii=False, default=handle_non_serializable)
    write_text(arguments.out, text + "\n")
    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    return 0


def _check_sizes(arguments: argparse.Namespace) -> None:
    for name, least in (("limit", 1), ("num_fewshot", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')}: expected {least} or more; got {value}")


def _check_out(out: Path) -> None:
    """Refuses an output that cannot be written, before the evaluation instead of after it."""
    if out.is_dir():
        raise IsADirectoryError(f"--out: expected a file; got a directory, {out}")
    out.parent.mkdir(parents=True, exist_ok=True)


def _tasks(folders: list[Path], patterns: list[str]) -> tuple[TaskManager, list[str]]:
    """Returns lm-eval's task manager and the names of the tasks that match the patterns. lm-eval's
    own tasks, thousands of files, are read only if a pattern matches no task in the folders.

    Raises:
        ValueError: a pattern matches no task; a folder or a file in it cannot be read.
    """
    for folder in folders:
        if not folder.is_dir():
            raise NotADirectoryError(f"--task-path: expected a folder of tasks; got {folder}")
    for include_defaults in (False, True):
        with reading(Path(*folders[:1]), "expected YAML tasks of lm-eval;"):
            manager = TaskManager(
                include_path=[str(folder) for folder in folders], include_defaults=include_defaults
            )
        matches = {pattern: manager.match_tasks([pattern]) for pattern in patterns}
        unknown = [pattern for pattern, found in matches.items() if not found]
        if not unknown:
            break
    else:
        where = ", ".join(["lm-eval's", *map(str, folders)])
        raise ValueError(
            f"--tasks: expected names of tasks, {where}; got {', '.join(map(repr, unknown))}"
        )
    return manager, list(dict.fromkeys(name for found in matches.values() for name in found))


def _answers(folder: Path, lm: Llama2LM) -> Path:
    """Returns the cache of this model's answers: lm-eval's cache distinguishes questions, not
    models."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / lm.digest()


def _record(arguments: argparse.Namespace, results: dict[str, Any]) -> dict[str, Any]:
    """Returns lm-eval's results, with the tasks' versions and settings, and what produced them."""
    about = {"checkpoint": str(arguments.checkpoint.resolve())} | made_with(arguments, _PACKAGES)
    # lm-eval's git_hash is that of the working directory, which may be another repository.
    return about | {name: value for name, value in results.items() if name != "git_hash"}
