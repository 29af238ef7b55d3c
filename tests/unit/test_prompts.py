import datetime as dt
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from negrec_core.beam import SidVocabulary
from negrec_core.errors import ArtefactError
from negrec_core.prompts import PROMPT_FILE, Event, PromptWriter, context_events, sid_token

VOCABULARY = SidVocabulary((20, 24, 30), (4, 6, 8))
PAD = 0
CODES = np.array([[a, b, c] for a in range(4) for b in (0, 5) for c in (0, 7)])

events = st.lists(
    st.builds(Event, st.integers(0, 50), st.booleans(), st.integers(0, len(CODES) - 1)),
    max_size=30,
    unique=True,
)
literals = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)
writers = st.builds(
    PromptWriter,
    vocabulary=st.just(VOCABULARY),
    head=literals,
    liked=literals,
    disliked=literals,
    pad=st.just(PAD),
    max_tokens=st.integers(8, 80),
)
multiples = st.sampled_from([1, 2, 7, 16, 100])


def write_by_hand(writer, events, multiple_of):
    """Try ever shorter pasts; pad one token at a time."""
    blocks = [[20 + a, 24 + b, 30 + c] for a, b, c in CODES.tolist()]
    longest = max([n for n in range(1, writer.max_tokens + 1) if n % multiple_of == 0], default=0)
    past = sorted(events)
    while True:
        tokens = list(writer.head)
        for event in past:
            tokens += [*(writer.disliked if event.disliked else writer.liked), *blocks[event.sid]]
        tokens += writer.disliked
        if not past or len(tokens) <= (longest or writer.max_tokens):
            break
        past = past[1:]
    while len(tokens) % multiple_of:
        tokens = [PAD, *tokens]
    return tokens, past


@given(writers, events, multiples)
def test_prompts_equal_those_written_by_hand(writer, events, multiple_of):
    tokens, positions = writer.write(events, writer.blocks(CODES), multiple_of)
    expected, past = write_by_hand(writer, events, multiple_of)
    assert tokens == expected
    assert len(tokens) % multiple_of == 0
    assert [disliked for _, disliked in positions] == [event.disliked for event in past]
    for (at, _), event in zip(positions, past, strict=True):
        codes = np.array(tokens[at : at + 3]) - VOCABULARY.first_token
        assert codes.tolist() == CODES[event.sid].tolist()


@given(writers, events, multiples)
def test_prompts_stay_within_the_limit(writer, events, multiple_of):
    tokens, positions = writer.write(events, writer.blocks(CODES), multiple_of)
    if positions and multiple_of <= writer.max_tokens:
        assert len(tokens) <= writer.max_tokens
    elif positions:
        assert len(tokens) == multiple_of


@given(writers, events, st.randoms())
def test_the_order_in_which_events_come_does_not_matter(writer, events, random):
    shuffled = random.sample(events, len(events))
    blocks = writer.blocks(CODES)
    assert writer.write(shuffled, blocks) == writer.write(events, blocks)


@given(writers, events.filter(len))
def test_what_is_cut_is_the_oldest(writer, events):
    blocks = writer.blocks(CODES)
    oldest, *rest = sorted(events)
    whole, of_rest = writer.write(events, blocks), writer.write(rest, blocks)
    if len(whole[1]) < len(events):
        assert whole == of_rest
    else:
        assert whole[1][0][1] == oldest.disliked
        assert len(whole[1]) == len(of_rest[1]) + 1


def test_a_prompt_reads_in_time_order():
    writer = PromptWriter(VOCABULARY, (1, 2), (3,), (4, 5), (6,), PAD, 20)
    past = [Event(9, True, 0), Event(3, False, len(CODES) - 1)]
    tokens, positions = writer.write(past, writer.blocks(CODES), 8)
    assert tokens == [0, 0, 0, 1, 2, 3, 23, 29, 37, 4, 5, 20, 24, 30, 4, 5]
    assert positions == [(6, False), (11, True)]
    assert writer.write([], [], 1) == ([1, 2, 4, 5], [])


def test_a_writer_that_tells_of_no_likes_leaves_them_out_and_stays_so(tmp_path):
    writer = PromptWriter(VOCABULARY, (1,), (2,), (3,), (4,), PAD, 20, likes=False)
    past = [Event(1, True, 0), Event(2, False, 1), Event(3, True, 2)]
    blocks = writer.blocks(CODES)
    tokens, positions = writer.write(past, blocks)
    assert tokens == [1, 3, *blocks[0], 3, *blocks[2], 3]
    assert [disliked for _, disliked in positions] == [True, True]
    writer.save(tmp_path)
    assert PromptWriter.load(tmp_path) == writer
    file = tmp_path / PROMPT_FILE
    raw = json.loads(file.read_text())
    del raw["likes"]
    file.write_text(json.dumps(raw))
    assert PromptWriter.load(tmp_path).likes


@given(writers)
def test_save_and_load_give_the_same_writer(tmp_path_factory, writer):
    folder = tmp_path_factory.mktemp("prompt")
    writer.save(folder)
    assert PromptWriter.load(folder) == writer


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: None,
        lambda raw: "{",
        lambda raw: "[]",
        lambda raw: json.dumps({k: v for k, v in raw.items() if k != "head"}),
        lambda raw: json.dumps({**raw, "vocabulary": {"first_token": [1]}}),
        lambda raw: json.dumps({**raw, "vocabulary": {"first_token": [1], "code_counts": [0]}}),
        lambda raw: json.dumps({**raw, "liked": 5}),
    ],
)
def test_a_damaged_prompt_file_is_refused(tmp_path, change):
    PromptWriter(VOCABULARY, (1,), (2,), (3,), (4,), PAD, 20).save(tmp_path)
    file = tmp_path / PROMPT_FILE
    text = change(json.loads(file.read_text()))
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
    with pytest.raises(ArtefactError, match=r"prompt\.json is not readable") as caught:
        PromptWriter.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_tokens_are_written_level_by_level():
    assert "".join(sid_token(level, code) for level, code in enumerate((17, 4, 250))) == (
        "<a_17><b_4><c_250>"
    )


def test_context_events_keep_time_to_the_microsecond_and_skip_items_without_id():
    start = dt.datetime(2026, 3, 10, 23, 59, 59, 999_990, tzinfo=dt.UTC)
    micros = [start + dt.timedelta(microseconds=n) for n in range(10)]

    def entries(offset):
        return [{"item_id": f"i{n}", "event_time": micros[n]} for n in range(offset, 10, 2)]

    found = context_events(entries(0), entries(1), {f"i{n}": n for n in range(8)})
    first = 1_773_187_199_999_990
    assert sorted(found) == [Event(first + n, n % 2 == 0, n) for n in range(8)]
    shanghai = dt.timezone(dt.timedelta(hours=8))
    elsewhere = [{"item_id": "i0", "event_time": start.astimezone(shanghai)}]
    assert context_events(elsewhere, [], {"i0": 5}) == [Event(first, True, 5)]
