"""Backward of the kernels: once, and from gradients that the forward pass may already have computed.

Autograd takes a gradient over without a copy when nothing else holds it, so the first backward pass hands the
buffers out and forgets them. A second one through a retained graph computes them again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps

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


class _Final(torch.autograd.Function):
    """The first `count` tensors as they are; a derivative of them in any of the tensors raises."""

    @staticmethod
    def forward(ctx, op, count, *tensors):
        ctx.op = op
        return tensors[:count]

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"{ctx.op}: kernels have no second derivative; use backend='reference', which has every one"
        )


def once(op: str) -> Callable:
    """Decorator of the `backward` of `op`: its gradients refuse to be differentiated again.

    Torch's own `once_differentiable` refuses only where the incoming gradient requires one, so that a penalty on a
    gradient would be left out in silence.
    """

    def decorate(backward: Callable) -> Callable:
        @wraps(backward)
        def run(ctx, *grads):
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            with torch.no_grad():
                gradients = backward(ctx, *grads)
            # A compiled backward pass refuses by itself.
            if torch.compiler.is_compiling():
                return gradients
            given = [gradient for gradient in gradients if gradient is not None]
            final = iter(_Final.apply(op, len(given), *given, *ctx.saved_tensors, *grads))
            return tuple(None if gradient is None else next(final) for gradient in gradients)

        return run

    return decorate
