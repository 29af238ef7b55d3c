"""The stage `block_score` without Spark: features of held-back feedback, and the fit to them."""

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from warehouses import small_codebook

from jobs.block_score import fit
from jobs.calibration import Calibration, PutBack, features_of
from negrec_core.block_score import FEATURES, Items
from negrec_core.config import load_config
from negrec_core.errors import InputError

SETTINGS = load_config(environment={}).calibration
TRUE = np.array([2.0, 1.0, 1.0, 0.5, 0.7, 0.4, 0.6, 0.5, 0.8])
CODEBOOK = small_codebook()
PATHS = {"a/x": (3, 1), "a/y": (4, 1), "b": (5, 2)}
CATEGORY_COUNT = pa.struct(
    [("category", pa.string()), ("n_negatives", pa.int32()), ("n_positives", pa.int32())]
)


def calibration(n, seed=0):
    """Feedback drawn from a logistic model with coefficients `TRUE`."""
    rng = np.random.default_rng(seed)
    # Scales differ as those of the real features do.
    features = rng.normal(size=(n, len(FEATURES))) * [0.3, 0.3, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    probability = 1 / (1 + np.exp(-(features @ TRUE - 1.0)))
    return rows(features, rng.random(n) < probability)


def rows(features, disliked):
    """Every row a user's only one, and held out."""
    n = len(disliked)
    return Calibration(features, disliked, np.ones(n, bool), np.arange(n), -1.0)


# --------------------------------------------------------------------------------------- the fit


def test_the_fit_recovers_the_model_that_made_the_data():
    data = calibration(20_000)
    score, scores = fit(data, data, SETTINGS)
    np.testing.assert_allclose(scores, score.score(data.features))
    assert (np.sign(score.coefficients) == np.sign(TRUE)).all()
    np.testing.assert_allclose(score.coefficients, TRUE, atol=0.25)
    assert score.intercept == pytest.approx(-1.0, abs=0.15)
    assert (score.prior_log_odds, score.pseudo_events) == (-1.0, SETTINGS.rate_pseudo_events)


def test_the_generators_part_comes_from_the_held_out_and_the_rest_from_everybody():
    everybody, held_out = calibration(20_000), calibration(4_000, 1)
    everybody.features[:, :2] = 0.0  # nothing was predicted for them
    held_out.features[:, :2] *= 2.0
    score, scores = fit(everybody, held_out, SETTINGS)
    np.testing.assert_allclose(score.coefficients[:2], TRUE[:2] / 2, atol=0.25)
    rest = score.coefficients[2:] / TRUE[2:]
    np.testing.assert_allclose(rest, rest.mean(), rtol=0.2)
    few = Calibration(*(part[:150] for part in vars(held_out).values() if isinstance(part, np.ndarray)), -1.0)
    # Where nothing was predicted, the generator's part is that of the held-out on average.
    features = everybody.features.copy()
    features[:, :2] = held_out.features[:, :2].mean(0)
    np.testing.assert_allclose(scores, score.score(features))
    assert np.mean(scores[~everybody.disliked] >= score.threshold) == pytest.approx(0.01, abs=1e-4)
    # Their proportions stay those of everybody, however few are held out.
    by_few = fit(everybody, few, SETTINGS)[0].coefficients[2:]
    np.testing.assert_allclose(by_few / by_few[0], score.coefficients[2:] / score.coefficients[2], rtol=1e-3)


def test_the_held_out_are_told_apart():
    data = calibration(50)
    data.held_out[::3] = False
    own = data.of_held_out()
    np.testing.assert_array_equal(own.features, data.features[data.held_out])
    np.testing.assert_array_equal(own.disliked, data.disliked[data.held_out])
    np.testing.assert_array_equal(own.users, np.flatnonzero(data.held_out))
    assert own.held_out.all()


def test_the_unit_of_a_feature_changes_nothing():
    given_ = calibration(2_000)
    scale = np.array([1, 10, 0.01, 1, 3, 0.1, 7, 2, 0.5])
    other = rows(given_.features * scale, given_.disliked)
    ours, theirs = (fit(data, data, SETTINGS)[0] for data in (given_, other))
    np.testing.assert_allclose(ours.coefficients, theirs.coefficients * scale, rtol=1e-3, atol=1e-4)


def test_a_feature_that_is_always_the_same_does_no_harm():
    given_ = calibration(2_000)
    given_.features[:, 2] = math.log(0.1)
    score, _ = fit(given_, given_, SETTINGS)
    assert score.coefficients[2] == pytest.approx(0, abs=1e-6)
    assert np.isfinite([*score.coefficients, score.intercept]).all()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.05, 0.3])
def test_the_threshold_blocks_at_most_the_share_of_likes_and_no_fewer_than_it_may(share):
    given_ = calibration(3_000)
    score, _ = fit(given_, given_, SETTINGS.model_copy(update={"max_likes_blocked": share}))
    liked = score.score(given_.features)[~given_.disliked]
    blocked = np.count_nonzero(liked >= score.threshold)
    assert blocked == math.floor(share * len(liked) + 1e-9)


@pytest.mark.parametrize(("dislikes", "likes"), [(19, 500), (500, 19), (0, 0)])
def test_too_little_feedback_is_refused_in_one_line(dislikes, likes):
    n = dislikes + likes
    few = rows(np.ones((n, len(FEATURES))), np.arange(n) < dislikes)
    with pytest.raises(InputError, match=f"{dislikes} dislikes and {likes} likes") as caught:
        fit(calibration(2_000), few, SETTINGS)
    assert str(caught.value).isprintable()


def test_just_enough_feedback_is_fitted():
    given_ = calibration(200)
    some = np.concatenate([np.flatnonzero(given_.disliked)[:20], np.flatnonzero(~given_.disliked)[:20]])
    enough = rows(given_.features[some], given_.disliked[some])
    assert 0 < fit(given_, enough, SETTINGS)[0].threshold <= 1


# ---------------------------------------------------------------------------------- the features


def unit(codes):
    total = sum(words[c].astype(float) for words, c in zip(CODEBOOK.codewords, codes, strict=True))
    return total / math.sqrt(sum(x * x for x in total))


def features_by_loop(label, predictions, contexts, rates, tastes, ids, categories, prior, pseudo):
    """The features of one label, one number at a time."""
    here = unit(ids[label["item_id"]]) if label["item_id"] in ids else np.zeros(CODEBOOK.dim)
    own = [row for row in predictions if row["user_id"] == label["user_id"]]
    cosines = [float(unit(row["codes"]) @ here) for row in own]
    weights = [math.exp(row["log_prob"]) for row in own]
    context = next((row for row in contexts if row["user_id"] == label["user_id"]), None)
    share = 1 / (1 + math.exp(-prior))
    n_negatives, n_positives = (context["n_negatives"], context["n_positives"]) if context else (0, 0)
    own_kinds = categories.get(label["item_id"], (0, 0))
    within = []
    for level, kind in enumerate(own_kinds):
        same = [
            row
            for row in (context["categories"] if context else [])
            if kind > 0 and PATHS.get(row["category"], (0, 0))[level] == kind
        ]
        bad, good = (sum(row[column] for row in same) for column in ("n_negatives", "n_positives"))
        within.append(math.log((bad + pseudo * share) / (good + pseudo * (1 - share))))
    of_items, of_users = tastes
    item = of_items.get(label["item_id"], [prior, 0.0])
    user = of_users.get(label["user_id"], np.zeros(1 + CODEBOOK.dim + 1))
    return [
        max(cosines, default=0.0),
        sum(w * c for w, c in zip(weights, cosines, strict=True)) / (sum(weights) or 1.0),
        rates.get(label["item_id"], prior),
        math.log((n_negatives + pseudo * share) / (n_positives + pseudo * (1 - share))),
        *within,
        item[0] + sum(w * x for w, x in zip(user[1:], [*here, *item[1:]], strict=True)),
        user[0],
        not any(user),
    ]


def put_back(labels, predictions, contexts, rates, prior, items, item_tastes, user_tastes):
    """What is known of users put back, and what was predicted for them."""
    text, count = pa.string(), pa.int32()
    codes = pa.list_(pa.int32())
    schemas = {
        "labels": [("user_id", text), ("item_id", text), ("polarity", count), ("held_out", pa.bool_())],
        "predictions": [("user_id", text), ("rank", count), ("codes", codes), ("log_prob", pa.float32())],
        "contexts": [
            ("user_id", text),
            ("n_negatives", count),
            ("n_positives", count),
            ("categories", pa.list_(CATEGORY_COUNT)),
        ],
        "rates": [("item_id", text), ("log_odds", pa.float64())],
    }
    rows = {
        "labels": labels,
        "predictions": predictions,
        "contexts": contexts,
        "rates": [{"item_id": item, "log_odds": odds} for item, odds in rates.items()],
    }
    tables = {name: pa.Table.from_pylist(rows[name], pa.schema(schemas[name])) for name in rows}
    predicted = tables.pop("predictions")
    return PutBack(
        **tables, items=items, item_tastes=item_tastes, user_tastes=user_tastes, prior_log_odds=prior
    ), predicted


@given(st.integers(0, 2**32 - 1), st.integers(0, 25), st.integers(0, 15), st.integers(0, 5))
def test_features_equal_a_plain_loop(seed, n_labels, n_predictions, n_contexts):
    rng = np.random.default_rng(seed)
    names = [f"item {n}" for n in range(12)]
    ids = {item: tuple(rng.integers(4, size=3).tolist()) for item in names[:9]}
    users = [f"user {n}" for n in range(6)]
    pairs = [(user, item) for user in users for item in names]
    labels = [
        {
            "user_id": pairs[n][0],
            "item_id": pairs[n][1],
            "polarity": int(rng.choice([-1, 1])),
            "held_out": pairs[n][0] < "user 3",
        }
        for n in rng.permutation(len(pairs))[:n_labels]
    ]
    predictions = [
        {
            "user_id": str(rng.choice(users)),
            "rank": n,
            "codes": rng.integers(4, size=3).tolist(),
            "log_prob": float(np.float32(-rng.exponential())),
        }
        for n in range(n_predictions)
    ]
    contexts = [
        {
            "user_id": str(user),
            "n_negatives": int(rng.integers(9)),
            "n_positives": int(rng.integers(9)),
            "categories": [
                {"category": str(path), "n_negatives": int(bad), "n_positives": int(good)}
                for path, bad, good in zip(
                    rng.permutation([*PATHS, "gone"])[:3],
                    rng.integers(5, size=3),
                    rng.integers(5, size=3),
                    strict=True,
                )
            ],
        }
        for user in rng.permutation(users)[:n_contexts]
    ]
    rates = {item: float(rng.normal()) for item in names[3:]}
    prior, pseudo = float(rng.normal()), 5.0

    # The last is judged and has no semantic ID.
    items = [*sorted(ids), names[9]]
    codes = np.array([ids[item] for item in items[:-1]], np.int32)
    categories = {item: PATHS.get(str(rng.choice([*PATHS, "none"])), (0, 0)) for item in items}
    kinds = np.array([categories[item] for item in items], np.int32)
    item_tastes = rng.normal(size=(len(items), 2))
    user_tastes = {user: rng.normal(size=1 + CODEBOOK.dim + 1) for user in users[:4]}
    tastes = dict(zip(items, item_tastes, strict=True)), user_tastes
    back, predicted = put_back(labels, predictions, contexts, rates, prior, items, item_tastes, user_tastes)
    catalogue = Items.of(CODEBOOK.unit(codes), kinds, back.item_tastes)
    ours = features_of(back, predicted, catalogue, PATHS, CODEBOOK, pseudo)

    ordered = sorted(labels, key=lambda label: (label["user_id"], label["item_id"]))
    expected = [
        features_by_loop(label, predictions, contexts, rates, tastes, ids, categories, prior, pseudo)
        for label in ordered
    ]
    np.testing.assert_allclose(ours.features, np.reshape(expected, (-1, len(FEATURES))), atol=1e-5)
    assert ours.disliked.tolist() == [label["polarity"] == -1 for label in ordered]
    assert ours.held_out.tolist() == [label["held_out"] for label in ordered]
    listed = sorted({label["user_id"] for label in labels})
    assert [listed[n] for n in ours.users] == [label["user_id"] for label in ordered]
    assert ours.prior_log_odds == prior
