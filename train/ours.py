"""What negrec scores (user, item) pairs by: the deployed block score, and two of its parts alone."""

from pathlib import Path

import numpy as np
import pandas as pd

from negrec_core.artefacts import open_version
from negrec_core.block_score import FEATURES
from negrec_core.config import GenerationConfig
from negrec_core.delta import DeltaStore
from negrec_core.generator import CODEBOOK, GENERATOR
from negrec_core.prompts import PromptWriter, context_events
from negrec_core.semantic_ids import load_semantic_ids
from negrec_core.snapshot import Snapshot
from negrec_core.trie import Trie
from train.baselines import Method, Score

OURS, SIMILARITY, GENERATION = "negrec", "similarity alone", "generation alone"
# IDs scored behind one copy of a user's prompt.
_IDS_AT_ONCE = 20


def ours(
    store: DeltaStore,
    models: Path,
    settings: GenerationConfig,
    snapshot: Snapshot,
    predicted: dict[str, np.ndarray],
) -> dict[str, Method]:
    """The published score with the predicted sets; the cosine to the nearest predicted ID; the generator.

    The generator's row is left out where the list does not name the generator that made it.
    """

    def block_score(pairs: pd.DataFrame) -> np.ndarray:
        return snapshot.score.score(pair_features(snapshot, pairs))

    def similarity(pairs: pd.DataFrame) -> np.ndarray:
        # Equal cosines differ in their last digits with what else is multiplied; they must tie.
        return pair_features(snapshot, pairs)[:, FEATURES.index("similarity")].round(6)

    found = {OURS: Method(block_score, predicted), SIMILARITY: Method(similarity, None)}
    if GENERATOR in store.commit_of("negative_item_set", snapshot.ds).provenance.models:
        found[GENERATION] = Method(generation_score(store, models, settings, snapshot.ds), None)
    return found


def pair_features(snapshot: Snapshot, pairs: pd.DataFrame) -> np.ndarray:
    """Block-score features [n, F] of pairs (user_id, item_id), as the ranking service computes them."""
    out = np.zeros((len(pairs), len(FEATURES)))
    items = pairs["item_id"].to_numpy()
    for user, rows in pairs.groupby("user_id", sort=False).indices.items():
        out[rows] = snapshot.features(str(user), items[rows].tolist())
    return out


def generation_score(store: DeltaStore, models: Path, settings: GenerationConfig, ds: str) -> Score:
    """Log-likelihood of an item's semantic ID, all legal IDs competing, after the user's prompt of `ds`.

    It is what beam search ranks by, for IDs that no beam reaches too. The generator is the one that made
    `negative_item_set`; -inf for items without an ID.
    """
    # The report needs the names above, and not torch.
    from negrec_core.beam.torch_engine import TorchOptions, load

    made = store.commit_of("negative_item_set", ds).provenance
    path, _ = open_version(models, GENERATOR, made.models[GENERATOR])
    prompt = PromptWriter.load(path)
    engine = load(path, prompt.vocabulary, TorchOptions(dtype=settings.dtype))
    ids = load_semantic_ids(store, made.models[CODEBOOK], ds, made.inputs["item_semantic_id"])
    trie = Trie.build(ids.codes, prompt.vocabulary.code_counts)
    leaf_of_item = dict(zip(ids.items, trie.find(ids.codes).tolist(), strict=True))
    blocks = prompt.blocks(ids.codes)
    columns = ["user_id", "negatives", "positives"]
    contexts = store.read("user_context", columns, days=[ds], version=made.inputs["user_context"])
    row_of_user = {user: row for row, user in enumerate(contexts["user_id"].to_pylist())}

    def write(user: str) -> list[int]:
        row = row_of_user.get(user)
        past = {} if row is None else contexts.slice(row, 1).to_pylist()[0]
        events = context_events(past.get("negatives", []), past.get("positives", []), ids.index)
        return prompt.write(events, blocks, settings.pad_prompts_to)[0]

    def score(pairs: pd.DataFrame) -> np.ndarray:
        leaf = pairs["item_id"].map(leaf_of_item).fillna(-1).astype(np.int64)
        asked = pairs[["user_id"]].assign(leaf=leaf)
        distinct = asked[leaf >= 0].drop_duplicates().sort_values(["user_id", "leaf"], ignore_index=True)
        if not len(distinct):
            return np.full(len(pairs), -np.inf)
        place = distinct.groupby("user_id").cumcount()
        row = pd.factorize(pd.MultiIndex.from_arrays([distinct["user_id"], place // _IDS_AT_ONCE]))[0]
        leaves = np.full((row.max() + 1, _IDS_AT_ONCE), -1, np.int64)
        leaves[row, place % _IDS_AT_ONCE] = distinct["leaf"]
        users = distinct["user_id"].to_numpy()[np.unique(row, return_index=True)[1]]
        written = {user: write(user) for user in np.unique(users)}
        found = engine.log_probs([written[user] for user in users], trie, leaves)
        distinct["score"] = found[row, place % _IDS_AT_ONCE]
        scores = asked.merge(distinct, how="left", on=["user_id", "leaf"])["score"]
        return scores.fillna(-np.inf).to_numpy(float)

    return score
