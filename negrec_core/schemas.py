"""The tables of the warehouse, each declared once as an Arrow schema with a comment per column.

Everything else derives from these declarations: the Delta schema at table creation, the Spark schema
of every stage's output, the checks before a commit and the column reference of the README.
Partition columns come last. `ds` is the log date (ISO) in the configured time zone, `bucket` a hash
of user_id.
"""

from dataclasses import dataclass

import pyarrow as pa

TIMESTAMP = pa.timestamp("us", tz="UTC")
CODES = pa.list_(pa.int32())

_EVENT_REF = pa.struct(
    [
        pa.field("item_id", pa.string()),
        pa.field("event_time", TIMESTAMP),
        pa.field("reason_class", pa.string()),
    ]
)
_EXPANSION = pa.struct(
    [
        pa.field("item_id", pa.string()),
        pa.field("via", pa.string()),
        pa.field("score", pa.float64()),
    ]
)
_CATEGORY_COUNT = pa.struct(
    [
        pa.field("category", pa.string()),
        pa.field("n_negatives", pa.int32()),
        pa.field("n_positives", pa.int32()),
    ]
)
_CURVE_POINT = pa.struct(
    [
        pa.field("threshold", pa.float64()),
        pa.field("likes_blocked", pa.float64()),
        pa.field("dislikes_blocked", pa.float64()),
    ]
)


@dataclass(frozen=True)
class Table:
    """One Delta table.

    Attributes:
        name: directory under the warehouse.
        about: what one row is.
        schema: Arrow schema including the partition columns; each field has a `comment`.
        key: columns whose combination is unique inside one `ds`.
        partition_by: partition columns, a suffix of the schema.
    """

    name: str
    about: str
    schema: pa.Schema
    key: tuple[str, ...]
    partition_by: tuple[str, ...]

    @property
    def body(self) -> pa.Schema:
        """The columns stored in the data files: all but the partition columns."""
        return pa.schema([f for f in self.schema if f.name not in self.partition_by])


def _column(name: str, kind: pa.DataType, comment: str) -> pa.Field:
    return pa.field(name, kind, metadata={"comment": comment})


_DS = _column("ds", pa.string(), "log date, ISO, in the configured time zone")
_BUCKET = _column("bucket", pa.int32(), "hash of user_id, modulo the configured number of buckets")


def _table(name: str, about: str, key: tuple[str, ...], *columns: pa.Field, bucketed: bool = False) -> Table:
    partitions = [_DS, _BUCKET] if bucketed else [_DS]
    return Table(name, about, pa.schema([*columns, *partitions]), key, tuple(f.name for f in partitions))


_USER = _column("user_id", pa.string(), "the site's user id")
_ITEM = _column("item_id", pa.string(), "the site's item id")
_TIME = _column("event_time", TIMESTAMP, "when it happened, UTC")
_ANCHOR = _column("anchor_time", TIMESTAMP, "last instant that context may use; labels come after")

_EVENT_COLUMNS = (
    _USER,
    _ITEM,
    _TIME,
    _column("action", pa.string(), "what was done: one of the mapping's actions"),
    _column("reason", pa.string(), "the site's wording of why, if it was asked"),
    _column("surface", pa.string(), "where it was shown: feed, search, tab"),
    _column("session_id", pa.string(), "the site's session"),
    _column("position", pa.int32(), "rank on the page, from 0"),
    _column("play_ms", pa.int64(), "time played or dwelt, milliseconds"),
    _column("duration_ms", pa.int64(), "full length of what was shown, milliseconds"),
)

BEHAVIOR_LOG = _table(
    "behavior_log",
    "one logged event",
    ("user_id", "item_id", "event_time", "action"),
    *_EVENT_COLUMNS,
    bucketed=True,
)

QUARANTINE = _table(
    "quarantine",
    "one row of a source that could not be used",
    ("entity", "source", "row"),
    _column("source", pa.string(), "file the row came from"),
    _column("row", pa.int64(), "row number within the file, from 0"),
    _column("entity", pa.string(), "events, items or users"),
    _column("problem", pa.string(), "why it was refused"),
    _column("content", pa.string(), "the row as JSON, cut at 2,000 characters"),
)

ITEM = _table(
    "item",
    "one item version",
    ("item_id",),
    _ITEM,
    _column("title", pa.string(), "shown title"),
    _column("description", pa.string(), "longer text"),
    _column("category", pa.string(), "category path, levels separated by /"),
    _column("seller", pa.string(), "seller, brand or author"),
    _column("media_uri", pa.string(), "image or video"),
    _column("created_at", TIMESTAMP, "when the item came to the catalogue"),
)

USER_PROFILE = _table(
    "user_profile",
    "one user",
    ("user_id",),
    _USER,
    _column("age", pa.string(), "age or age band"),
    _column("gender", pa.string(), "as the site writes it"),
    _column("occupation", pa.string(), "as the site writes it"),
    _column("tags", pa.string(), "other attributes, separated by |"),
)

ANCHOR = _table(
    "anchor",
    "one explicit anchor of a user; absent where anchors are the end of the day",
    ("user_id",),
    _USER,
    _ANCHOR,
)

FEEDBACK = _table(
    "feedback",
    "one polarised event",
    ("user_id", "item_id", "event_time", "polarity"),
    _USER,
    _ITEM,
    _TIME,
    _column("polarity", pa.int32(), "+1 liked, -1 disliked"),
    _column("source", pa.string(), "explicit, or implicit (a judged skip)"),
    _column("reason_class", pa.string(), "class of the reason, null where none was given"),
    _column("weight", pa.float64(), "confidence in the polarity, 0 to 1"),
    bucketed=True,
)

ITEM_GRAPH = _table(
    "item_graph",
    "one directed Swing edge",
    ("item_id", "neighbor_id"),
    _ITEM,
    _column("neighbor_id", pa.string(), "an item disliked by the same users"),
    _column("score", pa.float64(), "Swing similarity, DESIGN section 4"),
    _column("rank", pa.int32(), "1 is the nearest neighbour of item_id"),
)

USER_CONTEXT = _table(
    "user_context",
    "one user as of the anchor",
    ("user_id",),
    _USER,
    _ANCHOR,
    _column("negatives", pa.list_(_EVENT_REF), "disliked, most recent first"),
    _column("positives", pa.list_(_EVENT_REF), "liked, most recent first"),
    _column("n_negatives", pa.int32(), "all dislikes in the window, also those beyond the list"),
    _column("n_positives", pa.int32(), "all likes in the window, also those beyond the list"),
    _column("categories", pa.list_(_CATEGORY_COUNT), "all of them by the item's category path"),
    bucketed=True,
)

TRAINING_NEXT_NEGATIVE = _table(
    "training_next_negative",
    "one next-negative training sample",
    ("user_id", "anchor_time", "target"),
    _USER,
    _ANCHOR,
    _column("target", pa.string(), "item disliked at the first instant after the anchor"),
    _column("negatives", pa.list_(_EVENT_REF), "disliked before the anchor, most recent first"),
    _column("positives", pa.list_(_EVENT_REF), "liked before the anchor, most recent first"),
    bucketed=True,
)

TRAINING_TRANSLATION = _table(
    "training_translation",
    "one translation sample",
    ("item_id", "task"),
    _ITEM,
    _column("task", pa.string(), "sid_to_title or title_to_sid"),
)

TRAINING_ALIGNMENT = _table(
    "training_alignment",
    "one item-level alignment sample: which of four items the user rejected",
    ("user_id", "anchor_time", "target"),
    _USER,
    _ANCHOR,
    _column("target", pa.string(), "item disliked at the first instant after the anchor"),
    _column("distractors", pa.list_(pa.string()), "three items liked before the anchor"),
    _column("negatives", pa.list_(_EVENT_REF), "disliked before the anchor, most recent first"),
    _column("positives", pa.list_(_EVENT_REF), "liked before the anchor, most recent first"),
    _column("held_out", pa.bool_(), "of a user that training does not see: measures forgetting"),
    bucketed=True,
)

_FUTURE = (
    _column("future_negatives", pa.list_(pa.string()), "items disliked within the horizon"),
    _column(
        "expanded_negatives",
        pa.list_(_EXPANSION),
        "top Swing neighbours of the future negatives, best first",
    ),
    _column("future_positives", pa.list_(pa.string()), "items liked within the horizon"),
)

TRAINING_GRPO = _table(
    "training_grpo",
    "one context with the horizon that followed it, for rewards",
    ("user_id", "anchor_time"),
    _USER,
    _ANCHOR,
    _column("negatives", pa.list_(_EVENT_REF), "disliked before the anchor, most recent first"),
    _column("positives", pa.list_(_EVENT_REF), "liked before the anchor, most recent first"),
    *_FUTURE,
    bucketed=True,
)

FUTURE_FEEDBACK = _table(
    "future_feedback",
    "one (user, anchor) label; known as of ds",
    ("user_id", "anchor_time"),
    _USER,
    _ANCHOR,
    *_FUTURE,
    bucketed=True,
)

ITEM_RATE = _table(
    "item_rate",
    "one item's feedback before the anchor",
    ("item_id",),
    _ITEM,
    _column("n_negatives", pa.int64(), "users' dislikes in the window"),
    _column("n_positives", pa.int64(), "users' likes in the window"),
    _column("log_odds", pa.float64(), "log odds of dislike against like, smoothed"),
)

ITEM_TASTE = _table(
    "item_taste",
    "one item as users' tastes act on it",
    ("item_id",),
    _ITEM,
    _column("log_odds", pa.float64(), "that a user of whom nothing is known dislikes it"),
    _column("factors", pa.list_(pa.float64()), "what users' weights of the factors act on"),
)

USER_TASTE = _table(
    "user_taste",
    "one user's taste, as of the anchor",
    ("user_id",),
    _USER,
    _column(
        "weights",
        pa.list_(pa.float32()),
        "log odds of the user's own, weights of the unit embedding of a semantic ID, weights of the factors",
    ),
    bucketed=True,
)

ITEM_SEMANTIC_ID = _table(
    "item_semantic_id",
    "one item under one codebook, in the ds it first got its ID",
    ("codebook_version", "item_id"),
    _column("codebook_version", pa.string(), "version of the codebook"),
    _ITEM,
    _column("codes", CODES, "semantic ID, one code per level"),
)

_SET_COLUMNS = (
    _USER,
    _column("rank", pa.int32(), "1 is the most likely to be disliked next"),
    _column("codes", CODES, "predicted semantic ID"),
    _column("log_prob", pa.float32(), "log-probability among legal IDs; of one no beam: the last beam's"),
    _column("codebook_version", pa.string(), "codebook of the codes"),
    _column("model_version", pa.string(), "generator that predicted it"),
    _column(
        "carried_from",
        pa.string(),
        "ds it was generated on, where the user's prompt has been the same since; null: on this ds",
    ),
)

NEGATIVE_ITEM_SET = _table(
    "negative_item_set",
    "one predicted semantic ID of a user; an empty user_id: of users of whom nothing is known",
    ("user_id", "rank"),
    *_SET_COLUMNS,
    bucketed=True,
)

NEGATIVE_ITEM_SET_SHARD = _table(
    "negative_item_set_shard",
    "staging of negative_item_set: all beams of the users, one shard of them per commit",
    ("user_id", "rank"),
    *_SET_COLUMNS,
    bucketed=True,
)

BLOCK_SCORE = _table(
    "block_score",
    "the calibrated block score and its threshold",
    (),
    _column("features", pa.list_(pa.string()), "names, in the order of the coefficients"),
    _column("coefficients", pa.list_(pa.float64()), "weight of each feature, log odds per unit"),
    _column("intercept", pa.float64(), "log odds where all features are 0"),
    _column("threshold", pa.float64(), "block where the score is at least this"),
    _column("likes_blocked", pa.float64(), "share of held-back likes over the threshold"),
    _column("dislikes_blocked", pa.float64(), "share of held-back dislikes over the threshold"),
    _column("curve", pa.list_(_CURVE_POINT), "what every other threshold would have blocked"),
    _column("set_features", pa.list_(pa.string()), "what orders the candidates of a predicted set"),
    _column("set_weights", pa.list_(pa.float64()), "weight of each of them, log odds per unit"),
    _column("prior_log_odds", pa.float64(), "log odds of dislike against like over all feedback"),
    _column("pseudo_events", pa.float64(), "smoothing of a user's log odds towards the prior"),
    _column("n_users", pa.int64(), "calibration users"),
    _column("n_likes", pa.int64(), "liked exposures among them"),
    _column("n_dislikes", pa.int64(), "disliked exposures among them"),
)

BLOCK_LIST = _table(
    "block_list",
    "one published entry of a user's block list",
    ("user_id", "rank"),
    _USER,
    _column("rank", pa.int32(), "1 is the most likely to be rejected"),
    _column("codes", CODES, "semantic ID that the user is predicted to reject"),
    _column("score", pa.float32(), "block score of an item with exactly this ID, 0 to 1"),
    _column("log_prob", pa.float32(), "the generator's log-probability among legal IDs"),
    _column("because_item_id", pa.string(), "the user's past dislike nearest to this ID"),
    _column("because_similarity", pa.float32(), "cosine between that dislike and this ID"),
    _column("reason_class", pa.string(), "reason class given with that dislike"),
    _column("expires_on", pa.date32(), "first day on which this entry no longer holds"),
    bucketed=True,
)

GATE = _table(
    "gate",
    "one gate as it judged one revision of a block list, published or refused",
    ("revision", "name"),
    _column("revision", pa.int64(), "revision of block_list that was judged"),
    _column("name", pa.string(), "name of the gate"),
    _column("value", pa.float64(), "what was measured; null where there was nothing to measure by"),
    _column("bound", pa.string(), "at least, or at most"),
    _column("limit", pa.float64(), "what the value is held against"),
    _column("passed", pa.bool_(), "whether the value keeps to the limit"),
    _column("accepted", pa.bool_(), "whether it failed and was accepted"),
    _column("note", pa.string(), "what the value is of"),
)

EXEMPTION = _table(
    "exemption",
    "one user for whom nothing is blocked, or one item that is never blocked",
    ("kind", "id"),
    _column("kind", pa.string(), "user or item"),
    _column("id", pa.string(), "the site's id of it"),
    _column("note", pa.string(), "why"),
)

TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        BEHAVIOR_LOG,
        QUARANTINE,
        ITEM,
        USER_PROFILE,
        ANCHOR,
        FEEDBACK,
        ITEM_GRAPH,
        USER_CONTEXT,
        TRAINING_NEXT_NEGATIVE,
        TRAINING_TRANSLATION,
        TRAINING_ALIGNMENT,
        TRAINING_GRPO,
        FUTURE_FEEDBACK,
        ITEM_RATE,
        ITEM_SEMANTIC_ID,
        ITEM_TASTE,
        USER_TASTE,
        NEGATIVE_ITEM_SET,
        NEGATIVE_ITEM_SET_SHARD,
        BLOCK_SCORE,
        BLOCK_LIST,
        GATE,
        EXEMPTION,
    )
}
