"""The verbs that look after a cache folder: parse → call → print, as in `cli.py`."""

from __future__ import annotations

from pathlib import Path

import click

from evalcache.cli_options import Place, asks_a_cache
from evalcache.progress import progress_bar


@click.command()
@click.option("--fix", is_flag=True, help="Put right what is wrong, as far as the store and the ledger tell. Deletes nothing.")
@click.option("--recompute", "count", type=click.IntRange(min=1), metavar="N", help="Have the model compute N entries again.")
@click.option("--model", metavar="FOLDER", help="With --recompute: its checkpoint (default: where runs loaded it from).")
@click.option("--seed", default=0, show_default=True, help="With --recompute: of the draw.")
@asks_a_cache
def verify(fix: bool, count: int | None, model: str | None, seed: int, directory: str | None, as_json: bool) -> int:
    """Check every byte of the cache, and the store and the ledger against each other. Exit code 1 if anything is wrong.

    With --fix damaged files are moved aside and damaged entries set aside; the ledger is told what the store has, and the store
    gets back what the ledger can prove: an entry whose question has its very key, and whose answer has the digest that the ledger
    took of it. What is in neither is named, and computed again when it is asked for. Exit code 1 if anything is still wrong.

    With --recompute N entries of a model are drawn at random, in proportion to what each task asked, and computed again by the
    model itself, in place of the check: greedy generations and log-likelihoods of this environment; others are counted as not
    recomputable. Exit code 1 if an answer is wrong. Otherwise the share of wrong ones is at most 3/N, with 95 % confidence.
    """
    if count is not None:
        if fix:
            raise click.UsageError("--fix or --recompute")
        return _recompute(Place(directory).directory, count, model, seed, as_json)
    if model is not None:
        raise click.UsageError("--model is for --recompute")
    from evalcache.mending import mend_folder, verify_folder
    from evalcache.printing import print_fields, print_json, visible

    folder = Place(directory).directory
    mended = None
    with progress_bar("checking the cache") as tell:
        if fix:
            mended = mend_folder(folder, tell)
        found = verify_folder(folder, tell)
    if as_json:
        print_json(found.to_json() | ({} if mended is None else {"mended": mended.to_json()}))
        return int(not found.good)
    if mended is not None:
        for name in mended.moved:
            print(visible(f"moved aside: {name}"))
        for sentence in mended.lost:
            print(visible(f"lost: {sentence}"))
        print_fields({name: value for name, value in mended.to_json().items() if isinstance(value, int)})
    for problem in found.problems:
        print(visible(problem))
    for sentence in found.fixes:
        print(visible(f"`evalcache verify --fix` would {sentence}"))
    print_fields({name: value for name, value in found.to_json().items() if isinstance(value, int)})
    return int(not found.good)


def _recompute(folder: Path, count: int, model: str | None, seed: int, as_json: bool) -> int:
    from evalcache.printing import print_fields, print_json, visible
    from evalcache.recompute import verify_checkpoint

    with progress_bar("computing again") as tell:
        found = verify_checkpoint(model, count, seed, folder, tell)
    if as_json:
        print_json(found.to_json())
        return int(not found.good)
    told = found.to_json()
    for key, why in told.pop("wrong").items():
        print(visible(f"wrong: {key}: {why}"))
    for why, entries in told.pop("not_recomputable").items():
        print(visible(f"not recomputable: {entries:,}: {why}"))
    print_fields(told | {"wrong": len(found.wrong)})
    return int(not found.good)


@click.command()
@click.option("--older-than", metavar="AGE", help="Entries that were computed so long ago: 30d, 12h.")
@click.option(
    "--max-size", metavar="SIZE", help="As many as make what is stored fit (10GB, 500MiB), the cheapest per byte first."
)
@click.option("--model", metavar="NAME|DIGEST", help="Entries of a model.")
@click.option("--run", metavar="ID|last", help="Entries that a run computed.")
@click.option("--producer", metavar="VERSIONS", help="Entries of runs with such a version: '<0.2' (evalcache's), 'torch<2.13'.")
@click.option("--vacuum", is_flag=True, help="Give empty room in the store's file back to the disk. Writers wait meanwhile.")
@click.option("--yes", is_flag=True, help="Do it. Without this, nothing but a table of what would go.")
@asks_a_cache
def prune(
    older_than: str | None,
    max_size: str | None,
    model: str | None,
    run: str | None,
    producer: str | None,
    vacuum: bool,
    yes: bool,
    directory: str | None,
    as_json: bool,
) -> None:
    """Remove stored entries for which all of this holds. A dry run, unless --yes is given.

    Shows entries, bytes, and the measured seconds that it would take to compute them again, by model. Where a size is to be
    reached, those go first that cost least by the byte. What was asked and answered stays in the ledger; what is asked again is
    computed again. A size is of what is stored: the file keeps its length, and its empty room is used again, until --vacuum.

    Nothing is ever removed unasked, unless EVALCACHE_MAX_SIZE is set: then runs do so at their end, and their line says it.
    """
    import time

    from evalcache.amounts import parse_bytes
    from evalcache.names import names_of_models
    from evalcache.pruning import plan_prune, vacuum_store
    from evalcache.pruning import prune as prune_store
    from evalcache.selection import select

    limit = None if max_size is None else parse_bytes(max_size)
    asked = {"model": model, "run": run, "older_than": older_than, "producer": producer}
    if limit is None and not any(asked.values()) and not vacuum:
        raise click.UsageError("say what is to go: --older-than, --max-size, --model, --run or --producer")
    place, told_at = Place(directory), time.time()
    ledger, store = place.synced(), place.store
    told: dict[str, object] = {"dry_run": not yes}
    if limit is not None or any(asked.values()):
        holds = select(ledger, **asked).holds
        with progress_bar("looking at the store") as tell:
            plan = plan_prune(store, holds, limit, told_at=told_at, progress=tell)
        with ledger.reading() as ask:
            told |= plan.to_json(names_of_models(ask))
        if yes:
            with progress_bar("pruning") as tell:
                told["removed"] = prune_store(store, plan, progress=tell)
            place.synced()
    if vacuum and yes:
        told["vacuumed_bytes"] = vacuum_store(store)
    _print_pruned(told, as_json)


def _print_pruned(told: dict, as_json: bool) -> None:
    from evalcache.printing import print_fields, print_json, print_table, said_bytes

    if as_json:
        print_json(told)
        return
    if "by_model" in told:
        rows = [
            (
                ", ".join(one["names"]) or one["model"],
                one["entries"],
                said_bytes(one["size_bytes"]),
                one["seconds"],
                one["unmeasured"],
            )
            for one in told.pop("by_model")
        ]
        print_table(("model", "entries", "size", "seconds to compute again", "unmeasured"), rows, empty="nothing to remove")
    print_fields(told)
    if told["dry_run"]:
        print("a dry run: --yes does it")
