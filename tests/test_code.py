"""A change of code changes the answer and no tensor: each shows another root or a refusal, and putting it back the old root."""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import sysconfig
import textwrap
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny import build, prompts
from torch import nn
from transformers import AttentionInterface, AutoModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaMLP, LlamaRMSNorm

from evalcache.code import library_of, version_of
from evalcache.digest import Digest
from evalcache.errors import FingerprintError
from evalcache.weights import Fingerprinter, fingerprint


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama")


def seen(checks: Fingerprinter) -> Digest | str:
    """The root, or the reason of the refusal."""
    try:
        return checks.manifest().root
    except FingerprintError as error:
        return error.reason


def answer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**prompts(2, 8)).logits


@contextlib.contextmanager
def put(owner: Any, name: str, value: Any) -> Iterator[None]:
    had = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextlib.contextmanager
def removed_after(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


# --- patches of library code ----------------------------------------------------------------------------------------------


def doubled(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 2


@functools.wraps(LlamaMLP.forward)
def disguised(self: Any, x: torch.Tensor) -> torch.Tensor:
    return doubled(self, x)


class Callable_:
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


class Descriptor:
    def __get__(self, instance: Any, owner: type) -> Any:
        return functools.partial(doubled, instance)


def generated() -> Any:
    space: dict[str, Any] = {}
    exec("def forward(self, x):\n    return self.down_proj(self.up_proj(x))", space)
    return space["forward"]


def rotated(q: Any, k: Any, *args: Any, **kwargs: Any) -> Any:
    return q, k


def plus_attention(*args: Any, **kwargs: Any) -> Any:
    return ATTENTION(*args, **kwargs) + 1


ATTENTION = torch.nn.functional.scaled_dot_product_attention
ROTATE = modeling_llama.apply_rotary_pos_emb
WITH_KEYWORDS = next(value for value in vars(torch).values() if isinstance(value, types.FunctionType) and value.__kwdefaults__)

PATCHES: dict[str, Callable[[], Any]] = {
    "method": lambda: put(LlamaMLP, "forward", doubled),
    "method that copies the name": lambda: put(LlamaMLP, "forward", disguised),
    "lambda": lambda: put(LlamaMLP, "forward", lambda self, x: x),
    "method under a library's decorator": lambda: put(LlamaMLP, "forward", torch.no_grad()(doubled)),
    "method as partialmethod": lambda: put(LlamaMLP, "forward", functools.partialmethod(doubled)),
    "callable object": lambda: put(LlamaMLP, "forward", Callable_()),
    "descriptor": lambda: put(LlamaMLP, "forward", Descriptor()),
    "property": lambda: put(LlamaMLP, "forward", property(lambda self: functools.partial(doubled, self))),
    "built-in": lambda: put(LlamaMLP, "forward", torch.relu),
    "another class's method": lambda: put(LlamaMLP, "forward", nn.Identity.forward),
    "another library's function": lambda: put(LlamaMLP, "forward", transformers.pytorch_utils.apply_chunking_to_forward),
    "compiled method": lambda: put(LlamaMLP, "forward", torch.compile(doubled, backend="eager")),
    "generated function": lambda: put(LlamaMLP, "forward", generated()),
    "method that was inherited": lambda: put(LlamaMLP, "__call__", lambda self, x: x),
    "inner call": lambda: put(LlamaRMSNorm, "_call_impl", doubled),
    "base class": lambda: put(nn.Module, "__call__", lambda self, *args, **kwargs: self.forward(*args, **kwargs)),
    "class's compiled call": lambda: put(nn.Module, "_compiled_call_impl", lambda self, *args: None),
    "generation": lambda: put(LlamaForCausalLM, "_sample", lambda self, *args, **kwargs: None),
    "linear layer": lambda: put(nn.Linear, "forward", lambda self, x: x),
    "function beside the class": lambda: put(modeling_llama, "apply_rotary_pos_emb", rotated),
    "function beside, decorated": lambda: put(modeling_llama, "apply_rotary_pos_emb", torch.no_grad()(rotated)),
    "function beside, bound": lambda: put(modeling_llama, "apply_rotary_pos_emb", functools.partial(ROTATE, unsqueeze_dim=2)),
    "shadowed built-in": lambda: put_new(modeling_llama, "len", lambda items: 1),
    "imported function": lambda: put(modeling_llama, "create_causal_mask", lambda *args, **kwargs: None),
    "function of an imported module": lambda: put(transformers.masking_utils, "sdpa_mask", lambda *args, **kwargs: None),
    "function further away": lambda: put(transformers.masking_utils, "causal_mask_function", lambda *args: True),
    "torch's attention": lambda: put(torch.nn.functional, "scaled_dot_product_attention", plus_attention),
    "torch's attention by another of torch's": lambda: put(torch.nn.functional, "scaled_dot_product_attention", torch.baddbmm),
    "torch's function": lambda: put(torch, "matmul", torch.mul),
    "tensor's method": lambda: put(torch.Tensor, "split", lambda self, *args: None),
    "functional by another": lambda: put(torch.nn.functional, "silu", torch.nn.functional.relu),
    "inner binding": lambda: put(torch._C._nn, "silu", torch.relu),
    "cache": lambda: put(DynamicCache, "update", lambda self, *args, **kwargs: None),
    "cache's layer": lambda: put(DynamicLayer, "update", lambda self, *args, **kwargs: None),
    "rope function in a table": lambda: item(transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS, "linear", rotated),
    "code of a method": lambda: code(LlamaMLP.forward, doubled),
    "code of a function beside": lambda: code(ROTATE, rotated),
    "code of a function of torch": lambda: code(torch.nn.functional.silu, torch.nn.functional.relu6),
    "code under a decorator": lambda: code(innermost(LlamaForCausalLM.forward), doubled_all),
    "defaults": lambda: defaults(ROTATE, (2,)),
    "keyword default": lambda: item(WITH_KEYWORDS.__kwdefaults__, next(iter(WITH_KEYWORDS.__kwdefaults__)), 0.123),
    "constant of a class": lambda: put(LlamaForCausalLM, "main_input_name", "inputs_embeds"),
    "user's class in a library": lambda: put(modeling_llama, "LlamaMLP", type("LlamaMLP", (LlamaMLP,), {"forward": doubled})),
}


@contextlib.contextmanager
def put_new(owner: Any, name: str, value: Any) -> Iterator[None]:
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)


@contextlib.contextmanager
def item(table: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    before = table[name]
    table[name] = value
    try:
        yield
    finally:
        table[name] = before


@contextlib.contextmanager
def code(function: Any, other: Any) -> Iterator[None]:
    before = function.__code__
    function.__code__ = other.__code__.replace(co_freevars=before.co_freevars)
    try:
        yield
    finally:
        function.__code__ = before


@contextlib.contextmanager
def defaults(function: Any, values: tuple[Any, ...]) -> Iterator[None]:
    before = function.__defaults__
    function.__defaults__ = values
    try:
        yield
    finally:
        function.__defaults__ = before


def innermost(function: Any) -> Any:
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function


def doubled_all(self: Any, *args: Any, **kwargs: Any) -> Any:
    return None


@pytest.mark.parametrize("name", PATCHES)
def test_a_patch_is_seen_whether_it_comes_before_or_after_the_first_fingerprint(name: str, model: Any) -> None:
    checks = Fingerprinter(model)
    before = checks.manifest().root
    with PATCHES[name]():
        found = seen(checks)
        assert found != before
        assert found == "patched" or isinstance(found, Digest)
        assert seen(Fingerprinter(model)) == found
    assert checks.manifest().root == before == fingerprint(model).root


@pytest.mark.parametrize("name", ["method", "function beside the class", "torch's attention", "shadowed built-in"])
def test_users_patches_are_refused_by_name(name: str, model: Any) -> None:
    with PATCHES[name](), pytest.raises(FingerprintError, match="replaced by") as refused:
        fingerprint(model)
    assert refused.value.reason == "patched"


@pytest.mark.parametrize("name", ["method", "function beside the class", "torch's attention", "code of a method"])
def test_the_answer_really_changes(name: str, model: Any) -> None:
    before = answer(model)
    with PATCHES[name]():
        assert not torch.equal(answer(model), before)
    assert torch.equal(answer(model), before)


def test_a_patch_that_was_there_first_is_not_taken_for_the_library(tmp_path: Path) -> None:
    script = """
        import sys; sys.path[:0] = [{tests!r}]
        import torch
        from tiny import build
        {patch}
        from evalcache.weights import fingerprint
        from evalcache.errors import FingerprintError
        try: print(fingerprint(build("llama")).root)
        except FingerprintError as error: print(error.reason)
        """
    patches = (
        "pass",
        "torch.nn.functional.silu = torch.nn.functional.relu",
        "import torch.library as l; kept = l.Library('aten', 'IMPL'); kept.impl('mm', lambda a, b: a, 'CPU')",
    )
    runs = [start(tmp_path / "first.py", script.replace("{patch}", patch).replace("{tests!r}", repr(TESTS))) for patch in patches]
    roots = [finish(run) for run in runs]
    assert len(set(roots)) == len(patches), roots


def test_operators_given_another_implementation_are_refused(model: Any) -> None:
    before = fingerprint(model).root
    library = torch.library.Library("aten", "IMPL")
    library.impl("silu", lambda x: x, "CPU")
    try:
        with pytest.raises(FingerprintError, match="silu") as refused:
            fingerprint(model)
        assert refused.value.reason == "patched"
    finally:
        library._destroy()
    assert fingerprint(model).root == before


# --- instances, hooks, modes ----------------------------------------------------------------------------------------------


def test_methods_of_an_instance_are_refused(model: Any) -> None:
    checks = Fingerprinter(model)
    before = checks.manifest().root
    mlp = model.model.layers[0].mlp
    for method in (lambda x: x, types.MethodType(doubled, mlp), functools.partial(doubled, mlp), Callable_()):
        mlp.forward = method
        with pytest.raises(FingerprintError, match=r"layers\.0\.mlp: the instance has its own forward") as refused:
            checks.manifest()
        assert refused.value.reason == "patched"
        del mlp.forward
    mlp.forward = mlp.forward  # bound to itself: nothing is different
    assert checks.manifest().root == before
    del mlp.forward


def test_a_wrapper_that_copied_our_mark_is_not_ours(model: Any) -> None:
    def ours() -> None: ...

    from evalcache.code import ORIGINAL

    setattr(ours, ORIGINAL, LlamaMLP.forward)

    @functools.wraps(ours)
    def wrapper(self: Any, x: Any) -> Any:
        return x

    with put(LlamaMLP, "forward", wrapper):
        assert seen(Fingerprinter(model)) == "patched"
    model.model.norm.forward = wrapper
    assert seen(Fingerprinter(model)) == "patched"
    del model.model.norm.forward


def steering(vector: float) -> Callable[..., Any]:
    return lambda module, args, output: output + vector


def test_hooks_are_refused(model: Any) -> None:
    checks = Fingerprinter(model)
    before, said = checks.manifest().root, answer(model)
    layer = model.model.layers[1].mlp
    disguise = functools.wraps(transformers.utils.output_capturing.install_output_capuring_hook)(steering(1.0))
    handles = [
        lambda: layer.register_forward_hook(steering(1.0)),
        lambda: layer.register_forward_hook(steering(2.0)),
        lambda: layer.register_forward_hook(disguise),
        lambda: layer.register_forward_pre_hook(lambda module, args: None),
        lambda: torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: None),
        lambda: torch.nn.modules.module.register_module_forward_pre_hook(lambda module, args: None),
    ]
    for handle in handles:
        with removed_after(handle()):
            assert seen(checks) == "hook"
    with removed_after(handles[0]()):
        first = answer(model)
    with removed_after(handles[1]()):
        assert not torch.equal(answer(model), first)
    assert not torch.equal(first, said)
    assert checks.manifest().root == before


def test_modes_are_refused(model: Any) -> None:
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    class Dispatches(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    checks = Fingerprinter(model)
    before = checks.manifest().root
    for mode in (Functions, Dispatches):
        with mode():
            assert seen(checks) == "hook"
    with torch.device("cpu"), torch.inference_mode():
        assert checks.manifest().root == before


# --- kernels registered by name -------------------------------------------------------------------------------------------


def test_a_registered_kernel_counts_while_it_is_chosen() -> None:
    model = build("llama")
    checks = Fingerprinter(model)
    before, said = checks.manifest().root, answer(model)
    strength = 2.0

    def mine(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        output, weights = kept["sdpa"](module, query, key, value, mask, **kwargs)
        return output * strength, weights

    mapping = AttentionInterface._global_mapping
    kept = dict(mapping)
    try:
        AttentionInterface.register("mine", mine)
        assert checks.manifest().root == before, "nobody chose it"
        model.config._attn_implementation = "mine"
        chosen = seen(checks)
        assert chosen != before
        assert not torch.equal(answer(model), said)
        strength = 3.0  # in the closure of the registered function
        assert seen(checks) not in (chosen, before)
        strength = 2.0
        assert seen(checks) == chosen
        model.config._attn_implementation = "sdpa"
        AttentionInterface.register("sdpa", mine)
        assert seen(checks) not in (chosen, before)
        AttentionInterface.register("sdpa", transformers.integrations.eager_paged.eager_paged_attention_forward)
        assert seen(checks) not in (chosen, before)
        mapping.update(kept)
        local = modeling_llama.ALL_ATTENTION_FUNCTIONS
        local["sdpa"] = mine
        assert seen(checks) != before
        del local["sdpa"]
    finally:
        mapping.clear()
        mapping.update(kept)
    assert checks.manifest().root == before


# --- the user's own modules -----------------------------------------------------------------------------------------------

MODULE = """
import torch
from torch import nn

OFFSET = 1.0
SETTINGS = {"scale": 1.0}


def helper(x):
    return x + OFFSET


def scaled(by):
    def inner(x):
        return x * by
    return inner


twice = scaled(2.0)


class Base(nn.Module):
    def finish(self, x):
        return x * 4.0


class Mine(Base):
    factor = 8.0

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        nn.init.ones_(self.linear.weight); nn.init.zeros_(self.linear.bias)

    @torch.no_grad()
    def forward(self, x):
        return self.finish(twice(helper(self.linear(x)))) * self.factor * SETTINGS["scale"]
"""
EDITS = {
    "global constant": ("OFFSET = 1.0", "OFFSET = 2.0"),
    "global dictionary": ('"scale": 1.0', '"scale": 3.0'),
    "helper": ("x + OFFSET", "x - OFFSET"),
    "closure": ("scaled(2.0)", "scaled(3.0)"),
    "base class": ("x * 4.0", "x * 5.0"),
    "class constant": ("factor = 8.0", "factor = 9.0"),
    "decorated forward": ("self.linear(x)", "self.linear(-x)"),
}
TESTS = str(Path(__file__).parent)
SCRIPT_END = """
if __name__ == "__main__":
    from evalcache.weights import fingerprint
    model = Mine().eval()
    print(fingerprint(model).root, model(torch.ones(2)).tolist())
"""


def load(path: Path, source: str, name: str) -> types.ModuleType:
    """Import a module from a file that holds ``source``, as another process would: afresh."""
    path.write_text(source)
    module = types.ModuleType(name)
    module.__file__ = str(path)
    sys.modules[name] = module
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


def start(path: Path, source: str) -> subprocess.Popen[str]:
    path = path.with_name(f"{path.stem}{len(list(path.parent.iterdir()))}.py")
    path.write_text(textwrap.dedent(source))
    return subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True)


def finish(run: subprocess.Popen[str]) -> str:
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 0
    return output.strip().splitlines()[-1]


@pytest.mark.parametrize("edit", EDITS)
def test_one_character_of_a_users_module_is_another_model(edit: str, tmp_path: Path) -> None:
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
    first = load(tmp_path / "a" / "mine.py", MODULE, "mine_a")
    before = fingerprint(first.Mine().eval()).root
    old, new = EDITS[edit]
    assert old in MODULE
    second = load(tmp_path / "b" / "mine.py", MODULE.replace(old, new), "mine_a")
    assert not torch.equal(first.Mine()(torch.ones(2)), second.Mine()(torch.ones(2)))
    assert fingerprint(second.Mine().eval()).root != before
    third = load(tmp_path / "c" / "moved.py", MODULE, "mine_a")
    assert fingerprint(third.Mine().eval()).root == before


def test_scripts_are_known_by_what_they_compute_with(tmp_path: Path) -> None:
    sources = [MODULE + SCRIPT_END]
    sources += [MODULE.replace(*EDITS[edit]) + SCRIPT_END for edit in ("global constant", "decorated forward")]
    sources.append("# a comment\nprint('and a line')\n" + MODULE + SCRIPT_END)
    same, *edited, commented = [finish(run) for run in [start(tmp_path / "script.py", source) for source in sources]]
    assert commented == same
    assert len({line.split()[0] for line in (same, *edited)}) == 3
    assert len({line.split(maxsplit=1)[1] for line in (same, *edited)}) == 3


def test_a_live_change_of_the_users_code_is_seen(tmp_path: Path) -> None:
    mine = load(tmp_path / "mine.py", MODULE, "mine_live")
    model = mine.Mine().eval()
    checks = Fingerprinter(model)
    before = checks.manifest().root
    changes: list[tuple[Any, str, Any]] = [
        (mine, "OFFSET", 5.0),
        (mine, "helper", lambda x: x),
        (mine.Mine, "factor", 1.0),
        (mine.Base, "finish", lambda self, x: x),
        (mine.SETTINGS, "scale", 2.0),
    ]
    for owner, name, value in changes:
        with item(owner, name, value) if isinstance(owner, dict) else put(owner, name, value):
            assert seen(checks) != before
    cell = mine.twice.__closure__[0]
    cell.cell_contents = 7.0
    assert seen(checks) != before
    cell.cell_contents = 2.0
    assert checks.manifest().root == before


def test_what_a_users_code_reaches_is_hashed_or_refused(tmp_path: Path) -> None:
    source = """
from torch import nn
import torch, enum, dataclasses, socket
class Kind(enum.Enum):
    ADD = 1
@dataclasses.dataclass
class Settings:
    scale: float = 1.0
    def apply(self, x): return x * self.scale
SETTINGS = Settings()
VECTOR = torch.ones(2)
HANDLE = None
class Mine(nn.Module):
    def forward(self, x):
        return SETTINGS.apply(x) + VECTOR * Kind.ADD.value if HANDLE is None else x
"""
    mine = load(tmp_path / "mine.py", source, "mine_reach")
    model = mine.Mine().eval()
    checks = Fingerprinter(model)
    before = checks.manifest().root
    mine.SETTINGS.scale = 2.0
    assert seen(checks) != before
    mine.SETTINGS.scale = 1.0
    mine.VECTOR += 1
    assert seen(checks) != before
    mine.VECTOR -= 1
    with put(mine.Settings, "apply", lambda self, x: x):
        assert seen(checks) != before
    assert checks.manifest().root == before
    with mine.socket.socket() as handle, put(mine, "HANDLE", handle):
        assert seen(checks) == "code"
    other = load(tmp_path / "other.py", source.replace("ADD = 1", "ADD = 2"), "mine_reach")
    assert fingerprint(other.Mine().eval()).root != before


REMOTE = """
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedConfig


class TinyConfig(PreTrainedConfig):
    model_type = "tiny_remote"

    def __init__(self, width=4, **kwargs):
        self.width = width
        super().__init__(**kwargs)


class TinyModel(PreTrainedModel):
    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.linear = nn.Linear(config.width, config.width)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            module.weight.data.fill_(0.5)
            module.bias.data.zero_()

    def forward(self, x):
        return self.linear(x) + 1.0
"""


def remote_folder(path: Path, source: str) -> Path:
    path.mkdir()
    (path / "modeling_tiny.py").write_text(source)
    (path / "config.json").write_text(
        '{"model_type": "tiny_remote", "width": 4, "architectures": ["TinyModel"],'
        ' "auto_map": {"AutoConfig": "modeling_tiny.TinyConfig", "AutoModel": "modeling_tiny.TinyModel"}}'
    )
    namespace = load(path / "modeling_tiny.py", source, f"saved_{path.name}")
    from safetensors.torch import save_file

    save_file(namespace.TinyModel(namespace.TinyConfig()).state_dict(), path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_remote_code_edited_by_one_character_is_another_model(tmp_path: Path) -> None:
    sources = {"one": REMOTE, "two": REMOTE.replace("+ 1.0", "+ 2.0"), "three": REMOTE}
    roots, answers = {}, {}
    for name, source in sources.items():
        model = AutoModel.from_pretrained(remote_folder(tmp_path / name, source), trust_remote_code=True).eval()
        roots[name] = fingerprint(model).root
        answers[name] = model(torch.ones(4)).tolist()
    assert answers["one"] != answers["two"]
    assert roots["one"] == roots["three"] != roots["two"]


# --- whose code it is -----------------------------------------------------------------------------------------------------


def test_files_belong_to_libraries_or_to_the_user() -> None:
    assert library_of(torch.__file__) == "torch"
    assert library_of(os.__file__) == "python"
    assert library_of("<frozen importlib._bootstrap>") == "python"
    assert library_of(__file__) is None
    assert version_of("torch") == torch.__version__
    assert version_of("no_such_package") is None


def test_a_virtual_environment_that_is_reached_by_a_link_holds_libraries_all_the_same(tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(sys.prefix)
    code = "import sys, xxhash, json; from evalcache.code import library_of; print(sys.prefix, *map(library_of, sys.argv[1:]))"
    inside = sysconfig.get_paths()["purelib"].removeprefix(sys.prefix)
    files = (f"{link}{inside}/xxhash/__init__.py", f"{sys.prefix}{inside}/xxhash/__init__.py", str(tmp_path / "script.py"))
    done = subprocess.run([link / "bin" / "python", "-c", code, *files], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [str(link), "xxhash", "xxhash", "None"], done.stderr


def test_a_package_that_is_linked_into_the_libraries_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site, checkout = tmp_path / "venv" / "site-packages", tmp_path / "checkout"
    kept = tmp_path / "store" / "site-packages" / "xxhash"  # where a package manager keeps what it links
    for folder in (site / "torch", checkout, kept):
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    (site / "numpy").symlink_to(checkout)  # as `flit install --symlink` does: the version stays while the source is edited
    (site / "pytest.py").symlink_to(checkout / "__init__.py")
    (site / "xxhash").symlink_to(kept)
    (site / "torch" / "part.py").symlink_to(checkout / "__init__.py")  # a package manager that links each file from its cache
    monkeypatch.setattr("evalcache.code._LIBRARY_FOLDERS", (f"{site}/",))
    asked = {"numpy/__init__.py": None, "pytest.py": None, "xxhash/a.py": "xxhash", "torch/part.py": "torch"}
    assert {name: library_of.__wrapped__(f"{site}/{name}") for name in asked} == asked
