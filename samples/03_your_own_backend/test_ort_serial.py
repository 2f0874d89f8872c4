"""The backend is held to the same contract as those that come with the toolchain."""

import pytest

pytest.register_assert_rewrite("runtimes.testing")

from runtimes.testing import RuntimeContract  # noqa: E402


class TestOrtSerial(RuntimeContract):
    target = "ort-serial"
    duration_s = 1.0
    cycles = 200
