"""The block list as a ranking service uses it: opened once, held in memory, asked many times.

    blocks = BlockList.open("/warehouse")
    allowed = blocks.allowed("user 7", page)      # the page without what user 7 would reject
    blocks.refresh()                              # swap to a newer list, without a gap

Needs no Spark and no torch.
"""

import contextlib
import dataclasses
import datetime as dt
import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from negrec_core.block_score import FEATURES
from negrec_core.delta import DeltaStore
from negrec_core.errors import InputError, NegrecError
from negrec_core.exemptions import ITEM, USER, Exemptions, load_exemptions
from negrec_core.snapshot import (
    Published,
    Snapshot,
    load_block_score,
    load_published,
    load_snapshot,
    newest_list,
)
from negrec_core.storage import Place, place

__all__ = [
    "BlockList",
    "Published",
    "Snapshot",
    "Why",
    "load_block_score",
    "load_snapshot",
    "newest_list",
]


@dataclass(frozen=True)
class Why:
    """Why an item scores as it does for a user.

    Attributes:
        score: the block score, 0 to 1.
        blocked: whether it reaches the threshold of a list that holds.
        similarity: cosine between the item and the nearest predicted ID; 0 without one.
        rank: rank of that predicted ID, None without one.
        because_item_id: the user's past dislike nearest to that predicted ID.
        reason_class: reason class given with that dislike.
        contributions: feature -> its part of the log odds.
        exempt: `user` or `item` where that is why nothing is blocked.
    """

    score: float
    blocked: bool
    similarity: float
    rank: int | None
    because_item_id: str | None
    reason_class: str | None
    contributions: dict[str, float]
    exempt: str | None


class BlockList:
    """The newest valid block list of a warehouse; safe to share between threads.

    A call takes the list once, at its start: a `refresh` meanwhile changes the calls after it.
    Exemptions are apart from the list, so that they hold at once.
    """

    def __init__(
        self,
        warehouse: Place | str,
        snapshot: Snapshot,
        threshold: float | None,
        min_page_share: float,
        today: dt.date | None,
        exemptions: Exemptions | None = None,
    ) -> None:
        """Use `open`."""
        self._warehouse = place(warehouse)
        self._snapshot = snapshot
        self._threshold = threshold
        self._min_page_share = min_page_share
        self._fixed_today = today
        self._exemptions = exemptions or Exemptions()
        self._refreshing = threading.Lock()

    @classmethod
    def open(
        cls,
        warehouse: Place | str,
        *,
        threshold: float | None = None,
        min_page_share: float = 0.5,
        today: dt.date | None = None,
    ) -> "BlockList":
        """Load the newest list that has not expired.

        Args:
            warehouse: root of the warehouse, a path or an object-store URL.
            threshold: blocks at this score instead of the published threshold.
            min_page_share: `allowed` keeps at least this share of a page. The configuration's
                `block_list.min_page_share` is what `negrec filter` passes here.
            today: the day that expiry is judged by, to look at the past; default: the UTC date of
                each call.

        Raises:
            MissingError: no list, or all have expired; or the object store cannot be used.
            ArtefactError: the list's codebook is damaged or another one's.
            InputError: a table of the list cannot be read.
        """
        if not 0 <= min_page_share <= 1:
            raise InputError(f"min_page_share {min_page_share}: give a share between 0 and 1")
        snapshot = load_snapshot(warehouse, today or _utc_today())
        exemptions = load_exemptions(DeltaStore(warehouse))
        return cls(warehouse, snapshot, threshold, min_page_share, today, exemptions)

    @property
    def snapshot(self) -> Snapshot:
        """The list in use."""
        return self._snapshot

    @property
    def threshold(self) -> float:
        """Score from which an item is blocked, with the list in use."""
        return self._threshold_in(self._snapshot)

    def scores(self, user_id: str, item_ids: Sequence[str]) -> np.ndarray:
        """Block scores float64 [n]: the probability that the user rejects each item.

        A user or item that is not known is judged by what is known of the other.
        """
        snapshot = self._snapshot
        return snapshot.score.score(snapshot.features(snapshot.row_of(user_id), item_ids))

    def allowed(self, user_id: str, item_ids: Sequence[str]) -> list[str]:
        """The items to show, in the order given: those under the threshold.

        Where that would leave less than `min_page_share` of the page, those of the blocked that are
        least likely to be rejected stay. Nothing is blocked for a user without entries or who is
        exempt, no item that is exempt, nor anything once the list has expired or was withdrawn.
        """
        snapshot, exempt = self._snapshot, self._exemptions
        user = snapshot.users.get(user_id, -1)
        if user < 0 or user_id in exempt.users or not self._holds(snapshot) or not len(item_ids):
            return list(item_ids)
        scores = snapshot.score.score(snapshot.features(user, item_ids))
        if exempt.items:
            scores[[item in exempt.items for item in item_ids]] = -np.inf
        keep = scores < self._threshold_in(snapshot)
        # Less a little: 0.07 * 100 is more than 7 in floating point.
        least = int(np.ceil(self._min_page_share * len(item_ids) - 1e-9))
        if np.count_nonzero(keep) < least:
            keep[:] = False
            keep[np.argsort(scores, kind="stable")[:least]] = True
        return list(itertools.compress(item_ids, keep.tolist()))

    def why(self, user_id: str, item_id: str) -> Why:
        """What the score of one item rests on."""
        snapshot, exemptions = self._snapshot, self._exemptions
        exempt = USER if user_id in exemptions.users else ITEM if item_id in exemptions.items else None
        user = snapshot.row_of(user_id)
        row = snapshot.features(user, [item_id])
        score = float(snapshot.score.score(row)[0])
        span = snapshot.span(user)
        listed = span.stop > span.start
        rank = because = reason = None
        if listed:
            unit = snapshot.catalogue.unit[snapshot.items.rows([item_id])[0]]
            cosine = snapshot.entry_units(span) @ unit
            nearest = span.start + int(cosine.argmax())
            rank = int(snapshot.ranks[nearest])
            because = snapshot.because[nearest].as_py()
            reason = snapshot.reasons[nearest].as_py()
        over = score >= self._threshold_in(snapshot)
        return Why(
            score=score,
            blocked=listed and over and exempt is None and self._holds(snapshot),
            similarity=float(row[0, 0]),
            rank=rank,
            because_item_id=because,
            reason_class=reason,
            contributions=dict(zip(FEATURES, (row[0] * snapshot.score.coefficients).tolist(), strict=True)),
            exempt=exempt,
        )

    def refresh(self, today: dt.date | None = None) -> bool:
        """Swap to the newest valid list if that is another one; requests go on meanwhile.

        Call it every few minutes from one thread; the old list stays in use until the new one is
        loaded, and where loading fails. A list that was withdrawn blocks nothing from then on, even
        if no other can be loaded. Exemptions are looked at first, see `refresh_exemptions`.

        Args:
            today: the day that expiry is judged by; default: as for `open`.

        Returns:
            Whether the list changed.

        Raises:
            MissingError: no list is valid any more, or the object store cannot be used.
            ArtefactError: the new list's codebook is damaged or another one's.
            InputError: a table of the new list cannot be read.
        """
        with self._refreshing:
            store = DeltaStore(self._warehouse)
            self._exemptions = load_exemptions(store, self._exemptions)
            try:
                found = newest_list(store, today or self._fixed_today or _utc_today())
                if (found.ds, found.revision) == (self._snapshot.ds, self._snapshot.revision):
                    return False
                self._snapshot = load_published(store, found)
            except NegrecError:
                with contextlib.suppress(NegrecError):
                    if _withdrawn(store, self._snapshot):
                        self._snapshot = dataclasses.replace(self._snapshot, expires_on=dt.date.min)
                raise
            return True

    def refresh_exemptions(self) -> bool:
        """Look only at the exemptions, which takes milliseconds; call it every few seconds.

        Returns:
            Whether they changed.

        Raises:
            InputError: the table cannot be read; those known before hold on.
            MissingError: the object store cannot be used; likewise.
        """
        with self._refreshing:
            before = self._exemptions
            self._exemptions = load_exemptions(DeltaStore(self._warehouse), before)
            return self._exemptions is not before

    def _threshold_in(self, snapshot: Snapshot) -> float:
        return snapshot.score.threshold if self._threshold is None else self._threshold

    def _holds(self, snapshot: Snapshot) -> bool:
        return (self._fixed_today or _utc_today()) < snapshot.expires_on


def _withdrawn(store: DeltaStore, snapshot: Snapshot) -> bool:
    """Whether a later revision of a list has no entries."""
    later = store.revision("block_list", snapshot.ds) > snapshot.revision
    return later and snapshot.ds not in store.days("block_list")


def _utc_today() -> dt.date:
    return dt.datetime.now(dt.UTC).date()
