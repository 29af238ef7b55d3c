"""One day of the world: what the recommender shows, and what users do with it."""

import datetime as dt
from dataclasses import dataclass

import numpy as np

from jobs.world.catalogue import World
from jobs.world.draws import Array, contains, happens, sigmoid, starts
from jobs.world.settings import DAY_MS, midnight_ms
from jobs.world.tastes import KINDS
from jobs.world.users import Users

SURFACES = ("feed", "search", "detail")
SEARCH = 1
TASTE_REASONS = (
    "Not interested in this product",
    "Not this category",
    "Not this store",
    "Uncomfortable image",
)
OTHER_REASONS = ("Already bought or viewed", "Looks AI-made", "Bait price", "Counterfeit")
REASONS = TASTE_REASONS + OTHER_REASONS
PRODUCT, CATEGORY, STORE, IMAGE, ALREADY, AI_MADE = range(6)

# Log odds of a reaction at utility 0, and per unit of utility.
DISLIKE_BASE, DISLIKE_SLOPE = -5.2, 1.5
CLICK_BASE, CLICK_SLOPE = -2.1, 0.5
BUY_BASE, BUY_SLOPE = -1.9, 0.5
OTHER_RATE = 0.004  # not_interested for a reason that has nothing to do with taste
ALREADY_RATE = 0.04  # the same, on an item that the user clicked or bought on an earlier day

FEEDBACK = np.log(0.5)  # what one rejection does to the weight of its category and its brand
RECOVERY = 0.95  # share of that which is left a day later


@dataclass(frozen=True)
class Shown:
    """Exposures of one chunk and day, by session, in the order of display; all [exposures]."""

    user: Array
    item: Array
    session: Array  # number of the session within the chunk and day
    second: Array  # whether the session is its user's second one that day
    position: Array


@dataclass(frozen=True)
class Reactions:
    """What users did with the exposures; all [exposures]. `reason` is -1 where not rejected."""

    click: Array
    buy: Array
    reason: Array
    surface: Array
    dwell_ms: Array
    length_ms: Array


def recommend(world: World, users: Users, day: int, rng: np.random.Generator) -> Shown:
    """Choose who is active and what they are shown: popular, probably liked and random items.

    Candidates are ranked by what the recommender believes, with enough chance in it (Gumbel noise:
    a draw without replacement) that disliked items keep turning up.
    """
    weekday = (world.settings.start + dt.timedelta(days=day)).weekday()
    busy = np.clip(users.activity * (1.08 if weekday >= 5 else 0.97), 0, 1)
    active = np.flatnonzero((users.first_day <= day) & happens(rng, busy, len(busy)))
    most = 2 * world.settings.slate  # per session
    items = _candidates(world, users, active, day, 4 * most, rng)

    score: Array = np.asarray(rng.gumbel(size=items.shape), dtype=np.float32)
    for kind in range(len(KINDS)):
        score += users.believed[active[:, None], world.attributes[items, kind]]
    for kind in (KINDS.index("category"), KINDS.index("brand")):
        score += users.suppressed[active[:, None], world.attributes[items, kind]]
    score[:, :2] += 2.0 * (users.recent[active] >= 0)  # what was clicked lately is pushed again
    score[_barred(world, users, active, items, day)] = -np.inf

    best = np.argsort(-score, axis=1, kind="stable")[:, : 2 * most]
    sizes = np.minimum(1 + rng.poisson(world.settings.slate - 1, size=(len(active), 2)), most)
    sizes[:, 1] *= happens(rng, 0.45, len(active))
    wanted = np.minimum(sizes.sum(axis=1), np.isfinite(score).sum(axis=1))
    row, place = np.nonzero(np.arange(best.shape[1]) < wanted[:, None])
    second = place >= sizes[row, 0]
    return Shown(
        user=active[row],
        item=items[row, best[row, place]],
        session=np.cumsum(starts(2 * row + second)) - 1,
        second=second,
        position=place - second * sizes[row, 0],
    )


def _candidates(
    world: World, users: Users, active: Array, day: int, width: int, rng: np.random.Generator
) -> Array:
    """[active, width] items, with repetitions: two clicked lately, the rest from three sources."""
    now = midnight_ms(world.settings, day)
    age_days = (now - world.created_ms) / DAY_MS
    weight = world.popularity * np.where(age_days < 7, 3.0, 1.0) * (age_days >= 0)
    n, last, third = len(active), len(weight) - 1, (width - 2) // 3

    total = np.cumsum(weight)
    by_popularity = np.searchsorted(total, rng.random((n, third)) * total[-1], side="right")

    grouped = np.concatenate([[0.0], np.cumsum(weight[world.by_category])])
    draws = rng.random((n, third))
    category = np.zeros((n, third), dtype=np.int64)
    for bound in users.browsing[active, :-1].T:
        category += draws >= bound[:, None]
    low = grouped[world.group_start[category]]
    high = grouped[world.group_start[category + 1]]
    place = np.searchsorted(grouped[1:], low + rng.random((n, third)) * (high - low), side="right")
    by_liking = world.by_category[np.minimum(place, last)]

    # Users without recent clicks get random candidates in their place.
    anything = rng.integers(last + 1, size=(n, width - 2 * third))
    recent = users.recent[active]
    anything[:, :2] = np.where(recent < 0, anything[:, :2], recent)
    return np.concatenate([anything, np.minimum(by_popularity, last), by_liking], axis=1)


def _barred(world: World, users: Users, active: Array, items: Array, day: int) -> Array:
    """[active, width] candidates that must not be shown: not there yet, rejected, or repeated."""
    order = np.argsort(items, axis=1, kind="stable")
    ordered = np.take_along_axis(items, order, axis=1)
    repeated = np.zeros(items.shape, dtype=bool)
    np.put_along_axis(repeated, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    future = world.created_ms[items] > midnight_ms(world.settings, day)
    keys = active[:, None] * world.settings.items + items
    return repeated | future | contains(users.hidden, keys)


def react(world: World, users: Users, shown: Shown, rng: np.random.Generator) -> Reactions:
    """Draw what users do with what they see, from the true utility and chance."""
    n = len(shown.item)
    parts = users.weights[shown.user[:, None], world.attributes[shown.item]]
    utility = parts.sum(axis=1) + world.quality[shown.item]

    # Reasons other than taste are drawn first and alike for all, so they say nothing of taste.
    known = contains(users.clicked, shown.user * world.settings.items + shown.item)
    already = known & happens(rng, ALREADY_RATE, n)
    other = ~already & happens(rng, OTHER_RATE, n)
    odds = DISLIKE_BASE + users.strictness[shown.user] - DISLIKE_SLOPE * utility
    taste = ~already & ~other & happens(rng, sigmoid(odds), n)
    reason = np.full(n, -1)
    reason[already] = ALREADY
    reason[other] = rng.integers(AI_MADE, len(REASONS), size=int(other.sum()))
    reason[taste] = _word(parts[taste], rng)

    clicks = CLICK_BASE + users.eagerness[shown.user] + CLICK_SLOPE * utility
    click = happens(rng, sigmoid(clicks), n) & ~(taste & happens(rng, 0.7, n))
    buy = click & ~taste & happens(rng, sigmoid(BUY_BASE + BUY_SLOPE * utility), n)

    length = (world.length_ms[shown.item] * rng.uniform(0.8, 1.2, n)).astype(np.int64)
    share = sigmoid(0.3 + 0.7 * utility - 1.0 * taste + rng.normal(0.0, 1.0, n))
    hasty = happens(rng, users.haste[shown.user], n)
    share = np.where(hasty, rng.uniform(0.02, 0.3, n), share)
    share = np.where(click, np.maximum(share, rng.uniform(0.3, 1.0, n)), share)
    # Drawn per exposure, used per session: there are fewer of them.
    surface = rng.choice(len(SURFACES), size=n, p=[0.7, 0.2, 0.1])[shown.session]
    dwell = np.where((surface == SEARCH) & ~click, 0, share * length).astype(np.int64)
    return Reactions(click, buy, reason, surface, dwell, length)


def _word(parts: Array, rng: np.random.Generator) -> Array:
    """Reasons that users give for `parts` [n, len(KINDS)], the weights of the item's attributes.

    They name what bothers them most, or with some chance just say that the product is not for them.
    """
    worst = parts.argmin(axis=1)
    by_kind = np.array([CATEGORY, CATEGORY, IMAGE, STORE, PRODUCT])
    vague = np.array([0.25, 0.25, 0.7, 0.25, 0.0])[worst]
    generic = (parts.min(axis=1) > -0.3) | happens(rng, vague, len(parts))
    return np.where(generic, PRODUCT, by_kind[worst])


def remember(world: World, users: Users, day: int, shown: Shown, reactions: Reactions) -> None:
    """Carry the day's reactions over to the next days' recommendations."""
    items = world.settings.items
    keys = shown.user * items + shown.item
    rejected = reactions.reason >= 0
    users.hidden = np.union1d(users.hidden, keys[rejected])
    users.clicked = np.union1d(users.clicked, keys[reactions.click])
    users.recent[shown.user[reactions.click], day % 2] = shown.item[reactions.click]
    users.suppressed *= RECOVERY
    for kind in (KINDS.index("category"), KINDS.index("brand")):
        column = world.attributes[shown.item[rejected], kind]
        np.add.at(users.suppressed, (shown.user[rejected], column), FEEDBACK)
