"""The optimizer of every stage: Muon for matrices and convolutions, AdamW for the rest."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by Newton-Schulz steps (Jordan et al., 2024).

    `torch.optim.Muon` takes two-dimensional weights only; here a convolution [out, in, k, k] counts as the matrix
    [out, in·k·k]. Updates have AdamW's root mean square, after Liu et al., arXiv 2502.16982, section 2.2.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates the parameters from their gradients."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(p.grad)
                update = orthogonal((p.grad + group["momentum"] * buffer).reshape(p.shape[0], -1))
                p.add_(update.reshape(p.shape), alpha=-0.2 * group["lr"] * math.sqrt(max(update.shape)))


def orthogonal(matrix: Tensor) -> Tensor:
    """Roughly U·Vᵀ of the singular value decomposition, by five quintic Newton-Schulz steps."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


class Trainer:
    """Parameters, their two optimizers, a warm-up and cosine schedule over `steps`, and an exponential average.

    Args:
        lr: peak learning rate of both optimizers.
        ema: decay of the average; it starts lower, so that early steps count.
    """

    def __init__(self, modules: list[nn.Module], steps: int, lr: float, ema: float = 0.995, warmup: int = 50) -> None:
        self.modules, self.steps, self.lr, self.ema, self.warmup = modules, steps, lr, ema, warmup
        params = [p for m in modules for p in m.parameters() if p.requires_grad]
        self.vectors = [p for p in params if p.ndim < 2]
        matrices = [p for p in params if p.ndim >= 2]
        self.optimizers: list[torch.optim.Optimizer] = [Muon(matrices, lr)]
        if self.vectors:
            self.optimizers.append(torch.optim.AdamW(self.vectors, lr=lr, weight_decay=0.0))
        self.average = {id(p): p.detach().clone() for p in params}
        self.params = params
        self.done = 0

    def step(self, loss: Tensor) -> None:
        """One step of both optimizers down `loss`."""
        self.done += 1
        rate = min(1.0, self.done / self.warmup) * 0.5 * (1 + math.cos(math.pi * self.done / (self.steps + 1)))
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = self.lr * rate
        loss.backward()
        if self.vectors:
            nn.utils.clip_grad_norm_(self.vectors, 1.0)
        decay = min(self.ema, (1 + self.done) / (10 + self.done))
        for optimizer in self.optimizers:
            optimizer.step()
        with torch.no_grad():
            for p in self.params:
                self.average[id(p)].lerp_(p, 1 - decay)

    def finish(self) -> None:
        """Puts the averages in place of the parameters."""
        with torch.no_grad():
            for p in self.params:
                p.copy_(self.average[id(p)])
