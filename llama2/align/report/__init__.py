"""The page of a chain: tables, plots and text."""

import llama2.reporting.headless  # noqa: F401
