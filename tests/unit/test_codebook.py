import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from negrec_core.codebook import (
    SETTINGS,
    WEIGHTS,
    Codebook,
    auto_codes_per_level,
    check_codes,
    check_embeddings,
    encode_unique,
)
from negrec_core.errors import ArtefactError, InputError, MissingError


def random_codebook(
    seed: int, code_counts: tuple[int, ...] = (7, 5, 9), dim: int = 4, e: int = 6, layers: int = 2
) -> Codebook:
    rng = np.random.default_rng(seed)
    widths = [e, *[8] * (layers - 1), dim] if layers else [dim]
    return Codebook(
        layers=tuple(
            (
                rng.normal(size=(out, into)).astype(np.float32),
                rng.normal(size=out).astype(np.float32),
            )
            for into, out in pairwise(widths)
        ),
        codewords=tuple(
            (rng.normal(size=(k, dim)) / (level + 1)).astype(np.float32)
            for level, k in enumerate(code_counts)
        ),
    )


def quantise_by_loops(codebook: Codebook, embedding: np.ndarray) -> list[int]:
    latent = [float(value) for value in embedding]
    for index, (weight, bias) in enumerate(codebook.layers):
        if index:
            latent = [max(value, 0.0) for value in latent]
        latent = [
            sum(float(w) * x for w, x in zip(row, latent, strict=True)) + float(b)
            for row, b in zip(weight, bias, strict=True)
        ]
    codes = []
    for words in codebook.codewords:
        distances = [sum((x - float(c)) ** 2 for x, c in zip(latent, word, strict=True)) for word in words]
        code = distances.index(min(distances))
        latent = [x - float(c) for x, c in zip(latent, words[code], strict=True)]
        codes.append(code)
    return codes


@given(seed=st.integers(0, 2**32), layers=st.integers(0, 3), levels=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_encode_equals_the_loop(seed: int, layers: int, levels: int) -> None:
    codebook = random_codebook(seed, (7, 5, 9, 2)[:levels], layers=layers)
    x = np.random.default_rng(seed + 1).normal(size=(20, codebook.embedding_dim))
    x = x.astype(np.float32)
    codes = codebook.encode(x)
    assert codes.dtype == np.int32
    assert codes.tolist() == [quantise_by_loops(codebook, row) for row in x]


def test_encode_does_not_depend_on_the_batch() -> None:
    # Lattice points: many embeddings lie exactly between codewords, and every level has twins.
    rng = np.random.default_rng(0)
    levels = [rng.integers(-3, 4, size=(40, 8)).astype(np.float32) / 3 for _ in range(3)]
    rotation = np.linalg.qr(rng.normal(size=(8, 8)))[0].astype(np.float32)
    # Rotated once: on some processors a product of twice the rows is not equal in both halves.
    rotated = [words @ rotation.T for words in levels]
    codebook = Codebook(
        layers=((rotation, np.zeros(8, np.float32)),),
        codewords=tuple(np.concatenate([words, words]) for words in rotated),
    )
    x = (rng.integers(-3, 4, size=(3000, 8)) / 3).astype(np.float32)
    x = x[x.any(axis=1)]
    whole = codebook.encode(x)
    assert (whole < 40).all()  # a tie with its twin goes to the lower index
    for step in (1, 3, 64, 1000):
        parts = [codebook.encode(x[i : i + step]) for i in range(0, len(x), step)]
        assert np.array_equal(np.concatenate(parts), whole)
    order = rng.permutation(len(x))
    assert np.array_equal(codebook.encode(x[order]), whole[order])


def test_encode_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    codebook = random_codebook(3)
    x = np.random.default_rng(0).normal(size=(100, 6)).astype(np.float32)
    whole = codebook.encode(x)
    monkeypatch.setattr("negrec_core.codebook._CELLS", 70)
    assert np.array_equal(codebook.encode(x), whole)
    assert codebook.encode(x[:0]).shape == (0, 3)


@given(seed=st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_embed_sums_codewords(seed: int) -> None:
    codebook = random_codebook(seed)
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, codebook.code_counts, size=(30, 3))
    expected = [sum(codebook.codewords[level][code] for level, code in enumerate(row)) for row in codes]
    np.testing.assert_allclose(codebook.embed(codes), expected, rtol=1e-5, atol=1e-6)
    norms = np.linalg.norm(codebook.unit(codes), axis=1)
    np.testing.assert_allclose(norms, 1.0, atol=1e-5)


def test_unit_of_a_zero_sum_is_zero() -> None:
    words = np.array([[1.0, 2.0], [-1.0, -2.0]], np.float32)
    codebook = Codebook(layers=(), codewords=(words, words))
    assert codebook.unit(np.array([[0, 1]])).tolist() == [[0.0, 0.0]]


def test_reload_gives_identical_ids(tmp_path: Path) -> None:
    codebook = random_codebook(5)
    x = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
    codebook.save(tmp_path)
    again = Codebook.load(tmp_path)
    assert np.array_equal(again.encode(x), codebook.encode(x))
    codes = codebook.encode(x)
    assert np.array_equal(again.embed(codes), codebook.embed(codes))
    assert (again.code_counts, again.levels, again.dim) == ((7, 5, 9), 3, 4)
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, SETTINGS}


def test_saving_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        random_codebook(5).save(tmp_path / name)
    for file in (WEIGHTS, SETTINGS):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_load_refuses_what_does_not_belong_together(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="is not there"):
        Codebook.load(tmp_path)
    random_codebook(5).save(tmp_path)
    good = (tmp_path / SETTINGS).read_text()
    for change in (
        {"dim": 3},
        {"format": 2},
        {"layers": 1},
        {"layers": 3},
        {"codes_per_level": [7, 5]},
        {"codes_per_level": None},
    ):
        (tmp_path / SETTINGS).write_text(json.dumps(json.loads(good) | change))
        with pytest.raises(ArtefactError, match="train"):
            Codebook.load(tmp_path)
    (tmp_path / SETTINGS).write_text("{")
    with pytest.raises(ArtefactError, match="cannot be read"):
        Codebook.load(tmp_path)
    (tmp_path / SETTINGS).write_text(good)
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-5])
    with pytest.raises(ArtefactError, match="cannot be read"):
        Codebook.load(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(MissingError, match="is not there"):
        Codebook.load(tmp_path)


def test_shapes_that_do_not_chain_are_refused() -> None:
    good = random_codebook(1)
    nan = good.codewords[0].copy()
    nan[0, 0] = np.nan
    for codewords in (
        (),
        (good.codewords[0][:, :3], good.codewords[1]),
        (good.codewords[0][:0],),
        (nan,),
        (good.codewords[0].astype(np.float64),),
    ):
        with pytest.raises(ArtefactError, match="train it again"):
            Codebook(layers=good.layers, codewords=codewords)
    with pytest.raises(ArtefactError, match="layer 1"):
        Codebook(layers=good.layers[::-1], codewords=good.codewords)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:, :5], "expected n rows of 6"),
        (lambda x: x[0], "expected n rows of 6"),
        (lambda x: x.astype(np.int64), "expected a float type"),
        (lambda x: np.where(np.arange(10)[:, None] == 4, np.nan, x), "row 4 is not finite"),
        (lambda x: np.where(np.arange(10)[:, None] >= 8, -np.inf, x), r"row 8 .*\(2 such rows\)"),
        (lambda x: np.where(np.arange(10)[:, None] == 2, 0.0, x), "row 2 is all zero"),
    ],
)
def test_encode_refuses_unusable_embeddings(change, message: str) -> None:
    x = np.random.default_rng(0).normal(size=(10, 6)).astype(np.float32)
    with pytest.raises(InputError, match=message):
        random_codebook(0).encode(change(x))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (np.array([[0, 0, 0], [0, 5, 0]]), r"row 1 is \[0, 5, 0\]"),
        (np.array([[0, 0, 0], [0, 0, -1]]), "row 1 is"),
        (np.array([[0, 0]]), "expected n rows of 3"),
        (np.array([[0.0, 0.0, 0.0]]), "integer type"),
    ],
)
def test_illegal_codes_are_refused(codes: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        random_codebook(0).embed(codes)


def unique_by_loops(codebook: Codebook, x: np.ndarray) -> list[list[int]]:
    taken: list[list[int]] = []
    for row in x:
        own = quantise_by_loops(codebook, row)
        residual = codebook.project(row[None])[0]
        for level, code in enumerate(own[:-1]):
            residual = residual - codebook.codewords[level][code]
        last = codebook.codewords[-1].astype(np.float64)
        by_distance = sorted(range(len(last)), key=lambda c: ((residual - last[c]) ** 2).sum())
        ids = [[*own[:-1], c] for c in by_distance]
        taken.append(next((i for i in ids if i not in taken), own))
    return taken


@given(seed=st.integers(0, 2**32), cut=st.integers(0, 60))
@settings(max_examples=25, deadline=None)
def test_encode_unique_equals_the_loop_and_can_be_continued(seed: int, cut: int) -> None:
    codebook = random_codebook(seed, (3, 2, 4))
    x = np.random.default_rng(seed).normal(size=(60, 6)).astype(np.float32)
    codes = encode_unique(codebook, x)
    assert codes.tolist() == unique_by_loops(codebook, x)
    assert np.array_equal(codes[:, :-1], codebook.encode(x)[:, :-1])
    first = encode_unique(codebook, x[:cut])
    rest = encode_unique(codebook, x[cut:], taken=first)
    assert np.array_equal(np.concatenate([first, rest]), codes)


def test_encode_unique_separates_equal_items_until_the_level_is_full() -> None:
    codebook = random_codebook(2, (3, 2, 4))
    x = np.repeat(np.random.default_rng(0).normal(size=(1, 6)).astype(np.float32), 6, axis=0)
    codes = encode_unique(codebook, x)
    assert len(np.unique(codes[:4], axis=0)) == 4
    assert codes[4:].tolist() == [codes[0].tolist()] * 2


def test_auto_codes_per_level() -> None:
    sizes = [1, 10, 300, 1200, 1682, 9742, 10_000, 30_000, 10**6, 10**8]
    counts = [auto_codes_per_level(n) for n in sizes]
    assert counts == [8, 8, 32, 64, 64, 128, 128, 512, 8192, 8192]
    many = [auto_codes_per_level(n) for n in range(1, 200_000, 97)]
    assert many == sorted(many)
    assert all(k & (k - 1) == 0 for k in many)


@given(arrays(np.float32, (4, 3), elements=st.floats(-1, 1, width=32)))
def test_check_embeddings_accepts_exactly_the_usable(x: np.ndarray) -> None:
    usable = all(any(value != 0 for value in row) for row in x)
    if usable:
        check_embeddings(x, 3)
    else:
        with pytest.raises(InputError):
            check_embeddings(x, 3)


def test_check_codes_accepts_no_rows() -> None:
    check_codes(np.zeros((0, 2), np.int32), (4, 4))
