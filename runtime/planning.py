"""From requests to launch lists: what follows from a request before anything is computed, and which run together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..bundles.bundle import Bundle
from ..bundles.graph_names import SHALLOW
from ..errors import BundleError, UserError
from ..messages import printable
from .init_image import first_step
from .sampling.schedulers import UNLIMITED, SamplerTable, build_table
from .settings.request import Control, Request, ResolvedRequest, steps_within
from .shape import LoopShape, Schedule
from .text.prompts import Prompts, read_prompts
from .text.tokenizer import Tokenizer

# At other sizes the prompt's rows of a batch would not be aligned as TensorRT needs them.
_WHOLE = 64


@dataclass(frozen=True, eq=False)
class Plan:
    """A request with all that follows from it before anything is computed.

    Attributes:
        shape: of this request alone.
        schedule: its steps.
    """

    request: ResolvedRequest
    prompts: Prompts
    table: SamplerTable
    shape: LoopShape
    schedule: Schedule
    notes: tuple[str, ...]

    @property
    def key(self) -> tuple[object, ...]:
        """Requests that share it can run in one launch list: they have one loop shape and one table."""
        r = self.request
        sampler = r.scheduler, r.timestep_spacing, r.num_inference_steps, first_step(r)
        return replace(self.shape, images=0), self.schedule, *sampler


def plan_request(bundle: Bundle, tokenizer: Tokenizer, request: ResolvedRequest) -> Plan:
    """All that follows from a request before anything is computed.

    Raises:
        UserError: the request asks for what the bundle does not have, or has a value that this model cannot use.
    """
    m = bundle.manifest
    for control in request.controls:
        bundle.require_condition(control.condition)
    if request.cache_interval > 1 and SHALLOW not in m.graphs:
        raise UserError(
            f"cache_interval needs the graph {SHALLOW}, which {printable(bundle.folder)} lacks: export it with "
            "`cnpp-trt export --cond all --deep-cache`, or leave cache_interval at 1"
        )
    if request.guidance_interval > 1 and (m.width % _WHOLE or m.height % _WHOLE):
        raise UserError(
            f"guidance_interval needs a width and height that are multiples of {_WHOLE}, not {m.width}x{m.height}: "
            "leave it at 1, or export that size"
        )
    if request.clip_skip >= m.text_encoder_layers:
        raise UserError(f"clip_skip must be from 0 to {m.text_encoder_layers - 1}, not {request.clip_skip}")
    table = build_table(
        request.scheduler,
        m.scheduler_config,
        request.num_inference_steps,
        first_step(request),
        request.timestep_spacing,
    )
    notes = []
    if table.x0_limit < UNLIMITED:
        notes.append(
            f"{request.scheduler} clips what each step predicts to ±{table.x0_limit:g}: clip_sample in the model's "
            "scheduler config, or diffusers' default where it is not there"
        )
    prompts, remarks = read_prompts(tokenizer, request, is_guided(bundle, request))
    schedule = loop_schedule(bundle, request, table)
    shape = loop_shape(bundle, request, schedule, prompts.chunks)
    return Plan(request, prompts, table, shape, schedule, (*notes, *remarks))


def loop_schedule(bundle: Bundle, request: ResolvedRequest, table: SamplerTable) -> Schedule:
    """The steps of a request; `table` is its sampler's."""
    n = len(table.timesteps)
    guided = steps_within(request.guidance_start, request.guidance_end, n)
    return Schedule(
        active=tuple(c.active(n) for c in request.controls),
        noisy=tuple(bool(b) for b in table.uses_noise),
        unguided=() if all(guided) or not is_guided(bundle, request) else tuple(not g for g in guided),
        guidance_interval=request.guidance_interval if is_guided(bundle, request) else 1,
        controlnet_interval=request.controlnet_interval,
        cache_interval=request.cache_interval,
    )


def loop_shape(bundle: Bundle, request: ResolvedRequest, schedule: Schedule, chunks: int = 1) -> LoopShape:
    """What of a request decides which launches there are."""
    return LoopShape(
        images=request.num_images_per_prompt,
        guided=is_guided(bundle, request),
        controls=tuple(c.condition for c in request.controls),
        uncontrolled=schedule.uncontrolled,
        chunks=chunks,
        unguided_steps=any(kind.unguided for kind in schedule.kinds),
        reused_guidance=any(kind.reuses_guidance for kind in schedule.kinds),
        shallow_steps=any(kind.shallow for kind in schedule.kinds),
    )


def is_guided(bundle: Bundle, request: ResolvedRequest) -> bool:
    """Whether the batch is doubled for classifier-free guidance: never for a distilled UNet, as diffusers has it."""
    return request.guided and bundle.guidance_width is None


def launch_lists(plans: Sequence[Plan], max_images: int) -> list[list[int]]:
    """The indices of the plans that run together, each list of at most `max_images` images, or of one request."""
    groups: dict[tuple[object, ...], list[list[int]]] = {}
    for i, plan in enumerate(plans):
        lists = groups.setdefault(plan.key, [[]])
        images = sum(plans[j].shape.images for j in lists[-1]) + plan.shape.images
        if lists[-1] and images > max_images:
            lists.append([])
        lists[-1].append(i)
    return [indices for lists in groups.values() for indices in lists]


def open_tokenizer(bundle: Bundle) -> Tokenizer:
    """The bundle's tokenizer.

    Raises:
        BundleError: it cannot be read, or makes prompts that the text encoder does not take.
    """
    m = bundle.manifest
    tokenizer = Tokenizer(bundle.tokenizer_folder(), m.embeddings, m.vocabulary or None)
    positions = int(bundle.graph("text_encoder").outputs[0].shape[1])
    if tokenizer.model_max_length != positions:
        raise BundleError(
            f"the tokenizer of {bundle.folder} makes prompts of {tokenizer.model_max_length} tokens, its text encoder "
            f"reads {positions}: export the bundle anew"
        )
    return tokenizer


def smallest_request(bundle: Bundle) -> Request:
    """The bundle's first condition, with the model's defaults, on an empty control image."""
    m = bundle.manifest
    blank = np.zeros((m.height, m.width, 3), np.uint8)
    return Request(controls=[Control(c, blank) for c in list(m.conditions)[:1]], seed=0)
