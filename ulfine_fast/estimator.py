"""A head on features of one's own as an estimator of scikit-learn, for long-tailed and partly labelled rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from ulfine_fast.build import Builder
from ulfine_fast.config import Encoder, training_of
from ulfine_fast.features import FeatureData, centred, class_means
from ulfine_fast.learners import changed_method
from ulfine_fast.loop import train

UNLABELLED = -1


class LongTailClassifier(ClassifierMixin, BaseEstimator):
    """A method of this library on the rows of a matrix, some of them without a label.

    A row x is seen as z = unit(x - m), m the mean of all rows that `fit` was given, labelled or not: heads compare
    directions, and raw features have most of theirs in common. The weak view of an unlabelled row is z itself, a strong
    one unit(z + strong_noise * e), e normal with E|e|^2 = 1. On scikit-learn's digits with 60 to 3 labels by class,
    balanced accuracy over 5 seeds is 90.2 % with a noise of 0, 89.9 with 0.3 and 89.5 with 1; hence the default.

    Args:
        method: a preset of `config.PRESETS`. settings: fields of it by name, in the place of the preset's.
        prototypes: [C, D], of any length: where the heads start, in the order of `classes_`; they are compared with z, so
            of features that are centred they are, too. None: class means of the labelled z.
        steps, learning_rate, labelled_batch, unlabelled_batch: as `Training`; a step has so many rows of each kind.
        centre: False leaves m at 0, for features that are centred already, or whose text prototypes are not.
        strong_noise: >= 0. 4 strong views of each row are drawn once.
        random_state: an int, a `RandomState`, or None.
        device: of the training; the fitted estimator is on the CPU.

    Attributes after `fit`:
        classes_ [C], n_features_in_, feature_names_in_ (of X with names), centre_ [D] float64, learner_ (a `Learner`).
    """

    def __init__(
        self,
        method: str = "ulfine_plus",
        *,
        prototypes: np.ndarray | None = None,
        settings: Mapping[str, Any] | None = None,
        steps: int = 400,
        learning_rate: float = 0.01,
        labelled_batch: int = 32,
        unlabelled_batch: int = 224,
        centre: bool = True,
        strong_noise: float = 0.0,
        random_state: int | np.random.RandomState | None = 0,
        device: str = "cpu",
    ) -> None:
        self.method = method
        self.prototypes = prototypes
        self.settings = settings
        self.steps = steps
        self.learning_rate = learning_rate
        self.labelled_batch = labelled_batch
        self.unlabelled_batch = unlabelled_batch
        self.centre = centre
        self.strong_noise = strong_noise
        self.random_state = random_state
        self.device = device

    def fit(self, X: Any, y: Any) -> Self:  # noqa: N803 (scikit-learn's name)
        """Train on X [n, D] and y [n], where -1 marks the rows without a label.

        Labels are of any dtype that scikit-learn takes. Beside strings -1 can stand in an array of dtype object; in an
        array of strings, or of bool, all rows are labelled. Raises ValueError for labels of fewer than two classes and
        arguments that do not fit.
        """
        method = changed_method(self.method, self.settings or {})
        X, y = validate_data(self, X, y, dtype=(np.float64, np.float32))  # noqa: N806
        labelled = np.array([label != UNLABELLED for label in y.tolist()])
        check_classification_targets(y[labelled])
        self.classes_, labels = np.unique(y[labelled], return_inverse=True)
        classes = len(self.classes_)
        if classes < 2:
            raise ValueError(f"y must have labels of at least two classes, got {classes} class")
        self.centre_ = X.mean(0, dtype=np.float64) if self.centre else np.zeros(X.shape[1])
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        data = self._data(centred(X, self.centre_), labelled, torch.from_numpy(labels), seed)
        given = {
            name: getattr(self, name)
            for name in ("steps", "learning_rate", "labelled_batch", "unlabelled_batch")
        }
        training = training_of(
            self.method, {**given, "tuning": "none", "seed": seed, "log_every": max(self.steps, 1)}
        )
        builder = Builder(Encoder(), method, training, torch.device(self.device), progress=False)
        with builder.setup(data) as setup:
            train(setup.student, setup.views, setup.labelled_counts, training, progress=False)
        self.learner_ = setup.student.learner.cpu()
        return self

    def _data(self, rows: torch.Tensor, labelled: np.ndarray, labels: torch.Tensor, seed: int) -> FeatureData:
        if not self.strong_noise >= 0:
            raise ValueError(f"strong_noise must be at least 0, got {self.strong_noise}")
        names = tuple(map(str, self.classes_.tolist()))
        weak = rows[~labelled][None]
        strong = weak
        if self.strong_noise and weak.numel():
            noise = (
                torch.randn(4, *weak.shape[1:], generator=torch.Generator().manual_seed(seed))
                / weak.shape[-1] ** 0.5
            )
            strong = torch.nn.functional.normalize(weak + self.strong_noise * noise, dim=-1)
        known = rows[labelled][None]
        if self.prototypes is None:
            prototypes = class_means(known, labels, names)
        else:
            prototypes = torch.as_tensor(np.asarray(self.prototypes), dtype=torch.float32)
            if prototypes.shape != (len(names), rows.shape[1]):
                raise ValueError(
                    f"prototypes must be [C, D] = [{len(names)}, {rows.shape[1]}], got {list(prototypes.shape)}"
                )
        unlabelled = weak.shape[1]
        return FeatureData(
            labelled=known,
            labels=labels,
            weak=weak,
            strong=strong,
            unlabelled_truth=torch.full((unlabelled,), -1),
            test=rows[:0],
            test_labels=labels[:0],
            validation=None,
            validation_labels=None,
            prototypes=prototypes,
            class_names=names,
            labelled_counts=torch.bincount(labels, minlength=len(names)),
            unlabelled_counts=None,
            unlabelled_is_labelled=torch.zeros(unlabelled, dtype=torch.bool),
        )

    @torch.no_grad()
    def _logits(self, X: Any) -> np.ndarray:  # noqa: N803
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=(np.float64, np.float32))  # noqa: N806
        rows, folded = centred(X, self.centre_), self.learner_.folded()
        # in float64 a row has the same logits in every batch
        return (
            (self.learner_.logits(rows) if folded is None else rows.double() @ folded.double().T)
            .double()
            .numpy()
        )

    def decision_function(self, X: Any) -> np.ndarray:  # noqa: N803
        """Logits [n, C] for equally frequent classes; of two classes [n], those of the second less those of the first."""
        logits = self._logits(X)
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def predict_proba(self, X: Any) -> np.ndarray:  # noqa: N803
        """Probabilities [n, C], softmax of the logits: of classes that are equally frequent, and not as in the labels."""
        logits = self._logits(X)
        shares = np.exp(logits - logits.max(1, keepdims=True))
        return shares / shares.sum(1, keepdims=True)

    def predict(self, X: Any) -> np.ndarray:  # noqa: N803
        """The most likely of `classes_` for each row, [n]."""
        chosen = self._logits(X).argmax(1)
        return self.classes_[chosen]
