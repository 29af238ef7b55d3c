"""Language models to start from: the presets of conf/models, with semantic-ID tokens added."""

import importlib.util
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from negrec_core.beam import SidVocabulary
from negrec_core.codebook import Codebook
from negrec_core.config import read_yaml, validation_line
from negrec_core.errors import ConfigError, MissingError
from negrec_core.prompts import PromptWriter, sid_token
from negrec_core.resources import resource

# vLLM and tensor cores want a vocabulary that divides evenly.
_VOCABULARY_MULTIPLE = 64
# Words of titles that a model from scratch knows.
_TITLE_WORDS = 5000
# Standard deviation of a new model's code tokens: above its other weights (0.02), so that what the
# codewords say is heard from the first step.
_SCRATCH_SPREAD = 0.06


class _Preset(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ScratchPreset(_Preset):
    """A Qwen3 architecture with random weights and a vocabulary of semantic IDs and prompt words."""

    kind: Literal["scratch"]
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int


class PretrainedPreset(_Preset):
    """A Hugging Face model with safetensors weights, by name or directory."""

    kind: Literal["pretrained"]
    name: str
    dtype: Literal["float32", "bfloat16"] = "float32"


class GgufPackagePreset(_Preset):
    """A GGUF file inside an installed Python package, dequantised to float32."""

    kind: Literal["gguf_package"]
    package: str
    file: str


Preset = Annotated[ScratchPreset | PretrainedPreset | GgufPackagePreset, Field(discriminator="kind")]


class PromptText(_Preset):
    """The literal parts of a prompt; see conf/prompts."""

    head: str
    liked: str
    disliked: str
    one_of: str
    title_of: str
    item_called: str
    answer: str


def load_preset(name: str) -> ScratchPreset | PretrainedPreset | GgufPackagePreset:
    """Read conf/models/<name>.yaml."""
    try:
        path = resource("conf", "models", f"{name}.yaml")
    except MissingError as error:
        raise ConfigError(f"generator.preset: {error}") from None
    try:
        return TypeAdapter(Preset).validate_python(read_yaml(path))
    except ValidationError as error:
        raise ConfigError(validation_line(error, str(path), {})) from None


def load_prompt_text(name: str) -> PromptText:
    """Read conf/prompts/<name>.yaml."""
    path = resource("conf", "prompts", f"{name}.yaml")
    try:
        return PromptText.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ConfigError(validation_line(error, str(path), {})) from None


def build_model(
    preset_name: str,
    text: PromptText,
    codebook: Codebook,
    max_tokens: int,
    seed: int,
    titles: Sequence[str] = (),
    likes: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, PromptWriter]:
    """A model that knows the semantic-ID tokens, its tokenizer and its prompt writer.

    Args:
        preset_name: a file in conf/models.
        text: literal parts of the prompt.
        codebook: whose codes become tokens; similar codewords start as similar tokens.
        max_tokens: longest prompt.
        seed: of new weights.
        titles: what the model is to read and write besides prompts; a model that starts from scratch
            gets tokens for their commonest words.
        likes: whether prompts tell of likes.
    """
    preset = load_preset(preset_name)
    torch.manual_seed(seed)
    code_counts = codebook.code_counts
    tokens = [sid_token(level, code) for level, n in enumerate(code_counts) for code in range(n)]
    if isinstance(preset, ScratchPreset):
        tokenizer: PreTrainedTokenizerBase = _word_tokenizer(text, tokens, titles)
        model = _scratch_model(preset, tokenizer, max_tokens + len(code_counts))
        mean, spread = torch.zeros(preset.hidden_size), torch.tensor(_SCRATCH_SPREAD)
    else:
        model, tokenizer = _open_pretrained(preset)
        tokenizer.add_tokens(tokens, special_tokens=False)
        old = _token_tables(model)[0][: len(tokenizer) - len(tokens)]
        mean, spread = old.mean(0), old.std(0)
        model.resize_token_embeddings(_round_up(len(tokenizer)), mean_resizing=False)
    prompt = _prompt_writer(tokenizer, text, code_counts, max_tokens, likes)
    _place_codes(model, prompt.vocabulary, codebook, mean, spread)
    # Sampling defaults that come with a model must not reach a beam search.
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model, tokenizer, prompt


def _word_tokenizer(
    text: PromptText, sid_tokens: list[str], titles: Sequence[str]
) -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3}
    counts = Counter(word for title in titles for word in title.split())
    common = [word for word, n in counts.most_common(_TITLE_WORDS) if n > 1]
    for word in [*" ".join(text.model_dump().values()).split(), *common]:
        vocabulary.setdefault(word, len(vocabulary))
    for token in sid_tokens:
        vocabulary[token] = len(vocabulary)
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",  # noqa: S106
        bos_token="<bos>",  # noqa: S106
        eos_token="<eos>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
    )


def _scratch_model(
    preset: ScratchPreset, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> PreTrainedModel:
    config = Qwen3Config(
        vocab_size=_round_up(len(tokenizer)),
        hidden_size=preset.hidden_size,
        intermediate_size=preset.intermediate_size,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.kv_heads,
        head_dim=preset.head_dim,
        max_position_embeddings=max(2048, max_tokens),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def _open_pretrained(
    preset: PretrainedPreset | GgufPackagePreset,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if isinstance(preset, PretrainedPreset):
        try:
            model = AutoModelForCausalLM.from_pretrained(
                preset.name,
                dtype=getattr(torch, preset.dtype),
                use_safetensors=True,
                trust_remote_code=False,
            )
            tokenizer = AutoTokenizer.from_pretrained(preset.name, trust_remote_code=False)
        except OSError as error:
            raise MissingError(
                f"model {preset.name}: cannot be opened ({str(error).splitlines()[0]})"
            ) from None
        return model, tokenizer  # pyrefly: ignore[bad-return]
    spec = importlib.util.find_spec(preset.package)
    if spec is None or spec.origin is None:
        raise MissingError(
            f"model file {preset.file}: Python package {preset.package} is not installed; install"
            " negrec's train extra"
        )
    folder = Path(spec.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=preset.file)
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=preset.file, dtype=torch.float32)
    # The loaded object still believes itself quantised and refuses to be saved: rebuild it plain.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    return plain, tokenizer  # pyrefly: ignore[bad-return]


@torch.no_grad()
def _place_codes(
    model: PreTrainedModel,
    vocabulary: SidVocabulary,
    codebook: Codebook,
    mean: torch.Tensor,
    spread: torch.Tensor,
) -> None:
    """Start the code tokens from the codewords, so that what is learnt of a code holds for its like.

    Each level's centred codewords go through one random projection to the model's width, scaled to
    `spread` around `mean`; a tenth of noise keeps equal codewords apart.
    """
    for first, words in zip(vocabulary.first_token, codebook.codewords, strict=True):
        centred = torch.from_numpy(words - words.mean(0))
        rows = centred @ torch.randn(words.shape[1], len(mean))
        rows = rows / rows.std().clamp_min(1e-12) + 0.1 * torch.randn(rows.shape)
        # Tied tables are one and the same.
        for table in {id(t): t for t in _token_tables(model)}.values():
            table[first : first + len(words)] = (mean + spread * rows).to(table.dtype)


def _token_tables(model: PreTrainedModel) -> list[Any]:
    tables = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    return tables if head is None else [*tables, head.weight]


def _prompt_writer(
    tokenizer: PreTrainedTokenizerBase,
    text: PromptText,
    code_counts: tuple[int, ...],
    max_tokens: int,
    likes: bool,
) -> PromptWriter:
    def ids(part: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(part, add_special_tokens=False))

    vocabulary = tokenizer.get_vocab()
    first = tuple(vocabulary[sid_token(level, 0)] for level in range(len(code_counts)))
    start = tokenizer.bos_token_id
    head = ids(text.head)
    if start is not None and (not head or head[0] != start):
        head = (start, *head)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    longest = len(head) + 2 * len(ids(text.disliked)) + len(code_counts)
    if max_tokens < longest:
        raise ConfigError(
            f"generator.prompt_tokens: {max_tokens} is too short for one event, it needs {longest}"
        )
    if not isinstance(pad, int):
        raise ConfigError("generator.preset: its tokenizer has neither a padding nor an end token")
    return PromptWriter(
        SidVocabulary(first, code_counts),
        head,
        ids(text.liked),
        ids(text.disliked),
        ids(text.one_of),
        pad,
        max_tokens,
        likes,
    )


def _round_up(n: int) -> int:
    return -(-n // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
