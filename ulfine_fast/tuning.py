"""Which part of a tower is trained: the whole of it, a part, or a few modules put into its blocks.

Every strategy freezes the rest. All but the prompts start as the identity: the first output of a tuned tower is
bit for bit that of the untuned one. Placement and sizes are those of LIFT (Shi et al., 2024) where it has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ulfine_fast.encoder import LiteBlock
from ulfine_fast.options import one_of
from ulfine_fast.towers import Tower, TransformerBlock

TUNINGS = {
    "none": "nothing in the tower, whose features are computed once",
    "linear_probe": "nothing in the tower",
    "full": "all of the tower",
    "partial": "the last blocks",
    "bitfit": "all biases (Ben Zaken et al., 2022)",
    "ln_tune": "gain and bias of all layer norms",
    "adaptformer": "a bottleneck beside each FFN (Chen et al., AdaptFormer, 2022)",
    "adapter": "a bottleneck behind each FFN (Houlsby et al., 2019)",
    "lora": "low-rank changes of queries and values (Hu et al., 2022)",
    "lora_mlp": "low-rank changes of the linear layers of each FFN",
    "ssf": "scale and shift behind each linear layer and norm of the blocks (Lian et al., 2022)",
    "vpt_shallow": "prompt tokens before the first block (Jia et al., 2022)",
    "vpt_deep": "new prompt tokens before each block (Jia et al., 2022)",
}

_WITH_WIDTH = ("adaptformer", "adapter", "lora", "lora_mlp", "vpt_shallow", "vpt_deep")
_WITH_BLOCKS = ("partial", "adaptformer", "adapter", "lora", "lora_mlp", "ssf", "vpt_deep")
_PROMPTS = 10
# of the parallel 1 x 1 bottleneck in MBConv blocks
_LITE_WIDTH = 16
_LITE_BLOCKS = 5


def tune(
    tower: Tower,
    strategy: str,
    *,
    classes: int,
    width: int | None = None,
    blocks: int | None = None,
    alpha: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Freeze `tower` except for what `strategy` trains, and put new modules in their place.

    strategy: a key of `TUNINGS` that `tunings_of(tower)` has. classes: C, which sets the default width.
    width: of a bottleneck, a low rank, or the number of prompt tokens. None: `bottleneck_width(C, L)` for a tower of
    L blocks; 16 for a lite tower (our choice); 10 prompts (LIFT). blocks: only the last so many are tuned; None: all
    of them, and 5 for "adaptformer" on a lite tower (our choice). "partial" needs it; the strategies without modules
    in blocks take neither width nor blocks. alpha: of "lora" and "lora_mlp", whose change is alpha / width times the
    product of two matrices; 1 in LIFT. seed: of the new modules' first values, whatever was drawn before.

    Returns the names of the trainable parameters. Raises ValueError for a tower that is tuned already, a strategy
    that it cannot have and a number out of range.
    """
    if tower.tuning is not None:
        raise ValueError(f"tower must not be tuned before, got one tuned by {tower.tuning}")
    if strategy not in tunings_of(tower):
        raise ValueError(f"tuning must be {one_of(tunings_of(tower), strategy, f' for {tower.name}')}")
    depth = len(tower.blocks)
    _check_counts(strategy, classes, width, blocks, depth)
    if strategy == "adaptformer" and not _is_transformer(tower):
        width, blocks = width or _LITE_WIDTH, blocks or _LITE_BLOCKS
    # what a tower without blocks can have takes none
    elif width is None and depth:
        width = _PROMPTS if strategy.startswith("vpt") else bottleneck_width(classes, depth)

    trained = _existing_parameters(tower, strategy, blocks)
    tower.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if strategy.startswith("vpt"):
            _put_prompts(tower, width, blocks or depth, deep=strategy == "vpt_deep")
        elif strategy in _PUT_INTO_BLOCK:
            for block in tower.blocks[depth - (blocks or depth) :]:
                _PUT_INTO_BLOCK[strategy](block, width, alpha)
    tower.to(tower.centre.device)
    tower.tuning = strategy
    return [name for name, parameter in tower.named_parameters() if parameter.requires_grad]


def tunings_of(tower: Tower) -> list[str]:
    """The strategies that `tower` can have: for a plain vision transformer all of `TUNINGS`.

    "adaptformer" also exists for a lite tower; "partial" where the blocks are known; "ln_tune" where there are layer
    norms; "none", "linear_probe", "full" and "bitfit" everywhere.
    """
    possible = {"none", "linear_probe", "full", "bitfit"}
    if len(tower.blocks):
        possible.add("partial")
    if any(isinstance(module, nn.LayerNorm) for module in tower.modules()):
        possible.add("ln_tune")
    if any(isinstance(block, LiteBlock) for block in tower.blocks):
        possible.add("adaptformer")
    if _is_transformer(tower):
        possible.update(TUNINGS)
    return [strategy for strategy in TUNINGS if strategy in possible]


def bottleneck_width(classes: int, layers: int) -> int:
    """LIFT's width of a bottleneck, so that all of them are about as large as a head of C classes.

    2 ^ max(0, floor(log2(C / (2 L)))) for C >= 1 classes and L >= 1 blocks.
    """
    return 1 << max(0, (classes // (2 * layers)).bit_length() - 1)


class Parallel(nn.Module):
    """frozen(x) + added(x)."""

    def __init__(self, frozen: nn.Module, added: nn.Module) -> None:
        super().__init__()
        self.frozen = frozen
        self.added = added

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both."""
        return self.frozen(x) + self.added(x)


class Bottleneck(nn.Module):
    """scale * up(relu(down(norm(x)))) for tokens [..., dim], zero at first; `width` channels in the middle.

    The layer norm and the scale, which is trained from 1, are LIFT's. down starts uniform (He et al., 2015).
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.down = nn.Linear(dim, width)
        self.up = nn.Linear(width, dim)
        self.scale = nn.Parameter(torch.ones(()))
        for parameter in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """The change of x, see the class."""
        return self.scale * self.up(F.relu(self.down(self.norm(x))))


class PointwiseBottleneck(nn.Sequential):
    """up(relu(down(x))) by 1 x 1 convolutions for maps [B, channels, H, W], zero at first: our choice."""

    def __init__(self, channels: int, out_channels: int, width: int) -> None:
        super().__init__(
            nn.Conv2d(channels, width, 1), nn.ReLU(inplace=True), nn.Conv2d(width, out_channels, 1)
        )
        for parameter in (self[0].bias, self[2].weight, self[2].bias):
            nn.init.zeros_(parameter)


class LowRank(nn.Module):
    """(alpha / rank) up(down(x)), zero at first (Hu et al., LoRA, 2022)."""

    def __init__(self, inputs: int, outputs: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)
        self.scale = alpha / rank
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """The change of x, see the class."""
        return self.up(self.down(x)) * self.scale


class LowRankAttention(nn.Module):
    """A layer that gives queries, keys and values at once, with low-rank changes of queries and values."""

    def __init__(self, frozen: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.frozen = frozen
        dim = frozen.out_features // 3
        self.query = LowRank(frozen.in_features, dim, rank, alpha)
        self.value = LowRank(frozen.in_features, dim, rank, alpha)

    def forward(self, x: Tensor) -> Tensor:
        """Queries, keys and values [..., 3 dim]."""
        query, key, value = self.frozen(x).chunk(3, dim=-1)
        return torch.cat([query + self.query(x), key, value + self.value(x)], dim=-1)


class ScaleShift(nn.Module):
    """scale * x + shift for each channel of [..., dim], the identity at first (Lian et al., SSF, 2022)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        self.shift = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x with its channels scaled and shifted, in its dtype."""
        return (self.scale * x + self.shift).to(x.dtype)


class PromptedBlock(nn.Module):
    """A block that works on `length` more tokens.

    They are its own `prompts`, or without those what the block before left there; they go with the output only
    where `leave` is true. They stand behind the image's tokens: attention has no order of its own.
    """

    def __init__(self, block: nn.Module, length: int, prompts: Tensor | None, *, leave: bool) -> None:
        super().__init__()
        self.block = block
        self.length = length
        self.prompts = None if prompts is None else nn.Parameter(prompts)
        self.leave = leave

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, T (+ length), D] after the block, see the class."""
        if self.prompts is not None:
            x = torch.cat([x, self.prompts.to(x.dtype).expand(len(x), -1, -1)], dim=1)
        x = self.block(x)
        return x if self.leave else x[:, : -self.length]


def _is_transformer(tower: Tower) -> bool:
    return len(tower.blocks) > 0 and all(isinstance(block, TransformerBlock) for block in tower.blocks)


def _check_counts(strategy: str, classes: int, width: int | None, blocks: int | None, depth: int) -> None:
    if classes < 1:
        raise ValueError(f"classes must be at least 1, got {classes}")
    if width is not None and (strategy not in _WITH_WIDTH or width < 1):
        expected = "at least 1" if strategy in _WITH_WIDTH else "None"
        raise ValueError(f"width must be {expected} for {strategy}, got {width}")
    if strategy == "partial" and blocks is None:
        raise ValueError(f"blocks must be in 1..{depth} for partial, got None")
    if blocks is not None and (strategy not in _WITH_BLOCKS or not 1 <= blocks <= depth):
        expected = f"in 1..{depth}" if strategy in _WITH_BLOCKS else "None"
        raise ValueError(f"blocks must be {expected} for {strategy}, got {blocks}")


def _existing_parameters(tower: Tower, strategy: str, blocks: int | None) -> list[nn.Parameter]:
    if strategy == "full":
        chosen = list(tower.parameters())
    elif strategy == "partial":
        chosen = [parameter for block in tower.blocks[-blocks:] for parameter in block.parameters()]
    elif strategy == "bitfit":
        chosen = [parameter for name, parameter in tower.named_parameters() if name.endswith("bias")]
    elif strategy == "ln_tune":
        norms = (module for module in tower.modules() if isinstance(module, nn.LayerNorm))
        chosen = [parameter for norm in norms for parameter in norm.parameters()]
    else:
        chosen = []
    # a fixed table of positions is a parameter too
    return [parameter for parameter in chosen if parameter.requires_grad]


def _put_prompts(tower: Tower, length: int, blocks: int, *, deep: bool) -> None:
    depth = len(tower.blocks)
    # the bound of a Xavier initialisation of the patch embedding, as published
    bound = math.sqrt(6 / (3 * tower.patch**2 + tower.blocks[0].dim))
    for index in range(depth - blocks, depth):
        block = tower.blocks[index]
        prompts = torch.empty(length, block.dim).uniform_(-bound, bound) if deep or index == 0 else None
        tower.blocks[index] = PromptedBlock(block, length, prompts, leave=not deep and index < depth - 1)


def _put_adaptformer(block: nn.Module, width: int, _alpha: float) -> None:
    if isinstance(block, TransformerBlock):
        block.ffn = Parallel(block.ffn, Bottleneck(block.dim, width))
    elif block.stride == 1:
        # a bottleneck that skips positions would have to choose which
        block.branch = Parallel(block.branch, PointwiseBottleneck(block.channels, block.out_channels, width))


def _put_adapter(block: TransformerBlock, width: int, _alpha: float) -> None:
    block.ffn.mlp = nn.Sequential(block.ffn.mlp, Parallel(nn.Identity(), Bottleneck(block.dim, width)))


def _put_lora(block: TransformerBlock, width: int, alpha: float) -> None:
    block.attention.attend.qkv = LowRankAttention(block.attention.attend.qkv, width, alpha)


def _put_lora_mlp(block: TransformerBlock, width: int, alpha: float) -> None:
    def changed(layer: nn.Linear) -> Parallel:
        return Parallel(layer, LowRank(layer.in_features, layer.out_features, width, alpha))

    _replace(block.ffn, nn.Linear, changed)


def _put_ssf(block: TransformerBlock, _width: int, _alpha: float) -> None:
    _replace(block, nn.Linear, lambda layer: nn.Sequential(layer, ScaleShift(layer.out_features)))
    _replace(block, nn.LayerNorm, lambda norm: nn.Sequential(norm, ScaleShift(norm.normalized_shape[-1])))


_PUT_INTO_BLOCK: dict[str, Callable[[nn.Module, int, float], None]] = {
    "adaptformer": _put_adaptformer,
    "adapter": _put_adapter,
    "lora": _put_lora,
    "lora_mlp": _put_lora_mlp,
    "ssf": _put_ssf,
}


def _replace(module: nn.Module, kind: type, make: Callable[[nn.Module], nn.Module]) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, kind):
            setattr(module, name, make(child))
        else:
            _replace(child, kind, make)
