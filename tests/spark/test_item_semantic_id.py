"""The stage embeds items as its codebook's training did."""

from pathlib import Path

import numpy as np
import pytest
from encoders import save_tokenizer, save_vision_model, tiny_bert, tiny_vit
from PIL import Image
from pyspark.sql import SparkSession

from jobs.item_semantic_id import item_semantic_id
from negrec_core.artefacts import new_version, seal
from negrec_core.codebook import Codebook, encode_unique
from negrec_core.generator import CODEBOOK
from negrec_core.item_encoder import ItemEncoder


@pytest.mark.parametrize("unique", [False, True])
def test_items_get_the_ids_of_their_text_and_image(spark: SparkSession, tmp_path: Path, unique: bool) -> None:
    tiny_bert().save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert")
    save_vision_model(tmp_path / "vit", tiny_vit())
    (tmp_path / "media").mkdir()
    rows = []
    for n in range(12):
        uri = f"{n}.png" if n % 3 else None
        rows.append({"item_id": f"{n:02}", "title": "red car", "media_uri": uri})
        if uri:
            pixels = np.random.default_rng(n).integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "media" / uri)
    names = {"encoder": str(tmp_path / "bert"), "image_encoder": str(tmp_path / "vit"), "image_weight": 0.9}
    encoder = ItemEncoder(tmp_path / "elsewhere", *names.values(), tmp_path / "media")
    embeddings = encoder.fit_encode(rows)
    codebook = Codebook((), (embeddings[[0, 1, 4, 8]], 0.1 * embeddings[[2, 5, 7]]))
    path = new_version(tmp_path, CODEBOOK)
    codebook.save(path)
    encoder.save(path)
    version = seal(path, parameters=names, metrics={}, inputs={}).version
    taken = np.empty((0, 2), np.int32) if unique else None
    expected = encode_unique(codebook, embeddings, taken) if unique else codebook.encode(embeddings)
    # Equal titles: the images alone tell the items apart.
    assert len(np.unique(expected, axis=0)) > 2

    items = spark.createDataFrame(rows, "item_id string, title string, media_uri string")
    found = item_semantic_id(items, tmp_path, tmp_path / "media", version, taken).toPandas()

    codes = dict(zip(found["item_id"], map(tuple, found["codes"]), strict=True))
    assert codes == {row["item_id"]: tuple(ids) for row, ids in zip(rows, expected.tolist(), strict=True)}
