"""Predictions of a fine-tuned student over several views of an image."""

from __future__ import annotations

import torch

from ulfine_fast import evaluation
from ulfine_fast.evaluation import CHUNK
from ulfine_fast.learners import build_learner


def test_logits_are_held_of_few_views_at_a_time():
    """Views count, not images: five of an image have five times its logits."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(3, 4, generator=generator)
    learner = build_learner("finessl", prototypes, torch.tensor([4, 2, 1]), seed=0)
    features = torch.randn(CHUNK, 2, 4, generator=generator)
    rows = []
    learner.auxiliary.register_forward_hook(lambda _module, given, _logits: rows.append(len(given[0])))
    found = evaluation.predict(learner, features)
    assert sum(rows) == 2 * CHUNK
    assert max(rows) <= CHUNK
    expected = torch.stack([learner.auxiliary(view) for view in features.unbind(1)]).mean(0).softmax(-1)
    assert torch.equal(found["auxiliary"].label, expected.argmax(-1))
    torch.testing.assert_close(found["auxiliary"].confidence, expected.max(-1).values)
