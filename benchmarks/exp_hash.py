"""How fast a model is fingerprinted, beside the bare hash functions over the same bytes.

A Llama of 1.9 GB in bf16, filled with random bits, is hashed where it lies: live in memory, and as safetensors in page cache.
Per place, in turns:

* **ours**: the whole fingerprint, with modules, attributes, code, headers and the manifest; live also as a *check*, which is the
  same pass over all bytes when the model was fingerprinted before;
* **xxh3_128**: the tensors' (or the mapped file's) bytes, one after the other, by one thread; and by two, as we do;
* **sha256**: the same by one thread.
"""

from __future__ import annotations

import hashlib
import mmap
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import xxhash
from harness import Report, arguments, hardware, hardware_line, ratio, side_by_side
from torch import nn

from evalcache.checkpoint import fingerprint_checkpoint
from evalcache.filememo import FileMemo
from evalcache.weights import Fingerprinter

FULL = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 18, "num_attention_heads": 16, "vocab_size": 32_000}
QUICK = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "num_attention_heads": 16, "vocab_size": 32_000}
_PIECE_BYTES = 8 << 20


def make_model(settings: dict[str, int], seed: int = 0) -> nn.Module:
    """A Llama in bf16 whose parameters and buffers are random bits: hashing does not care, and drawing normals takes minutes."""
    config = transformers.LlamaConfig(**settings, tie_word_embeddings=False, dtype="bfloat16")
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu").eval()
    draw = np.random.default_rng(seed)
    for tensor in model.state_dict(keep_vars=True).values():
        bits = tensor.detach().view(-1).view(torch.uint8).numpy()
        bits[:] = np.frombuffer(draw.bytes(bits.nbytes), np.uint8)
    for buffer in model.buffers():
        nn.init.ones_(buffer)
    return model


def tensor_bytes(model: nn.Module) -> list[memoryview]:
    """The bytes of all tensors of a model, in place."""
    tensors = [*model.parameters(), *model.buffers()]
    return [memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy()) for tensor in tensors]


def bare(read: Callable[[], list[memoryview]]) -> dict[str, Callable[[], Any]]:
    """The bare hash functions over the buffers that ``read`` gives, in the order they lie."""

    def one_thread(function: Callable[[], Any]) -> bytes:
        state = function()
        for buffer in read():
            state.update(buffer)
        return state.digest()

    def two_threads() -> list[bytes]:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(xxhash.xxh3_128_digest, read()))

    return {
        "xxh3": lambda: one_thread(xxhash.xxh3_128),
        "xxh3_two_threads": two_threads,
        "sha256": lambda: one_thread(hashlib.sha256),
    }


def mapped(file: Path) -> list[memoryview]:
    """A file in memory, in pieces of 8 MiB; mapped anew, as by every reader, so that its page faults count."""
    with file.open("rb") as handle:
        data = memoryview(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))
    return [data[start : start + _PIECE_BYTES] for start in range(0, len(data), _PIECE_BYTES)]


def compare(report: Report, place: str, cases: dict[str, Callable[[], Any]], size_bytes: int, repeats: int) -> None:
    """Time the cases in turns and note their speeds; every case that is ours is held against the bare hash."""
    for case in cases.values():
        case()  # page cache, imports, what is computed once for each class
    seconds = side_by_side(cases, repeats)
    for name, taken in seconds.items():
        report.add(f"{place}_{name}_gb_per_s", size_bytes / 1e9 / min(taken))
    for name in cases:
        if name.startswith("ours"):
            report.target(f"{place}_{name}_over_xxh3", ratio(seconds, "xxh3", name), ">=", 0.9)
            report.add(f"{place}_{name}_over_xxh3_two_threads", ratio(seconds, "xxh3_two_threads", name))
            report.add(f"{place}_{name}_over_sha256", ratio(seconds, "sha256", name))


def main() -> None:
    parser = arguments("exp_hash", __doc__.splitlines()[0])
    options = parser.parse_args()
    repeats = 3 if options.quick else 7
    found = hardware(["torch", "transformers", "xxhash"])
    report = Report("exp_hash", options.quick, found)
    print(hardware_line(found))

    transformers.utils.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    model = make_model(QUICK if options.quick else FULL)
    buffers = tensor_bytes(model)
    size_bytes = sum(buffer.nbytes for buffer in buffers)
    report.add("live_size_gb", size_bytes / 1e9)
    known = Fingerprinter(model)
    live = {"ours": lambda: Fingerprinter(model).manifest(), "ours_check": known.manifest}
    compare(report, "live", live | bare(lambda: buffers), size_bytes, repeats)

    with tempfile.TemporaryDirectory(prefix="exp_hash") as folder:
        model.save_pretrained(folder, max_shard_size="100GB")
        file = Path(folder, "model.safetensors")
        memo = FileMemo(Path(folder, "memo"))
        stored = {"ours": lambda: fingerprint_checkpoint(folder, memo=memo, rehash=True)}
        compare(report, "file", stored | bare(lambda: mapped(file)), file.stat().st_size, repeats)
    report.write(options.json)


if __name__ == "__main__":
    main()
