"""The accuracy of a fine-tuned classifier: its own head on whole images, by the classes that it was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jobs.errors import EvaluationError
from jobs.evaluate.encoder import FrozenEncoder
from jobs.evaluate.evaluation import Show
from jobs.evaluate.features import FeaturePlan, Runner, features
from jobs.evaluate.labels import LabelledSamples
from jobs.evaluate.scores import Scores, ranked
from jobs.evaluate.subject import Subject
from pipeline.errors import clipped
from pipeline.store.storage import Storage


@dataclass(frozen=True)
class MeasuredHead:
    """A classifier, and test samples by the classes of its head."""

    classifier: FrozenEncoder
    test: LabelledSamples

    @classmethod
    def of(cls, subject: Subject, test: LabelledSamples, image_size: str) -> MeasuredHead:
        """Compare the classes of samples with those of a head.

        A head may know classes that no sample has. Where the file does not name them, they are the dataset's, in order.

        Raises:
            EvaluationError: The weights have no head, or it does not know a class.
            UserError: The size is invalid.
        """
        head = subject.head
        if head is None:
            remedy = "leave out --head, or give a fine-tuned run, its file, or an official fine-tuned one"
            raise EvaluationError("--head", "must be of a fine-tuned classifier", subject.name, remedy)
        if not subject.has_class_names:
            if len(head.classes) != len(test.classes):
                counts = f"{len(head.classes)} in the head, {len(test.classes)} in the data set"
                remedy = "the file does not name its classes: give a data set of all of them, and no others"
                raise EvaluationError("classes", "must be as many as the head has outputs", counts, remedy)
            return cls(subject.classifier(test.classes, image_size), test)
        if unknown := sorted(set(test.present) - set(head.classes)):
            some = ", ".join(clipped(name, 40) for name in unknown[:5])
            remedy = f"it was not trained with {some}{' and others' if len(unknown) > 5 else ''}; give other data"
            counts = f"{len(unknown)} of {len(test.present)} are not"
            raise EvaluationError("classes", "must be those of the head", counts, remedy)
        return cls(subject.classifier(head.classes, image_size), test.named_as(head.classes))

    def scores(
        self,
        storage: Storage,
        *,
        method: str,
        settings: Mapping[str, Any],
        plan: FeaturePlan,
        runner: Runner,
        on_progress: Show,
    ) -> Scores:
        """How the head classifies the test samples.

        Args:
            storage: Reaches them.
            method: `head` or `finetune`.
            settings: Of the training, as far as they are known.
            plan: Batches, and the device.
            runner: Where tasks run.
            on_progress: Called with samples done.
        """
        digest, ids = self.test.dataset_digest, self.test.sample_ids
        logits = features(
            storage, self.test.url, ids, self.classifier, dataset_digest=digest, plan=plan, runner=runner,
            on_progress=on_progress,
        )  # fmt: skip
        assert self.classifier.head
        ranking = ranked(logits.astype(np.float64))
        return Scores(method, settings, self.classifier.head.classes, self.test.labels, ranking)
