"""A CLIP of a few thousand weights, as the folder that open_clip writes for a model."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

DIM = 16
WIDTH = 32
SIZE = 32
LAYERS = 3


def tiny_clip(folder: Path, *, quick_gelu: bool = False, seed: int = 0) -> str:
    """Write a random CLIP to `folder` and return what `load_tower` takes as its model."""
    import open_clip

    config = {
        "embed_dim": DIM,
        "quick_gelu": quick_gelu,
        "vision_cfg": {
            "image_size": SIZE,
            "layers": LAYERS,
            "width": WIDTH,
            "head_width": 8,
            "patch_size": 8,
        },
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(**config)
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"size": [SIZE, SIZE], "mean": [0.5, 0.4, 0.3], "std": [0.3, 0.25, 0.2]}
    description = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(description))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return str(folder)
