"""What somebody's own ``compute`` function is, as a key needs it: its code, with all that it reaches, and the packages it uses.

What cannot be hashed exactly (an engine, a client with its connections) is refused, until the caller's version stands for it.
"""

from __future__ import annotations

import dis
import functools
import inspect
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

from evalcache.asked import check_json
from evalcache.canonical import digest_canonical
from evalcache.code import class_name, is_library_class, library_of, version_of
from evalcache.digest import digest_bytes
from evalcache.errors import CanonicalError, EvalCacheError, FingerprintError, UncacheableError
from evalcache.library_code import LibraryCode
from evalcache.records import Fields
from evalcache.user_code import UserCode, is_users_method

# Of a tokenizer's attributes: how it was made, and what it has warned of.
_OF_A_TOKENIZER = frozenset(
    "init_kwargs init_inputs deprecation_warnings files_loaded _special_tokens_map _extra_special_tokens".split()
)


def describe_compute(compute: Any, model: Any, settings: Mapping[str, Any] | None, version: str | None) -> Fields:
    """What of a call is keyed beside the model and the requests.

    Args:
        model: a live module that ``compute`` may reach, which has a key of its own; else None.
        settings: the caller's, JSON. version: the caller's, standing for what cannot be hashed.

    Raises:
        EvalCacheError: ``compute`` reaches what cannot be hashed, or the settings are no JSON.
    """
    check_json(dict(settings or {}), "settings")
    fields: dict[str, Any] = {"settings": dict(settings or {}), "python": list(sys.version_info[:2])}
    fields["packages"] = {name: version_of(name) or "" for name in sorted(_packages(compute))}
    if version is not None:
        if type(version) is not str or not version.strip():
            raise EvalCacheError(f"version={version!r}", hint="a text that you change when the objects change", found=version)
        fields["version"] = version
    try:
        fields["code"] = _Code(LibraryCode(), _Reached(model, version)).digest(compute).value
    except FingerprintError as error:
        raise EvalCacheError(
            f"compute reaches what cannot be keyed: {error.problem}",
            hint="give version='1', which then stands for objects of libraries that it uses; change it when they change",
            found=error.problem,
        ) from error
    return Fields(fields)


class _Code(UserCode):
    """Code that may reach models."""

    def _value(self, value: Any) -> Any:
        # Asked for nothing before it is known to be one: a sleeping model would wake.
        return self._encode_other(value) if _is_module(value) else super()._value(value)

    def _unknowable(self, problem: str) -> None:
        if self._encode_other.version is None:
            super()._unknowable(problem)


class _Reached:
    """What ``compute`` reaches and is neither code nor a plain value → canonical value, or `FingerprintError`."""

    def __init__(self, model: Any, version: str | None) -> None:
        self._model = model
        self.version = version

    def __call__(self, value: Any) -> Any:
        if self._model is not None and value is self._model:
            return ["model"]
        torch = sys.modules.get("torch")
        if _is_module(value):
            from evalcache.environment import describe_environment, generation_settings
            from evalcache.weights import fingerprint
            from evalcache.wrappers import awake

            live = awake(value)
            # What stands beside its weights, as of the model that is asked.
            beside = describe_environment(live).keyed.digest.value
            try:
                return ["module", fingerprint(live).root.value, beside, generation_settings(live)]
            except UncacheableError as error:
                raise FingerprintError("", error.detail, "code") from error
        if torch is not None and isinstance(value, torch.Tensor):
            from evalcache.weights import tensor_bytes

            return ["tensor", str(value.dtype), list(value.shape), digest_bytes(tensor_bytes(value)).value]
        if type(value).__module__ == "numpy" and hasattr(value, "tobytes") and not value.dtype.hasobject:
            return ["numpy", type(value).__name__, str(value.dtype), list(value.shape), digest_bytes(value.tobytes()).value]
        if any(cls.__name__ == "PreTrainedTokenizerBase" for cls in type(value).__mro__):
            return _tokenizer(value, self.version)
        kind = type(value)
        if self.version is not None and (is_library_class(kind) or not hasattr(value, "__dict__")):
            return ["vouched for", class_name(kind)]
        raise FingerprintError("", f"an object of type {class_name(kind)}", "code")


def _is_module(value: Any) -> bool:
    torch = sys.modules.get("torch")  # a module cannot be there without it
    return torch is not None and isinstance(value, torch.nn.Module)


def _tokenizer(value: Any, version: str | None) -> Any:
    from evalcache.integrations.processors import tokenizer_digest

    methods = (one for base in type(value).__mro__ for one in vars(base).values())
    if version is None and any(map(is_users_method, methods)):
        raise FingerprintError("", f"a tokenizer whose class {class_name(type(value))} was patched", "code")
    try:
        content = tokenizer_digest(value)
    except UncacheableError as error:
        raise FingerprintError("", error.detail, "code") from error
    plain = {name: one for name, one in vars(value).items() if type(one) in (bool, str)}
    plain |= {name: str(one) for name, one in vars(value).items() if type(one) in (int, float)}
    plain.pop("name_or_path", None)
    held = {name: one for name, one in vars(value).items() if type(one) in (dict, list, tuple) and name not in _OF_A_TOKENIZER}
    try:
        plain["held"] = digest_canonical(held).value  # several chat templates, names of inputs
    except CanonicalError as error:
        raise FingerprintError("", f"a tokenizer that holds {error.message}", "code") from error
    return ["tokenizer", content, plain, {name: str(token) for name, token in value.special_tokens_map.items()}]


def _packages(compute: Any) -> set[str]:
    """The installed packages that the file of ``compute`` has imported, and those that it imports while it runs."""
    while isinstance(compute, functools.partial):
        compute = compute.func
    function = inspect.unwrap(getattr(compute, "__func__", compute))
    if not isinstance(function, types.FunctionType):
        function = getattr(type(function), "__call__", None)  # noqa: B004 - the method itself is wanted
    if not isinstance(function, types.FunctionType):
        return set()
    found = set(_imports(function.__code__))
    for value in function.__globals__.values():
        module = value if isinstance(value, types.ModuleType) else sys.modules.get(str(getattr(value, "__module__", "") or ""))
        found.add(library_of(getattr(module, "__file__", None) or "") or "")
    return {name for name in found if name not in ("", "python", "evalcache") and version_of(name)}


def _imports(code: types.CodeType) -> Iterator[str]:
    yield from (str(one.argval).partition(".")[0] for one in dis.get_instructions(code) if one.opname == "IMPORT_NAME")
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _imports(constant)
