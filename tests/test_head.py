import copy

import pytest
import torch
from tolerances import assert_same_bits, seeded
from torch import nn

from ulfine_fast import DualHead, dual_cross_entropy, orthogonality, proto_logits, pseudo_label

CLASSES, DIM, ROWS = 7, 5, 23

HEADS = {
    "default": {},
    "unequal": {"eta": 0.3, "linear_scale": 9.0, "proto_scale": 4.0},
    "fused": {"loss_on": "fused", "eta": 0.7},
    "plain": {"normalize_linear": False, "linear_scale": 2.0},
    "probe alone": {"eta": 1.0},
    "prototypes alone": {"eta": 0.0},
}


def features() -> torch.Tensor:
    return 4 * torch.randn(ROWS, DIM, generator=seeded(1))


def head(name: str = "default") -> DualHead:
    """A head in mid-training: probe and prototypes apart, branch scales measured."""
    generator = seeded(2)
    made = DualHead(
        torch.randn(CLASSES, DIM, generator=generator),
        torch.randn(CLASSES, DIM, generator=generator),
        **HEADS[name],
    )
    made.state.measure(torch.tensor([6.0, 4.0]), decay=0.9)
    with torch.no_grad():
        made.state.textual.mul_(torch.linspace(0.5, 2, CLASSES)[:, None])
    return made


def fused_logits(made: DualHead, rows: torch.Tensor) -> torch.Tensor:
    """eta * linear branch + (1 - eta) * align * prototype branch, in float64 by the op of one branch."""
    rows, linear, textual = rows.double(), made.linear.double(), made.state.textual.double()
    scale = made.scales["linear_scale"]
    zl = proto_logits(rows, linear, scale)
    if not made.scales["normalize_linear"]:
        zl = scale * torch.nn.functional.normalize(rows, dim=-1) @ linear.T
    zt = proto_logits(rows, textual, made.scales["proto_scale"])
    return (made.eta * zl + (1 - made.eta) * made.state.align().double() * zt).detach()


# Construction


def test_the_probe_starts_from_the_text_by_default() -> None:
    made = DualHead(torch.randn(CLASSES, DIM))
    assert_same_bits(made.linear, made.state.text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": torch.ones(5)}, r"text must be \[any, any\], got \[5\]"),
        ({"text": torch.ones(0, 5)}, r"text must have at least one class, got \[0, 5\]"),
        ({"linear": torch.ones(3, 5)}, r"linear must be \[2, 5\], got \[3, 5\]"),
        ({"linear": torch.ones(2, 5, device="meta")}, "linear must be on cpu like the rest, got meta"),
        ({"eta": 1.5}, r"eta must be in \[0, 1\], got 1.5"),
        ({"linear_scale": 0.0}, "linear_scale must be a finite number above 0, got 0"),
        ({"proto_scale": float("nan")}, "proto_scale must be a finite number above 0, got nan"),
        ({"loss_on": "both"}, "loss_on must be branches or fused, got 'both'"),
        ({"linear": [1.0]}, "linear must be a tensor, got list"),
        ({"eta": "half"}, "eta must be a number, got str"),
        ({"normalize_linear": None}, "normalize_linear must be True or False, got NoneType"),
    ],
)
def test_it_says_what_it_expected(arguments, message) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        DualHead(**{"text": torch.ones(2, 5), **arguments})


def test_features_must_fit_the_head() -> None:
    with pytest.raises(ValueError, match=r"DualHead: features must be \[any, 5\], got \[3, 4\]"):
        head()(torch.ones(3, 4))
    with pytest.raises(TypeError, match="features must be float32.*, got int64"):
        head()(torch.ones(3, DIM).long())


def test_the_probe_is_a_copy_of_its_own() -> None:
    made = DualHead(torch.randn(CLASSES, DIM))
    with torch.no_grad():
        made.linear.zero_()
    assert made.state.text.any() and made.state.textual.any()


def test_the_probe_starts_from_what_is_given_as_it_is() -> None:
    start = torch.randn(CLASSES, DIM).half()
    made = DualHead(torch.randn(CLASSES, DIM), start)
    assert_same_bits(made.linear, start.float())


def test_the_parameters_are_the_probe_and_the_prototypes() -> None:
    assert sorted(name for name, _ in head().named_parameters()) == ["linear", "state.textual"]
    assert isinstance(head().linear, nn.Parameter)


def test_state_dict_round_trip_gives_the_same_logits() -> None:
    resumed = DualHead(torch.ones(CLASSES, DIM))
    resumed.load_state_dict(head().state_dict())
    assert_same_bits(resumed(features()), head()(features()))


# Inference


@pytest.mark.parametrize("name", HEADS)
def test_folded_equals_the_fused_logits_of_both_branches(name) -> None:
    made = head(name)
    unit = torch.nn.functional.normalize(features(), dim=-1)
    expected = fused_logits(made, features())
    difference = (unit @ made.folded().T - expected).abs().max()
    assert difference <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", HEADS)
def test_forward_gives_the_fused_logits(name) -> None:
    made = head(name)
    expected = fused_logits(made, features())
    assert (made(features()) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", HEADS)
def test_forward_predicts_what_the_pseudo_labels_say(name) -> None:
    made = head(name)
    pseudo = made.pseudo_label(features(), 0.5)
    logits = made(features())
    assert torch.equal(pseudo.label, logits.argmax(-1))
    torch.testing.assert_close(pseudo.confidence, logits.softmax(-1).amax(-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_is_float32_for_every_dtype_of_the_features(dtype) -> None:
    assert head()(features().to(dtype)).dtype == torch.float32


@pytest.mark.parametrize("normalize", [True, False])
def test_a_head_in_float64_predicts_in_float64(normalize) -> None:
    made = DualHead(torch.randn(CLASSES, DIM), normalize_linear=normalize)
    rows = torch.randn(3, DIM)
    wide = copy.deepcopy(made).double()(rows)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(made(rows).double(), wide, rtol=1e-5, atol=1e-5)


def test_forward_under_autocast_stays_in_float32() -> None:
    plain = head()(features())
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(head()(features()), plain)


def test_folded_and_forward_have_no_graph() -> None:
    assert not head().folded().requires_grad
    assert not head()(features().requires_grad_()).requires_grad


def test_zero_features_have_logits_zero() -> None:
    assert not head()(torch.zeros(2, DIM)).any()


def test_no_features_give_no_logits() -> None:
    assert head()(torch.zeros(0, DIM)).shape == (0, CLASSES)


def test_a_zero_prototype_folds_to_the_linear_branch() -> None:
    made = head()
    with torch.no_grad():
        made.state.textual[3] = 0
    expected = 0.5 * 25.0 * torch.nn.functional.normalize(made.linear[3], dim=-1)
    torch.testing.assert_close(made.folded()[3], expected.detach())


# The wiring of the ops


@pytest.mark.parametrize("name", HEADS)
def test_pseudo_label_is_the_op_on_probe_and_prototypes(name) -> None:
    made = head(name)
    options = {"eta": 0.5, "linear_scale": 25.0, "proto_scale": 25.0} | HEADS[name]
    options.pop("loss_on", None)
    limit = torch.linspace(0.1, 0.9, CLASSES)
    got = made.pseudo_label(features(), limit, temperature=2.0, scale_rows=9)
    expected = pseudo_label(
        features(),
        made.linear,
        made.state.textual,
        limit,
        align=1.5,
        temperature=2.0,
        scale_rows=9,
        **options,
    )
    for one, other in zip(got, expected, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("name", HEADS)
def test_loss_is_the_op_on_probe_and_prototypes(name) -> None:
    made, rows = head(name), features().requires_grad_()
    options = {"eta": 0.5, "linear_scale": 25.0, "proto_scale": 25.0} | HEADS[name]
    targets = torch.arange(ROWS) % (CLASSES + 1) - 1
    rest = {
        "weights": torch.rand(ROWS, generator=seeded(3)),
        "adjustment": torch.randn(2, CLASSES, generator=seeded(4)),
        "group": torch.arange(ROWS) % 3 - 1,
    }
    loss = made.loss(rows, targets, **rest)
    expected = dual_cross_entropy(
        rows, targets, made.linear, made.state.textual.detach(), align=1.5, **rest, **options
    )
    assert_same_bits(loss, expected)
    grads = torch.autograd.grad(loss, [rows, made.linear])
    for one, other in zip(grads, torch.autograd.grad(expected, [rows, made.linear]), strict=True):
        assert_same_bits(one, other)


def test_loss_does_not_train_the_prototypes() -> None:
    made = head()
    made.loss(features(), torch.zeros(ROWS, dtype=torch.int64)).backward()
    assert made.linear.grad.any() and made.state.textual.grad is None


def test_loss_without_an_accepted_row_is_zero_and_can_be_differentiated() -> None:
    made = head()
    loss = made.loss(features(), torch.zeros(ROWS, dtype=torch.int64), torch.zeros(ROWS))
    loss.backward()
    assert loss.item() == 0.0 and not made.linear.grad.any()


def test_orthogonality_trains_the_prototypes_alone() -> None:
    made = head()
    value = made.orthogonality()
    value.backward()
    assert_same_bits(value, orthogonality(made.state.textual))
    assert made.state.textual.grad.any() and made.linear.grad is None


def test_a_whole_step_lowers_the_loss() -> None:
    made, rows = head(), features()
    targets = torch.arange(ROWS) % CLASSES
    optimizer = torch.optim.SGD(made.parameters(), lr=0.02)
    losses = []
    for _ in range(3):
        pseudo = made.pseudo_label(rows, 0.5)
        loss = made.loss(rows, targets) + made.orthogonality()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        made.state.update(rows, targets, pseudo, mu=0.01, beta=0.9, gamma=0.99, scale_decay=0.99)
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
