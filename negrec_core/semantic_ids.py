"""Reading `item_semantic_id`: which items have which semantic ID, as of a log date."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from negrec_core.delta import DeltaStore
from negrec_core.errors import InputError


@dataclass(frozen=True)
class SemanticIds:
    """Items and their IDs under one codebook.

    Attributes:
        items: item ids, `[n]`.
        codes: int32 `[n, D]`, aligned with `items`.
        index: item id -> row.
    """

    items: list[str]
    codes: np.ndarray
    index: dict[str, int]


def load_semantic_ids(
    store: DeltaStore, codebook_version: str, ds: str, version: int | None = None
) -> SemanticIds:
    """IDs under a codebook of all items known on `ds`, in order of item id; may be empty.

    An ID once given stays: where two runs gave an item one each, that of the earlier day counts.

    Raises:
        InputError: IDs of different lengths.
    """
    handle = store.handle("item_semantic_id", version)
    days = sorted({part["ds"] for part in handle.partitions() if part["ds"] <= ds})
    rows = store.read(
        "item_semantic_id",
        ["codebook_version", "item_id", "codes", "ds"],
        days=days,
        version=handle.version(),
    )
    rows = rows.filter(pc.equal(rows["codebook_version"], codebook_version))
    if not rows.num_rows:
        return SemanticIds([], np.empty((0, 0), np.int32), {})
    rows = rows.sort_by([("item_id", "ascending"), ("ds", "ascending")])
    names = rows["item_id"].to_numpy()
    rows = rows.filter(pa.array(np.concatenate([[True], names[1:] != names[:-1]])))
    lengths = pc.unique(pc.list_value_length(rows["codes"])).to_pylist()
    if len(lengths) > 1:
        raise InputError(
            f"table item_semantic_id: IDs of {lengths} codes under codebook {codebook_version}"
            f" up to ds={ds}; run the stage item_semantic_id again with --force"
        )
    items = rows["item_id"].to_pylist()
    flat = pc.list_flatten(rows["codes"]).to_numpy()
    return SemanticIds(
        items,
        flat.reshape(len(items), -1).astype(np.int32),
        {item: n for n, item in enumerate(items)},
    )
