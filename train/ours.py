"""What negrec scores (user, item) pairs by: the deployed block score, and two of its parts alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from negrec_core.artefacts import open_version
from negrec_core.block_score import FEATURES
from negrec_core.config import GenerationConfig
from negrec_core.delta import DeltaStore
from negrec_core.generator import CODEBOOK, GENERATOR
from negrec_core.prompts import Event, PromptWriter, context_events
from negrec_core.semantic_ids import SemanticIds, load_semantic_ids
from negrec_core.snapshot import Snapshot
from negrec_core.storage import Place
from negrec_core.trie import Trie
from train.baselines import Method, Score, first_new

if TYPE_CHECKING:
    # The report needs the names below, and not torch.
    from negrec_core.beam.torch_engine import TorchBeamEngine

OURS, SIMILARITY, GENERATION = "negrec", "similarity alone", "generation alone"
# IDs scored behind one copy of a user's prompt.
_IDS_AT_ONCE = 20


def ours(
    store: DeltaStore,
    models: Place,
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
        out[rows] = snapshot.features(snapshot.row_of(str(user)), items[rows].tolist())
    return out


def generation_score(store: DeltaStore, models: Place, settings: GenerationConfig, ds: str) -> Score:
    """`Generation.score` of the generator that made `negative_item_set`."""
    from negrec_core.beam.torch_engine import TorchOptions, load

    made = store.commit_of("negative_item_set", ds).provenance
    path, _ = open_version(models, GENERATOR, made.models[GENERATOR])
    prompt = PromptWriter.load(path)
    engine = load(path, prompt.vocabulary, TorchOptions(dtype=settings.dtype))
    ids = load_semantic_ids(store, made.models[CODEBOOK], ds, made.inputs["item_semantic_id"])
    return Generation(engine, prompt, ids, settings, store, ds, made.inputs["user_context"]).score


@dataclass
class Generation:
    """What a generator says of users after their prompts of a day.

    Attributes:
        engine: the generator.
        prompt: writes its prompts.
        ids: semantic IDs, all of which are legal.
        settings: section `generation` of the configuration.
        store: the Delta tables.
        ds: log date of the contexts.
        contexts_version: Delta version of `user_context`; absent: the newest.
    """

    engine: "TorchBeamEngine"
    prompt: PromptWriter
    ids: SemanticIds
    settings: GenerationConfig
    store: DeltaStore
    ds: str
    contexts_version: int | None = None

    def __post_init__(self) -> None:
        self._trie = Trie.build(self.ids.codes, self.prompt.vocabulary.code_counts)
        self._leaf_of_sid = self._trie.find(self.ids.codes)
        self._leaf_of_item = dict(zip(self.ids.items, self._leaf_of_sid.tolist(), strict=True))
        self._blocks = self.prompt.blocks(self.ids.codes)
        columns = ["user_id", "negatives", "positives"]
        self._contexts = self.store.read(
            "user_context", columns, days=[self.ds], version=self.contexts_version
        )
        self._row_of_user = {user: row for row, user in enumerate(self._contexts["user_id"].to_pylist())}

    def past(self, user: str) -> list[Event]:
        """Events of the user's context."""
        row = self._row_of_user.get(user)
        context = {} if row is None else self._contexts.slice(row, 1).to_pylist()[0]
        return context_events(context.get("negatives", []), context.get("positives", []), self.ids.index)

    def sets(self, users: Sequence[str]) -> dict[str, np.ndarray]:
        """User -> leaves of the 20 likeliest IDs, without those of the dislikes in the context."""
        pasts = [self.past(user) for user in users]
        prompts = [self._write(past) for past in pasts]
        found = self.engine.search(prompts, self._trie, min(self.settings.beam_width, self._trie.n_ids))
        leaves = self._trie.find(np.maximum(found.codes, 0).reshape(-1, self._trie.depth))
        leaves = np.where(found.codes[:, :, 0] >= 0, leaves.reshape(found.log_probs.shape), -1)
        disliked = [np.array([event.sid for event in past if event.disliked], np.int64) for past in pasts]
        known = [self._leaf_of_sid[sids] for sids in disliked]
        return {
            user: first_new(ranked[ranked >= 0], own)
            for user, ranked, own in zip(users, leaves, known, strict=True)
        }

    def score(self, pairs: pd.DataFrame) -> np.ndarray:
        """Log-likelihood of an item's semantic ID, all legal IDs competing, after the user's prompt.

        It is what beam search ranks by, for IDs that no beam reaches too; -inf for items without an ID.
        """
        leaf = pairs["item_id"].map(self._leaf_of_item).fillna(-1).astype(np.int64)
        asked = pairs[["user_id"]].assign(leaf=leaf)
        distinct = asked[leaf >= 0].drop_duplicates().sort_values(["user_id", "leaf"], ignore_index=True)
        if not len(distinct):
            return np.full(len(pairs), -np.inf)
        place = distinct.groupby("user_id").cumcount()
        row = pd.factorize(pd.MultiIndex.from_arrays([distinct["user_id"], place // _IDS_AT_ONCE]))[0]
        leaves = np.full((row.max() + 1, _IDS_AT_ONCE), -1, np.int64)
        leaves[row, place % _IDS_AT_ONCE] = distinct["leaf"]
        users = distinct["user_id"].to_numpy()[np.unique(row, return_index=True)[1]]
        written = {user: self._write(self.past(user)) for user in np.unique(users)}
        found = self.engine.log_probs([written[user] for user in users], self._trie, leaves)
        distinct["score"] = found[row, place % _IDS_AT_ONCE]
        scores = asked.merge(distinct, how="left", on=["user_id", "leaf"])["score"]
        return scores.fillna(-np.inf).to_numpy(float)

    def _write(self, past: list[Event]) -> list[int]:
        return self.prompt.write(past, self._blocks, self.settings.pad_prompts_to)[0]
