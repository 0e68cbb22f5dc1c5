"""The command line: parse → call → print. No logic lives here; every verb is a few calls into the levels below.

Exit codes: 0 good, 1 a finding (models that differ, a damaged entry), 2 wrong usage or a fault that is explained in one message,
3 the ledger is locked by another process, 4 the budget of a run is spent. `run` ends with its command's own code. Nothing here
imports torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from evalcache.cli_exchange import conflicts, export, import_
from evalcache.cli_options import Place, asks_a_cache, asks_for_prices
from evalcache.cli_pages import report, ui
from evalcache.cli_reports import audit, explain, explain_run
from evalcache.cli_store import prune, verify
from evalcache.errors import EvalCacheError
from evalcache.progress import progress_bar
from evalcache.session import disable

_POLICIES = ("use", "refresh", "read_only", "replay", "off")
_MATCHES = ("portable", "strict")
_RUNS = """
SELECT run, started_at, status, hits, misses, uncacheable, duplicates, model_loads, saved_seconds, command
FROM hits_by_run ORDER BY started_at DESC NULLS LAST LIMIT ?
"""


def _tags(context: click.Context, option: click.Parameter, tags: Sequence[str]) -> Sequence[str]:
    """Tags as they can be told apart in ``EVALCACHE_TAGS``."""
    for tag in tags:
        if "," in tag or not tag.strip():
            raise click.BadParameter(f"{tag!r}: a tag is not empty and has no comma")
    return tags


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="llm-evalcache", prog_name="evalcache")
def commands() -> None:
    """The build cache for LLM evals: asks a model only what it has not answered yet.

    Exit codes: 0 good, 1 a finding, 2 usage, 3 the ledger is locked, 4 the budget of a run is spent.
    """


@commands.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--dir", "directory", metavar="FOLDER", help="Cache folder (default: EVALCACHE_DIR, or the user's cache folder).")
@click.option("--policy", type=click.Choice(_POLICIES), help="What the run may do with the store (default: EVALCACHE, or use).")
@click.option("--match", type=click.Choice(_MATCHES), help="strict: key the device and the batch (default: EVALCACHE_MATCH).")
@click.option("--components", is_flag=True, help="Compute log-likelihoods from the first changed layer up.")
@click.option("--tag", "tags", metavar="NAME", multiple=True, callback=_tags, help="A word of yours for this run; repeatable.")
@click.option("--ab", is_flag=True, help="Run it bare as well, and compare what is claimed with what the clock says.")
@click.option("--budget", metavar="2h|20EUR", help="Plan first, and stop between two batches once so much is spent.")
@asks_for_prices
@click.option("--json", "json_path", metavar="FILE", type=click.Path(dir_okay=False), help="With --ab: write the figures there.")
@click.argument("command", metavar="CMD...", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    directory: str | None,
    policy: str | None,
    match: str | None,
    components: bool,
    tags: Sequence[str],
    ab: bool,
    budget: str | None,
    prices: Sequence[str],
    price_files: Sequence[str],
    json_path: str | None,
    command: Sequence[str],
) -> int:
    """Run a command with evalcache in it: evalcache run -- python eval.py --limit 500

    The command's exit code, output, input and signals are its own. One line on stderr says at the end what was reused.

    With --ab the command runs two or three times, without input: cached (again, where the first had to fill the store), then
    bare. Compared are whole processes: the seconds of hits, merged requests and avoided loads less our overhead, with what the
    bare run took longer by the clock. Exit code 1 where the claim is more than 15 % off; the command's own where it fails.

    With --budget the run is planned first, where it can be, and ends with exit code 4 between two batches once its computing,
    loading and our overhead have taken so many seconds, or so much money. What was computed is stored: run it again to go on.
    Exit code 2 where loading the model alone would take it all: the same command would never get further.
    """
    if components:
        os.environ["EVALCACHE_COMPONENTS"] = "1"
    if ab and budget is not None:
        raise click.UsageError("--budget is not for --ab, which has to run everything")
    if ab:
        from evalcache.ab import run_compared

        found = run_compared(command, directory=directory, policy=policy, match=match, tags=tags)
        return found if isinstance(found, int) else found.tell(json_path)
    if json_path is not None:
        raise click.UsageError("--json FILE is for --ab")
    if os.environ.get("EVALCACHE_MAX_SIZE"):
        from evalcache.pruning import size_limit

        size_limit()  # said now, and not in a warning at the end
    if budget is not None:
        from evalcache.plan import run_with_budget

        run_with_budget(command, budget, prices, price_files, directory=directory, policy=policy, match=match)
    from evalcache.launch import run_command

    run_command(command, directory=directory, policy=policy, match=match, tags=tags)


@commands.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--policy", type=click.Choice(_POLICIES), help="What the run may do with the store (default: EVALCACHE, or use).")
@click.option("--match", type=click.Choice(_MATCHES), help="strict: key the device and the batch (default: EVALCACHE_MATCH).")
@asks_for_prices
@asks_a_cache
@click.argument("command", metavar="CMD...", nargs=-1, required=True, type=click.UNPROCESSED)
def plan(
    policy: str | None,
    match: str | None,
    prices: Sequence[str],
    price_files: Sequence[str],
    directory: str | None,
    as_json: bool,
    command: Sequence[str],
) -> None:
    """Say what a command would hit and what it would run: evalcache plan -- lm_eval run --model hf …

    The command is run as far as its requests; no model is loaded, nothing is stored, and its output goes to stderr. What would
    run is estimated from what like requests took on that device, with the range from the 10th to the 90th percentile.

    For lm_eval with hf models. Of other commands the requests are not known before they run: exit code 2, with the reason.
    """
    from evalcache.plan import make_plan, tell
    from evalcache.prices import read_prices
    from evalcache.printing import print_json

    known = read_prices(prices, price_files)
    found = make_plan(command, directory=directory, policy=policy, match=match)
    if as_json:
        print_json(found.to_json(known))
    else:
        tell(found, known)


@commands.command()
@click.argument("path", type=click.Path(exists=True))
@click.option("--modules", is_flag=True, help="One row per module instead of the root alone.")
@click.option("--rehash", is_flag=True, help="Read every byte, even of files that have not been touched since the last time.")
@asks_a_cache
def fingerprint(path: str, modules: bool, rehash: bool, directory: str | None, as_json: bool) -> None:
    """Fingerprint the files of a checkpoint, without loading the model."""
    from evalcache.checkpoint import fingerprint_checkpoint
    from evalcache.filememo import FileMemo
    from evalcache.printing import print_fields, print_json, print_table, said_bytes

    memo = FileMemo(Place(directory).directory)
    with progress_bar("reading the checkpoint", in_bytes=True) as tell:
        manifest = fingerprint_checkpoint(path, memo=memo, rehash=rehash, progress=tell)
    rows = [
        (name, str(module.digest), module.class_name, sum(tensor.size_bytes for tensor in module.tensors.values()))
        for name, module in manifest.modules.items()
    ]
    if as_json:
        found = {"path": path, "digest": manifest.root, "tensors": len(manifest.tensors), "size_bytes": manifest.size_bytes}
        if modules:
            found["modules"] = [dict(zip(("path", "digest", "class", "size_bytes"), row, strict=True)) for row in rows]
        print_json(found)
    elif modules:
        print_table(("module", "digest", "class", "bytes"), [(row[0] or "(root)", *row[1:]) for row in rows])
    else:
        size = said_bytes(manifest.size_bytes)
        print_fields({"digest": manifest.root, "tensors": len(manifest.tensors), "bytes": f"{manifest.size_bytes:,} ({size})"})


@commands.command()
@click.argument("left", metavar="A")
@click.argument("right", metavar="B")
@asks_a_cache
def diff(left: str, right: str, directory: str | None, as_json: bool) -> int:
    """Say which modules of two models differ. A and B are checkpoint folders, or digests of models that were run.

    Exit code 1 if they differ.
    """
    from evalcache.names import find_manifest
    from evalcache.printing import print_json, visible

    one, other = (find_manifest(name, Place(directory).synced) for name in (left, right))
    found = one.diff(other)
    if as_json:
        print_json(
            {
                "left": one.root,
                "right": other.root,
                "equal": not found,
                "summary": str(found),
                "tensors": found.tensors,
                "tensors_total": found.total,
                "parts": [{"module": path, "kind": kind} for path, kind in found.parts],
            }
        )
    else:
        print(visible(str(found)))
    return int(bool(found))


@commands.command()
@asks_a_cache
def doctor(directory: str | None, as_json: bool) -> int:
    """Look for what is wrong: versions, clients, the cache folder, locks, disk. Exit code 1 if anything is.

    Changes nothing, and needs neither a model nor a GPU.
    """
    from evalcache.doctor import examine, is_good, to_json
    from evalcache.printing import print_json, print_table, visible

    checks = examine(Place(directory).given)
    if as_json:
        print_json(to_json(checks))
    else:
        print_table(("", "state", "found"), [(check.name, check.state, check.found) for check in checks])
        for check in checks:
            if check.hint:
                print(visible(f"\n{check.state}: {check.name}: {check.found}\n  {check.hint}"))
    return int(not is_good(checks))


@commands.command()
@click.option("--limit", default=20, show_default=True, help="Latest runs to show.")
@asks_a_cache
def runs(limit: int, directory: str | None, as_json: bool) -> None:
    """List the latest runs."""
    from evalcache.printing import print_json, print_table

    table = Place(directory).synced().query(_RUNS, [limit])
    if as_json:
        print_json([dict(zip(table.columns, row, strict=True)) for row in table.rows])
    else:
        print_table(table.columns, table.rows, empty="no runs yet")


@commands.command()
@click.option("--run", "run_name", metavar="ID|last", help="One run's hits, misses, savings and cost.")
@asks_a_cache
def stats(run_name: str | None, directory: str | None, as_json: bool) -> None:
    """Sum up one run, or without --run say what the cache holds."""
    from evalcache.holders import held_by
    from evalcache.printing import print_fields, print_json

    place = Place(directory)
    if run_name is not None:
        from evalcache.audit import summarise

        found = summarise(place.synced(), run_name).to_json()
    else:
        held = place.store.stats()
        waits = held.journal_rows and held_by(place.ledger_path, place.ledger_path.with_name("ledger.duckdb.lock"))
        found = {
            "directory": place.given,
            "entries": held.entries,
            "objects": held.objects,
            "journal_rows": held.journal_rows,
            "set_aside": held.aside,
            "store_bytes": held.size_bytes,
            "ledger": place.ledger_path,
            "ledger_held_by": waits or None,
            "ledger_bytes": place.ledger_path.stat().st_size if place.ledger_path.exists() else 0,
        }
    (print_json if as_json else print_fields)(found)


@commands.command()
@click.argument("key")
@asks_a_cache
def show(key: str, directory: str | None, as_json: bool) -> None:
    """Show one stored entry: what was asked, what was answered, and what it cost."""
    from evalcache.entryview import describe_entry
    from evalcache.names import find_key
    from evalcache.printing import print_fields, print_json

    store = Place(directory).store
    (print_json if as_json else print_fields)(describe_entry(store, find_key(key, store)))


@commands.command()
@click.argument("sql")
@click.option("--unsafe", is_flag=True, help="Allow statements that read files or change the ledger.")
@asks_a_cache
def query(sql: str, unsafe: bool, directory: str | None, as_json: bool) -> None:
    """Ask the ledger in SQL. `SHOW TABLES` lists what there is."""
    from evalcache.printing import print_json, print_table

    table = Place(directory).synced().query(sql, unsafe=unsafe)
    if as_json:
        print_json([dict(zip(table.columns, row, strict=True)) for row in table.rows])
    else:
        print_table(table.columns, table.rows, empty="no rows")


@commands.command()
@asks_a_cache
def path(directory: str | None, as_json: bool) -> None:
    """Print the cache folder."""
    from evalcache.printing import print_json

    place = Place(directory)
    if as_json:
        print_json({"directory": place.given, "store": place.store_path, "ledger": place.ledger_path})
    else:
        print(place.given)


for _verb in (audit, conflicts, explain, explain_run, export, import_, prune, report, ui, verify):
    commands.add_command(_verb)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The console script: run one verb and exit with its code."""
    disable()  # below `evalcache run` this process has a session, and nothing to do with it
    try:
        code = commands.main(args=arguments, prog_name="evalcache", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except click.Abort:
        code = 130
    except EvalCacheError as error:
        from evalcache.printing import print_error

        print_error(error.message, error.hint)
        code = error.exit_code
    except BrokenPipeError:
        # The reader left (`| head`); Python would complain once more when it flushes at the end.
        sys.stdout = None  # type: ignore[assignment]
        code = 141
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
