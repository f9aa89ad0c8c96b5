"""The Docker engine that some tests need."""

import shutil
import socket
import struct
import subprocess
from pathlib import Path

import pytest


def needed() -> None:
    """Skip the test where none answers."""
    if not answers():
        pytest.skip("no Docker engine answers here")


def pid() -> int:
    """Of the engine's process, which listens at its socket itself: not one that systemd's docker.socket starts."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect("/var/run/docker.sock")
        found = int(struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])
    assert Path(f"/proc/{found}/comm").read_text().strip() == "dockerd"
    return found


def answers() -> bool:
    """Whether one does."""
    command = shutil.which("docker")
    return bool(command) and not subprocess.run([command, "info"], capture_output=True, check=False).returncode
