"""Answers of two models to the same request, with the words marked in which they differ. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from evalcache.printing import plain
from evalcache.report.compare import Compared, compare
from evalcache.report.gather import Pair
from evalcache.report.tables import one_line
from evalcache.structs import Frozen

_MOST_QUESTION = 700


class Side(Frozen):
    """One answer: its parts (differs, text), how many of its letters are left out, why it ended, and its key."""

    parts: list[tuple[bool, str]]
    cut: int
    finish_reason: str
    seconds: float | None
    key: str


class Answers(Frozen):
    """Two answers. title: the task and document, where they are known. question: likewise. of: what is shown of the answers."""

    title: str
    question: str
    of: str
    left: Side
    right: Side


def answers(pair: Pair) -> list[Answers]:
    """The answers of a pair that differ, as they are shown."""
    return [_answers(row) for row in pair.answers]


def _answers(row: Mapping[str, Any]) -> Answers:
    task = ":".join(filter(None, (row["client"], row["task"])))
    title = one_line(", ".join(filter(None, (task, row["document"] and f"document {row['document']}"))) or "request", 120)
    of, texts = _texts(row)
    found: Compared = compare(*texts)
    sides = [
        Side(parts, cut, row[f"finish_reason_{side}"] or "", row[f"seconds_{side}"], row[f"key_{side}"])
        for side, parts, cut in (("a", found.left, found.cut[0]), ("b", found.right, found.cut[1]))
    ]
    return Answers(title, _question(row["content"]), of, *sides)


def _texts(row: Mapping[str, Any]) -> tuple[str, tuple[str, str]]:
    """What is compared: texts, where both have one that differs; else named values; else token ids."""
    if row["text_a"] is not None and row["text_b"] is not None and row["text_a"] != row["text_b"]:
        return "text", (row["text_a"], row["text_b"])
    named = tuple(_named(row[f"scalars_{side}"]) for side in "ab")
    if named[0] != named[1]:
        return "values", (named[0], named[1])
    ids = tuple(" ".join(map(str, row[f"token_ids_{side}"] or [])) for side in "ab")
    return "token ids (no text was kept)", (ids[0], ids[1])


def _named(scalars: str | None) -> str:
    try:
        values = json.loads(scalars or "{}")
    except ValueError:
        return scalars or ""
    return "\n".join(f"{name}: {plain(value)}" for name, value in values.items()) if isinstance(values, dict) else str(values)


def _question(content: str | None) -> str:
    """What a document asks: its question, where it names one, else all of it."""
    if not content:
        return ""
    try:
        found = json.loads(content)
    except ValueError:
        found = content
    if isinstance(found, dict):
        named = (found.get(name) for name in ("question", "query", "prompt", "input", "ctx", "text"))
        found = next((value for value in named if isinstance(value, str) and value), json.dumps(found, ensure_ascii=False))
    text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
    return text if len(text) <= _MOST_QUESTION else f"{text[:_MOST_QUESTION]}…"
