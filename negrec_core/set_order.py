"""Which of many candidate IDs make up a user's predicted set (DESIGN section 8).

Beam search finds the IDs that the generator thinks likeliest; what most users dislike, or began to dislike
lately, is likely too. A conditional logit over the candidates of a user, fitted on users that no generator
has seen, weighs one against the other.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from negrec_core.block_score import smoothed_log_odds
from negrec_core.errors import ArtefactError

SET_FEATURES = ("log_prob", "beam", "dislikes", "item_log_odds", "recent_dislikes", "recent_likes")
# In place of a user_id: the set of users of whom nothing is known. No log has an empty user_id.
ANYBODY = ""
RARE = 5  # an ID that fewer users have disliked is rare, as LIF counts


@dataclass(frozen=True, eq=False)
class Popularity:
    """What everybody did to each ID before an anchor.

    Attributes:
        dislikes: users that disliked it, int64 [ids].
        log_odds: of dislike against like, smoothed, float64 [ids].
        recent_dislikes: dislikes in the last days before the anchor, int64 [ids].
        recent_likes: likes of the same days.
    """

    dislikes: npt.NDArray[np.int64]
    log_odds: npt.NDArray[np.float64]
    recent_dislikes: npt.NDArray[np.int64]
    recent_likes: npt.NDArray[np.int64]

    @classmethod
    def of(
        cls,
        negatives: npt.NDArray[np.int64],
        positives: npt.NDArray[np.int64],
        recent_negatives: npt.NDArray[np.int64],
        recent_positives: npt.NDArray[np.int64],
        pseudo_events: float,
    ) -> "Popularity":
        """From counts per ID, each [ids]; the log odds are smoothed towards those of all IDs."""
        share = (negatives.sum() + 1) / (negatives.sum() + positives.sum() + 2)
        odds = smoothed_log_odds(negatives, positives, share, pseudo_events)
        return cls(negatives, odds, recent_negatives, recent_positives)

    def most_disliked(self, n: int) -> npt.NDArray[np.int64]:
        """Up to `n` IDs by all dislikes and `n` by recent ones, ascending; none that nobody disliked."""
        return np.union1d(_largest(self.dislikes, n), _largest(self.recent_dislikes, n))


def _largest(counts: npt.NDArray[np.int64], n: int) -> npt.NDArray[np.int64]:
    """Indices of the `n` largest counts over 0; of equal ones the first."""
    some = np.flatnonzero(counts)
    if len(some) > n:
        # Those under the n-th largest cannot be among them; a whole sort of a large catalogue is slow.
        some = some[counts[some] >= np.partition(counts[some], -n)[-n]]
    return some[np.argsort(-counts[some], kind="stable")[:n]]


@dataclass(frozen=True, eq=False)
class Candidates:
    """IDs that may be predicted for a user.

    Attributes:
        ids: int64 [n], distinct; the beams, best first, then the others ascending.
        log_probs: the generator's log-probabilities, float64 [n]; of an ID that is no beam, that of the last
            beam, which it hardly ever exceeds.
        features: float64 [n, F], columns in the order of `SET_FEATURES`.
    """

    ids: npt.NDArray[np.int64]
    log_probs: npt.NDArray[np.float64]
    features: npt.NDArray[np.float64]


def candidates(
    beams: npt.NDArray[np.int64],
    log_probs: npt.NDArray[np.float64],
    most_disliked: npt.NDArray[np.int64],
    known: npt.NDArray[np.int64],
    popularity: Popularity,
) -> Candidates:
    """Candidates of one user.

    Args:
        beams: IDs that beam search found, best first, distinct, [m].
        log_probs: theirs, finite, [m].
        most_disliked: IDs that are candidates for everybody, distinct, [k].
        known: IDs that the user has disliked already; they are left out.
        popularity: as of the user's anchor.
    """
    others = most_disliked[~np.isin(most_disliked, beams)]
    ids = np.concatenate([beams, others])
    last = log_probs[-1] if len(log_probs) else 0.0
    scores = np.concatenate([log_probs, np.full(len(others), last)])
    beam = np.arange(len(ids)) < len(beams)
    new = ~np.isin(ids, known)
    ids, scores, beam = ids[new], scores[new], beam[new]
    columns = (
        scores,
        beam,
        np.log1p(popularity.dislikes[ids]),
        popularity.log_odds[ids],
        np.log1p(popularity.recent_dislikes[ids]),
        np.log1p(popularity.recent_likes[ids]),
    )
    return Candidates(ids, scores, np.column_stack(columns).astype(np.float64))


@dataclass(frozen=True, eq=False)
class SetOrder:
    """A fitted order.

    Attributes:
        weights: float64 [F], of each of `SET_FEATURES`.
    """

    weights: npt.NDArray[np.float64]

    def choose(
        self, found: Candidates, popularity: Popularity, size: int, rare_places: int
    ) -> npt.NDArray[np.intp]:
        """Rows of the candidates that make up the set, best first, at most `size`.

        The best `rare_places` of the rare ones are in it, whatever their scores.
        """
        order = np.argsort(-(found.features @ self.weights), kind="stable")
        rare = popularity.dislikes[found.ids[order]] < RARE
        kept = rare & (np.cumsum(rare) <= rare_places)
        kept |= ~kept & (np.cumsum(~kept) <= size - np.count_nonzero(kept))
        return order[kept][:size]


def read_order(names: list[str] | None, weights: list[float] | None, ds: str) -> SetOrder:
    """The order that a row of `block_score` holds; ArtefactError if it is of other features."""
    if names is None or weights is None or tuple(names) != SET_FEATURES:
        raise ArtefactError(
            f"table block_score: ds={ds} orders sets by {', '.join(names or ['nothing'])}, this version"
            f" of negrec by {', '.join(SET_FEATURES)}; run the stage block_score again with --force"
        )
    return SetOrder(np.array(weights, np.float64))
