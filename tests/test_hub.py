"""What is found where the hub should be: an answer, a closed port, silence, or nothing asked."""

from __future__ import annotations

import re
import socket
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from deepspec.hub import look_at_hub
from tests.hub import closed_port, run_with_hub, serve_hub


def row(shown: str) -> str:
    found = re.search(r"(?m)^\w+ +hub {2}.*", shown)
    assert found is not None, shown
    return re.sub(" +", " ", found[0])


def test_doctor_asks_the_hub(tmp_path: Path) -> None:
    with serve_hub(tmp_path) as address:
        done = run_with_hub(address, tmp_path / "home", "doctor")
        assert row(done.stdout).startswith(
            f"ok hub {address} answers (HTTP 200), cache in {tmp_path}"
        )
        offline = run_with_hub(address, tmp_path / "home", "doctor", HF_HUB_OFFLINE="1")
    assert row(offline.stdout).startswith("note hub offline (HF_HUB_OFFLINE)")
    assert "unset HF_HUB_OFFLINE" in row(offline.stdout)


def test_doctor_finds_a_closed_port(tmp_path: Path) -> None:
    address = closed_port()
    done = run_with_hub(address, tmp_path, "doctor")
    assert done.returncode == 0, done.stdout
    assert row(done.stdout).startswith(f"note hub {address} cannot be reached (ConnectError: ")
    assert "check the network and HF_ENDPOINT" in row(done.stdout)


def test_a_hub_that_is_silent_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        begun = time.monotonic()
        hub = look_at_hub(0.5)
        assert time.monotonic() - begun < 2
    assert not hub.answers
    assert hub.found.startswith(f"{address} cannot be reached")
