"""A budget: how many seconds of computing, or how much money, a run may take; and the meter that ends a run that has spent it.

What counts is measured: seconds of computing, requests that run uncached, loading models, and evalcache's own; those of all
processes of a run together. Money is seconds times the price of an hour of the device, times the number of devices that the model
is on. Between two batches the meter looks; a batch that has begun is computed to its end, and so are the last ones of several
processes.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from evalcache.amounts import parse_seconds
from evalcache.cache import Cache
from evalcache.errors import BUDGET_EXIT_CODE, AmountError, BudgetError
from evalcache.faults import tell
from evalcache.measuring import Busy, Meter
from evalcache.prices import Prices
from evalcache.structs import Frozen

_MONEY = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]{3})")
_HINT = "a time (2h, 90min, 1h30m) or money (20EUR)"


class Budget(Frozen):
    """What a run may take: ``amount`` seconds, or of ``currency`` where that is not empty."""

    amount: float
    currency: str = ""

    @classmethod
    def parse(cls, text: str) -> Budget:
        """What a person types.

        Raises:
            BudgetError: it is neither a time nor money.

        >>> Budget.parse("1h30m"), Budget.parse("20 eur")
        (Budget(amount=5400.0, currency=''), Budget(amount=20.0, currency='EUR'))
        """
        text = text.strip()
        try:
            found = cls(parse_seconds(text))
        except AmountError as error:
            money = _MONEY.fullmatch(text)
            if money is None:
                raise BudgetError(f"not a budget: {text!r}", hint=_HINT, found=text) from error
            found = cls(float(money[1]), money[2].upper())
        if not found.amount > 0:
            raise BudgetError(f"a budget of nothing: {text!r}", hint=_HINT, found=text)
        return found

    def __str__(self) -> str:
        if self.currency:
            return f"{self.amount:,.2f} {self.currency}"
        return next(
            f"{self.amount / size:g} {name}"
            for name, size in (("h", 3600), ("min", 60), ("s", 1))
            if self.amount >= size or size == 1
        )

    def per_second(self, prices: Prices, device: str, count: int) -> float:
        """What a second on ``count`` devices takes of it.

        Raises:
            BudgetError: the device has no price in this currency.
        """
        if not self.currency:
            return 1.0
        if not device:
            raise BudgetError(
                f"nobody knows on which device this computes, so that a budget in {self.currency} cannot be counted",
                hint="a budget of time", found=device,
            )  # fmt: skip
        price = prices.of(device)
        if price is None or price.currency != self.currency:
            found = "none" if price is None else f"one in {price.currency}"
            raise BudgetError(
                f"an hour of {device!r} has no price in {self.currency} ({found} is known)",
                hint=f"--price '{device}=1.50 {self.currency}', or a budget of time", found=device,
            )  # fmt: skip
        return price.per_hour * count / 3600


class BudgetMeter(Meter):
    """Ends this process between two batches, once the budget is spent. Thread-safe.

    Args:
        path: of the file in which all processes of the run write down what they have spent; None where this is the only one.
        ours: seconds of loading and of evalcache's own, so far. stop: ends the process, told what to say (and with which
            code, where the budget is not spent but of no use).
    """

    def __init__(
        self, budget: Budget, prices: Prices, path: str | None, ours: Callable[[], float], stop: Callable[..., None]
    ) -> None:
        super().__init__()
        self.ended_with: int | None = None
        """The exit code with which it has ended the process."""
        self._budget, self._prices, self._path, self._ours, self._stop = budget, prices, path, ours, stop
        self._adding = threading.RLock()
        self._rate: float | None = None if budget.currency else 1.0
        self._waiting_s = 0.0  # seconds before a price was known
        self._ours_told = 0.0
        self._alone = 0.0
        self._computed_alone = False

    @contextlib.contextmanager
    def computing(self, busy: Busy) -> Iterator[None]:
        """Around a batch: looks before it begins."""
        self._price(busy)
        self.check()
        began = time.perf_counter()
        try:
            with super().computing(busy):
                yield
        finally:
            self.spend(time.perf_counter() - began, computed=True)

    def spend(self, seconds: float, *, computed: bool = False) -> None:
        """Count seconds of this process. ``computed``: they were a batch's."""
        with self._adding:
            ours = self._ours()
            self._waiting_s += seconds + ours - self._ours_told
            self._ours_told = ours
            if self._rate is None:
                return
            amount, self._waiting_s = self._waiting_s * self._rate, 0.0
            self._alone += amount
            self._computed_alone |= computed
            if self._path is not None:
                try:
                    # One short line at the end of the file: writes of several processes do not mix.
                    with open(self._path, "ab", buffering=0) as file:
                        file.write(f"{amount!r}{' computed' if computed else ''}\n".encode())
                except OSError as error:
                    tell(f"{self._path}: {error}; this process counts for itself")
                    self._path = None

    def spent(self) -> float:
        """What all processes have spent so far, in the budget's unit."""
        return self._spent()[0]

    def _spent(self) -> tuple[float, bool]:
        """That, and whether one of them has computed anything."""
        if self._path is None:
            return self._alone, self._computed_alone
        try:
            with open(self._path, "rb") as file:
                told = [line.split() for line in file if line.endswith(b"\n")]
            return sum(float(amount) for amount, *_ in told), any(more for _, *more in told)
        except (OSError, ValueError):
            return self._alone, self._computed_alone

    def check(self) -> None:
        """End the process if the budget is spent."""
        self.spend(0.0)
        spent, computed = self._spent()
        if spent < self._budget.amount:
            return
        said = f"{spent:,.2f} {self._budget.currency}" if self._budget.currency else f"{spent:,.1f} s"
        if not computed:
            self.ended_with = BudgetError.exit_code
            self._stop(
                f"the budget of {self._budget} was spent before anything was computed ({said}, for loading and evalcache's own "
                "work): the same command would get no further; give it more",
                BudgetError.exit_code,
            )
            return
        self.ended_with = BUDGET_EXIT_CODE
        self._stop(
            f"the budget of {self._budget} is spent ({said}); what was computed is stored, and the same command goes on from "
            "there"
        )

    def _price(self, busy: Busy) -> None:
        if not self._budget.currency:
            return
        try:
            self._rate = self._budget.per_second(self._prices, busy.device, len(busy.places))
        except BudgetError as error:
            self.ended_with = BudgetError.exit_code
            self._stop(f"{error.message}: nothing more is computed ({error.hint})", BudgetError.exit_code)


class BudgetCache(Cache):
    """A cache whose run ends when its budget is spent."""

    def __init__(self, *args: Any, budget: Budget, prices: Prices, path: str | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.meter: BudgetMeter = BudgetMeter(budget, prices, path, self._ours, stop)

    def uncacheable(self, reason: str, detail: str = "", *, seconds: float | None = None, **more: Any) -> None:
        """Count requests that ran uncached; they have taken seconds, too."""
        super().uncacheable(reason, detail, seconds=seconds, **more)
        if seconds is not None:
            self.meter.spend(seconds, computed=True)
            self.meter.check()

    def _ours(self) -> float:
        return sum(self.counts.overhead.values()) + self.counts.model_load_seconds

    def _begin_child(self) -> None:
        meter = self.meter
        super()._begin_child()
        self.meter = BudgetMeter(meter._budget, meter._prices, meter._path, self._ours, stop)
        self.meter._ours_told = self._ours()


def stop(said: str, code: int = BUDGET_EXIT_CODE) -> None:
    """End this process. In a thread nobody would hear of it: there it is a warning."""
    if threading.current_thread() is not threading.main_thread():
        tell(f"{said}; this client computes in a thread, which cannot be ended")
        return
    print(f"evalcache: {said}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def budget_environment(text: str, prices: Sequence[str], files: Sequence[str]) -> dict[str, str]:
    """What the command's environment needs. Makes the file in which its processes add up what they spend.

    Raises:
        BudgetError: ``text`` is no budget. PriceError: a price cannot be read.
    """
    import json
    import tempfile

    from evalcache.prices import read_prices

    Budget.parse(text)
    read_prices(prices, files)
    number, path = tempfile.mkstemp(prefix="evalcache-budget-")
    os.close(number)
    # This process becomes the command: where that is a Python with evalcache in it, it takes the file away at its end.
    told = {
        "owner": os.getpid(),
        "budget": text,
        "prices": list(prices),
        "files": [os.path.abspath(file) for file in files],
        "path": path,
    }
    return {"EVALCACHE_BUDGET": json.dumps(told)}


def open_with_budget(told: str, *args: Any, **kwargs: Any) -> BudgetCache:
    """The cache of a process that has a budget. ``told``: `budget_environment`'s."""
    import json

    from evalcache.prices import read_prices

    found = json.loads(told)
    prices = read_prices(found["prices"], found["files"])
    cache = BudgetCache(*args, budget=Budget.parse(found["budget"]), prices=prices, path=found["path"], **kwargs)
    if found["owner"] == os.getpid():
        atexit.register(_forget, found["path"])
    return cache


def _forget(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
