"""Makes a store that later versions have to open and to hit: `tests/stores/<name>.tar.xz`, read by `test_versions`.

    .venv/bin/python tests/stores/make.py v1

Run once for each version of a format (KEY_VERSION, FRAME_VERSION, the ledger's schema, the export), never again: what it made is
not to be replaced. A small real model, built from a seed, is asked greedily, by sampling and for log-probabilities, through the
public names alone; then one event of each kind is left in the journal, as a run that was killed before its last sync leaves them.

``asked.json`` in it says what was asked and answered, in JSON and apart from every format of evalcache's own.
"""

from __future__ import annotations

import json
import os
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def plain(value: Any) -> Any:
    """As JSON that can be turned back: bytes and tuples are marked."""
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, float):
        return {"float": value.hex()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "items"):
        return {"map": [[name, plain(item)] for name, item in value.items()]}
    return value


def restored(value: Any) -> Any:
    """What `plain` was given."""
    if isinstance(value, list):
        return [restored(item) for item in value]
    if isinstance(value, dict):
        ((kind, inner),) = value.items()
        if kind == "map":
            return {name: restored(item) for name, item in inner}
        return bytes.fromhex(inner) if kind == "bytes" else float.fromhex(inner)
    return value


def fill(folder: Path) -> None:
    """Ask the model, as a script would."""
    import evalcache

    evalcache.enable(folder)
    import tiny
    import torch
    import words

    model, batch = tiny.build("llama"), tiny.prompts()
    model.generate(**batch, max_new_tokens=6, do_sample=False)
    model.generate(**batch, max_new_tokens=4, do_sample=False, output_scores=True, return_dict_in_generate=True)
    torch.manual_seed(0)
    model.generate(**batch, max_new_tokens=6, do_sample=True)
    pairs = [("the cache keeps", " what the model said"), ("a question has", " one answer"), ("a question has", " one key")]
    evalcache.loglikelihood(model, words.train_tokenizer(), pairs)
    evalcache.disable()


def events() -> list[Any]:
    """One of each kind that a journal of this version may hold."""
    from evalcache import journal as kinds

    run, model = "ef" * 16, bytes(range(16))
    known = [
        kinds.RunStarted(run, 1e9, "python eval.py", "lm_eval", "0.4", {"torch": "2"}, "c0ffee", "host", tags=("kept",)),
        kinds.ModelSeen(run, model, "kept", "judge"),
        kinds.ModelLoaded(run, model, 1.5),
        kinds.LookedUp(run, 1e9, model, "", "", (b"",), ("uncacheable",), ("streamer",), (0.5,), ("task",), ("document",)),
        kinds.Overhead(run, 1e9, {"lookup": 0.25}),
        kinds.Measured(run, 1e9, "a device", 2, 1024, 12.5),
        kinds.TaskSeen(run, "lm_eval", "task", "1", {"shots": 5}),
        kinds.DocumentsSeen(run, "lm_eval", "task", ("document",), (model,), ('{"q": "?"}',)),
        kinds.Scored(run, "lm_eval", "task", "judge", ("document",), ("acc",), (1.0,), ("",), (b"",)),
        kinds.RunEnded(run, 1e9 + 5, "ok", 0),
    ]
    if hasattr(kinds, "Removed"):
        known.append(kinds.Removed(run, 1e9, (bytes(16),), "asked"))
    return known


def describe(folder: Path) -> dict[str, Any]:
    """What was asked and answered, by key."""
    from evalcache import frame, key, schema
    from evalcache.canonical import decode
    from evalcache.store import Store

    entries = {}
    with Store(folder / "store") as store:
        for digest, data in store.frames():
            entry, question = frame.decode_entry(digest, data), frame.decode_question(digest, data)
            result = entry.result
            entries[digest.hex] = {
                "kind": question.kind,
                "model": question.model.hex,
                "tokens": plain(question.tokens),
                "inputs": plain(question.inputs),
                "settings": plain(decode(store.get_object(f"fields/{question.settings.hex}"))),
                "environment": plain(decode(store.get_object(f"fields/{question.environment.hex}"))),
                "recorded": plain(question.recorded),
                "result": {
                    "tokens": plain(result.tokens),
                    "text": result.text,
                    "logprobs": plain(result.logprobs),
                    "finish_reason": result.finish_reason,
                    "scalars": plain(result.scalars),
                    "arrays": {name: [one.dtype, list(one.shape), one.data.hex()] for name, one in result.arrays.items()},
                },
            }
        waiting = [type(event).__name__ for _, event in store.waiting.read()]
    versions = {"key": key.KEY_VERSION, "frame": frame.FRAME_VERSION, "schema": schema.VERSION}
    return {"versions": versions, "entries": entries, "waiting": waiting}


def main(name: str) -> None:
    """Make one."""
    target = HERE / f"{name}.tar.xz"
    if target.exists():
        sys.exit(f"{target} is kept as it is")
    sys.path.insert(0, str(HERE.parent))
    os.environ.update(HF_HUB_OFFLINE="1", EVALCACHE_QUIET="1")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / name
        folder.mkdir()
        fill(folder)
        from evalcache.exchange import export_entries
        from evalcache.store import Store

        with Store(folder / "store") as store:
            export_entries(store, folder / "entries.export")
            store.commit([], events(), {}, run="ef" * 16, created_at=1e9)
        (folder / "asked.json").write_text(json.dumps(describe(folder), indent=1))
        for left in [*folder.glob("*.lock"), *folder.glob("*.sqlite*")]:
            left.unlink()
        with tarfile.open(target, "w:xz") as archive:
            archive.add(folder, arcname=name)
    print(target, target.stat().st_size)


if __name__ == "__main__":
    main(*sys.argv[1:])
