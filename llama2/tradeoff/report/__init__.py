"""The page of a study: tables, plots, words."""

import llama2.reporting.headless  # noqa: F401
