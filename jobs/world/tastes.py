"""What users like and dislike: weights of the values that items' attributes take.

Users belong to archetypes, so that other users' behaviour tells about one's own.
"""

import numpy as np

from jobs.world.draws import Array

# Kinds of attribute that users have tastes in, and how many values of each an archetype likes and
# dislikes; a user takes most of these and adds some of their own.
KINDS = ("category", "top", "style", "brand", "material")
ARCHETYPES = 12
ARCHETYPE_LIKES = (4, 1, 2, 5, 2)
ARCHETYPE_DISLIKES = (2, 1, 1, 2, 1)
LIKE, DISLIKE = (0.4, 1.0), (1.4, 2.8)  # range of a like's and of a dislike's weight
KEEP = 0.8  # chance that a user shares one of the archetype's tastes
OWN_LIKES = (1.0, 0.2, 0.5, 1.0, 0.5)  # expected number of a user's own, per kind
OWN_DISLIKES = (0.6, 0.1, 0.4, 0.6, 0.3)


def make_archetypes(offsets: Array, rng: np.random.Generator) -> Array:
    """[ARCHETYPES, columns] weights that the users of an archetype share.

    Dislikes are dealt like cards, so that no value is disliked by nearly everybody.
    """
    weights = np.zeros((ARCHETYPES, offsets[-1]))
    for kind, (likes, dislikes) in enumerate(zip(ARCHETYPE_LIKES, ARCHETYPE_DISLIKES, strict=True)):
        deck = rng.permutation(np.arange(offsets[kind], offsets[kind + 1]))
        for archetype in weights:
            disliked, liked = deck[:dislikes], rng.permutation(deck[dislikes:])[:likes]
            archetype[disliked] = -rng.uniform(*DISLIKE, dislikes)
            archetype[liked] = rng.uniform(*LIKE, likes)
            deck = np.roll(deck, -dislikes)
    return weights


def make_weights(archetypes: Array, offsets: Array, archetype: Array, rng: np.random.Generator) -> Array:
    """[users, columns]: most of the archetype's tastes, each felt more or less, and some own.

    Args:
        archetypes: [ARCHETYPES, columns] of `make_archetypes`.
        offsets: [len(KINDS) + 1] first column of each kind.
        archetype: [users] archetype of each user.
        rng: source of chance.
    """
    shape = (len(archetype), archetypes.shape[1])
    felt = rng.lognormal(0.0, 0.2, shape) * (rng.random(shape) < KEEP)
    weights = archetypes[archetype] * felt
    sizes = np.diff(offsets)
    draw = rng.random(shape)
    dislikes = np.repeat(np.array(OWN_DISLIKES) / sizes, sizes)
    likes = dislikes + np.repeat(np.array(OWN_LIKES) / sizes, sizes)
    own = np.where(
        draw < dislikes,
        -rng.uniform(*DISLIKE, shape),
        np.where(draw < likes, rng.uniform(*LIKE, shape), 0.0),
    )
    return np.where(weights == 0, own, weights).astype(np.float32)
