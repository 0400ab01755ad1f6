"""The order of samples: agent by agent in a batch, whole epochs, and a resume that is arithmetic."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from decaf_hf.sampling import AgentMajorSampler, AgentStream


def sampler(sizes, agents, batch_size=2, batches=3, seed=0, first=0):
    return AgentMajorSampler(
        sizes, agents, batch_size=batch_size, batches=batches, seed=seed, first_batch=lambda: first
    )


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 30), agent=st.integers(0, 5), seed=st.integers(0, 9))
def test_every_epoch_is_a_permutation(size, agent, seed):
    stream = AgentStream(size, agent, seed)
    for epoch in range(3):
        assert sorted(stream[epoch * size + offset] for offset in range(size)) == list(range(size))


def test_epochs_agents_and_seeds_have_orders_of_their_own():
    def order(agent=0, seed=0, epoch=0):
        stream = AgentStream(50, agent, seed)
        return [stream[50 * epoch + offset] for offset in range(50)]

    orders = [order(), order(agent=1), order(seed=1), order(epoch=1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert order() == order()


def test_a_position_does_not_depend_on_what_was_asked_before():
    forwards, backwards = AgentStream(7, 3, 0), AgentStream(7, 3, 0)
    there = [forwards[position] for position in range(30)]
    back = [backwards[position] for position in reversed(range(30))]
    assert there == back[::-1]


def test_batches_are_agent_major():
    sizes, agents, batch_size, batches = [5, 3, 8], [4, 5, 6], 2, 7
    rows = list(sampler(sizes, agents, batch_size, batches))
    assert len(rows) == len(sampler(sizes, agents, batch_size, batches)) == 3 * 2 * 7
    offsets = [0, 5, 8]
    for index, (size, agent) in enumerate(zip(sizes, agents, strict=True)):
        stream = AgentStream(size, agent, 0)
        own = [row for batch in range(7) for row in rows[6 * batch + 2 * index :][:2]]
        # the small agent starts over while the large one is still in its first epoch
        assert own == [offsets[index] + stream[position] for position in range(14)]


def test_an_agents_order_is_the_same_on_any_process():
    together = list(sampler([6, 4], [0, 1]))
    alone = list(sampler([4], [1]))
    assert [row - 6 for batch in range(3) for row in together[4 * batch + 2 :][:2]] == alone


@pytest.mark.parametrize("first", [1, 4, 9])
def test_resuming_continues_the_stream(first):
    whole = list(sampler([5, 3], [0, 1], batches=first + 3))
    assert list(sampler([5, 3], [0, 1], batches=3, first=first)) == whole[first * 4 :]


def test_every_look_at_a_sample_has_a_seed_of_its_own():
    sampler = AgentMajorSampler([3, 4], [5, 6], batch_size=2, batches=6, seed=0, first_batch=lambda: 0)
    plain = list(sampler)
    sampler.draws = True
    draws = list(sampler)
    assert [draw.index for draw in draws] == plain
    assert len({draw.seed for draw in draws}) == len(draws)  # also where a sample comes again in a later epoch
    alone = AgentMajorSampler([4], [6], batch_size=2, batches=6, seed=0, first_batch=lambda: 0)
    alone.draws = True
    # whoever shares the batch
    assert [draw.seed for draw in alone] == [draw.seed for draw in draws if draw.index >= 3]
