"""Programs that some tests run, and other machines may not have."""

import shutil

import pytest

# .ci/run installs it, and fails where a test says this.
needs_ffmpeg = pytest.mark.skipif(
    shutil.which("ffmpeg") is None, reason="ffmpeg is absent: apt-get install ffmpeg"
)
