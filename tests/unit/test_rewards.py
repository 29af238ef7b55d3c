"""Rewards against loops over every target."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from negrec_core.codebook import Codebook
from train.rewards import Reward, Targets

COUNTS = (3, 4, 2)
RNG = np.random.default_rng(0)
CODEBOOK = Codebook((), tuple(RNG.normal(size=(count, 5)).astype(np.float32) for count in COUNTS))
CODES = np.array([[a, b, c] for a in range(3) for b in range(4) for c in range(2)], np.int32)
SIDS = st.integers(0, len(CODES) - 1)


def cosine(one, other):
    a, b = (
        sum(words[code] for words, code in zip(CODEBOOK.codewords, codes, strict=True))
        for codes in (one, other)
    )
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def loop_reward(scheme, gamma, generated, negatives, positives):
    if scheme == "e":
        best = 0.0
        for sid in negatives:
            agree = 0
            while agree < 3 and CODES[sid][agree] == generated[agree]:
                agree += 1
            best = max(best, (0, 0.01, 0.1, 1)[agree])
        return best

    def near(sids):
        found = [cosine(generated, CODES[sid]) for sid in sids]
        if scheme in "bd":
            found = [value if value >= 0.6 else 0.0 for value in found]
        return max(found, default=0.0)

    return near(negatives) - (gamma * near(positives) if scheme in "cd" else 0.0)


@given(
    st.sampled_from("abcde"),
    st.floats(0, 2),
    st.lists(st.tuples(st.lists(SIDS, max_size=4), st.lists(SIDS, max_size=4)), min_size=1, max_size=4),
    st.data(),
)
def test_rewards_equal_a_loop(scheme, gamma, targets, data):
    negatives, positives = zip(*targets, strict=True)
    asked = data.draw(st.lists(st.tuples(st.integers(0, len(targets) - 1), SIDS), min_size=1, max_size=8))
    reward = Reward(scheme, gamma, CODEBOOK, CODES, Targets.of(negatives), Targets.of(positives))
    samples = np.array([sample for sample, _ in asked])
    found = reward(CODES[[sid for _, sid in asked]], samples)
    expected = [
        loop_reward(scheme, gamma, CODES[sid], negatives[sample], positives[sample]) for sample, sid in asked
    ]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def reward_of(scheme, generated, negatives, positives, gamma=0.5):
    reward = Reward(scheme, gamma, CODEBOOK, CODES, Targets.of([negatives]), Targets.of([positives]))
    return float(reward(CODES[[generated]], np.array([0]))[0])


def test_a_rejected_item_earns_most_and_a_liked_one_costs():
    assert reward_of("a", 3, [3, 9], []) == pytest.approx(1)
    assert reward_of("c", 3, [3], [3]) == pytest.approx(0.5)
    assert reward_of("c", 3, [], [3]) == pytest.approx(-0.5)
    assert reward_of("e", 3, [3], [3]) == 1
    assert [reward_of("e", 0, [sid], []) for sid in (1, 2, 8)] == pytest.approx([0.1, 0.01, 0])


def test_one_level_can_be_a_hit():
    codebook = Codebook((), (CODEBOOK.codewords[0],))
    codes = np.arange(3, dtype=np.int32)[:, None]
    reward = Reward("e", 0.0, codebook, codes, Targets.of([[1]]), Targets.of([[]]))
    assert reward(codes, np.zeros(3, int)).tolist() == [0, 1, 0]
