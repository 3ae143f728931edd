"""Every choice of a run in three frozen records: the data, the method, and how long it trains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

ADJUST_UNLABELLED = ("none", "labelled", "kept", "both")
FITTING = ("compounding", "posterior")


def _one_of(record: Any, name: str, choices: tuple[str, ...]) -> None:
    if getattr(record, name) not in choices:
        known = " or ".join(choices) if len(choices) == 2 else f"one of {', '.join(choices)}"
        raise ValueError(f"{name} must be {known}, got {getattr(record, name)!r}")


def _finite(record: Any, name: str) -> None:
    if not math.isfinite(getattr(record, name)):
        raise ValueError(f"{name} must be finite, got {getattr(record, name)}")


def _above_zero(record: Any, *names: str) -> None:
    for name in names:
        _finite(record, name)
        if not getattr(record, name) > 0:
            raise ValueError(f"{name} must be above 0, got {getattr(record, name)}")


def _at_least(record: Any, low: int, *names: str) -> None:
    for name in names:
        _finite(record, name)
        if not getattr(record, name) >= low:
            raise ValueError(f"{name} must be at least {low}, got {getattr(record, name)}")


@dataclass(frozen=True)
class Data:
    """Which images a head is trained on, and as what features. The names are those of `load_features`.

    Raises ValueError for a number outside its range, as `Method` and `Schedule` do.
    """

    dataset: str = "fashion-mnist-subset"
    protocol: str = "usb"
    labelled_largest: int = 150  # N1, labelled images of the largest class
    unlabelled_largest: int = 250  # M1, unlabelled images of the largest class
    imbalance: float = 50.0  # largest class / smallest class
    unlabelled_imbalance: float | None = None  # None: the same
    unlabelled: str = "consistent"  # order of the unlabelled counts: consistent, uniform, reversed
    class_order: str = "shuffled"  # "index", or "shuffled": the seed picks head and tail
    seed: int = 0  # of the split
    size: int = 160  # side of the encoder's input, pixels, a multiple of 32
    weak_copies: int = 2  # stored weak views per image
    strong_copies: int = 2  # stored strong views per image

    def __post_init__(self) -> None:
        _at_least(self, 0, "labelled_largest", "unlabelled_largest", "seed")
        _at_least(self, 1, "imbalance", "weak_copies", "strong_copies")
        if self.seed >= 2**32:
            raise ValueError(f"seed must be below 2**32, got {self.seed}")
        if self.size <= 0 or self.size % 32:
            raise ValueError(f"size must be a positive multiple of 32, got {self.size}")


@dataclass(frozen=True)
class Method:
    """A point in the space of heads that the one engine trains. The presets are `METHODS`."""

    summary: str
    # Branches
    eta: float = 0.5  # weight of the linear branch in [0, 1]: pseudo-labels, prediction, fused loss
    eta_folds: int = 0  # folds of the labelled images that choose eta before training; 0: eta as it is
    linear_init: str = "text"  # "text" features or "random" unit rows
    normalize_linear: bool = True  # cosine probe; False is a plain linear one
    linear_scale: float = 25.0  # inverse temperature s_l
    proto_scale: float = 25.0  # inverse temperature s_t
    loss_on: str = "branches"  # "branches" or "fused"; with eta = 1, "fused" is the probe alone
    trained: bool = True  # False predicts from the start state (zero-shot)
    # Losses
    adjust_labelled: float = 1.0  # tau of the logit adjustment by the labelled prior, 0 is none
    # prior on the strong rows: none, labelled, kept (of kept pseudo-labels), both (their geometric mean)
    adjust_unlabelled: str = "none"
    unlabelled_weight: float = 1.0  # lambda_u, 0 leaves unlabelled data out
    threshold: float = 0.7  # tau, confidence from which a pseudo-label is kept
    temperature: float = 1.0  # softmax temperature of that confidence
    prior_shift: float = 0.0  # share of log P_u added to the weak logits: the data follow their own prior
    orthogonality_weight: float = 1.0  # lambda_o
    # Estimators
    fitting: str = "compounding"  # of the textual prototypes: steps of mu; "posterior": PrototypeState.refit
    strength: float = 16.0  # "posterior": examples that the text is worth
    unlabelled_mass: float = (
        1.0  # "posterior": mass of all unlabelled examples over that of all labelled ones
    )
    mu: float = 0.05  # largest step of a textual prototype towards its visual one, 0 keeps the text
    beta: float = 0.9  # share of the old visual prototype in the running mean
    gamma: float = 0.99  # share of the old pseudo-label distribution
    scale_decay: float = 0.99  # share of the old branch scales
    scale_rows: int = 32  # weak rows per step that the branch scales are measured on

    def __post_init__(self) -> None:
        _one_of(self, "linear_init", ("text", "random"))
        _one_of(self, "loss_on", ("branches", "fused"))
        _one_of(self, "adjust_unlabelled", ADJUST_UNLABELLED)
        _one_of(self, "fitting", FITTING)
        _above_zero(self, "linear_scale", "proto_scale", "temperature", "strength")
        _at_least(
            self, 0, "adjust_labelled", "unlabelled_weight", "orthogonality_weight", "scale_rows", "prior_shift",
            "unlabelled_mass", "eta_folds",
        )  # fmt: skip
        if self.eta_folds == 1:
            raise ValueError("eta_folds must be 0 or at least 2, got 1")
        for name in ("eta", "threshold", "mu", "beta", "gamma", "scale_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")


_PROBE = Method(
    "plain linear probe, cross-entropy, random start",
    eta=1.0,
    linear_init="random",
    normalize_linear=False,
    loss_on="fused",
    adjust_labelled=0.0,
    unlabelled_weight=0.0,
    orthogonality_weight=0.0,
    mu=0.0,
)

# The paper leaves open what the loss is taken on. On the validation images of `Schedule`, overall / few-shot
# accuracy is 76.1 / 71.2 % on the fused logits and 70.5 / 46.0 % on the branches: with frozen features the
# cross-entropy of the prototype branch has nothing to teach.
# mu is the choice of docs/accuracy.md.
_ULFINE = Method(
    "prototype adaptive fitting and dual logit fusion (arXiv 2505.05062)", loss_on="fused", mu=0.2
)

METHODS: dict[str, Method] = {
    "zero_shot": replace(_PROBE, summary="text prototypes, no training", eta=0.0, trained=False),
    "linear_probe": _PROBE,
    "linear_probe_la": replace(
        _PROBE,
        summary="linear probe from text features, logit-adjusted (arXiv 2007.07314)",
        linear_init="text",
        adjust_labelled=1.0,
    ),
    "fixmatch": replace(
        _PROBE,
        summary="linear probe with pseudo-labels above 0.95 (arXiv 2001.07685)",
        unlabelled_weight=1.0,
        threshold=0.95,
    ),
    "fixmatch_la": replace(
        _PROBE,
        summary="fixmatch with the labelled loss logit-adjusted",
        adjust_labelled=1.0,
        unlabelled_weight=1.0,
        threshold=0.95,
    ),
    "lift": replace(
        _PROBE,
        summary="text-initialised cosine head, logit-adjusted (arXiv 2309.10019)",
        linear_init="text",
        normalize_linear=True,
        adjust_labelled=1.0,
    ),
    "ulfine": _ULFINE,
    # Ours, chosen in docs/accuracy.md: prototypes are posterior means of their classes, cross-validation weighs
    # them against the probe, and strong rows are adjusted half by the kept and half by the labelled prior.
    "ulfine_plus": replace(
        _ULFINE,
        summary="ulfine with posterior prototypes and a cross-validated weight of the probe (ours)",
        eta_folds=3,
        threshold=0.8,
        adjust_unlabelled="both",
        fitting="posterior",
        orthogonality_weight=0.0,
    ),
}


def method(name: str) -> Method:
    """The preset `name`; ValueError lists the known ones."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    return METHODS[name]


def kept_when_continued(schedule: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a schedule that a run cannot change when it goes on."""
    return {name: value for name, value in schedule.items() if name not in ("steps", "log_every", "shard")}


@dataclass(frozen=True)
class Schedule:
    """How a head is trained: batches, optimizer, length, seed."""

    # Optimizer and learning rate: the best mean accuracy over all presets that train, seeds 0-2, on 3,000
    # Fashion-MNIST training images outside every split, of sgd x {.003, .01, .03, .1, .3} and
    # adamw (weight decay .01) x {.0003, .001, .003, .01, .03}. The best three lie within 0.3 points.

    steps: int = 400
    labelled_batch: int = 32  # B_l, rows
    unlabelled_batch: int = 224  # B_u, images, each with a weak and a strong view
    optimizer: str = "sgd"  # "sgd" (momentum 0.9) or "adamw"
    learning_rate: float = 0.01  # at the start; cosine to 0, per step
    weight_decay: float = 5e-4  # on the linear probe; prototypes have unit rows and need none
    seed: int = 0  # of the order of batches and views, and of a random start
    log_every: int = 20  # steps between two records of the history

    def __post_init__(self) -> None:
        _at_least(self, 0, "steps", "unlabelled_batch", "weight_decay", "seed")
        _above_zero(self, "labelled_batch", "log_every", "learning_rate")
        _one_of(self, "optimizer", ("sgd", "adamw"))

    def identity(self) -> dict[str, Any]:
        """What a run keeps when it goes on: all but its length and its reports."""
        return kept_when_continued(asdict(self))


PRECISIONS = ("fp32", "bf16", "fp16")
_OF_A_SPLIT = (
    "protocol", "labelled_largest", "unlabelled_largest", "imbalance", "unlabelled_imbalance", "distribution",
    "class_order",
)  # fmt: skip


@dataclass(frozen=True)
class Images:
    """Which images an encoder is tuned on: exactly one of a data set, folders, a table, lists, and ImageNet-127.

    Of a data set a long-tailed split is drawn, as `Data` describes it. Raises ValueError for none or two of the five,
    for a field that says nothing of the one that is given, and for a number outside its range.
    """

    dataset: str | None = None  # a name of `datasets.IMAGE_DATASETS`
    protocol: str = "acr"
    labelled_largest: int = 100
    unlabelled_largest: int | None = None  # None: twice the labelled ones, or what the data set brings
    imbalance: float = 100.0
    unlabelled_imbalance: float | None = None
    distribution: str = "consistent"  # order of the unlabelled counts: consistent, uniform, reversed
    class_order: str = "index"
    labelled: str | None = None  # folder with one folder of images for each class
    unlabelled: str | None = None  # folder of images, however nested
    test: str | None = None  # folder like `labelled`
    table: str | None = None  # CSV, TSV or Parquet file with the columns path, label, split
    root: str | None = None  # folder that paths start from, None: that of the table or of the training list
    train_list: str | None = None  # text file with a line "path label" for each training image
    test_list: str | None = None  # the same of the test images
    imagenet127: str | None = None  # folder with the pickles of downsampled ImageNet
    superclasses: str | None = (
        None  # file with the superclass of each class of ImageNet, see `imagenet127_data`
    )
    class_names: str | None = None  # file with a name for each class of lists or of ImageNet-127
    # labelled share of the training images of each class; None: .25 of lists (FineSSL), .1 of ImageNet-127 (ACR)
    labelled_share: float | None = None
    seed: int = 0  # of the split

    def __post_init__(self) -> None:
        kinds = {
            "dataset": ("a data set", _OF_A_SPLIT),
            "labelled": ("folders", ("unlabelled", "test")),
            "table": ("a table", ("root",)),
            "train_list": ("lists", ("test_list", "root", "class_names", "labelled_share")),
            "imagenet127": ("ImageNet-127", ("superclasses", "class_names", "labelled_share")),
        }
        given = [kind for kind in kinds if getattr(self, kind) is not None]
        if len(given) != 1:
            names = [name for name, _ in kinds.values()]
            raise ValueError(
                f"expected one of {', '.join(names[:-1])} and {names[-1]},"
                f" got {' and '.join(kinds[kind][0] for kind in given) or 'none'}"
            )
        name, own = kinds[given[0]]
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name not in (*kinds, *own, "seed") and value != entry.default:
                raise ValueError(f"{entry.name} must be {entry.default!r} with {name}, got {value!r}")
        if self.labelled is not None and self.test is None:
            raise ValueError("folders need labelled and test images, got no test folder")
        if self.train_list is not None and self.test_list is None:
            raise ValueError("lists need training and test images, got no test list")
        _at_least(self, 0, "labelled_largest", "seed")
        if self.unlabelled_largest is not None:
            _at_least(self, 0, "unlabelled_largest")
        _at_least(self, 1, "imbalance")


@dataclass(frozen=True)
class Encoder:
    """Which encoder is tuned and how classes get their first prototypes; see `towers.load_tower`."""

    model: str = "lite0"
    pretrained: str | None = None  # tag of open_clip's weights, or the path of a checkpoint
    # of the features: "joint"; "visual", before CLIP's projection (LIFT)
    space: str = "joint"
    size: int | None = None  # side of the input in pixels, None: the model's own
    templates: tuple[str, ...] | None = None  # of the class names, None: the model's own
    compile: bool = False  # torch.compile the image tower
    gradient_checkpointing: bool = False  # recompute activations in the backward pass

    def __post_init__(self) -> None:
        _one_of(self, "space", ("joint", "visual"))
        for template in self.templates or ():
            if not template.count("{}") == template.count("{") == template.count("}") == 1:
                raise ValueError(
                    f"template must have one {{}} for the class name and no other brace, got {template!r}"
                )


@dataclass(frozen=True)
class FineTuning:
    """How an encoder is tuned together with a head. What no source is named for is our choice."""

    tuning: str = "adaptformer"  # what of the encoder is trained, see `tuning.TUNINGS`
    width: int | None = None  # of its modules, None: see `tuning.tune`
    blocks: int | None = None  # only so many of the last blocks are tuned, None: see `tuning.tune`
    pipeline: str = "finessl"  # augmentations, see `augment.PIPELINES`
    steps: int = 5000
    labelled_batch: int = 32  # B_l, images of all processes and parts together (FineSSL)
    unlabelled_batch: int = 224  # B_u, 7 B_l (FixMatch, LoFT)
    parts: int = 1  # of a batch, one after the other in the memory of a device; gradients add up
    optimizer: str = "sgd"  # "sgd" (momentum 0.9; LIFT) or "adamw"
    learning_rate: float = 0.01  # at the start; cosine to 0, per step (LIFT, LoFT)
    weight_decay: float = 5e-4  # (LIFT)
    precision: str = "fp32"  # of the encoder's products: "fp32", "bf16" or "fp16"; weights stay float32
    ema: float = 0.0  # share of the old weights in their running mean, which is what is evaluated; 0 is none
    augment_on_device: bool = False  # RandAugment on the tensors of the device, see `loader.ViewLoader`
    look_ahead: bool = False  # pseudo-labels of a step from the weights of the step before
    shard: bool = False  # split the encoder, its gradients and its optimizer over the processes
    seed: int = 0  # of batches and views
    log_every: int = 50  # steps between two records of the history

    def __post_init__(self) -> None:
        _at_least(self, 0, "steps", "unlabelled_batch", "weight_decay", "seed")
        _at_least(self, 1, "labelled_batch", "parts", "log_every")
        _above_zero(self, "learning_rate")
        _one_of(self, "optimizer", ("sgd", "adamw"))
        _one_of(self, "precision", PRECISIONS)
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")

    def identity(self) -> dict[str, Any]:
        """What a run keeps when it goes on: all but its length, its reports and how processes share its memory."""
        return kept_when_continued(asdict(self))


@dataclass(frozen=True)
class Preset:
    """A method of image training: a learner, and what it changes in the defaults of the records above."""

    learner: str  # a name of `learners.LEARNERS`
    summary: str
    tuning: Mapping[str, Any] = field(default_factory=dict)  # fields of `FineTuning`
    space: str = "joint"  # of the features of an open_clip model; other encoders have one space only
    crops: str = "single"  # views of a test image: "single" or "five"


_LIFT = {"pipeline": "lift"}
# LIFT+ takes half of LIFT's epochs at twice its rate. A whole encoder needs a smaller rate than a few modules: ours.
PRESETS: dict[str, Preset] = {
    "zero_shot": Preset("zero_shot", "text prototypes, no training", {"tuning": "linear_probe", "steps": 0}),
    "linear_probe": Preset(
        "linear_probe",
        "linear probe of the frozen encoder, cross-entropy",
        {"tuning": "linear_probe", **_LIFT},
    ),
    "linear_probe_la": Preset(
        "linear_probe_la",
        "linear probe from the text, logit-adjusted (arXiv 2007.07314)",
        {"tuning": "linear_probe", **_LIFT},
    ),
    "full_fine_tune": Preset(
        "lift",
        "the whole encoder and a text-initialised cosine head, logit-adjusted",
        {"tuning": "full", "learning_rate": 1e-3, **_LIFT},
    ),
    "lift": Preset(
        "lift",
        "AdaptFormer and a text-initialised cosine head, logit-adjusted (arXiv 2309.10019)",
        _LIFT,
        "visual",
    ),
    "lift_plus": Preset(
        "lift",
        "lift with minimalist augmentation and five test crops (LIFT+)",
        {"pipeline": "lift_plus", "learning_rate": 0.02},
        "visual",
        "five",
    ),
    "fixmatch": Preset("fixmatch", "pseudo-labels above 0.95 (arXiv 2001.07685)"),
    "fixmatch_la": Preset("fixmatch_la", "fixmatch with the labelled loss logit-adjusted"),
    "freematch": Preset("freematch", "self-adaptive thresholds (arXiv 2205.07246)"),
    "daso": Preset("daso", "blend of linear and semantic pseudo-labels (arXiv 2106.05682)"),
    "acr": Preset(
        "acr", "two heads, pseudo-labels adjusted to the unlabelled distribution (ACR, Wei and Gan, 2023)"
    ),
    "ccl": Preset("ccl", "two heads, fused with the estimated prior (arXiv 2410.06109)"),
    "finessl": Preset(
        "finessl",
        "balanced margins, weighed by an auxiliary head (arXiv 2405.11756)",
        {"unlabelled_batch": 32},
    ),
    "loft": Preset(
        "loft", "hard and soft pseudo-labels by confidence (arXiv 2509.09926)", {"pipeline": "loft"}, "visual"
    ),
    "ulfine": Preset("ulfine", "prototype adaptive fitting and dual logit fusion (arXiv 2505.05062)"),
    "ulfine_plus": Preset(
        "ulfine_plus", "ulfine with posterior prototypes and a cross-validated weight of the probe (ours)"
    ),
}
