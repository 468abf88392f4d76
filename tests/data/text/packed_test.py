"""Rows as a Loader sees them: right tokens, any number of processes, resumable."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from distilljax.data import Loader, Slice, eval_batches, load_in_memory
from distilljax.data.text import ChatTemplate, Packed, Texts, Tokenized, TokenizerJson
from tests.data.text.tiny import conversation, documents, packed

KEYS = ["index", "labels", "loss_mask", "positions", "segment_ids", "tokens"]


@pytest.fixture
def rows(model):
    return packed(model, documents(120, longest=8), seed=3)()


def test_a_batch_is_what_a_language_model_reads(rows):
    batch = next(Loader(4)(rows, seed=0))
    assert sorted(batch) == KEYS
    for name in ("tokens", "labels", "segment_ids", "positions"):
        assert batch[name].shape == (4, 64)
        assert batch[name].dtype == np.int32
    assert batch["loss_mask"].dtype == bool
    assert batch["index"].dtype == np.int64


def test_every_token_is_predicted_once_by_the_token_before_it(model):
    """Against a reconstruction that knows nothing of spans, cuts and shifts."""
    texts = documents(60, longest=20)
    rows = packed(model, texts, context=48)()
    tokenizer = TokenizerJson(str(model))()
    predicted, inputs = [], []
    for row in rows:
        for segment in range(1, row["segment_ids"].max() + 1):
            here = row["segment_ids"] == segment
            assert row["loss_mask"][here].all()
            assert row["positions"][here].tolist() == list(range(here.sum()))
            # within a segment, a label is the next input
            assert row["tokens"][here][1:].tolist() == row["labels"][here][:-1].tolist()
            predicted += row["labels"][here].tolist()
            inputs += row["tokens"][here].tolist()
        padding = row["segment_ids"] == 0
        assert not row["loss_mask"][padding].any()
        assert not row["tokens"][padding].any()
    encoded = [one.ids.tolist() for one in tokenizer.encode(texts)]
    eos = tokenizer.eos_id
    assert sorted(predicted) == sorted(t for ids in encoded for t in [*ids[1:], eos])
    assert sorted(inputs) == sorted(t for ids in encoded for t in ids)


def test_a_row_is_the_text_of_its_spans(rows):
    tokenizer = rows.store.tokenizer
    texts = rows.config.text.documents
    for index in (0, len(rows) - 1, 5 * len(rows) + 1):
        row = rows[index]
        spans = rows.spans(index)
        assert row["segment_ids"].max() == len(spans)
        for segment, span in enumerate(spans, start=1):
            here = row["segment_ids"] == segment
            whole = tokenizer.encode([texts[span.document]])[0].ids.tolist()
            whole.append(tokenizer.eos_id)
            stop = span.start + span.places
            assert row["tokens"][here].tolist() == whole[span.start : stop]
            assert row["labels"][here].tolist() == whole[span.start + 1 : stop + 1]


def global_batches(loader, rows, processes, steps, state=None):
    iterators = [
        loader(rows, seed=5, process_index=i, process_count=processes)
        for i in range(processes)
    ]
    if state is not None:
        for iterator in iterators:
            iterator.set_state(json.loads(json.dumps(state)))
    found = []
    for _ in range(steps):
        local = [next(iterator) for iterator in iterators]
        found.append({k: np.concatenate([b[k] for b in local]) for k in local[0]})
    states = [iterator.get_state() for iterator in iterators]
    assert all(one == states[0] for one in states)
    return found, states[0]


def assert_same(batches, others):
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_sees_the_same_global_batches(rows, processes):
    steps = 3 * len(rows) // 8  # over several epochs
    expected, state = global_batches(Loader(8), rows, 1, steps)
    found, same = global_batches(Loader(8), rows, processes, steps)
    assert_same(found, expected)
    assert same == state


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 2), (2, 1)])
def test_a_run_resumes_with_another_number_of_processes(rows, before, after):
    steps = 2 * len(rows) // 8
    whole, _ = global_batches(Loader(8), rows, 1, steps + 4)
    first, state = global_batches(Loader(8, num_threads=2), rows, before, steps)
    rest, _ = global_batches(Loader(8, prefetch=3), rows, after, 4, state)
    assert_same([*first, *rest], whole)


def test_an_epoch_has_every_document_and_the_next_one_other_rows(model):
    rows = packed(model, documents(300, longest=2))()
    n = len(rows)
    batches = Loader(1)(rows, seed=0)
    index = [int(next(batches)["index"][0]) for _ in range(2 * n)]
    assert sorted(index[:n]) == list(range(n))
    assert sorted(index[n:]) == list(range(n, 2 * n))
    first, second = (
        {frozenset(rows.spans(i)) for i in range(e * n, (e + 1) * n)} for e in (0, 1)
    )
    assert n > 50
    assert (
        len(first & second) < n / 2
    )  # a row of unequal lengths has nobody to swap with
    everything = {span for row in first for span in row}
    assert everything == {span for row in second for span in row}


def test_rows_that_are_kept_have_one_index_in_all_epochs(model):
    rows = packed(model, documents(40), repack=False)()
    batches = Loader(1)(rows, seed=0)
    seen = {}
    for _ in range(3 * len(rows)):
        batch = next(batches)
        index = int(batch["index"][0])
        assert index < len(rows)
        tokens = seen.setdefault(index, batch["tokens"])
        np.testing.assert_array_equal(batch["tokens"], tokens)
    assert len(seen) == len(rows)
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_the_state_is_refused_by_other_data(model, rows):
    state = Loader(4)(rows, seed=0).get_state()
    assert set(state) == {"next_example", "seed", "num_examples", "source"}
    texts = list(rows.config.text.documents.texts)
    swapped = [*texts[:-2], texts[-1], texts[-2]]  # as many rows, other documents
    other = packed(model, swapped, seed=3)()
    assert len(other) == len(rows)
    with pytest.raises(ValueError, match="be of this stream, whose source is"):
        Loader(4)(other, seed=0).set_state(state)


def test_worker_processes_get_paths_and_not_the_tokens(rows):
    before = len(pickle.dumps(rows.store))
    data = pickle.dumps(rows)
    copy = pickle.loads(data)
    for index in (0, len(rows) + 1):
        for name, array in rows[index].items():
            np.testing.assert_array_equal(array, copy[index][name])
    assert len(pickle.dumps(rows.store)) == before  # though all is mapped now


@pytest.mark.slow
def test_worker_processes_read_the_same_batches(rows):
    workers = Loader(4, num_workers=2)(rows, seed=0)
    threads = Loader(4)(rows, seed=0)
    count = len(rows) // 4 + 3  # into the second epoch
    found, expected = ([next(one) for _ in range(count)] for one in (workers, threads))
    assert_same(found, expected)


def test_an_evaluation_pads_the_mask(rows):
    batches = list(eval_batches(rows, 8))
    assert len(batches) == -(-len(rows) // 8)
    last, real = batches[-1], len(rows) % 8
    assert real
    assert last["loss_mask"].shape == (8, 64)
    assert last["loss_mask"][:real].any(axis=1).all()
    assert not last["loss_mask"][real:].any()
    assert (last["index"][real:] == -1).all()
    counted = sum(int(batch["loss_mask"].sum()) for batch in batches)
    assert counted == int(rows.plan.pieces.places.sum())


def test_what_is_for_images_is_refused(rows):
    with pytest.raises(ValueError, match="scale, augment and flatten must be left out"):
        next(Loader(4, scale=2.0)(rows, seed=0))
    with pytest.raises(ValueError, match="leave in_memory out"):
        Loader(4, in_memory=True)(rows, seed=0)
    with pytest.raises(ValueError, match="load_in_memory: examples must have inputs"):
        load_in_memory(rows)


def test_a_slice_keeps_its_rows(rows):
    few = Slice(lambda: rows, 0, 2)()
    batches = Loader(2)(few, seed=0)
    assert {int(i) for _ in range(3) for i in next(batches)["index"]} == {0, 1}


# --- splits and filters ---------------------------------------------------------------


def test_splits_follow_the_text_and_not_its_place(model):
    texts = documents(300)

    def held_out(texts):
        rows = packed(model, texts, split="validation", validation_fraction=0.2)()
        return {texts[i] for i in rows.kept.tolist()}

    validation = held_out(texts)
    assert 30 < len(validation) < 90
    assert held_out(texts[::-1]) == validation
    assert held_out(texts + texts[:50]) == validation  # copies are on one side
    train = packed(model, texts, split="train", validation_fraction=0.2)()
    assert {texts[i] for i in train.kept.tolist()} == set(texts) - validation
    fewer = packed(model, texts, split="validation", validation_fraction=0.1)()
    assert {texts[i] for i in fewer.kept.tolist()} < validation


def test_splits_need_a_fraction(model):
    with pytest.raises(ValueError, match="validation_fraction must lie in"):
        packed(model, ["Emma"], split="train")
    with pytest.raises(ValueError, match="validation_fraction must lie in"):
        packed(model, ["Emma"], validation_fraction=0.1)


def test_empty_documents_are_dropped_and_counted(model):
    rows = packed(model, ["", "The clever sister", " \n\t", "Her rich aunt"])()
    assert rows.drops == {"empty": 2}
    assert rows.kept.tolist() == [1, 3]


def test_short_and_long_documents_are_dropped_and_counted(model):
    texts = documents(200, longest=10)
    lengths = packed(model, texts)().store.lengths
    rows = packed(model, texts, min_tokens=20, max_tokens=60)()
    assert rows.drops == {
        "under 20 tokens": int((lengths < 20).sum()),
        "too long": int((lengths > 60).sum()),
    }
    assert rows.store.lengths[rows.kept].min() >= 20
    assert rows.store.lengths[rows.kept].max() <= 60


def test_a_document_longer_than_a_row_is_split_dropped_or_refused(model):
    texts = [*documents(5, longest=1), " ".join(documents(20))]
    split = packed(model, texts, context=32)()
    assert split.drops == {}
    assert len(split.plan.pieces) > len(texts)
    dropped = packed(model, texts, context=32, long="drop")()
    assert dropped.drops == {"too long": 1}
    with pytest.raises(ValueError, match="document 5 must have at most 33 tokens"):
        packed(model, texts, context=32, long="error")()


def test_a_document_that_just_fits_is_not_long(model):
    text = documents(1)[0]
    count = len(TokenizerJson(str(model))().encode([text])[0].ids) + 1  # and eos
    rows = packed(model, [text], context=count - 1, long="error")()
    assert len(rows) == 1
    assert rows[0]["loss_mask"].all()
    with pytest.raises(ValueError, match="must have at most"):
        packed(model, [text], context=count - 2, long="error")()


def test_nothing_left_is_an_error(model):
    with pytest.raises(ValueError, match=r"0 of 2; .* dropped were {'empty': 2}"):
        packed(model, ["", " "])()


def test_a_batch_larger_than_the_rows_is_an_error(model):
    with pytest.raises(ValueError, match="batch_size must be at most"):
        Loader(64)(packed(model, ["The clever sister"])(), seed=0)


# --- conversations --------------------------------------------------------------------


def chats(model, conversations, **fields):
    template = ChatTemplate(str(model))
    text = Tokenized(Texts(tuple(conversations)), TokenizerJson(str(model)), template)
    return Packed(text, 128, **fields)()


def test_only_what_the_assistant_says_is_learnt(model):
    talk = conversation("Who visits Bath?", "Her rich aunt.", "Why?", "By the sea.")
    row = chats(model, [talk])[0]
    decode = TokenizerJson(str(model))().decode
    learnt = decode(row["labels"][row["loss_mask"]].tolist())
    assert learnt == "Her rich aunt.<|im_end|>By the sea.<|im_end|>"
    everything = decode(row["tokens"][row["segment_ids"] == 1].tolist())
    assert everything.startswith("<|im_start|>user\nWho visits Bath?<|im_end|>\n")


def test_conversations_that_are_long_or_teach_nothing_are_dropped(model):
    short = conversation("Who?", "Her aunt.")
    long = conversation("Who?", " ".join(documents(20)))
    unanswered = conversation("Who?")
    rows = chats(model, [short, long, unanswered, []])
    assert rows.drops == {"empty": 1, "too long": 1, "nothing to learn": 1}
    assert rows.kept.tolist() == [0]
    assert 1 in chats(model, [short, long], long="split").kept


def test_texts_and_conversations_are_not_confused(model):
    with pytest.raises(ValueError, match="document 0 must be a conversation where"):
        chats(model, ["Emma"])
    with pytest.raises(ValueError, match="document 0 must be a text where there is no"):
        packed(model, [conversation("Who?", "Emma.")])()
