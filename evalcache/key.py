"""Action → Key: the one list of what is keyed and why, and the version of the key.

A key is the xxh3_128 of this canonical array, and of nothing else:

| place | field | why |
|---|---|---|
| 0 | ``"evalcache"``, `KEY_VERSION` | keys of different versions never meet |
| 1 | request kind | a log-likelihood never answers a generation |
| 2 | manifest root | the bytes of the weights, buffers, attributes, config and code of the model |
| 3 | digest of the effective settings | whatever the engine reads, after resolution, inactive ones dropped |
| 4 | digest of the keyed environment | dtype, kernels, quantisation, library versions |
| 5 | input token ids where the mask is 1 | tokenizer, template and prompt edits matter where they change the ids |
| 6 | further inputs of the row | mask holes, explicit positions, continuation, digests of other tensors |

Never keyed: paths, names, file format, sharding, device map, batch position, labels, policy.
"""

from __future__ import annotations

from evalcache.canonical import check_canonical, encode_trusted
from evalcache.digest import Digest, digest_bytes
from evalcache.records import Action

KEY_VERSION = 1
"""Raised whenever the meaning of a key changes; old entries then stay in the store and are never served. History: README."""


def encode_action(action: Action) -> bytes:
    """The canonical bytes of an Action. Cost: 3–5 µs for 300 tokens; the settings' and environment's digests are reused.

    Raises:
        CanonicalError: one of ``request.inputs`` has no canonical encoding.
    """
    request = action.request
    inputs = dict(request.inputs)
    if inputs:
        check_canonical(inputs, "inputs")
    return encode_trusted(
        [
            "evalcache",
            KEY_VERSION,
            request.kind,
            action.model.value,
            request.settings.digest.value,
            action.environment.keyed.digest.value,
            request.tokens,
            inputs,
        ]
    )


def key_of(action: Action) -> Digest:
    """The Key of an Action."""
    return digest_bytes(encode_action(action))
