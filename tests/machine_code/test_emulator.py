"""The emulator itself: small kernels must come out right in it, and small faults be seen.

The tests are in files of other names, because they must not run in this process, where Triton's
interpreter is on.
"""

from pathlib import Path

import pytest
from processes import compiling

HERE = Path(__file__).parent


@pytest.mark.machine_code  # whoever changes the emulator runs them
@pytest.mark.parametrize("file", ("small_kernels.py", "warp_specialised_kernels.py"))
def test_of_the_emulator(file):
    options = ("--noconftest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist")
    done = compiling("-m", "pytest", *options, str(HERE / file))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
