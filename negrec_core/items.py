"""Reading `item`: the catalogue as of a log date, and the text that stands for an item."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from negrec_core.delta import DeltaStore


def load_items(
    store: DeltaStore, ds: str, version: int | None = None, columns: Sequence[str] | None = None
) -> pa.Table:
    """The newest version of every item known on `ds`, in order of item id.

    Args:
        store: the Delta tables.
        ds: log date.
        version: Delta version of `item`; absent: the newest.
        columns: besides `item_id` and `ds`; absent: all.
    """
    handle = store.handle("item", version)
    days = sorted({part["ds"] for part in handle.partitions() if part["ds"] <= ds})
    wanted = None if columns is None else ["item_id", "ds", *columns]
    rows = store.read("item", wanted, days=days, version=handle.version())
    rows = rows.sort_by([("item_id", "ascending"), ("ds", "descending")])
    ids = rows["item_id"].to_numpy(zero_copy_only=False)
    newest = np.ones(len(ids), bool)
    newest[1:] = ids[1:] != ids[:-1]
    return rows.filter(pa.array(newest))


@dataclass(frozen=True)
class Categories:
    """Categories by number, from 1; the numbers mean nothing beyond one object.

    Attributes:
        numbers: category path -> numbers of the category and of its top category, which is the part of
            the path before the first slash. No category has the number of a top category.
        of_items: the same of some items, int32 [n, 2]; 0 where there is none.
    """

    numbers: dict[str, tuple[int, int]]
    of_items: np.ndarray


def load_categories(
    store: DeltaStore, ds: str, item_ids: Sequence[str], version: int | None = None
) -> Categories:
    """All categories of the catalogue on `ds`, and those of `item_ids`."""
    rows = load_items(store, ds, version, ["category"])
    paths = dict(zip(rows["item_id"].to_pylist(), rows["category"].to_pylist(), strict=True))
    known = sorted({path for path in paths.values() if path})
    tops = {top: 1 + n for n, top in enumerate(dict.fromkeys(path.split("/")[0] for path in known))}
    numbers = {path: (1 + len(tops) + n, tops[path.split("/")[0]]) for n, path in enumerate(known)}
    of_items = [numbers.get(paths.get(item) or "", (0, 0)) for item in item_ids]
    return Categories(numbers, np.array(of_items, np.int32).reshape(-1, 2))


def load_item_tastes(
    store: DeltaStore, ds: str, items: list[str], version: int, prior_log_odds: float
) -> tuple[list[str], np.ndarray]:
    """All items that the block score knows, and the `tastes` of `Items.of`.

    An item without a row has the prior. One that is judged in the log and in no catalogue has a row and no
    semantic ID: its rates say what is known of it.

    Args:
        store: the warehouse.
        ds: log date.
        items: those with a semantic ID.
        version: of the table.
        prior_log_odds: of dislike against like over all feedback.

    Returns:
        `items` and, after them, those without a semantic ID by name; float64 [n, 1 + factors].
    """
    rows = store.read("item_taste", ["item_id", "log_odds", "factors"], days=[ds], version=version)
    factors = pc.list_flatten(rows["factors"]).to_numpy()
    k = len(factors) // max(rows.num_rows, 1)
    place = {item: row for row, item in enumerate(rows["item_id"].to_pylist())}
    known = np.hstack([rows["log_odds"].to_numpy()[:, None], factors.reshape(rows.num_rows, k)])
    unknown = np.zeros((1, 1 + k))
    unknown[0, 0] = prior_log_odds
    names = items + sorted(place.keys() - set(items))
    return names, np.vstack([known, unknown])[[place.get(item, -1) for item in names]]


def item_text(row: dict[str, str | None]) -> str:
    """The text of an `item` row that is embedded: title, category path, seller, description."""
    category = (row.get("category") or "").replace("/", ", ")
    description = row.get("description") or ""
    parts = [row.get("title"), None if category == description else category]
    if row.get("seller"):
        parts.append(f"by {row['seller']}")
    return ". ".join(part for part in [*parts, description] if part) or "unknown item"
