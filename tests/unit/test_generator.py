import json

import pytest
from warehouses import save_codebook, small_codebook

from negrec_core.artefacts import MANIFEST, new_version, seal
from negrec_core.beam import SidVocabulary
from negrec_core.errors import ArtefactError, MissingError
from negrec_core.generator import (
    CODEBOOK,
    GENERATOR,
    newest,
    open_codebook,
    open_generator,
)
from negrec_core.prompts import PromptWriter

DS = "2026-03-10"


def save_generator(root, codebook_manifest, code_counts=(4, 4, 4), until=DS, **parameters):
    path = new_version(root / "models", GENERATOR)
    first = tuple(10 + sum(code_counts[:level]) for level in range(len(code_counts)))
    PromptWriter(SidVocabulary(first, code_counts), (1,), (2,), (3,), (4,), 0, 32).save(path)
    (path / "model.safetensors").write_bytes(b"weights")
    return seal(
        path,
        parameters={
            "until": until,
            "codebook_version": codebook_manifest.version,
            "codebook_digest": codebook_manifest.digest,
            **parameters,
        },
        metrics={},
        inputs={},
    )


def test_a_generator_opens_with_its_codebook(tmp_path):
    codebook = small_codebook()
    other = save_codebook(tmp_path, small_codebook(seed=1))
    manifest = save_codebook(tmp_path, codebook)
    save_codebook(tmp_path, small_codebook(seed=2))
    saved = save_generator(tmp_path, manifest)
    generator = open_generator(tmp_path / "models", DS)
    assert generator.manifest == saved
    assert generator.codebook_manifest == manifest != other
    assert generator.path == tmp_path / "models" / GENERATOR / saved.version
    assert generator.prompt.vocabulary.code_counts == generator.codebook.code_counts
    assert (generator.codebook.codewords[0] == codebook.codewords[0]).all()


def test_another_codebook_under_the_same_version_is_refused(tmp_path):
    manifest = save_codebook(tmp_path, small_codebook())
    save_generator(tmp_path, manifest)
    other = save_codebook(tmp_path, small_codebook(seed=1))
    folder = tmp_path / "models" / CODEBOOK
    (folder / manifest.version).rename(folder / "away")
    (folder / other.version).rename(folder / manifest.version)
    message = f"codebook {manifest.version} with digest {manifest.digest[:12]}, .* {other.digest[:12]}"
    with pytest.raises(ArtefactError, match=message):
        open_generator(tmp_path / "models", DS)
    # Nor does it help to write the expected digest into its manifest.
    path = folder / manifest.version / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "digest": manifest.digest}))
    with pytest.raises(ArtefactError, match=r"manifest\.json was altered"):
        open_generator(tmp_path / "models", DS)


def test_a_generator_of_other_code_counts_is_refused(tmp_path):
    manifest = save_codebook(tmp_path, small_codebook())
    save_generator(tmp_path, manifest, code_counts=(4, 4, 8))
    with pytest.raises(ArtefactError, match=r"\(4, 4, 8\) codes, its codebook has \(4, 4, 4\)"):
        open_generator(tmp_path / "models", DS)


def test_a_codebook_that_is_gone_or_damaged_is_refused(tmp_path):
    manifest = save_codebook(tmp_path, small_codebook())
    save_generator(tmp_path, manifest)
    folder = tmp_path / "models" / CODEBOOK / manifest.version
    weights = folder / "codebook.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"\1")
    with pytest.raises(ArtefactError, match=r"codebook\.safetensors differs from its manifest"):
        open_generator(tmp_path / "models", DS)
    weights.write_bytes(content)
    assert open_codebook(tmp_path / "models", manifest.version)[1] == manifest
    folder.rename(folder.with_name("away"))
    with pytest.raises(MissingError, match=f"codebook/{manifest.version}: no manifest"):
        open_generator(tmp_path / "models", DS)


def test_nothing_that_has_seen_later_days_is_used(tmp_path):
    models = tmp_path / "models"
    with pytest.raises(MissingError, match=f"model codebook: none .* `negrec train codebook --until {DS}`"):
        newest(models, CODEBOOK, DS)
    days = ["2026-03-08", "2026-03-12", "2026-03-10"]
    made = {day: save_codebook(tmp_path, small_codebook(), until=day) for day in days}
    for ds, until in [
        ("2026-03-08", "2026-03-08"),
        ("2026-03-09", "2026-03-08"),
        ("2026-03-10", "2026-03-10"),
        ("2026-03-11", "2026-03-10"),
        # The one made last has seen less.
        ("2026-03-12", "2026-03-12"),
        ("2026-04-01", "2026-03-12"),
    ]:
        assert newest(models, CODEBOOK, ds) == made[until]
    with pytest.raises(MissingError, match="up to ds=2026-03-07 or before"):
        newest(models, CODEBOOK, "2026-03-07")


def test_of_versions_with_the_same_past_the_newest_is_used(tmp_path):
    made = [save_codebook(tmp_path, small_codebook(seed=n)) for n in range(4)]
    assert newest(tmp_path / "models", CODEBOOK, DS).version == max(m.version for m in made)


def test_models_in_the_making_do_not_count(tmp_path):
    manifest = save_codebook(tmp_path, small_codebook())
    new_version(tmp_path / "models", CODEBOOK)
    assert newest(tmp_path / "models", CODEBOOK, DS) == manifest
