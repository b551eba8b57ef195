"""Llama 2's chat format as text: its tags and how messages are written between them.

Source: Touvron et al. 2023, arXiv:2307.09288, and the released chat models.
"""

from collections.abc import Sequence
from typing import Any

_BEGIN_INSTRUCTION, _END_INSTRUCTION = "[INST]", "[/INST]"
_BEGIN_SYSTEM, _END_SYSTEM = "<<SYS>>", "<</SYS>>"
CHAT_TAGS = (_BEGIN_INSTRUCTION, _END_INSTRUCTION, _BEGIN_SYSTEM, _END_SYSTEM)

# "chat": with these tags, as for the released chat models; "separator": with a special token
# between prompt and answer, as the paper describes fine-tuning; see finetune/encoding.py.
FORMATS = ("chat", "separator")

Message = dict[str, Any]  # {"role": "system" | "user" | "assistant", "content": text}


def check_messages(messages: Sequence[Message], *, last: str = "user") -> None:
    """Checks that messages are an optional system message, then user and assistant in turn.

    Args:
        last: the role of the last message: "user" if an answer is to be generated, "assistant" if
            all answers are given.
    Raises:
        TypeError: a message has no role, or its content is not a string.
        ValueError: the roles are in another order, or a content contains one of the format's tags.
            Tags are plain text to the tokenizer, so such a content could impersonate another role.
    """
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise TypeError(
                f'messages[{index}]: expected {{"role": …, "content": …}}; got {message!r:.60}'
            )
        content = message["content"]
        if not isinstance(content, str):
            raise TypeError(
                f"messages[{index}]: expected a string as content; got {type(content).__name__}"
            )
        found = [tag for tag in CHAT_TAGS if tag in content]
        if found:
            raise ValueError(
                f"messages[{index}]: expected a content without {', '.join(CHAT_TAGS)}; "
                f"got {', '.join(found)}"
            )
    roles = [message["role"] for message in messages]
    turns = roles[roles[:1] == ["system"] :]
    alternating = (["user", "assistant"] * len(turns))[: len(turns)]
    if not turns or turns != alternating or turns[-1] != last:
        raise ValueError(
            "messages: expected an optional system message, then user and assistant in turn, "
            f"ending with {last}; got roles {', '.join(map(str, roles)) or 'none':.80}"
        )


def split_turns(
    messages: Sequence[Message], *, system_in_every_turn: bool = False
) -> list[tuple[str, str | None]]:
    """Returns (prompt, answer) of each turn of messages that `check_messages` accepts.

    Contents are stripped. A prompt is the user's content; the system's content, between its tags
    and unstripped, precedes the first: `<<SYS>>\\n{system}\\n<</SYS>>\\n\\n{user}`. The answer of a
    turn without one is None.

    Args:
        system_in_every_turn: the system's content precedes every prompt, as Ghost attention does to
            sample answers.
    """
    system = ""
    if messages[0]["role"] == "system":
        system = f"{_BEGIN_SYSTEM}\n{messages[0]['content']}\n{_END_SYSTEM}\n\n"
        messages = messages[1:]
    contents = [message["content"] for message in messages]
    prompts, answers = contents[0::2], [answer.strip() for answer in contents[1::2]]
    prompts = [
        (system + prompt if turn == 0 or system_in_every_turn else prompt).strip()
        for turn, prompt in enumerate(prompts)
    ]
    return list(zip(prompts, [*answers, None][: len(prompts)], strict=True))


def instruction(prompt: str) -> str:
    """Returns the text of a turn up to the answer: `[INST] {prompt} [/INST]`."""
    return f"{_BEGIN_INSTRUCTION} {prompt} {_END_INSTRUCTION}"


def answered(prompt: str, answer: str) -> str:
    """Returns the text of a finished turn: `[INST] {prompt} [/INST] {answer} `."""
    return f"{instruction(prompt)} {answer} "


def chat_turns(messages: Sequence[Message], *, system_in_every_turn: bool = False) -> list[str]:
    """Returns the texts of a chat's turns, each to be put between BOS and EOS; the last has no
    answer.

    Raises:
        TypeError, ValueError: as `check_messages`.
    """
    check_messages(messages)
    *finished, (asked, _) = split_turns(messages, system_in_every_turn=system_in_every_turn)
    return [*(answered(prompt, answer) for prompt, answer in finished), instruction(asked)]


def without_tags(text: str) -> str:
    """Returns a model's text without the format's tags, as the conversation continues with it: tags
    could impersonate another role."""
    while any(tag in text for tag in CHAT_TAGS):  # a removal can form a new tag
        for tag in CHAT_TAGS:
            text = text.replace(tag, "")
    return text


# The formats for Transformers' `apply_chat_template`, which produces the ids that we train on. The
# space after BOS is the one that SentencePiece puts before a text.
_TEMPLATE = """\
{%- set system = '' -%}
{%- set turns = messages -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' -%}
{%- set turns = messages[1:] -%}
{%- endif -%}
{%- for message in turns -%}
{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
{{- raise_exception('expected an optional system, then user and assistant in turn') -}}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{%- set text = (system if loop.first else '') + message['content'] -%}
{{- bos_token + PROMPT -}}
{%- else -%}
{{- ' ' + (message['content'] | trim) + END -}}
{%- endif -%}
{%- endfor -%}
"""

CHAT_TEMPLATES = {
    form: _TEMPLATE.replace("PROMPT", prompt).replace("END", end)
    for form, prompt, end in (
        ("chat", "' [INST] ' + (text | trim) + ' [/INST]'", "' ' + eos_token"),
        ("separator", "' ' + (text | trim) + bos_token", "eos_token"),
    )
}


def format_of(chat_template: object) -> str:
    """Returns the format of a checkpoint's chat template; "chat" unless it is one of our other
    templates."""
    found = [name for name, template in CHAT_TEMPLATES.items() if template == chat_template]
    return found[0] if found else "chat"
