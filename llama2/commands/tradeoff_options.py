"""The options of `llama2 tradeoff`."""

import argparse

from llama2.commands.options import integer, number, path
from llama2.config import PUBLISHED
from llama2.placement import add_options
from llama2.tradeoff.question import KEEP, LEAST_SHARE
from llama2.tradeoff.roofline import CACHE_FORMATS, GPUS

NO_STUDY = "none"
PRESETS = ("cpu", "gpu", "smoke", NO_STUDY)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--preset",
        choices=PRESETS,
        help="the study: cpu: 15 minutes on two cores; gpu: larger models on one GPU, best with "
        "your own --text; smoke: seconds, with models that learn nothing; none: only computed "
        "speed and memory; default: cpu",
    )
    add(
        "--out",
        type=path,
        required=True,
        metavar="DIR",
        help="directory for report, result, log and plots",
    )
    add(
        "--json",
        action="store_true",
        help="print the page as JSON, with the same digits, and the recommendation's numbers",
    )
    add(
        "--work",
        type=path,
        metavar="DIR",
        help="directory from which a killed study resumes; default: build/tradeoff-PRESET",
    )
    _add_study(parser.add_argument_group("study"))
    _add_deployment(parser.add_argument_group("deployment"))


def _add_study(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--text",
        type=path,
        metavar="PATH",
        help="a text file or a directory of them; default: Python's standard library",
    )
    add(
        "--held-out",
        type=path,
        metavar="PATH",
        help="texts for evaluation; default: one file in 20, or the last 5 %% of a single file",
    )
    add("--seeds", type=integer, nargs="+", metavar="N", help="random seeds; default: the preset's")
    add(
        "--steps",
        type=integer,
        metavar="N",
        help="training steps of each language model from scratch; default: the preset's",
    )
    add(
        "--processes",
        type=integer,
        metavar="N",
        help="number of training processes at once; default: the preset's",
    )
    add(
        "--results",
        type=path,
        metavar="FILE",
        help="make a new page from the result of an earlier study, without training",
    )
    add_options(group)


def _add_deployment(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--shape",
        default="7B",
        metavar="|".join((*PUBLISHED, "FILE.json")),
        help="the shape to deploy: a published one, a config.json in Hugging Face's layout, or "
        "another JSON file of ModelConfig's fields; default: %(default)s",
    )
    add(
        "--gpu",
        default="H200",
        metavar="NAME",
        help=f"the GPU to deploy on: {', '.join(GPUS)}, or MEMORY_GIB,TB_PER_S,TFLOPS; default: "
        "%(default)s",
    )
    add(
        "--context",
        type=integer,
        default=4096,
        metavar="N",
        help="expected tokens per sequence; default: %(default)s",
    )
    add(
        "--batch",
        type=_batch,
        default=32,
        metavar="N|max",
        help="expected sequences that decode together, or max for as many as fit; default: "
        "%(default)s",
    )
    add(
        "--tp",
        type=integer,
        default=1,
        metavar="N",
        help="GPUs that share the model; default: %(default)s",
    )
    add(
        "--keep",
        type=number,
        default=KEEP,
        metavar="SHARE",
        help="how fast, relative to the fastest number of heads, is fast enough: a share of its "
        "tokens per second; default: %(default)s",
    )
    add(
        "--least-share",
        type=number,
        default=LEAST_SHARE,
        metavar="SHARE",
        help="do not recommend fewer key/value heads than this share of the query heads; 0 allows "
        "any; default: %(default)s, the smallest with figures of quality other than MQA's",
    )
    add(
        "--kv-cache-dtype",
        choices=CACHE_FORMATS,
        default="auto",
        help="dtype of the key/value cache: auto, the default, is 16 bits; fp8 and int8 also store "
        "a scale per head and token",
    )
    add(
        "--measured",
        type=path,
        metavar="FILE",
        help="the measured.json of an earlier run on a GPU, shown beside the prediction",
    )
    add(
        "--no-measure", action="store_true", help="do not time decode steps, even if there is a GPU"
    )


def _batch(text: str) -> int | None:
    """Returns a number, or None for as many sequences as fit."""
    if text == "max":
        return None
    if not text.isdecimal() or not text.strip("0"):
        raise argparse.ArgumentTypeError(f"expected an int of at least 1, or max; got {text!r:.60}")
    return integer(text)
