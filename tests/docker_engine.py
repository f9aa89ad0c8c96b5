"""The Docker engine that some tests need."""

import shutil
import subprocess

import pytest


def needed() -> None:
    """Skip the test where none answers."""
    if not shutil.which("docker") or subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        pytest.skip("no Docker engine answers here")
