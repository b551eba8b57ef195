"""Runs another program's command line with this package's attention registered in Transformers:

    python -m gqa_kernels.run lm_eval --model hf \\
        --model_args pretrained=DIR,attn_implementation=gqa_kernels …

A program with an option for `attn_implementation` then accepts "gqa_kernels" without code changes.
"""

import runpy
import sys


def main(arguments: list[str]) -> None:
    """Registers the attention, then runs the module `arguments[0]` like `python -m`, with the rest
    as its arguments."""
    if not arguments or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        raise SystemExit(2)
    try:
        from gqa_kernels.integrations import transformers
    except ImportError as error:
        raise SystemExit(
            f"gqa_kernels.run needs {error.name}; from a clone of gqa-kernels: "
            'pip install ".[transformers]"'
        ) from error
    transformers.register()
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
