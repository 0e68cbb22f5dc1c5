"""What verbs of the command line have in common: the cache folder that they ask, and options that several of them take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from evalcache.progress import progress_bar

if TYPE_CHECKING:
    from evalcache.ledger import Ledger
    from evalcache.store import Store


class Place:
    """The store and the ledger of one cache folder, opened when first asked for."""

    def __init__(self, directory: str | None) -> None:
        from evalcache.folder import default_folder, local_folder

        self.given = Path(default_folder() if directory is None else directory)
        self.directory = local_folder(self.given)  # another one, where machines share the given one
        self.store_path = self.directory / "store"
        self.ledger_path = self.directory / "ledger.duckdb"

    @property
    def store(self) -> Store:
        """The store, with what other machines have given until now."""
        from evalcache.store import Store

        store = Store(self.store_path)
        if self.directory != self.given:
            from evalcache.segments import Segments

            Segments(self.given, store, pull=True)
        return store

    def give(self) -> None:
        """Give what is new here to the machines that share the folder, where any do."""
        if self.directory != self.given:
            from evalcache.segments import Segments

            Segments(self.given, self.store).push()

    def synced(self) -> Ledger:
        """The ledger, which has been told everything that was waiting in the journal."""
        from evalcache.ledger import Ledger

        ledger = Ledger(self.ledger_path)
        with progress_bar("bringing the ledger up to date") as tell:
            ledger.sync(self.store, progress=tell)
        return ledger


def asks_a_cache(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The two options of every verb that asks a cache."""
    verb = click.option("--json", "as_json", is_flag=True, help="Print one JSON document with stable field names.")(verb)
    return click.option(
        "--dir", "directory", metavar="FOLDER", help="Cache folder (default: EVALCACHE_DIR, or the user's cache folder)."
    )(verb)


def asks_for_prices(verb: Callable[..., Any]) -> Callable[..., Any]:
    """The two options of every verb that says what something costs."""
    verb = click.option(
        "--prices", "price_files", metavar="FILE", type=click.Path(exists=True, dir_okay=False), multiple=True,
        help="Prices of your own, a file of the form of evalcache/prices.toml; repeatable.",
    )(verb)  # fmt: skip
    return click.option(
        "--price", "prices", metavar="DEVICE=AMOUNT", multiple=True, help="Price of an hour: '*H200*=3.20 EUR'; repeatable."
    )(verb)
