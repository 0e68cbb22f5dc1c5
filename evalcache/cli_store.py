"""The verbs that look after a cache folder: parse → call → print, as in `cli.py`."""

from __future__ import annotations

import click

from evalcache.cli_options import Place, asks_a_cache
from evalcache.progress import progress_bar


@click.command()
@click.option("--fix", is_flag=True, help="Put right what is wrong, as far as the store and the ledger tell. Deletes nothing.")
@asks_a_cache
def verify(fix: bool, directory: str | None, as_json: bool) -> int:
    """Check every byte of the cache, and the store and the ledger against each other. Exit code 1 if anything is wrong.

    With --fix damaged files are moved aside and damaged entries set aside; the ledger is told what the store has, and the store
    gets back what the ledger can prove: an entry whose question has its very key, and whose answer has the digest that the ledger
    took of it. What is in neither is named, and computed again when it is asked for. Exit code 1 if anything is still wrong.
    """
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
