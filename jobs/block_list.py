"""Stage `block_list`: what is published to the ranking service (DESIGN sections 8 and 10)."""

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from jobs.context import JobContext, run_sql
from negrec_core.block_score import BlockScore, Items, features
from negrec_core.blocklist import load_block_score
from negrec_core.codebook import Codebook
from negrec_core.delta import DeltaStore
from negrec_core.errors import GateError
from negrec_core.generator import CODEBOOK, open_codebook
from negrec_core.items import load_categories
from negrec_core.semantic_ids import load_semantic_ids
from negrec_core.trie import Trie

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

_SCHEMA = (
    "user_id string, rank int, codes array<int>, score float, log_prob float,"
    " because_item_id string, because_similarity float, reason_class string"
)


@dataclass(frozen=True)
class Catalogue:
    """What entries are scored against.

    Attributes:
        codebook: quantiser of the IDs.
        trie: legal IDs.
        index: item -> row of `items`.
        items: the items that have an ID.
        log_odds: mean log odds of the items under each leaf of the trie, float64 [leaves].
        categories: those of the first item under each leaf, int32 [leaves, 2].
    """

    codebook: Codebook
    trie: Trie
    index: dict[str, int]
    items: Items
    log_odds: np.ndarray
    categories: np.ndarray


@dataclass(frozen=True)
class BlockListTask:
    """Where an executor finds the catalogue; the score itself is small and travels along."""

    warehouse: str
    models: str
    ds: str
    codebook_version: str
    ids_version: int
    rates_version: int
    items_version: int
    score: BlockScore


def block_list(users: "DataFrame", task: BlockListTask) -> "DataFrame":
    """Entries of `block_list` without expiry.

    Args:
        users: rows of sql/block_list.sql.
        task: what to score with.
    """

    def entries(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        catalogue = None
        for batch in batches:
            if batch.num_rows:
                catalogue = catalogue or load_catalogue(task)
                rows = [entry for row in batch.to_pylist() for entry in _entries(row, catalogue, task.score)]
                yield pa.RecordBatch.from_pylist(rows, _ARROW_SCHEMA)

    return users.mapInArrow(entries, _SCHEMA)


_ARROW_SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("rank", pa.int32()),
        ("codes", pa.list_(pa.int32())),
        ("score", pa.float32()),
        ("log_prob", pa.float32()),
        ("because_item_id", pa.string()),
        ("because_similarity", pa.float32()),
        ("reason_class", pa.string()),
    ]
)


def load_catalogue(task: BlockListTask) -> Catalogue:
    """Read IDs, rates and codebook of a task."""
    store = DeltaStore(task.warehouse)
    codebook, _ = open_codebook(Path(task.models), task.codebook_version)
    ids = load_semantic_ids(store, task.codebook_version, task.ds, task.ids_version)
    trie = Trie.build(ids.codes, codebook.code_counts)
    rates = store.read("item_rate", ["item_id", "log_odds"], days=[task.ds], version=task.rates_version)
    known = dict(zip(rates["item_id"].to_pylist(), rates["log_odds"].to_pylist(), strict=True))
    item_log_odds = np.array([known.get(item, task.score.prior_log_odds) for item in ids.items])
    leaf = trie.find(ids.codes)
    per_leaf = np.bincount(leaf, minlength=trie.n_ids)
    log_odds = np.bincount(leaf, weights=item_log_odds, minlength=trie.n_ids) / per_leaf
    categories = load_categories(store, task.ds, ids.items, task.items_version)
    # Leaves are numbered without gaps, so the distinct ones are all of them in order.
    first = np.unique(leaf, return_index=True)[1]
    items = Items(codebook.unit(ids.codes), categories)
    return Catalogue(codebook, trie, ids.index, items, log_odds, categories[first])


def _entries(row: dict[str, Any], catalogue: Catalogue, score: BlockScore) -> Iterator[dict[str, Any]]:
    codes = np.array([entry["codes"] for entry in row["entries"]], np.int32)
    log_probs = np.array([entry["log_prob"] for entry in row["entries"]], np.float64)
    leaf = catalogue.trie.find(codes)
    if (leaf < 0).any():
        raise GateError(
            f"block_list: user {row['user_id']!r} has the illegal ID {codes[leaf < 0][0].tolist()};"
            " run negative_item_set again with --force, nothing was published"
        )
    unit = catalogue.codebook.unit(codes)
    disliked, liked = (
        [event for event in row[column] if event["item_id"] in catalogue.index]
        for column in ("negatives", "positives")
    )
    disliked_items, liked_items = (
        catalogue.items.take([catalogue.index[event["item_id"]] for event in events])
        for events in (disliked, liked)
    )
    user = score.user_log_odds(np.array(row["n_negatives"]), np.array(row["n_positives"]))
    scores = score.score(
        features(
            Items(unit, catalogue.categories[leaf]),
            unit,
            log_probs,
            disliked_items,
            liked_items,
            catalogue.log_odds[leaf],
            float(user),
            score.prior_log_odds,
            score.pseudo_events,
        )
    )
    cosine = unit @ disliked_items.unit.T
    for at, entry in enumerate(row["entries"]):
        nearest = int(cosine[at].argmax()) if disliked else None
        yield {
            "user_id": row["user_id"],
            "rank": entry["rank"],
            "codes": entry["codes"],
            "score": float(scores[at]),
            "log_prob": entry["log_prob"],
            "because_item_id": None if nearest is None else disliked[nearest]["item_id"],
            "because_similarity": None if nearest is None else float(cosine[at, nearest]),
            "reason_class": None if nearest is None else disliked[nearest]["reason_class"],
        }


def run(ctx: JobContext) -> None:
    from pyspark.sql import functions as F

    for table in ("negative_item_set", "user_context", "item_rate", "block_score"):
        ctx.require(table, [ctx.ds])
    predicted = ctx.read("negative_item_set", [ctx.ds])
    contexts = ctx.read("user_context", [ctx.ds])
    versions = ctx.pin("item_semantic_id", "item_rate", "item", "block_score")
    score, models = load_block_score(ctx.store, ctx.ds, versions["block_score"])
    ctx.use_model(CODEBOOK, models[CODEBOOK])
    task = BlockListTask(
        str(ctx.store.root),
        str(ctx.warehouse.models),
        ctx.ds,
        models[CODEBOOK],
        versions["item_semantic_id"],
        versions["item_rate"],
        versions["item"],
        score,
    )
    users = run_sql(ctx.spark, "block_list", {"predicted": predicted, "contexts": contexts})
    expires = dt.date.fromisoformat(ctx.ds) + dt.timedelta(days=ctx.config.block_list.valid_days + 1)
    ctx.write("block_list", block_list(users, task).withColumn("expires_on", F.lit(expires)))
