"""Constrained beam search on any Hugging Face causal language model, without generation loops.

The prompt of a user is computed once. Its beams are then decoded as parallel tokens of that same
sequence: a 4-D attention mask lets each beam see the prompt and its own earlier tokens only, so the
prompt's keys and values are never copied per beam. The output layer is cut to the tokens of the
level at hand, and scores are gathered for legal codes only.
"""

import copy
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from negrec_core.beam import (
    BeamResult,
    Prompts,
    SidVocabulary,
    batches,
    best_first,
    check_logits,
    check_search,
    check_vocabulary,
)
from negrec_core.errors import ConfigError
from negrec_core.lean_import import without
from negrec_core.memory import keep_freed_memory
from negrec_core.trie import Trie

# transformers takes it where it is, for assisted decoding; an executor's process would start a third later.
with without("sklearn"):
    from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

# Threads that compute a batch each; Python's lock lets no more of them work at once.
_MOST_THREADS = 8
_FEWEST_TOKENS = 512  # of a batch, as long as there are more: smaller ones take longer per token
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TorchOptions:
    """How to load and run the model.

    Attributes:
        dtype: `float32` or `bfloat16`.
        device: `auto` (a GPU if there is one), or a torch device such as `cpu` or `cuda:0`.
        max_batch_tokens: prompt and beam tokens, with padding, that are computed at once; None: as many as
            suit the device.
    """

    dtype: str = "float32"
    device: str = "auto"
    max_batch_tokens: int | None = None


def load(path: Path, vocabulary: SidVocabulary, options: TorchOptions) -> "TorchBeamEngine":
    """Load a local model directory; see `negrec_core.beam.open_engine`."""
    if options.dtype not in _DTYPES:
        raise ConfigError(f"dtype {options.dtype!r}: choose one of {', '.join(_DTYPES)}")
    gpu = torch.cuda.is_available()
    try:
        device = torch.device(("cuda" if gpu else "cpu") if options.device == "auto" else options.device)
    except RuntimeError:
        raise ConfigError(f"device {options.device!r}: give auto, cpu, cuda or cuda:<n>") from None
    if device.type == "cuda" and not gpu:
        raise ConfigError(f"device {options.device!r}: no CUDA GPU here; give auto or cpu")
    model = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=_DTYPES[options.dtype],
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    model.to(device)
    return TorchBeamEngine(model, vocabulary, max_batch_tokens=options.max_batch_tokens)


class TorchBeamEngine:
    """Beam engine over a model in memory, for example the one that is being trained.

    The weights are read at each search, so the engine follows a model whose weights change.
    Adapters must be part of the model (`peft_model.get_base_model()`) or merged.
    """

    def __init__(
        self, model: PreTrainedModel, vocabulary: SidVocabulary, *, max_batch_tokens: int | None = None
    ) -> None:
        """Check that the model can be decoded this way.

        Raises:
            ConfigError: not a plain attention model with a linear output layer, or its attention
                implementation takes no 4-D mask.
            ArtefactError: the vocabulary lacks semantic-ID tokens.
        """
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ConfigError(
                f"{type(model).__name__}: the output layer is {type(head).__name__}, not linear;"
                " merge adapters first or use the vllm engine"
            )
        check_vocabulary(vocabulary, head.out_features)
        keep_freed_memory()
        self._model = model
        self._vocabulary = vocabulary
        self._vocab_size = head.out_features
        self._max_batch_tokens = max_batch_tokens
        self._longest_prompt = _longest_prompt(model.config, vocabulary.depth)
        self._device_trie: _DeviceTrie | None = None

    @property
    def block_size(self) -> int:
        """1: a prompt is computed once, whatever its length."""
        return 1

    def search(self, prompts: Prompts, trie: Trie, beam_width: int) -> BeamResult:
        """See `negrec_core.beam.BeamEngine.search`."""
        return best_first(trie, *self._decode(prompts, trie, beam_width, lambda: _best))

    def sample(
        self, prompts: Prompts, trie: Trie, n: int, generator: torch.Generator, *, distinct: bool
    ) -> BeamResult:
        """Draw `n` legal IDs for each prompt, with the probabilities that `search` ranks by.

        Args:
            prompts: as in `search`.
            trie: the legal IDs.
            n: IDs per prompt.
            generator: source of chance, on the CPU; what is drawn also depends on how prompts are split into
                batches, and so on the number of threads.
            distinct: without replacement, by Gumbel top-k along the trie (stochastic beam search, Kool
                et al. 2019): each ID at most once, fewer than `n` where fewer are legal; else
                independent draws.

        Raises:
            InputError, ConfigError, ArtefactError: as `search`.
        """
        draws = _DistinctDraws if distinct else _Draws
        return best_first(trie, *self._decode(prompts, trie, n, lambda: draws(_split(generator))))

    def _decode(
        self, prompts: Prompts, trie: Trie, beam_width: int, selection: Callable[[], "_Select"]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Leaves and log-probabilities `[users, beam_width]`; -1 and -inf where there is no beam."""
        check_search(prompts, trie, beam_width, self._vocabulary, self._vocab_size, self._longest_prompt)
        leaves = np.full((len(prompts), beam_width), -1, np.int64)
        log_probs = np.full((len(prompts), beam_width), -np.inf, np.float32)
        tree_tokens = beam_width * (trie.depth - 1)
        lengths = [len(prompt) + tree_tokens for prompt in prompts]
        self._on_device(trie)
        with self._levels() as levels:

            def decode(users: npt.NDArray[np.intp], select: _Select) -> None:
                found, scores = self._decode_batch(
                    levels, [prompts[user] for user in users], trie, beam_width, select
                )
                leaves[users, : found.shape[1]] = found
                log_probs[users, : found.shape[1]] = scores

            self._each_batch(lengths, lambda users: (users, selection()), decode)
        return leaves, log_probs

    def log_probs(
        self, prompts: Prompts, trie: Trie, leaves: npt.NDArray[np.integer]
    ) -> npt.NDArray[np.float32]:
        """Scores that `search` would give to IDs, those that no beam reaches included.

        Args:
            prompts: one per user, as for `search`.
            trie: the legal IDs, all of which compete.
            leaves: IDs to score as leaves of the trie `[users, m]`, -1 where there is none.

        Returns:
            `[users, m]`, -inf for leaves of -1.
        """
        m = leaves.shape[1]
        check_search(prompts, trie, max(m, 1), self._vocabulary, self._vocab_size, self._longest_prompt)
        out = np.full(leaves.shape, -np.inf, np.float32)
        lengths = [len(prompt) + m * (trie.depth - 1) for prompt in prompts]
        self._on_device(trie)
        with self._levels() as levels:

            def score(users: npt.NDArray[np.intp]) -> None:
                out[users] = self._log_probs_batch(
                    levels, [prompts[user] for user in users], trie, leaves[users]
                )

            self._each_batch(lengths, lambda users: (users,), score)
        return out

    def _each_batch(
        self,
        lengths: Sequence[int],
        arguments: Callable[[npt.NDArray[np.intp]], tuple[Any, ...]],
        work: Callable[..., None],
    ) -> None:
        """Call `work` with the `arguments` of each batch of users, which are made in order.

        On a CPU what a layer makes of a batch should fit its cache. Batches are computed by threads there: of
        operations as small as these a second core shared by all gains a sixth, one of its own nearly all.
        """
        on_cpu = self._model.device.type == "cpu"
        cores = torch.get_num_threads()
        each = -(-cores // _MOST_THREADS)
        threads = cores // each if on_cpu else 1
        budget = self._max_batch_tokens or (4_096 if on_cpu else 16_384)
        wanted = -(-sum(lengths) // budget)
        # As many for each thread.
        budget = min(budget, max(_FEWEST_TOKENS, -(-sum(lengths) // max(1, wanted + -wanted % threads))))
        parts = [arguments(users) for users in batches(lengths, budget)]
        if threads == 1 or len(parts) == 1:
            for part in parts:
                work(*part)
            return
        try:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(each,)) as pool:
                list(pool.map(lambda part: work(*part), parts))
        finally:
            torch.set_num_threads(cores)  # threads that begin later ask for the last number set

    @contextmanager
    def _levels(self) -> Iterator["_Levels"]:
        """The model in evaluation mode, once for each level of an ID."""
        training = self._model.training
        self._model.eval()
        models = [
            _with_output_of(self._model, first, count)
            for first, count in zip(self._vocabulary.first_token, self._vocabulary.code_counts, strict=True)
        ]
        try:
            with _LastNetwork(self._model) as last_network:
                yield _Levels(models, last_network)
        finally:
            self._model.train(training)

    @torch.inference_mode()
    def _decode_batch(
        self, levels: "_Levels", prompts: Prompts, trie: Trie, width: int, select: "_Select"
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Leaves and scores `[users, at most width]`, in the order of the leaves."""
        device = self._model.device
        legal_ids = self._on_device(trie)
        cache = DynamicCache()
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        logits = _prefill(levels, prompts, lengths, cache)
        nodes = torch.zeros(len(prompts), 1, dtype=torch.long, device=device)
        scores = torch.zeros(len(prompts), 1, device=device)
        ranks = torch.zeros(len(prompts), 1, device=device)
        longest = int(lengths.max())
        # [users, beams, cached tokens]: what each beam attends to.
        visible = (torch.arange(longest, device=device) < lengths[:, None])[:, None]
        for level in range(trie.depth):
            slots, children = legal_ids.children(level, nodes)
            illegal = children < 0
            log_probs = logits.gather(2, slots).float().masked_fill(illegal, -torch.inf)
            check_logits(bool(log_probs.isnan().any()))
            # A beam that has ended has no legal code: its softmax is NaN, masked again.
            log_probs = log_probs.log_softmax(2).masked_fill(illegal, -torch.inf)
            candidates = scores[:, :, None] + log_probs
            picked, ranks = select(candidates, ranks, width)
            scores = candidates.flatten(1).gather(1, picked)
            nodes = children.flatten(1).gather(1, picked)
            if level + 1 < trie.depth:
                parents = (picked // slots.shape[2])[:, :, None]
                tokens = slots.flatten(1).gather(1, picked) + self._vocabulary.first_token[level]
                visible = visible.gather(1, parents.expand(-1, -1, visible.shape[2]))
                visible, logits = _grow(levels.models[level + 1], tokens, visible, lengths + level, cache)
        return nodes.cpu().numpy(), scores.cpu().numpy()

    def _on_device(self, trie: Trie) -> "_DeviceTrie":
        """The trie beside the model; that of the last call is kept."""
        kept = self._device_trie
        if kept is None or kept.trie is not trie or kept.device != self._model.device:
            kept = self._device_trie = _DeviceTrie(trie, self._model.device)
        return kept

    @torch.inference_mode()
    def _log_probs_batch(
        self,
        levels: "_Levels",
        prompts: Prompts,
        trie: Trie,
        leaves: npt.NDArray[np.integer],
    ) -> npt.NDArray[np.float32]:
        """As `log_probs`: each ID is a beam whose codes are given."""
        device = self._model.device
        legal_ids = self._on_device(trie)
        cache = DynamicCache()
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        logits = _prefill(levels, prompts, lengths, cache)
        asked = leaves >= 0
        codes = np.zeros((*leaves.shape, trie.depth), np.int64)
        codes[asked] = trie.codes_of(leaves[asked])
        wanted = torch.from_numpy(codes).to(device)
        nodes = np.where(asked, 0, -1)
        longest = int(lengths.max())
        visible = (torch.arange(longest, device=device) < lengths[:, None])[:, None]
        visible = visible.expand(-1, leaves.shape[1], -1)
        total = torch.zeros(leaves.shape, device=device)
        for level in range(trie.depth):
            # All IDs of a user share the root.
            here = np.zeros((len(prompts), 1), np.int64) if level == 0 else nodes
            slots, children = legal_ids.children(level, torch.from_numpy(here).to(device))
            scores = logits.gather(2, slots).float().masked_fill(children < 0, -torch.inf)
            check_logits(bool(scores.isnan().any()))
            whole = scores.logsumexp(2)
            code = wanted[:, :, level]
            own = logits.expand(-1, leaves.shape[1], -1).gather(2, code[:, :, None])[:, :, 0]
            total += own.float() - whole
            nodes = trie.child(level, nodes.ravel(), codes[:, :, level].ravel()).reshape(nodes.shape)
            if level + 1 < trie.depth:
                tokens = code + self._vocabulary.first_token[level]
                visible, logits = _grow(levels.models[level + 1], tokens, visible, lengths + level, cache)
        return np.where(asked, total.cpu().numpy(), np.float32(-np.inf))


class _Levels(NamedTuple):
    """The model as it is asked for each level of an ID, and the network that prompts hardly need."""

    models: list[PreTrainedModel]
    last_network: "_LastNetwork"


class _DeviceTrie:
    """A trie's arrays on the model's device, so that no step waits for the host to look up children."""

    def __init__(self, trie: Trie, device: torch.device) -> None:
        self.trie = trie
        self.device = device
        self._offsets = [torch.from_numpy(offsets).to(device) for offsets in trie.offsets]
        self._edges = [torch.from_numpy(edges).to(device) for edges in trie.edges]

    def children(self, level: int, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and nodes of the children of `nodes` `[users, beams]`, each `[users, beams, most]`.

        Padding is code 0 with node -1; a node of -1 has no children.
        """
        known = nodes.clamp_min(0)
        first = self._offsets[level][known]
        counts = (self._offsets[level][known + 1] - first).masked_fill(nodes < 0, 0)
        places = torch.arange(int(counts.max()), device=self.device)
        padding = places >= counts[:, :, None]
        children = (first[:, :, None] + places).masked_fill(padding, -1)
        codes = self._edges[level][children] - (known * self.trie.code_counts[level])[:, :, None]
        return codes.masked_fill(padding, 0), children


class _Select(Protocol):
    """Which continuations become the beams of the next level."""

    def __call__(self, candidates: Tensor, ranks: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Pick up to `width` of each user's continuations.

        Args:
            candidates: log-probabilities of the continuations, `[users, beams, slots]`; -inf: none.
            ranks: of the beams at the level before, `[users, beams]`; zeros at the root.
            width: beams wanted.

        Returns:
            Positions among the user's beams x slots, and what is handed in as `ranks` next, each
            `[users, picked]`.
        """
        ...


def _best(candidates: Tensor, ranks: Tensor, width: int) -> tuple[Tensor, Tensor]:
    flat = candidates.flatten(1)
    picked = _top(flat, min(width, flat.shape[1]))
    return picked, flat.gather(1, picked)


def _split(generator: torch.Generator) -> torch.Generator:
    """A generator of its own for each batch, so that it does not matter which is computed first."""
    return torch.Generator().manual_seed(int(torch.randint(1 << 62, (1,), generator=generator)))


class _Draws:
    """Each beam goes on by one draw; all begin at the root."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def __call__(self, candidates: Tensor, ranks: Tensor, width: int) -> tuple[Tensor, Tensor]:
        users, beams, slots = candidates.shape
        each = width // beams
        chance = candidates.cpu().double().softmax(2).flatten(0, 1)
        drawn = torch.multinomial(chance, each, replacement=True, generator=self._generator)
        offset = torch.arange(beams).repeat_interleave(each) * slots
        picked = (drawn.view(users, beams * each) + offset).to(candidates.device)
        return picked, picked.new_zeros(picked.shape, dtype=candidates.dtype)


class _DistinctDraws:
    """Gumbel top-k: the best continuations by log-probability plus noise.

    A beam's `rank` is its perturbed log-probability. Its continuations get noise of their own,
    conditioned on their maximum being that of the beam, so that the order of whole IDs is that of
    one independent noise each.
    """

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def __call__(self, candidates: Tensor, ranks: Tensor, width: int) -> tuple[Tensor, Tensor]:
        chance = torch.rand(candidates.shape, generator=self._generator, dtype=torch.float64)
        noise = -(-chance.clamp_min(1e-300).log()).log()
        noisy = candidates.double() + noise.to(candidates.device)
        most = noisy.max(2, keepdim=True).values
        # -log(exp(-rank) - exp(-most) + exp(-noisy)), kept finite (Kool et al. 2019, appendix B.3).
        gap = ranks[:, :, None].double() - noisy + torch.log1p(-(noisy - most).exp())
        moved = ranks[:, :, None].double() - gap.clamp_min(0) - torch.log1p((-gap.abs()).exp())
        moved = moved.masked_fill(candidates == -torch.inf, -torch.inf).flatten(1)
        picked = _top(moved, min(width, moved.shape[1]))
        return picked, moved.gather(1, picked)


def _longest_prompt(config: Any, depth: int) -> int:
    """Longest prompt that leaves room for the beams' tokens; ConfigError if none can be decoded."""
    text = config.get_text_config()
    if text._attn_implementation not in ("eager", "sdpa"):
        raise ConfigError(
            f"attention implementation {text._attn_implementation} takes no 4-D mask; load the"
            " model with sdpa or eager"
        )
    other = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if other:
        raise ConfigError(
            f"layers of kind {', '.join(sorted(other))} keep a state that beams cannot share; use"
            " the vllm engine"
        )
    limit: int = getattr(text, "max_position_embeddings", None) or sys.maxsize
    # Within its window sliding attention is full attention, and the tree mask is exact.
    window: int = getattr(text, "sliding_window", None) or sys.maxsize
    return min(limit, window) - (depth - 1)


def _with_output_of(model: PreTrainedModel, first: int, count: int) -> PreTrainedModel:
    """The same model whose output layer knows `count` tokens from `first`; weights are shared.

    Calling the whole model, rather than its body and a product, keeps what some models do to
    logits afterwards (scaling, soft caps).
    """
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    part = nn.Linear(head.in_features, count, bias=head.bias is not None, device="meta")
    rows = slice(first, first + count)
    part.weight = nn.Parameter(head.weight.detach()[rows], requires_grad=False)
    if head.bias is not None:
        part.bias = nn.Parameter(head.bias.detach()[rows], requires_grad=False)
    twin = copy.copy(model)
    twin._modules = dict(model._modules)
    # Trainers hang a forward on the object that is bound to it, and so to the whole output layer.
    twin.__dict__.pop("forward", None)
    twin.set_output_embeddings(part)
    return twin


def _prefill(levels: _Levels, prompts: Prompts, lengths: Tensor, cache: DynamicCache) -> Tensor:
    """Fill the cache with the prompts and return the logits after each one, `[users, 1, K]`.

    Prompts are padded on the right: causal attention then needs no mask here, and later tokens
    simply never attend to the padding.
    """
    ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    ends, which = (lengths - 1).unique(return_inverse=True)
    with levels.last_network.at(lengths - 1):
        logits = levels.models[0](
            input_ids=ids.to(lengths.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=ends,
        ).logits
    return logits[torch.arange(len(prompts), device=which.device), which][:, None]


class _LastNetwork:
    """Spares the feed-forward network of the last layer all tokens of a prompt but one.

    Its output for the others is 0: no logits are read there, and no layer follows. Nothing is spared where
    the network is not of Llama's kind, which most models have. Threads may compute prompts at once.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        layers = getattr(model.base_model, "layers", None)
        network = getattr(layers[-1], "mlp", None) if layers else None
        # Mixtures of experts, which may give more than one tensor, have none.
        like_llama = network is not None and isinstance(getattr(network, "down_proj", None), nn.Linear)
        self._network = network if like_llama else None
        self._hooks: list[Any] = []
        self._here = threading.local()

    def __enter__(self) -> "_LastNetwork":
        if self._network is not None:
            self._hooks = [
                self._network.register_forward_pre_hook(self._cut),
                self._network.register_forward_hook(self._spread),
            ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def at(self, places: Tensor) -> Iterator[None]:
        """Within, only the tokens at `places` `[users]` go through the network, in this thread."""
        self._here.rows = torch.arange(len(places), device=places.device), places
        try:
            yield
        finally:
            self._here.rows = None

    def _cut(self, _: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        rows = getattr(self._here, "rows", None)
        if rows is None:
            return inputs
        self._here.shape = inputs[0].shape
        return (inputs[0][rows][:, None],)

    def _spread(self, _: nn.Module, inputs: tuple[Tensor], found: Tensor) -> Tensor:
        rows = getattr(self._here, "rows", None)
        return found if rows is None else found.new_zeros(self._here.shape).index_put_(rows, found[:, 0])


def _grow(
    model: PreTrainedModel, tokens: Tensor, visible: Tensor, positions: Tensor, cache: DynamicCache
) -> tuple[Tensor, Tensor]:
    """Add a token to every beam.

    Args:
        model: of `_with_output_of` for the next level.
        tokens: `[users, beams]`.
        visible: what each beam attends to before, `[users, beams, cached tokens]`.
        positions: of the tokens in their text, `[users]`.
        cache: of the tokens before.

    Returns:
        What each beam attends to now, and the logits of its next code `[users, beams, K]`.
    """
    beams = tokens.shape[1]
    itself = torch.eye(beams, dtype=torch.bool, device=tokens.device)
    visible = torch.cat([visible, itself.expand(len(tokens), -1, -1)], 2)
    logits = model(
        input_ids=tokens,
        attention_mask=_additive(visible, model.dtype),
        position_ids=positions[:, None].expand(-1, beams),
        past_key_values=cache,
        use_cache=True,
    ).logits
    return visible, logits


def _top(values: Tensor, k: int) -> Tensor:
    """Positions of the k largest of each row, `[rows, k]`, ascending; ties go to the first.

    `topk` alone leaves open which of equal values it returns. Ascending positions keep the beams
    in the order of their nodes, which is the order of their codes.
    """
    least = values.topk(k, 1).values[:, -1:]
    above, equal = values > least, values == least
    room = k - above.sum(1, keepdim=True)
    return (above | (equal & (equal.cumsum(1) <= room))).nonzero()[:, 1].view(-1, k)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask `[users, beams, tokens]` as the 4-D mask `[users, 1, beams, tokens]`."""
    tokens = visible.shape[2]
    # GPU kernels take rows that start at multiples of 8 numbers; others they copy, in every layer.
    mask = torch.zeros(*visible.shape[:2], tokens + -tokens % 8, dtype=dtype, device=visible.device)
    mask = mask[:, :, :tokens].masked_fill_(~visible, torch.finfo(dtype).min)
    return mask[:, None]
