"""Spans of words: how long they are, and that they lie anywhere in a caption."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dsclip.config.objective_section import ViewSection
from dsclip.data.decoding.word_span import span_of_words
from tests.shard_files import write_set
from tests.test_data_loader import loader, take

SHARES = st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted)


@settings(deadline=None)
@given(st.integers(0, 12).map(lambda n: [f"w{i}" for i in range(n)]), SHARES, st.integers(0, 99))
def test_words_that_stand_next_to_each_other_are_kept_and_as_many_as_the_shares_say(words, shares, seed):
    kept = span_of_words(" ".join(words), shares, np.random.default_rng(seed)).split()
    start = words.index(kept[0]) if kept else 0
    assert kept == words[start : start + len(kept)]
    low, high = (max(1, round(share * len(words))) for share in shares)
    assert not words or low <= len(kept) <= high


def test_places_and_lengths_are_uniform():
    rng, caption = np.random.default_rng(0), " ".join(f"w{i}" for i in range(20))
    spans = [span_of_words(caption, [0.2251, 0.4749], rng).split() for _ in range(5000)]  # 4.5 to 9.5 words, rounded
    lengths = Counter(map(len, spans))
    assert sorted(lengths) == [5, 6, 7, 8, 9] and all(abs(n - 1000) < 120 for n in lengths.values())
    starts = Counter(span[0] for span in spans if len(span) == 5)
    assert len(starts) == 16 and max(starts.values()) < 2 * min(starts.values())


def test_two_views_of_a_caption_are_spans_of_their_own_whoever_reads_the_sample(tmp_path, tokenizer):
    write_set(tmp_path, 1, 16, captions=3)
    views = tuple(ViewSection(name, caption="same", word_span=[0.2, 0.5]) for name in ("text_2", "text_3"))
    (found,), (same,) = (take(loader(tmp_path, tokenizer, views=views, workers=w, batch=16), 1) for w in (0, 2))
    spans = [found.views["text_2"], found.views["text_3"]]
    assert all((x == same.views[name]).all() for name, x in found.views.items())
    assert (spans[0] != spans[1]).any(1).sum() > 8, "most of 16 captions"
    ends = [(x == tokenizer.eot_token_id).int().argmax(1) for x in (found.tokens, *spans)]
    assert (ends[1] < ends[0]).all() and (ends[2] < ends[0]).all(), "half of the words or fewer"
