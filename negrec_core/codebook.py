"""Semantic IDs from embeddings, by numpy alone: what the ranking service runs (DESIGN section 5).

A codebook is trained in `train/` and only read here: an MLP takes an item's embedding to a latent,
and level by level the nearest codeword of what is left of the latent gives one code.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from negrec_core.errors import ArtefactError, InputError, MissingError

WEIGHTS = "codebook.safetensors"
SETTINGS = "codebook.json"
_FORMAT = 1
# Distances held at a time: 4 million float64 are 32 MiB.
_CELLS = 1 << 22
# Squared distances that differ by less than this share of the squared lengths involved are a tie.
# It is far above what float64 sums lose when the order of additions changes (about 1e-15).
_TIE = 1e-10


@dataclass(frozen=True, eq=False)
class Codebook:
    """The trained quantiser.

    Attributes:
        layers: the MLP from embedding to latent, (weight float32 [out, in], bias float32 [out]) of
            each layer, ReLU between layers and none after the last; empty if the latent is the
            embedding itself.
        codewords: per level, float32 [K_l, dim].
    """

    layers: tuple[tuple[np.ndarray, np.ndarray], ...]
    codewords: tuple[np.ndarray, ...]

    def __post_init__(self) -> None:
        """Check that layers and levels fit together.

        Raises:
            ArtefactError: shapes that do not chain, or a value that is not finite.
        """
        if not self.codewords:
            raise ArtefactError("codebook: it has no level; train it again")
        width = self.embedding_dim
        for index, (weight, bias) in enumerate(self.layers):
            _check_tensor(f"layer {index}", weight, (len(bias), width))
            _check_tensor(f"bias {index}", bias, (len(bias),))
            width = len(bias)
        for level, words in enumerate(self.codewords):
            _check_tensor(f"level {level}", words, (max(len(words), 1), width))

    @property
    def levels(self) -> int:
        """D, the number of codes in an ID."""
        return len(self.codewords)

    @property
    def code_counts(self) -> tuple[int, ...]:
        """K_l of each level."""
        return tuple(len(words) for words in self.codewords)

    @property
    def dim(self) -> int:
        """Length of a codeword, of a latent and of an ID's embedding."""
        return int(self.codewords[0].shape[1])

    @property
    def embedding_dim(self) -> int:
        """Length of the embeddings that `encode` takes."""
        return int(self.layers[0][0].shape[1]) if self.layers else self.dim

    def encode(self, embeddings: np.ndarray) -> np.ndarray:
        """Codes int32 [n, D] of embeddings [n, e]: per level the nearest codeword of the residual.

        The sums are float64 and codewords as near as the last bits can tell are a tie, which the
        lowest index wins. So an ID depends on its own embedding only, not on which rows share a
        call, on the number of threads, or on the BLAS library.

        Raises:
            InputError: embeddings of another length, or a row that is not finite or all zero.
        """
        check_embeddings(embeddings, self.embedding_dim)
        codes = np.empty((len(embeddings), self.levels), np.int32)
        step = max(1, _CELLS // max(self.code_counts))
        for start in range(0, len(embeddings), step):
            rows = slice(start, start + step)
            residual = self.project(embeddings[rows])
            for level, (words, squares) in enumerate(self._words):
                code = _nearest(residual, words, squares)
                codes[rows, level] = code
                residual -= words[code]
        return codes

    def project(self, embeddings: np.ndarray) -> np.ndarray:
        """Latents float64 [n, dim] of embeddings [n, e]."""
        latent = np.array(embeddings, np.float64)
        for index, (weight, bias) in enumerate(self.layers):
            if index:
                np.maximum(latent, 0.0, out=latent)
            latent = latent @ weight.astype(np.float64).T + bias
        return latent

    def embed(self, codes: np.ndarray) -> np.ndarray:
        """Embeddings float32 [n, dim] of IDs [n, D]: the sum of their codewords.

        Raises:
            InputError: rows of another length, or a code that its level does not have.
        """
        check_codes(codes, self.code_counts)
        return self._sum(codes)

    def unit(self, codes: np.ndarray, *, checked: bool = False) -> np.ndarray:
        """`embed` scaled to unit length, so that a product is a cosine; a zero sum stays zero.

        Args:
            codes: [n, D], as for `embed`.
            checked: they are known to be codes of this codebook, and are not looked at again.

        Raises:
            InputError: as `embed`, unless `checked`.
        """
        total = self._sum(codes) if checked else self.embed(codes)
        norm = np.sqrt(np.einsum("nd,nd->n", total, total))
        norm[norm == 0] = 1.0
        total /= norm[:, None]
        return total

    def _sum(self, codes: np.ndarray) -> np.ndarray:
        total = self.codewords[0].take(codes[:, 0], axis=0)
        for level, words in enumerate(self.codewords[1:], 1):
            total += words.take(codes[:, level], axis=0)
        return total

    def save(self, path: Path) -> None:
        """Write `codebook.safetensors` and `codebook.json` into the directory `path`."""
        tensors = {
            f"codewords.{level}": np.ascontiguousarray(words, np.float32)
            for level, words in enumerate(self.codewords)
        }
        for index, (weight, bias) in enumerate(self.layers):
            tensors[f"layers.{index}.weight"] = np.ascontiguousarray(weight, np.float32)
            tensors[f"layers.{index}.bias"] = np.ascontiguousarray(bias, np.float32)
        save_file(tensors, path / WEIGHTS)
        text = json.dumps(self._settings(), indent=1, sort_keys=True)
        (path / SETTINGS).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Codebook":
        """Read what `save` wrote; the same embeddings then get the same IDs.

        Raises:
            MissingError: a file is not there.
            ArtefactError: a file cannot be read, or the two do not belong together.
        """
        try:
            settings = json.loads((path / SETTINGS).read_text(encoding="utf-8"))
            tensors = load_file(path / WEIGHTS)
            codebook = cls(
                layers=tuple(
                    (tensors.pop(f"layers.{i}.weight"), tensors.pop(f"layers.{i}.bias"))
                    for i in range(int(settings["layers"]))
                ),
                codewords=tuple(
                    tensors.pop(f"codewords.{level}") for level in range(len(settings["codes_per_level"]))
                ),
            )
        except FileNotFoundError as error:
            raise MissingError(
                f"codebook: {error.filename or WEIGHTS} is not there; restore it or train again"
            ) from None
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ArtefactError(
                f"codebook {path}: cannot be read ({type(error).__name__}: {error}); restore it or"
                " train again"
            ) from None
        if tensors or codebook._settings() != settings:
            raise ArtefactError(
                f"codebook {path}: {SETTINGS} does not describe the tensors of {WEIGHTS}; restore"
                " both or train again"
            )
        return codebook

    def _settings(self) -> dict[str, int | list[int]]:
        return {
            "format": _FORMAT,
            "embedding_dim": self.embedding_dim,
            "layers": len(self.layers),
            "dim": self.dim,
            "codes_per_level": list(self.code_counts),
        }

    @cached_property
    def _words(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per level the codewords in float64 and their squared lengths."""
        words64 = [words.astype(np.float64) for words in self.codewords]
        return [(words, np.einsum("kd,kd->k", words, words)) for words in words64]


def encode_unique(codebook: Codebook, embeddings: np.ndarray, taken: np.ndarray | None = None) -> np.ndarray:
    """Codes int32 [n, D] as `Codebook.encode`, but an ID that is taken is left to its first item.

    A later item moves to the nearest free code of the last level, so that it keeps its first D - 1
    codes; where all of these are taken it shares its own ID after all. Rows are served in order, so
    encoding a catalogue at once or in pieces, each with the IDs before it as `taken` (integers
    [m, D]), gives the same, and nothing published ever moves.

    Raises:
        InputError: as `Codebook.encode`, or `taken` codes outside their level.
    """
    codes = codebook.encode(embeddings)
    used: set[tuple[int, ...]] = set()
    if taken is not None:
        check_codes(taken, codebook.code_counts)
        used.update(map(tuple, taken.tolist()))
    words = codebook.codewords[-1].astype(np.float64)
    for row, wanted in enumerate(map(tuple, codes.tolist())):
        chosen = wanted
        if wanted in used:
            latent = codebook.project(embeddings[row : row + 1])[0]
            for level, code in enumerate(wanted[:-1]):
                latent -= codebook.codewords[level][code]
            distance = ((words - latent) ** 2).sum(axis=1)
            # Rounded, so that ties go to the lowest index whatever the last bits are.
            order = np.argsort(np.round(distance / distance.max(), 9), kind="stable").tolist()
            ids = ((*wanted[:-1], code) for code in order)
            chosen = next((candidate for candidate in ids if candidate not in used), wanted)
            codes[row] = chosen
        used.add(chosen)
    return codes


def auto_codes_per_level(n_items: int) -> int:
    """Codes per level (a power of two, 8 to 8192) for a catalogue of `n_items` distinct texts.

    Two demands, the larger wins. A code of the first level should stand for about 64 items: k-means
    wants some 40 points per centroid, and a language model some examples per token. And the IDs,
    K^3 at three levels, should outnumber the items 128 times, because real catalogues crowd into a
    small part of the cube: at 215 times 4 % of 9,742 MovieLens titles shared an ID, at 27 times
    17 %. The second decides below some 11,000 items. So 1,200 items get 64 codes, 10,000 get 128,
    30,000 get 512 and a million the 8192 of production.
    """
    wanted = max(n_items / 64, (128 * n_items) ** (1 / 3), 8.0)
    return int(min(8192, 2 ** round(np.log2(wanted))))


def check_embeddings(embeddings: np.ndarray, dim: int | None = None) -> None:
    """Refuse an array that is not float [n, dim], or a row that is not finite or all zero.

    Raises:
        InputError: naming the first offending row.
    """
    shape = "x".join(map(str, np.shape(embeddings)))
    if embeddings.ndim != 2 or (dim is not None and embeddings.shape[1] != dim):
        raise InputError(
            f"embeddings: shape {shape}, expected n rows of {dim or 'one length'}; encode the items"
            " with the encoder that the codebook was trained on"
        )
    if not np.issubdtype(embeddings.dtype, np.floating):
        raise InputError(f"embeddings: type {embeddings.dtype}, expected a float type")
    for bad, what in (
        (~np.isfinite(embeddings).all(axis=1), "not finite"),
        (~embeddings.any(axis=1), "all zero"),
    ):
        if bad.any():
            raise InputError(
                f"embeddings: row {bad.argmax()} is {what} ({bad.sum()} such rows); encode these items again"
            )


def check_codes(codes: np.ndarray, code_counts: tuple[int, ...]) -> None:
    """Refuse codes that are not integers [n, D] with 0 <= codes[:, l] < K_l.

    Raises:
        InputError: naming the first offending row.
    """
    if codes.ndim != 2 or codes.shape[1] != len(code_counts):
        shape = "x".join(map(str, codes.shape))
        raise InputError(f"codes: shape {shape}, expected n rows of {len(code_counts)} codes")
    if not np.issubdtype(codes.dtype, np.integer):
        raise InputError(f"codes: type {codes.dtype}, expected an integer type")
    illegal = ((codes < 0) | (codes >= np.asarray(code_counts))).any(axis=1)
    if illegal.any():
        row = int(illegal.argmax())
        raise InputError(
            f"codes: row {row} is {codes[row].tolist()}, outside {list(code_counts)} codes per"
            " level; it was made by another codebook"
        )


def _nearest(residual: np.ndarray, words: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Index [n] of the nearest codeword of each residual [n, dim]; among ties the lowest."""
    lengths = np.einsum("nd,nd->n", residual, residual)
    distance = squares - 2.0 * (residual @ words.T)
    tolerance = _TIE * (lengths + squares.max())
    return (distance <= (distance.min(axis=1) + tolerance)[:, None]).argmax(axis=1)


def _check_tensor(name: str, tensor: np.ndarray, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape or tensor.dtype != np.float32 or not np.isfinite(tensor).all():
        raise ArtefactError(
            f"codebook: {name} is {tensor.dtype} {list(tensor.shape)}, expected finite float32"
            f" {list(shape)}; train it again"
        )
