"""Small warehouses for tests: the tables and the codebook behind one published block list."""

import datetime as dt
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from negrec_core.artefacts import Manifest, new_version, seal
from negrec_core.block_score import FEATURES, BlockScore
from negrec_core.codebook import Codebook
from negrec_core.delta import DeltaStore, Provenance
from negrec_core.generator import CODEBOOK
from negrec_core.schemas import TABLES
from negrec_core.set_order import SET_FEATURES

Codes = tuple[int, ...]
DS = "2026-03-10"
PLAIN_SCORE = BlockScore(np.array([4.0, 2.0, 0.5, 0.5, 0.3, 0.2, 0.4, 0.3, 0.0]), -1.4, 0.5, -1.0, 5.0)


class Entry(NamedTuple):
    """One predicted semantic ID of a user; entries are ranked in the order given."""

    codes: Codes
    log_prob: float = -1.0
    because: str | None = None
    reason: str | None = None


class Context(NamedTuple):
    """A user's past: items disliked and liked, and how many in all."""

    negatives: Sequence[str] = ()
    positives: Sequence[str] = ()
    n_negatives: int = 0
    n_positives: int = 0


def small_codebook(code_counts: Sequence[int] = (4, 4, 4), dim: int = 8, seed: int = 0) -> Codebook:
    """A codebook of random codewords."""
    rng = np.random.default_rng(seed)
    return Codebook((), tuple(rng.normal(size=(n, dim)).astype(np.float32) for n in code_counts))


def save_codebook(root: Path, codebook: Codebook, until: str = DS) -> Manifest:
    """Store a codebook as a complete model of the warehouse."""
    path = new_version(root / "models", CODEBOOK)
    codebook.save(path)
    parameters = {"until": until, "encoder": "minilm"}
    return seal(path, parameters=parameters, metrics={}, inputs={})


def write_rows(
    store: DeltaStore,
    table: str,
    rows: Sequence[Mapping[str, Any]],
    ds: str,
    revision: int = 1,
    provenance: Provenance | None = None,
) -> int:
    """Replace one day of a table by rows; columns that they lack are null, bucket is 0."""
    schema = TABLES[table].schema
    whole = [{"bucket": 0, **row, "ds": ds} for row in rows]
    frame = pa.Table.from_pylist(whole, schema)
    return store.write_arrow(table, frame, {ds: revision}, provenance or Provenance())


def score_row(score: BlockScore) -> dict[str, Any]:
    """The row of `block_score` that stands for a score."""
    return {
        "features": list(FEATURES),
        "coefficients": score.coefficients.tolist(),
        "intercept": score.intercept,
        "threshold": score.threshold,
        "set_features": list(SET_FEATURES),
        "set_weights": [1.0] + [0.0] * (len(SET_FEATURES) - 1),
        "prior_log_odds": score.prior_log_odds,
        "pseudo_events": score.pseudo_events,
    }


def count_categories(context: Context, categories: Mapping[str, str]) -> list[dict[str, Any]]:
    """The column `categories` of a context whose lists are all there is."""
    past = [(item, "n_negatives") for item in context.negatives]
    past += [(item, "n_positives") for item in context.positives]
    counts: dict[str, dict[str, Any]] = {}
    for item, column in past:
        path = categories.get(item)
        if path:
            row = counts.setdefault(path, {"category": path, "n_negatives": 0, "n_positives": 0})
            row[column] += 1
    return [counts[path] for path in sorted(counts)]


def publish(
    root: Path,
    codebook_version: str,
    items: Mapping[str, Codes],
    entries: Mapping[str, Sequence[Entry]],
    *,
    ds: str = DS,
    revision: int = 1,
    score: BlockScore = PLAIN_SCORE,
    rates: Mapping[str, float] | None = None,
    contexts: Mapping[str, Context] | None = None,
    item_tastes: Mapping[str, Sequence[float]] | None = None,
    user_tastes: Mapping[str, Sequence[float]] | None = None,
    categories: Mapping[str, str] | None = None,
    expires_on: dt.date | None = None,
) -> DeltaStore:
    """Write every table of a block list, the list last.

    Args:
        root: the warehouse.
        codebook_version: version that `save_codebook` made.
        items: item -> its semantic ID; those that have one from an earlier `ds` keep it.
        entries: user -> predicted IDs.
        ds: log date.
        revision: revision of all partitions.
        score: the block score.
        rates: item -> log odds.
        contexts: user -> what the user disliked and liked before.
        item_tastes: item -> log odds and factors.
        user_tastes: user -> weights.
        categories: item -> category path.
        expires_on: default: eight days after `ds`.
    """
    store = DeltaStore(root)
    store.create_tables()
    models = {CODEBOOK: codebook_version}
    known = {
        row["item_id"]
        for row in store.read("item_semantic_id", ["item_id", "ds"]).to_pylist()
        if row["ds"] < ds
    }
    until = expires_on or dt.date.fromisoformat(ds) + dt.timedelta(days=8)
    tables: dict[str, list[dict[str, Any]]] = {
        "item_semantic_id": [
            {"codebook_version": codebook_version, "item_id": item, "codes": codes}
            for item, codes in items.items()
            if item not in known
        ],
        "item": [{"item_id": item, "category": path} for item, path in (categories or {}).items()],
        "item_rate": [{"item_id": item, "log_odds": odds} for item, odds in (rates or {}).items()],
        "user_context": [
            {
                "user_id": user,
                "negatives": [{"item_id": item} for item in context.negatives],
                "positives": [{"item_id": item} for item in context.positives],
                "n_negatives": context.n_negatives,
                "n_positives": context.n_positives,
                "categories": count_categories(context, categories or {}),
                "bucket": len(user) % 2,
            }
            for user, context in (contexts or {}).items()
        ],
        "item_taste": [
            {"item_id": item, "log_odds": own, "factors": factors}
            for item, (own, *factors) in (item_tastes or {}).items()
        ],
        "user_taste": [
            {"user_id": user, "weights": weights, "bucket": len(user) % 2}
            for user, weights in (user_tastes or {}).items()
        ],
        "block_score": [score_row(score)],
    }
    inputs = {
        table: write_rows(store, table, rows, ds, revision, Provenance(models=models))
        for table, rows in tables.items()
    }
    listed = [
        {
            "user_id": user,
            "rank": rank,
            "codes": entry.codes,
            "score": 0.5,
            "log_prob": entry.log_prob,
            "because_item_id": entry.because,
            "because_similarity": None if entry.because is None else 0.5,
            "reason_class": entry.reason,
            "expires_on": until,
            "bucket": len(user) % 2,
        }
        for user, own in entries.items()
        for rank, entry in enumerate(own, 1)
    ]
    write_rows(store, "block_list", listed, ds, revision, Provenance(inputs, models))
    return store
