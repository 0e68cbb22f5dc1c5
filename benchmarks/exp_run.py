"""A whole run, in processes of its own: bare, cold (an empty store), warm (a full one).

An ordinary script loads a checkpoint and asks 512 requests in batches of 16, with 128 new tokens each. What is compared:

* cold overhead: all seconds that evalcache itself took, as counted by the run, over the seconds of computing; and the share of
  each call alone, without what is paid once (the fingerprint by a process, the probe by a set of weights);
* warm: the seconds of all calls and of the whole process, over the bare ones;
* memory: peak resident size beside the bare run's.

The outputs of all three are compared too: a wrong one ends the experiment.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import Report, arguments, hardware, hardware_line

NEW_TOKENS = 128


def make_model(folder: Path, hidden: int, layers: int) -> None:
    """Save a random llama in fp32: about 12·layers·hidden² parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        eos_token_id=None,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def script(folder: str, calls: int, rows: int, device: str) -> None:
    """The script that is run: nothing in it knows of evalcache unless EVALCACHE_DIR is set."""
    enabled = None
    if "EVALCACHE_DIR" in os.environ:
        import evalcache

        enabled = evalcache.enable()
    import torch
    from transformers import AutoModelForCausalLM

    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder).to(device)
    loaded = time.perf_counter()
    draws = torch.Generator().manual_seed(1)
    outputs, seconds = [], []
    warm_up = torch.randint(3, 4000, (rows, 4), generator=draws).to(device)
    model.generate(input_ids=warm_up, attention_mask=torch.ones_like(warm_up), max_new_tokens=2, do_sample=False)
    for _ in range(calls):
        ids = torch.randint(3, 4000, (rows, 32), generator=draws).to(device)
        start = time.perf_counter()
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False)
        outputs.append(out.sum().item())
        seconds.append(time.perf_counter() - start)
    told: dict[str, Any] = {"load_s": loaded - began, "calls_s": sum(seconds), "outputs": outputs}
    told["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if enabled is not None and enabled.cache is not None:
        enabled.cache.flush()
        counts = enabled.cache.counts
        told |= {"hits": counts.hits, "misses": counts.misses, "spent_s": counts.spent_seconds, "overhead": dict(counts.overhead)}
    print("TOLD " + json.dumps(told))


def run(folder: Path, cache: Path | None, calls: int, rows: int, device: str) -> dict[str, Any]:
    """One process of the script; ``cache`` is its store's folder, None for bare."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("EVALCACHE")}
    environment |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    if cache is not None:
        environment["EVALCACHE_DIR"] = str(cache)
    command = [sys.executable, __file__, "--script", str(folder), str(calls), str(rows), device]
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    line = next(line for line in done.stdout.splitlines() if line.startswith("TOLD "))
    return json.loads(line[5:]) | {"process_s": time.perf_counter() - began}


def main() -> None:
    """Run the experiment."""
    if sys.argv[1:2] == ["--script"]:
        script(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
        return
    parser = arguments("exp_run", __doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    hidden, layers, calls, rows, repeats = (256, 6, 2, 4, 1) if options.quick else (512, 12, 32, 16, 1)
    found = hardware(["torch", "transformers"])
    print(hardware_line(found))
    print(f"{calls} calls of {rows} rows and {NEW_TOKENS} new tokens; hidden {hidden}, {layers} layers, fp32, {options.device}")
    report = Report("exp_run", options.quick, found)
    runs: dict[str, list[dict[str, Any]]] = {"bare": [], "cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        make_model(folder, hidden, layers)
        for repeat in range(repeats):
            cache = Path(scratch) / f"cache-{repeat}"
            for kind, place in (("bare", None), ("cold", cache), ("warm", cache)):
                runs[kind].append(run(folder, place, calls, rows, options.device))
    for kinds in zip(*runs.values(), strict=True):
        if any(one["outputs"] != kinds[0]["outputs"] for one in kinds):
            raise SystemExit("outputs differ between bare, cold and warm")
    if any(one["misses"] for one in runs["warm"]) or any(one["hits"] for one in runs["cold"]):
        hits = {kind: [(one.get("hits"), one.get("misses")) for one in runs[kind]] for kind in runs}
        raise SystemExit(f"the cold run hit, or the warm run missed: (hits, misses) {hits}")

    def median(kind: str, name: str) -> float:
        return statistics.median(one[name] for one in runs[kind])

    for kind in runs:
        report.add(f"{kind}_calls_s", median(kind, "calls_s"))
        report.add(f"{kind}_process_s", median(kind, "process_s"))
        report.add(f"{kind}_peak_mib", median(kind, "peak_mib"))
    pairs = list(zip(runs["bare"], runs["cold"], runs["warm"], strict=True))
    report.add("cold_over_bare_calls", statistics.median(cold["calls_s"] / bare["calls_s"] for bare, cold, _ in pairs))
    report.add("bare_over_warm_calls", statistics.median(bare["calls_s"] / warm["calls_s"] for bare, _, warm in pairs))
    report.add("bare_over_warm_process", statistics.median(bare["process_s"] / warm["process_s"] for bare, _, warm in pairs))
    report.add("cold_extra_mib", statistics.median(cold["peak_mib"] - bare["peak_mib"] for bare, cold, _ in pairs))
    for name in sorted({name for one in runs["cold"] for name in one["overhead"]}):
        report.add(f"cold_overhead_{name}_s", statistics.median(one["overhead"].get(name, 0.0) for one in runs["cold"]))
    once = ("fingerprint", "probe")
    each = [sum(s for name, s in one["overhead"].items() if name not in once) / one["spent_s"] for one in runs["cold"]]
    whole = [sum(one["overhead"].values()) / one["spent_s"] for one in runs["cold"]]
    report.add("cold_overhead_share_of_each_call", statistics.median(each))
    report.target("cold_overhead_share", statistics.median(whole), "<=", 0.01)
    report.write(options.json)


if __name__ == "__main__":
    main()
