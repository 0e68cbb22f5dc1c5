"""The eval clients that ``exp_clients.py`` compares: each one's command, documents and answers, for a local tiny model."""

from __future__ import annotations

import sys
from pathlib import Path

# The tests' local tasks and tiny models: what is measured is what is tested.
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from clients.engines import Script, Serve
from clients.harnesses import InspectAi, Lighteval, LmEval
from clients.process import Client

CLIENTS: dict[str, type[Client]] = {kind.name: kind for kind in (LmEval, InspectAi, Lighteval, Script, Serve)}
