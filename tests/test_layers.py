"""The direction of imports: a file knows only files of lower levels, each third-party package has one door, and torch sleeps.

Imports are read from the source, so that the ones inside functions count as well.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "evalcache"

# Module → level. A file imports only files of a lower level. The halves are files that others of the same level are built from.
LEVELS = {
    "errors": 0,
    "structs": 0,  # classes of named fields
    "digest": 1,
    "faults": 1.5,  # warnings, each said once
    "folder": 1.6,  # where the cache folder is
    "importhook": 1,  # knows nothing of us
    "ending": 1,  # nor does this
    "holders": 1,  # nor this
    "sigterm": 1,  # nor this
    "forks": 1,  # nor this
    "visible": 1,  # nor this
    "printing": 1.5,  # nor this
    "progress": 1,
    "collector": 1,  # Python's own
    "canonical": 1.5,
    "records": 2,
    "manifest": 2,
    "leaf": 2,  # one tensor → its digest
    "attributes": 2.6,  # plain attributes of a module → values with a canonical encoding
    "device_sums": 2,  # position-weighted sums on the tensor's own device
    "sidetable": 2,  # checked bytes under a key, which can be found out again
    "tensorfile": 2,  # where each tensor of a file lies
    "torchfile": 2.5,
    "filememo": 2.5,  # what is known of a file's content
    "code": 2.5,  # what a code object is, and whose
    "namespaces": 2.5,  # which object stands behind which name
    "kernels": 2.7,  # tables of kernels that anybody may add to
    "wrappers": 2.6,  # what stands around a model
    "lookups": 2.5,  # names that code computes
    "library_code": 2.6,  # classes and functions of installed libraries
    "user_code": 2.7,  # scripts, remote code, editable installs
    "tensors": 2.5,  # one tensor of a module → its record
    "interception": 2.6,  # hooks, instance methods, modes
    "adapters": 2.5,  # PEFT's layers
    "walk": 2.9,  # one pass over a live model
    "weights": 3,
    "checkpoint": 3,
    "identity": 3.5,  # a checkpoint with its configs and code
    "environment": 3,
    "key": 3.2,
    "components": 2.5,  # how much of a model is the same as in another one
    "counts": 2,
    "measuring": 2,  # what computing takes of devices
    "provenance": 3.5,
    "watch": 4.5,
    "decide": 3,
    "leases": 3.5,  # what a live process is computing
    "serving": 4,  # the requests of one call
    "frame": 3,
    "shelf": 1.5,  # things bounded by bytes
    "stateframe": 2.5,  # the bytes of what enters a layer
    "statefolder": 2.9,  # files of them
    "states": 3,  # what is kept of them
    "journal": 3,
    "auditviews": 2.9,  # SQL behind the figures of an audit
    "schema": 3,
    "prices": 2,  # what an hour of a device costs
    "rows": 3,  # bytes under bytes in one file
    "tables": 3.5,  # events and entries → rows of the ledger
    "waiting": 3.6,  # what of a store waits for the ledger
    "intake": 3.8,  # these on their way into the tables
    "inspection": 3.9,  # every row of a store, checked
    "store": 4,
    "outbox": 4.2,  # what a run has to tell, until it is committed
    "ledger": 4,
    "checking": 4.7,  # what waits for the check after it
    "cache": 5,
    "figures": 3,  # of an audit
    "differences": 5,  # in what two things differ
    "misses": 5.1,  # why a run missed
    "audit": 5.2,
    "audittext": 5.5,  # its report as text
    "report": 5.8,  # its report as a page
    "summary": 5,
    "names": 5,  # what a person types → the model or key that is meant
    "verification": 5,
    "salvage": 4.5,  # a damaged file of a store
    "ledger_mending": 4.5,  # a damaged ledger
    "amounts": 1,  # what a person types for times and sizes
    "selection": 5.2,  # which entries a person means
    "pruning": 4.8,  # entries that leave the store
    "restoring": 5,  # entries rebuilt from the ledger
    "mending": 5.5,  # all of it put right
    "entryview": 5,
    "transfers": 3.5,  # what a store gives to other machines and has had of them
    "segments": 4.6,  # entries that machines exchange through a folder they share
    "exchange": 4.5,  # entries as one file
    "planning": 5.5,  # a cache that only looks up
    "budget": 5.5,  # a cache whose run ends when its budget is spent
    "estimates": 5,  # what requests should take
    "plan": 7.5,  # what a command would ask
    "asked": 5.5,  # requests of an eval loop of one's own
    "compute": 6.5,  # the function that answers them
    "integrations": 6,
    "sources": 6.5,  # whose answers they are
    "session": 7,
    "engine": 7.5,  # the loop itself
    "one_model": 7.5,
    "drawing": 2,  # a sample of entries, and what it says of all
    "comparing": 3,  # an answer with the same one computed again
    "recompute": 7.5,  # stored entries, computed again
    "doctor": 7.5,  # what is wrong with an installation or a folder
    "launch": 7,
    "ab": 7.5,  # a command with us and without
    "inspect_provider": 8,  # an entry point
    "_site": 8,  # what a launched interpreter starts with
    "ui": 7.5,  # its report, served on this machine
    "cli_options": 7.8,  # what verbs have in common
    "cli_reports": 7.9,  # verbs about what was saved
    "cli_exchange": 7.9,  # verbs that carry entries
    "cli_store": 7.9,  # verbs that look after a folder
    "cli_pages": 7.9,  # verbs that make a page of it
    "cli": 8,
    "__main__": 9,
    "__init__": 9,
}

# Third-party package → the modules that import it: one door each.
DOORS = {
    "cbor2": {"canonical"},
    "click": {"cli", "cli_exchange", "cli_options", "cli_pages", "cli_reports", "cli_store"},
    "diskcache": {"rows"},
    "duckdb": {"exchange", "ledger"},
    "jinja2": {"report"},
    "pynvml": {"measuring"},
    "torch": {"adapters", "device_sums", "environment", "integrations", "interception", "tensors", "walk", "weights", "wrappers"},
    "packaging": {"amounts"},
    "transformers": {"environment", "integrations"},
    "vl_convert": {"report"},
    "msgspec": {"structs"},
    "xxhash": {"digest"},
    "zstandard": {"frame"},
}

SOURCES = sorted(PACKAGE.rglob("*.py"))


def module_of(source: Path) -> str:
    """Which row of `LEVELS` a file is: a folder is one row."""
    return source.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_for_type_checkers(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports_of(source: Path, *, at_run_time: bool = False) -> Iterator[tuple[int, str]]:
    """Yields (line, dotted name) of each import of a file, wherever it stands; ``at_run_time`` leaves out `if TYPE_CHECKING`."""
    waiting: list[ast.AST] = [ast.parse(source.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if at_run_time and is_for_type_checkers(node):
            waiting.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source.name}:{node.lineno}: relative import; write the whole name"
            assert node.module is not None
            if node.module == "evalcache.integrations":  # `from evalcache.integrations import generation` imports a module
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module
        waiting.extend(ast.iter_child_nodes(node))


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: str(source.relative_to(PACKAGE)))
class TestSource:
    """What holds for each file of the package."""

    def test_has_a_level(self, source: Path) -> None:
        assert module_of(source) in LEVELS, "a new file needs a row in LEVELS: what does it stand on, and who stands on it?"

    def test_imports_only_lower_levels(self, source: Path) -> None:
        module = module_of(source)
        for line, name in imports_of(source):
            if not name.startswith("evalcache."):
                continue
            imported = name.split(".")[1]
            inside_one_folder = imported == module and source.parent != PACKAGE
            if imported in LEVELS and not inside_one_folder:
                assert LEVELS[imported] < LEVELS[module], (
                    f"{source.name}:{line} ({LEVELS[module]}) imports {name} ({LEVELS[imported]})"
                )

    def test_does_not_import_the_package_root(self, source: Path) -> None:
        for line, name in imports_of(source):
            assert name != "evalcache", f"{source.name}:{line}: import from the module, not from the package root"
            if name.startswith("evalcache."):
                module = name.split(".")[1]
                assert module in LEVELS, f"{source.name}:{line}: {module} is not a module; import it from where it is defined"

    def test_comes_through_the_doors(self, source: Path) -> None:
        for line, name in imports_of(source, at_run_time=True):
            package = name.split(".")[0]
            if package in DOORS:
                assert module_of(source) in DOORS[package], (
                    f"{source.name}:{line} imports {package}; its door is {DOORS[package]}"
                )


def test_integrations_of_two_clients_do_not_know_each_other() -> None:
    # A client's file may stand on seam.py, which serves the models that they all run; not on another client's.
    clients = {"lm_eval", "inspect_ai", "lighteval"}
    for source in (PACKAGE / "integrations").glob("*.py"):
        for line, name in imports_of(source):
            if name.startswith("evalcache.integrations."):
                assert name.split(".")[2] not in clients - {source.stem.removesuffix("_plan")}, (
                    f"{source.name}:{line} imports {name}"
                )


def run_python(code: str) -> str:
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


HEAVY = "sorted({'torch', 'transformers', 'lm_eval', 'inspect_ai', 'lighteval'} & set(sys.modules))"


def test_importing_the_package_does_not_import_torch() -> None:
    assert run_python(f"import sys, evalcache; print({HEAVY})").strip() == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["path"], ["run", "--help"]], ids=" ".join)
def test_verbs_without_a_model_do_not_import_torch(arguments: list[str]) -> None:
    code = f"""
import sys
from evalcache.cli import main
try:
    main({arguments!r})
except SystemExit as ending:
    assert not ending.code, ending.code
print({HEAVY})
"""
    assert run_python(code).splitlines()[-1] == "[]"
