"""What every test has: no network, one torch thread, a store folder of its own, and no progress bars."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

# Before the first import of transformers or torch, and inherited by the processes that tests start.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    TRANSFORMERS_VERBOSITY="error",
)

import hypothesis
import pytest

if TYPE_CHECKING:
    from evalcache.ledger import Ledger
    from evalcache.store import Store

# A test that takes long on a busy machine has found nothing.
hypothesis.settings.register_profile("unhurried", deadline=None)
hypothesis.settings.load_profile("unhurried")


@pytest.fixture(autouse=True)
def store_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Gives each test an `EVALCACHE_DIR` of its own, not made yet, and none of the developer's other settings."""
    for name in [name for name in os.environ if name.startswith("EVALCACHE_")] + ["EVALCACHE"]:
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "evalcache"
    monkeypatch.setenv("EVALCACHE_DIR", str(folder))
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Store, Ledger]:
    """A store and a ledger of one folder."""
    from recorded import open_pair

    return open_pair(tmp_path)


@pytest.fixture(autouse=True)
def gradients() -> None:
    """Gradients are on, as Python starts: lighteval switches them off for its whole process when it is imported."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_grad_enabled(True)


def pytest_terminal_summary(terminalreporter) -> None:
    """How many architectures were resumed exactly, refused and wrong, where any was tried (`test_architectures.py`)."""
    told = [
        dict(report.user_properties)["components"]
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", "") == "call" and "components" in dict(report.user_properties)
    ]
    if told:
        said = ", ".join(f"{told.count(kind)} {kind}" for kind in ("exact", "refused", "wrong"))
        terminalreporter.write_line(f"architectures whose forward began above the first layer: {said}")
