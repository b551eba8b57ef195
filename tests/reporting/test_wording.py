"""Numbers as text: signs, rounding, separators."""

import pytest

from llama2.reporting.wording import fixed, short, signed


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (1.25, 2, "+1.25"),
        (-1.25, 2, "−1.25"),
        (-0.04, 1, "0.0"),
        (0.04, 1, "0.0"),
        (-0.06, 1, "−0.1"),
        (0, 0, "0"),
    ],
)
def test_signs(value, digits, text):
    assert signed(value, digits) == text


def test_decimals_and_thousands():
    assert [short(x) for x in (512, 16.5, 8.25, 1234.567, 0.004, 100)] == [
        *("512", "16.5", "8.25", "1,234.57", "0", "100")
    ]
    assert fixed(-1234.5, 1) == "−1,234.5" and fixed(80, 0) == "80"
