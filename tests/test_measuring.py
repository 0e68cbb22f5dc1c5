"""What computing took: seconds of every client's rows add up to the busy time; devices, memory and energy reach the ledger."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from harness_tasks import make_model, make_tasks

import evalcache
from evalcache.cache import Cache
from evalcache.integrations import scoring, timing
from evalcache.ledger import Ledger
from evalcache.measuring import READ_SHARE, Busy, Meter, board_joules, process_peak_bytes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("measured") / "model")


@pytest.fixture
def watches(monkeypatch: pytest.MonkeyPatch) -> list[timing.Stopwatch]:
    """Every stopwatch that runs: what they show together is the busy time."""
    found: list[timing.Stopwatch] = []

    class Seen(timing.Stopwatch):
        def __post_init__(self) -> None:
            found.append(self)

    assert scoring.Stopwatch is not Seen  # which it takes to say that all of a batch was reading
    monkeypatch.setattr(timing, "Stopwatch", Seen)
    return found


def ask_transformers(model: Path, _: Path) -> None:
    from transformers import AutoModelForCausalLM

    llama = AutoModelForCausalLM.from_pretrained(model)
    draws = torch.Generator().manual_seed(0)
    for rows, settings in ((5, {}), (3, {"num_beams": 2, "num_return_sequences": 2}), (4, {"do_sample": True})):
        ids = torch.randint(3, 300, (rows, 9), generator=draws)
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        llama.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, **({"do_sample": False} | settings))


def ask_scoring(model: Path, _: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llama, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    pairs = [(f"{'a question ' * (place + 1)}?", answer) for place in range(4) for answer in (" yes", " no", " it is not")]
    evalcache.loglikelihood(llama, tokenizer, pairs, batch_tokens=64)


def ask_lm_eval(model: Path, folder: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval", reason="needs lm_eval (llm-evalcache[lm-eval])")
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(make_tasks(folder / "tasks", documents=3)), include_defaults=False)
    lm_eval.simple_evaluate(
        model="hf", model_args=f"pretrained={model},dtype=float32", device="cpu", batch_size=2, bootstrap_iters=0,
        tasks=["tiny_mc", "tiny_letters", "tiny_ppl", "tiny_gen", "tiny_sampled"], task_manager=tasks,
    )  # fmt: skip


def ask_inspect_ai(model: Path, folder: Path) -> None:
    inspect_ai = pytest.importorskip("inspect_ai", reason="needs inspect_ai (llm-evalcache[inspect])")
    from inspect_ai.dataset import Sample
    from inspect_ai.model import GenerateConfig, get_model
    from inspect_ai.scorer import includes
    from inspect_ai.solver import generate

    samples = [Sample(id=place, input="a question " * (place + 1), target="9") for place in range(4)]
    what = inspect_ai.Task(
        dataset=samples, solver=generate(), scorer=includes(), config=GenerateConfig(max_tokens=8, max_connections=4)
    )
    answering = get_model("hf/local", memoize=False, model_path=str(model), device="cpu", do_sample=False)
    inspect_ai.eval(what, model=answering, display="none", log_dir=str(folder / "logs"))


def ask_lighteval(model: Path, _: Path) -> None:
    pytest.importorskip("lighteval", reason="needs lighteval (llm-evalcache[lighteval])")
    from lighteval.models.transformers.transformers_model import TransformersModel, TransformersModelConfig
    from lighteval.tasks.requests import Doc

    config = TransformersModelConfig(model_name=str(model), batch_size=2, dtype="float32", override_chat_template=False)
    lm, text = TransformersModel(config), "a question " * 3
    lm.loglikelihood(
        [Doc(f"{text * place} Answer:", [" A", " it is not"], 0, id=str(place), task_name="t|0") for place in (1, 2)]
    )
    lm.greedy_until(
        [
            Doc(f"{text * place} Answer:", [""], 0, id=str(place), task_name="t|0", generation_size=6, stop_sequences=["e"])
            for place in (1, 2, 3)
        ]
    )


CLIENTS: dict[str, Callable[[Path, Path], None]] = {
    "transformers": ask_transformers,
    "scoring": ask_scoring,
    "lm_eval": ask_lm_eval,
    "inspect_ai": ask_inspect_ai,
    "lighteval": ask_lighteval,
}


@pytest.mark.parametrize("client", CLIENTS)
def test_shares_add_up_to_the_busy_time(
    client: str, model: Path, tmp_path: Path, store_folder: Path, watches: list[timing.Stopwatch]
) -> None:
    with evalcache.enable() as session:
        CLIENTS[client](model, tmp_path)
        session.cache.flush()
        counts = session.cache.counts
        assert counts.misses > 3 and not counts.hits and not counts.uncacheable
        store = session.cache.store
        spent_s = counts.spent_seconds
        ledger, run = session.cache.ledger_path, session.cache.run_id
        assert store.stats().entries == counts.misses
    busy_s = sum(watch.total_s for watch in watches)
    assert spent_s == pytest.approx(busy_s, rel=1e-6)  # asked for is 1 %
    told = (
        Ledger(ledger).query("SELECT sum(seconds), min(seconds), count(DISTINCT device) FROM outputs WHERE run = ?", [run]).rows
    )
    assert told[0][0] == pytest.approx(busy_s, rel=1e-6) and told[0][1] > 0 and told[0][2] == 1
    ((device, count, peak, joules),) = (
        Ledger(ledger).query("SELECT device, device_count, peak_bytes, energy_joules FROM measurements WHERE run = ?", [run]).rows
    )
    assert device and count == 1 and joules is None  # absent, not zero
    assert 50e6 < peak <= process_peak_bytes()


def test_a_run_that_computes_nothing_measures_nothing(model: Path, tmp_path: Path, store_folder: Path) -> None:
    for _ in range(2):
        with evalcache.enable() as session:
            ask_scoring(model, tmp_path)
            ledger, run = session.cache.ledger_path, session.cache.run_id
    assert Ledger(ledger).query("SELECT count(*) FROM measurements WHERE run = ?", [run]).rows == [(0,)]
    assert Ledger(ledger).query("SELECT count(*) FROM measurements").rows == [(1,)]


def test_what_is_computed_uncached_is_measured_too(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    llama = evalcache.wrap(tiny.build("llama"), cache)
    llama.generate(**tiny.prompts(), max_new_tokens=4, do_sample=False, prefix_allowed_tokens_fn=lambda *_: [5])
    assert dict(cache.counts.uncacheable) == {"processor": 4}
    cache.close()
    assert Ledger(cache.ledger_path).query("SELECT device_count, peak_bytes > 0 FROM measurements").rows == [(1, True)]


def test_a_load_is_told_once_with_its_model(model: Path, tmp_path: Path, store_folder: Path) -> None:
    for _ in range(2):
        with evalcache.enable() as session:
            ask_scoring(model, tmp_path)
            ledger = session.cache.ledger_path
    loads = Ledger(ledger).query("SELECT model, seconds FROM model_loads").rows
    assert [root for root, _ in loads] == [root for (root,) in Ledger(ledger).query("SELECT digest FROM models").rows]
    assert loads[0][1] > 0


def test_several_sequences_of_a_row_count_all(model: Path, store_folder: Path) -> None:
    """One row gives two sequences, the other prompt is as long: tokens made are those of both."""
    from transformers import AutoModelForCausalLM

    with evalcache.enable() as session:
        llama = AutoModelForCausalLM.from_pretrained(model)
        ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(1))
        made = llama.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=2, num_return_sequences=2, do_sample=False,
            max_new_tokens=5, eos_token_id=None,
        )  # fmt: skip
        ledger = session.cache.ledger_path
    assert made.shape == (4, 14)
    assert Ledger(ledger).query("SELECT prompt_tokens, completion_tokens FROM outputs").rows == [(9, 10)] * 2


# --- energy: there is no GPU here, so its counters are mocks, and say so ----------------------------------------------------


class MockBoards:
    """A mock of the counters of two GPU boards: they are at what the test says."""

    def __init__(self) -> None:
        self.joules: float | None = 0.0
        self.reads = 0

    def __call__(self, uuids: Sequence[str]) -> float | None:
        self.reads += 1
        return self.joules


@pytest.fixture
def boards() -> MockBoards:
    return MockBoards()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A clock that stands still until it is told."""
    now = SimpleNamespace(s=1000.0)
    monkeypatch.setattr("evalcache.measuring.time", SimpleNamespace(monotonic=lambda: now.s))
    yield now


GPUS = Busy("Mock GPU", ("cuda:0", "cuda:1"), lambda: 7 << 30, ("GPU-mock-0", "GPU-mock-1"))


def test_energy_is_counted_while_the_boards_compute(boards: MockBoards, clock: SimpleNamespace) -> None:
    meter = Meter(boards)
    for _ in range(3):
        boards.joules += 1000.0  # what the boards take while nothing is computed is not ours
        clock.s += 1
        with meter.computing(GPUS):
            boards.joules += 5.0
            clock.s += 1
    (used,) = meter.used()
    assert (used.device, used.device_count, used.peak_bytes, used.energy_joules) == ("Mock GPU", 2, 7 << 30, 15.0)
    assert meter.used() == []
    with meter.computing(GPUS):
        boards.joules += 2.0
        clock.s += 1
    assert [one.energy_joules for one in meter.used()] == [2.0]  # since the last time


def test_devices_of_several_models_count_once_each() -> None:
    meter = Meter()
    for places, peak in ((("cuda:0",), 5), (("cuda:1",), 9), (("cuda:0", "cuda:2"), 7)):
        with meter.computing(Busy("Mock GPU", places, lambda peak=peak: peak)):
            pass
    assert [(one.device_count, one.peak_bytes, one.energy_joules) for one in meter.used()] == [(3, 9, None)]


def test_threads_that_compute_at_once_share_the_boards(boards: MockBoards, clock: SimpleNamespace) -> None:
    meter = Meter(boards)
    with meter.computing(GPUS):
        boards.joules += 1.0
        clock.s += 1
        with meter.computing(GPUS):
            boards.joules += 10.0
            clock.s += 1
        boards.joules += 100.0
        clock.s += 1
    assert [one.energy_joules for one in meter.used()] == [111.0]


def test_a_slow_counter_is_read_rarely(boards: MockBoards, clock: SimpleNamespace) -> None:
    took_s = 0.01

    def slowly(uuids: Sequence[str]) -> float | None:
        clock.s += took_s
        return boards(uuids)

    meter, began = Meter(slowly), clock.s
    for _ in range(2000):
        with meter.computing(GPUS):
            boards.joules += 3.0
            clock.s += 0.05
    assert boards.reads * took_s <= READ_SHARE * (clock.s - began) + 2 * took_s
    assert [one.energy_joules for one in meter.used()] == [6000.0]  # and nothing is lost


def test_what_cannot_be_read_is_absent(boards: MockBoards) -> None:
    boards.joules = None
    meter = Meter(boards)
    with meter.computing(GPUS):
        pass
    with meter.computing(Busy("cpu", ("cpu",), lambda: None)):
        pass
    assert [(one.device, one.peak_bytes, one.energy_joules) for one in meter.used()] == [
        ("Mock GPU", 7 << 30, None),
        ("cpu", None, None),
    ]


def test_energy_of_boards_reaches_the_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real run on the processor, which is passed off as two mock GPUs, whose counter is 10 J further at each reading."""
    readings = iter(range(100, 1000, 10))
    monkeypatch.setattr(timing, "busy", lambda devices: GPUS)
    cache = Cache(tmp_path)
    cache.meter = Meter(lambda uuids: float(next(readings)))
    evalcache.wrap(tiny.build("llama"), cache).generate(**tiny.prompts(), max_new_tokens=4, do_sample=False)
    cache.close()
    rows = Ledger(cache.ledger_path).query("SELECT device, device_count, peak_bytes, energy_joules FROM measurements").rows
    assert rows == [("Mock GPU", 2, 7 << 30, 10.0)]


def mock_nvml(millijoules: dict[str, int]) -> ModuleType:
    """A mock of the module pynvml."""
    mock = ModuleType("pynvml")

    def handle(uuid: str) -> str:
        if uuid not in millijoules:
            raise LookupError("NVML_ERROR_NOT_FOUND (mock)")
        return uuid

    vars(mock).update(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=handle, nvmlDeviceGetTotalEnergyConsumption=millijoules.__getitem__
    )
    return mock


def test_boards_are_asked_by_their_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evalcache.measuring._nvml", None)
    monkeypatch.setitem(sys.modules, "pynvml", mock_nvml({"GPU-a": 1500, "GPU-b": 2250}))
    assert board_joules(["GPU-a", "GPU-b"]) == 3.75
    assert board_joules(["GPU-a", "MIG-c"]) is None  # rather than the energy of a part


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_nvml_there_is_no_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evalcache.measuring._nvml", None)
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as where it is not installed
    assert board_joules(["GPU-a"]) is None


@pytest.mark.parametrize(
    ("places", "count"),
    [({"": 0}, 1), ({"a": 0, "b": "cuda:1", "c": 0}, 2), ({"a": torch.device("cuda", 3), "b": "cpu", "c": "disk"}, 1), (None, 1)],
)
def test_devices_of_a_model_in_parts(places: Any, count: int) -> None:
    model = SimpleNamespace(hf_device_map=places)
    assert len(timing.devices_of(model, torch.device("cuda", 0))) == count


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_measured(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    llama = tiny.build("llama").to("cuda")
    given = {name: tensor.to("cuda") for name, tensor in tiny.prompts().items()}
    evalcache.wrap(llama, cache).generate(**given, max_new_tokens=64, do_sample=False)
    cache.close()
    ((device, count, peak, joules),) = (
        Ledger(cache.ledger_path).query("SELECT device, device_count, peak_bytes, energy_joules FROM measurements").rows
    )
    assert (device, count) == (torch.cuda.get_device_name(), 1) and peak >= sum(one.nbytes for one in llama.parameters())
    assert joules is None or joules >= 0


def test_the_host_tells_its_peak() -> None:
    before = process_peak_bytes()
    if before is None:
        pytest.skip("this system does not count it")
    held = os.urandom(1 << 20) * 128
    grown = process_peak_bytes()
    assert grown >= before and grown >= len(held)


def test_shares_follow_the_time_to_the_first_token() -> None:
    """Twice the time to the first token is twice the weight of a prompt token."""
    draw = random.Random(0)
    prompts, completions = [draw.randint(1, 99) for _ in range(6)], [draw.randint(1, 99) for _ in range(6)]
    for first_s in (0.5, 1.0):
        costs = timing.share(timing.Stopwatch(3.0, first_s), prompts, completions, "cpu")
        for cost, prompt, completion in zip(costs, prompts, completions, strict=True):
            weighed = prompt * first_s / sum(prompts) + completion * (3.0 - first_s) / sum(completions)
            assert cost.seconds == pytest.approx(weighed)
