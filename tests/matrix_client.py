"""One client in a process of its own: python matrix_client.py CLIENT

Reads one JSON line for each cell on stdin (`Asked`), and writes one for each to the stdout that it was started with: what the
client answered, and what evalcache counted. What the client itself prints goes to stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sys
import tempfile
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matrix_model import QUESTIONS, STOPS, TEXTS, asked_plainly

NEW = 12  # tokens of an answer
BATCH = 4


@dataclass
class Asked:
    """One cell.

    Args:
        folder: of the variant. adapter: of its adapter. store: evalcache's folder; None means the bare client.
    """

    folder: str
    dtype: str = "float32"
    adapter: str | None = None
    store: str | None = None


# --- a plain script -------------------------------------------------------------------------------------------------------


def make_script(_: Path) -> Callable[[Asked], dict[str, Any]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import evalcache

    def bare_score(model: Any, tokenizer: Any, context: str, tail: str) -> list[Any]:
        """As evalcache says it that a log-likelihood is: by a plain forward."""
        before, after = (tokenizer(text, return_tensors="pt").input_ids for text in (context, tail))
        with torch.no_grad():
            logits = model(input_ids=torch.cat([before, after], dim=1)).logits[0, before.shape[1] - 1 : -1]
        logprobs = logits.float().log_softmax(-1)
        return [float(logprobs.gather(1, after[0, :, None]).sum()), bool((logits.argmax(-1) == after[0]).all())]

    def run(asked: Asked) -> dict[str, Any]:
        tokenizer = AutoTokenizer.from_pretrained(asked.folder)
        model = AutoModelForCausalLM.from_pretrained(asked.folder, dtype=getattr(torch, asked.dtype)).eval()
        if asked.adapter:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, asked.adapter).eval()

        def generate(prompts: list[str], rows: int = BATCH, **settings: Any) -> list[list[int]]:
            found = []
            for start in range(0, len(prompts), rows):
                batch = tokenizer(prompts[start : start + rows], return_tensors="pt", padding=True, return_token_type_ids=False)
                output = model.generate(**batch, max_new_tokens=NEW, do_sample=False, **settings)
                found += [row[row != 0].tolist() for row in output[:, batch.input_ids.shape[1] :]]
            return found

        pairs = [(asked_plainly(question), " " + choice) for question, choices in QUESTIONS for choice in choices]
        plain = [asked_plainly(question) for question, _ in QUESTIONS]
        chats = [chat_of(tokenizer, question) for question, _ in QUESTIONS]
        if asked.store is None:
            scores = [bare_score(model, tokenizer, *pair) for pair in pairs]
        else:
            scores = [[one.logprob, one.is_greedy] for one in evalcache.loglikelihood(model, tokenizer, pairs)]
        return {
            "scores": scores,
            "plain": generate(plain),
            "chats": generate(chats),
            # As lighteval has it.
            "renormalised": generate(chats, renormalize_logits=True, pad_token_id=tokenizer.eos_token_id),
            # Alone: in a batch, a row that a stop string ended goes on until its neighbours are done.
            "stopped": generate(chats, rows=1, stop_strings=list(STOPS), tokenizer=tokenizer),
        }

    return run


def chat_of(tokenizer: Any, question: str) -> str:
    message = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


# --- lm-evaluation-harness ------------------------------------------------------------------------------------------------


def write_tasks(folder: Path) -> Path:
    """The questions as tasks of the harness."""
    import yaml

    question = {"doc_to_text": asked_plainly("{{question}}"), "doc_to_target": "{{answer}}"}
    greedy = {"output_type": "generate_until", "metric_list": [{"metric": "exact_match"}]}
    ends = {"max_gen_toks": NEW, "do_sample": False}
    tasks: dict[str, dict[str, Any]] = {
        "choices": {
            "output_type": "multiple_choice",
            "doc_to_text": question["doc_to_text"],
            "doc_to_choice": "{{choices}}",
            "doc_to_target": 0,
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "texts": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}],
        },
        "plain": {**greedy, **question, "generation_kwargs": {"until": [], **ends}},
        "stopped": {**greedy, **question, "generation_kwargs": {"until": list(STOPS), **ends}},
        "chats": {**greedy, **question, "doc_to_text": "{{question}}", "generation_kwargs": {"until": [], **ends}},
    }
    asked = [{"question": one, "choices": list(choices), "answer": choices[0]} for one, choices in QUESTIONS]
    for name, task in tasks.items():
        rows = [{"text": text} for text in TEXTS] if name == "texts" else asked
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        whole = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(file)}},
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**whole, **task, "metadata": {"version": 1.0}}))
    return folder


def make_lm_eval(scratch: Path) -> Callable[[Asked], dict[str, Any]]:
    import lm_eval
    import torch.utils.collect_env
    from lm_eval.tasks import TaskManager

    torch.utils.collect_env.get_pretty_env_info = lambda: (
        ""
    )  # which lists the installed packages for the results' file, and takes a second

    manager = TaskManager(include_path=str(write_tasks(scratch)), include_defaults=False)
    loaded = manager.load(["choices", "texts", "plain", "stopped", "chats"])["tasks"]  # once: that costs more than to ask them

    def run(asked: Asked) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for chat, tasks in ((False, ["choices", "texts", "plain", "stopped"]), (True, ["chats"])):
            results = lm_eval.simple_evaluate(
                model="hf",
                model_args=f"pretrained={asked.folder},dtype={asked.dtype}" + (f",peft={asked.adapter}" if asked.adapter else ""),
                tasks=[loaded[name] for name in tasks],
                task_manager=manager,
                batch_size=BATCH,
                device="cpu",
                bootstrap_iters=0,
                apply_chat_template=chat,
            )
            for task, samples in results["samples"].items():
                found[task] = [[one["resps"], {name: one[name] for name in one["metrics"]}] for one in samples]
        return found

    return run


# --- lighteval ------------------------------------------------------------------------------------------------------------


def make_lighteval(_: Path) -> Callable[[Asked], dict[str, Any]]:
    import lighteval_cli

    lighteval_cli.shim()
    from lighteval.models.transformers.transformers_model import TransformersModel, TransformersModelConfig
    from lighteval.tasks.requests import Doc

    def docs(prompts: list[str], **settings: Any) -> list[Any]:
        return [
            Doc(prompt, ["no answer"], 0, id=str(place), task_name="matrix|0", generation_size=NEW, **settings)
            for place, prompt in enumerate(prompts)
        ]

    def run(asked: Asked) -> dict[str, Any]:
        # Its own cache knows a model by its name, and lies in the model's folder.
        for own in (one for one in Path(asked.folder).iterdir() if one.is_dir() and one.name != "adapter"):
            shutil.rmtree(own)

        def model(chat: bool) -> Any:
            settings = {"dtype": asked.dtype, "batch_size": BATCH, "override_chat_template": chat}
            return TransformersModel(TransformersModelConfig(model_name=asked.folder, **settings))

        plain = [asked_plainly(question) for question, _ in QUESTIONS]
        choices = docs(plain)
        for doc, (_, tails) in zip(choices, QUESTIONS, strict=True):
            doc.choices = [" " + tail for tail in tails]
        lm = model(False)
        scores = lm.loglikelihood(choices)
        stopped = lm.greedy_until(docs(plain, stop_sequences=list(STOPS)))
        chats = model(True).greedy_until(docs([question for question, _ in QUESTIONS], stop_sequences=[]))
        return {
            "scores": [[list(map(float, one.logprobs)), list(map(bool, one.argmax_logits_eq_gold))] for one in scores],
            # What follows a stop string in `output_tokens` depends on the neighbours.
            "stopped": [list(one.text) for one in stopped],
            "chats": [list(one.text) for one in chats],
        }

    return run


# --- inspect_ai -----------------------------------------------------------------------------------------------------------


def make_inspect_ai(scratch: Path) -> Callable[[Asked], dict[str, Any]]:
    import inspect_ai
    import inspect_ai.model._providers.hf
    from inspect_ai import Task
    from inspect_ai.dataset import Sample
    from inspect_ai.model import GenerateConfig, get_model
    from inspect_ai.scorer import match
    from inspect_ai.solver import generate

    def task(name: str, **config: Any) -> Any:
        samples = [Sample(id=place, input=text, target=choices[0]) for place, (text, choices) in enumerate(QUESTIONS)]
        # Of both tasks together: the queue is not kept waiting for more.
        settings = GenerateConfig(max_tokens=NEW, max_connections=2 * len(QUESTIONS), **config)
        return Task(name=name, dataset=samples, solver=generate(), scorer=match(), config=settings)

    def run(asked: Asked) -> dict[str, Any]:
        path = asked.adapter or asked.folder
        model = get_model("hf/local", memoize=False, device="cpu", do_sample=False, model_path=path)
        tasks = [task("chats"), task("stopped", stop_seqs=list(STOPS))]
        logs = inspect_ai.eval(tasks, model=model, display="none", log_dir=str(scratch), max_tasks=2)
        assert [log.status for log in logs] == ["success"] * 2, [log.error for log in logs]
        return {
            log.eval.task: [
                [one.output.completion, {name: score.value for name, score in one.scores.items()}] for one in log.samples
            ]
            for log in logs
        }

    return run


# --- transformers serve ---------------------------------------------------------------------------------------------------


def make_serve(_: Path) -> Callable[[Asked], dict[str, Any]]:
    from transformers.cli.serve import Serve

    def free_port() -> int:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            return int(one.getsockname()[1])

    def run(asked: Asked) -> dict[str, Any]:
        """A server of its own in this process, asked over its port."""
        port = free_port()
        server = Serve(force_model=asked.adapter or asked.folder, device="cpu", host="127.0.0.1", port=port, non_blocking=True)
        try:
            while not server.server.started:
                time.sleep(0.02)
            found = []
            for question, _ in QUESTIONS:
                body = {"model": asked.folder, "messages": [{"role": "user", "content": question}], "max_tokens": NEW}
                request = urllib.request.Request(
                    f"http://127.0.0.1:{port}/v1/chat/completions",
                    json.dumps({**body, "temperature": 0}).encode(),
                    {"Content-Type": "application/json"},
                )
                with urllib.request.urlopen(request, timeout=60) as answer:
                    told = json.load(answer)
                found.append([told["choices"][0]["message"]["content"], told["choices"][0]["finish_reason"], told["usage"]])
            return {"chats": found}
        finally:
            server.kill_server()

    return run


# --- the loop -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def cached(store: str) -> Iterator[Callable[[], dict[str, Any]]]:
    """evalcache in this process; what it counted is told once the block is over."""
    import evalcache
    from evalcache import session as sessions

    with evalcache.enable(store) as session:
        counts = session.cache.counts
        yield lambda: {
            "hits": counts.hits,
            "misses": counts.misses,
            "uncacheable": dict(counts.uncacheable),
            "duplicates": counts.duplicates,
            "loads": counts.model_loads,
        }
        session.cache.flush()
    sessions._current = None


def serve_cells(run: Callable[[Asked], dict[str, Any]], answers: Any) -> None:
    for line in sys.stdin:
        asked = Asked(**json.loads(line))
        began = time.perf_counter()
        told: dict[str, Any] = {}
        try:
            if asked.store is None:
                told["answers"] = run(asked)
            else:
                with cached(asked.store) as counts:
                    told["answers"] = run(asked)
                told["counts"] = counts()
        except Exception:
            told["error"] = traceback.format_exc()
        told["seconds"] = time.perf_counter() - began
        print(json.dumps(told), file=answers, flush=True)


if __name__ == "__main__":
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory() as scratch:
        serve_cells(globals()[f"make_{sys.argv[1]}"](Path(scratch)), stdout)
