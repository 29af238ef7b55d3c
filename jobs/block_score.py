"""Stage `block_score`: fit the block score and its threshold (DESIGN section 8).

Users are put back to an earlier anchor, and what they did next is what the score is fitted to: first all
but the generator's part to all users, then, that given, the generator's part to those that no generator was
trained on, whose sets are predicted from what was known then.
"""

import numpy as np
import pyarrow as pa

from jobs.anchors import visible
from jobs.calibration import Calibration, collect_calibration
from jobs.context import JobContext, log
from jobs.item_taste import taste_events
from negrec_core.block_score import FEATURES, BlockScore, curve, sigmoid, threshold_at
from negrec_core.config import CalibrationConfig
from negrec_core.errors import InputError
from negrec_core.generator import CODEBOOK, GENERATOR, open_generator
from negrec_core.schemas import BLOCK_SCORE
from negrec_core.set_order import SET_FEATURES

_CURVE_SHARES = np.array([0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5])
_LEAST = 20
_RIDGE = 10.0  # a small site has but some hundred labels of held-out users
_OF_GENERATOR = FEATURES.index("item_log_odds")  # so many, the first, are the generator's


def fit(
    everybody: Calibration, held_out: Calibration, settings: CalibrationConfig
) -> tuple[BlockScore, np.ndarray]:
    """Logistic regression of disliked against liked in two steps, then the threshold.

    The first step leaves the generator's features out and is fitted to everybody; the second adds them, and
    weighs them against the log odds of the first, on the held-out alone. The threshold is that of everybody,
    since the held-out of a small site like too little to know a hundredth of it; where nothing was predicted
    the generator's features are taken to be those of the held-out on average.

    Args:
        everybody: of all users.
        held_out: of those whom the generator has not seen.
        settings: `calibration` of the configuration.

    Returns:
        The score, and what it is for the rows of `everybody`.

    Raises:
        InputError: too little feedback of held-out users to calibrate on.
    """
    n_dislikes = int(held_out.disliked.sum())
    n_likes = len(held_out.disliked) - n_dislikes
    if min(n_dislikes, n_likes) < _LEAST:
        raise InputError(
            f"block_score: {n_dislikes} dislikes and {n_likes} likes of held-out users in the"
            f" calibration days, at least {_LEAST} of each are needed; raise"
            " calibration.held_out_share or calibration.days"
        )
    rest, intercept = _logistic(everybody.features[:, _OF_GENERATOR:], everybody.disliked)
    given = held_out.features[:, _OF_GENERATOR:] @ rest + intercept
    columns = np.column_stack([held_out.features[:, :_OF_GENERATOR], given])
    weights, shift = _logistic(columns, held_out.disliked, given)
    scale = 1.0 + weights[_OF_GENERATOR]
    coefficients = np.concatenate([weights[:_OF_GENERATOR], rest * scale])
    intercept = intercept * scale + shift
    features = everybody.features.copy()
    unpredicted = ~features[:, :_OF_GENERATOR].any(axis=1)
    features[unpredicted, :_OF_GENERATOR] = held_out.features[:, :_OF_GENERATOR].mean(0)
    scores = sigmoid(features @ coefficients + intercept)
    threshold = threshold_at(scores[~everybody.disliked], settings.max_likes_blocked)
    prior = held_out.prior_log_odds
    return BlockScore(coefficients, intercept, threshold, prior, settings.rate_pseudo_events), scores


def _logistic(
    features: np.ndarray, disliked: np.ndarray, given: np.ndarray | float = 0.0
) -> tuple[np.ndarray, float]:
    """Coefficients and intercept of a ridge-penalised logistic regression, beside log odds that are given.

    scikit-learn's takes no such offset.
    """
    from scipy.optimize import minimize

    # Standardised, so that the penalty treats all features alike.
    mean, spread = features.mean(0), features.std(0)
    # The deviation of equal values may be a rounding error instead of 0.
    spread[np.ptp(features, axis=0) == 0] = np.inf
    scaled = (features - mean) / spread

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        log_odds = given + scaled @ weights[1:] + weights[0]
        surprise = sigmoid(log_odds) - disliked
        slope = np.concatenate([[surprise.sum()], scaled.T @ surprise + _RIDGE * weights[1:]])
        likelihood = (disliked * log_odds - np.logaddexp(0.0, log_odds)).sum()
        return float(_RIDGE * weights[1:] @ weights[1:] / 2 - likelihood), slope

    found = minimize(loss, np.zeros(1 + features.shape[1]), jac=True, method="L-BFGS-B").x
    coefficients = found[1:] / spread
    return coefficients, float(found[0] - coefficients @ mean)


def run(ctx: JobContext) -> None:
    generator = open_generator(ctx.warehouse.models, ctx.ds)
    ctx.use_model(GENERATOR, generator.manifest.version)
    ctx.use_model(CODEBOOK, generator.codebook_manifest.version)
    ctx.require("item_semantic_id", [ctx.ds])
    ctx.read("item_semantic_id", [ctx.ds])
    events = visible(ctx, taste_events(ctx, ctx.read_window("feedback")))
    everybody, held_out, order = collect_calibration(ctx, events, generator)
    score, scores = fit(everybody, held_out, ctx.config.calibration)
    liked, disliked = scores[~everybody.disliked], scores[everybody.disliked]
    points = curve(liked, disliked, _CURVE_SHARES)
    row = {
        "features": list(FEATURES),
        "coefficients": score.coefficients.tolist(),
        "intercept": score.intercept,
        "threshold": score.threshold,
        "likes_blocked": float(np.mean(liked >= score.threshold)),
        "dislikes_blocked": float(np.mean(disliked >= score.threshold)),
        "curve": [vars(point) for point in points],
        "set_features": list(SET_FEATURES),
        "set_weights": order.weights.tolist(),
        "prior_log_odds": score.prior_log_odds,
        "pseudo_events": score.pseudo_events,
        "n_users": len(np.unique(everybody.users)),
        "n_likes": len(liked),
        "n_dislikes": len(disliked),
        "ds": ctx.ds,
    }
    ctx.write_arrow("block_score", pa.Table.from_pylist([row], BLOCK_SCORE.schema))
    log.info(
        "block_score: %d likes and %d dislikes of %d users; threshold %.3f blocks %.1f%% of the"
        " dislikes and %.1f%% of the likes",
        row["n_likes"],
        row["n_dislikes"],
        row["n_users"],
        row["threshold"],
        100 * row["dislikes_blocked"],
        100 * row["likes_blocked"],
    )
