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
        unguided_steps: whether there are steps of B rows although it is `guided`.
        reused_guidance: whether at some of them an earlier step's guidance is used again.
        shallow_steps: whether there are steps at which only the UNet's outermost layer runs.
    """

    images: int
    guided: bool
    controls: tuple[str, ...] = ()
    uncontrolled: bool = True
    chunks: int = 1
    unguided_steps: bool = False
    reused_guidance: bool = False
    shallow_steps: bool = False


@dataclass(frozen=True)
class StepKind:
    """What decides which launches a step has, and what they are bound to.

    Attributes:
        active: for each control, whether it applies.
        state: which of the two state buffers the step reads, 0 or 1; it writes the other one.
        unguided: whether the step runs on B rows, the prompt's alone, in a request that is guided.
        reuses_guidance: whether guidance then adds the difference of both sides that it computed last, instead of none.
        reuses_residuals: whether the ControlNets rest: the UNet reads what they gave last.
        shallow: whether only the UNet's outermost layer runs, and no ControlNet.
    """

    active: tuple[bool, ...]
    state: int
    unguided: bool = False
    reuses_guidance: bool = False
    reuses_residuals: bool = False
    shallow: bool = False


@dataclass(frozen=True)
class Schedule:
    """The steps of a request. All of it is decided before the first step, from the request alone.

    Attributes:
        active: for each control, at which steps it applies ([N] booleans).
        noisy: at which steps the sampler adds fresh noise ([N] booleans).
        unguided: at which steps guidance is left out ([N] booleans); empty for none.
        guidance_interval: how many steps the difference of guidance's two sides serves.
        controlnet_interval: how many steps a ControlNet's residuals serve.
        cache_interval: how many steps the UNet's deeper layers serve.
    """

    active: tuple[tuple[bool, ...], ...]
    noisy: tuple[bool, ...]
    unguided: tuple[bool, ...] = ()
    guidance_interval: int = 1
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

        What was computed is used again for as many steps as the intervals say, but never by a step with other controls
        or on the other side of an end of `unguided` than the step that it is of, nor for rows that it was not computed
        for: a step that reuses guidance computes the prompt's rows alone, and can use those of a step of both sides.
        """
        found: list[StepKind] = []
        of = None  # what decides whether the step before left anything to use again
        guided_at = deep_at = residuals_at = 0  # the steps that computed it
        for k in range(self.steps):
            active, unguided = tuple(steps[k] for steps in self.active), bool(self.unguided) and self.unguided[k]
            same, of = of == (active, unguided), (active, unguided)
            again = same and not unguided and k - guided_at < self.guidance_interval
            shallow = same and k - deep_at < self.cache_interval and (again or not found[deep_at].reuses_guidance)
            rests = not shallow and same and any(active) and k - residuals_at < self.controlnet_interval
            rests = rests and (again or not found[residuals_at].reuses_guidance)
            if not again:
                guided_at = k
            if not shallow:
                deep_at = k
            if not (shallow or rests):
                residuals_at = k
            found.append(StepKind(active, (self.steps - k) % 2, unguided or again, again, rests, shallow))
        return tuple(found)
