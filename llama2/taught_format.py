"""The dialogue format on which a checkpoint was trained."""

from pathlib import Path

from llama2.chat_format import format_of
from llama2.checkpoint.files import Settings


def taught_format(folder: Path) -> str:
    """Returns one of `chat_format.FORMATS`: "chat" unless the checkpoint's template is one of our
    others.

    The template is read from chat_template.jinja, where newer versions of Transformers write it, or
    else from tokenizer_config.json.

    Raises:
        CheckpointError: tokenizer_config.json is malformed.
    """
    template, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if template.is_file():
        return format_of(template.read_text(encoding="utf-8", errors="replace"))
    return format_of(Settings.read(settings).get("chat_template") if settings.is_file() else None)
