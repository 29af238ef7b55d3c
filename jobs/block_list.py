"""Stage `block_list`: what is published to the ranking service (DESIGN sections 8 and 10)."""

import datetime as dt
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from jobs import gates
from jobs.context import JobContext, Warehouse, read_files, run_sql
from negrec_core.block_score import BlockScore, Items, Tally, features, user_weights
from negrec_core.blocklist import load_block_score
from negrec_core.codebook import Codebook
from negrec_core.delta import DeltaStore
from negrec_core.errors import ArtefactError, MissingError
from negrec_core.generator import CODEBOOK, open_codebook
from negrec_core.items import load_categories, load_item_tastes
from negrec_core.schemas import BLOCK_LIST
from negrec_core.semantic_ids import load_semantic_ids
from negrec_core.storage import data_files, delete_folder, place
from negrec_core.trie import Trie

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

_SCHEMA = (
    "user_id string, rank int, codes array<int>, score float, log_prob float,"
    " because_item_id string, because_similarity float, reason_class string"
)
_JUDGED_SCHEMA = "user_id string, item_id string, liked boolean, blocked boolean"


@dataclass(frozen=True)
class Catalogue:
    """What entries are scored against.

    Attributes:
        codebook: quantiser of the IDs.
        trie: legal IDs.
        index: item -> row of `items` and `item_log_odds`.
        n_ids: how many items have an ID; they are the first.
        items: the items, and a last one of which nothing is known.
        item_log_odds: theirs, float64 [items + 1]; the last is the prior.
        leaves: an item with exactly the ID of each leaf of the trie: categories of the first item under it,
            means of all for the rest.
        log_odds: mean log odds of the items under each leaf, float64 [leaves].
        category_numbers: of every category path; see `Categories`.
    """

    codebook: Codebook
    trie: Trie
    index: dict[str, int]
    n_ids: int
    items: Items
    item_log_odds: np.ndarray
    leaves: Items
    log_odds: np.ndarray
    category_numbers: dict[str, tuple[int, int]]


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
    tastes_version: int
    score: BlockScore


def block_list_task(warehouse: Warehouse, ds: str, inputs: Mapping[str, int]) -> BlockListTask:
    """What the list of a day is scored with, from tables at the given versions."""
    score, models = load_block_score(warehouse.store, ds, inputs["block_score"])
    return BlockListTask(
        warehouse=str(warehouse.store.root),
        models=str(warehouse.models),
        ds=ds,
        codebook_version=models[CODEBOOK],
        ids_version=inputs["item_semantic_id"],
        rates_version=inputs["item_rate"],
        items_version=inputs["item"],
        tastes_version=inputs["item_taste"],
        score=score,
    )


def block_list(users: "DataFrame", task: BlockListTask) -> "DataFrame":
    """Entries of `block_list` without expiry; those with an illegal ID have no score.

    Args:
        users: rows of sql/block_list.sql.
        task: what to score with.
    """

    return _by_user(users, task, _entries, _ARROW_SCHEMA, _SCHEMA)


def judged_exposures(users: "DataFrame", exposures: "DataFrame", task: BlockListTask) -> "DataFrame":
    """(user_id, item_id, liked, blocked) of every exposure: what the list does to it in the ranking service.

    Args:
        users: rows of sql/block_list.sql; for other users nothing is blocked.
        exposures: (user_id, item_id, liked).
        task: what to score with.
    """
    from pyspark.sql import functions as F

    pages = exposures.groupBy("user_id").agg(F.collect_list(F.struct("item_id", "liked")).alias("page"))
    return _by_user(pages.join(users, "user_id", "left"), task, _judged, _JUDGED_ARROW_SCHEMA, _JUDGED_SCHEMA)


def _by_user(
    users: "DataFrame",
    task: BlockListTask,
    of_user: Callable[[dict[str, Any], Catalogue, BlockScore], Iterator[dict[str, Any]]],
    arrow_schema: pa.Schema,
    schema: str,
) -> "DataFrame":
    """What `of_user` makes of every row, with the catalogue loaded once per task of Spark."""

    def rows(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        catalogue = None
        for batch in batches:
            if batch.num_rows:
                catalogue = catalogue or load_catalogue(task)
                made = [out for row in batch.to_pylist() for out in of_user(row, catalogue, task.score)]
                yield pa.RecordBatch.from_pylist(made, arrow_schema)

    return users.mapInArrow(rows, schema)


_JUDGED_ARROW_SCHEMA = pa.schema(
    [("user_id", pa.string()), ("item_id", pa.string()), ("liked", pa.bool_()), ("blocked", pa.bool_())]
)

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
    codebook, _ = open_codebook(place(task.models), task.codebook_version)
    ids = load_semantic_ids(store, task.codebook_version, task.ds, task.ids_version)
    trie = Trie.build(ids.codes, codebook.code_counts)
    rates = store.read("item_rate", ["item_id", "log_odds"], days=[task.ds], version=task.rates_version)
    known = dict(zip(rates["item_id"].to_pylist(), rates["log_odds"].to_pylist(), strict=True))
    prior = task.score.prior_log_odds
    names, tastes = load_item_tastes(store, task.ds, ids.items, task.tastes_version, prior)
    item_log_odds = np.array([known.get(item, prior) for item in names])
    categories = load_categories(store, task.ds, names, task.items_version)
    items = Items.of(codebook.unit(ids.codes), categories.of_items, tastes)
    leaf = trie.find(ids.codes)
    # Leaves are numbered without gaps, so the distinct ones are all of them in order.
    first, per_leaf = np.unique(leaf, return_index=True, return_counts=True)[1:]

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(leaf, weights=values[: len(leaf)]) / per_leaf

    return Catalogue(
        codebook,
        trie,
        {item: n for n, item in enumerate(names)},
        len(ids.items),
        items.with_unknown(prior),
        np.append(item_log_odds, prior),
        Items.of(items.unit[first], items.categories[first], np.apply_along_axis(mean, 0, tastes)),
        mean(item_log_odds),
        categories.numbers,
    )


@dataclass(frozen=True)
class _User:
    """A user as the score sees one: a row of sql/block_list.sql, its illegal entries left out.

    Attributes:
        legal: which entries are legal, bool [entries].
        codes: of the legal ones, int32 [m, D].
        unit: unit embeddings of these, [m, dim].
        log_probs: of these, [m].
        past: past dislikes that have an ID, with their reasons.
        disliked: unit embeddings of these, [k, dim].
        tally: the user's feedback by category.
        taste: the user's, see `negrec_core.taste`.
        log_odds: the user's.
    """

    legal: np.ndarray
    codes: np.ndarray
    unit: np.ndarray
    log_probs: np.ndarray
    past: list[dict[str, Any]]
    disliked: np.ndarray
    tally: Tally
    taste: np.ndarray
    log_odds: float


def _user(row: dict[str, Any], catalogue: Catalogue, score: BlockScore) -> _User:
    codes = np.array([entry["codes"] for entry in row["entries"]], np.int32)
    log_probs = np.array([entry["log_prob"] for entry in row["entries"]], np.float64)
    legal = catalogue.trie.contains(codes)
    index, n_ids = catalogue.index, catalogue.n_ids
    past = [event for event in row["negatives"] if index.get(event["item_id"], n_ids) < n_ids]
    return _User(
        legal,
        codes[legal],
        catalogue.codebook.unit(codes[legal]),
        log_probs[legal],
        past,
        catalogue.items.unit[[index[event["item_id"]] for event in past]],
        Tally.of(row["categories"], catalogue.category_numbers),
        user_weights(row["weights"], catalogue.items),
        float(score.user_log_odds(np.array(row["n_negatives"]), np.array(row["n_positives"]))),
    )


def _scores(user: _User, candidates: Items, log_odds: np.ndarray, score: BlockScore) -> np.ndarray:
    return score.score(
        features(
            candidates,
            user.unit,
            user.log_probs,
            user.tally,
            user.taste,
            log_odds,
            user.log_odds,
            score.prior_log_odds,
            score.pseudo_events,
        )
    )


def _entries(row: dict[str, Any], catalogue: Catalogue, score: BlockScore) -> Iterator[dict[str, Any]]:
    user = _user(row, catalogue, score)
    leaf = catalogue.trie.find(user.codes)
    candidates = catalogue.leaves.take(leaf)
    scores = iter(_scores(user, candidates, catalogue.log_odds[leaf], score).tolist())
    cosines = iter(user.unit @ user.disliked.T)
    for entry, legal in zip(row["entries"], user.legal, strict=True):
        cosine = next(cosines) if legal else np.zeros(0)
        nearest = int(cosine.argmax()) if len(cosine) else None
        yield {
            "user_id": row["user_id"],
            "rank": entry["rank"],
            "codes": entry["codes"],
            "score": next(scores) if legal else None,
            "log_prob": entry["log_prob"],
            "because_item_id": None if nearest is None else user.past[nearest]["item_id"],
            "because_similarity": None if nearest is None else float(cosine[nearest]),
            "reason_class": None if nearest is None else user.past[nearest]["reason_class"],
        }


def _judged(row: dict[str, Any], catalogue: Catalogue, score: BlockScore) -> Iterator[dict[str, Any]]:
    blocked = np.zeros(len(row["page"]), bool)
    if row["entries"]:
        at = [catalogue.index.get(shown["item_id"], -1) for shown in row["page"]]
        user = _user(row, catalogue, score)
        scores = _scores(user, catalogue.items.take(at), catalogue.item_log_odds[at], score)
        blocked = scores >= score.threshold
    for shown, out in zip(row["page"], blocked.tolist(), strict=True):
        yield {"user_id": row["user_id"], **shown, "blocked": out}


def unpublish(warehouse: Warehouse, ds: str) -> bool:
    """Withdraw the list of a day: an empty revision, which readers pass over.

    Returns:
        Whether there was a list to withdraw.

    Raises:
        MissingError: no list of that day was ever published.
        ConflictError: one is being published meanwhile.
    """
    store = warehouse.store
    revision = store.revision("block_list", ds)
    if not revision:
        raise MissingError(
            f"table block_list: no partition ds={ds}; `negrec status` shows the days that there are"
        )
    if ds not in store.days("block_list"):
        return False
    nothing = BLOCK_LIST.schema.empty_table()
    JobContext(warehouse, ds, revision + 1).write_arrow("block_list", nothing)
    return True


def _require_codebook(ctx: JobContext, version: str) -> None:
    """Raise ArtefactError unless all that is scored was made with the score's codebook.

    Stages of one day may be runs apart, with a model trained in between; embeddings of two codebooks have
    the same width and nothing else in common.
    """
    for table in ("item_taste", "user_taste", "negative_item_set"):
        made = ctx.store.commit_of(table, ctx.ds).provenance.models.get(CODEBOOK)
        if made != version:
            raise ArtefactError(
                f"table {table}: ds={ctx.ds} was made with codebook {made}, block_score with {version};"
                f" run `negrec run --ds {ctx.ds} --force`"
            )


def run(ctx: JobContext) -> None:
    from pyspark.sql import functions as F

    tables = ("negative_item_set", "user_context", "user_taste", "item_rate", "item_taste", "block_score")
    for table in tables:
        ctx.require(table, [ctx.ds])
    predicted = ctx.read("negative_item_set", [ctx.ds])
    contexts, tastes = (ctx.read(table, [ctx.ds]) for table in ("user_context", "user_taste"))
    versions = ctx.pin("item_semantic_id", "item_rate", "item_taste", "item", "block_score")
    task = block_list_task(ctx.warehouse, ctx.ds, versions)
    _require_codebook(ctx, task.codebook_version)
    ctx.use_model(CODEBOOK, task.codebook_version)

    def users(predicted: "DataFrame") -> "DataFrame":
        return run_sql(
            ctx.spark, "block_list", {"predicted": predicted, "contexts": contexts, "tastes": tastes}
        )

    def judged_by_list(exposures: "DataFrame") -> "DataFrame":
        # Before the sets are gathered: the users judged are few where there are many.
        shown = exposures.select("user_id").distinct()
        return judged_exposures(users(predicted.join(shown, "user_id", "left_semi")), exposures, task)

    expires = dt.date.fromisoformat(ctx.ds) + dt.timedelta(days=ctx.config.block_list.valid_days + 1)
    staged = ctx.stage(
        "block_list", block_list(users(predicted), task).withColumn("expires_on", F.lit(expires))
    )
    try:
        files = [str(file) for file in data_files("block_list", staged)]
        entries = read_files(ctx.spark, ctx.store, "block_list", files)
        gates.require_passed(ctx, gates.judge(ctx, entries, judged_by_list))
    except BaseException:
        delete_folder(staged)
        raise
    ctx.commit("block_list", staged)
