"""Imports matplotlib, whatever the reader's environment asks for: a package that draws imports this
in its `__init__`, before any of its modules."""

import os

# Plots are drawn without a backend. One that a reader's environment names and matplotlib does not
# know would end its import.
_asked = os.environ.pop("MPLBACKEND", None)
try:
    import matplotlib  # noqa: F401
finally:
    if _asked is not None:
        os.environ["MPLBACKEND"] = _asked
