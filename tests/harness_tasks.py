"""Local tasks for lm-evaluation-harness, of every kind of request, and a tiny model that answers them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import words
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

ALL = ("tiny_mc", "tiny_letters", "tiny_ppl", "tiny_gen", "tiny_sampled")
_WORDS = sorted({word for sentence in words.SENTENCES for word in sentence.split()})
TEXTS = [
    *words.SENTENCES,
    "Question: what is the capital of this? Answer: yes no maybe A B C D",
    "(A) (B) (C) (D) one two three four five six seven eight nine ten.\n\n",
]

_CHOICE = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
_MATCH = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True}
_TASKS: dict[str, dict[str, Any]] = {
    "tiny_mc": {  # several tokens a choice
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}} Answer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [_CHOICE, _CHOICE | {"metric": "acc_norm"}],
    },
    "tiny_letters": {  # one token a choice: four requests, one forward
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}} (A) {{A}} (B) {{B}} (C) {{C}} (D) {{D}} Answer:",
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": "answer",
        "metric_list": [_CHOICE],
    },
    "tiny_ppl": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "tiny_gen": {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}} Answer:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n", "."], "max_gen_toks": 16, "do_sample": False},
        "metric_list": [_MATCH],
    },
    "tiny_sampled": {  # two draws a document
        "output_type": "generate_until",
        "repeats": 2,
        "doc_to_text": "Question: {{question}} Answer:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": True, "temperature": 0.8, "top_p": 0.95},
        "filter_list": [{"name": "first", "filter": [{"function": "take_first"}]}],
        "metric_list": [_MATCH],
    },
}
DOCUMENTS = {"tiny_mc": 8, "tiny_letters": 6, "tiny_ppl": 5, "tiny_gen": 8, "tiny_sampled": 4}
REQUESTS = {"tiny_mc": 32, "tiny_letters": 24, "tiny_gen": 8, "tiny_sampled": 1}
"""Lookups of a whole run; a long text of ``tiny_ppl`` is one for each window, and a sampled call is one as a whole."""


def make_tasks(folder: Path, *, documents: int | None = None, **changes: dict[str, Any]) -> Path:
    """Write the tasks and their documents; ``changes`` are further settings by task.

    Args:
        documents: of each task; None means `DOCUMENTS`.
    """
    draw = random.Random(0)

    def text(count: int) -> str:
        return " ".join(draw.choice(_WORDS) for _ in range(count))

    makers = {
        "tiny_mc": lambda: {"question": text(draw.randint(4, 14)), "choices": [text(draw.randint(2, 6)) for _ in range(4)]},
        "tiny_letters": lambda: {"question": text(draw.randint(4, 14)), **{letter: text(3) for letter in "ABCD"}},
        "tiny_ppl": lambda: {"text": text(draw.choice((8, 30, 250)))},
        "tiny_gen": lambda: {"question": text(draw.randint(3, 12))},
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, task in _TASKS.items():
        make = makers.get(name, makers["tiny_gen"])
        rows = [
            make() | {"answer": draw.randrange(4) if "letters" in name or "mc" in name else text(1)}
            for _ in range(documents or DOCUMENTS[name])
        ]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        whole = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(path)}},
            "test_split": "test",
            "fewshot_split": "test",
            "metadata": {"version": 1.0},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(whole | task | changes.get(name, {})))
    return folder


def make_model(folder: Path, seed: int = 0, *, tokenizer: Any = None, **config: Any) -> Path:
    """Save a tiny llama with a tokenizer that has a chat template."""
    tokenizer = tokenizer or words.train_tokenizer(TEXTS, 384)
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": 384,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.15,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    LlamaForCausalLM(LlamaConfig(**(settings | config))).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
