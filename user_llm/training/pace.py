"""How long a run of several phases will go on, told from how long it has taken so far."""

import time
from collections.abc import Callable, Mapping


class Pace:
    """The seconds that are left of a run.

    A run is taken to go on as fast as it has gone so far, compiling and evaluation included: the seconds since it began, by the work
    done since then. Phases differ in what a step of theirs computes, so each says how much work it is.

    Args:
      work: how much each phase computes, by name, in any one unit.
      clock: returns the present time in seconds.
    """

    def __init__(self, work: Mapping[str, float], clock: Callable[[], float] = time.monotonic):
        self._work, self._clock, self._begun = dict(work), clock, clock()
        self._before = dict.fromkeys(work, 0.0)
        self._reached = dict.fromkeys(work, 0.0)

    def resume(self, phase: str, share: float) -> None:
        """Note that an earlier run has done this share of a phase, from 0 to 1: it took none of this run's time."""
        self._before[phase] = self._reached[phase] = share

    def reach(self, phase: str, share: float) -> None:
        """Note how much of a phase is done, from 0 to 1."""
        self._reached[phase] = share

    def seconds_left(self) -> float | None:
        """Return about how long the run will go on; None before it has done anything."""
        done = sum(work * (self._reached[phase] - self._before[phase]) for phase, work in self._work.items())
        left = sum(work * (1 - self._reached[phase]) for phase, work in self._work.items())
        return (self._clock() - self._begun) * left / done if done > 0 else None
