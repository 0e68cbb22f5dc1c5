"""Put evalcache into a Python that was started below ``evalcache run``; Python imports this by itself, before any user code.

It stands first on PYTHONPATH and so hides a ``sitecustomize`` that the environment may have of its own: that one is run first,
exactly as it would have been. Only an import hook is left behind, so that starting Python costs a millisecond and a process that
meets no model never notices. A fault in here is one line on stderr; the wrapped program runs without us.
"""

import os
import sys


def _run_the_hidden_one(here: str) -> None:
    import importlib.machinery
    import importlib.util

    # Searched from the path as it is without this folder. Whatever it raises is reported by site.py, as without us.
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", sys.path)
    if spec is None or spec.loader is None or (spec.origin and os.path.dirname(os.path.abspath(spec.origin)) == here):
        return
    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


class _NotInstalledHere:
    """This Python has no evalcache: say so once, where it would have mattered, that is when transformers is imported."""

    def find_spec(self, name, path=None, target=None):
        if name == "transformers":
            sys.meta_path.remove(self)
            _warn(f"not installed for {sys.executable}; this process runs without it")
        return None


def _warn(text: str) -> None:
    print(f"evalcache: warning: {text}", file=sys.stderr)


def _enable() -> None:
    try:
        from evalcache.session import enable

        enable()
    except Exception as error:  # the program must run, whatever is wrong with us
        if isinstance(error, ModuleNotFoundError) and error.name == "evalcache":
            sys.meta_path.insert(0, _NotInstalledHere())
            return
        said = " ".join(f"{type(error).__name__}: {error}".split())
        _warn(f"could not start ({said}); this process runs without it")


_here = os.path.dirname(os.path.abspath(__file__))
# The program sees the path that it would have without us; its own children find us through PYTHONPATH again.
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != _here]
try:
    _run_the_hidden_one(_here)
finally:
    if os.environ.get("EVALCACHE_ACTIVE") == "1":
        _enable()
