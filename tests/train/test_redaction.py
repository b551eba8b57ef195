"""What is personal information and what only looks like it, by tables."""

import time
from collections import Counter

import pytest
from phonenumbers import Leniency, PhoneNumberMatcher

from llama2.train.redaction import Redactor

EMAIL, PHONE, IP = "<EMAIL_ADDRESS>", "<PHONE_NUMBER>", "<IP_ADDRESS>"


@pytest.fixture(scope="module")
def redactor():
    return Redactor()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("write to jane.doe@mail.house.gov.", f"write to {EMAIL}."),
        ("<a+b%c@x-y.co.uk>, A_B@Z.ORG", f"<{EMAIL}>, {EMAIL}"),
        ("_me@web.de_ and 'you@web.de'", f"{EMAIL}_ and '{EMAIL}'"),
        ("请联系user@163.com谢谢", f"请联系{EMAIL}谢谢"),
        ("jürgen@müller.de", EMAIL),
        ("me@firm.xn--p1ai", EMAIL),
        ("me@gmail.com.The next", f"{EMAIL}.The next"),
        ("mailto:me@gmail.com?subject=x", f"mailto:{EMAIL}?subject=x"),
        ("https://user:pass@host.net/x", f"https://user:{EMAIL}/x"),
        ("+49 30 901820", PHONE),
        ("tel:+1-415-555-2671;x", f"tel:{PHONE};x"),
        ("+49 (0)30 90 18 20\n+44 20 7946 0958", f"{PHONE}\n{PHONE}"),
        ("+1.4155552671", PHONE),
        ("call (415) 555-2671 or 415.555.2671", f"call {PHONE} or {PHONE}"),
        ("1-415-555-2671, 415/555-2671", f"{PHONE}, {PHONE}"),
        ("(212) 555 1234 ext. 5", PHONE),
        ("from 81.2.69.160:8080", f"from {IP}:8080"),
        ("http://93.184.216.34/x, 8.8.4.88.", f"http://{IP}/x, 8.8.4.88."),
        ("81.2.69.160-81.2.69.192", f"{IP}-{IP}"),
        ("81.2.69.160/24 (81.2.69.192)", f"{IP}/24 ({IP})"),
        ("ip == '81.2.69.160'", f"ip == '{IP}'"),
        ("[2001:4860:4860::8888]:53", f"[{IP}]:53"),
        ("2A00:1450:4001:81b:0:0:0:200e", IP),
        ("2001:4860:4860::8844: connected", f"{IP}: connected"),
        ("2001:4860:4860::/48", f"{IP}/48"),
        ("::ffff:81.2.69.160", f"::ffff:{IP}"),
    ],
)
def test_personal_information(redactor, text, expected):
    found, counts = redactor.redact(text)
    assert found == expected
    kinds = {kind.strip("<>"): expected.count(kind) for kind in (EMAIL, PHONE, IP)}
    assert counts == Counter(kinds) and 0 not in counts.values()
    assert redactor.redact(found) == (found, Counter())


@pytest.mark.parametrize(
    "text",
    [
        *("a@b", "@decorator", "@app.route('/x')", "x@self.weight", "q@k.T", "root@localhost"),
        *("logo@2x.png", "left-pad@1.3.0", "me@example.com", "a@mail.example.org", "me@host.test"),
        *("m @ n.data", "a@.com", "a@-b.com", f"{'x' * 65}@"),
        *("3.14159265358979", "-0.5772156649", "+35236450.6", "1e+4915112345", "1,234,567,890"),
        *(
            "2024-01-15",
            "01/15/2024 10:30",
            "2024-01-15T10:30:00.123456",
            "15.01.2024",
            "1990-1999",
        ),
        *("978-3-16-148410-0", "2-7654-1005-4", "0-306-40615-2", "0306406152"),
        *("123-45-6789", "4111 1111 1111 1111", "4155552671", "2147483647", "0x4155552671"),
        *("256 512 1024", "[415, 555, 2671]", "555-1212", "112", "1+4915112345678", "123-456-7890"),
        *("1.2.3.4", "8.2.4.44", "v10.20.30.40", "version 10.20.30.40", "Release: 10.20.30.40"),
        *(
            "x==81.2.69.160",
            "x>=81.2.69.160",
            "nginx/1.18.10.12",
            "lib-81.2.69.160",
            "§ 12.3.14.15",
        ),
        *("12.3.14.15.9", "1.12.3.14.15", "12.3.14.15.tar.gz", "081.2.69.160", "81.2.69.256"),
        *("127.0.0.1", "192.168.10.20", "10.11.12.13", "255.255.255.0", "224.10.20.30", "0.0.0.0"),
        *("192.0.2.33", "169.254.10.20", "100.64.10.20"),
        *("::1", "fe80::1", "fd00::12", "2001:db8::1", "ff02::1", "a[2000::2]", "a[::2]"),
        *("std::vector", "2001:4860::8888::1", "10:30:45", "2012:30:45", "00:1b:44:11:3a:b7"),
        *("deadbeef", "20:01:48:60:48:60:00:00"),
    ],
)
def test_what_is_no_personal_information(redactor, text):
    assert redactor.redact(text) == (text, Counter())


def test_national_numbers_of_another_region():
    text = "030 901820, 01 23 45 67 89, (415) 555-2671"
    assert Redactor("DE").redact(text)[0] == f"{PHONE}, 01 23 45 67 89, (415) 555-2671"
    assert Redactor("FR").redact(text)[0] == f"030 901820, {PHONE}, (415) 555-2671"
    with pytest.raises(ValueError, match=r"region: expected a two-letter code .*; got 'us'"):
        Redactor("us")


def test_redaction_keeps_all_else(redactor, monkeypatch):
    """Line ends of every kind, and a line in which the matcher would give up by itself."""
    defaults = (Leniency.VALID, 10, 1)
    monkeypatch.setattr(PhoneNumberMatcher.__init__, "__defaults__", defaults)
    text = "a\r\n\x0b\u2028+49 30 901820\x1c\n" + "123 456 7890 " * 50 + "+49 30 901820\n"
    assert [m.start for m in PhoneNumberMatcher(text, "DE")] == [text.index("+49")]
    found, counts = redactor.redact(text)
    assert found == text.replace("+49 30 901820", PHONE)
    assert counts == {"PHONE_NUMBER": 2}


@pytest.mark.parametrize("text", ["a.", "a@", "a@b.", "1.", "2001:1:", "+49 ", "QUJD1234+/"])
def test_redaction_takes_linear_time(redactor, text):
    """16 times the text would be 256 times the time; the bound is far from either."""
    seconds = []
    for count in (500, 8000):
        start = time.process_time()
        redactor.redact(text * count)
        seconds.append(time.process_time() - start)
    assert seconds[1] < 80 * max(seconds[0], 1e-3)
