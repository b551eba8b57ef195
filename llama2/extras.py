"""How to install the packages of an extra."""


def how_to_install(extra: str) -> str:
    """Returns the end of an error message about a missing package: the command that installs it."""
    return f'from a clone of gqa-kernels: pip install ".[{extra}]"'
