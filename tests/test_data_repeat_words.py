"""Word repetition: which words may be doubled, how many, and that nothing else happens to a caption."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dsclip.data.decoding.repeat_words import repeat_words


@settings(deadline=None)
@given(st.integers(0, 12).map(lambda n: [f"w{i}" for i in range(n)]), st.floats(0, 1), st.integers(0, 99))
def test_words_are_doubled_where_they_stand_and_no_more_than_the_rate_says(words, rate, seed):
    written = repeat_words(" ".join(words), rate, np.random.default_rng(seed)).split()
    added = len(written) - len(words)
    assert 0 <= added <= min(len(words), max(2, int(rate * len(words))))
    left = list(written)
    for word in words:
        assert left.pop(0) == word
        if left[:1] == [word]:
            left.pop(0)
    assert not left


def test_the_number_of_doubled_words_is_uniform():
    rng, caption = np.random.default_rng(0), " ".join(f"w{i}" for i in range(20))
    counts = Counter(len(repeat_words(caption, 0.2, rng).split()) - 20 for _ in range(5000))
    assert sorted(counts) == [0, 1, 2, 3, 4] and all(abs(n - 1000) < 120 for n in counts.values())
