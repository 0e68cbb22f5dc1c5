"""What layers in common spare: log-likelihoods of a model that was changed from some depth on, resumed and computed whole.

A Llama in float32 on the CPU with random weights; a variant changes one matrix of the first layer above a depth (or the head, at
full depth). Every case is a whole call, fingerprint, keys and commit included, on rows that the model below has read before:

* **whole**: with components switched off, in a cache of its own;
* **resumed**: from what the first model left, states lying in memory;
* **bound**: the share of a whole forward that the layers below the depth take, as it was measured layer by layer: what could be
  spared if nothing else cost anything. *Reached*: spared, as a share of that.

Answers of both are compared, bit for bit. *Capturing*: a forward that leaves states at four depths, beside one that leaves none.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from harness import Report, arguments, hardware, hardware_line
from transformers import LlamaConfig, LlamaForCausalLM

from evalcache.cache import Cache
from evalcache.integrations.reuse import Reuse
from evalcache.integrations.scoring import Row, Scoring, score_rows
from evalcache.integrations.stacks import capturing
from evalcache.records import Result

FULL = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 20, "num_attention_heads": 16, "vocab_size": 8192}
QUICK = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 4, "vocab_size": 2048}
TOKENS, ROWS, TURNS = 64, 32, 2


def make_model(settings: dict[str, int]) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**settings, max_position_embeddings=256)).eval()


@contextlib.contextmanager
def changed(model: LlamaForCausalLM, depth: int, seed: int) -> Iterator[None]:
    """The model with other weights from ``depth`` on."""
    layers = model.model.layers
    tensor = (layers[depth].mlp.up_proj if depth < len(layers) else model.lm_head).weight
    before = tensor.detach().clone()
    with torch.no_grad():
        tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)) * 0.01)
    yield
    with torch.no_grad():
        tensor.copy_(before)


def timed(cache: Cache, model: LlamaForCausalLM, rows: list[Row]) -> tuple[list[Result], float]:
    began = time.perf_counter()
    results = score_rows(cache, model, rows, Scoring())
    cache.flush()
    return results, time.perf_counter() - began


def same(one: list[Result], other: list[Result]) -> bool:
    return [(r.logprobs, dict(r.scalars)) for r in one] == [(r.logprobs, dict(r.scalars)) for r in other]


def measure(report: Report, model: LlamaForCausalLM, rows: list[Row], folder: Path, turns: int) -> None:
    """Every depth, in turns."""
    count = len(model.model.layers)
    depths = [count * quarter // 4 for quarter in (1, 2, 3, 4)]
    ours, bare = Cache(folder / "ours"), Cache(folder / "bare")
    ours.components, bare.components = True, False
    reuse = Reuse.within(ours)
    reuse.announced.update(depths)
    timed(ours, model, rows)
    timed(bare, model, rows)
    (kind,) = reuse._kinds.values()
    seconds: dict[int, list[tuple[float, float]]] = {depth: [] for depth in depths}
    wrong = 0
    for turn in range(turns + 1):
        for depth in depths:
            with changed(model, depth, 1 + turn):
                resumed, ours_s = timed(ours, model, rows)
                whole, bare_s = timed(bare, model, rows)
            wrong += not same(resumed, whole)
            if turn:  # the first one is where the depth is proven
                seconds[depth].append((bare_s, ours_s))
    for depth in depths:
        bound = kind.pace.ended[depth] / kind.pace.whole
        spared = statistics.median(1 - ours_s / bare_s for bare_s, ours_s in seconds[depth])
        report.add(f"{100 * depth // count} % whole s", statistics.median(bare_s for bare_s, _ in seconds[depth]))
        report.add(f"{100 * depth // count} % resumed s", statistics.median(ours_s for _, ours_s in seconds[depth]))
        report.add(f"{100 * depth // count} % bound, share", bound)
        report.target(f"{100 * depth // count} % spared, share of the bound", spared / bound, ">=", 0.9)
    report.target("wrong answers", wrong, "<=", 0)
    report.target("rows that ran whole after the first model", ours.counts.components.whole - len(rows), "<=", 0)
    report.add("bytes of states a row and depth", reuse.states.size_bytes / len(rows) / len(depths))
    capture(report, model, rows, depths, turns)
    for cache in (ours, bare):
        cache.close()


def capture(report: Report, model: LlamaForCausalLM, rows: list[Row], depths: list[int], turns: int) -> None:
    ids = torch.tensor([context + tail[:-1] for context, tail in rows])
    ratios = []
    for _ in range(2 * turns):
        took = []
        for wanted in ([], depths):
            with torch.no_grad(), capturing(model.model.layers, wanted):
                began = time.perf_counter()
                model(input_ids=ids, use_cache=False)
                took.append(time.perf_counter() - began)
        ratios.append(took[1] / took[0] - 1)
    report.target("capturing at four depths, share of a forward", statistics.median(ratios), "<=", 0.01)


def main() -> None:
    """Measure, and print what came of it."""
    given = arguments("exp_components", (__doc__ or "").splitlines()[0]).parse_args()
    report = Report("exp_components", given.quick, hardware(["torch", "transformers"]))
    print(hardware_line(report.hardware))
    model = make_model(QUICK if given.quick else FULL)
    report.add("parameters", sum(parameter.numel() for parameter in model.parameters()))
    drawn = random.Random(0)
    rows = [([drawn.randrange(3, 2000) for _ in range(TOKENS)], [drawn.randrange(3, 2000)]) for _ in range(ROWS)]
    with tempfile.TemporaryDirectory() as folder:
        measure(report, model, rows, Path(folder), 1 if given.quick else TURNS)
    report.write(given.json)


if __name__ == "__main__":
    main()
