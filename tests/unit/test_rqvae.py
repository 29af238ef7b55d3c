from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import faiss
import numpy as np
import pytest
import torch

from negrec_core.codebook import Codebook
from negrec_core.errors import ArtefactError, ConfigError, InputError
from negrec_core.sid_health import sid_health
from train import residual_kmeans, rqvae
from train.residual_kmeans import ResidualKmeansSettings
from train.rqvae import RqVae, RqvaeSettings

TRAINERS = [
    pytest.param(rqvae, RqvaeSettings(codes_per_level=16, latent_dim=8), id="rqvae"),
    pytest.param(residual_kmeans, ResidualKmeansSettings(codes_per_level=16, latent_dim=8), id="kmeans"),
]
Settings = RqvaeSettings | ResidualKmeansSettings


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(threads)


def clustered(n: int = 1000, clusters: int = 16, e: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of `clusters` tight groups on the unit sphere, and each row's group."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(clusters, e))
    group = rng.integers(0, clusters, n)
    x = centres[group] + 0.25 * rng.normal(size=(n, e))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32), group


X, GROUP = clustered()


@pytest.mark.parametrize(("trainer", "settings"), TRAINERS)
def test_structure_is_recovered(trainer: ModuleType, settings: Settings) -> None:
    seen = []
    codebook, curve = trainer.train_codebook(X, settings, 0, lambda done, total: seen.append((done, total)))
    codes = codebook.encode(X)
    same_group = GROUP[:, None] == GROUP
    same_code = codes[:, :1] == codes[:, 0]
    others = ~np.eye(len(X), dtype=bool)
    assert same_code[same_group & others].mean() > 0.7
    assert same_code[~same_group].mean() < 0.05
    assert curve.metrics["explained"] > 0.7
    assert curve.metrics["cosine_fidelity"] > 0.8
    health = sid_health(codes, codebook.code_counts)
    assert health.dead_codes == (0, 0, 0)
    assert health.unique_ids > 20 * 16
    assert [done for done, _ in seen] == list(range(1, len(curve.steps) + 1))
    assert {total for _, total in seen} == {len(curve.steps)}


@pytest.mark.parametrize(("trainer", "settings"), TRAINERS)
def test_same_seed_gives_the_same_codebook(trainer: ModuleType, settings: Settings, tmp_path: Path) -> None:
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    codebook, _ = trainer.train_codebook(X, settings, 3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    torch.rand(5)
    again, _ = trainer.train_codebook(X, settings, 3)
    other, _ = trainer.train_codebook(X, settings, 4)
    for one, two in zip(codebook.codewords, again.codewords, strict=True):
        assert np.array_equal(one, two)
    assert not np.array_equal(codebook.codewords[0], other.codewords[0])
    codebook.save(tmp_path)
    assert np.array_equal(Codebook.load(tmp_path).encode(X), codebook.encode(X))


@pytest.mark.parametrize(("trainer", "settings"), TRAINERS)
def test_levels_refine_and_repeated_items_count_once(trainer: ModuleType, settings: Settings) -> None:
    settings = replace(settings, levels=2)
    codebook, curve = trainer.train_codebook(X, settings, 0)
    assert codebook.levels == 2
    repeated, repeated_curve = trainer.train_codebook(np.concatenate([X, X[:300]]), settings, 0)
    assert repeated_curve.metrics == curve.metrics
    for one, two in zip(codebook.codewords, repeated.codewords, strict=True):
        assert np.array_equal(one, two)
    latent = codebook.project(X)
    first = latent - codebook.codewords[0][codebook.encode(X)[:, 0]]
    both = latent - codebook.embed(codebook.encode(X))
    assert (latent**2).sum() > 2 * (first**2).sum() > 2 * (both**2).sum()


@pytest.mark.parametrize(("trainer", "settings"), TRAINERS)
def test_codes_per_level_follow_the_catalogue(trainer: ModuleType, settings: Settings) -> None:
    auto = replace(settings, codes_per_level=None)
    codebook, _ = trainer.train_codebook(np.concatenate([X[:200]] * 5), auto, 0)
    assert codebook.code_counts == (32, 32, 32)


@pytest.mark.parametrize(("trainer", "settings"), TRAINERS)
def test_as_many_codes_as_items(trainer: ModuleType, settings: Settings) -> None:
    codebook, _ = trainer.train_codebook(X[:16], settings, 0)
    assert len(np.unique(codebook.encode(X[:16]), axis=0)) >= 14


@pytest.mark.parametrize(("trainer", "settings"), TRAINERS)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: np.where(x == x[7, 3], np.nan, x), "row 7 is not finite"),
        (lambda x: np.where(x == x[7, 3], np.inf, x), "row 7 is not finite"),
        (lambda x: np.where(x == x[9, :1], 0, x) * (np.arange(len(x)) != 9)[:, None], "row 9"),
        (lambda x: x[:15], "15 distinct embeddings cannot fill 16 codes"),
        (lambda x: np.repeat(x[:8], 9, axis=0), "8 distinct embeddings cannot fill 16 codes"),
        (lambda x: x[:0], "0 distinct embeddings"),
        (lambda x: x[0], "shape 24"),
    ],
)
def test_unusable_input_is_one_clear_error(
    trainer: ModuleType, settings: Settings, spoil, message: str
) -> None:
    with pytest.raises(InputError, match=message) as refused:
        trainer.train_codebook(spoil(X), settings, 0)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"levels": 0},
        {"codes_per_level": 1},
        {"latent_dim": 0},
        {"epochs": 0},
        {"warmup": 1.0},
        {"batch_size": 0},
        {"ema_decay": 1.0},
        {"learning_rate": 0.0},
        {"commitment": -1.0},
    ],
)
def test_wrong_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        RqvaeSettings(**wrong)


def test_ema_step_equals_the_loop() -> None:
    torch.manual_seed(0)
    settings = RqvaeSettings(levels=2, latent_dim=3, ema_decay=0.8, dead_below=0.0)
    model = RqVae(5, 4, settings)
    latents = torch.randn(40, 3)
    model.start_codewords(latents, seed=0, batch_size=40)
    batch = torch.randn(40, 3)
    words, sizes = model.words.clone(), model.sizes.clone()
    codes, total, residuals = model.quantise(batch)
    assert model.update_codewords(codes, residuals) == 0
    left = batch.clone()
    for level in range(2):
        chosen = [int(((row - words[level]) ** 2).sum(dim=1).argmin()) for row in left]
        assert codes[:, level].tolist() == chosen
        for code in range(4):
            mine = [row for row, c in zip(left, chosen, strict=True) if c == code]
            size = 0.8 * sizes[level, code] + 0.2 * len(mine)
            summed = 0.8 * words[level, code] * sizes[level, code] + 0.2 * sum(mine)
            torch.testing.assert_close(model.words[level, code], summed / size)
        left = left - words[level][chosen]
    torch.testing.assert_close(total, batch - left)


def test_dead_codes_restart_on_residuals_of_the_batch() -> None:
    torch.manual_seed(0)
    model = RqVae(5, 4, RqvaeSettings(levels=1, latent_dim=2, ema_decay=0.5, dead_below=0.1))
    batch = torch.randn(20, 2)
    model.start_codewords(batch, seed=0, batch_size=20)
    model.words[0, 3] = 100.0
    model.sizes[0, 3] = 0.0
    model.sums[0, 3] = 0.0
    codes, _, residuals = model.quantise(batch)
    assert 3 not in codes
    assert model.update_codewords(codes, residuals) == 1
    assert torch.isclose(model.words[0, 3], batch).all(dim=1).any()


def test_commitment_moves_the_encoder_only_towards_its_codewords() -> None:
    torch.manual_seed(0)
    model = RqVae(5, 4, RqvaeSettings(levels=2, latent_dim=3))
    model.start_codewords(torch.randn(40, 3), seed=0, batch_size=40)
    latent = torch.randn(6, 3, requires_grad=True)
    codes, _, residuals = model.quantise(latent)
    model.commitment(codes, residuals).backward()
    expected = torch.zeros(6, 3)
    residual = latent.detach()
    for level in range(2):
        residual = residual - model.words[level][codes[:, level]]
        expected += 2 * residual / 6
    torch.testing.assert_close(latent.grad, expected)


def test_more_codes_than_items_in_a_batch() -> None:
    settings = RqvaeSettings(codes_per_level=64, batch_size=8, latent_dim=8, min_steps=1, epochs=4)
    codebook, curve = rqvae.train_codebook(X[:80], settings, 0)
    assert np.isfinite(codebook.codewords).all()
    assert curve.metrics["explained"] > 0


def test_a_code_that_never_had_an_item_stays_put() -> None:
    torch.manual_seed(0)
    model = RqVae(5, 4, RqvaeSettings(levels=1, latent_dim=2, dead_below=0.0))
    batch = torch.randn(20, 2)
    model.start_codewords(batch, seed=0, batch_size=20)
    model.words[0, 3] = 100.0
    model.sizes[0, 3] = 0.0
    codes, _, residuals = model.quantise(batch)
    assert model.update_codewords(codes, residuals) == 0
    assert model.words[0, 3].tolist() == [100.0, 100.0]


@pytest.mark.parametrize("warmup", [0.0, 0.002, 0.9])
def test_divergence_is_an_error(warmup: float) -> None:
    settings = RqvaeSettings(codes_per_level=16, learning_rate=1e30, warmup=warmup)
    with pytest.raises(ArtefactError, match="lower learning_rate"):
        rqvae.train_codebook(X, settings, 0)


def test_export_that_disagrees_with_the_model_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    export = rqvae._export

    def broken(*args) -> Codebook:
        codebook = export(*args)
        weight, bias = codebook.layers[-1]
        return replace(codebook, layers=(*codebook.layers[:-1], (weight, bias + 0.3)))

    monkeypatch.setattr(rqvae, "_export", broken)
    with pytest.raises(ArtefactError, match="otherwise than the model"):
        rqvae.train_codebook(X, RqvaeSettings(codes_per_level=16, min_steps=20, epochs=10), 0)
