"""Recompute: some stored entries, drawn at random, computed again by the live model and compared. Level 7.5.

What a stored answer *should* be, nothing but the model itself can say. `evalcache verify --recompute N` asks it again, and says
how large the share of wrong answers in the store can be at most, with 95 % confidence.

A *wrong* answer is one that the live model contradicts: another token where that one is clearly less likely, log-probabilities
further away than `TOLERANCE`. Kernels round differently in batches of another shape, so that within the tolerance an answer has
*drifted*, and a token that is as likely as another one may have *flipped*; neither is wrong.
"""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evalcache.canonical import decode
from evalcache.comparing import EXACT, TOLERANCE, compare_scores, first_difference, what_differs
from evalcache.digest import Digest
from evalcache.drawing import bound_of_share, draw
from evalcache.errors import FrameError, LedgerError, UnknownNameError
from evalcache.folder import default_folder, local_folder
from evalcache.frame import Question, decode_question
from evalcache.journal import Overhead, RunEnded
from evalcache.ledger import Ledger
from evalcache.provenance import describe_run
from evalcache.records import Entry, Policy, Result, unpack_tokens
from evalcache.store import Store
from evalcache.structs import Struct, field

if TYPE_CHECKING:
    from evalcache.integrations.recomputing import LiveModel

_PLAIN = {
    "num_beams": (None, 1),
    "do_sample": (None, False),
    "repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
}
_STRATA = "SELECT key, min(task) FROM lookups WHERE key IS NOT NULL AND task <> '' GROUP BY key"


class Recomputation(Struct):
    """What came of it.

    Args:
        model: root of the live model. entries: that it has in the store. drawn: of these.
        exact, drifted, flips: answers that are the stored ones, that are so within the tolerance, and in which tokens that are as
            likely have changed places. wrong: key → what is wrong with the stored answer.
        refused: why the others were not computed again → how many. other_models: entries of other models.
        max_drift, mean_drift: of log-probabilities, in nats; None where none were compared.
    """

    model: Digest
    entries: int = 0
    drawn: int = 0
    exact: int = 0
    drifted: int = 0
    flips: int = 0
    wrong: dict[Digest, str] = field(default_factory=dict)
    refused: Counter[str] = field(default_factory=Counter)
    other_models: int = 0
    max_drift: float | None = None
    mean_drift: float | None = None
    seconds: float = 0.0

    @property
    def recomputed(self) -> int:
        """How many answers were compared."""
        return self.exact + self.drifted + self.flips + len(self.wrong)

    @property
    def bound(self) -> float | None:
        """The largest share of wrong answers that goes with what was found, with 95 % confidence; None where nothing was."""
        return bound_of_share(len(self.wrong), self.recomputed) if self.recomputed else None

    @property
    def good(self) -> bool:
        """Whether no stored answer is wrong."""
        return not self.wrong

    def to_json(self) -> dict[str, Any]:
        """Stable field names."""
        return {
            "good": self.good, "model": str(self.model), "entries": self.entries, "other_models": self.other_models,
            "drawn": self.drawn, "recomputed": self.recomputed, "exact": self.exact, "drifted": self.drifted,
            "flips": self.flips, "wrong": {str(key): why for key, why in self.wrong.items()},
            "not_recomputable": dict(self.refused.most_common()), "max_drift": self.max_drift, "mean_drift": self.mean_drift,
            "wrong_share_bound_95": self.bound, "seconds": self.seconds,
        }  # fmt: skip


def verify(
    model: Any,
    recompute: int = 100,
    *,
    seed: int = 0,
    directory: str | PathLike[str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Recomputation:
    """Have a live model compute stored entries of its own again, and compare.

    Args:
        model: a transformers model. recompute: how many entries to draw, in proportion to what each task asked.
        seed: of the draw: the same store and seed draw the same entries.
        directory: cache folder; None means ``EVALCACHE_DIR`` or the user's cache folder.

    Raises:
        UnknownNameError: the store has no entry of this model. UncacheableError: the model cannot be fingerprinted exactly.

    Cost: a pass over the store, and what computing takes; booked as overhead of a run of its own.
    """
    folder = local_folder(default_folder() if directory is None else Path(directory))
    return _verify(model, folder, recompute, seed, progress)


def verify_checkpoint(
    path: str | None, recompute: int, seed: int, directory: Path, progress: Callable[[int, int], None]
) -> Recomputation:
    """`verify` of the model of a checkpoint, which is loaded as it was when the entries were computed.

    Args:
        path: None means where a model of the store lay, if it is still there. directory: the cache folder.

    Raises:
        UnknownNameError: no checkpoint is known, or it is no model of the store. CheckpointError: it cannot be loaded.
    """
    from evalcache.integrations.recomputing import load_model

    began = time.perf_counter()
    with Store(directory / "store") as store:
        met: Counter[tuple[Digest, Digest]] = Counter()
        for key, frame in store.frames():
            if question := _question(key, frame):
                met[question.model, question.environment] += 1
        names = _names(Ledger(directory / "ledger.duckdb"))
        at = [one for one, _ in met.most_common() if path is None or path in names.get(one[0].hex, ())]
        if path is None:
            here = ((one, name) for one in at for name in names.get(one[0].hex, ()) if Path(name).is_dir())
            one, path = next(here, (None, None))
            at = [] if one is None else [one]
        if path is None:
            hint = "--model FOLDER says where the checkpoint is"
            raise UnknownNameError("no model of the store was loaded from a folder that is still there", hint=hint, found=None)
        chosen = at or [one for one, _ in met.most_common(1)]
        data = store.get_object(f"fields/{chosen[0][1].hex}") if chosen else None
        environment = {} if data is None else decode(data)
    return _verify(load_model(path, environment), directory, recompute, seed, progress, began)


def _verify(
    model: Any, folder: Path, count: int, seed: int, progress: Callable[[int, int], None], began: float | None = None
) -> Recomputation:
    from evalcache.integrations.recomputing import live_model

    began = time.perf_counter() if began is None else began
    started_at = time.time()
    with Store(folder / "store") as store, live_model(model) as live:
        root = live.manifest.root
        questions, others = _questions_of(store, root)
        if not questions:
            hint = "in another dtype it is another one; `evalcache query 'FROM models_in_order'` lists those that were asked"
            raise UnknownNameError(f"the store has no entry of this model, {root}", hint=hint, found=str(root))
        drawn = draw(list(questions), count, seed, _tasks(folder / "ledger.duckdb"))
        found = Recomputation(root, len(questions), len(drawn), other_models=others)
        _compare_all(store, live, {key: questions[key] for key in drawn}, found, progress)
        found.seconds = time.perf_counter() - began
        _book(store, found.seconds, started_at)
        return found


# --- comparing -----------------------------------------------------------------------------------------------------------------


def _compare_all(
    store: Store,
    live: LiveModel,
    questions: Mapping[Digest, Question],
    found: Recomputation,
    progress: Callable[[int, int], None],
) -> None:
    from evalcache.integrations.recomputing import KINDS

    asked = []
    settings_of: dict[Digest, Mapping[str, Any] | None] = {}
    for key, question in questions.items():
        if question.kind not in ("generate", "loglikelihood"):
            found.refused[KINDS.get(question.kind, f"kind {question.kind}")] += 1
        elif question.environment != live.environment.keyed.digest:
            found.refused["computed in another environment: versions, dtype, device or kernels"] += 1
        else:
            if question.settings not in settings_of:
                data = store.get_object(f"fields/{question.settings.hex}")
                settings_of[question.settings] = None if data is None else decode(data)
            settings = settings_of[question.settings]
            if settings is None:
                found.refused["the store has lost its settings"] += 1
            else:
                asked.append((key, question, settings))
    answers, refused = live.ask(asked, progress)
    found.refused.update(refused.values())
    stored = store.get_many([key for key, _, _ in asked])
    differing: list[tuple[Digest, Question, Mapping[str, Any], Result, Result]] = []
    drifts: list[float] = []
    dtype = str(live.environment.keyed.get("dtype"))
    for key, question, settings in asked:
        mine = stored.get(key)
        if key not in answers:
            continue
        if not isinstance(mine, Entry):
            found.refused["the stored entry is damaged or gone"] += 1
        elif question.kind == "loglikelihood":
            state, why, drift = compare_scores(mine.result, answers[key], dtype)
            drifts += [] if drift is None else [drift]
            _count(found, key, state, why)
        elif why := what_differs(mine.result, answers[key]):
            _count(found, key, "wrong", why)
        elif mine.result.tokens == answers[key].tokens:
            found.exact += 1
        else:
            differing.append((key, question, settings, mine.result, answers[key]))
    _weigh(live, differing, found, dtype)
    if drifts:
        found.max_drift, found.mean_drift = max(drifts), sum(drifts) / len(drifts)


def _weigh(
    live: LiveModel,
    differing: Sequence[tuple[Digest, Question, Mapping[str, Any], Result, Result]],
    found: Recomputation,
    dtype: str,
) -> None:
    """Tokens that differ: as likely as each other, or wrong."""
    forks: dict[Digest, tuple[bytes, list[int], int, int]] = {}
    for key, question, _, stored, now in differing:
        one, other = unpack_tokens(stored.tokens).tolist(), unpack_tokens(now.tokens).tolist()
        same = first_difference(one, other)
        forks[key] = (question.tokens, one[:same], one[same], other[same])
    # Penalties and beams choose by more than what is likely.
    plain = [
        key for key, question, settings, _, _ in differing
        if not question.inputs and all(settings.get(name) in neutral for name, neutral in _PLAIN.items())
    ]  # fmt: skip
    margins = dict(zip(plain, live.margins([forks[key] for key in plain]), strict=True))
    for key, (_, common, one, other) in forks.items():
        said, margin = f"token {len(common)} is stored as {one}, computed as {other}", margins.get(key)
        if margin is None:
            _count(found, key, "wrong" if dtype in EXACT else "flips", said)
        elif margin <= TOLERANCE.get(dtype, 0.0):
            found.flips += 1
        else:
            _count(found, key, "wrong", f"{said}, which is {margin:.3g} nats more likely")


def _count(found: Recomputation, key: Digest, state: str, why: str) -> None:
    if state == "wrong":
        found.wrong[key] = why
    else:
        setattr(found, state, getattr(found, state) + 1)


# --- the store -----------------------------------------------------------------------------------------------------------------


def _questions_of(store: Store, root: Digest) -> tuple[dict[Digest, Question], int]:
    """The questions of a model by key, and how many there are of others."""
    questions, others = {}, 0
    for key, frame in store.frames():
        question = _question(key, frame)
        if question is not None and question.model == root:
            questions[key] = question
        else:
            others += question is not None
    return questions, others


def _question(key: Digest, frame: bytes) -> Question | None:
    try:
        return decode_question(key, frame)
    except FrameError:
        return None


def _tasks(ledger: Path) -> dict[str, str]:
    """Key (hex) → task; nothing where the ledger cannot be asked now."""
    try:
        return dict(Ledger(ledger).query(_STRATA).rows)
    except LedgerError:
        return {}


def _names(ledger: Ledger) -> Mapping[str, Sequence[str]]:
    from evalcache.names import names_of_models

    with ledger.reading() as ask:
        return names_of_models(ask)


def _book(store: Store, seconds: float, started_at: float) -> None:
    """The time that it took, as overhead of a run of its own."""
    run, now = uuid.uuid4().hex, time.time()
    began = describe_run(run, Policy.READ_ONLY, "portable")
    events = [began, Overhead(run, now, {"recompute": seconds}), RunEnded(run, now, "ok", 0)]
    store.commit([], events, run=run, created_at=started_at)
