"""The text of the demo: the documentation strings of the Python standard library, which every machine with Python has."""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HELD_OUT_EVERY = 5  # one documentation string of five is asked about, and never trained on
CONTEXT_WORDS = 20
ANSWER_WORDS = 5


def read_docstrings() -> list[str]:
    """Collects the documentation strings of the standard library, each once and with its white space evened, in a fixed order."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, None] = {}
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"} & set(path.relative_to(root).parts):
            continue
        found.update(dict.fromkeys(_docstrings_of(path)))
    return list(found)


def _docstrings_of(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):  # templates and test data lie among the modules
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = " ".join((ast.get_docstring(node) or "").split())
            if len(text) > 20:
                yield text


def split(docstrings: list[str]) -> tuple[list[str], list[str]]:
    """Splits into (trained on, held out)."""
    held_out = docstrings[::HELD_OUT_EVERY]
    return [text for index, text in enumerate(docstrings) if index % HELD_OUT_EVERY], held_out


def make_questions(held_out: list[str], count: int, seed: int = 0) -> list[dict[str, object]]:
    """Makes multiple-choice questions: how does this text go on? Three of four choices are how others went on; chance is 25 %.

    Args:
        held_out: texts that the model was not trained on.
        count: how many questions; long texts give several.
        seed: of the order and of the wrong choices.

    Returns:
        ``{"context": str, "choices": [str, str, str, str], "answer": int}`` for each.
    """
    found: dict[str, str] = {}  # by context, so that no question is asked twice
    for text in held_out:
        words = text.split()
        for start in range(0, len(words) - CONTEXT_WORDS - ANSWER_WORDS + 1, CONTEXT_WORDS + ANSWER_WORDS):
            middle = start + CONTEXT_WORDS
            found[" ".join(words[start:middle])] = " ".join(words[middle : middle + ANSWER_WORDS])
    pieces = list(found.items())
    draw = random.Random(seed)
    draw.shuffle(pieces)
    if len(pieces) < count:
        raise SystemExit(f"the standard library's documentation gives only {len(pieces)} questions of the {count} asked for")
    answers = sorted({answer for _, answer in pieces})
    questions: list[dict[str, object]] = []
    for context, answer in pieces[:count]:
        choices = [*draw.sample([other for other in answers if other != answer], 3), answer]
        draw.shuffle(choices)
        questions.append({"context": context, "choices": choices, "answer": choices.index(answer)})
    return questions
