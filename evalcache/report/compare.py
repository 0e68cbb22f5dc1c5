"""Two texts side by side: which words of each the other does not have. Pure."""

from __future__ import annotations

import collections
import difflib
import re

from evalcache.structs import Frozen

MOST_LETTERS = 1200  # of each text; what is longer is cut, and the page says so
_MOST_EQUALS = 20_000  # pairs of equal words: a text of one word, over and over, would take seconds
_WORDS = re.compile(r"\w+\s*|[^\w\s]\s*|\s+")


class Compared(Frozen):
    """Both texts in parts (differs, text); cut: the letters of each that are not shown."""

    left: list[tuple[bool, str]]
    right: list[tuple[bool, str]]
    cut: tuple[int, int]


def compare(left: str, right: str) -> Compared:
    """Find the words in which two texts differ.

    >>> found = compare("the answer is 4", "the answer is five")
    >>> found.left, found.right
    ([(False, 'the answer is'), (False, ' '), (True, '4')], [(False, 'the answer is'), (False, ' '), (True, 'five')])
    """
    ours, theirs = _WORDS.findall(left[:MOST_LETTERS]), _WORDS.findall(right[:MOST_LETTERS])
    while _equals(ours, theirs) > _MOST_EQUALS:
        ours, theirs = ours[: len(ours) // 2], theirs[: len(theirs) // 2]
    # Words are alike whatever white space follows them. Not autojunk: it is for files of code, and leaves frequent words out.
    matcher = difflib.SequenceMatcher(None, [word.rstrip() for word in ours], [word.rstrip() for word in theirs], autojunk=False)
    sides: tuple[list[tuple[bool, str]], list[tuple[bool, str]]] = ([], [])
    for kind, a, a_end, b, b_end in matcher.get_opcodes():
        for side, words in ((sides[0], ours[a:a_end]), (sides[1], theirs[b:b_end])):
            text = "".join(words)
            side += [part for part in ((kind != "equal", text.rstrip()), (False, text[len(text.rstrip()) :])) if part[1]]
    return Compared(*sides, (len(left) - sum(map(len, ours)), len(right) - sum(map(len, theirs))))


def _equals(left: list[str], right: list[str]) -> int:
    counts = collections.Counter(word.rstrip() for word in right)
    return sum(counts[word.rstrip()] for word in left)
