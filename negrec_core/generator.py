"""The trained generator as an artefact: a Hugging Face directory, its prompt and its codebook."""

from dataclasses import dataclass
from pathlib import Path

from negrec_core.artefacts import Manifest, list_versions, open_version
from negrec_core.codebook import Codebook
from negrec_core.errors import ArtefactError, MissingError
from negrec_core.prompts import PromptWriter
from negrec_core.storage import Place

CODEBOOK = "codebook"
GENERATOR = "generator"


@dataclass(frozen=True)
class Generator:
    """A generator and the codebook it was trained on, both verified.

    Attributes:
        path: Hugging Face model directory.
        manifest: of the generator.
        prompt: writes its prompts.
        codebook: quantiser of its semantic IDs.
        codebook_manifest: of the codebook.
    """

    path: Path
    manifest: Manifest
    prompt: PromptWriter
    codebook: Codebook
    codebook_manifest: Manifest


def open_codebook(models: Place, version: str) -> tuple[Codebook, Manifest]:
    """Load one complete codebook."""
    path, manifest = open_version(models, CODEBOOK, version)
    return Codebook.load(path), manifest


def newest(models: Place, name: str, ds: str) -> Manifest:
    """The complete version of a model that has seen most, but nothing after the log date `ds`.

    Among versions trained up to the same day it is the newest. A model trained anew for an earlier
    day, to look back, so never takes the place of the one in use.

    Raises:
        MissingError: there is none; the message says how to train one.
    """
    usable = [m for m in list_versions(models, name) if m.parameters["until"] <= ds]
    if not usable:
        raise MissingError(
            f"model {name}: none in {models} was trained on data up to ds={ds} or before; run"
            f" `negrec train {name} --until {ds}`"
        )
    return max(usable, key=lambda m: (m.parameters["until"], m.version))


def open_generator(models: Place, ds: str) -> Generator:
    """Newest generator usable on `ds`, with its codebook.

    Raises:
        MissingError: no such generator, or its codebook is gone.
        ArtefactError: the codebook's digest is not the one the generator was trained on.
    """
    chosen = newest(models, GENERATOR, ds)
    path, manifest = open_version(models, GENERATOR, chosen.version)
    codebook, codebook_manifest = open_codebook(models, manifest.parameters["codebook_version"])
    if codebook_manifest.digest != manifest.parameters["codebook_digest"]:
        raise ArtefactError(
            f"generator {manifest.version} was trained on codebook"
            f" {manifest.parameters['codebook_version']} with digest"
            f" {manifest.parameters['codebook_digest'][:12]}, but that directory has"
            f" {codebook_manifest.digest[:12]}; train the generator again"
        )
    prompt = PromptWriter.load(path)
    if prompt.vocabulary.code_counts != codebook.code_counts:
        raise ArtefactError(
            f"generator {manifest.version} writes IDs of {prompt.vocabulary.code_counts} codes, its"
            f" codebook has {codebook.code_counts}; train the generator again"
        )
    return Generator(path, manifest, prompt, codebook, codebook_manifest)
