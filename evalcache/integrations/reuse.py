"""Reuse: a forward begins where the model is the same as one that has read the row before.

The states that are kept, the rows that may use them, whether that pays, and the proof that it is exact: on the first use of each
depth of a kind of model a few rows are computed both ways, and a difference switches the matter off for that kind.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn

from evalcache.amounts import parse_bytes
from evalcache.cache import Cache
from evalcache.canonical import decode, digest_canonical, encode_canonical
from evalcache.code import is_library_class, version_of
from evalcache.components import Stack, chain, made_of, shared_depth
from evalcache.digest import Digest
from evalcache.environment import device_name
from evalcache.errors import CanonicalError, StoreError, UncacheableError
from evalcache.integrations.pace import Pace
from evalcache.integrations.probe import batch_dependent
from evalcache.integrations.rowstates import are_close, join_rows, same_bits, split_row, tensors_in
from evalcache.integrations.stacks import Boundary, capturing, find_stack, layers_of, resuming
from evalcache.journal import Resumed
from evalcache.manifest import Manifest
from evalcache.records import Environment, pack_tokens
from evalcache.states import State, States
from evalcache.structs import Struct, field
from evalcache.tensors import owned_tensors
from evalcache.watch import Batch, Watch
from evalcache.wrappers import unwrap, unwrapped

_FORMAT = "evalcache state 1"
_PROVED_ROWS = 2
_RELATIVES = 1000  # chains that are read of a family of models
_OUTLINE_TOKENS = 10
_LIMITS = {"MEMORY": "1GB", "DISK": "16GB"}
_READ_BYTES_S = 2e9  # how fast states are taken to be read, until that has been measured

_FAILURES = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError)  # of a model that is called otherwise

_Made = list[tuple[Digest, State, float]]  # states with their keys, and the seconds that each spares

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(ids, mask) → logits; each ``(rows, width)``, on the model's device."""


class Kind(Struct):
    """Models of one structure: the same code, attributes, configs and tied tensors. Their forwards go the same way.

    Args:
        stack: where the layers are. outline: what leaves each layer, of which the tensors are the rows' own.
        proved: depths from which a forward was seen to go on exactly. off: why none does, empty while they do.
    """

    stack: Stack
    outline: dict[int, Boundary]
    proved: set[int] = field(default_factory=set)
    off: str = ""
    pace: Pace = field(default_factory=Pace)


class Reuse:
    """What the models of one cache have in common, layer by layer from below.

    Args:
        states: where boundary states lie.
    """

    def __init__(self, cache: Cache, states: States) -> None:
        self.cache = cache
        self.states = states
        self.announced: set[int] = set()
        """Depths at which states are kept beside those where models were seen to part."""
        self._kinds: dict[Digest, Kind | str] = {}
        self._chains: dict[Digest, tuple[Digest, ...]] = {}
        self._read_bytes_s = _READ_BYTES_S

    @classmethod
    def within(cls, cache: Cache) -> Reuse:
        """That of a cache, with the states of its folder, which are closed with it."""
        if (known := _within.get(cache)) is not None:
            return known
        limits = [parse_bytes(os.environ.get(f"EVALCACHE_STATES_{name}") or default) for name, default in _LIMITS.items()]
        folder = cache.directory / "states" if cache.policy.writes else None
        states = States(folder, memory_bytes=limits[0], disk_bytes=limits[1])
        cache.at_end.append(states.close)
        found = _within[cache] = cls(weakref.proxy(cache), states)
        return found

    def of(
        self, model: nn.Module, watch: Watch, manifest: Manifest, environment: Environment, forward: Forward, reads: str
    ) -> Reused | None:
        """How forwards of a model are reused; None where they cannot be, which is counted with its reason.

        Args:
            model: as it is called. forward: calls it. reads: what ``forward`` gives to it, by name: a part of a state's key.
        """
        try:
            kind = self._kind(model, manifest, environment, forward)
            if kind.off:
                raise UncacheableError("components", kind.off)
            layers = layers_of(unwrap(model), kind.stack)
        except UncacheableError as error:
            self.cache.counts.components.refused[error.detail or error.reason] += 1
            return None
        digests = chain(manifest, kind.stack)
        self._meet(manifest.root, digests)
        base = digest_canonical([_FORMAT, version_of("llm-evalcache") or "", environment.keyed.digest.value, reads])
        return Reused(self, kind, layers, digests, base, manifest.root, watch, forward, next(model.parameters()).device.type)

    def _meet(self, root: Digest, digests: tuple[Digest, ...]) -> None:
        """Remember a model's chain, for this process and for others, and those of the models that begin as it does."""
        if root in self._chains:
            return
        begins = f"chain/{digests[0].hex}/"
        if all(known[0] != digests[0] for known in self._chains.values()):
            with contextlib.suppress(StoreError, CanonicalError):
                for name, data in itertools.islice(self.cache.store.objects_under(begins), _RELATIVES):
                    self._chains[Digest(bytes.fromhex(name.removeprefix(begins)))] = tuple(map(Digest, decode(data)))
        self._chains[root] = digests
        self.cache.put_object(f"{begins}{root.hex}", encode_canonical([digest.value for digest in digests]))

    def depths(self, root: Digest) -> list[int]:
        """Where states of a model are kept: where it parts from others, where that is announced, and after all layers."""
        mine = self._chains[root]
        last = len(mine) - 1
        parted = {shared_depth(mine, other) for other in self._chains.values() if other[0] == mine[0] and other != mine}
        return sorted({last} | {depth for depth in parted | self.announced if 0 < depth <= last})

    def _kind(self, model: nn.Module, manifest: Manifest, environment: Environment, forward: Forward) -> Kind:
        shape = _shape_of(model, manifest, environment)
        found = self._kinds.get(shape)
        if found is None:
            try:
                with self.cache.counts.taking("probe"):
                    found = _look_at(model, forward)
            except UncacheableError as error:
                found = error.detail
            self._kinds[shape] = found
        if isinstance(found, str):
            raise UncacheableError("components", found)
        return found

    def took(self, size_bytes: int, seconds: float) -> None:
        """Note how long states took to be read."""
        if seconds > 0:
            self._read_bytes_s += 0.3 * (size_bytes / seconds - self._read_bytes_s)

    def reading_s(self, size_bytes: int) -> float:
        """How long states of this size should take to be read."""
        return size_bytes / self._read_bytes_s


_within: weakref.WeakKeyDictionary[Cache, Reuse] = weakref.WeakKeyDictionary()


class Reused(Struct):
    """Forwards of one model, in the place of the bare one; see `Reuse.of`.

    ``depth``: after how many layers the next forward begins, or the last one began; 0 where it runs whole. ``made``: what the
    last one has to say of how each row was computed, for `Result.made`.
    """

    reuse: Reuse
    kind: Kind
    layers: list[nn.Module]
    digests: tuple[Digest, ...]
    base: Digest
    root: Digest
    watch: Watch
    forward: Forward
    device: str
    depth: int = 0
    made: list[dict[str, Any] | None] = field(default_factory=list)
    _rows: list[Digest] = field(default_factory=list)

    def prepare(self, batch: Sequence[tuple[int, ...]], ids: torch.Tensor, mask: torch.Tensor) -> None:
        """Decide where the forward of a batch begins: at the deepest state that all its rows have, where that pays."""
        self._rows = [digest_canonical([pack_tokens(one), int(ids.shape[1])]) for one in batch]
        self.depth = 0
        self.made = [None] * len(self._rows)
        depth = 0 if self.kind.off else self._deepest()
        if not depth or (depth not in self.kind.proved and not self._proves(depth, ids, mask)):
            return
        if self.reuse.reading_s(self._size_bytes(depth, ids)) > self.kind.pace.up_to(depth, ids.numel()):
            self.reuse.cache.counts.components.declined += 1
            return
        self.depth = depth

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits of the batch that was prepared, which leaves states behind."""
        if self.depth:
            try:
                with self._resumed(ids):
                    logits, made = self._run(ids, mask)
                return self._left(logits, made)
            except _FAILURES as error:
                self._switch_off(f"a forward that begins after layer {self.depth} fails: {type(error).__name__}: {error}")
            self.depth = 0
        return self._left(*self._run(ids, mask))

    def _left(self, logits: torch.Tensor, made: _Made) -> torch.Tensor:
        """Let the states that a forward has left wait: as with answers, they count once a check finds the model unchanged."""
        if made:
            self.watch.put(Batch(self.root, [], time.monotonic(), lambda: self._keep(made)))
        return logits

    def _key(self, depth: int, row: Digest) -> Digest:
        return digest_canonical([self.base.value, self.digests[depth].value, row.value])

    def _deepest(self) -> int:
        """The deepest boundary that all rows have; 0 where there is none."""
        states = self.reuse.states
        for depth in range(len(self.layers), 0, -1):
            if all(states.has(self._key(depth, row)) for row in self._rows):
                return depth
        return 0

    @contextlib.contextmanager
    def _resumed(self, ids: torch.Tensor) -> Iterator[None]:
        """The forward in the block begins after ``depth`` layers."""
        began = time.perf_counter()
        found = self._read(self.depth, self._rows)
        if found is None:
            raise KeyError("a state is gone")
        boundary = join_rows(self.kind.outline[self.depth], found)
        took_s = time.perf_counter() - began
        self.reuse.took(sum(len(array.data) for state in found for array in state.tensors.values()), took_s)
        with resuming(self.layers, self.depth, boundary):
            yield
        device = device_name(self.device)
        measured = [state.about["seconds"] for state in found if state.about["device"] == device]
        here_s = self.kind.pace.up_to(self.depth, ids.numel())
        # As their batch took it; where that was on another device, as the last whole forward took it on this one.
        spared_s = (sum(measured) if len(measured) == len(found) else here_s) - took_s
        self.made = [{"resumed_at": self.depth, "parent": state.about["run"]} for state in found]
        self._tell(len(found), spared_s)

    def _read(self, depth: int, rows: Sequence[Digest]) -> list[State] | None:
        found = [state for row in rows if (state := self.reuse.states.get(self._key(depth, row))) is not None]
        return found if len(found) == len(rows) else None

    def _size_bytes(self, depth: int, ids: torch.Tensor) -> int:
        """How large a batch's states should be."""
        return sum(tensor.nbytes for tensor in tensors_in(self.kind.outline[depth])) * ids.numel() // _OUTLINE_TOKENS

    def _proves(self, depth: int, ids: torch.Tensor, mask: torch.Tensor) -> bool:
        """Compute a few rows whole and from their boundary, and compare; and the stored states with those that were just made."""
        few, some = ids[:_PROVED_ROWS], mask[:_PROVED_ROWS]
        stored = self._read(depth, self._rows[:_PROVED_ROWS])
        if stored is None:
            return False
        with self.reuse.cache.counts.taking("probe"):
            with self._measuring(few, first=True), capturing(self.layers, [depth]) as kept:
                whole = self.forward(few, some)
            self.forward(few.roll(1, dims=1), some)  # so that nothing which the first one left behind can help
            try:
                with resuming(self.layers, depth, kept[depth]):
                    resumed = self.forward(few, some)
            except _FAILURES as error:
                return self._switch_off(f"a forward that begins after layer {depth} fails: {type(error).__name__}: {error}")
            if not same_bits(whole, resumed):
                return self._switch_off(f"a forward that begins after layer {depth} does not equal the whole one")
            if not are_close(join_rows(self.kind.outline[depth], stored), kept[depth]):
                return self._switch_off(f"a stored state after layer {depth} is not the one that is computed")
        self.kind.proved.add(depth)
        return True

    def _tell(self, rows: int, spared_s: float, why: str = "") -> None:
        cache = self.reuse.cache
        cache.counts.components.resumed += rows
        cache.counts.components.spared_seconds += spared_s
        where = (self.root.value, self.depth, len(self.layers))
        cache.note(Resumed(cache.run_id, time.time(), *where, rows, spared_s, device_name(self.device), why))

    def _switch_off(self, why: str) -> Literal[False]:
        """No forward of this kind of model begins above its first layer any more."""
        self.kind.off = why
        self.reuse.cache.counts.components.refused[why] += 1
        self._tell(0, 0.0, why)
        self.reuse.cache.warn(f"reuse below the first changed module is off for this model: {why}")
        return False

    def _run(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, _Made]:
        """Logits of a forward, and the states that are wanted above where it begins."""
        states = self.reuse.states
        absent: dict[int, list[tuple[int, Digest]]] = {}
        for depth in [] if self.kind.off else self.reuse.depths(self.root):
            keys = [(place, self._key(depth, row)) for place, row in enumerate(self._rows) if depth > self.depth]
            if new := [one for one in keys if not states.has(one[1])]:
                absent[depth] = new
        with self._measuring(ids, first=bool(absent)), capturing(self.layers, list(absent)) as kept:
            logits = self.forward(ids, mask)
        if not self.depth:
            self.reuse.cache.counts.components.whole += len(self._rows)
        made: _Made = []
        for depth, boundary in kept.items():
            tensors = tensors_in(boundary)
            if any(tensor.shape[:1] != ids.shape[:1] for tensor in tensors):
                self._switch_off(f"what leaves layer {depth} is not a row's own")
                return logits, []
            spared_s = self.kind.pace.up_to(depth, ids.numel()) / len(self._rows)
            about = {"run": self.reuse.cache.run_id, "seconds": spared_s, "device": device_name(self.device)}
            made += [(key, split_row(tensors, place, about), spared_s) for place, key in absent[depth]]
        return logits, made

    def _keep(self, made: _Made) -> None:
        for key, state, spared_s in made:
            self.reuse.states.put(key, state, seconds=spared_s)

    def _measuring(self, ids: torch.Tensor, *, first: bool) -> contextlib.AbstractContextManager[None]:
        """Measures a whole forward; with ``first``, which keeps states meanwhile, only if nothing is known yet."""
        if self.depth or (first and self.kind.pace.ended):
            return contextlib.nullcontext()
        return self.kind.pace.measuring(self.layers, ids)


def _look_at(model: nn.Module, forward: Forward) -> Kind:
    """Find a model's stack, and what leaves each layer, by one forward of a few tokens.

    Raises:
        UncacheableError: a forward cannot begin above its first layer.
    """
    config = getattr(model, "config", None)
    if why := batch_dependent(config):
        raise UncacheableError("components", why)
    for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
        if getattr(config, name, False):
            raise UncacheableError("components", f"the config asks for {name}")
    if any(type(one).__module__.startswith("torch.") for one in unwrapped(model)[:-1]):
        raise UncacheableError("components", "compiled, or in parallel")
    if any(vars(module).get("_compiled_call_impl") is not None for module in model.modules()):
        raise UncacheableError("components", "compiled in place")
    if own := [type(module).__qualname__ for module in model.modules() if not _is_known(type(module))]:
        # It may use a head below the layers for some rows, and not for those of the trace.
        raise UncacheableError("components", f"code of one's own: {own[0]}")
    device = next(model.parameters()).device
    ids = torch.arange(3, 3 + _OUTLINE_TOKENS, device=device).reshape(2, _OUTLINE_TOKENS // 2)
    mask = torch.ones_like(ids)
    inner = unwrap(model)
    stack = find_stack(inner, lambda: forward(ids, mask))
    layers = layers_of(inner, stack)
    with torch.no_grad(), capturing(layers, range(1, stack.count + 1)) as kept:
        forward(ids, mask)
    for depth, boundary in kept.items():
        for leaf in boundary.leaves():
            if isinstance(leaf, torch.Tensor) and (not leaf.ndim or leaf.shape[0] != 2):
                raise UncacheableError("components", f"what leaves layer {depth} is not a row's own")
            if not isinstance(leaf, (torch.Tensor, int, float, bool, str, type(None))):
                raise UncacheableError("components", f"layer {depth} returns a {type(leaf).__name__}")
    return Kind(stack, kept)


def _is_known(cls: type) -> bool:
    """Whether a module's class comes from a library: which of its parts a row needs does not depend on the row."""
    return is_library_class(cls)


def _shape_of(model: nn.Module, manifest: Manifest, environment: Environment) -> Digest:
    """Digest of all that decides which way a forward goes: everything but the bytes of tensors, and which of these are shared."""
    modules = [[path, *made_of(module)] for path, module in manifest.modules.items()]
    configs = {path: digest.value for path, digest in manifest.configs.items()}
    first: dict[int, int] = {}
    shared = [first.setdefault(id(tensor), place) for place, tensor in enumerate(owned_tensors(model))]
    return digest_canonical([modules, configs, shared, environment.keyed.digest.value])
