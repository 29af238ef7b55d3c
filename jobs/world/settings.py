"""What world is asked for and what was made, and the days of its log."""

import datetime as dt
from dataclasses import dataclass

from negrec_core.errors import ConfigError

DAY_MS = 86_400_000


@dataclass(frozen=True)
class WorldSettings:
    """What world to make.

    Attributes:
        users: number of users; one in ten joins while the log runs.
        items: size of the catalogue; 15 % of it appears while the log runs.
        start: first day of the log, UTC.
        days: days in the log.
        slate: mean number of items shown in a session.
        seed: equal settings and seed make equal files.
    """

    users: int = 5000
    items: int = 1500
    start: dt.date = dt.date(2026, 1, 5)
    days: int = 35
    slate: int = 6
    seed: int = 7

    def __post_init__(self) -> None:
        bounds = {"users": (1, 10**9), "items": (50, 10**6), "days": (2, 3650), "slate": (2, 30)}
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"world: {name} is {value}; choose {low} to {high}")
        if self.seed < 0:
            raise ConfigError(f"world: seed is {self.seed}; choose 0 or more")


@dataclass(frozen=True)
class WorldSummary:
    """Counts of what was written; `rejections` include the `other_reasons`, not about taste."""

    users: int
    items: int
    days: int
    shows: int
    clicks: int
    buys: int
    rejections: int
    other_reasons: int


def midnight_ms(settings: WorldSettings, day: int) -> int:
    """Start of a day of the log (from 0), epoch milliseconds."""
    date = settings.start + dt.timedelta(days=day)
    return int(dt.datetime(date.year, date.month, date.day, tzinfo=dt.UTC).timestamp()) * 1000
