"""What the runtime is: everything beside the model and the request that shapes an answer.

*Keyed* is what may change a token: precision, kernels, versions. *Recorded* is what may change the last bits of a float (the
device's name, the batch): it is stored with each entry, and keyed under ``EVALCACHE_MATCH=strict``.
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from evalcache.canonical import digest_canonical
from evalcache.code import version_of
from evalcache.errors import CanonicalError, EvalCacheError, UncacheableError
from evalcache.records import Environment, Fields

MATCHES = ("portable", "strict")
# By these the libraries below torch compute with fewer bits than it asks for, or with more.
_VARIABLES = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE", "NVIDIA_TF32_OVERRIDE")
_SMALLEST = 5e-324


def describe_environment(
    model: Any,
    match: str = "portable",
    *,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    engine: str = "transformers",
) -> Environment:
    """The environment in which ``model`` would answer now.

    Args:
        model: a module with a transformers config, or anything that has ``config``; a model that is not loaded yet will do.
        match: ``portable`` or ``strict``.
        device, dtype: of a model that is not loaded yet; None means those of its parameters.
        engine: the package that computes.

    Raises:
        EvalCacheError: ``match`` is neither.

    Cost: 50 µs, and 0.5 µs for each module.
    """
    if match not in MATCHES:
        raise EvalCacheError(f"unknown match {match!r}", hint=f"one of {', '.join(MATCHES)}", found=match)
    kind = device or device_type(model)
    keyed: dict[str, Any] = {
        "engine": engine,
        "engine_version": version_of(engine) or "",
        "torch": str(torch.__version__),
        "device": kind,
        "dtype": _short(dtype or getattr(model, "dtype", None)),
        "default_dtype": _short(torch.get_default_dtype()),
        "autocast": [_short(torch.get_autocast_dtype(one)) for one in kind.split("+") if torch.is_autocast_enabled(one)],
        "matmul_precision": _float32_precisions(),
        "compiled": _is_compiled(model),
        "kernels": _kernels(getattr(model, "config", None)),
        "sdp": [
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cuda.cudnn_sdp_enabled(),
            torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed(),
        ],
        "flush_denormal": _SMALLEST * 1.0 == 0.0,  # torch does not tell; its setting holds for all arithmetic of a thread
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }
    if "cuda" in kind:
        matmul = torch.backends.cuda.matmul
        keyed["reduced_precision"] = [
            str(matmul.allow_fp16_reduced_precision_reduction),
            str(matmul.allow_bf16_reduced_precision_reduction),
            str(getattr(matmul, "allow_fp16_accumulation", "")),
            torch.backends.cudnn.allow_tf32,
        ]
    recorded = {"device_name": device_name(kind), "deterministic": torch.are_deterministic_algorithms_enabled()}
    if "cpu" in kind:
        recorded |= {"threads": torch.get_num_threads(), "mkldnn": torch.backends.mkldnn.enabled}
    return Environment(Fields(keyed | ({"strict": recorded} if match == "strict" else {})), recorded)


def generation_settings(model: Any) -> Any:
    """The settings that calls of ``generate`` fall back to, no part of a manifest: of a model, or of those inside of it.

    Raises:
        UncacheableError: ``argument``, they have no canonical form.
    """
    config = getattr(model, "generation_config", None)
    asleep = type(model).__name__ == "LazyModel"  # which has one, or cannot generate
    inner = model.named_modules() if config is None and not asleep and isinstance(model, torch.nn.Module) else ()
    configs = {path: vars(one)["generation_config"] for path, one in inner if "generation_config" in vars(one)}
    try:
        found = {path: digest_canonical(one.to_dict()).value for path, one in configs.items()}
        return found or digest_canonical({} if config is None else config.to_dict()).value
    except (CanonicalError, AttributeError) as error:
        raise UncacheableError("argument", f"generation config: {error}") from error


def device_type(model: Any) -> str:
    """The device types that a model computes on, joined by ``+``: of its parameters; of offloaded ones where they are brought."""
    kinds = {parameter.device.type for parameter in model.parameters()}
    if "meta" in kinds:
        hooks = [module.__dict__.get("_hf_hook") for module in model.modules()]
        every = [one for hook in hooks if hook is not None for one in getattr(hook, "hooks", [hook])]
        places = [getattr(one, "execution_device", None) for one in every]
        kinds |= {torch.device(place).type for place in places if place is not None}
    return "+".join(sorted(kinds - {"meta"})) or "cpu"


@functools.cache
def device_name(kind: str) -> str:
    """The device's name as its maker prints it."""
    if kind.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        name = ""
    return name or platform.processor() or platform.machine()


def _is_compiled(model: Any) -> bool:
    """Whether any module of the model was compiled in place: other kernels, other last bits."""
    modules = getattr(model, "modules", None)
    return modules is not None and any(module.__dict__.get("_compiled_call_impl") is not None for module in modules())


def _float32_precisions() -> list[str]:
    """How exact products of float32 are: torch's old setting, and the newer ones, of which the old does not tell."""
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses to say once the newer ones were set
        legacy = "newer"
    owners = [getattr(torch.backends, name, None) for name in ("mkldnn", "cudnn")]
    owners += [torch.backends, getattr(torch.backends.cuda, "matmul", None)]
    owners += [getattr(owner, "matmul", None) for owner in owners[:1]] + [getattr(owner, "conv", None) for owner in owners[:2]]
    return [legacy, *[str(getattr(owner, "fp32_precision", "")) for owner in owners]]


def _kernels(config: Any) -> dict[str, list[str]]:
    """Attention and expert kernels of a config and of those nested in it; `to_dict` leaves them out."""
    found: dict[str, list[str]] = {}

    def visit(path: str, one: Any) -> None:
        attention = getattr(one, "_attn_implementation", None)
        experts = getattr(one, "_experts_implementation", None)
        found[path] = [str(attention or ""), str(experts or "")]
        for name in getattr(one, "sub_configs", None) or {}:
            inner = getattr(one, name, None)
            if inner is not None and not isinstance(inner, Mapping):
                visit(f"{path}.{name}" if path else name, inner)

    if config is not None:
        visit("", config)
    return found


def _short(dtype: Any) -> str:
    return "" if dtype is None else str(dtype).removeprefix("torch.")
