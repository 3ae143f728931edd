"""Bridge to the CUDA kernels: products by cuBLAS through torch, the passes over rows by our launchers.

The launchers know nothing of torch: they take addresses on the device, sizes and a stream.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ulfine_fast._native import _C


def proto_logits(features: Tensor, prototypes: Tensor, scale: float) -> Tensor:
    x, p = features.float().contiguous(), prototypes.float().contiguous()
    (b, d), c = x.shape, p.shape[0]
    logits = torch.empty(b, c, dtype=torch.float32, device=x.device)
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        _C.proto_logits_cuda(x.data_ptr(), p.data_ptr(), logits.data_ptr(), b, c, d, scale, stream)
    return logits.to(features.dtype)
