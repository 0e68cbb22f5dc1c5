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
from evalcache.code import class_name, is_library_class, library_of, version_of
from evalcache.digest import digest_bytes
from evalcache.errors import EvalCacheError, FingerprintError, UncacheableError
from evalcache.library_code import LibraryCode
from evalcache.records import Fields
from evalcache.user_code import UserCode


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


class _Reached:
    """What ``compute`` reaches and is neither code nor a plain value → canonical value, or `FingerprintError`."""

    def __init__(self, model: Any, version: str | None) -> None:
        self._model = model
        self._version = version

    def __call__(self, value: Any) -> Any:
        if self._model is not None and value is self._model:
            return ["model"]
        torch = sys.modules.get("torch")
        if _is_module(value):
            from evalcache.weights import fingerprint

            return ["module", fingerprint(value).root.value]
        if torch is not None and isinstance(value, torch.Tensor):
            from evalcache.weights import tensor_bytes

            return ["tensor", str(value.dtype), list(value.shape), digest_bytes(tensor_bytes(value)).value]
        if any(cls.__name__ == "PreTrainedTokenizerBase" for cls in type(value).__mro__):
            return _tokenizer(value)
        kind = type(value)
        if self._version is not None and (is_library_class(kind) or not hasattr(value, "__dict__")):
            return ["vouched for", class_name(kind)]
        raise FingerprintError("", f"an object of type {class_name(kind)}", "code")


def _is_module(value: Any) -> bool:
    torch = sys.modules.get("torch")  # a module cannot be there without it
    return torch is not None and isinstance(value, torch.nn.Module)


def _tokenizer(value: Any) -> Any:
    from evalcache.integrations.processors import tokenizer_digest

    try:
        content = tokenizer_digest(value)
    except UncacheableError as error:
        raise FingerprintError("", error.detail, "code") from error
    plain = {name: one for name, one in vars(value).items() if type(one) in (bool, str)}
    plain |= {name: str(one) for name, one in vars(value).items() if type(one) in (int, float)}
    plain.pop("name_or_path", None)
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
