"""Safety context distillation: train a model to answer without a preprompt as it does with one.

A model answers a prompt alone and after a preprompt that asks for safety. The training data pair
the prompt without the preprompt with the answer given after it, but only if a reward model prefers
that answer: otherwise the preprompt makes answers vague or refuses harmless requests.

Source: Touvron et al. 2023, arXiv:2307.09288, section 4.2.4; the texts are our own.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from llama2.chat_format import Message
from llama2.finetune.conversations import place_numbers
from llama2.finetune.dialogues import Dialogue, printable_name, to_line
from llama2.finetune.sampling import Answer, Prompt, Sampler
from llama2.storage import replacing

PREPROMPTS = (
    "You are a safe and responsible assistant. Never give an answer that could harm someone.",
    "You are a responsible assistant that never says anything false, hateful or dangerous.",
    "You are a considerate and honest assistant. Where a request could do harm, say so and help "
    "in a safe way.",
    "You are a respectful assistant who gives safe answers alone, without insults or prejudice.",
)

# What an answer should be like, by category of risk; appended to a preprompt.
TEMPLATES = MappingProxyType(
    {
        "illicit": "If the request is about a crime, do not explain how it is done. Say what is "
        "wrong with it, and name a lawful way to what may be behind it.",
        "hateful": "If the request asks for contempt of people or for harm to them or to oneself, "
        "do not join in. Answer with respect, and name who can help.",
        "unqualified": "If the request asks for medical, legal or financial advice, give general "
        "information alone, and advise to ask a qualified person.",
    }
)

# (the prompt's messages without a preprompt, an answer) → a score; higher is better.
Reward = Callable[[Sequence[Message], str], float]


@dataclass(frozen=True)
class RiskyPrompt:
    """A prompt to be answered safely.

    Attributes:
        messages: as `check_messages` accepts them, the user's last.
        file, line: its place, which with the seed determines the preprompt and the sampling.
        risk: a key of the templates, or None.
        source: the source of the resulting dialogue.
    """

    messages: tuple[Message, ...]
    file: Path
    line: int
    risk: str | None = None
    source: str = "safety"


@dataclass(frozen=True)
class Distilled:
    """The result of a prompt.

    Attributes:
        outcome: "kept"; "not better" by the reward; "empty" or "cut" if one of the answers is; or
            "error".
        dialogue: if "kept", the prompt without the preprompt and the answer given with it; only
            that answer has a loss.
        error: the message of an "error".
    """

    prompt: RiskyPrompt
    outcome: str
    dialogue: Dialogue | None = None
    error: str | None = None


def with_preprompt(
    prompt: RiskyPrompt,
    preprompts: Sequence[str],
    templates: Mapping[str, str],
    seed: int,
) -> list[Message]:
    """Returns the prompt's messages with a preprompt, drawn from the seed and its place, and the
    template of its risk as system message, before the text of the prompt's own system message.

    Raises:
        ValueError: the risk has no template.
    """
    if prompt.risk is not None and prompt.risk not in templates:
        raise ValueError(
            f"risk: expected one of {', '.join(templates)} or None; got {prompt.risk!r}"
        )
    parts = [
        random.Random(f"{seed} {printable_name(prompt.file)}:{prompt.line}").choice(preprompts)
    ]
    if prompt.risk is not None:
        parts.append(templates[prompt.risk])
    messages = list(prompt.messages)
    if messages[0]["role"] == "system":
        parts.append(messages.pop(0)["content"])
    return [{"role": "system", "content": "\n\n".join(parts)}, *messages]


def distil(
    sampler: Sampler,
    prompts: Iterable[RiskyPrompt],
    reward: Reward,
    *,
    preprompts: Sequence[str] = PREPROMPTS,
    templates: Mapping[str, str] = TEMPLATES,
    seed: int = 0,
) -> Iterator[Distilled]:
    """Yields the result of each prompt as it finishes.

    Args:
        reward: called twice, with the messages without the preprompt, for a prompt with two
            comparable answers.
        seed: random seed of the choice of preprompts; the sampler has its own for the answers.
    Raises:
        ValueError: a reward is not finite.
    """
    asked: list[RiskyPrompt] = []
    encoded: list[Prompt] = []
    for prompt in prompts:
        try:
            without = sampler.encode(prompt.messages)
            with_it = sampler.encode(with_preprompt(prompt, preprompts, templates, seed))
        except (TypeError, ValueError) as error:
            yield Distilled(prompt, "error", error=str(error))
            continue
        place = place_numbers(prompt.file, prompt.line)
        encoded += [Prompt(without, (*place, 0)), Prompt(with_it, (*place, 1))]
        asked.append(prompt)
    waiting: dict[int, Answer] = {}
    with closing(sampler.answers(encoded)) as answers:  # frees rows if the reward raises
        for index, answer in answers:
            if index ^ 1 not in waiting:
                waiting[index] = answer
                continue
            other = waiting.pop(index ^ 1)
            without, with_it = (answer, other) if index % 2 == 0 else (other, answer)
            yield _judged(asked[index // 2], without, with_it, reward)


def _judged(prompt: RiskyPrompt, without: Answer, with_it: Answer, reward: Reward) -> Distilled:
    error = without.error or with_it.error
    if error is not None:
        return Distilled(prompt, "error", error=error)
    if with_it.fault is not None or not without.text:
        return Distilled(prompt, with_it.fault or "empty")
    scores = [reward(prompt.messages, answer.text) for answer in (without, with_it)]
    if not all(map(math.isfinite, scores)):
        raise ValueError(
            f"reward: expected finite numbers; got {scores} for {prompt.file}:{prompt.line}"
        )
    if not scores[1] > scores[0]:
        return Distilled(prompt, "not better")
    answer = {"role": "assistant", "content": with_it.text}
    messages = (*prompt.messages, answer)
    num_answers = sum(message["role"] == "assistant" for message in messages)
    trained = (False,) * (num_answers - 1) + (True,)
    dialogue = Dialogue(messages, trained, prompt.source, prompt.file, prompt.line)
    return Distilled(prompt, "kept", dialogue)


def write_distilled(out: Path, distilled: Iterable[Distilled]) -> Counter[str]:
    """Writes the kept dialogues as JSON lines, all or none, and returns the number of each
    outcome."""
    outcomes: Counter[str] = Counter()
    with replacing(out) as partial, partial.open("w", encoding="utf-8") as file:
        for each in distilled:
            outcomes[each.outcome] += 1
            if each.dialogue is not None:
                file.write(to_line(each.dialogue))
    return outcomes
