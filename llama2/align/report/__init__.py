"""The page of a chain: tables, plots, words."""

import llama2.reporting.headless  # noqa: F401
