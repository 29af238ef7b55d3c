"""The items of the world, and the attributes behind their words."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.world.draws import Array, happens, numbered
from jobs.world.settings import DAY_MS, WorldSettings, midnight_ms
from jobs.world.tastes import KINDS, make_archetypes

NEW_ITEMS = 0.15  # share that appears while the log runs
POPULARITY_SPREAD = 0.7  # of the log of how often an item is offered


@dataclass(frozen=True)
class World:
    """The settings, the items in order of creation, and the attributes that tastes are about.

    attributes: [items, len(KINDS)] columns of a user's weight vector, all kinds one after another.
    by_category: items grouped by category; category c is [group_start[c], group_start[c + 1]).
    """

    settings: WorldSettings
    names: pa.Array
    created_ms: Array
    attributes: Array
    values: pa.Array  # [columns] name of each value
    offsets: Array  # [len(KINDS) + 1] first column of each kind
    top_of: Array  # [categories] column of the top category of a category
    price: Array  # [items] tier, cheapest first
    popularity: Array
    quality: Array
    length_ms: Array
    by_category: Array
    group_start: Array
    archetypes: Array  # [ARCHETYPES, columns] weights that their users share


def make_world(settings: WorldSettings, vocabulary: dict[str, Any], rng: np.random.Generator) -> World:
    n = settings.items
    categories = list(vocabulary["categories"])
    tops = sorted({path.split("/")[0] for path in categories})
    top_of = np.array([tops.index(path.split("/")[0]) for path in categories])
    styles, brands, materials = (vocabulary[kind] for kind in ("styles", "brands", "materials"))
    values = [categories, tops, styles, brands, materials]
    offsets = np.concatenate([[0], np.cumsum([len(kind) for kind in values])])

    category = rng.integers(len(categories), size=n)
    rarity = np.arange(1, len(styles) + 1) ** -0.4
    style = rng.choice(len(styles), size=n, p=rarity / rarity.sum())
    # A brand belongs to one top category and sells a little in one other.
    brand = rng.integers(len(brands) // len(tops), size=n) * len(tops) + top_of[category]
    brand = np.where(happens(rng, 0.3, n), (brand + 1) % len(brands), brand)
    material = np.zeros(n, dtype=np.int64)
    for number, path in enumerate(categories):
        fitting = [materials.index(name) for name in vocabulary["categories"][path]["materials"]]
        here = np.flatnonzero(category == number)
        material[here] = rng.choice(fitting, size=len(here))
    quality = rng.normal(0.0, 0.35, n) - 1.0 * happens(rng, 0.05, n)
    columns = np.stack([category, top_of[category], style, brand, material], axis=1)

    first = midnight_ms(settings, 0)
    new = round(NEW_ITEMS * n)
    before = first - rng.integers(1, 365 * DAY_MS, size=n - new)
    during = first + rng.integers(0, settings.days * DAY_MS, size=new)
    sizes = np.bincount(category, minlength=len(categories))
    return World(
        settings=settings,
        names=numbered("i", 0, n, 5),
        created_ms=np.sort(np.concatenate([before, during])),
        attributes=columns + offsets[:-1],
        values=pa.array([value for kind in values for value in kind]),
        offsets=offsets,
        top_of=top_of + offsets[1],
        price=rng.integers(len(vocabulary["prices"]), size=n),
        popularity=np.exp(rng.normal(0.0, POPULARITY_SPREAD, n) + 0.3 * quality),
        quality=quality,
        length_ms=np.clip(rng.lognormal(np.log(14_000), 0.5, n), 4_000, 50_000),
        by_category=np.argsort(category, kind="stable"),
        group_start=np.concatenate([[0], np.cumsum(sizes)]),
        archetypes=make_archetypes(offsets, rng),
    )


def write_items(world: World, vocabulary: dict[str, Any], rng: np.random.Generator, out: Path) -> None:
    """Write the catalogue, and apart from it the attributes behind the words."""
    n = world.settings.items
    kinds = {
        kind: world.values.take(pa.array(world.attributes[:, k])).to_pylist() for k, kind in enumerate(KINDS)
    }
    prices = [vocabulary["prices"][tier] for tier in world.price]
    titles, descriptions = [], []
    for category, style, brand, material, price, title, noun in zip(
        kinds["category"],
        kinds["style"],
        kinds["brand"],
        kinds["material"],
        prices,
        rng.choice(vocabulary["titles"], size=n).tolist(),
        rng.integers(1 << 16, size=n),
        strict=True,
    ):
        nouns = vocabulary["categories"][category]["nouns"]
        words = {"style": style, "brand": brand, "material": material, "price": price}
        words["noun"] = nouns[noun % len(nouns)]
        titles.append(_sentence(title.format(**words)))
        descriptions.append(_sentence(vocabulary["description"].format(**words)))
    public = {
        "item": world.names,
        "title": titles,
        "description": descriptions,
        "category": kinds["category"],
        "brand": kinds["brand"],
        "created_ms": world.created_ms,
    }
    truth = {"item": world.names, **kinds, "price": prices, "quality": world.quality}
    pq.write_table(pa.table(public), out / "items.parquet")
    pq.write_table(pa.table(truth), out / "truth" / "items.parquet")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
