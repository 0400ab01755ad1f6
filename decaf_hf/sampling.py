"""The order in which agents see their samples: endless streams of shuffled epochs, computed and not remembered."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, Sampler

from .seeds import stream_seed


class AgentStream:
    """One agent's endless order of samples: epoch after epoch, each a permutation seeded by (seed, agent, epoch)."""

    def __init__(self, num_samples: int, agent: int, seed: int):
        self.num_samples, self.agent, self.seed = num_samples, agent, seed
        self._epoch: int | None = None
        self._order: list[int] = []

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_samples)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(stream_seed(self.seed, "order", self.agent, epoch))
            self._order = torch.randperm(self.num_samples, generator=generator).tolist()
            self._epoch = epoch
        return self._order[offset]


class Draw(NamedTuple):
    """A sample and the seed of what is random about this look at it."""

    index: int
    seed: int


class Augmented(Dataset):
    """Rows of `data` changed by `augment(row, seed)`, looked up by a `Draw`."""

    def __init__(self, data: Any, augment: Callable[[Any, int], Any]):
        self.data, self.augment = data, augment

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, draw: Draw) -> Any:
        return self.augment(self.data[draw.index], draw.seed)


class AgentMajorSampler(Sampler[int | Draw]):
    """Indices into the hosted agents' concatenated data, agent by agent within each batch.

    Every agent contributes `batch_size` rows to each batch whatever its own number of samples; a smaller data set
    starts over sooner. `first_batch` tells where an epoch begins, so that resuming needs no state. With `draws` it
    gives a `Draw` in place of each index.
    """

    draws = False

    def __init__(
        self,
        sizes: Sequence[int],
        agents: Sequence[int],
        *,
        batch_size: int,
        batches: int,
        seed: int,
        first_batch: Callable[[], int],
    ):
        self.seed = seed
        self.streams = [AgentStream(size, agent, seed) for size, agent in zip(sizes, agents, strict=True)]
        self.offsets = [sum(sizes[:index]) for index in range(len(sizes))]
        self.batch_size, self.batches, self.first_batch = batch_size, batches, first_batch

    def __len__(self) -> int:
        return self.batches * self.batch_size * len(self.streams)

    def __iter__(self) -> Iterator[int | Draw]:
        first = self.first_batch()
        for batch in range(first, first + self.batches):
            for stream, offset in zip(self.streams, self.offsets, strict=True):
                start = batch * self.batch_size
                for position in range(start, start + self.batch_size):
                    index = offset + stream[position]
                    seed = stream_seed(self.seed, "augment", stream.agent, position)
                    yield Draw(index, seed) if self.draws else index
