"""The import hook on real modules: it calls back once, at the right moment, and leaves everything as it was."""

from __future__ import annotations

import importlib
import inspect
import sys

import pytest

from evalcache.importhook import ImportHook


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package ``grove`` with the modules ``oak`` (which imports ``elm``), ``elm`` and ``broken``."""
    folder = tmp_path / "grove"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "oak.py").write_text("import grove.elm\nFULL = True\n")
    (folder / "elm.py").write_text("def leaf():\n    return 'green'\n")
    (folder / "broken.py").write_text("raise ValueError('rotten')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    finders = list(sys.meta_path)
    yield "grove"
    assert sys.meta_path == finders
    for name in [name for name in sys.modules if name.split(".")[0] == "grove"]:
        del sys.modules[name]


def test_calls_back_when_the_last_of_the_names_is_there(package):
    seen = []
    hook = ImportHook(("grove.oak", "grove.elm"), lambda: seen.append(hasattr(sys.modules["grove.oak"], "FULL")))
    hook.install()
    import_module = importlib.import_module
    import_module("grove")
    import_module("grove.elm")
    assert seen == []
    import_module("grove.oak")
    assert seen == [True]
    importlib.reload(sys.modules["grove.oak"])
    assert seen == [True]


def test_calls_back_at_once_where_all_is_imported(package):
    importlib.import_module("grove.oak")
    seen = []
    ImportHook(("grove.oak", "grove.elm"), lambda: seen.append(1)).install()
    assert seen == [1]


def test_the_modules_are_what_they_would_have_been(package):
    hook = ImportHook(("grove.elm", "grove.oak"), list)
    hook.install()
    elm = importlib.import_module("grove.elm")
    hook.remove()
    hook.remove()
    assert type(elm.__loader__).__module__ == "_frozen_importlib_external"
    assert "exec_module" not in vars(elm.__loader__)
    assert inspect.getsource(elm.leaf) == "def leaf():\n    return 'green'\n"


def test_a_module_that_is_not_there_or_fails_does_so_as_always(package):
    hook = ImportHook(("grove.ash", "grove.broken"), list)
    hook.install()
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'grove\.ash'"):
        importlib.import_module("grove.ash")
    for _ in range(2):
        with pytest.raises(ValueError, match="rotten"):
            importlib.import_module("grove.broken")
    assert importlib.util.find_spec("grove.elm") is not None
    hook.remove()
