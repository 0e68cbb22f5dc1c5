"""The bar on a real terminal, and its absence everywhere else."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

CODE = """
import evalcache.progress as progress
progress.SHOWN_AFTER_S = {after}
with progress.progress_bar("hashing", in_bytes=True) as tell:
    for done in range(5):
        tell(done << 20, 4 << 20)
print("done")
"""


def on_a_terminal(after: float) -> bytes:
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", CODE.format(after=after)], stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                piece = os.read(ours, 4096)
            except OSError:
                break
            if not piece:
                break
            shown += piece
        assert process.stdout.read() == b"done\n"
    os.close(ours)
    return shown


def test_long_work_shows_a_bar_and_takes_it_away():
    shown = on_a_terminal(0.0)
    assert b"evalcache: hashing" in shown
    assert shown.rstrip().endswith((b"\x1b[2K", b"\x1b[?25h", b"\x1b[1A\x1b[2K"))


def test_short_work_shows_nothing():
    assert on_a_terminal(60.0) == b""


def test_a_pipe_shows_nothing():
    done = subprocess.run([sys.executable, "-c", CODE.format(after=0.0)], capture_output=True, timeout=60)
    assert (done.stdout, done.stderr) == (b"done\n", b"")
