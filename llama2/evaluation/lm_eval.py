"""lm-eval's own command line with the model `llama2` registered, as it has no plug-in mechanism:

python -m llama2.evaluation.lm_eval --model llama2 --model_args checkpoint=DIR --tasks …
"""

import sys

from llama2.extras import how_to_install

try:
    from lm_eval.__main__ import cli_evaluate

    import llama2.evaluation.harness  # noqa: F401  registers
except ModuleNotFoundError as error:
    raise SystemExit(
        f"llama2.evaluation.lm_eval needs {error.name}; {how_to_install('evaluation')}"
    ) from error

if __name__ == "__main__":
    sys.exit(cli_evaluate())
