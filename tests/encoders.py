"""Tiny text and vision models with random weights, stored as encoders are."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, ViTConfig, ViTModel
from transformers.models.vit import ViTImageProcessorPil

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "blue", "fast", "slow", "car", "boat"]


def save_tokenizer(directory: Path, *, special: bool = True) -> None:
    """A tokenizer of whole words; without special tokens an empty text has none."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", eos_token="[SEP]"
    ).save_pretrained(directory)


def tiny_bert() -> BertModel:
    """A text model, the same at every call."""
    torch.manual_seed(0)
    return BertModel(
        BertConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=12,
        )
    ).eval()


SIDE = 16
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 8,
}


def save_vision_model(directory: Path, model: Any) -> Path:
    """Store a model with an image processor that scales to 16 x 16 pixels."""
    model.save_pretrained(directory)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(directory)
    return directory


def tiny_vit() -> ViTModel:
    """A vision model, the same at every call."""
    torch.manual_seed(0)
    return ViTModel(ViTConfig(**VISION)).eval()


def picture(seed: int, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    """A picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)
