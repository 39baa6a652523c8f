"""What a job has cost so far and will cost: machines by the hour."""

import dataclasses
import time
from collections.abc import Callable


@dataclasses.dataclass
class Cost:
    """The clock of a job over all its starts, and its price.

    `price_per_hour` is of one machine, in any currency; 0 where nobody told it, and then all costs are 0. `limit` is what
    the job may cost at most, 0 for no limit.
    """

    price_per_hour: float
    machines: int
    limit: float
    seconds_before: float = 0.0  # of earlier starts of the job
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._started = self.clock()

    def seconds(self) -> float:
        """Of the whole job so far."""
        return self.seconds_before + self.clock() - self._started

    def after(self, seconds_more: float = 0.0) -> float:
        """What the job costs until now, or will have cost in so many seconds."""
        return self.price_per_hour * self.machines * (self.seconds() + seconds_more) / 3600

    def is_spent(self) -> bool:
        """Whether the limit is reached."""
        return bool(self.limit) and self.after() >= self.limit
