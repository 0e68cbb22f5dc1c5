"""The kernels that a configuration chooses by name: transformers' tables of them, which anybody may add to."""

from __future__ import annotations

import sys
import types
from typing import Any

from evalcache.code import origin_of, unwrap_ours
from evalcache.library_code import LibraryCode

_TABLES = (
    ("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS"),
    ("transformers.masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS"),
    ("transformers.integrations.moe", "ALL_EXPERTS_FUNCTIONS"),
)


def kernel_tables(library: LibraryCode) -> list[tuple[str, list[tuple[str, Any]]]]:
    """The entries of transformers' tables of kernels, own and overridden ones.

    A fixed list: which further tables have been met depends on what else the process has looked at.
    """
    found = []
    for home, name in _TABLES:
        table = getattr(sys.modules.get(home), name, None)
        if table is not None:
            entries = {**type(table)._global_mapping, **table._local_mapping}
            found.append((name, [(key, unwrap_ours(one)) for key, one in sorted(entries.items())]))
    # A file of a model may have a table of its own: only what a user put there counts.
    known = {id(getattr(sys.modules.get(home), name, None)) for home, name in _TABLES}
    for name, table in sorted(library.interfaces.items()):
        own = {} if id(table) in known else table._local_mapping
        put = [(key, one) for key, one in sorted(own.items()) if isinstance(one, types.FunctionType) and origin_of(one) is None]
        if put:
            found.append((name, put))
    return found
