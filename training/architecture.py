"""Which networks a search may try, and which it tries next: a space, its limits, and evolution with ageing.

A network is one of `small_cnn`, at an input size of its own. The reward of compatible heterogeneous visual search
(Duggal et al., CVPR 2021, 2105.06047, section 3.3) is M(edge, edge) M(edge, cloud): a network has to be good, and good
at searching what the large one has written. Evolution is regularised (Real et al., AAAI 2019, 1802.01548): the best of
a few of the youngest networks is changed in one place, and what is old is forgotten, however good it was. No torch
here.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from graceful.errors import UsageError
from graceful.training.generation import BackboneSpec

_ATTEMPTS = 200
_NEAR = 0.5  # of a limit: networks below it are seldom what is looked for
Choices = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]


class Architecture(BaseModel):
    """One network: what `small_cnn` takes for each of its blocks, and the size of its input."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    block_widths: tuple[int, ...]
    depths: tuple[int, ...]
    kernels: tuple[int, ...]
    image_size: int

    @property
    def backbone(self) -> BackboneSpec:
        """The network as a configuration names it."""
        values = self.model_dump(mode="json", exclude={"image_size"})
        return BackboneSpec(name="small_cnn", kwargs=values)

    def multiply_adds(self, channels: int, width: int) -> int:
        """Return the multiply-adds of one image of so many channels, up to an embedding of `width`."""
        convolutions = sum(size**2 * kernel**2 * into * out for size, kernel, into, out in self._convolutions(channels))
        return convolutions + self.block_widths[-1] * width

    def num_parameters(self, channels: int, width: int) -> int:
        """Return the weights of the network, those of its batch norms included."""
        convolutions = sum(kernel**2 * into * out + 2 * out for _, kernel, into, out in self._convolutions(channels))
        return convolutions + (self.block_widths[-1] + 1) * width

    def _convolutions(self, channels: int) -> Iterator[tuple[int, int, int, int]]:
        """Pixels a side of each convolution's image and kernel, and its channels in and out."""
        size, into = self.image_size, channels
        for out, depth, kernel in zip(self.block_widths, self.depths, self.kernels, strict=True):
            for _ in range(depth):
                yield size, kernel, into, out
                into = out
            size = size // 2 if size >= 2 else size


class Space(BaseModel):
    """The networks to choose from: any value of each list, block by block."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    block_widths: tuple[Choices, ...] = Field(
        min_length=1, description="Channels to choose from, a list for each block: [[8, 16], [16, 32], [32, 64]]."
    )
    depths: Choices = Field(default=(1, 2), description="Convolutions of a block.")
    kernels: Choices = Field(default=(3, 5), description="Pixels a side of a block's kernels, odd.")
    image_sizes: tuple[Annotated[int, Field(ge=4)], ...] = Field(
        default=(), description="Pixels of the input; by default the variant's alone."
    )

    @field_validator("block_widths", "depths", "kernels", "image_sizes")
    @classmethod
    def _ascending(cls, value: Any) -> Any:
        if value and isinstance(value[0], tuple):
            return tuple(tuple(sorted(set(choices))) for choices in value)
        return tuple(sorted(set(value)))

    @field_validator("kernels")
    @classmethod
    def _odd(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(kernel % 2 == 0 for kernel in value):
            raise UsageError(f"kernels: expected odd sizes, which have a middle, found {list(value)}")
        return value

    def at(self, image_size: int) -> "Space":
        """Return the space in which every network has an input size: this one where none is said."""
        values = {name: getattr(self, name) for name in Space.model_fields}
        return Space.model_validate({**values, "image_sizes": self.image_sizes or (image_size,)})

    @property
    def smallest(self) -> Architecture:
        """The least of everything."""
        return self._of([0] * len(self._choices))

    @property
    def largest(self) -> Architecture:
        """The most of everything."""
        return self._of([len(choices) - 1 for choices in self._choices])

    def draw(self, rng: np.random.Generator) -> Architecture:
        """Return a random network."""
        return self._of([int(rng.integers(len(choices))) for choices in self._choices])

    def draw_near(self, share: Callable[[Architecture], float], rng: np.random.Generator) -> Architecture:
        """Return a random network within limits and near them; `share`: what one takes of its tightest limit.

        What is drawn above a limit is made smaller. The nearest of some draws where the space has none so near, its
        smallest where nothing is within.
        """
        found, nearest = self.smallest, 0.0
        for _ in range(_ATTEMPTS):
            drawn: Architecture | None = self.draw(rng)
            while drawn is not None and share(drawn) > 1:
                drawn = self.shrink(drawn, rng)
            if drawn is not None and share(drawn) >= nearest:
                found, nearest = drawn, share(drawn)
            if nearest >= _NEAR:
                break
        return found

    def mutate(self, parent: Architecture, rng: np.random.Generator) -> Architecture:
        """Return a network that differs in one place, where there is a choice."""
        genes, free = self._genes(parent), [i for i, choices in enumerate(self._choices) if len(choices) > 1]
        if free:
            place = int(rng.choice(free))
            genes[place] = int(rng.choice([i for i in range(len(self._choices[place])) if i != genes[place]]))
        return self._of(genes)

    def shrink(self, architecture: Architecture, rng: np.random.Generator) -> Architecture | None:
        """Return a network that is one step smaller in a random place; None for the smallest."""
        genes = self._genes(architecture)
        places = [place for place, gene in enumerate(genes) if gene]
        if not places:
            return None
        genes[int(rng.choice(places))] -= 1
        return self._of(genes)

    @property
    def _choices(self) -> list[tuple[int, ...]]:
        num_blocks = len(self.block_widths)
        return [*self.block_widths, *[self.depths] * num_blocks, *[self.kernels] * num_blocks, self.image_sizes]

    def _genes(self, architecture: Architecture) -> list[int]:
        a = architecture
        values = (*a.block_widths, *a.depths, *a.kernels, a.image_size)
        return [choices.index(value) for choices, value in zip(self._choices, values, strict=True)]

    def _of(self, genes: Sequence[int]) -> Architecture:
        values = [choices[gene] for choices, gene in zip(self._choices, genes, strict=True)]
        end = len(self.block_widths)
        return Architecture(
            block_widths=tuple(values[:end]),
            depths=tuple(values[end : 2 * end]),
            kernels=tuple(values[2 * end : 3 * end]),
            image_size=values[-1],
        )


class Cost(BaseModel):
    """What one image costs a network."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    multiply_adds: int
    num_parameters: int
    latency_ms: float | None = Field(default=None, description="Measured where it is limited.")


class SearchConfig(Space):
    """The search for a variant's architecture: networks to choose from, limits, and how many are tried.

    All networks share the weights of one super-net, which is trained once; each is measured on evaluation.dev by
    M(edge, edge) x M(edge, cloud). 'graceful variant NAME --search' carries it out; an update does not.
    """

    max_multiply_adds: int | None = Field(default=None, ge=1, description="Limit on multiply-adds of one image.")
    max_parameters: int | None = Field(default=None, ge=1, description="Limit on weights.")
    max_latency_ms: float | None = Field(
        default=None,
        gt=0,
        description="Limit on the median time of one image in PyTorch on the machine that searches, one at a time.",
    )
    epochs: int | None = Field(default=None, ge=1, description="Of the super-net; by default those of the variant.")
    evaluations: int = Field(default=64, ge=1, description="Networks that are measured.")
    population: int = Field(
        default=16,
        ge=1,
        description="The youngest, which are changed; as many are drawn at first. evaluations: all are.",
    )
    tournament: int = Field(
        default=4, ge=1, description="Random members of the population of which the best is changed."
    )

    @model_validator(mode="after")
    def _limited(self) -> "SearchConfig":
        if self.max_multiply_adds is None and self.max_parameters is None and self.max_latency_ms is None:
            raise UsageError(
                "search: expected a limit, without which the largest network is the answer, found none; set "
                "max_multiply_adds, max_parameters or max_latency_ms"
            )
        return self

    def excess(self, cost: Cost) -> str:
        """Return what a network has too much of, in words; empty within the limits."""
        limits = (
            ("multiply-adds", cost.multiply_adds, self.max_multiply_adds),
            ("parameters", cost.num_parameters, self.max_parameters),
            ("ms for an image", cost.latency_ms, self.max_latency_ms),
        )
        over = [
            f"{found:,} {noun} (at most {limit:,})"
            for noun, found, limit in limits
            if limit is not None and found is not None and found > limit
        ]
        return ", ".join(over)


class Candidate(BaseModel):
    """A network that was measured on the dev part with the super-net's weights; shares in [0, 1]."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: Architecture
    cost: Cost
    self_test: float = Field(description="M(edge, edge): recall@1 of its queries on its own vectors.")
    cross_test: float = Field(description="M(edge, cloud): recall@1 of its queries on the generation's vectors.")
    seconds: float = Field(description="Processor time of measuring it.")

    @property
    def reward(self) -> float:
        """M(edge, edge) M(edge, cloud)."""
        return self.self_test * self.cross_test


def best(candidates: Sequence[Candidate]) -> Candidate:
    """Return the candidate of the highest reward, the earliest of several."""
    return max(candidates, key=lambda candidate: candidate.reward)


def propose(
    space: Space,
    config: SearchConfig,
    measured: Sequence[Candidate],
    pending: Collection[Architecture],
    is_within: Callable[[Architecture], bool],
    seed: int,
) -> Architecture | None:
    """Return the network to try next, which was not tried yet and is within the limits; None where none is found.

    The first `population` are drawn; after that the best of `tournament` random members of the youngest `population`
    is changed in one place. What exceeds the limits is made smaller, step by step in random places, until it does not.
    The answer depends on the seed and on what was measured and is pending, and on nothing else.
    """
    tried = {candidate.architecture for candidate in measured} | set(pending)
    rng = np.random.default_rng([seed, len(tried)])
    youngest = measured[-config.population :]
    for _ in range(_ATTEMPTS):
        if len(tried) < config.population or not youngest:
            found: Architecture | None = space.draw(rng)
        else:
            drawn = rng.choice(len(youngest), size=min(config.tournament, len(youngest)), replace=False)
            found = space.mutate(best([youngest[int(place)] for place in drawn]).architecture, rng)
        while found is not None and not is_within(found):
            found = space.shrink(found, rng)
        if found is not None and found not in tried:
            return found
    return None
