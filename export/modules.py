"""One `nn.Module` per graph: the signature that a graph has, around diffusers' and transformers' own modules.

Dimensions: B images, n = 2 with classifier-free guidance or 1 without, G = n·B, P = G · the chunks of a prompt; H×W
pixels, h×w latents.
Tensors named `timestep`, `scale` and everything of the sampler stay float32 in every precision. What is wrapped is
of type Any, because neither diffusers nor transformers says what its modules' attributes are.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..bundles.manifest import GraphOptions
from .deep_feature import run_last_layer, run_last_up_block
from .hoists import count_last, count_up, cross_attentions, take_keys_and_values, take_time_embeds
from .shared_prefix import Text, add, run_down_blocks, run_up_blocks, time_embedding


class TextEncoder(nn.Module):
    """input_ids int64 [P,77], clip_skip int64 [P] → prompt_embeds [P,77,D].

    Of each row the hidden state that many layers before the last, after the final layer norm: `clip_skip` as diffusers'
    pipelines take it (`encode_prompt` in pipeline_stable_diffusion.py), for each row because they skip layers of the
    prompt and none of the negative prompt. At least one layer is left: beyond that nothing is skipped.
    """

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor, clip_skip: Tensor) -> Tensor:
        hidden = self.text_encoder(input_ids, output_hidden_states=True).hidden_states
        chosen = hidden[-1]
        # The first is the embeddings, before any layer. Selections instead of a gather: TensorRT fuses them, and their
        # shapes do not depend on the number of rows.
        for skipped in range(1, len(hidden) - 1):
            chosen = torch.where((clip_skip == skipped)[:, None, None], hidden[-1 - skipped], chosen)
        return self.text_encoder.final_layer_norm(chosen)


class Hint(nn.Module):
    """control_image uint8 [1,H,W,3] → hint [1,C0,h,w]: the ControlNet's conditioning embedding.

    It depends on nothing that changes from step to step, so it runs once per image instead of once per step.
    """

    def __init__(self, controlnet: Any) -> None:
        super().__init__()
        self.embedding = controlnet.controlnet_cond_embedding
        self.bgr = controlnet.config.controlnet_conditioning_channel_order == "bgr"

    def forward(self, control_image: Tensor) -> Tensor:
        image = control_image.to(torch.float32).div(255.0).permute(0, 3, 1, 2)
        if self.bgr:
            image = image.flip(1)
        return self.embedding(image.to(self.embedding.conv_in.weight.dtype))


class ControlNet(nn.Module):
    """A ControlNet whose hint comes in ready.

    model_input [B,4,h,w], timestep [1] or time_embeds [1,W], prompt_embeds [G,T,D] or keys_values, rows int64 [G], hint
    [B,C0,h,w], scales [R,G] → the R residuals [G,·,·,·]: `down_0` … `down_11` (in SD 1.5) and `mid`. Each has a scale
    of its own for each row of the batch: rows may belong to requests of different scales, and diffusers' `guess_mode`
    is a choice of scales (`runtime.control.scales`). `rows` says which image each row is of (`shared_prefix`).

    Args:
        options: which of time_embeds and keys_values it takes (`hoists`).
    """

    def __init__(self, controlnet: Any, options: GraphOptions) -> None:
        super().__init__()
        controlnet.controlnet_cond_embedding = nn.Identity()  # the hint comes in ready
        self.controlnet = _hoisted(controlnet, options)

    def forward(
        self,
        *,
        model_input: Tensor,
        timestep: Tensor | None = None,
        time_embeds: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        keys_values: tuple[Tensor, ...] | None = None,
        rows: Tensor,
        hint: Tensor,
        scales: Tensor,
    ) -> tuple[Tensor, ...]:
        net, text = self.controlnet, _text(prompt_embeds, keys_values)
        emb = _emb(net, timestep, time_embeds, None)
        sample, skips, emb = run_down_blocks(net, net.conv_in(model_input) + hint, emb, text, rows)
        mid = net.mid_block(sample, emb, encoder_hidden_states=text)
        down = [block(skip) for skip, block in zip(skips, net.controlnet_down_blocks, strict=True)]
        residuals = (*down, net.controlnet_mid_block(mid))
        columns = scales.to(model_input.dtype).reshape(len(scales), -1, 1, 1, 1)
        return tuple(residual * column for residual, column in zip(residuals, columns.unbind(), strict=True))


class UNet(nn.Module):
    """A UNet that is always given a ControlNet's residuals.

    model_input [B,4,h,w], timestep [1] or time_embeds [1,W], prompt_embeds [G,T,D] or keys_values, rows int64 [G],
    residuals (down_0 … mid) [G,·,·,·] → noise_pred [G,4,h,w]. T is 77, or 77 for each chunk of a long prompt. `rows`
    says which image each row of the batch is of (`shared_prefix`). A UNet that was distilled with its guidance scale as
    an input takes timestep_cond [B,E] too, that scale's embedding, or has it in time_embeds [B,W].

    Args:
        options: which of time_embeds and keys_values it takes (`hoists`).
    """

    def __init__(self, unet: Any, options: GraphOptions) -> None:
        super().__init__()
        self.unet = _hoisted(unet, options)

    def forward(
        self,
        *,
        model_input: Tensor,
        timestep: Tensor | None = None,
        time_embeds: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        keys_values: tuple[Tensor, ...] | None = None,
        rows: Tensor,
        residuals: tuple[Tensor, ...],
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        text = _text(prompt_embeds, keys_values)
        emb = _emb(self.unet, timestep, time_embeds, timestep_cond)
        sample, skips, emb = _way_down(self.unet, model_input, emb, text, rows)
        return run_up_blocks(self.unet, sample + residuals[-1], add(skips, residuals[:-1]), emb, text)


class UNetWithDeepFeature(nn.Module):
    """`UNet` with one output more: deep [G,C,h,w], what its outermost layer is given from below (`deep_feature`)."""

    def __init__(self, unet: Any, options: GraphOptions) -> None:
        super().__init__()
        self.unet = _hoisted(unet, options)

    def forward(
        self,
        *,
        model_input: Tensor,
        timestep: Tensor | None = None,
        time_embeds: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        keys_values: tuple[Tensor, ...] | None = None,
        rows: Tensor,
        residuals: tuple[Tensor, ...],
        timestep_cond: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        text, deep = _text(prompt_embeds, keys_values), []
        emb = _emb(self.unet, timestep, time_embeds, timestep_cond)
        sample, skips, emb = _way_down(self.unet, model_input, emb, text, rows)

        def last(block: Any, sample: Tensor, skips: tuple[Tensor, ...]) -> Tensor:
            sample, feature = run_last_up_block(block, sample, skips, emb, text)
            deep.append(feature)
            return sample

        noise_pred = run_up_blocks(self.unet, sample + residuals[-1], add(skips, residuals[:-1]), emb, text, last)
        return noise_pred, deep[0]


class ShallowUNet(nn.Module):
    """A UNet of which only the outermost layer runs (`deep_feature`).

    Inputs as `UNet`, but for the residuals: down_0 [G,C0,h,w], the ControlNet's residual of the first skip connection,
    and deep [G,C,h,w], as `UNetWithDeepFeature` gives it → noise_pred [G,4,h,w]. keys_values are those of its own
    cross-attentions.
    """

    def __init__(self, unet: Any, options: GraphOptions) -> None:
        super().__init__()
        self.unet = _hoisted(unet, options)
        # The cross-attentions count from the first of the whole UNet.
        self._before = 2 * (len(cross_attentions(unet)) - count_last(unet))
        unet.down_blocks, unet.mid_block = nn.ModuleList(), nn.Identity()
        unet.up_blocks = unet.up_blocks[-1:]

    def forward(
        self,
        *,
        model_input: Tensor,
        timestep: Tensor | None = None,
        time_embeds: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        keys_values: tuple[Tensor, ...] | None = None,
        rows: Tensor,
        down_0: Tensor,
        deep: Tensor,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        unet = self.unet
        sample = 2 * model_input - 1 if unet.config.center_input_sample else model_input
        emb = _emb(unet, timestep, time_embeds, timestep_cond)
        emb = emb if emb.shape[0] == 1 else emb.index_select(0, rows)
        skip = unet.conv_in(sample).index_select(0, rows) + down_0
        text: Any = prompt_embeds if keys_values is None else ((None,) * self._before + keys_values)
        sample = run_last_layer(unet.up_blocks[0], deep, skip, emb, text)
        output: Tensor = unet.conv_out(unet.conv_act(unet.conv_norm_out(sample)))
        return output


class UNetEncoder(nn.Module):
    """A UNet's way down and its middle, which need no ControlNet: inputs as `UNet` → skip_0 …, encoded [G,·,·,·].

    keys_values are those of its own cross-attentions.
    """

    def __init__(self, unet: Any, options: GraphOptions) -> None:
        super().__init__()
        self.unet = _hoisted(unet, options)
        unet.up_blocks = nn.ModuleList()

    def forward(
        self,
        *,
        model_input: Tensor,
        timestep: Tensor | None = None,
        time_embeds: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        keys_values: tuple[Tensor, ...] | None = None,
        rows: Tensor,
        timestep_cond: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        emb = _emb(self.unet, timestep, time_embeds, timestep_cond)
        sample, skips, _ = _way_down(self.unet, model_input, emb, _text(prompt_embeds, keys_values), rows)
        return *skips, sample


class UNetDecoder(nn.Module):
    """A UNet's way up: what `UNetEncoder` gives, residuals and the other inputs of `UNet` → noise_pred [G,4,h,w].

    keys_values are those of its own cross-attentions. `rows` only where the time embedding has a row for each image.
    """

    def __init__(self, unet: Any, options: GraphOptions) -> None:
        super().__init__()
        self.unet = _hoisted(unet, options)
        # The cross-attentions count from the first of the whole UNet.
        self._before = 2 * (len(cross_attentions(unet)) - count_up(unet))
        unet.down_blocks, unet.mid_block = nn.ModuleList(), nn.Identity()

    def forward(
        self,
        *,
        timestep: Tensor | None = None,
        time_embeds: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        keys_values: tuple[Tensor, ...] | None = None,
        rows: Tensor | None = None,
        skips: tuple[Tensor, ...],
        encoded: Tensor,
        residuals: tuple[Tensor, ...],
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        emb = _emb(self.unet, timestep, time_embeds, timestep_cond)
        if rows is not None:
            emb = emb.index_select(0, rows)
        text: Any = prompt_embeds if keys_values is None else ((None,) * self._before + keys_values)
        return run_up_blocks(self.unet, encoded + residuals[-1], add(skips, residuals[:-1]), emb, text)


def _hoisted(model: Any, options: GraphOptions) -> Any:
    """The model, changed to take what is computed before the loop."""
    if options.hoist_prompt:
        take_keys_and_values(model)
    if options.hoist_time:
        take_time_embeds(model)
    return model


def _emb(model: Any, timestep: Tensor | None, time_embeds: Tensor | None, timestep_cond: Tensor | None) -> Tensor:
    if time_embeds is not None:
        return time_embeds
    assert timestep is not None
    return time_embedding(model, timestep, timestep_cond)


def _text(prompt_embeds: Tensor | None, keys_values: tuple[Tensor, ...] | None) -> Text:
    text = prompt_embeds if keys_values is None else keys_values
    assert text is not None
    return text


def _way_down(
    unet: Any, model_input: Tensor, emb: Tensor, text: Text, rows: Tensor
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """As `run_down_blocks`, from the model's input to the middle block's output."""
    sample = 2 * model_input - 1 if unet.config.center_input_sample else model_input
    sample, skips, emb = run_down_blocks(unet, unet.conv_in(sample), emb, text, rows)
    return unet.mid_block(sample, emb, encoder_hidden_states=text), skips, emb


class AddResiduals(nn.Module):
    """Sums the residuals of two ControlNets, as diffusers' `MultiControlNetModel` does."""

    def forward(self, residuals: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return add(residuals, others)


class Update(nn.Module):
    """One step of any sampler: guidance, the step itself, and the next model input.

    noise_pred [n,B,4,h,w] (the UNet's [G,4,h,w], viewed), guidance float32 [n,B] (weights that sum to 1 over n:
    `[1 - s, s]` for an image of guidance scale s, or `[1]`), state float32 [4,B,4,h,w] (x, the x before, the last two
    x0 predictions), coefficients float32 [5,7], x0_limit float32 [1], noise float32 [B,4,h,w] → new state float32
    [4,B,4,h,w], model_input [B,4,h,w], magnitude float32 [1].

    `runtime.schedulers` makes the coefficients. The first six columns are linear in state, noise_pred and noise; their
    third row is the step's prediction of x0. The seventh multiplies what clamping that prediction to ±x0_limit adds to
    it: exactly 0 where nothing is beyond the limit, so that samplers which do not clip are left as they are.

    `magnitude` is the mean absolute value of the new state: not finite as soon as anything in it is not, whichever
    graph the first NaN came from, and so the loop's cheap health check.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(
        self,
        noise_pred: Tensor,
        guidance: Tensor,
        state: Tensor,
        coefficients: Tensor,
        x0_limit: Tensor,
        noise: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        guided = (guidance[:, :, None, None, None] * noise_pred.to(torch.float32)).sum(0)
        rows = torch.cat([state, guided.unsqueeze(0), noise.unsqueeze(0)])
        linear = torch.tensordot(coefficients[:, :6], rows, dims=1)
        x0 = linear[2]
        # Not torch.clamp: with bounds that are tensors, Min and Max are what every backend has.
        clipped = torch.minimum(torch.maximum(x0, -x0_limit), x0_limit) - x0
        new = linear + coefficients[:, 6].reshape(5, 1, 1, 1, 1) * clipped
        return new[:4], new[4].to(self.dtype), new[:4].abs().mean().reshape(1)


class VaeDecoder(nn.Module):
    """latents float32 [B,4,h,w] → image uint8 [B,H,W,3], magnitude float32 [1]: scaling, decoder, clamp and rounding.

    Rounds half to even, as NumPy does in diffusers' `numpy_to_pil`. TensorRT accepts uint8 only as the very last cast.
    `magnitude` is the mean absolute value before clamping, which would make a level of a NaN: it alone shows one.
    """

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        latents = latents / self.vae.config.scaling_factor
        decoded = self.vae.decode(latents.to(self.vae.dtype), return_dict=False)[0].to(torch.float32)
        image = (decoded / 2 + 0.5).clamp(0, 1)
        return (image * 255).round().permute(0, 2, 3, 1).to(torch.uint8), decoded.abs().mean().reshape(1)


class VaeEncoder(nn.Module):
    """image uint8 [B,H,W,3], noise float32 [B,4,h,w] → latents float32 [B,4,h,w]: a scaled sample of the posterior."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, image: Tensor, noise: Tensor) -> Tensor:
        posterior = self.vae.encode(_pixels(image).to(self.vae.dtype), return_dict=False)[0]
        sample = posterior.mean.to(torch.float32) + posterior.std.to(torch.float32) * noise
        return sample * self.vae.config.scaling_factor


class TinyVaeEncoder(nn.Module):
    """image uint8 [B,H,W,3] → latents float32 [B,4,h,w]: an AutoencoderTiny's encoder, which draws nothing."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, image: Tensor) -> Tensor:
        latents = self.vae.encode(_pixels(image).to(self.vae.dtype), return_dict=False)[0]
        return latents.to(torch.float32) * self.vae.config.scaling_factor


def _pixels(image: Tensor) -> Tensor:
    """uint8 [B,H,W,3] → float32 [B,3,H,W] in [-1,1]."""
    return image.to(torch.float32).div(255.0).mul(2.0).sub(1.0).permute(0, 3, 1, 2)
