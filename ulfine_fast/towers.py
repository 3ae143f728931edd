"""Image encoders that can be fine-tuned: a CLIP of open_clip, a backbone of timm, or the offline lite CLIP.

`load_tower` gives each the same face, a `Tower`: uint8 images in, features out, and where there is a text tower
also prototypes for class names. Nothing here sees a batch as a whole (no batch statistics, no dropout, in
training either), so a row that is left out of a batch changes no other row.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ulfine_fast.encoder import (
    IMAGE_WEIGHTS,
    LITE_MEAN,
    LITE_STD,
    LiteClip,
    LiteNet,
    lite_weights,
    text_embeddings,
)
from ulfine_fast.options import did_you_mean
from ulfine_fast.weights import check_values, read_weights, weights_of

if TYPE_CHECKING:
    from types import ModuleType

LOGGER = logging.getLogger(__name__)
LITE_SIZE = 160
Space = Literal["joint", "visual"]

_TEXTS_AT_ONCE = 256
# of a checkpoint of CLIP; features do not depend on them, and files differ in their shapes
_WITHOUT_USE = ("logit_scale", "logit_bias", "attn_mask")


class TextSide(NamedTuple):
    """How a tower turns texts into prototypes."""

    # texts and the device to work on -> float [N, text width], any length
    embed: Callable[[list[str], torch.device], Tensor]
    # unit rows, one for each class -> float [C, dim], any length
    place: Callable[[Tensor], Tensor]
    # what stands for `templates=None`
    templates: tuple[str, ...]


class Tower(nn.Module):
    """An image encoder with everything that belongs to its input and its feature space.

    network: float images [B, 3, size, size], normalised, to features [B, dim]. mean and std: of the three
    channels in units of 0..255; an image is normalised as (image - mean) / std.

    name: what it was loaded as. dim: width of a feature. size: side of an image, pixels. patch: side of a patch,
    pixels, None for a convolutional network. fingerprint: hex sha256 over names, shapes and content of the image
    weights as loaded, architecture, preprocessing and feature space. has_text: `text_prototypes` works.
    centred: features and prototypes are comparable only after the mean feature of the training images has been
    written to the buffer `centre` float32 [dim], which is zero until then. tuning: name of the strategy that
    `tuning.tune` has applied, None before.

    A tower is always in evaluation mode: `train()` changes nothing, batch norms keep their statistics (their gain
    and bias can be trained), nothing drops out.
    """

    mean: Tensor
    std: Tensor
    centre: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str,
        dim: int,
        size: int,
        patch: int | None,
        mean: Iterable[float],
        std: Iterable[float],
        fingerprint: str,
        text: TextSide | None = None,
        centred: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.name, self.dim, self.size, self.patch = name, dim, size, patch
        self.fingerprint, self.centred = fingerprint, centred
        self.tuning: str | None = None
        # outside the module: the text tower is neither trained nor saved nor copied
        self._text = text
        self.register_buffer("mean", torch.tensor([*mean])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([*std])[:, None, None], persistent=False)
        self.register_buffer("centre", torch.zeros(dim))
        self.eval()

    @property
    def has_text(self) -> bool:
        """Whether `text_prototypes` works."""
        return self._text is not None

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The residual blocks from input to output; empty where the network is of an unknown make.

        `Blocks`, whose items can be replaced, for a plain vision transformer and for the lite towers.
        """
        for module in self.network.modules():
            if isinstance(module, Blocks):
                return module
        trunk = getattr(self.network, "trunk", self.network)
        if hasattr(trunk, "blocks"):
            return list(trunk.blocks)
        stages = (getattr(trunk, f"layer{stage}", ()) for stage in (1, 2, 3, 4))
        return [block for stage in stages for block in stage]

    def train(self, mode: bool = True) -> Tower:
        """Stay in evaluation mode, see the class."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Features of images less the centre, not of unit length.

        images: uint8 [B >= 1, 3, size, size] on the tower's device. Returns float32 [B, dim], under autocast too. Raises
        ValueError for another dtype or shape.
        """
        expected = (3, self.size, self.size)
        if images.dtype != torch.uint8 or images.shape[1:] != expected or len(images) == 0:
            raise ValueError(
                f"Tower: images must be uint8 [B >= 1, 3, {self.size}, {self.size}],"
                f" got {str(images.dtype).removeprefix('torch.')} {list(images.shape)}"
            )
        x = images.to(torch.float32, memory_format=torch.channels_last)
        return self.network((x - self.mean) / self.std) - self.centre

    @torch.no_grad()
    def text_prototypes(self, class_names: Sequence[str], templates: Sequence[str] | None = None) -> Tensor:
        """Prototypes of classes from their names.

        prototype_k = unit(place(unit(sum_t unit(text(t.format(name_k)))))) over the templates t, where place is the
        identity, in the space "visual" the transposed projection (Shi et al., LIFT, 2024), for a lite tower
        `LiteClip.class_prototypes`. An underscore in a name stands for a space.

        templates: each with one {} for the name. None: "a photo of a {}." (Radford et al., CLIP, 2021), and the
        name alone for a lite tower. Returns float32 [C, dim], unit rows, on the tower's device. Raises ValueError
        for a tower without text, for empty names or templates and for a text that is longer than the context.
        """
        if self._text is None:
            raise ValueError(
                f"text_prototypes: tower must have a text tower, got {self.name}, which has none:"
                " start from the class means of labelled features instead"
            )
        names = [name.replace("_", " ") for name in class_names]
        if not names or not all(name.strip() for name in names):
            raise ValueError(f"text_prototypes: class names must be non-empty strings, got {class_names!r}")
        if templates is None:
            templates = self._text.templates
        if not templates or isinstance(templates, str) or any(t.count("{}") != 1 for t in templates):
            raise ValueError(
                f"text_prototypes: templates must be texts with one {{}} for the name, got {templates!r}"
            )
        texts = (
            self._text.embed([template.format(name) for name in names], self.centre.device)
            for template in templates
        )
        texts = F.normalize(sum(F.normalize(text.float(), dim=1) for text in texts), dim=1)
        return F.normalize(self._text.place(texts), dim=1).to(self.centre.device)


class Blocks(nn.Sequential):
    """Residual blocks in order. checkpointing: keep only their inputs and compute them again in backward."""

    checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """x through all blocks."""
        for block in self:
            if self.checkpointing and torch.is_grad_enabled():
                # nothing in a tower draws at random, so there is no generator to wind back
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x)
        return x


class TransformerBlock(nn.Module):
    """A pre-norm block: x + attention(x), then x + ffn(x), each branch with its own norm, for tokens [B, T, D].

    The branches are what fine-tuning modules are put into: attention holds `norm`, `attend` (with linear layers
    `qkv` and `proj`) and `scale`; ffn holds `norm`, `mlp` and `scale`. dim: D.
    """

    def __init__(self, attention: nn.Sequential, ffn: nn.Sequential) -> None:
        super().__init__()
        self.dim: int = ffn.norm.normalized_shape[0]
        self.attention = attention
        self.ffn = ffn

    def forward(self, x: Tensor) -> Tensor:
        """One block, see the class."""
        x = x + self.attention(x)
        return x + self.ffn(x)


class SelfAttention(nn.Module):
    """The self-attention of an `nn.MultiheadAttention`, with its weights, as plain linear layers.

    softmax(q k' / sqrt(D / heads)) v for tokens [B, T, D], always by scaled_dot_product_attention. The module that
    it replaces takes another path, with other rounding, without gradients; and its packed weight is no layer that
    could be adapted.
    """

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = packed.num_heads
        self.qkv = nn.Linear(packed.embed_dim, 3 * packed.embed_dim, device="meta")
        self.qkv.weight, self.qkv.bias = packed.in_proj_weight, packed.in_proj_bias
        self.proj = packed.out_proj

    def forward(self, x: Tensor) -> Tensor:
        """Attended tokens [B, T, D]."""
        packed = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # [B, T, 3, heads, D / heads]
        query, key, value = packed.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.proj(attended.transpose(1, 2).flatten(2))


def load_tower(
    model: str = "lite0",
    pretrained: str | None = None,
    *,
    space: Space = "joint",
    size: int | None = None,
    compile: bool = False,  # noqa: A002
    gradient_checkpointing: bool = False,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Tower:
    """Load an image encoder for fine-tuning, with float32 weights.

    model, and what `pretrained` may be with it:
      "lite0", "lite2": the offline encoder of `LiteClip`, None.
      a name of `open_clip.list_models()`: one of its tags, or a checkpoint file (`weights.read_weights`), of the
        whole model or of its image tower alone. A tag is loaded only with the activation it was trained with, e.g.
        "ViT-B-16-quickgelu" and not "ViT-B-16" for "openai"; of a file this cannot be known, so the activation is
        what the name says.
      a folder with open_clip_config.json and weights, or "hf-hub:OWNER/NAME": None.
      "timm:NAME", a backbone without text: a tag of it, or a checkpoint file; "timm:NAME.TAG" has the image
        statistics of the tag, and also its weights where `pretrained` is None.
    Where None leaves the weights at random, a warning is logged; they are drawn from `seed` alone.

    space: "joint", the space of images and texts, or "visual", the features of a CLIP's vision transformer before
    its projection. size: side of the input, pixels; None: the model's own, 160 for a lite tower. A multiple of the
    patch, of 32 for a lite tower, and one that the network can take. compile: the network goes through
    torch.compile. gradient_checkpointing: blocks keep only their input and are computed again in backward.

    Raises ValueError for a name, tag, file, space or size that does not fit, ConnectionError when weights cannot be
    downloaded, OSError when a file cannot be read, ImportError when a package is missing.
    """
    if space not in get_args(Space):
        raise ValueError(f"space must be joint or visual, got {space!r}")
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if model in IMAGE_WEIGHTS:
            tower = _lite_tower(model, pretrained, space, size or LITE_SIZE)
        elif model.startswith("timm:"):
            tower = _timm_tower(model, pretrained, space, size)
        else:
            tower = _open_clip_tower(model, pretrained, space, size)
    if size is not None and tower.patch is not None and size % tower.patch:
        raise ValueError(f"size must be a multiple of the patch, {tower.patch}, got {size}")
    _check_input(tower)
    if gradient_checkpointing:
        if not isinstance(tower.blocks, Blocks):
            raise ValueError(
                f"gradient_checkpointing must be False for {model}, which is neither a plain vision"
                " transformer nor a lite tower, got True"
            )
        tower.blocks.checkpointing = True
    # convolutions, the patch embedding among them, are faster with channels last
    tower.to(device=device, memory_format=torch.channels_last)
    if compile:
        tower.network.compile()
    return tower


def _lite_tower(variant: str, pretrained: str | None, space: str, size: int) -> Tower:
    if pretrained is not None:
        raise ValueError(f"pretrained must be None for {variant}, got {pretrained!r}")
    if size % 32:
        raise ValueError(f"size must be a multiple of 32 for {variant}, got {size}")
    _joint_only(variant, space)
    network = LiteNet(variant, lite_weights(variant))
    network.blocks = Blocks(*network.blocks)
    return _tower(
        network,
        {"architecture": variant, "size": size, "mean": [LITE_MEAN] * 3, "std": [LITE_STD] * 3},
        name=variant,
        dim=LiteNet.dim,
        patch=None,
        text=TextSide(
            embed=lambda texts, _device: text_embeddings(texts),
            place=lambda texts: LiteClip(variant=variant).class_prototypes(texts),
            templates=("{}",),
        ),
        centred=True,
    )


def _timm_tower(model: str, pretrained: str | None, space: str, size: int | None) -> Tower:
    try:
        import timm
    except ImportError as error:
        raise _missing(error) from error
    architecture, _, tag = model.removeprefix("timm:").partition(".")
    if not timm.is_model(architecture):
        raise ValueError(
            f"model must be timm: and a name of timm.list_models(), got {model!r}"
            + did_you_mean(model, [f"timm:{name}" for name in timm.list_models()])
        )
    _joint_only(model, space)
    file = pretrained if pretrained and Path(pretrained).is_file() else None
    tag = tag if file else pretrained or tag
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise _unknown_weights(tags, tag)
    if not (file or tag):
        _warn_of_random_weights(model)
    full_name = f"{architecture}.{tag}" if tag else architecture
    try:
        network = timm.create_model(full_name, pretrained=bool(tag and not file), num_classes=0)
    except OSError as error:
        raise _no_download(full_name, error) from None
    # before a file is loaded, which may be of this size
    _set_size(network, model, size)
    if file:
        with _of_file(file, full_name):
            _load_timm_file(network, Path(file))
    _own_timm_blocks(network)
    data = timm.data.resolve_model_data_config(network)
    return _tower(
        network,
        {
            "architecture": architecture,
            "size": size or _side(data["input_size"][1:], model),
            **_in_levels(data),
        },
        name=model,
        dim=network.head_hidden_size,
        patch=_patch(network),
    )


def _load_timm_file(network: nn.Module, path: Path) -> None:
    # timm itself would leave what the file lacks at random
    own = network.state_dict()
    weights = weights_of(read_weights(path), own)
    classifier = network.pretrained_cfg.get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    weights = {
        name: value for name, value in weights.items() if not name.startswith(tuple(f"{h}." for h in heads))
    }
    others = [name for name in own if name not in weights or weights[name].shape != own[name].shape]
    # most modules of timm have it: it resamples positions, and knows the names of older files. It would resample
    # patches too, but a file of another patch is of another model
    adapted = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if others and adapted and not any("patch_embed" in name for name in others):
        weights = adapted(weights, network)
    check_values(weights, own)
    network.load_state_dict(weights)


def _open_clip_tower(model: str, pretrained: str | None, space: str, size: int | None) -> Tower:
    try:
        import open_clip
    except ImportError as error:
        raise _missing(error) from error
    # a run's own folder may be called after its model
    folder = model not in open_clip.list_models() and Path(model).is_dir()
    complete = folder or model.startswith("hf-hub:")
    source = f"local-dir:{model}" if folder else model
    if complete and pretrained is not None:
        raise ValueError(f"pretrained must be None for {model}, which has weights, got {pretrained!r}")
    try:
        config = open_clip.get_model_config(source)
    except OSError as error:
        if folder:
            raise ValueError(f"model must be a folder with open_clip_config.json, got {model}") from error
        raise _no_download(model, error) from None
    except (ValueError, KeyError, TypeError) as error:
        raise _no_description(model, error) from error
    if config is None:
        raise ValueError(
            f"model must be {', '.join(IMAGE_WEIGHTS)}, timm:NAME, a folder with open_clip_config.json"
            f" or a name of open_clip.list_models(), got {model!r}"
            f"{did_you_mean(model, [*IMAGE_WEIGHTS, *open_clip.list_models()])}"
        )
    file = tag = None
    if folder:
        file = _file_of_weights(Path(model))
    elif complete:
        try:
            file = open_clip.pretrained.download_pretrained_from_hf(model.removeprefix("hf-hub:"))
        except OSError as error:
            raise _no_download(model, error) from None
    elif pretrained is None:
        _warn_of_random_weights(model)
    elif open_clip.get_pretrained_cfg(model, pretrained):
        tag, file = pretrained, _fetch_tag(open_clip, model, pretrained, config)
    elif Path(pretrained).is_file():
        file = pretrained
    else:
        raise _unknown_weights(open_clip.list_pretrained_tags_by_model(model), pretrained)
    try:
        of_timm = "timm_model_name" in config["vision_cfg"]
        with _quiet():
            clip = open_clip.create_model(
                source,
                pretrained=tag,
                load_weights=False,
                pretrained_text=file is None,
                force_image_size=None if of_timm else size,
            )
    except OSError as error:
        # a text tower may have its description elsewhere
        raise _no_download(model, error) from None
    # open_clip checks nothing of what it is told
    except Exception as error:
        if not complete:
            raise
        raise _no_description(model, error) from error
    with_text = True
    if file:
        with _of_file(file, model):
            with_text = _load_clip(clip, Path(file))
    if of_timm:
        _set_size(clip.visual, model, size)

    network, clip.visual = clip.visual, None
    if hasattr(network, "output_tokens"):
        network.output_tokens = False
    dim, projection = config["embed_dim"], None
    if space == "visual":
        projection = getattr(network, "proj", None)
        if not isinstance(projection, nn.Parameter):
            _joint_only(model, space)
        network.proj = None
        dim = len(projection)
    _own_open_clip_blocks(network)
    _own_timm_blocks(getattr(network, "trunk", None))
    preprocess = open_clip.get_model_preprocess_cfg(network)
    return _tower(
        network,
        {
            "architecture": {key: config.get(key) for key in ("embed_dim", "vision_cfg", "quick_gelu")},
            "space": space,
            "size": _side(network.image_size, model),
            **_in_levels(preprocess),
        },
        name=Path(model).name if folder else model,
        dim=dim,
        patch=_patch(network),
        text=_clip_text(clip, source, projection) if with_text else None,
    )


def _file_of_weights(folder: Path) -> str:
    files = [
        path for kind in (".safetensors", ".bin", ".pth", ".pt") for path in sorted(folder.glob(f"*{kind}"))
    ]
    if not files:
        raise _not_a_checkpoint(str(folder), str(folder), ValueError("a folder without weights"))
    # a folder may have weights for other programs too
    return str(min(files, key=lambda path: not path.name.startswith("open_clip")))


def _load_clip(clip: nn.Module, path: Path) -> bool:
    """Fill a model of open_clip from a file; whether that has the text tower too."""
    import open_clip
    from open_clip.convert import convert_state_dict
    from open_clip.model import (
        convert_to_custom_text_state_dict,
        resize_pos_embed,
        resize_text_pos_embed,
    )

    if path.suffix == ".npz":
        open_clip.load_checkpoint(clip, str(path))
        return True
    own, tensors = clip.state_dict(), read_weights(path)
    of_image = {name for name in own if name.startswith("visual.")}
    weights = weights_of(tensors, own)
    if not any(name in weights for name in of_image):
        # perhaps the image tower alone
        bare = {f"visual.{name}": w for name, w in weights_of(tensors, {n[7:] for n in of_image}).items()}
        weights = bare if any(name in bare for name in of_image) else weights
    weights = convert_state_dict(clip, weights)
    if "positional_embedding" in weights and not hasattr(clip, "positional_embedding"):
        weights = convert_to_custom_text_state_dict(weights)
    # whole numbers that the model does not know are positions by number and sizes
    weights = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
        if not name.endswith(_WITHOUT_USE) and (name in own or tensor.is_floating_point())
    }
    check_values(weights, own)
    if all(name.startswith("visual.") for name in weights):
        LOGGER.warning("%s has no text tower: first prototypes will be class means", path)
        weights |= {name: tensor for name, tensor in own.items() if name not in of_image}
        with_text = False
    else:
        weights |= {name: own[name] for name in own if name.endswith(_WITHOUT_USE)}
        with_text = True
    resize_pos_embed(weights, clip)
    resize_text_pos_embed(weights, clip)
    clip.load_state_dict(weights)
    return with_text


def _fetch_tag(open_clip: ModuleType, model: str, tag: str, config: Mapping[str, Any]) -> str:
    weights = open_clip.get_pretrained_cfg(model, tag)
    if bool(weights.get("quick_gelu")) != bool(config.get("quick_gelu")):
        # open_clip would only warn
        twin = f"{model}-quickgelu"
        known = open_clip.get_pretrained_cfg(twin, tag) and twin in open_clip.list_models()
        activation = "QuickGELU" if weights.get("quick_gelu") else "GELU"
        raise ValueError(
            f"model must have the activation of {tag!r}, {activation}, got {model};"
            + (f" use {twin}" if known else " a checkpoint file is loaded with the activation of the model")
        )
    try:
        return open_clip.download_pretrained(weights)
    except (OSError, RuntimeError) as error:
        raise _no_download(f"{model} {tag}", error) from None


def _clip_text(clip: nn.Module, source: str, projection: Tensor | None) -> TextSide:
    # open_clip has no switch against cutting off a text, so it is asked for one token more: where a text was cut,
    # the end mark has moved
    def embed(texts: list[str], device: torch.device) -> Tensor:
        import open_clip

        try:
            tokenizer = open_clip.get_tokenizer(source)
        except OSError as error:
            raise _no_download(f"the tokenizer of {source}", error) from None
        length = clip.context_length
        tokens = tokenizer(texts, context_length=length)
        cut = (tokenizer(texts, context_length=length + 1)[:, :length] != tokens).any(dim=1)
        if cut.any():
            raise ValueError(
                f"a text must have at most {length} tokens,"
                f" got {shorten(texts[int(cut.nonzero()[0])], 100)!r}"
            )
        # it takes its room on the device for this call only
        clip.to(device)
        rows = [clip.encode_text(part) for part in tokens.to(device).split(_TEXTS_AT_ONCE)]
        clip.to("cpu")
        return torch.cat(rows)

    def place(texts: Tensor) -> Tensor:
        return texts if projection is None else texts @ projection.detach().to(texts).T

    clip.eval().requires_grad_(False)
    return TextSide(embed, place, ("a photo of a {}.",))


def _own_open_clip_blocks(network: nn.Module) -> None:
    from open_clip.transformer import ResidualAttentionBlock, VisionTransformer

    if not isinstance(network, VisionTransformer):
        return
    blocks = network.transformer.resblocks
    if all(type(block) is ResidualAttentionBlock for block in blocks):
        network.transformer = Blocks(
            *(
                _transformer_block(
                    (block.ln_1, SelfAttention(block.attn), block.ls_1), (block.ln_2, block.mlp, block.ls_2)
                )
                for block in blocks
            )
        )


def _own_timm_blocks(network: nn.Module | None) -> None:
    from timm.models.vision_transformer import Attention, Block, VisionTransformer

    if not isinstance(network, VisionTransformer):
        return
    if all(type(block) is Block and type(block.attn) is Attention for block in network.blocks):
        network.blocks = Blocks(
            *(
                _transformer_block((block.norm1, block.attn, block.ls1), (block.norm2, block.mlp, block.ls2))
                for block in network.blocks
            )
        )


def _transformer_block(
    attention: tuple[nn.Module, nn.Module, nn.Module], ffn: tuple[nn.Module, nn.Module, nn.Module]
) -> TransformerBlock:
    return TransformerBlock(
        nn.Sequential(OrderedDict(zip(("norm", "attend", "scale"), attention, strict=True))),
        nn.Sequential(OrderedDict(zip(("norm", "mlp", "scale"), ffn, strict=True))),
    )


def _tower(network: nn.Module, described: dict[str, Any], **arguments: Any) -> Tower:
    content = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, tensor in sorted(network.state_dict().items()):
        content.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        content.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    preprocessing = {key: described[key] for key in ("size", "mean", "std")}
    return Tower(network, fingerprint=content.hexdigest(), **preprocessing, **arguments)


def _in_levels(statistics: Mapping[str, Any]) -> dict[str, list[float]]:
    return {key: [255 * value for value in statistics[key]] for key in ("mean", "std")}


def _patch(network: nn.Module) -> int | None:
    trunk = getattr(network, "trunk", network)
    embed = getattr(trunk, "patch_embed", trunk)
    patch, proj = getattr(embed, "patch_size", None), getattr(embed, "proj", None)
    if isinstance(proj, nn.Conv2d) and proj.stride != proj.kernel_size:
        # patches that overlap: a size need not be a multiple of them
        return None
    return patch if patch is None or isinstance(patch, int) else patch[0]


def _set_size(network: nn.Module, model: str, size: int | None) -> None:
    if size is None:
        return
    if hasattr(network, "set_input_size"):
        try:
            network.set_input_size(size)
        # what timm asserts differs from model to model
        except Exception as error:
            _raise_if_of_the_machine(error)
            raise _wrong_size(network, model, size) from error
    elif hasattr(network, "image_size"):
        network.image_size = (size, size)


@torch.no_grad()
def _check_input(tower: Tower) -> None:
    """ValueError unless an image of the tower's size gives a feature of its width: only the network can tell."""
    try:
        features = tower(torch.zeros(1, 3, tower.size, tower.size, dtype=torch.uint8))
    # as above
    except Exception as error:
        _raise_if_of_the_machine(error)
        raise _wrong_size(tower.network, tower.name, tower.size) from error
    if features.shape != (1, tower.dim):
        raise ValueError(
            f"model must give one feature of width {tower.dim} for an image, got"
            f" {list(features.shape)} from {tower.name}"
        )


def _wrong_size(network: nn.Module, model: str, size: int) -> ValueError:
    described = getattr(getattr(network, "trunk", network), "pretrained_cfg", None) or {}
    own = described["input_size"][-1] if described.get("input_size") else "its own"
    fixed = described.get("fixed_input_size") and not hasattr(network, "set_input_size")
    others = ", which takes no other," if fixed else " or another that it can take,"
    return ValueError(f"size must be {own} for {model}{others} got {size}")


def _side(size: int | Sequence[int], model: str) -> int:
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ValueError(f"images must be square, got {height} x {width} for {model}")
    return height


def _joint_only(model: str, space: str) -> None:
    if space != "joint":
        raise ValueError(f"space must be joint for {model}, which has no projection matrix, got {space!r}")


def _warn_of_random_weights(model: str) -> None:
    LOGGER.warning("the weights of %s are random: no pretrained tag or file is given", model)


def _missing(error: ImportError) -> ImportError:
    return ImportError(f"{error.name} is missing: pip install 'ulfine-fast[clip]'")


def _unknown_weights(tags: list[str], given: str) -> ValueError:
    known = f"one of {', '.join(tags)}, or " if tags else ""
    return ValueError(
        f"pretrained must be {known}a checkpoint file, got {given!r}{did_you_mean(given, tags)}"
    )


def _no_download(what: str, error: Exception) -> ConnectionError:
    return ConnectionError(
        f"expected to download {what}, got: {shorten(str(error), 150)}; without a network, name a"
        " checkpoint file as pretrained, or a folder as model"
    )


@contextmanager
def _of_file(path: str, model: str) -> Iterator[None]:
    """Errors from within say which file they came from, and what is expected of it."""
    try:
        yield
    except OSError as error:
        raise OSError(f"expected to read {path}, got: {error.strerror or error}") from error
    # what does not fit fails anywhere in the functions of timm and open_clip
    except Exception as error:
        _raise_if_of_the_machine(error)
        raise _not_a_checkpoint(model, path, error) from error


def _raise_if_of_the_machine(error: Exception) -> None:
    """Pass on a lack of memory, which says nothing of a model or a file."""
    # torch has no type of its own for what the processor lacks
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error):
        raise error


@contextmanager
def _quiet() -> Iterator[None]:
    """open_clip warns of random weights where it is not to load them itself."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _no_description(model: str, error: Exception) -> ValueError:
    return ValueError(
        f"open_clip_config.json of {model} must be JSON in UTF-8 that describes a model of open_clip,"
        f" got: {shorten(str(error), 150) or type(error).__name__}"
    )


def _not_a_checkpoint(model: str, path: str, error: Exception) -> ValueError:
    reason = shorten(str(error), 300) or type(error).__name__
    return ValueError(f"{path} must be a checkpoint of {model}, got: {reason}")
