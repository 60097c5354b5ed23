"""Order and randomness: what they depend on, what they do not, and that they never change."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.data.distributed_sampler import RepeatAugSampler

from tetdist import order
from tetdist.errors import UserError

MASK = 2**64 - 1


def splitmix(key, word):
    """The hash again, in Python's integers."""
    z = ((key ^ word) + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_the_hash_is_splitmix64():
    # The first output of the published generator from state 0.
    assert splitmix(0, 0) == 0xE220A8397B1DCDAF
    for seed in (7, 2**63):
        draws = order.uniforms(seed, 3, np.array([1_281_166]), 3)[0]
        key = splitmix(splitmix(splitmix(2, seed), 3), 1_281_166)
        assert draws.tolist() == [(splitmix(key, j) >> 11) / 2**53 for j in range(3)]
    # They depend on the position alone.
    whole = order.uniforms(3, 1, np.arange(100), 5)
    assert np.array_equal(order.uniforms(3, 1, np.array([70, 4]), 3), whole[[70, 4], :3])


def test_seeds_of_forward_passes():
    key = splitmix(splitmix(splitmix(4, 7), 12), 3)
    assert order.forward_seed(7, 12, 3) == key
    seeds = {order.forward_seed(*words) for words in itertools.product(range(5), repeat=3)}
    assert len(seeds) == 125
    torch.manual_seed(max(seeds))  # takes all 64 bits


def test_order_and_draws_never_change():
    assert order.permutation(10, 0, 0).tolist() == [2, 5, 8, 9, 1, 4, 6, 0, 3, 7]
    assert order.permutation(10, 7, 3).tolist() == [4, 8, 2, 0, 9, 7, 6, 5, 3, 1]
    draws = order.uniforms(0, 0, np.arange(2), 2)
    assert [x.hex() for x in draws.ravel().tolist()] == [
        "0x1.214b9676ab681p-1",
        "0x1.d1d4a38575426p-1",
        "0x1.112053d4f5c40p-3",
        "0x1.b3af4d84dff5ep-2",
    ]


@given(
    st.integers(1, 3000), st.integers(0, 2**64 - 1), st.integers(0, 2**32), st.integers(0, 2**32)
)
def test_a_permutation_holds_each_sample_once_and_depends_on_the_epoch(n, seed, epoch, other):
    first = order.permutation(n, seed, epoch)
    assert np.array_equal(np.sort(first), np.arange(n))
    if n > 20 and epoch != other:
        assert not np.array_equal(first, order.permutation(n, seed, other))
        assert not np.array_equal(first, order.permutation(n, (seed + 1) % 2**64, epoch))


def samples_of_a_step(world_size, step):
    """By the time at which the processes, side by side, come to them."""
    epoch_order = order.permutation(100, 0, 0)
    shares = [order.rank_micro_batches(rank, world_size, 24, 2) for rank in range(world_size)]
    return [
        epoch_order[order.micro_batch_positions(step, i, 24, 2)].tolist()
        for at_a_time in zip(*shares, strict=True)
        for i in at_a_time
    ]


def test_an_epoch_takes_each_sample_at_most_once_and_drops_others_each_time():
    steps = order.steps_per_epoch(100, 24)
    assert steps == 4
    for step, world_size in itertools.product(range(steps), (2, 3, 4)):
        assert samples_of_a_step(world_size, step) == samples_of_a_step(1, step)
    taken = [x for step in range(steps) for batch in samples_of_a_step(2, step) for x in batch]
    assert len(taken) == len(set(taken)) == 96
    dropped = [set(order.permutation(100, 0, epoch)[96:]) for epoch in range(2)]
    assert dropped[0] != dropped[1]


@pytest.mark.parametrize("micro_batches", [1, 2, 8])
def test_repeats_are_dealt_out_as_timms_among_as_many_processes(micro_batches):
    samples, micro, steps = 100, 3, 100 // (3 * micro_batches)
    step = micro * micro_batches
    places = order.repeated(np.arange(steps * step), 3, step, micro).reshape(steps, -1, micro)
    for number in range(micro_batches):
        sampler = RepeatAugSampler(
            range(samples), micro_batches, number, shuffle=False, num_repeats=3, selected_round=0
        )
        assert places[:, number].ravel().tolist() == list(sampler)[: steps * micro]
    # Of an epoch's length a third are other images.
    assert set(places.ravel()) == set(range(-(-steps * step // 3)))
    assert order.repeated(np.arange(9), 1, 3, 1).tolist() == list(range(9))


@given(st.integers(0, 200), st.integers(1, 20), st.integers(1, 5))
def test_evaluation_takes_each_sample_once_and_every_rank_as_often(n, batch_size, world_size):
    ranks = [
        list(order.evaluation_batches(n, batch_size, rank, world_size))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(len(ids) == batch_size for batches in ranks for ids in batches[:-1])
    assert all(len(ids) <= batch_size for batches in ranks for ids in batches)
    assert sorted(i for batches in ranks for ids in batches for i in ids) == list(range(n))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: order.steps_per_epoch(31, 32), "set batch.global=16 batch.micro=16,"),
        (lambda: order.rank_micro_batches(0, 1, 32, 5), "multiple"),
        (lambda: order.rank_micro_batches(0, 3, 32, 8), "4 micro-batches"),
    ],
)
def test_sizes_that_do_not_fit_are_named(call, words):
    with pytest.raises(UserError, match=words):
        call()
