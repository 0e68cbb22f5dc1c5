"""One model of a script, served from this process's cache: `wrap` it, or have it score pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from evalcache.session import say, session_cache, warn

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from evalcache.cache import Cache
    from evalcache.integrations.scoring import Score


def wrap(model: Any, cache: Cache | None = None) -> Any:
    """Serve this one model from the cache, whatever the rest of the process does; returns the same object, come what may.

    Args:
        model: a transformers model that can ``generate``.
        cache: where to look and store; None means this process's session, which is started without touching other models.
    """
    cache = cache if cache is not None else session_cache()
    if cache is None:
        return model
    try:
        from evalcache.integrations.transformers import wrap as wrap_model

        return wrap_model(model, cache)
    except Exception as error:
        warn(f"cannot wrap this model ({say(error)}); it runs without the cache")
        return model


def loglikelihood(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    *,
    cache: Cache | None = None,
    batch_tokens: int = 8192,
    max_length: int | None = None,
    softmax_dtype: torch.dtype | None = None,
) -> list[Score]:
    """Log-probabilities of continuations, scored in length-sorted batches, from the store where they are known.

    Args:
        model: a causal transformers model. tokenizer: turns text into ids; only the ids are keyed.
        pairs: (context, continuation); spaces at a context's end go to the continuation.
        cache: where to look and store; None means this process's session, as in `wrap`.
        batch_tokens: padded tokens of one batch; no part of the key.
        max_length: tokens that the model can read; None means its config's. Longer inputs lose their beginning.
        softmax_dtype: in which logits become log-probabilities; None means ``torch.float32``.

    Returns:
        One `Score` per pair, in order: the sum, one log-probability per token, and whether greedy decoding would say the same.

    Raises:
        EvalCacheError: a continuation without tokens, or an encoder–decoder model.
    """
    from evalcache.integrations import scoring

    cache = cache if cache is not None else session_cache()
    settings = {} if softmax_dtype is None else {"softmax_dtype": softmax_dtype}
    return scoring.loglikelihood(
        model, tokenizer, pairs, cache=cache, batch_tokens=batch_tokens, max_length=max_length, **settings
    )
