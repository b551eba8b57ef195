"""The form of the page and its script: plain JavaScript without network access.

`page.js` repeats the arithmetic of `llama2.tradeoff`; this module embeds its constants as JSON.
"""

import html
import json
import shlex
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from matplotlib.colors import to_hex

from llama2.accounting import head_counts
from llama2.reporting.drawing import head_colours
from llama2.tradeoff.question import Question
from llama2.tradeoff.recommend import share_name
from llama2.tradeoff.report import quality
from llama2.tradeoff.report.decision import COMMON_HEADS, published_heads
from llama2.tradeoff.report.deployment_tables import SHOWN_BATCH
from llama2.tradeoff.roofline import CACHE_FORMATS, GIB, GPUS, Deployment, Gpu

SCRIPTS = tuple(Path(__file__).with_name(name) for name in ("plots.js", "page.js"))
_SHARES = (1, 0.5, 0.25, 0.125, 0.0625, 0)
_RANKS = (1, 2, 4, 8, 16)

STYLE = """
#setting { display: flex; flex-wrap: wrap; gap: .4rem 1rem; margin: 1rem 0; padding: .7rem;
  background: var(--soft); border-radius: 6px; }
#setting[hidden] { display: none; }
#setting label { display: grid; font-size: .85rem; }
#setting input, #setting select { font: inherit; width: 8.5rem; max-width: 100%; }
p:empty { display: none; } #message { color: var(--predicted); flex-basis: 100%; margin: 0; }
#legend { display: flex; flex-wrap: wrap; gap: 0 1rem; font-size: .88rem; }
#legend span::before { content: ""; display: inline-block; width: 1.3em; height: .35em;
  margin-right: .4em; vertical-align: middle; background: var(--colour); border: 1px solid #888; }
.plot text { font: 13px system-ui, sans-serif; fill: #1c2026; }
.plot .grid { stroke: #ddd; } .plot .mark { stroke: #333; stroke-dasharray: 5 4; }
"""


def data(question: Question, results: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the constants of `page.js`, in the units of `llama2.tradeoff.roofline`."""
    config = question.config
    counts = head_counts(config)
    gpus = {**GPUS, **({} if question.gpu in GPUS.values() else {"custom": question.gpu})}
    caches = CACHE_FORMATS
    defaults = {field.name: field.default for field in fields(Deployment)}
    return {
        "shape": {
            name: getattr(config, name)
            for name in (
                *("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_q_heads"),
                *("head_dim", "tie_word_embeddings"),
            )
        },
        "shape_name": question.shape_name,
        "counts": counts,
        "common_heads": COMMON_HEADS if config.num_q_heads > COMMON_HEADS else None,
        "published_heads": published_heads(question),
        "gpus": {name: asdict(gpu) for name, gpu in gpus.items()},
        "caches": {name: asdict(cache) for name, cache in caches.items()},
        "weight_bytes_per_value": defaults["weight_bytes_per_value"],
        "reserved_bytes": defaults["reserved_bytes"],
        "shown_batch": SHOWN_BATCH,
        "evidence": None if results is None else quality.evidence(results, config),
        "colours": {count: to_hex(colour) for count, (colour, _) in head_colours(counts).items()},
        "shape_option": question.published_name or "FILE.json",
        "gpu_options": {name: _gpu_option(name, gpu) for name, gpu in gpus.items()},
        "setting": {  # by the names of the options of `llama2 tradeoff`
            "context": question.context,
            "batch": question.batch or "max",
            "gpu": next(name for name, gpu in gpus.items() if gpu == question.gpu),
            "tp": question.tp,
            "kv-cache-dtype": next(
                name for name, cache in caches.items() if cache == question.cache
            ),
            "keep": _number(question.keep),
            "least-share": _number(question.least_share),
        },
    }


def form(question: Question) -> str:
    """Returns the form, hidden until the script runs, with a place for error messages, and the
    command of its setting."""
    known = data(question, None)
    setting = known["setting"]
    ranks = sorted({*(tp for tp in _RANKS if question.config.num_q_heads % tp == 0), question.tp})
    shares = sorted({*_SHARES, setting["least-share"]}, reverse=True)
    controls = {
        "context, tokens": _field("context", setting["context"], 'type="number" min="1"'),
        "batch, or max": _field("batch", setting["batch"], 'type="text" inputmode="numeric"'),
        "GPU": _choice("gpu", {name: gpu["name"] for name, gpu in known["gpus"].items()}, setting),
        "tensor parallelism": _choice(
            "tp", {tp: f"{tp} GPU{'s' * (tp > 1)}" for tp in ranks}, setting
        ),
        "cache": _choice(
            "kv-cache-dtype",
            {name: cache["name"] for name, cache in known["caches"].items()},
            setting,
        ),
        "share of speed to keep": _field(
            "keep", setting["keep"], 'type="number" min="0.05" max="1" step="0.05"'
        ),
        "least share of heads": _choice(
            "least-share",
            {share: share_name(share) if share else "any" for share in shares},
            setting,
        ),
    }
    labels = "\n".join(f"<label>{name} {control}</label>" for name, control in controls.items())
    return (
        f'<form id="setting" hidden>\n{labels}\n<p id="message" role="alert"></p>\n</form>\n'
        f'<pre id="command">{html.escape(command(question))}</pre>'
    )


def command(question: Question) -> str:
    """Returns the command whose page opens with the question's setting, without a study."""
    known = data(question, None)
    options = known["setting"] | {"gpu": known["gpu_options"][known["setting"]["gpu"]]}
    told = " ".join(f"--{name} {value}" for name, value in options.items())
    return f"llama2 tradeoff --preset none --out DIR --shape {known['shape_option']} {told}"


def script(question: Question, results: dict[str, Any] | None) -> str:
    """Returns the script element with its constants."""
    embedded = json.dumps(data(question, results)).replace("<", "\\u003c")
    return f"<script>\nconst DATA = {embedded};\n{code()}</script>"


def code() -> str:
    """Returns the text of the script without its constants."""
    return "".join(file.read_text(encoding="utf-8") for file in SCRIPTS)


def _field(name: str, value: object, attributes: str) -> str:
    return f'<input name="{name}" value="{value}" {attributes}>'


def _choice(name: str, texts: dict[Any, str], setting: dict[str, Any]) -> str:
    options = "".join(
        f'<option value="{html.escape(str(value))}"{" selected" * (value == setting[name])}>'
        f"{html.escape(text)}</option>"
        for value, text in texts.items()
    )
    return f'<select name="{name}">{options}</select>'


def _gpu_option(name: str, gpu: Gpu) -> str:
    """Returns the value of --gpu, quoted for a shell."""
    if name in GPUS:
        return shlex.quote(name)
    numbers = (gpu.memory_bytes / GIB, gpu.bytes_per_s / 1e12, gpu.flops_per_s / 1e12)
    return ",".join(str(_number(number)) for number in numbers)


def _number(value: float) -> float:
    """Returns the number as JavaScript prints it: 1, not 1.0."""
    return int(value) if float(value).is_integer() else value
