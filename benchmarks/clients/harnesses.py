"""Clients with tasks and a cache of their own: lm_eval, inspect_ai, lighteval."""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

from clients.process import BIN, Ask, Client


class LmEval(Client):
    """``lm_eval run``, with its ``--use_cache``. One of its tasks draws its answers: that ordered call is one lookup."""

    name = "lm_eval"
    has_own_cache = True

    def __init__(self, folder: Path, documents: int) -> None:
        from harness_tasks import make_tasks

        super().__init__(folder, documents)
        self.tasks = make_tasks(folder / "tasks", documents=documents)

    def command(self, ask: Ask) -> list[str]:
        named = f"pretrained={self.model},dtype=float32"
        command = [str(BIN / "lm_eval"), "run", "--model", "hf", "--model_args", named, "--device", "cpu", "--batch_size", "8"]
        command += ["--tasks", "tiny_mc,tiny_letters,tiny_gen,tiny_sampled", "--include_path", str(self.tasks), "--log_samples"]
        command += ["--output_path", str(ask.out)]
        return [*command, *(["--use_cache", str(ask.own)] if ask.own else []), *(["--limit", "1"] if ask.one else [])]

    def answers(self, ask: Ask) -> dict[str, list[Any]]:
        found = {}
        for file in sorted(ask.out.rglob("samples_*.jsonl")):
            found[file.name.split("_2")[0]] = [json.loads(line)["resps"] for line in file.read_text().splitlines()]
        return found


class InspectAi(Client):
    """``inspect eval``, with its ``--cache``. Whether its provider draws is an argument of the model: a run of its own."""

    name = "inspect_ai"
    has_own_cache = True
    samples_apart = True
    _TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import includes
from inspect_ai.solver import generate

TEXTS = {texts!r}

def ask(**settings):
    samples = [Sample(id=number, input=text, target="9") for number, text in enumerate(TEXTS)]
    return Task(dataset=samples, solver=generate(), scorer=includes(), config=GenerateConfig(max_tokens=16, **settings))

@task
def greedy():
    return ask()

@task
def sampled():
    return ask(temperature=0.8)
"""

    def __init__(self, folder: Path, documents: int) -> None:
        super().__init__(folder, documents)
        (folder / "tiny.py").write_text(self._TASK.format(texts=prompts(documents)))

    def command(self, ask: Ask) -> list[str]:
        task = "tiny.py@sampled" if ask.sampled else "tiny.py@greedy"
        command = [
            str(BIN / "inspect"),
            "eval",
            task,
            "--model",
            "hf/local",
            "-M",
            f"model_path={self.model}",
            "-M",
            "device=cpu",
        ]
        command += ["-M", f"do_sample={str(ask.sampled).lower()}", "--seed", "1", "--display", "plain"]
        command += ["--log-dir", str(ask.out), "--log-format", "json"]
        # Drawn answers belong to their batch, and what comes together depends on timing: few enough for one batch.
        limit = "1" if ask.one else "8" if ask.sampled else ""
        return [*command, *(["--cache=true"] if ask.own else []), *(["--limit", limit] if limit else [])]

    def environment(self, ask: Ask) -> dict[str, str]:
        return {"INSPECT_CACHE_DIR": str(ask.own)} if ask.own else {}

    def answers(self, ask: Ask) -> dict[str, list[Any]]:
        (file,) = ask.out.glob("*.json")
        log = json.loads(file.read_text())
        if log["status"] != "success":
            raise SystemExit(f"inspect_ai: {log['status']}")
        samples = sorted(log["samples"], key=lambda sample: sample["id"])
        return {log["eval"]["task"]: [sample["output"]["choices"][0]["message"]["content"] for sample in samples]}


class Lighteval(Client):
    """``lighteval accelerate``; its sample cache is always on: a bare run has an empty one.

    The model is named relative to the folder: the cache of an absolute path goes into the model's folder, not to ``cache_dir``.
    It does not seed torch: what it draws from the command line differs from run to run, and is left out.
    """

    name = "lighteval"
    has_own_cache = True
    _SCRIPT = Path(__file__).parents[2] / "tests" / "lighteval_cli.py"

    def __init__(self, folder: Path, documents: int) -> None:
        from harness_tasks import make_tasks

        super().__init__(folder, documents)
        tasks = make_tasks(folder / "tasks", documents=documents)
        for name in ("tiny_mc", "tiny_letters", "tiny_gen"):
            (folder / "documents" / name).mkdir(parents=True)
            shutil.copy(tasks / f"{name}.jsonl", folder / "documents" / name / "test.jsonl")

    def command(self, ask: Ask) -> list[str]:
        named = "model_name=model,dtype=float32,batch_size=8,override_chat_template=False"
        named += f",cache_dir={ask.own or ask.out / 'own-cache'}"
        tasks = "tiny_mc|0,tiny_letters|0,tiny_gen|0"
        command = [sys.executable, str(self._SCRIPT), "accelerate", named, tasks, "--custom-tasks", str(self._SCRIPT)]
        command += ["--output-dir", str(ask.out), "--save-details"]
        return [*command, *(["--max-samples", "1"] if ask.one else [])]

    def environment(self, ask: Ask) -> dict[str, str]:
        return {"LIGHTEVAL_DOCUMENTS": str(self.folder / "documents")}

    def answers(self, ask: Ask) -> dict[str, list[Any]]:
        import pandas

        found = {}
        for path in ask.out.rglob("details_*.parquet"):
            responses = pandas.read_parquet(path)["model_response"]
            found[path.name.split("_2")[0]] = [[list(one["text"]), list(one["logprobs"])] for one in responses]
        return found


def prompts(count: int) -> list[str]:
    """Sentences of several lengths, no two alike."""
    import words

    draw = random.Random(0)
    known = sorted({word for sentence in words.SENTENCES for word in sentence.split()})
    return [" ".join(draw.choices(known, k=draw.randint(4, 14))) + f" {number}" for number in range(count)]
