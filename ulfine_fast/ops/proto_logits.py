"""Prototype-similarity logits: the scaled cosine of every feature with every class prototype."""

from __future__ import annotations

import torch
from torch import Tensor

from ulfine_fast import _cuda, _native
from ulfine_fast.backend import choose
from ulfine_fast.ops import _checks
from ulfine_fast.ops._handover import once
from ulfine_fast.ops._rows import unit_rows, without_autocast, working_dtype


@without_autocast
def proto_logits_reference(features: Tensor, prototypes: Tensor, scale: float) -> Tensor:
    """The definition; see `proto_logits`."""
    dtype = working_dtype(features, prototypes)
    logits = scale * (unit_rows(features, dtype) @ unit_rows(prototypes, dtype).T)
    return logits.to(features.dtype)


torch.library.define(
    "ulfine::_proto_logits", "(Tensor features, Tensor prototypes, float scale, str backend) -> Tensor"
)
torch.library.define(
    "ulfine::_proto_logits_backward",
    "(Tensor grad, Tensor features, Tensor prototypes, float scale, bool need_features, "
    "bool need_prototypes, str backend) -> (Tensor, Tensor)",
)


@torch.library.register_fake("ulfine::_proto_logits")
def _(features, prototypes, scale, backend):
    return features.new_empty(features.shape[0], prototypes.shape[0])


@torch.library.register_fake("ulfine::_proto_logits_backward")
def _(grad, features, prototypes, scale, need_features, need_prototypes, backend):
    return (
        torch.empty_like(features, memory_format=torch.contiguous_format)
        if need_features
        else features.new_empty(0),
        torch.empty_like(prototypes, memory_format=torch.contiguous_format)
        if need_prototypes
        else prototypes.new_empty(0),
    )


@torch.library.impl("ulfine::_proto_logits", ("cpu", "cuda"))
def _(features, prototypes, scale, backend):
    if backend == "triton":
        from ulfine_fast.kernels.proto_logits import proto_logits_triton

        return proto_logits_triton(features, prototypes, scale)
    return (_cuda if backend == "cuda" else _native).proto_logits(features, prototypes, scale)


@torch.library.impl("ulfine::_proto_logits_backward", ("cpu", "cuda"))
def _(grad, features, prototypes, scale, need_features, need_prototypes, backend):
    arguments = grad, features, prototypes, scale, need_features, need_prototypes
    if backend == "triton":
        from ulfine_fast.kernels.proto_logits import proto_logits_backward_triton

        return proto_logits_backward_triton(*arguments)
    return (_cuda if backend == "cuda" else _native).proto_logits_backward(*arguments)


class _ProtoLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, prototypes, scale, backend):
        ctx.save_for_backward(features, prototypes)
        ctx.scale, ctx.backend = scale, backend
        return torch.ops.ulfine._proto_logits.default(features, prototypes, scale, backend)

    @staticmethod
    @once("proto_logits")
    def backward(ctx, grad):
        features, prototypes = ctx.saved_tensors
        need_features, need_prototypes = ctx.needs_input_grad[:2]
        d_features, d_prototypes = torch.ops.ulfine._proto_logits_backward.default(
            grad, features, prototypes, ctx.scale, need_features, need_prototypes, ctx.backend
        )
        return (
            d_features if need_features else None,
            d_prototypes if need_prototypes else None,
            None,
            None,
        )


def proto_logits(
    features: Tensor, prototypes: Tensor, scale: float = 25.0, *, backend: str | None = None
) -> Tensor:
    """`scale * cosine(features, prototypes)`, differentiable in both; a second derivative raises on a kernel.

        logits_ik = scale * <x_i, p_k>,   x = features / |features|,  p = prototypes / |prototypes|

    Source: the similarity logits of CLIP, and the textual branch of ULFine (arXiv 2505.05062).

    Args:
        features: [B, D] float32, bfloat16, float16 or float64; any norm up to 1e18, B may be 0.
        prototypes: [C, D] float, C >= 1; any norm up to 1e18.
        scale: inverse temperature, a finite number above 0.
        backend: None (the selected one), "auto", "reference", "cpp", "triton" or "cuda".

    Returns:
        [B, C] in the dtype of `features`, each in [-scale, scale]. Sums are accumulated in float32 (float64
        for float64 input) and rounded once. A row of norm <= 1e-6 gives logits 0 and gets gradient 0; a
        row with a NaN or an infinity gives NaN.

    Raises:
        ValueError, TypeError: wrong shape, dtype, device or scale. RuntimeError: the named back end cannot
        run.
    """
    _checks.matrix("proto_logits", "features", features)
    _checks.bank("proto_logits", "prototypes", prototypes, features.shape[1])
    _checks.same_device("proto_logits", features, prototypes=prototypes)
    _checks.positive("proto_logits", "scale", scale)
    chosen = choose("proto_logits", features, len(prototypes), working_dtype(features, prototypes), backend)
    if chosen == "reference":
        return proto_logits_reference(features, prototypes, float(scale))
    return _ProtoLogits.apply(features, prototypes, float(scale), chosen)
