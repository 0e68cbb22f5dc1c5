"""The eval clients that have an adapter: which versions were tested, and where each is held.

A seam is a method with the arguments that it had. One that has moved is found in the module
where that is imported, else by reading the client's source, without an import.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

from evalcache.structs import Frozen


class Client(Frozen):
    """An eval client.

    Args:
        name: its import name, and what the ledger calls it. distribution: its name on the package index.
        tested: the versions that the tests run with.
        seams: file within its package → qualified name → names of the arguments, in order.
    """

    name: str
    distribution: str
    tested: tuple[str, ...]
    seams: dict[str, dict[str, str]]

    def folder(self) -> Path | None:
        """Where it is installed; None where it is not."""
        spec = importlib.util.find_spec(self.name)
        return Path(spec.origin).parent if spec is not None and spec.origin else None

    def faults(self) -> list[str]:
        """The seams that are not where they were, as a person would say it; empty where all is well or it is not installed."""
        unsure = {file: seams for file, seams in self.seams.items() if not self._holds(file, seams)}
        folder = self.folder() if unsure else None
        return [] if folder is None else [fault for file, seams in unsure.items() for fault in _faults(folder / file, seams)]

    def _holds(self, file: str, seams: dict[str, str]) -> bool:
        """Whether the seams of a file stand in its module, if that is imported: parsing the file takes far longer."""
        module = sys.modules.get(f"{self.name}.{file.removesuffix('.py').replace('/', '.')}")
        return module is not None and all(_arguments(module, name) == arguments for name, arguments in seams.items())


LM_EVAL = Client(
    "lm_eval",
    "lm_eval",
    ("0.4.13",),
    {
        "models/huggingface.py": {
            "HFLM.loglikelihood": "self requests disable_tqdm",
            "HFLM.loglikelihood_rolling": "self requests disable_tqdm",
            "HFLM.generate_until": "self requests disable_tqdm",
            "HFLM._loglikelihood_tokens": "self requests disable_tqdm override_bs",
            "HFLM._model_call": "self inps attn_mask labels",
            "HFLM._model_generate": "self context max_length stop generation_kwargs",
            "HFLM._detect_batch_size": "self requests pos",
            "HFLM._batch_scheduler": "self pos n_reordered_requests",
            "HFLM.tok_batch_encode": "self strings padding_side left_truncate_len truncation",
            "HFLM.get_model_info": "self",
        },
        "models/utils.py": {
            "handle_stop_sequences": "until eos",
            "normalize_gen_kwargs": "gen_kwargs default_max_gen_toks",
            "postprocess_generated_text": "generation stop think_end_token",
            "has_bos_prefix": "sequence bos_str",
            "Collator.group": "arr fn group_by",
        },
        "utils.py": {
            "get_rolling_token_windows": "token_list prefix_token max_seq_len context_len",
            "make_disjoint_window": "pair",
        },
        "api/model.py": {"CacheHook.add_partial": "self attr req res"},
    },
)

LIGHTEVAL = Client(
    "lighteval",
    "lighteval",
    ("0.13.0",),
    {
        "models/transformers/transformers_model.py": {
            "TransformersModel.greedy_until": "self docs",
            "TransformersModel.loglikelihood": "self docs",
            "TransformersModel.loglikelihood_rolling": "self docs",
            "TransformersModel._loglikelihood_tokens": "self docs rolling",
            "TransformersModel._padded_greedy_until": "self docs",
            "TransformersModel._generate": "self continuous_batching kwargs",
            "TransformersModel._generate_padded": "self batch max_new_tokens stop_tokens returns_logits num_samples",
            "TransformersModel._get_batch_size": "self max_input_length override_bs starting_batch_size",
            "TransformersModel.prepare_batch_logprob": "self tokenized_contexts tokenized_continuations max_context",
            "stop_sequences_criteria": "tokenizer stop_sequences batch",
        },
        "models/abstract_model.py": {"LightevalModel.tok_encode_pair": "self context continuations pairwise"},
        "data.py": {"DynamicBatchDataset.get_original_order": "self new_arr", "DynamicBatchDataset.splits_iterator": "self"},
        "utils/cache_management.py": {
            "SampleCache._dump_sample": "self result",
            "SampleCache._load_sample": "self sample",
            "cached": "sampling_method",
        },
        "logging/info_loggers.py": {
            "DetailsLogger.log": "self task_name doc model_response metrics",
            "MetricsLogger.aggregate": "self task_dict bootstrap_iters",
        },
    },
)

INSPECT_AI = Client(
    "inspect_ai",
    "inspect_ai",
    ("0.3.285",),
    {
        "model/_providers/hf.py": {
            "HuggingFaceAPI.generate": "self input tools tool_choice config",
            "batched_generate": "input",
            "_generate_batch": "batch",
            "_batch_key": "input",
        },
        "_eval/task/log.py": {
            "TaskLogger._record_sample_outcome": "self sample",
            "TaskLogger.log_finish": "self status stats results reductions error prune_unplanned",
        },
        "log/_samples.py": {"sample_active": "", "track_active_model_event": "event"},
    },
)

CLIENTS = (LM_EVAL, LIGHTEVAL, INSPECT_AI)


def version_of_client(client: Client) -> str:
    """Its installed version, empty where it is not installed."""
    try:
        return importlib.metadata.version(client.distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _arguments(owner: Any, name: str) -> str | None:
    """Names of the arguments of a function below ``owner``, in order; None where there is no plain one."""
    for part in name.split("."):
        owner = vars(owner).get(part)
        if not hasattr(owner, "__dict__"):
            return None
    code = getattr(inspect.unwrap(getattr(owner, "__func__", owner)), "__code__", None)
    if code is None:
        return None
    names, plain = code.co_varnames, code.co_argcount
    known = plain + code.co_kwonlyargcount
    star, stars = bool(code.co_flags & inspect.CO_VARARGS), bool(code.co_flags & inspect.CO_VARKEYWORDS)
    rest = names[known : known + star + stars]
    return " ".join((*names[:plain], *rest[:star], *names[plain:known], *rest[star:]))


def _faults(file: Path, seams: dict[str, str]) -> list[str]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return [f"{file.name} is not there"]
    found = dict(_functions(tree))
    faults = []
    for name, arguments in seams.items():
        if name not in found:
            faults.append(f"{name} is not in {file.name}")
        elif found[name] != arguments:
            faults.append(f"{name} takes ({found[name]}), not ({arguments})")
    return faults


def _functions(tree: ast.AST, prefix: str = "") -> list[tuple[str, str]]:
    functions = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            functions += _functions(node, f"{prefix}{node.name}.")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            taken = node.args
            names = [*taken.posonlyargs, *taken.args, *([taken.vararg] if taken.vararg else []), *taken.kwonlyargs]
            names += [taken.kwarg] if taken.kwarg else []
            functions.append((prefix + node.name, " ".join(one.arg for one in names)))
    return functions
