"""Every kind of fuzzed input, by name."""

from . import bundles, checkpoints, commands, jobs, measurements, pictures, presets
from .kind import Maker

KINDS: dict[str, Maker] = {
    "manifest": bundles.manifest,
    "bit": bundles.bit,
    "recipe": bundles.recipe,
    "tokenizer": bundles.tokenizer,
    "plan": bundles.plan,
    "scheduler": bundles.scheduler,
    "config": checkpoints.config,
    "weights": checkpoints.weights,
    "adapter": checkpoints.adapter,
    "metadata": pictures.metadata,
    "image": pictures.image,
    "prompt": pictures.prompt,
    "result": measurements.result,
    "records": measurements.records,
    "dataset": measurements.dataset,
    "thresholds": measurements.thresholds,
    "rows": jobs.rows,
    "preset": presets.preset,
    "arguments": commands.arguments,
    "command": commands.command,
}
