"""Backward of ops whose forward pass already computed the gradients.

Autograd takes a gradient over without a copy when nothing else holds it, so the first backward pass hands the
buffers out and forgets them. A second one through a retained graph computes them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def keep(ctx, gradients: Sequence[Tensor], inputs: Sequence[Tensor | None]) -> None:
    """In forward: keep the `gradients`, and the `inputs` to compute them again from."""
    # Asked once: a compiler may trace backward alone, after a forward pass that ran as it stands.
    ctx.compiled = torch.compiler.is_compiling()
    if ctx.compiled:
        # A compiled graph runs backward once per forward and can't forget: it saves the gradients.
        ctx.save_for_backward(*gradients)
        return
    ctx.save_for_backward(*inputs)
    ctx.gradients = gradients


def hand_over(
    ctx, grad: Tensor, again: Callable[[Sequence[Tensor | None]], Sequence[Tensor]]
) -> Sequence[Tensor]:
    """In backward: the kept gradients times the scalar `grad`; `again` computes them from the inputs."""
    if ctx.compiled:
        return [gradient * grad for gradient in ctx.saved_tensors]
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:
        gradients = again(ctx.saved_tensors)
    if grad.device.type != "cpu" or grad.item() != 1.0:
        torch._foreach_mul_(gradients, grad)
    return gradients
