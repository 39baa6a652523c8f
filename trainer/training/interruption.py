"""Why and how training stops before its end."""

import enum


class StopReason(enum.IntEnum):
    """Why a worker asks to stop. Of several reasons on several workers the largest one counts."""

    NONE = 0
    COST_LIMIT = 1
    SIGNAL = 2


def never() -> StopReason:
    """For passes that nothing stops."""
    return StopReason.NONE


class TrainingInterrupted(Exception):
    """The job stops before its end, for the largest reason that a worker gave."""

    def __init__(self, reason: StopReason):
        super().__init__(f"interrupted: {reason.name}")
        self.reason = reason
