"""Prompts of the generator: a user's past as literal text and semantic IDs, in time order.

The literal parts are tokenised once, when the generator is made; from then on a prompt is a
concatenation of token ids, the same in training and in generation, and no tokenizer is needed.
"""

import datetime as dt
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from negrec_core.beam import SidVocabulary
from negrec_core.errors import ArtefactError, ConfigError

PROMPT_FILE = "prompt.json"
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_MICROSECOND = dt.timedelta(microseconds=1)
_LEVEL_NAMES = "abcdefghijklmnopqrstuvwxyz"


class Event(NamedTuple):
    """One past event in a prompt: `sid` indexes the token blocks of `PromptWriter.blocks`."""

    time: int
    disliked: bool
    sid: int


@dataclass(frozen=True)
class PromptWriter:
    """Writes prompts as token ids.

    Attributes:
        vocabulary: where each level's codes start among the tokens.
        head: tokens every prompt starts with; its first is the beginning-of-sequence token.
        liked: tokens before the semantic ID of a liked item.
        disliked: tokens before the semantic ID of a disliked item, and the question at the end.
        one_of: tokens before the semantic IDs that an answer is to be chosen from.
        pad: token that fills a prompt on the left.
        max_tokens: longest prompt.
        likes: whether a prompt tells of likes; without, events that are likes are left out.
    """

    vocabulary: SidVocabulary
    head: tuple[int, ...]
    liked: tuple[int, ...]
    disliked: tuple[int, ...]
    one_of: tuple[int, ...]
    pad: int
    max_tokens: int
    likes: bool = True

    def blocks(self, codes: np.ndarray) -> list[tuple[int, ...]]:
        """Token blocks of semantic IDs [n, D], to be indexed by `Event.sid`."""
        tokens = codes + np.asarray(self.vocabulary.first_token, np.int64)
        return [tuple(row) for row in tokens.tolist()]

    def write(
        self, events: Sequence[Event], blocks: Sequence[tuple[int, ...]], multiple_of: int = 1
    ) -> tuple[list[int], list[tuple[int, bool]]]:
        """A prompt that asks for the next dislike after `events`.

        Events are put in time order; the oldest are cut where the prompt would be too long. The
        prompt is padded on the left to a multiple of `multiple_of` tokens, which is longer than
        `max_tokens` only where `multiple_of` is.

        Returns:
            The token ids, and (position of the first code, disliked) of each event in it.
        """
        width = len(self.vocabulary.first_token)
        longest = self.max_tokens - self.max_tokens % multiple_of or self.max_tokens
        room = longest - len(self.head) - len(self.disliked)
        kept: list[Event] = []
        for event in sorted(events, reverse=True):
            if not (event.disliked or self.likes):
                continue
            room -= width + len(self.disliked if event.disliked else self.liked)
            if room < 0:
                break
            kept.append(event)
        tokens = list(self.head)
        positions = []
        for event in reversed(kept):
            tokens += self.disliked if event.disliked else self.liked
            positions.append((len(tokens), event.disliked))
            tokens += blocks[event.sid]
        tokens += self.disliked
        shift = -len(tokens) % multiple_of
        if shift:
            tokens = [self.pad] * shift + tokens
            positions = [(at + shift, disliked) for at, disliked in positions]
        return tokens, positions

    def asking(self, options: Sequence[tuple[int, ...]]) -> "PromptWriter":
        """A writer whose prompts name the token blocks of the semantic IDs that may be the answer."""
        head = [*self.head, *self.one_of]
        for option in options:
            head += option
        return replace(self, head=tuple(head))

    def save(self, directory: Path) -> None:
        (directory / PROMPT_FILE).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> "PromptWriter":
        """Read what `save` wrote; ArtefactError if it is absent or not readable."""
        try:
            raw = json.loads((directory / PROMPT_FILE).read_text(encoding="utf-8"))
            vocabulary = SidVocabulary(
                tuple(raw["vocabulary"]["first_token"]), tuple(raw["vocabulary"]["code_counts"])
            )
            return cls(
                vocabulary,
                tuple(raw["head"]),
                tuple(raw["liked"]),
                tuple(raw["disliked"]),
                tuple(raw["one_of"]),
                raw["pad"],
                raw["max_tokens"],
                # Generators of before there was a choice were told of likes.
                raw.get("likes", True),
            )
        except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
            raise ArtefactError(f"{directory}: {PROMPT_FILE} is not readable ({error})") from None


def sid_token(level: int, code: int) -> str:
    """Token text of one code, for example `<b_4>` for code 4 of the second level."""
    return f"<{_LEVEL_NAMES[level]}_{code}>"


def context_events(
    negatives: Sequence[dict[str, Any]],
    positives: Sequence[dict[str, Any]],
    sid_of_item: dict[str, int],
) -> list[Event]:
    """Events of a `user_context` row; items that have no semantic ID are left out."""
    return [
        Event(_micros(entry), disliked, sid_of_item[entry["item_id"]])
        for entries, disliked in ((negatives, True), (positives, False))
        for entry in entries
        if entry["item_id"] in sid_of_item
    ]


def _micros(entry: dict[str, Any]) -> int:
    return int((entry["event_time"] - _EPOCH) // _MICROSECOND)
