"""`negrec train codebook`: embed the catalogue and train the quantiser (DESIGN section 5)."""

import json
from dataclasses import asdict
from pathlib import Path

from negrec_core.artefacts import Manifest, new_version, publish, seal
from negrec_core.config import Config
from negrec_core.delta import DeltaStore
from negrec_core.errors import InputError
from negrec_core.generator import CODEBOOK
from negrec_core.item_encoder import ItemEncoder
from negrec_core.items import load_items
from negrec_core.progress import Progress
from negrec_core.sid_health import HealthLimits, check, sid_health
from negrec_core.storage import Place
from train import residual_kmeans, rqvae


def train_codebook(
    store: DeltaStore,
    models: Place,
    media: Path,
    config: Config,
    until: str,
    *,
    seed: int,
    progress: Progress,
) -> Manifest:
    """Train a codebook on the items known on the log date `until` and store it.

    Args:
        store: the Delta tables.
        models: directory of the model versions.
        media: folder that a relative `media_uri` starts from.
        config: section `codebook` says what to train.
        until: log date; later items are not looked at.
        seed: of the training.
        progress: told (items embedded or epochs done, all).

    Raises:
        InputError: too few items, or an image encoder and no image.
        GateError: the trained codebook's health is outside the configured limits.
    """
    settings = config.codebook
    version = store.version("item")
    items = load_items(store, until, version)
    if not items.num_rows:
        raise InputError(f"table item: no item on or before ds={until}; import a catalogue first")
    encoder = ItemEncoder(models, settings.encoder, settings.image_encoder, settings.image_weight, media)
    embeddings = encoder.fit_encode(items.to_pylist(), progress)
    if settings.trainer == "rqvae":
        codebook, curve = rqvae.train_codebook(
            embeddings,
            rqvae.RqvaeSettings(
                levels=settings.levels,
                codes_per_level=settings.codes_per_level,
                latent_dim=settings.latent_dim,
                epochs=settings.epochs,
            ),
            seed,
            progress,
        )
    else:
        codebook, curve = residual_kmeans.train_codebook(
            embeddings,
            residual_kmeans.ResidualKmeansSettings(
                levels=settings.levels,
                codes_per_level=settings.codes_per_level,
                latent_dim=settings.latent_dim,
            ),
            seed,
            progress,
        )
    health = sid_health(codebook.encode(embeddings), codebook.code_counts)
    check(
        health,
        HealthLimits(
            max_collision_rate=settings.max_collision_rate,
            max_dead_share=settings.max_dead_share,
        ),
    )
    path = new_version(models, CODEBOOK)
    codebook.save(path)
    encoder.save(path)
    (path / "curve.json").write_text(json.dumps(curve.steps, indent=1), encoding="utf-8")
    manifest = seal(
        path,
        parameters={
            "until": until,
            "seed": seed,
            **settings.model_dump(),
            "code_counts": codebook.code_counts,
        },
        metrics={"items": items.num_rows, **asdict(health), **curve.metrics},
        inputs={"item": version},
    )
    publish(models, path)
    return manifest
