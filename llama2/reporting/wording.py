"""Numbers as a page prints them."""

MINUS = "−"


def signed(value: float, digits: int) -> str:
    """With its sign, and a minus sign that is one."""
    return f"{value:+.{digits}f}".replace("-", MINUS)


def fixed(value: float, digits: int) -> str:
    """Without a sign where it is positive, thousands apart."""
    return f"{value:,.{digits}f}".replace("-", MINUS)


def short(value: float) -> str:
    """Two decimals at most, thousands apart."""
    return fixed(value, 2).rstrip("0").rstrip(".")
