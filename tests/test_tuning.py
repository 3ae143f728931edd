"""Each strategy trains what it says, starts as the identity and can be restored from what it trained."""

from __future__ import annotations

import pytest
import torch
from tiny_clip import LAYERS, SIZE, WIDTH, tiny_clip
from torch import Tensor, nn
from torch.nn import functional as F

from ulfine_fast.towers import Tower, load_tower
from ulfine_fast.tuning import (
    TUNINGS,
    bottleneck_width,
    tune,
    tunings_of,
)

CLASSES = 100
TRANSFORMER = "timm:test_vit"
PROMPTS = ("vpt_shallow", "vpt_deep")
FROZEN = ("none", "linear_probe")
LITE = ["none", "linear_probe", "full", "partial", "bitfit", "adaptformer"]
CASES = [
    *(("clip", strategy) for strategy in TUNINGS),
    *((TRANSFORMER, strategy) for strategy in TUNINGS),
    *(("lite0", strategy) for strategy in LITE),
]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (4, 3, SIZE, SIZE), dtype=torch.uint8)


@pytest.fixture
def load(clip_folder):
    def loaded(model: str, **options) -> Tower:
        torch.manual_seed(7)
        return load_tower(clip_folder if model == "clip" else model, size=SIZE, **options)

    return loaded


def tuned(tower: Tower, strategy: str, **options) -> list[str]:
    if strategy == "partial":
        options = {"blocks": 2, **options}
    return tune(tower, strategy, classes=CLASSES, **options)


@torch.no_grad()
def moved(tower: Tower) -> Tower:
    """With everything trainable away from where it starts: behind a zero no gradient passes."""
    for parameter in tower.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn_like(parameter))
    return tower


@pytest.mark.parametrize(
    ("classes", "count"),
    [(10, 46_104), (100, 101_436), (101, 101_436), (127, 101_436), (365, 175_212), (1000, 617_868), (8142, 4_749_324)],
)  # fmt: skip
def test_adaptformer_has_lifts_size_on_vit_b_16(classes, count):
    import open_clip

    from ulfine_fast import towers

    with torch.device("meta"):
        network = open_clip.model._build_vision_tower(
            512, open_clip.get_model_config("ViT-B-16")["vision_cfg"]
        )
    towers._own_open_clip_blocks(network)
    tower = Tower(
        network, name="", dim=512, size=224, patch=16, mean=[0.0] * 3, std=[1.0] * 3, fingerprint=""
    ).to("meta")  # fmt: skip
    names = tune(tower, "adaptformer", classes=classes)
    assert sum(tower.get_parameter(name).numel() for name in names) == count


def test_bottleneck_width_is_lifts_rule():
    assert [bottleneck_width(classes, 12) for classes in (1, 10, 47, 48, 95, 96, 1000)] == [
        1,
        1,
        1,
        2,
        2,
        4,
        32,
    ]
    assert bottleneck_width(100, 24) == 2


def test_lite_adaptformer_has_its_measured_size(load):
    tower = load("lite0")
    names = tune(tower, "adaptformer", classes=10)
    # 16 channels in the last five blocks; the one of them with stride 2 has none
    assert sum(tower.get_parameter(name).numel() for name in names) == 27_584


@pytest.mark.parametrize(("model", "strategy"), CASES)
def test_first_output_is_that_of_the_untuned_tower(model, strategy, load, images):
    tower = load(model)
    expected = tower(images)
    tuned(tower, strategy)
    assert torch.equal(tower(images), expected) == (strategy not in PROMPTS)


def test_a_tower_without_blocks_is_tuned(load):
    for strategy in tunings_of(load("timm:test_convnext")):
        assert bool(tuned(load("timm:test_convnext"), strategy)) == (strategy not in FROZEN)


@pytest.mark.parametrize(("model", "strategy"), CASES)
def test_gradients_reach_the_named_parameters_and_no_other(model, strategy, load, images):
    tower = load(model)
    names = tuned(tower, strategy)
    assert bool(names) == (strategy not in FROZEN)
    if not names:
        assert not tower(images).requires_grad
        return
    expected = moved(tower)(images)
    F.normalize(expected, dim=1)[:, ::2].sum().backward()
    gradients = {name: parameter.grad for name, parameter in tower.named_parameters()}
    assert {name for name, gradient in gradients.items() if gradient is not None} == set(names)
    assert all(gradients[name].abs().sum() > 0 for name in names)
    frozen = {name: tensor.clone() for name, tensor in tower.state_dict().items() if name not in names}
    torch.optim.SGD([tower.get_parameter(name) for name in names], lr=0.1).step()
    assert not torch.equal(tower(images), expected)
    assert all(torch.equal(tower.state_dict()[name], tensor) for name, tensor in frozen.items())


@pytest.mark.parametrize(("model", "strategy"), CASES)
def test_trained_parameters_restore_the_tower(model, strategy, load, images):
    tower = load(model)
    names = tuned(tower, strategy)
    moved(tower)
    tower.centre.fill_(0.5 if tower.centred else 0)
    state = {
        name: tensor.clone() for name, tensor in tower.state_dict().items() if name in {*names, "centre"}
    }
    other = load(model)
    tuned(other, strategy, seed=1)
    other.load_state_dict(state, strict=False)
    assert torch.equal(other(images), tower(images))


@pytest.mark.parametrize(("model", "strategy"), CASES)
def test_autocast_and_checkpointing(model, strategy, load, images):
    def run(*, strategy: str, checkpointing: bool) -> tuple[dict[str, Tensor], set[torch.dtype]]:
        tower = load(model, gradient_checkpointing=checkpointing)
        names = tuned(tower, strategy)
        layers, stream = [], []
        for block in tower.blocks:
            block.register_forward_hook(lambda *call: stream.append(call[-1].dtype))
            for module in block.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    module.register_forward_hook(lambda *call: layers.append(call[-1].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            features = tower(images)
        assert features.dtype == torch.float32
        assert set(layers) == {torch.bfloat16}
        if names:
            features.square().mean().backward()
        return {name: tower.get_parameter(name).grad for name in names}, set(stream)

    _, untuned = run(strategy="linear_probe", checkpointing=False)
    plain, stream = run(strategy=strategy, checkpointing=False)
    again, _ = run(strategy=strategy, checkpointing=True)
    assert stream == untuned
    assert all(gradient.dtype == torch.float32 for gradient in plain.values())
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_what_each_strategy_names(load):
    def shapes(strategy: str, model: str = "clip", **options) -> dict[str, list[int]]:
        tower = load(model)
        return {name: list(tower.get_parameter(name).shape) for name in tuned(tower, strategy, **options)}

    everything = shapes("full")
    assert shapes("bitfit").keys() == {name for name in everything if name.endswith("bias")}
    norms = {name for name in everything if "norm" in name or "ln_" in name}
    assert shapes("ln_tune").keys() == norms
    assert len(norms) == 2 * (2 * LAYERS + 2)
    last = tuple(f"network.transformer.{block}." for block in (1, 2))
    assert shapes("partial").keys() == {name for name in everything if name.startswith(last)}
    (prompts,) = shapes("vpt_shallow", width=3).values()
    assert prompts == [3, WIDTH]
    assert list(shapes("vpt_deep").values()) == [[10, WIDTH]] * LAYERS
    lora = "network.transformer.2.attention.attend.qkv"
    assert shapes("lora", width=2, blocks=1) == {
        f"{lora}.query.down.weight": [2, WIDTH],
        f"{lora}.query.up.weight": [WIDTH, 2],
        f"{lora}.value.down.weight": [2, WIDTH],
        f"{lora}.value.up.weight": [WIDTH, 2],
    }
    mlp = shapes("lora_mlp", width=2, blocks=1)
    assert list(mlp.values()) == [[2, WIDTH], [4 * WIDTH, 2], [2, 4 * WIDTH], [WIDTH, 2]]
    # qkv, proj, two layers of the FFN and two norms
    assert sum(size for (size,) in shapes("ssf", blocks=1).values()) == 2 * (3 + 1 + 4 + 1 + 1 + 1) * WIDTH
    default = bottleneck_width(CLASSES, LAYERS)
    for strategy in ("adaptformer", "adapter"):
        assert list(shapes(strategy, blocks=2).values()).count([default, WIDTH]) == 2
    assert len(shapes("adaptformer", "lite0", blocks=1, width=3)) == 4


@torch.no_grad()
def test_adaptformer_stands_beside_the_ffn(load):
    tower = load("clip")
    plain = load("clip")
    tuned(tower, "adaptformer")
    block, frozen = tower.blocks[0], plain.blocks[0]
    bottleneck = block.ffn.added
    nn.init.normal_(bottleneck.up.weight)
    bottleneck.scale.fill_(0.5)
    tokens = torch.randn(2, 5, WIDTH)
    stream = tokens + frozen.attention(tokens)
    hidden = F.relu(F.linear(F.layer_norm(stream, [WIDTH]), bottleneck.down.weight))
    expected = frozen(tokens) + 0.5 * F.linear(hidden, bottleneck.up.weight)
    torch.testing.assert_close(block(tokens), expected)


@torch.no_grad()
def test_adapter_stands_behind_the_ffn(load):
    tower, plain = load("clip"), load("clip")
    tuned(tower, "adapter")
    bottleneck = tower.blocks[0].ffn.mlp[1].added
    nn.init.normal_(bottleneck.up.weight)
    tokens = torch.randn(2, 5, WIDTH)
    frozen = plain.blocks[0]
    stream = tokens + frozen.attention(tokens)
    fed = frozen.ffn(stream)
    torch.testing.assert_close(tower.blocks[0](tokens), stream + fed + bottleneck(fed))


@torch.no_grad()
def test_lora_is_a_change_of_query_and_value_weights(load):
    tower, plain = load("clip"), load("clip")
    tuned(tower, "lora", width=2, alpha=6.0)
    layer = tower.blocks[0].attention.attend.qkv
    for change in (layer.query, layer.value):
        nn.init.normal_(change.up.weight)
    weight = plain.blocks[0].attention.attend.qkv.weight
    weight[:WIDTH] += 3 * layer.query.up.weight @ layer.query.down.weight
    weight[2 * WIDTH :] += 3 * layer.value.up.weight @ layer.value.down.weight
    tokens = torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(tower.blocks[0](tokens), plain.blocks[0](tokens))


@pytest.mark.parametrize("model", ["clip", TRANSFORMER])
@torch.no_grad()
def test_prompts_are_seen_by_each_block_and_gone_behind_it(model, load):
    plain = load(model)
    tokens = torch.randn(2, 5, plain.blocks[0].dim)
    shallow, deep = load(model), load(model)
    tuned(shallow, "vpt_shallow")
    tuned(deep, "vpt_deep")

    prompts = shallow.blocks[0].prompts
    assert prompts.abs().max() > 0
    expected = torch.cat([tokens, prompts.expand(2, -1, -1)], dim=1)
    for block in plain.blocks:
        expected = block(expected)
    torch.testing.assert_close(shallow.network.get_submodule(_blocks_name(shallow))(tokens), expected[:, :5])

    expected = tokens
    for block, prompted in zip(plain.blocks, deep.blocks, strict=True):
        expected = block(torch.cat([expected, prompted.prompts.expand(2, -1, -1)], dim=1))[:, :5]
    torch.testing.assert_close(deep.network.get_submodule(_blocks_name(deep))(tokens), expected)


def _blocks_name(tower: Tower) -> str:
    return next(name for name, module in tower.network.named_modules() if module is tower.blocks)


def test_new_modules_are_drawn_from_the_seed_alone(load):
    def drawn(seed: int) -> dict[str, Tensor]:
        tower = load("clip")
        before = torch.random.get_rng_state()
        names = tuned(tower, "lora", seed=seed)
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.rand(seed + 1)
        return {name: tower.get_parameter(name).detach() for name in names}

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_what_a_tower_can_have(load):
    assert tunings_of(load("clip")) == tunings_of(load(TRANSFORMER)) == list(TUNINGS)
    assert tunings_of(load("lite0")) == LITE
    assert tunings_of(load_tower("timm:test_resnet")) == ["none", "linear_probe", "full", "partial", "bitfit"]


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        ("lora", {}, "tuning must be one of none, linear_probe, full, partial, bitfit, adaptformer for lite0, got 'lora'"),
        ("adaptformer", {"width": 0}, "width must be at least 1 for adaptformer, got 0"),
        ("bitfit", {"width": 8}, "width must be None for bitfit, got 8"),
        ("full", {"blocks": 2}, "blocks must be None for full, got 2"),
        ("partial", {"blocks": 17}, r"blocks must be in 1\.\.16 for partial, got 17"),
        ("partial", {"blocks": 0}, r"blocks must be in 1\.\.16 for partial, got 0"),
        ("partial", {}, r"blocks must be in 1\.\.16 for partial, got None"),
        ("full", {"classes": 0}, "classes must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_arguments_are_checked(strategy, options, message, load):
    tower = load("lite0")
    with pytest.raises(ValueError, match=f"^{message}"):
        tune(tower, strategy, **{"classes": 10, **options})
    assert all(parameter.requires_grad for parameter in tower.parameters())


def test_a_tower_is_tuned_once(load):
    tower = load("clip")
    assert tower.tuning is None
    tune(tower, "bitfit", classes=10)
    assert tower.tuning == "bitfit"
    with pytest.raises(ValueError, match="tower must not be tuned before, got one tuned by bitfit"):
        tune(tower, "lora", classes=10)


def test_a_fixed_table_stays_fixed(load):
    tower = load("clip")
    tower.network.positional_embedding.requires_grad_(False)
    assert "network.positional_embedding" not in tuned(tower, "full")
