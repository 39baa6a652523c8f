"""The cost of a job so far and at its end, by the price of a machine per hour."""

import dataclasses
import time
from collections.abc import Callable


@dataclasses.dataclass
class Cost:
    """The duration of a job over all its starts, and its cost.

    `price_per_hour` is that of one machine, in any currency; 0 makes all costs 0. `limit` is the largest cost of the
    job; 0 means no limit.
    """

    price_per_hour: float
    machines: int
    limit: float
    seconds_before: float = 0.0  # of earlier starts of the job
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._started = self.clock()

    def seconds(self) -> float:
        """Duration of the whole job so far."""
        return self.seconds_before + self.clock() - self._started

    def total(self, more_seconds: float = 0.0) -> float:
        """Cost of the job until now, or until `more_seconds` from now."""
        return self.price_per_hour * self.machines * (self.seconds() + more_seconds) / 3600

    def limit_reached(self) -> bool:
        """Whether the cost so far is at the limit or above."""
        return bool(self.limit) and self.total() >= self.limit
