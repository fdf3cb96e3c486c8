"""Locks: one holder at a time, others wait as long as they are told to, and a holder that is killed lets go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from equipoise.errors import OutputError
from equipoise.storage.locks import locked

HOLD = """
import sys, time
from pathlib import Path
from equipoise.storage.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_is_for_one_and_ends_with_its_holder(tmp_path):
    with locked(tmp_path / "a"), pytest.raises(OutputError, match="another process"), locked(tmp_path / "a"):
        pass
    began = time.monotonic()
    with locked(tmp_path / "a"), pytest.raises(OutputError), locked(tmp_path / "a", wait=0.3):
        pass
    assert time.monotonic() - began >= 0.3
    with locked(tmp_path / "a"):
        pass


def test_a_killed_process_holds_nothing(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    with holder, holder.stdout:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match="another process"), locked(tmp_path):
            pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        with locked(tmp_path):
            pass


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="to write"), locked(tmp_path / "file" / "run"):
        pass
