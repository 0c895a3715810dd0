"""Muon for the matrices of the network, AdamW for embeddings, norms and other small tensors, one learning-rate schedule for both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonalise(g: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices of g [N,R,C] by the quintic Newton-Schulz iteration in bf16 (Jordan et al. 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    transposed = x.shape[-2] > x.shape[-1]
    if transposed:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        xx = x @ x.mT
        x = a * x + (b * xx + c * xx @ xx) @ x
    return x.mT if transposed else x


class Muon(torch.optim.Optimizer):
    """Momentum followed by orthogonalisation. Matrices of one shape are stacked, so that a step is a few large products."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[tuple(p.shape)].append(p)
            for parameters in shapes.values():
                grads = [p.grad for p in parameters]
                buffers = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in parameters]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                nesterov = torch._foreach_lerp(grads, buffers, group["momentum"])
                stack = torch.stack(nesterov).flatten(0, -3)
                scale = max(1.0, stack.shape[-2] / stack.shape[-1]) ** 0.5
                update = orthogonalise(stack).float().view(len(parameters), *parameters[0].shape)
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, list(update.unbind()), alpha=-group["lr"] * scale)


def make_optimizers(module: nn.Module, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    matrices: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    small: list[nn.Parameter] = []
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        if p.dim() < 2 or "conv1d" in name or min(p.shape[-2:]) < 8:
            small.append(p)
        elif "embed_tokens" in name:
            decayed.append(p)
        else:
            matrices.append(p)
    adam = [{"params": decayed, "weight_decay": 0.01}, {"params": small, "weight_decay": 0.0}]
    fused = next(module.parameters()).is_cuda
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([g for g in adam if g["params"]], lr=adam_lr, betas=(0.9, 0.95), fused=fused)
    ]
    if matrices:
        optimizers.append(Muon(matrices, lr=muon_lr))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_schedule(optimizers: list[torch.optim.Optimizer], step: int, progress: float, warmup: int = 100, decay: float = 0.45) -> None:
    """Linear warm-up over `warmup` steps, constant, then linear to zero over the last `decay` of the run (progress 0..1)."""
    factor = min(1.0, (step + 1) / warmup) * min(1.0, max(0.0, (1.0 - progress) / decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


def update(loss: Tensor, parameters: Iterable[nn.Parameter], optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """One step down the loss, of a gradient of at most length 1."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
