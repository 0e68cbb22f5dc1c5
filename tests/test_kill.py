"""kill -9 at any instant: what was acknowledged is there and right, nothing is half there or there twice, and all agree.

The long campaign is `benchmarks/exp_faults.py`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from killed import Campaign
from phases import PHASES, prepare

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")

ROUNDS = 3
SLOW = ("export over an older one", "rebuild", "verify --fix of a store", "verify --fix of a ledger", "pull of segments")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("prepared") / "folder")


@pytest.mark.parametrize("phase", [phase for phase in PHASES if phase not in SLOW])
def test_kill_9(tmp_path: Path, prepared: Path, phase: str) -> None:
    assert Campaign(phase, tmp_path, prepared).run(ROUNDS) == []


@pytest.mark.campaign
@pytest.mark.parametrize("phase", PHASES)
def test_kill_9_many_times(tmp_path: Path, prepared: Path, phase: str) -> None:
    campaign = Campaign(phase, tmp_path, prepared)
    assert campaign.run(40, seed=1) == []
    assert campaign.late < campaign.rounds, "no kill came in time"
