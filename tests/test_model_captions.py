"""Captions sorted into chunks: nothing is lost, nothing is longer than it needs, and features come back in order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsclip.create import create_model
from dsclip.model import resolve_preset
from dsclip.model.captions import _best_sizes, chunk_count, cut_captions

CPU = torch.device("cpu")
CONFIG = resolve_preset("demo", vocab_size=60, eot_token_id=59, context_length=40, vision_layers=1)


def captions(ends, context=40):
    tokens = torch.arange(len(ends) * context).reshape(len(ends), context) % 58
    tokens[torch.arange(len(ends)), torch.tensor(ends)] = 59
    return tokens


@given(st.lists(st.integers(1, 39), min_size=1, max_size=70), st.sampled_from([None, 1, 2, 5, 16]))
@settings(max_examples=60, deadline=None)
def test_every_caption_is_in_one_chunk_up_to_its_end_and_comes_back_in_its_place(ends, chunk_size):
    tokens = captions(ends)
    cut = cut_captions(tokens, CONFIG, chunk_size, CPU)
    assert max(len(c) for c in cut.chunks) <= (chunk_size or len(ends))
    for chunk, end in zip(cut.chunks, cut.ends, strict=True):
        assert chunk.shape[1] == min(40, -(-(int(end.max()) + 1) // 8) * 8)
        assert bool((chunk[torch.arange(len(chunk)), end] == 59).all())
    whole = cut.in_order(tuple(torch.nn.functional.pad(c, (0, 40 - c.shape[1])) for c in cut.chunks))
    valid = torch.arange(40) <= torch.tensor(ends)[:, None]
    assert torch.equal(cut.valid(40), valid)
    assert torch.equal(whole[valid], tokens[valid])


@given(st.lists(st.integers(1, 10), min_size=8, max_size=8))
@settings(max_examples=40, deadline=None)
def test_no_way_to_cut_takes_fewer_tokens(lengths):
    """Against all ways to cut eight captions three times, which may be cut anywhere."""
    lengths = sorted(8 * x for x in lengths)

    def best(start, chunks):
        if chunks == 1:
            return (8 - start) * lengths[-1]
        return min((s - start) * lengths[s - 1] + best(s, chunks - 1) for s in range(start + 1, 10 - chunks))

    sizes = _best_sizes(lengths, 4)
    stops = torch.tensor(sizes).cumsum(0).tolist()
    assert len(sizes) == 4 and stops[-1] == 8 and min(sizes) > 0
    assert sum(n * lengths[s - 1] for n, s in zip(sizes, stops, strict=True)) == best(0, 4)


@given(
    st.lists(st.integers(1, 39), min_size=1, max_size=70), st.lists(st.integers(1, 39), max_size=40),
    st.sampled_from([None, 1, 2, 5, 16]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_number_of_chunks_is_that_of_every_rank(ends, hard, chunk_size):
    """Other lengths, or other numbers of hard negatives, must not make another number of outputs of a layer."""
    cut = cut_captions(captions(ends + hard), CONFIG, chunk_size, CPU, samples=len(ends))
    assert len(cut.chunks) == len(cut.ends) == chunk_count(len(ends), chunk_size)
    assert all(len(chunk) for chunk in cut.chunks)


def test_few_captions_stay_in_one_chunk_and_in_order():
    cut = cut_captions(captions([5, 3, 7, 6]), CONFIG, None, CPU)
    assert cut.place is None and len(cut.chunks) == 1
    assert torch.equal(cut.chunks[0], captions([5, 3, 7, 6])[:, :8])


def test_few_long_captions_are_cut_from_many_short_ones():
    cut = cut_captions(captions([3, 39, 4, 5] * 64), CONFIG, None, CPU)
    assert [c.shape[1] for c in cut.chunks] == [8, 8, 8, 40] and len(cut.chunks[-1]) == 64


@pytest.mark.parametrize("token_wise", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_features_and_gradients_are_those_of_captions_one_by_one(chunk_size, token_wise):
    model = create_model(
        "demo", vocab_size=60, eot_token_id=59, context_length=40, vision_layers=1, text_layers=2
    ).double()
    tokens = captions([3, 39, 4, 20, 7, 1, 30, 11, 2, 2] * 3)
    weight = torch.randn(30, 1, dtype=torch.float64)
    if token_wise:  # of the tokens that exist
        weight = model.valid_tokens(tokens)[:, :, None] * weight[:, None]

    def run(encode):
        model.zero_grad()
        features = encode() * weight
        features.sin().sum().backward()
        return [features.detach(), *(p.grad.clone() for p in model.text.parameters())]

    options = dict(token_wise=token_wise)
    ours = run(lambda: model(None, tokens, chunk_size=chunk_size, checkpointing="full", **options)[1])
    alone = run(lambda: torch.cat([model(None, row[None], **options)[1] for row in tokens]))
    for x, y in zip(ours, alone, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)
