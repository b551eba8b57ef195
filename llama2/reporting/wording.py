"""Numbers as a page prints them."""

MINUS = "−"


def signed(value: float, digits: int) -> str:
    """Returns the rounded value with its sign, a minus sign for negative ones; a value that is
    rounded to 0 has none."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", MINUS) if float(text) else text[1:]


def fixed(value: float, digits: int) -> str:
    """Returns the rounded value with separators of thousands; a minus sign, but no plus sign."""
    return f"{value:,.{digits}f}".replace("-", MINUS)


def short(value: float) -> str:
    """Returns the value with at most two decimals and separators of thousands."""
    return fixed(value, 2).rstrip("0").rstrip(".")
