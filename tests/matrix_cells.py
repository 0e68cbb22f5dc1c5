"""What each cell of the matrix must show: a client's requests of a variant, as what they are and not as evalcache keys them.

Two requests are one evaluation if they are equal here: the same model, the same tokens, the same settings as far as they act.
Which client asks is part of a request only where the client's own cutting shapes the text.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from matrix_model import QUESTIONS, STOPS, TEXTS, asked_plainly
from variants import VARIANTS, WORD, Variant

CLIENTS = ("script", "lm_eval", "lighteval", "inspect_ai", "serve")
Cell = tuple[str, str]
"""(client, variant)"""

NOT_POSSIBLE: dict[Cell, str] = {
    ("lighteval", "LoRA adapter"): "lighteval 0.13.0 asks for peft 0.3.0 before it loads an adapter",
    ("serve", "LoRA adapter"): "`transformers serve` asks for a config.json beside the adapter, and then for weights",
}


def requests(client: str, name: str) -> list[tuple[Hashable, ...]]:
    """Everything that a client asks of a variant, in terms that are equal where one answer is the other's."""
    variant = VARIANTS[name]
    model = (variant.model or name, variant.dtype)
    return [(model, *one) for one in _ASKS[client](variant)]


def _tokens(variant: Variant, text: str) -> Hashable:
    """The ids of a text: those of the other tokenizer are others where its missing merge would have been used."""
    return (text, variant.merges if WORD in text else "")


def _chat(variant: Variant, question: str) -> Hashable:
    return ("chat", variant.template, _tokens(variant, question))


def _scores(variant: Variant, softmax: str) -> list[tuple[Hashable, ...]]:
    """Log-likelihoods: whoever asks, and whatever the generation config says."""
    return [
        ("score", softmax, _tokens(variant, asked_plainly(question)), _tokens(variant, " " + choice))
        for question, choices in QUESTIONS
        for choice in choices
    ]


def _windows(variant: Variant) -> list[tuple[Hashable, ...]]:
    return [("score", variant.dtype, "start", _tokens(variant, text)) for text in TEXTS]


def _greedy(variant: Variant, prompts: Iterable[Hashable], *settings: Hashable) -> list[tuple[Hashable, ...]]:
    """Generations: the setting in the generation config acts in all clients."""
    return [("greedy", prompt, variant.penalty, *settings) for prompt in prompts]


def _plain(variant: Variant) -> list[Hashable]:
    return [_tokens(variant, asked_plainly(question)) for question, _ in QUESTIONS]


def _chats(variant: Variant) -> list[Hashable]:
    return [_chat(variant, question) for question, _ in QUESTIONS]


def _script(variant: Variant) -> list[tuple[Hashable, ...]]:
    return [
        *_scores(variant, "float32"),  # in which `loglikelihood` makes log-probabilities, unless told otherwise
        *_greedy(variant, _plain(variant)),
        *_greedy(variant, _chats(variant)),
        *_greedy(variant, _chats(variant), "renormalised"),
        *_greedy(variant, _chats(variant), STOPS, variant.merges),  # where a stop string begins is the tokenizer's
    ]


def _lm_eval(variant: Variant) -> list[tuple[Hashable, ...]]:
    return [
        *_scores(variant, variant.dtype),
        *_windows(variant),
        *_greedy(variant, _plain(variant)),
        *_greedy(variant, _plain(variant), "cut by lm_eval", STOPS, variant.merges),
        *_greedy(variant, _chats(variant)),
    ]


def _lighteval(variant: Variant) -> list[tuple[Hashable, ...]]:
    return [
        *_scores(variant, variant.dtype),
        *_greedy(variant, _plain(variant), "cut by lighteval", STOPS, variant.merges),
        *_greedy(variant, _chats(variant), "renormalised"),
    ]


def _inspect_ai(variant: Variant) -> list[tuple[Hashable, ...]]:
    return [*_greedy(variant, _chats(variant)), *_greedy(variant, _chats(variant), STOPS, variant.merges)]


def _serve(variant: Variant) -> list[tuple[Hashable, ...]]:
    return _greedy(variant, _chats(variant))


_ASKS = {
    "script": _script,
    "lm_eval": _lm_eval,
    "lighteval": _lighteval,
    "inspect_ai": _inspect_ai,
    "serve": _serve,
}


@dataclass(frozen=True)
class Counts:
    """What a cell shows."""

    hits: int
    misses: int

    def __str__(self) -> str:
        return f"{self.hits} + {self.misses}"


def expected(order: Sequence[Cell]) -> dict[Cell, Counts]:
    """What each cell shows when they are run in this order, beginning with an empty store."""
    stored: set[Hashable] = set()
    found = {}
    for cell in order:
        asked = requests(*cell)
        assert len(set(asked)) == len(asked), cell
        hits = sum(one in stored for one in asked)
        found[cell] = Counts(hits, len(asked) - hits)
        stored.update(asked)
    return found


def cells(clients: Sequence[str] = CLIENTS, names: Iterable[str] = tuple(VARIANTS)) -> list[Cell]:
    """Client by client, and of each client variant by variant; without what is not possible."""
    names = list(names)
    return [(client, name) for client in clients for name in names if (client, name) not in NOT_POSSIBLE]
