"""`evalcache run -- CMD`: real commands in real processes, each compared with what it does without us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from evalcache.launch import SITE_FOLDER, find_unreachable, launch_environment

RUN = [sys.executable, "-m", "evalcache", "run", "--"]
# The sessions of these processes meet stand-ins for transformers' two modules, as a script does that imports the real ones.
ENABLED = "import evalcache.session as s; print(s.current() is not None)"


def bare_environment(**more: str) -> dict[str, str]:
    base = {name: value for name, value in os.environ.items() if not name.startswith("EVALCACHE") and name != "PYTHONPATH"}
    return base | more


def run(command: list[str], *, cwd: Path, stdin: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    environment = bare_environment(EVALCACHE_DIR=str(cwd / "cache"), **more)
    return subprocess.run(command, cwd=cwd, env=environment, input=stdin, capture_output=True, text=True, timeout=60)


def both(command: list[str], cwd: Path, **more) -> tuple[subprocess.CompletedProcess[str], subprocess.CompletedProcess[str]]:
    return run(command, cwd=cwd, **more), run([*RUN, *command], cwd=cwd, **more)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


TALK = """
    import sys
    print("out", sys.argv, sys.path, sys.flags.isolated)
    print("in", sys.stdin.read())
    print("err", file=sys.stderr)
    sys.exit(7)
"""


@pytest.mark.parametrize("form", ["script", "absolute", "module", "code"])
def test_a_command_prints_returns_and_fails_as_without_us(tmp_path, form):
    script = write(tmp_path / "talk.py", TALK)
    command = {
        "script": ["python", "talk.py", "--flag", "a b"],
        "absolute": [sys.executable, "-u", str(script)],
        "module": [sys.executable, "-m", "talk", "-x"],
        "code": [sys.executable, "-c", textwrap.dedent(TALK), "-I"],
    }[form]
    bare, ours = both(command, tmp_path, stdin="asked\n", PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert bare.returncode == 7
    assert (ours.returncode, ours.stdout, ours.stderr) == (bare.returncode, bare.stdout, bare.stderr)
    assert not (tmp_path / "cache").exists()


def test_every_python_below_is_reached(tmp_path):
    child = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {ENABLED!r}]))"
    assert run([*RUN, sys.executable, "-c", ENABLED], cwd=tmp_path).stdout == "True\n"
    assert run([*RUN, "sh", "-c", f'"{sys.executable}" -c "{ENABLED}"'], cwd=tmp_path).stdout == "True\n"
    assert run([*RUN, sys.executable, "-c", child], cwd=tmp_path).stdout == "True\n"
    assert run([*RUN, *RUN, sys.executable, "-c", ENABLED], cwd=tmp_path).stdout == "True\n"
    assert run([sys.executable, "-c", ENABLED], cwd=tmp_path).stdout == "False\n"


def test_an_installed_script_is_reached(tmp_path):
    tool = write(tmp_path / "bin" / "tool", f"#!{sys.executable}\n{ENABLED}\n")
    tool.chmod(0o755)
    done = run([*RUN, "tool"], cwd=tmp_path, PATH=f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_starting_python_imports_nothing_heavy(tmp_path):
    heavy = ("torch", "transformers", "duckdb", "diskcache", "numpy", "click")
    code = f"import sys; print([name for name in {heavy} if name in sys.modules])"
    assert run([*RUN, sys.executable, "-c", code], cwd=tmp_path).stdout == "[]\n"


def test_all_processes_of_a_launch_share_one_run(tmp_path):
    show = write(tmp_path / "show.py", "import os; print(os.environ['EVALCACHE_RUN'], os.environ['EVALCACHE_COMMAND'])")
    code = f"import subprocess, sys; [subprocess.call([sys.executable, {str(show)!r}]) for _ in range(2)]"
    first, second = run([*RUN, sys.executable, "-c", code], cwd=tmp_path).stdout.splitlines()
    assert first == second
    assert first[32:].startswith(f" {sys.executable} -c ")


ENDINGS = ["raise ValueError('oh')", "raise SystemExit(3)", "import os; os._exit(4)", "import os; os.abort()"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_failures_are_the_commands_own(tmp_path, ending):
    bare, ours = both([sys.executable, "-c", ending], tmp_path)
    assert bare.returncode != 0
    assert (ours.returncode, ours.stdout, ours.stderr) == (bare.returncode, bare.stdout, bare.stderr)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_the_command_itself(tmp_path, number):
    code = "import sys, time; print('up', flush=True); time.sleep(30)"
    endings = []
    for command in ([sys.executable, "-c", code], [*RUN, sys.executable, "-c", code]):
        process = subprocess.Popen(
            command, cwd=tmp_path, env=bare_environment(EVALCACHE_DIR=str(tmp_path / "cache")),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout.readline() == "up\n"
        process.send_signal(number)
        endings.append((process.communicate(timeout=30)[1], process.returncode))
    assert endings[0] == endings[1]
    assert endings[0][1] == -number


def test_a_closed_pipe_ends_the_command_quietly(tmp_path):
    line = " ".join(f"'{word}'" for word in [*RUN, "yes"])
    done = run(["bash", "-c", f"{line} | head -n 1; exit ${{PIPESTATUS[0]}}"], cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGPIPE, "y\n", "")


def test_a_command_that_is_not_there(tmp_path):
    done = run([*RUN, "no-such-command", "--x"], cwd=tmp_path)
    assert done.returncode == 127
    assert done.stderr.startswith("evalcache: command not found: no-such-command")
    assert "Traceback" not in done.stderr
    write(tmp_path / "plain", "echo")
    assert run([*RUN, "./plain"], cwd=tmp_path).returncode == 126
    assert run(RUN, cwd=tmp_path).returncode == 2


def test_the_environments_own_sitecustomize_still_runs(tmp_path):
    write(tmp_path / "site" / "sitecustomize.py", "import sys; sys.stderr.write('mine\\n'); VALUE = 5")
    code = "import sitecustomize, sys; print(sitecustomize.VALUE, sitecustomize.__file__, sys.path)"
    bare, ours = both([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert bare.stdout.startswith("5 ")
    # The launcher is a Python of the same environment: it says its own "mine" before it becomes the command.
    assert (ours.returncode, ours.stdout, ours.stderr) == (bare.returncode, bare.stdout, 2 * bare.stderr)
    assert run([*RUN, sys.executable, "-c", ENABLED], cwd=tmp_path, PYTHONPATH=str(tmp_path / "site")).stdout == "True\n"


def test_a_broken_sitecustomize_is_reported_as_without_us_and_does_not_keep_us_out(tmp_path):
    write(tmp_path / "site" / "sitecustomize.py", "raise RuntimeError('theirs')")
    done = run([*RUN, sys.executable, "-c", ENABLED], cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert (done.returncode, done.stdout) == (0, "True\n")
    assert "RuntimeError: theirs" in done.stderr


def test_off_adds_nothing(tmp_path):
    code = "import os, sys; print('evalcache' in sys.modules, 'EVALCACHE_RUN' in os.environ, os.environ.get('PYTHONPATH'))"
    assert run([*RUN, sys.executable, "-c", code], cwd=tmp_path, EVALCACHE="off").stdout == "False False None\n"
    assert launch_environment(["x"], {}, policy="off") == {"EVALCACHE": "off"}


def test_a_python_without_evalcache_says_so_only_where_it_matters(tmp_path):
    write(tmp_path / "lib" / "transformers" / "__init__.py", "")
    environment = {"PYTHONPATH": os.pathsep.join([str(SITE_FOLDER), str(tmp_path / "lib")]), "EVALCACHE_ACTIVE": "1"}
    # -S leaves out installed packages, as in another project's Python, and sitecustomize, which is then imported by hand.
    code = "import sitecustomize, sys\nprint('before', file=sys.stderr)\nimport transformers\nimport transformers\nprint('ran')"
    done = run([sys.executable, "-S", "-c", code], cwd=tmp_path, **environment)
    assert done.stdout == "ran\n"
    assert done.stderr.startswith("before\nevalcache: warning: not installed for ")
    assert done.stderr.count("evalcache") == 1


def test_a_fault_at_our_start_is_one_line(tmp_path):
    write(tmp_path / "broken" / "evalcache" / "__init__.py", "")
    write(tmp_path / "broken" / "evalcache" / "session.py", "raise OSError('no\\ndisk')")
    environment = {"PYTHONPATH": os.pathsep.join([str(SITE_FOLDER), str(tmp_path / "broken")]), "EVALCACHE_ACTIVE": "1"}
    done = run([sys.executable, "-c", "print('ran')"], cwd=tmp_path, **environment)
    assert (done.returncode, done.stdout) == (0, "ran\n")
    assert done.stderr == "evalcache: warning: could not start (OSError: no disk); this process runs without it\n"


@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["python", "x.py"], None),
        (["python", "-m", "mod", "-I"], None),
        (["python", "-c", "pass", "-E"], None),
        (["python", "-W", "-I", "x.py"], None),
        (["python", "-WI", "x.py"], None),
        (["python", "-X", "dev", "-uc", "-I"], None),
        (["python", "-", "-I"], None),
        (["tool-not-there", "-I"], None),
        (["python", "-I", "x.py"], "-I"),
        (["/usr/bin/python3.12", "-uE", "x.py"], "-E"),
        (["python3", "-X", "dev", "-BS", "-m", "mod"], "-S"),
        (["python3", "--check-hash-based-pycs", "always", "-I", "x.py"], "-I"),
        (["env", "A=1", "python", "-I", "x.py"], "-I"),
    ],
)
def test_isolated_pythons_are_recognised(command, option):
    assert find_unreachable(command) == option


def test_isolated_pythons_are_warned_about_and_run(tmp_path):
    done = run([*RUN, sys.executable, "-I", "-c", "print('ran')"], cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "ran\n")
    assert "is run with -I, which keeps evalcache out" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    tool = write(tmp_path / "tool", f"#!{sys.executable} -Es\nprint('ran')\n")
    tool.chmod(0o755)
    assert "is run with -E" in run([*RUN, str(tool)], cwd=tmp_path).stderr


def test_the_environment_of_a_launch():
    base = {"PYTHONPATH": os.pathsep.join(["", "/mine", str(SITE_FOLDER)]), "A": "1"}
    made = launch_environment(["python", "a b.py"], base, directory="rel", policy="refresh", match="strict")
    assert made["PYTHONPATH"] == os.pathsep.join([str(SITE_FOLDER), "/mine"])
    assert (made["EVALCACHE"], made["EVALCACHE_MATCH"], made["A"]) == ("refresh", "strict", "1")
    assert made["EVALCACHE_DIR"] == os.path.abspath("rel")
    assert made["EVALCACHE_COMMAND"] == "python 'a b.py'"
    assert len(made["EVALCACHE_RUN"]) == 32
    assert launch_environment(["x"], {"EVALCACHE_RUN": "ab" * 16})["EVALCACHE_RUN"] == "ab" * 16
    assert base == {"PYTHONPATH": os.pathsep.join(["", "/mine", str(SITE_FOLDER)]), "A": "1"}
