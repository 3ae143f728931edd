"""What `make gpu` runs: every op and the whole head step, by this library and by its rivals.

A contest is one function of `StepInputs`, made of parts: a backward pass, or an update in place, lies between
them, and torch.compile takes them one by one. The rivals are those of the benchmarks on the processor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import bench_dual_cross_entropy
import bench_orthogonality
import bench_proto_logits
import bench_pseudo_label
import torch
from baselines import (
    fused_loss,
    fused_update,
    naive_loss,
    smart_with_drop,
    smart_without_drop,
    sparse_update,
    step,
    update,
)
from shapes import SCALE, StepInputs
from torch import Tensor

from ulfine_fast.ops import orthogonality, proto_logits

Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Contest:
    """`run(inputs, given, *parts)` calls an op with the parts of one family and returns what it computes."""

    op: str
    run: Callable[..., Results]
    ours: tuple[Callable, ...]
    naive: tuple[Callable, ...]
    # The same after this library's algebra.
    smart: tuple[Callable, ...] = ()
    # Also without the rows or classes that it can leave out: eager, for that neither compiles nor captures.
    dropping: tuple[Callable, ...] = ()
    loss_on: str | None = None
    # Tensors beside the inputs that no provider changes.
    give: Callable[[StepInputs], Results] = lambda s: ()

    @property
    def reference(self) -> tuple[Callable, ...]:
        """The library's own definitions: what `auto` takes where no kernel is faster."""
        return self.ours


class Provider(NamedTuple):
    """One way to run a contest."""

    name: str
    family: str  # "ours", "reference", "naive" or "smart"
    how: str  # "eager", "graph", "compiled" or "reduce-overhead"
    backend: str = "reference"


# In the order in which they get their turn, should the time not suffice for all.
PROVIDERS = (
    Provider("naive eager", "naive", "eager"),
    Provider("triton", "ours", "eager", "triton"),
    Provider("cuda", "ours", "eager", "cuda"),
    Provider("reference", "reference", "eager"),
    Provider("triton graph", "ours", "graph", "triton"),
    Provider("cuda graph", "ours", "graph", "cuda"),
    Provider("smart eager", "smart", "eager"),
    Provider("smart graph", "smart", "graph"),
    Provider("naive graph", "naive", "graph"),
    Provider("smart reduce-overhead", "smart", "reduce-overhead"),
    Provider("naive reduce-overhead", "naive", "reduce-overhead"),
    Provider("smart compiled", "smart", "compiled"),
    Provider("naive compiled", "naive", "compiled"),
)
COMPILED = {"compiled": "default", "reduce-overhead": "reduce-overhead"}


def parts_of(contest: Contest, provider: Provider) -> tuple[Callable, ...]:
    """What `contest.run` takes from the provider; empty if the contest is not for it."""
    if provider.name == "smart eager" and contest.dropping:
        return contest.dropping
    return getattr(contest, provider.family)


def providers(contest: Contest) -> list[Provider]:
    """Those of PROVIDERS that take part."""
    return [provider for provider in PROVIDERS if parts_of(contest, provider)]


def prepared(contest: Contest, provider: Provider, s: StepInputs, given: Results) -> Callable[[], Results]:
    """A call of the provider on inputs of its own; a graph is captured here, a compiler runs at the first call."""
    parts = parts_of(contest, provider)
    if provider.how in COMPILED:
        mode = COMPILED[provider.how]
        parts = tuple(torch.compile(part, fullgraph=True, dynamic=False, mode=mode) for part in parts)
    if provider.how == "reduce-overhead":
        # Or the compiler would copy every input into its graph, and make none where one is changed in place.
        for tensor in s.tensors():
            torch._dynamo.mark_static_address(tensor)

    def call() -> Results:
        if provider.how == "reduce-overhead":
            # Results of the call before may be overwritten.
            torch.compiler.cudagraph_mark_step_begin()
        return contest.run(s, given, *parts)

    return graphed(call) if provider.how == "graph" else call


def graphed(call: Callable[[], Results]) -> Callable[[], Results]:
    """`call` as a CUDA graph; every replay writes the same tensors."""
    # On a stream of its own, as capturing requires of what autograd remembers.
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> Results:
        graph.replay()
        return results

    return replay


def _random(s: StepInputs) -> torch.Generator:
    return torch.Generator().manual_seed(len(s.linear))


def _logits_gradient(s: StepInputs) -> Results:
    gradient = torch.randn(len(s.rows), len(s.linear), generator=_random(s))
    return (gradient.to(s.rows.device),)


def _run_logits(s: StepInputs, given: Results, logits_of: Callable) -> Results:
    s.rows.grad = s.textual.grad = None
    logits = logits_of(s.rows, s.textual)
    logits.backward(*given)
    return logits.detach(), s.rows.grad, s.textual.grad


@torch.no_grad()
def _run_labels(s: StepInputs, given: Results, labels_of: Callable) -> Results:
    return labels_of(s.weak, s.linear.detach(), s.textual.detach(), s.threshold)


def _targets_and_weights(s: StepInputs) -> Results:
    labelled, unlabelled = s.labelled, len(s.weak)
    targets = torch.randint(len(s.linear), (labelled + unlabelled,), generator=_random(s))
    keep = torch.arange(unlabelled) % 2
    weights = torch.cat([torch.full((labelled,), 1 / labelled), keep / unlabelled])
    return targets.to(s.rows.device), weights.to(s.rows.device)


def _run_entropy(loss_on: str) -> Callable[..., Results]:
    def run(s: StepInputs, given: Results, loss_of: Callable) -> Results:
        s.rows.grad = s.linear.grad = None
        loss = loss_of(s.rows, s.linear, s.textual.detach(), *given, loss_on)
        loss.backward()
        return loss.detach(), s.rows.grad, s.linear.grad

    return run


def _histogram(s: StepInputs) -> Results:
    return (torch.ones_like(s.distribution),)


def _run_fit(s: StepInputs, given: Results, fit: Callable) -> Results:
    features = s.rows.detach()[: s.labelled]
    fit(features, s.targets, *given, s.textual.detach(), s.visual, s.seen, s.distribution)
    return s.textual.detach(), s.visual, s.seen, s.distribution


def _run_orthogonality(s: StepInputs, given: Results, value_of: Callable) -> Results:
    s.textual.grad = None
    value = value_of(s.textual)
    value.backward()
    return value.detach(), s.textual.grad


def _run_step(loss_on: str) -> Callable[..., Results]:
    def run(s: StepInputs, given: Results, loss_of: Callable, fit: Callable) -> Results:
        s.rows.grad = s.linear.grad = s.textual.grad = None
        loss = step(loss_of, fit)(s, loss_on)
        state = s.textual.detach(), s.visual, s.seen, s.distribution
        return loss.detach(), s.rows.grad, s.linear.grad, s.textual.grad, *state

    return run


CONTESTS = (
    *(
        Contest(
            "head step",
            _run_step(loss_on),
            ours=(fused_loss, fused_update),
            naive=(naive_loss, update),
            smart=(smart_without_drop, update),
            dropping=(smart_with_drop, sparse_update),
            loss_on=loss_on,
        )
        for loss_on in ("fused", "branches")
    ),
    Contest(
        "proto_logits",
        _run_logits,
        ours=(lambda features, prototypes: proto_logits(features, prototypes, SCALE),),
        naive=(bench_proto_logits.plain,),
        give=_logits_gradient,
    ),
    Contest(
        "pseudo_label",
        _run_labels,
        ours=(bench_pseudo_label.fused,),
        naive=(bench_pseudo_label.naive,),
        smart=(bench_pseudo_label.smart,),
    ),
    *(
        Contest(
            "dual_cross_entropy",
            _run_entropy(loss_on),
            ours=(bench_dual_cross_entropy.fused,),
            naive=(bench_dual_cross_entropy.plain,),
            smart=(bench_dual_cross_entropy.folded,),
            dropping=(bench_dual_cross_entropy.dropped,),
            loss_on=loss_on,
            give=_targets_and_weights,
        )
        for loss_on in ("fused", "branches")
    ),
    Contest(
        "proto_fit",
        _run_fit,
        ours=(fused_update,),
        naive=(update,),
        dropping=(sparse_update,),
        give=_histogram,
    ),
    Contest(
        "orthogonality",
        _run_orthogonality,
        ours=(orthogonality,),
        naive=(bench_orthogonality.naive,),
        smart=(bench_orthogonality.smart,),
    ),
)
