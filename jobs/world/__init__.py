"""A generated world: the raw logs of a shop whose users have known likes and dislikes.

What is written looks like a site's own export, to be imported like any other log:

    items.parquet             item, title, description, category, brand, created_ms
    users.parquet             user, age_band, gender, joined_ms
    events/day=D/part-C.parquet   one file per day and chunk of users, sorted by time (`log.EVENTS`)
    truth/                    preferences.parquet, items.parquet, users.parquet

Only evaluation may read `truth/`. There, the utility of an item for a user is the sum of the
user's weights over the item's attributes, plus the item's quality; on sight of it the user rejects
the item with probability `sigmoid(DISLIKE_BASE + strictness - DISLIKE_SLOPE * utility)`.

Users belong to archetypes, so that other users' behaviour tells about one's own. The recommender
believes a noisy copy of what users like and nothing of what they dislike; once an item was rejected
it never comes back, and its category and brand come less often: next-item labels inherit this bias.
"""

from jobs.world.settings import WorldSettings, WorldSummary
from jobs.world.simulation import generate

__all__ = ["WorldSettings", "WorldSummary", "generate"]
