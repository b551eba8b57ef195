"""The stages of a chain, each a command of the `llama2` package, and the files between them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llama2.align.preferences import HELPFULNESS, SAFETY
from llama2.align.recipe import Preset

SFT, PPO = "sft", "ppo"
KINDS = (HELPFULNESS, SAFETY)  # kinds of reward models


@dataclass(frozen=True)
class Stage:
    """A command that is done once its files exist.

    Attributes:
        name: its name within the chain, without special characters for file names.
        command: its words, which begin with "llama2", or with "python", "-m" and a module.
    """

    name: str
    command: tuple[str, ...]


@dataclass(frozen=True)
class Files:
    """The paths of a chain's files."""

    folder: Path

    def tasks(self, name: str) -> Path:
        """Returns a file of `tasks.write`."""
        return self.folder / "tasks" / f"{name}.jsonl"

    def compared(self, held_out: bool) -> Path:
        return self.folder / ("compared-held-out" if held_out else "compared")

    def comparisons(self, kind: str, *, held_out: bool = False) -> Path:
        return self.compared(held_out) / f"{kind}.jsonl"

    def reward_model(self, kind: str) -> Path:
        return self.folder / f"reward-{kind}"

    def model(self, name: str) -> Path:
        return self.folder / name

    def work(self, name: str) -> Path:
        """Returns the folder with the state and log of a training."""
        return self.folder / f"{name}-run"

    def best(self, number: int) -> Path:
        """Returns the file with the best answers of a round of rejection sampling."""
        return self.folder / f"best-{number}.jsonl"

    def best_summary(self, number: int) -> Path:
        return self.folder / f"best-{number}.json"

    def answers(self, model: str) -> Path:
        return self.folder / f"answers-{model}.jsonl"

    def obeyed(self) -> Path:
        """The file with the summary of `llama2 obedience`."""
        return self.folder / "obeyed.json"

    def done(self, stage: Stage) -> Path:
        """Returns the file that exists once a stage is done."""
        return self.folder / "done" / f"{stage.name}.json"


def round_name(number: int) -> str:
    """Returns the name of the model after a round of rejection sampling, counted from 1."""
    return f"round-{number}"


def models(preset: Preset) -> list[str]:
    """Returns the names of a chain's models, each trained from the previous one."""
    return [SFT, *(round_name(number) for number in range(1, preset.rounds + 1)), PPO]


def stages(preset: Preset, seed: int, folder: Path) -> list[Stage]:
    """Returns the stages of a chain in order."""
    return list(_stages(preset, seed, Files(folder)))


def _stages(preset: Preset, seed: int, files: Files) -> Iterator[Stage]:
    drawn = ("--preset", preset.name, "--seed", str(seed))
    tasks = files.tasks("").parent
    yield _python("tasks", "llama2.align.tasks", *drawn, "--out", tasks)
    yield _sft(
        *(preset, seed, files, SFT, None, [files.tasks("taught")]),
        *("--peak-lr", preset.sft_lr, "--epochs", 1),
    )
    for held_out in (False, True):
        folder = files.compared(held_out)
        name = folder.name
        answers = files.folder / f"{name}-answers.jsonl"
        data = files.tasks(name.replace("-", "_"))
        drawing = ("--temperature", preset.compared_temperature, "--seed", seed)
        yield _answer(preset, f"{name}-answers", files.model(SFT), data, answers, *drawing)
        yield _python(
            *(name, "llama2.align.preferences", *drawn, "--answers", answers, "--out", folder),
            *(("--no-contrasts",) if held_out else ()),
        )
    for kind in KINDS:
        yield _reward(preset, seed, files, kind)
    policy, data = SFT, []
    for number in range(1, preset.rounds + 1):
        yield _best(preset, seed, files, number, policy)
        data.append(files.best(number))  # those of all rounds so far
        name = round_name(number)
        yield _sft(
            *(preset, seed, files, name, files.model(policy), data),
            *("--peak-lr", preset.round_lr, "--epochs", preset.round_epochs),
        )
        policy = name
    yield _ppo(preset, seed, files, policy)
    for model in models(preset):
        answers, asked = files.answers(model), files.tasks("asked")
        yield _answer(preset, f"answers-{model}", files.model(model), asked, answers)
    yield _obedience(preset, files)


def _llama2(name: str, *words: object) -> Stage:
    return Stage(name, ("llama2", *map(str, words)))


def _python(name: str, module: str, *words: object) -> Stage:
    return Stage(name, ("python", "-m", module, *map(str, words)))


def _sft(
    preset: Preset,
    seed: int,
    files: Files,
    name: str,
    init: Path | None,
    data: list[Path],
    *options: object,
) -> Stage:
    return _llama2(
        *(name, "sft", "--work", files.work(name), "--out", files.model(name)),
        *(() if init is None else ("--init", init)),
        *(word for path in data for word in ("--data", path)),
        *("--batch-size", preset.sft_batch, "--warmup-steps", preset.warmup_steps, *options),
        *("--seed", seed, "--threads", 1),
    )


def _asking(preset: Preset) -> tuple[object, ...]:
    return (
        *("--dtype", "float32", "--max-batch", preset.max_batch),
        *("--max-new-tokens", preset.max_new_tokens),
    )


def _answer(
    preset: Preset, name: str, checkpoint: Path, data: Path, out: Path, *options: object
) -> Stage:
    return _llama2(
        *(name, "answer", "--checkpoint", checkpoint, "--data", data, "--out", out),
        *(*_asking(preset), *options),
    )


def _reward(preset: Preset, seed: int, files: Files, kind: str) -> Stage:
    model = files.reward_model(kind)
    return _llama2(
        *(model.name, "reward", "--work", files.work(model.name), "--out", model),
        *("--init", files.model(SFT), "--data", files.comparisons(kind)),
        *("--held-out", files.comparisons(kind, held_out=True), "--margins", "small"),
        *("--batch-size", preset.reward_batch, "--peak-lr", preset.reward_lr),
        *("--epochs", preset.reward_epochs, "--seed", seed, "--threads", 1),
    )


def _judged(files: Files) -> tuple[object, ...]:
    helpfulness, safety = map(files.reward_model, KINDS)
    return ("--reward", helpfulness, "--safety-reward", safety)


def _best(preset: Preset, seed: int, files: Files, number: int, policy: str) -> Stage:
    out = files.best(number)
    return _llama2(
        *(out.stem, "rejection-sample", "--checkpoint", files.model(policy), *_judged(files)),
        *("--data", files.tasks(f"round_{number}"), "--samples", preset.samples),
        *("--temperature", preset.sampled_temperature, "--seed", seed, *_asking(preset)),
        *("--out", out, "--summary", files.best_summary(number)),
    )


def _ppo(preset: Preset, seed: int, files: Files, policy: str) -> Stage:
    return _llama2(
        *(PPO, "ppo", "--work", files.work(PPO), "--out", files.model(PPO)),
        *("--init", files.model(policy), *_judged(files), "--data", files.tasks("rewarded")),
        *("--iterations", preset.iterations, "--batch-size", preset.ppo_batch),
        *("--mini-batch-size", preset.ppo_mini_batch, "--lr", preset.ppo_lr),
        *("--kl-weight", preset.kl_weight, "--max-new-tokens", preset.max_new_tokens),
        *("--seed", seed, "--threads", 1),
    )


def _obedience(preset: Preset, files: Files) -> Stage:
    checkpoints = (("--checkpoint", files.model(name)) for name in models(preset))
    return _llama2(
        *("obeyed", "obedience", *(word for words in checkpoints for word in words)),
        *("--data", files.tasks("obeyed"), "--out", files.folder / "obeyed.jsonl"),
        *("--summary", files.obeyed(), *_asking(preset)),
    )
