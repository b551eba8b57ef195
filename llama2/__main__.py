"""`python -m llama2`: the command `llama2`."""

import sys

from llama2.cli import main

sys.exit(main())
