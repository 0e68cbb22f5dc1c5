"""The audit audits itself: `evalcache run --ab -- lm_eval …` on a small trained model, five times.

Each time begins with an empty store: a cached run fills it, a second one answers from it, and a bare one says what that saved.
Compared are the claim (credits + merged + loads avoided − overhead) and the clock (bare − cached, whole processes); see
`evalcache/ab.py`. Asked are multiple choice and generation, about texts that the model has not been trained on.

The model is the demo's, trained once where it is not there yet (scripts/demo_eval/train.py, up to two minutes).
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import Report, arguments, hardware, hardware_line

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
NEW_TOKENS = 128
TASKS = {
    "docs_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "docs_text": {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{choices[answer]}}",
        # As many tokens each: a small model soon ends, and there would be little to save.
        "generation_kwargs": {"until": ["<end>"], "max_gen_toks": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def environment(**more: str) -> dict[str, str]:
    """This process's, without anything that evalcache or a GPU library would read."""
    found = {name: value for name, value in os.environ.items() if not name.startswith("EVALCACHE")}
    threads = found.get("OMP_NUM_THREADS", "1")
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": threads}
    return found | quiet | more


def trained(folder: Path, quick: bool) -> Path:
    """The folder with the demo's ``model`` and ``questions.json``."""
    if not (folder / "questions.json").is_file():
        steps = ["--steps", "100"] if quick else []
        command = [sys.executable, str(ROOT / "scripts" / "demo_eval" / "train.py"), str(folder), *steps]
        subprocess.run(command, check=True, env=environment())
    return folder


def make_tasks(folder: Path, questions: Path, count: int) -> None:
    """The demo's questions, as tasks of the harness."""
    documents = folder / "questions.jsonl"
    asked = json.loads(questions.read_text(encoding="utf-8"))[:count]
    documents.write_text("".join(json.dumps(one) + "\n" for one in asked), encoding="utf-8")
    where = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(documents)}}, "test_split": "test"}
    for name, task in TASKS.items():
        whole = {"task": name, **where, **task, "metadata": {"version": 1.0}}
        (folder / f"{name}.yaml").write_text(json.dumps(whole), encoding="utf-8")  # JSON is YAML


def compare(scratch: Path, model: Path, number: int) -> dict[str, Any]:
    """One A/B run on an empty store: what `--json` says of it."""
    store, figures = scratch / f"store-{number}", scratch / f"ab-{number}.json"
    ask = ["lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--device", "cpu"]
    ask += ["--batch_size", "16", "--tasks", ",".join(TASKS), "--include_path", str(scratch)]
    ours = [str(BIN / "evalcache"), "run", "--dir", str(store), "--ab", "--json", str(figures), "--"]
    path = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"
    done = subprocess.run([*ours, *ask], env=environment(PATH=path), capture_output=True, text=True, check=False)
    if not figures.is_file():  # 1 is a finding of its own
        raise SystemExit(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    found = json.loads(figures.read_text(encoding="utf-8"))
    claim = found["claim"]
    if claim["misses"] or claim["uncacheable"] or not claim["hits"] or not claim["avoided_loads"]:
        raise SystemExit(f"the cached run was not warm: {claim}")
    return found


def main() -> None:
    """Run the experiment."""
    parser = arguments("exp_audit", __doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / ".demo", metavar="FOLDER", help="with model/ and questions.json")
    options = parser.parse_args()
    count, repeats = (48, 1) if options.quick else (640, 5)
    found = hardware(["torch", "transformers", "lm_eval"])
    print(hardware_line(found))
    print(f"{count} questions, each as multiple choice and as generation of {NEW_TOKENS} tokens; {repeats} A/B runs")
    report = Report("exp_audit", options.quick, found)
    runs = []
    with tempfile.TemporaryDirectory() as name:
        scratch, demo = Path(name), trained(options.model.resolve(), options.quick)
        make_tasks(scratch, demo / "questions.json", count)
        for number in range(1, repeats + 1):
            runs.append(one := compare(scratch, demo / "model", number))
            print(f"run {number}: {'not judged: ' + one['not_compared'] if one['inside'] is None else ''}")
            report.add(f"run_{number}_claimed_s", one["claimed_seconds"])
            report.add(f"run_{number}_clock_s", one["clock_seconds"])
            report.add(f"run_{number}_bare_s", one["bare_seconds"])
            report.add(f"run_{number}_overhead_s", one["claim"]["overhead_seconds"])
            report.add(f"run_{number}_ratio", one["claimed_seconds"] / one["clock_seconds"])
    report.add("ratio_median", statistics.median(one["claimed_seconds"] / one["clock_seconds"] for one in runs))
    report.target("runs_inside_15_percent", sum(one["inside"] is True for one in runs), ">=", 0 if options.quick else 4)
    report.write(options.json)


if __name__ == "__main__":
    main()
