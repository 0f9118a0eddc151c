"""What decides which launches a request has, and in which order they run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LoopShape:
    """Everything that decides which buffers there are, and what launches may be bound to them.

    Attributes:
        images: B, of all requests together.
        guided: whether the batch is doubled for classifier-free guidance.
        controls: conditions in their order.
        uncontrolled: whether there are steps at which no control applies.
        chunks: of 77 tokens that a prompt has.
    """

    images: int
    guided: bool
    controls: tuple[str, ...] = ()
    uncontrolled: bool = True
    chunks: int = 1


@dataclass(frozen=True)
class StepKind:
    """What decides which launches a step has, and what they are bound to.

    Attributes:
        active: for each control, whether it applies.
        state: which of the two state buffers the step reads, 0 or 1; it writes the other one.
    """

    active: tuple[bool, ...]
    state: int


@dataclass(frozen=True)
class Schedule:
    """The steps of a request.

    Attributes:
        active: for each control, at which steps it applies ([N] booleans).
        noisy: at which steps the sampler adds fresh noise ([N] booleans).
    """

    active: tuple[tuple[bool, ...], ...]
    noisy: tuple[bool, ...]

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
        return StepKind(tuple(active[k] for active in self.active), (self.steps - k) % 2)
