"""The log of the world: reactions as timed events."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from jobs.world.catalogue import World
from jobs.world.day import REASONS, SURFACES, Reactions, Shown
from jobs.world.draws import Array, starts
from jobs.world.settings import DAY_MS, midnight_ms
from jobs.world.users import Users

PAUSE_MS = 1_200_000  # at least this between two sessions of a user
LONGEST_MS = 130_000  # more than any one item takes, with click and purchase
EVENT_NAMES = ("show", "click", "buy", "not_interested")
SHOW, CLICK, BUY, REJECT = range(4)
EVENTS = pa.schema(
    [
        ("user", pa.string()),
        ("item", pa.string()),
        ("time_ms", pa.int64()),  # epoch, UTC
        ("event", pa.string()),  # one of EVENT_NAMES
        ("reason", pa.string()),  # one of REASONS, on not_interested only
        ("surface", pa.string()),  # one of SURFACES
        ("session", pa.string()),
        ("position", pa.int32()),  # of the item in its session, from 0
        ("dwell_ms", pa.int64()),  # on show only; 0: a search result that was never opened
        ("length_ms", pa.int64()),  # on show only: how long a full view of the item takes
    ]
)

# Share of a day's sessions begun in each hour, UTC.
RHYTHM = np.array([2, 1, 1, 1, 1, 2, 4, 6, 7, 6, 5, 5, 7, 7, 6, 5, 5, 6, 8, 10, 11, 10, 7, 4], dtype=float)


def to_events(
    world: World,
    users: Users,
    day: int,
    shown: Shown,
    reactions: Reactions,
    rng: np.random.Generator,
) -> pa.Table:
    """One day's events of a chunk, in the schema `EVENTS`, sorted by time."""
    n = len(shown.item)
    click_after = np.maximum(reactions.dwell_ms, 700) + rng.integers(100, 900, size=n)
    buy_after = click_after + rng.integers(8_000, 60_000, size=n)
    done = np.where(
        reactions.buy,
        buy_after,
        np.where(reactions.click, click_after, np.maximum(reactions.dwell_ms, 300)),
    )
    reject_after = done + rng.integers(600, 2500, size=n)
    spent = np.where(reactions.reason >= 0, reject_after, done) + rng.integers(200, 1500, size=n)
    shown_ms = midnight_ms(world.settings, day) + _clock(world, shown, spent, rng)

    moments = [
        (SHOW, np.arange(n), np.zeros(n, dtype=np.int64)),
        (CLICK, np.flatnonzero(reactions.click), click_after),
        (BUY, np.flatnonzero(reactions.buy), buy_after),
        (REJECT, np.flatnonzero(reactions.reason >= 0), reject_after),
    ]
    event = np.concatenate([np.full(len(rows), code) for code, rows, _ in moments])
    row = np.concatenate([rows for _, rows, _ in moments])
    time = np.concatenate([shown_ms[rows] + after[rows] for _, rows, after in moments])
    order = np.lexsort((event, row, time))
    event, row, time = event[order], row[order], time[order]

    first_rows = np.flatnonzero(starts(shown.session))
    sessions = pc.binary_join_element_wise(
        users.names.take(pa.array(shown.user[first_rows])),
        str(day),
        pa.array(shown.second[first_rows]).cast(pa.int8()).cast(pa.string()),
        "-",
    )
    not_show, not_reject = event != SHOW, event != REJECT
    columns = [
        users.names.take(pa.array(shown.user[row])),
        world.names.take(pa.array(shown.item[row])),
        pa.array(time),
        pa.array(EVENT_NAMES).take(pa.array(event)),
        pa.array(REASONS).take(pa.array(reactions.reason[row], mask=not_reject)),
        pa.array(SURFACES).take(pa.array(reactions.surface[row])),
        sessions.take(pa.array(shown.session[row])),
        pa.array(shown.position[row], pa.int32()),
        pa.array(reactions.dwell_ms[row], mask=not_show),
        pa.array(reactions.length_ms[row], mask=not_show),
    ]
    return pa.table(columns, schema=EVENTS)


def _clock(world: World, shown: Shown, spent: Array, rng: np.random.Generator) -> Array:
    """[exposures] milliseconds after midnight at which each is shown; sessions end within the day.

    Args:
        spent: [exposures] milliseconds until the next one is shown.
    """
    first_rows = np.flatnonzero(starts(shown.session))
    before = np.cumsum(spent) - spent
    within = before - before[first_rows][shown.session]
    lengths = np.bincount(shown.session, weights=spent).astype(np.int64)

    # Late starts wrap round, so that even two of the longest sessions end by midnight.
    latest = DAY_MS - 2 * (2 * world.settings.slate * LONGEST_MS) - PAUSE_MS
    hour = rng.choice(24, size=len(first_rows), p=RHYTHM / RHYTHM.sum())
    start = (hour * 3_600_000 + rng.integers(3_600_000, size=len(hour))) % latest
    # A second session comes after the first, whichever was drawn earlier.
    again = np.flatnonzero(shown.second[first_rows])
    early = np.minimum(start[again - 1], start[again])
    late = np.maximum(start[again - 1], start[again])
    start[again - 1] = early
    start[again] = np.maximum(late, early + lengths[again - 1] + PAUSE_MS)
    clock: Array = start[shown.session] + within
    return clock
