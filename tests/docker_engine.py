"""The Docker engine that some tests need."""

import shutil
import socket
import struct
import subprocess

import pytest


def needed() -> None:
    """Skip the test where none answers."""
    if not shutil.which("docker") or subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        pytest.skip("no Docker engine answers here")


def pid() -> int:
    """Of the engine's process: whoever listens at its socket."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect("/var/run/docker.sock")
        return int(struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])
