"""Text of other people on its way to a terminal."""

from __future__ import annotations

import unicodedata

_HIDDEN = frozenset({"Cc", "Cf", "Cs"})
"""Control signs, formatting (turns of direction, joiners), lone surrogates."""


def visible(text: str) -> str:
    r"""``text`` with everything that could move a cursor or turn a line around made visible; line ends and tabs stay.

    >>> visible("a\x1b[2Jb\u202ec")
    'a\\x1b[2Jb\\u202ec'
    """
    return "".join(
        letter if letter in "\n\t" or unicodedata.category(letter) not in _HIDDEN else ascii(letter)[1:-1] for letter in text
    )
