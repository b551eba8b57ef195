"""The format of dialogues that a checkpoint was taught."""

from pathlib import Path

from llama2.chat_format import format_of
from llama2.checkpoint.files import Settings


def taught_format(folder: Path) -> str:
    """One of `chat_format.FORMATS`: "chat" unless the checkpoint's template is another of ours.

    The template is that of chat_template.jinja, where newer versions of Transformers put it,
    otherwise that of tokenizer_config.json.

    Raises:
        CheckpointError: tokenizer_config.json is malformed.
    """
    template, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if template.is_file():
        return format_of(template.read_text(encoding="utf-8", errors="replace"))
    return format_of(Settings.read(settings).get("chat_template") if settings.is_file() else None)
