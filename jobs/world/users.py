"""The users of the world, made and simulated in chunks."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.world.catalogue import World
from jobs.world.draws import Array, happens, numbered
from jobs.world.settings import DAY_MS, WorldSettings, midnight_ms
from jobs.world.tastes import ARCHETYPES, KINDS, make_weights

CHUNK = 20_000  # users simulated together; part of the format, since random streams are per chunk
NEW_USERS = 0.1  # share that joins while the log runs
KNOWN = 0.7  # chance that the recommender knows a like

USER_FILES = {
    "users.parquet": pa.schema(
        [
            ("user", pa.string()),
            ("age_band", pa.string()),
            ("gender", pa.string()),
            ("joined_ms", pa.int64()),
        ]
    ),
    "truth/users.parquet": pa.schema(
        [
            ("user", pa.string()),
            ("archetype", pa.int32()),
            ("strictness", pa.float64()),  # log odds added to every rejection
            ("haste", pa.float64()),  # chance to swipe on without looking
        ]
    ),
    "truth/preferences.parquet": pa.schema(
        [
            ("user", pa.string()),
            ("kind", pa.string()),  # one of KINDS, a column of truth/items.parquet
            ("value", pa.string()),
            ("weight", pa.float64()),  # not 0
        ]
    ),
}


@dataclass
class Users:
    """Users of one chunk: who they are, and what the simulation carries from day to day."""

    names: pa.Array
    first_day: Array  # first day on which they can be active
    activity: Array  # chance to be active on a day
    strictness: Array
    haste: Array  # chance to swipe on without looking
    eagerness: Array  # log odds added to clicks
    weights: Array  # [users, columns] true preferences
    believed: Array  # [users, columns] what the recommender believes of them
    browsing: Array  # [users, categories] cumulative: where it looks for something they may like
    suppressed: Array  # [users, columns] log weights of the feedback loop, 0 or less
    recent: Array  # [users, 2] items clicked lately, to be shown again; -1: none
    hidden: Array  # sorted user * items + item of the rejected
    clicked: Array  # the same of the clicked


def n_chunks(settings: WorldSettings) -> int:
    """Number of chunks that the users are made in."""
    return -(-settings.users // CHUNK)


def make_users(world: World, chunk: int, writers: dict[str, pq.ParquetWriter]) -> Users:
    """Draw the users of a chunk and write what is known of them, and apart from it the truth."""
    rng = np.random.default_rng([world.settings.seed, 1, chunk])
    first = chunk * CHUNK
    n = min(CHUNK, world.settings.users - first)
    archetype = rng.integers(ARCHETYPES, size=n)
    weights = make_weights(world.archetypes, world.offsets, archetype, rng)
    joins = happens(rng, NEW_USERS, n)
    join_day = np.where(joins, rng.integers(world.settings.days - 1, size=n), -1)
    log_start = midnight_ms(world.settings, 0)
    joined_ms = np.where(
        joins,
        log_start + join_day * DAY_MS + rng.integers(0, DAY_MS, size=n),
        log_start - rng.integers(1, 900 * DAY_MS, size=n),
    )
    strictness = rng.normal(0.0, 0.7, n)
    haste = rng.beta(2.0, 8.0, n)

    likes = np.maximum(weights, 0) * (rng.random(weights.shape) < KNOWN)
    believed = likes + rng.normal(0.0, 0.25, weights.shape)
    categories = slice(world.offsets[0], world.offsets[1])
    interest: Array = np.exp(1.2 * (believed[:, categories] + believed[:, world.top_of]))
    names = numbered("u", first, n, 6)

    ages = np.array(["18-24", "25-34", "35-44", "45-54", "55+"])
    # Archetypes lean towards an age and a gender, weakly.
    age = np.clip(archetype % 5 + rng.integers(-2, 3, size=n), 0, 4)
    gender = np.where(happens(rng, 0.3 + 0.4 * (archetype % 2), n), "female", "male")
    gender = np.where(happens(rng, 0.1, n), "unknown", gender)
    user, column = np.nonzero(weights)
    kind = np.searchsorted(world.offsets, column, side="right") - 1
    columns = {
        "users.parquet": [names, ages[age], gender, joined_ms],
        "truth/users.parquet": [names, archetype, strictness, haste],
        "truth/preferences.parquet": [
            names.take(pa.array(user)),
            pa.array(KINDS).take(pa.array(kind)),
            world.values.take(pa.array(column)),
            weights[user, column],
        ],
    }
    for path, schema in USER_FILES.items():
        writers[path].write_table(pa.table(columns[path], schema=schema))
    return Users(
        names=names,
        first_day=join_day + 1,
        activity=rng.beta(6.0, 4.0, n),
        strictness=strictness,
        haste=haste,
        eagerness=rng.normal(0.0, 0.4, n),
        weights=weights,
        believed=believed.astype(np.float32),
        browsing=np.cumsum(interest / interest.sum(axis=1, keepdims=True), axis=1),
        suppressed=np.zeros(weights.shape, dtype=np.float32),
        recent=np.full((n, 2), -1),
        hidden=np.empty(0, dtype=np.int64),
        clicked=np.empty(0, dtype=np.int64),
    )
