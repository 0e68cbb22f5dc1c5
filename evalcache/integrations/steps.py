"""What is done to a known model before it is asked, so that it may go on sleeping: a smaller vocabulary, an adapter.

lm_eval cuts the vocabulary to the tokenizer's size before it puts an adapter on a model. Such a step is known where it was seen
before, on the same model, with the same arguments, files and versions. What depends on random numbers (new rows of an embedding)
is done each time; what is only drawn and then thrown away is skipped in the script's generators, so that its own draws go on as
they would have.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch

from evalcache.cache import Cache
from evalcache.canonical import digest_canonical
from evalcache.errors import EvalCacheError
from evalcache.identity import CheckpointIndex
from evalcache.integrations.draws import Draws, skip_draws
from evalcache.integrations.known import apply, changed, describe, names_of, runtime
from evalcache.integrations.lazy import UNKNOWN, LazyModel, Sleep, awake, config_digest, is_asleep, sleep_of
from evalcache.integrations.loading import guarded, known_as, note
from evalcache.integrations.packing import class_named, name_of, pack
from evalcache.weights import fingerprint


class Step:
    """One change of a known model, which what it is keyed by determines.

    Args:
        base: the model that is changed in its place; asleep or not. parts: canonical values, of all that shapes what comes of it.

    Raises:
        EvalCacheError: nothing is known of ``base``, or a part has no canonical encoding.
    """

    def __init__(self, cache: Cache, base: Any, parts: list[Any]) -> None:
        self.cache, self.base = cache, base
        known = known_as(base)
        if known is None:
            raise EvalCacheError("a model that is not known", found=type(base).__name__)
        key, self.base_record = known
        sleep = sleep_of(base) if type(base) is LazyModel else None
        device = sleep.device if sleep is not None and sleep.real is None else awake(base).device
        # How far a device's generator goes on depends on the device.
        devices = [torch.cuda.get_device_name(one) for one in range(torch.cuda.device_count())]
        self.index = CheckpointIndex(cache.directory / "checkpoints.sqlite")
        self.key = digest_canonical(["step", key.value, self.base_record["root"], str(device), parts, devices, *runtime()])
        self.record = self.index.recall(self.key)

    @property
    def sleeps(self) -> bool:
        """Whether the base sleeps, and would be what its record says."""
        return is_asleep(self.base) and sleep_of(self.base).manifest() is not None

    def begin(self) -> bool:
        """Note what there is before. False: the base is not what its record says, and nothing can be told of what comes."""
        base = awake(self.base)
        try:
            self._before = copy.deepcopy(base.config), _settings(base)
            same = names_of(base) == self.base_record["names"] and fingerprint(base).root.value == self.base_record["root"]
        except (EvalCacheError, AttributeError):
            return False
        self._draws = Draws()
        return same

    def remember(self, model: Any, more: dict[str, Any]) -> None:
        """Write down what the step has made. Silently not, where that cannot be told exactly.

        Args:
            model: what has come of it. more: what its record holds beside what each has.
        """
        base, (config, settings) = awake(self.base), self._before
        try:
            drawn = self._draws.count()
            if drawn is None or model.training:
                return
            manifest = fingerprint(model)
            changes = changed(config, base.config)
            record = describe(model, manifest) | {"config": changes, "drawn": drawn} | more
            apply(config, changes)
            if config_digest(config) == config_digest(base.config) and settings == _settings(base):
                self.cache.put_object(f"model/{manifest.root.hex}", manifest.to_bytes())
                self.index.remember(self.key, record)
                self.record = record
        except (EvalCacheError, OSError, ValueError, TypeError, AttributeError):
            return  # it will be done again next time: slower, and as right


def _settings(model: Any) -> Any:
    return model.generation_config.to_dict() if model.can_generate() else None


# --- a smaller vocabulary -----------------------------------------------------------------------------------------------------


def resize(cache: Cache, model: Any, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``resize_token_embeddings``: a sleeping model sleeps on where it only loses rows and has lost them before.

    Args:
        original: the untouched method, of no instance.
    """
    step = guarded(cache, lambda: _find_resize(cache, model, original, args, kwargs))
    if step is not None and step.record is not None and cache.policy.reads:
        embeddings = guarded(cache, lambda: _resize_asleep(step, original, args, kwargs))
        if embeddings is not None:
            return embeddings
    real = awake(model)
    new = step is not None and step.record is None and cache.policy.writes and guarded(cache, step.begin)
    rows = _rows(real) if new else []
    embeddings = original(real, *args, **kwargs)
    if new and all(now <= before for before, now in zip(rows, _rows(real), strict=True)):
        more = {"names": names_of(real), "embeddings": name_of(type(embeddings))}
        guarded(cache, lambda: step.remember(real, more))
    if step is not None and step.record is not None:
        note(model, step.key, step.record)
    return embeddings


def _find_resize(
    cache: Cache, model: Any, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Step | None:
    try:
        given = dict(inspect.signature(original).bind(None, *args, **kwargs).arguments)
        given.pop("self")
        return Step(cache, model, ["resize", {name: pack(value) for name, value in given.items()}])
    except (EvalCacheError, TypeError):
        return None


def _resize_asleep(step: Step, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not step.sleeps:
        return None
    sleep = sleep_of(step.base)
    embeddings = class_named(step.record["embeddings"])

    def load(before: Callable[[], Any]) -> Any:
        real = before()
        original(real, *args, **kwargs)
        return real

    if not sleep.become(step.key, step.record, load):
        return None
    apply(sleep.hollow.config, step.record["config"])
    sleep.trust_config()
    skip_draws(step.record["drawn"])
    return LazyModel(_PartSleep(sleep, embeddings))


def _rows(model: Any) -> list[int]:
    """How many rows the embeddings have, of the input's and the output's."""
    both = model.get_input_embeddings(), model.get_output_embeddings()
    return [0 if one is None else int(one.weight.shape[0]) for one in both]


class _PartSleep(Sleep):
    """What a `LazyModel` knows that stands for the embeddings of a sleeping model: their class."""

    adapted = True

    def __init__(self, whole: Sleep, cls: type) -> None:
        self.cls, self.real, self.hollow, self.above, self._whole = cls, None, None, [], whole

    def answer(self, model: LazyModel, name: str) -> Any:
        return UNKNOWN

    def lacks(self, name: str) -> bool:
        return False

    def wake(self) -> Any:
        """The embeddings, once the whole model is there."""
        if self.real is None:
            self.real = self._whole.wake().get_input_embeddings()
        return self.real
