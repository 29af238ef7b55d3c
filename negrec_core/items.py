"""Reading `item`: the catalogue as of a log date, and the text that stands for an item."""

import numpy as np
import pyarrow as pa

from negrec_core.delta import DeltaStore


def load_items(store: DeltaStore, ds: str, version: int | None = None) -> pa.Table:
    """The newest version of every item known on `ds`, in order of item id."""
    handle = store.handle("item", version)
    days = sorted({part["ds"] for part in handle.partitions() if part["ds"] <= ds})
    rows = store.read("item", days=days, version=handle.version())
    rows = rows.sort_by([("item_id", "ascending"), ("ds", "descending")])
    ids = rows["item_id"].to_numpy(zero_copy_only=False)
    newest = np.ones(len(ids), bool)
    newest[1:] = ids[1:] != ids[:-1]
    return rows.filter(pa.array(newest))


def item_text(row: dict[str, str | None]) -> str:
    """The text of an `item` row that is embedded: title, category path, seller, description."""
    category = (row.get("category") or "").replace("/", ", ")
    description = row.get("description") or ""
    parts = [row.get("title"), None if category == description else category]
    if row.get("seller"):
        parts.append(f"by {row['seller']}")
    return ". ".join(part for part in [*parts, description] if part) or "unknown item"
