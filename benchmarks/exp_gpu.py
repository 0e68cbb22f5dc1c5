"""The same on a GPU, in one command: fingerprint and check of a 7B-shaped random model in device memory, and a whole run.

* ``fingerprint``: xxh3 over every byte, copied to the host once;
* ``check``: position-weighted sums made on the device, which every later check costs;
* ``run``: bare, cold and warm as in exp_run, on the device.

Without a GPU it says so and ends with exit code 3: nothing is measured on anything else under this name.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from harness import Report, arguments, hardware, hardware_line

STEPS = 128


def main() -> None:
    """Run the experiment."""
    parser = arguments("exp_gpu", __doc__.splitlines()[0])
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("exp_gpu: no GPU here, nothing measured", file=sys.stderr)
        raise SystemExit(3)
    from transformers import LlamaConfig, LlamaForCausalLM

    from evalcache.weights import Fingerprinter

    found = hardware(["torch", "transformers"]) | {"gpu": torch.cuda.get_device_name()}
    print(f"{found['gpu']}; {hardware_line(found)}")
    report = Report("exp_gpu", options.quick, found)
    layers = 4 if options.quick else 32
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        max_position_embeddings=4096,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    size_gb = sum(p.nbytes for p in model.parameters()) / 1e9
    report.add("model_gb", size_gb)
    fingerprinter = Fingerprinter(model)

    def seconds() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        fingerprinter.manifest()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    first_s = seconds()
    seconds()
    check_s = statistics.median(seconds() for _ in range(9))
    report.add("fingerprint_s", first_s)
    report.add("fingerprint_gb_per_s", size_gb / first_s)
    report.add("check_s", check_s)
    report.add("check_gb_per_s", size_gb / check_s)
    before = fingerprinter.manifest().root
    with torch.no_grad():
        model.lm_head.weight[5, 7] += 1
    if fingerprinter.manifest().root == before:
        raise SystemExit("a changed weight was not seen")
    ids = torch.randint(3, 32000, (8, 64), device="cuda")

    def generate() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, do_sample=False)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    generate()
    call_s = statistics.median(generate() for _ in range(3))
    report.add(f"generate_{STEPS}_steps_s", call_s)
    report.add("check_in_decoding_steps", check_s / (call_s / STEPS))
    report.target("check_share_of_call", check_s / call_s, "<=", 0.01)
    report.write(options.json)
    model.to("cpu")
    torch.cuda.empty_cache()
    here = Path(__file__).parent
    quick = ["--quick"] if options.quick else []
    path = options.json.with_name("exp_gpu_run.json")
    raise SystemExit(
        subprocess.run([sys.executable, here / "exp_run.py", "--device", "cuda", "--json", path, *quick], check=False).returncode
    )


if __name__ == "__main__":
    main()
