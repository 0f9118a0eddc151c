"""What decides which launches a request has, and in which order they run."""

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class LoopShape:
    """Everything that decides which buffers there are, and what launches may be bound to them.

    Attributes:
        images: B, of all requests together.
        guided: whether the batch is doubled for classifier-free guidance.
        controls: conditions in their order.
        uncontrolled: whether there are steps at which no control applies.
        chunks: of 77 tokens that a prompt has.
        unguided_steps: whether there are steps without guidance although it is `guided`.
        shallow_steps: whether there are steps at which only the UNet's outermost layer runs.
    """

    images: int
    guided: bool
    controls: tuple[str, ...] = ()
    uncontrolled: bool = True
    chunks: int = 1
    unguided_steps: bool = False
    shallow_steps: bool = False


@dataclass(frozen=True)
class StepKind:
    """What decides which launches a step has, and what they are bound to.

    Attributes:
        active: for each control, whether it applies.
        state: which of the two state buffers the step reads, 0 or 1; it writes the other one.
        unguided: whether the step runs without guidance, on B rows, in a request that is guided.
        reuses_residuals: whether the ControlNets rest: the UNet reads what they gave last.
        shallow: whether only the UNet's outermost layer runs, and no ControlNet.
    """

    active: tuple[bool, ...]
    state: int
    unguided: bool = False
    reuses_residuals: bool = False
    shallow: bool = False


@dataclass(frozen=True)
class Schedule:
    """The steps of a request. All of it is decided before the first step, from the request alone.

    Attributes:
        active: for each control, at which steps it applies ([N] booleans).
        noisy: at which steps the sampler adds fresh noise ([N] booleans).
        unguided: at which steps guidance is left out ([N] booleans); empty for none.
        controlnet_interval: how many steps a ControlNet's residuals serve.
        cache_interval: how many steps the UNet's deeper layers serve.
    """

    active: tuple[tuple[bool, ...], ...]
    noisy: tuple[bool, ...]
    unguided: tuple[bool, ...] = ()
    controlnet_interval: int = 1
    cache_interval: int = 1

    @property
    def steps(self) -> int:
        """N."""
        return len(self.noisy)

    @property
    def uncontrolled(self) -> bool:
        """Whether there are steps at which no control applies."""
        return not all(any(active[k] for active in self.active) for k in range(self.steps))

    def kind(self, k: int) -> StepKind:
        """The kind of step k. The last step of every schedule writes the state buffer 0."""
        return self.kinds[k]

    @cached_property
    def kinds(self) -> tuple[StepKind, ...]:
        """The kind of every step.

        What was computed is used again for as many steps as the intervals say, but never by a step with another batch
        or other controls than the step that it is of.
        """
        found: list[StepKind] = []
        rows, deep, residuals = None, 0, 0  # of what there is to use again, and since how many steps
        for k in range(self.steps):
            active, unguided = tuple(steps[k] for steps in self.active), bool(self.unguided) and self.unguided[k]
            same, rows = rows == (active, unguided), (active, unguided)
            deep, residuals = deep + 1, residuals + 1
            shallow = same and deep < self.cache_interval
            reuses = same and any(active) and residuals < self.controlnet_interval and not shallow
            deep = deep if shallow else 0
            residuals = residuals if shallow or reuses else 0
            found.append(StepKind(active, (self.steps - k) % 2, unguided, reuses, shallow))
        return tuple(found)
