"""RQ-VAE codebook: encoder, residual quantiser and decoder trained together (DESIGN section 5).

The loss of an embedding x with latent z = encoder(x) is

    ||x - x^||^2 + lambda * sum_l (||R_l - sg Z_l||^2 + ||sg R_l - Z_l||^2)

where R_l is what the levels before l left of z, Z_l the codeword chosen for it, sg stops the
gradient and x^ = decoder(sum_l Z_l). The first term of the sum (commitment) trains the encoder. The
second one has its minimum where each codeword is the mean of the residuals assigned to it. An
exponential moving average (EMA) of that mean follows it directly, so the codewords get no gradient,
and the term, equal to the first in value, is left out of the loss that is differentiated. The
decoder's gradient reaches the encoder straight through the quantiser.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from negrec_core.codebook import Codebook
from negrec_core.errors import ArtefactError, ConfigError
from negrec_core.progress import Progress, silent
from negrec_core.sid_health import cosine_fidelity
from train.residual_kmeans import TrainingCurve, check_sizes, kmeans, training_rows

_INIT_ITERATIONS = 10
# Items per batch under which a moving average is too small to divide by in float32.
_LEAST_SIZE = 1e-6


@dataclass(frozen=True)
class RqvaeSettings:
    """Settings of the RQ-VAE.

    Attributes:
        levels: D, codes in an ID.
        codes_per_level: K of every level; None takes `auto_codes_per_level` of the distinct rows.
        latent_dim: length of latents and codewords.
        hidden: widths of the encoder's hidden layers; the decoder mirrors them.
        epochs: passes over the items.
        min_steps: a small catalogue gets more passes, until they make this many steps.
        warmup: share of the passes, the first, that leave the quantiser out, so that k-means starts
            from latents that already mean something.
        batch_size: items per step.
        learning_rate: Adam's, falling linearly to 0.
        commitment: lambda.
        ema_decay: weight of the past in a codeword's moving average.
        dead_below: a code is dead and restarted on a badly reconstructed residual when its average
            share of a batch falls below this part of an even share.
        device: where torch trains.
    """

    levels: int = 3
    codes_per_level: int | None = None
    latent_dim: int = 32
    hidden: tuple[int, ...] = (256,)
    epochs: int = 20
    min_steps: int = 400
    warmup: float = 0.2
    batch_size: int = 512
    learning_rate: float = 1e-3
    commitment: float = 0.25
    ema_decay: float = 0.95
    dead_below: float = 0.05
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Raises ConfigError for a value that cannot be trained with."""
        check_sizes(self.levels, self.codes_per_level, self.latent_dim, self.epochs)
        if not 0 <= self.warmup < 1 or self.batch_size < 1:
            raise ConfigError(
                f"rqvae: warmup {self.warmup} has to be in [0, 1), batch_size {self.batch_size} positive"
            )
        if not 0 <= self.ema_decay < 1 or self.learning_rate <= 0 or self.commitment < 0:
            raise ConfigError(
                f"rqvae: ema_decay {self.ema_decay} has to be in [0, 1), learning_rate"
                f" {self.learning_rate} positive, commitment {self.commitment} not negative"
            )


def train_codebook(
    embeddings: np.ndarray,
    settings: RqvaeSettings,
    seed: int,
    progress: Progress = silent,
) -> tuple[Codebook, TrainingCurve]:
    """Train on embeddings float [n, e], one row per item; equal rows count once.

    The same input and seed give the same codebook on one machine; torch's global random state is
    left as it was. `progress` is told epochs. A large catalogue wants a GPU (`settings.device`):
    on the CPU one thread does the steps.

    Raises:
        InputError: a row that is not finite or all zero, or fewer distinct rows than codes.
        ArtefactError: the training diverged, or the exported codebook disagrees with the model.
    """
    rows, codes_per_level = training_rows(embeddings, settings.codes_per_level)
    mean = rows.mean(axis=0, dtype=np.float64)
    # One scale for all dimensions keeps the geometry; a mean squared length of 1 puts both parts of
    # the loss on one footing whatever the encoder's scale.
    scale = float(np.sqrt(((rows - mean) ** 2).sum(axis=1).mean()))
    inputs = torch.from_numpy(((rows - mean) / scale).astype(np.float32)).to(settings.device)
    with torch.random.fork_rng(), _one_thread():
        torch.manual_seed(seed)
        model = RqVae(rows.shape[1], codes_per_level, settings).to(settings.device)
        steps = _fit(model, inputs, settings, seed, progress)
    codebook = _export(model, inputs, mean, scale)
    _check_export(model, inputs, codebook, rows)
    with torch.inference_mode():
        rebuilt = torch.cat([model.decoder(sum_z) for sum_z in _quantised_batches(model, inputs)])
        error = float(((inputs - rebuilt) ** 2).sum(dim=1).mean())
    metrics = {
        "explained": 1.0 - error,
        "cosine_fidelity": cosine_fidelity(rows, codebook, seed=seed),
    }
    return codebook, TrainingCurve(tuple(steps), metrics)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch's CPU work on one thread: its steps are too short to share out.

    On a machine with other work, threads that wait for each other made it 20 times slower.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class RqVae(nn.Module):
    """Encoder, D levels of codewords kept by moving averages, decoder."""

    def __init__(self, embedding_dim: int, codes_per_level: int, settings: RqvaeSettings) -> None:
        """Random MLPs; the codewords are zero until `start_codewords`."""
        super().__init__()
        self.settings = settings
        sizes = [embedding_dim, *settings.hidden, settings.latent_dim]
        self.encoder = _mlp(sizes)
        self.decoder = _mlp(sizes[::-1])
        levels, k = settings.levels, codes_per_level
        self.words: Tensor
        self.sizes: Tensor
        self.sums: Tensor
        self.register_buffer("words", torch.zeros(levels, k, settings.latent_dim))
        self.register_buffer("sizes", torch.zeros(levels, k))
        self.register_buffer("sums", torch.zeros(levels, k, settings.latent_dim))

    def start_codewords(self, latents: Tensor, seed: int, batch_size: int) -> None:
        """Set the codewords by residual k-means over latents [n, dim]."""
        k = self.sizes.shape[1]
        residual = latents.cpu().numpy()
        for level in range(self.settings.levels):
            words, code = kmeans(residual, k, seed + level, iterations=_INIT_ITERATIONS)
            residual = residual - words[code]
            per_batch = np.bincount(code, minlength=k) * (batch_size / len(code))
            self.words[level] = torch.from_numpy(words)
            self.sizes[level] = torch.from_numpy(per_batch)
            self.sums[level] = self.words[level] * self.sizes[level][:, None]

    def quantise(self, latent: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Codes [n, D], the sum of their codewords [n, dim] and the residual before each level."""
        codes, residuals = [], []
        residual = latent
        for words in self.words:
            code = torch.cdist(residual.detach(), words).argmin(dim=1)
            codes.append(code)
            residuals.append(residual)
            residual = residual - words[code]
        return torch.stack(codes, dim=1), latent - residual, residuals

    def commitment(self, codes: Tensor, residuals: list[Tensor]) -> Tensor:
        """Mean over the batch of sum_l ||R_l - sg Z_l||^2."""
        apart = [
            ((residual - words[code]) ** 2).sum(dim=1).mean()
            for residual, words, code in zip(residuals, self.words, codes.T, strict=True)
        ]
        return torch.stack(apart).sum()

    @torch.no_grad()
    def update_codewords(self, codes: Tensor, residuals: list[Tensor]) -> int:
        """Move the averages by one batch, restart dead codes; returns how many were restarted."""
        decay, k = self.settings.ema_decay, self.sizes.shape[1]
        even_share = len(codes) / k
        restarted = 0
        for level, residual in enumerate(residuals):
            # A product instead of a scatter: the same sums in the same order on every device.
            chosen = nn.functional.one_hot(codes[:, level], k).to(residual.dtype)
            self.sizes[level].lerp_(chosen.sum(dim=0), 1 - decay)
            self.sums[level].lerp_(chosen.T @ residual, 1 - decay)
            dead = torch.nonzero(self.sizes[level] < self.settings.dead_below * even_share)[:, 0]
            dead = dead[: len(residual)]
            if len(dead):
                error = ((residual - self.words[level][codes[:, level]]) ** 2).sum(dim=1)
                picked = torch.multinomial(error.cpu() + 1e-12, len(dead)).to(dead.device)
                self.sizes[level][dead] = even_share
                self.sums[level][dead] = residual[picked] * even_share
                restarted += len(dead)
            # Codes beyond a batch's worth of restarts may never have had an item: they stay put.
            size = self.sizes[level][:, None]
            mean = self.sums[level] / size
            self.words[level] = torch.where(size > _LEAST_SIZE, mean, self.words[level])
        return restarted


def _mlp(sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width_in, width_out in pairwise(sizes):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _fit(
    model: RqVae, inputs: Tensor, settings: RqvaeSettings, seed: int, progress: Progress
) -> list[dict[str, float]]:
    """Run all epochs; returns a row per epoch: both losses, codes unused and codes restarted."""
    batch_size = min(settings.batch_size, len(inputs))
    # The last batch is left out when short: its averages would weigh as much as a full one's.
    batches = len(inputs) // batch_size
    epochs = max(settings.epochs, math.ceil(settings.min_steps / batches))
    optimiser = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(
        optimiser, start_factor=1.0, end_factor=0.0, total_iters=epochs
    )
    first_quantised = int(settings.warmup * epochs)
    rows = []
    for epoch in range(epochs):
        quantising = epoch >= first_quantised
        if epoch == first_quantised:
            latents = _latents(model, inputs)
            _check_finite(latents, settings)
            model.start_codewords(latents, seed, batch_size)
        losses = np.zeros(2)
        restarted = 0
        used = torch.zeros_like(model.sizes, dtype=torch.bool)
        for batch in torch.randperm(len(inputs)).split(batch_size)[:batches]:
            x = inputs[batch.to(inputs.device)]
            latent = model.encoder(x)
            passed, apart = latent, latent.new_zeros(())
            if quantising:
                codes, total, residuals = model.quantise(latent)
                passed = latent + (total - latent).detach()
                apart = model.commitment(codes, residuals)
            rebuilt = ((x - model.decoder(passed)) ** 2).sum(dim=1).mean()
            loss = rebuilt + settings.commitment * apart
            _check_finite(loss, settings)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if quantising:
                restarted += model.update_codewords(codes, residuals)  # pyrefly: ignore[unbound-name]
                used.scatter_(1, codes.T, True)
            losses += (float(rebuilt.detach()) / batches, float(apart.detach()) / batches)
        schedule.step()
        rows.append(
            {
                "epoch": float(epoch),
                "reconstruction": float(losses[0]),
                "quantisation": float(losses[1]),
                "unused_codes": float((~used).sum()) if quantising else 0.0,
                "restarted_codes": float(restarted),
            }
        )
        progress(epoch + 1, epochs)
    return rows


def _check_finite(values: Tensor, settings: RqvaeSettings) -> None:
    if not torch.isfinite(values).all():
        raise ArtefactError(
            f"rqvae: the training diverged; lower learning_rate ({settings.learning_rate}) or"
            f" commitment ({settings.commitment})"
        )


@torch.no_grad()
def _latents(model: RqVae, inputs: Tensor) -> Tensor:
    return torch.cat([model.encoder(x) for x in inputs.split(4096)])


def _quantised_batches(model: RqVae, inputs: Tensor) -> list[Tensor]:
    return [model.quantise(model.encoder(x))[1] for x in inputs.split(4096)]


@torch.inference_mode()
def _export(model: RqVae, inputs: Tensor, mean: np.ndarray, scale: float) -> Codebook:
    """The trained model as numpy arrays: input standardisation folded into the first layer.

    Nothing in the loss keeps the latents' mean at zero, and a common offset would make every cosine
    between IDs large; it is taken out of the last layer and the first level alike, which leaves all
    distances, so all codes, as they are.
    """
    offset = _latents(model, inputs).mean(dim=0)
    linear = [layer for layer in model.encoder if isinstance(layer, nn.Linear)]
    layers = [(layer.weight.double().cpu().numpy(), layer.bias.double().cpu().numpy()) for layer in linear]
    first_weight, first_bias = layers[0]
    layers[0] = (first_weight / scale, first_bias - first_weight @ mean / scale)
    last_weight, last_bias = layers[-1]
    layers[-1] = (last_weight, last_bias - offset.double().cpu().numpy())
    words = model.words.clone()
    words[0] -= offset
    return Codebook(
        layers=tuple((w.astype(np.float32), b.astype(np.float32)) for w, b in layers),
        codewords=tuple(level.cpu().numpy().copy() for level in words),
    )


@torch.inference_mode()
def _check_export(
    model: RqVae, inputs: Tensor, codebook: Codebook, rows: np.ndarray, allowed: float = 0.001
) -> None:
    """Encode all items with both; `allowed` is the share that may differ: float32 breaks some ties.

    Raises:
        ArtefactError: more items differ.
    """
    sums = torch.cat(_quantised_batches(model, inputs)).cpu().numpy()
    exported = codebook.embed(codebook.encode(rows))
    apart = np.linalg.norm((sums - sums.mean(axis=0)) - (exported - exported.mean(axis=0)), axis=1)
    spread = np.sqrt(((sums - sums.mean(axis=0)) ** 2).sum(axis=1).mean())
    differing = float((apart > 0.01 * spread).mean())
    if differing > allowed:
        raise ArtefactError(
            f"rqvae: the exported codebook encodes {differing:.2%} of the items otherwise than the"
            " model it came from; train again"
        )
