"""The questions of the matrix, and a small model that has learned to answer them: the demo's model and training, little text."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from variants import CHAT_TEMPLATE, WORD

DEMO = Path(__file__).parent.parent / "scripts" / "demo_eval"

# (question, choices, of which the first is the answer that it learns). Half of them have the word without which the other
# tokenizer's ids are the same.
QUESTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("What closes the file", ("close it in the end", "remove the first line", "a number is given")),
    ("Return the keys of the map", ("a list of names", "the shape of the array", "raise an error at once")),
    ("Where is the log", ("below the folder of the user, beside its settings", "in memory", "the value is not known")),
    ("Convert a string", ("use str and encode it as bytes, or a number", "it is a list", "the same class")),
    ("Raise an error", ("with a message", "without a name", "only if asked for, or else go on as before")),
    ("Is a list sorted", ("no, call sort on it", "yes", "it depends on a key function")),
)
TEXTS = (
    "Is a list sorted? no, call sort on it. Raise an error with a message.",
    "Where is the log? below the folder of the user.",
)
STOPS = (",", " a")


def asked_plainly(question: str) -> str:
    """A question as a prompt without a chat."""
    return f"Question: {question}? Answer:"


@contextlib.contextmanager
def _demo() -> Iterator[tuple[Any, Any]]:
    """The demo's own code, whose modules lie outside of any package."""
    sys.path.insert(0, str(DEMO))
    try:
        yield importlib.import_module("train"), importlib.import_module("corpus")
    finally:
        sys.path.remove(str(DEMO))
        for name in ("train", "corpus"):
            sys.modules.pop(name, None)


def train_model(folder: Path, *, steps: int = 70) -> Path:
    """Save the model with its tokenizer and a chat template.

    Cost: some seconds.
    """
    import shutil as documented

    with _demo() as (train, corpus), torch.random.fork_rng(devices=[]):
        answered = [f"{asked_plainly(question)} {choices[0]}" for question, choices in QUESTIONS]
        chats = [f"user: {question}<end>assistant: {choices[0]}" for question, choices in QUESTIONS]
        # The tokenizer needs more text than that, the model does not.
        texts = [*corpus._docstrings_of(Path(documented.__file__)), *answered, *chats, *TEXTS]
        tokenizer = train.train_tokenizer(texts)
        tokenizer.chat_template = CHAT_TEMPLATE
        assert len(tokenizer.encode(WORD)) == 1
        train.BATCH, train.WIDTH, train.tqdm = 4, 48, functools.partial(train.tqdm, disable=True)
        model = train.make_model(tokenizer)
        tokens = train.encode_all(tokenizer, [*answered, *chats, *TEXTS])
        train.train(model, tokens, steps, list(model.parameters()), rate=3e-3)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder
