"""Replacement of personal information in texts by placeholders: e-mail addresses, telephone
numbers, IP addresses."""

import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from llama2.extras import how_to_install

if TYPE_CHECKING:
    from phonenumbers import PhoneNumberMatch

EMAIL, PHONE, IP = KINDS = ("EMAIL_ADDRESS", "PHONE_NUMBER", "IP_ADDRESS")

_LATIN = "A-Za-zÀ-ɏ"
# A local part is at most 64 characters and a label 63, so that every scan is short.
_EMAIL = re.compile(
    rf"(?<![{_LATIN}0-9_])[{_LATIN}0-9_][{_LATIN}0-9._%+-]{{0,63}}@"
    rf"(?:[{_LATIN}0-9](?:[{_LATIN}0-9-]{{0,61}}[{_LATIN}0-9])?\.)+"
    rf"(?:xn--[A-Za-z0-9-]{{2,59}}|[{_LATIN}]{{2,63}})(?![{_LATIN}0-9@]|_[{_LATIN}0-9])"
)
_RESERVED = re.compile(r"(?:.*\.)?example\.(?:com|net|org)", re.IGNORECASE)  # RFC 2606
_IPV6 = re.compile(
    r"(?<![\w:.])[23][0-9A-Fa-f]{3}:[0-9A-Fa-f]{1,4}(?::[0-9A-Fa-f]{0,4}){1,7}"
    r"(?:\.\d{1,3}){0,3}(?!\w)"
)
_IPV4 = re.compile(r"(?<![\w.])(?<![A-Za-z][-/])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\w)")
_BEFORE_A_VERSION = re.compile(
    r"(?:\b(?:v|ver|version|release|rev|revision|build|section|sect|chapter|clause|oid)s?\b\.?"
    r"[\s:=]{0,3}|§\s?|[=<>~!]=\s?)\Z",
    re.IGNORECASE,
)
_VERSION_REACH = 24  # characters before a number
# Seven digits with little between them; only such lines go to the slow matcher.
_MAYBE_PHONE = re.compile(r"\d(?:[^\w\n]{0,4}\d){6}")
_GROUPED = re.compile(r"0|.*[-./()]")
_DECIMAL = re.compile(r"\+(\d+)\.\d+")


class Redactor:
    """Replaces personal information by "<EMAIL_ADDRESS>", "<PHONE_NUMBER>" and "<IP_ADDRESS>".

    These are presidio's names. Unlike an invented address or number, a placeholder cannot belong to
    anybody, is distinct from text, and is not matched by a second pass. The result depends only on
    the text, the region and the libraries' versions.

    E-mail addresses: in Latin letters, at most 64 characters before the "@", under a top-level
    domain of the public suffix list, which distinguishes them from matrix products
    (`x@self.weight`), file names (`logo@2x.png`) and versions (`left-pad@1.3.0`). Message ids and
    names such as `git@github.com` count as addresses. Not found: `example.com`, `.net` and `.org`
    (RFC 2606), domains that are not public (`root@localhost`), quoted local parts, "name at host".

    Telephone numbers: those that libphonenumber calls valid. International numbers, beginning with
    "+", are found in any grouping, except directly after a letter or digit, or with a dot after
    digits that are not the country code (`+35236450.6`). National numbers of one region are found
    only in the region's grouping, with a hyphen, dot, slash or parenthesis, or with a leading 0:
    bare digits and columns of numbers, such as 2147483647 and 256 512 1024, would be valid numbers
    of the United States. Not found: numbers that continue on the next line, numbers without an area
    code, and short numbers such as 112.

    IP addresses: global ones according to `ipaddress`, not private, local, reserved or multicast
    ones, which identify nobody elsewhere; for version 6 those of 2000::/3 that begin with at least
    two groups, which distinguishes them from slices. Four numbers from 0 to 255 between dots may
    also be a version or a section. They count as one after "v", "version", "release", "build",
    "section" and similar words, after `==` or `>=`, after a name and a hyphen or slash
    (`nginx/1.18.0.12`), next to further parts, and if three or four of them are below 10, as in
    "1.2.3.4" and "8.2.4.44", which are 1 of 4,000 addresses.

    Args:
        region: the region of national telephone numbers, a two-letter code of ISO 3166-1.
    Raises:
        ImportError: a package of the extra `data` is missing.
        ValueError: libphonenumber does not know the region.
    """

    def __init__(self, region: str = "US") -> None:
        try:
            import phonenumbers
            from publicsuffixlist import PublicSuffixList
        except ImportError as error:
            raise ImportError(f"redaction needs {error.name}; {how_to_install('data')}") from error
        if region not in phonenumbers.SUPPORTED_REGIONS:
            raise ValueError(
                f"region: expected a two-letter code such as US, GB or DE; got {region!r}"
            )
        self.region = region
        self._phonenumbers = phonenumbers
        self._suffixes = PublicSuffixList(accept_unknown=False, only_icann=True)

    def redact(self, text: str) -> tuple[str, Counter[str]]:
        """Returns the text with placeholders, and their number by kind of `KINDS`."""
        counts: Counter[str] = Counter()
        if "@" in text:
            text = _replaced(_EMAIL, text, self._email, EMAIL, counts)
        text = _replaced(_IPV6, text, _ipv6, IP, counts)
        text = _replaced(_IPV4, text, _ipv4, IP, counts)
        if _MAYBE_PHONE.search(text):
            lines = text.split("\n")
            text = "\n".join(self._without_phones(line, counts) for line in lines)
        return text, counts

    def _email(self, match: re.Match[str]) -> str:
        """Returns the address in a match, up to the last label that is a top-level domain."""
        local, _, domain = match[0].partition("@")
        labels = domain.split(".")
        while len(labels) > 1 and not self._is_top_level(labels[-1]):
            del labels[-1]
        domain = ".".join(labels)
        found = len(labels) > 1 and not _RESERVED.fullmatch(domain)
        return f"{local}@{domain}" if found else ""

    def _is_top_level(self, label: str) -> bool:
        return self._suffixes.publicsuffix(label.lower()) is not None

    def _without_phones(self, line: str, counts: Counter[str]) -> str:
        if not _MAYBE_PHONE.search(line):
            return line
        leniency, matcher = self._phonenumbers.Leniency, self._phonenumbers.PhoneNumberMatcher
        for region, kind in ((None, leniency.VALID), (self.region, leniency.EXACT_GROUPING)):
            parts, end = [], 0
            for match in matcher(line, region, kind, max_tries=len(line)):
                if _is_national(match) if region else _is_international(match, line):
                    parts += [line[end : match.start], f"<{PHONE}>"]
                    end = match.end
            if parts:
                counts[PHONE] += len(parts) // 2
                line = "".join((*parts, line[end:]))
        return line


def _replaced(
    pattern: re.Pattern[str],
    text: str,
    accept: Callable[[re.Match[str]], str],
    kind: str,
    counts: Counter[str],
) -> str:
    """Replaces the beginning of each match that `accept` returns; "" replaces nothing."""

    def replacement(match: re.Match[str]) -> str:
        found = accept(match)
        if not found:
            return match[0]
        counts[kind] += 1
        return f"<{kind}>{match[0][len(found) :]}"

    return pattern.sub(replacement, text)


def _is_international(match: "PhoneNumberMatch", line: str) -> bool:
    decimal = _DECIMAL.fullmatch(match.raw_string)
    if decimal and decimal[1] != str(match.number.country_code):
        return False
    return not line[max(0, match.start - 1) : match.start].isalnum()


def _is_national(match: "PhoneNumberMatch") -> bool:
    return _GROUPED.match(match.raw_string) is not None


def _ipv6(match: re.Match[str]) -> str:
    for candidate in (match[0], match[0].rstrip(":")):  # as in "2001:4860::8888: connected"
        try:
            return candidate if ipaddress.IPv6Address(candidate).is_global else ""
        except ValueError:
            continue
    return ""


def _ipv4(match: re.Match[str]) -> str:
    try:
        address = ipaddress.IPv4Address(match[0])
    except ValueError:
        return ""
    before = max(0, match.start() - _VERSION_REACH)
    is_version = sorted(address.packed)[2] < 10 or _BEFORE_A_VERSION.search(
        match.string, before, match.start()
    )
    return "" if is_version or not address.is_global or address.is_multicast else match[0]
