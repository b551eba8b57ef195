"""Imports matplotlib independently of the environment variable MPLBACKEND. A package that draws
imports this module in its `__init__`, before any of its modules."""

import os

# Plots are drawn without a backend. The import fails if MPLBACKEND names an unknown one.
_asked = os.environ.pop("MPLBACKEND", None)
try:
    import matplotlib  # noqa: F401
finally:
    if _asked is not None:
        os.environ["MPLBACKEND"] = _asked
