"""Superset depth. Kim, Choe, Akata and Oh, Keep CALM and improve visual feature attribution, ICCV 2021.

How many classes a map should stand for: figures 6 and 11 sum the maps of all classes below the first, second, ...
ancestor of the label, from the label alone to every class there is.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sightline.classifier import Classifier, Method
from sightline.data import Batch, Indexed, Sample, batches
from sightline.evaluation import Maps, Named, Subject, checked_batch
from sightline.maps import scaled
from sightline.methods._normalized import Normalize, normalization
from sightline.methods._per_class import per_class
from sightline.metrics import Case, Measure, finite
from sightline.metrics._box_accuracy import max_box_accuracy, max_box_accuracy_v2
from sightline.metrics._pxap import pxap
from sightline.registry import chosen
from sightline.runs import Choice, Score
from sightline.supersets import Hierarchy, Members, hierarchy_of, levels
from sightline.types import Labels

Judge: TypeAlias = Literal["max_box_accuracy_v2", "max_box_accuracy", "pxap"]

JUDGES: Mapping[str, Callable[[], Measure]] = {
    "max_box_accuracy_v2": max_box_accuracy_v2,
    "max_box_accuracy": max_box_accuracy,
    "pxap": pxap,
}


def superset_depth(
    method: Method,
    classifier: Classifier,
    samples: Indexed[Sample],
    /,
    *,
    hierarchy: Hierarchy | Mapping[Any, str | Sequence[str]] | str,
    nodes: Sequence[str] | None = None,
    measure: Judge | Measure = "max_box_accuracy_v2",
    normalize: Normalize = "none",
    batch: int = 16,
) -> dict[str, Score]:
    """Measure how well maps summed over ever larger supersets of the label find the object.

        S_d = sum_{c in Y_d(y)} n(M_c),   Y_0(y) = {y},   Y_d(y) = the classes below the d-th ancestor of y

    on the shortest path to the root, where a path that has ended stays (`supersets.levels`); the last level has all
    classes. n, by `normalize`: "none" (CALM), "unit" (CAM: each map min-max scaled), or "max". The maps of all classes
    are made once an image (in one forward pass for methods that can, see `per_class`), and what S_d scores is exactly
    what `over` with the classes of level d scores.

        self, all      the value at the first and at the last level
        best           the largest value of all levels; its curve are the values over d
        best_depth     the d of that value, the smallest of equal ones: neither good nor bad
        class_best     each class measured on its own images, at the d that is best for it: the mean over the images;
                       its curve is the same mean with one d for all, so its highest point is what one depth can reach
        class_depth    the mean over the images of the d that is best for their class; `per_image` has it image by
                       image, its curve in percent the share of images whose class is at its best at d

    Best depths are chosen on the very images that they are measured on, so "best" and "class_best" are upper bounds. An
    image that does not count (without a box of its label, say) is NaN. Holds batch x classes maps, and 8 bytes for each
    class of the images x level x number of the measure (24 kB for MaxBoxAccV2).

    Args:
        method: whose maps are summed.
        classifier: what it explains.
        samples: images with the boxes or masks that the measure needs.
        hierarchy: "creatures", "pets", the path of a file (lines `parent child`, or JSON), a mapping from each node to
            its parents, or a `Hierarchy`.
        nodes: what the hierarchy calls the classes, in order; by default their names, or their numbers.
        measure: by name, with its defaults, or one that keeps means.
        normalize: n.
        batch: images explained at a time.

    Raises:
        LookupError: an unknown choice or hierarchy, or a class that it does not have.
        FileNotFoundError: no such file.
        ValueError: a damaged hierarchy, `nodes` that are not one a class, a measure that pools its numbers, or no
            image; as the measure.
    """
    judge = measure if isinstance(measure, Measure) else chosen(measure, JUDGES, "measure")()
    if judge.state == "pool":
        raise ValueError("expected a measure that keeps means, got one that pools the numbers of all images")
    maps, n = Maps.of_method(method), normalization(normalize)
    sets: tuple[Members, ...] = ()
    tally = Tally(judge)
    for part in batches(samples, batch):
        subject = Subject(maps, classifier, checked_batch(part, classifier))
        y = subject.label(judge.scored, "superset_depth")
        sets = sets or levels_of(hierarchy, nodes, classifier, subject.logits.shape[1])
        tally.add(y, swept(judge, subject, y, sets, n(every_class(subject))))
    if not tally.labels:
        raise ValueError("no image was measured; the data set is empty")
    return tally.outcome()


def levels_of(
    hierarchy: Hierarchy | Mapping[Any, str | Sequence[str]] | str,
    nodes: Sequence[str] | None,
    classifier: Classifier,
    count: int,
) -> tuple[Members, ...]:
    """Return the supersets of every level for the classes of a network.

    Raises:
        ValueError: not one node a class; as `supersets.levels`.
    """
    names = tuple(nodes if nodes is not None else classifier.classes)
    if names and len(names) != count:
        raise ValueError(f"expected a node for each of {count} classes, got {len(names)}; pass nodes= in their order")
    return levels(hierarchy_of(hierarchy, names), names or tuple(map(str, range(count))))


def every_class(subject: Subject) -> Float[Tensor, "b k _i _j"]:
    """Return the raw maps of all classes for each image of a batch."""
    maps, part, (count, k) = subject.maps, subject.batch, subject.logits.shape
    y = torch.arange(k, device=part.x.device).expand(count, k)
    if isinstance(maps.method, Named):
        return torch.cat([maps.of(subject.classifier, part, column) for column in y.unbind(1)], 1)
    with maps.timed(part.x):
        found = per_class(maps.method)(subject.classifier, part.x, y).detach()
    for label, column in enumerate(found.unbind(1)):
        maps.note(subject.classifier, part.ids, [label] * count, column[:, None])
    return found


def swept(
    judge: Measure, subject: Subject, y: Labels, sets: Sequence[Members], maps: Float[Tensor, "b k i j"]
) -> Float[Tensor, "b levels width"]:
    """Return the measure's numbers at every level; where a superset does not grow, they are those of the last one."""
    labels, found = y.tolist(), list[Tensor]()
    for d, members in enumerate(sets):
        new = [i for i, label in enumerate(labels) if d == 0 or members[label] != sets[d - 1][label]]
        if new:
            S = torch.stack([maps[i, list(members[labels[i]])].sum(0, keepdim=True) for i in new])
            numbers = judge(case_of(subject, y, S, new))
            found.append(numbers if d == 0 else found[-1].index_copy(0, torch.tensor(new).to(numbers.device), numbers))
        else:
            found.append(found[-1])
    return torch.stack(found, 1).cpu()


def case_of(subject: Subject, y: Labels, S: Float[Tensor, "n 1 _i _j"], on: Sequence[int]) -> Case:
    """Return some images of a batch with their maps, ready to be scored."""
    part, places, raw = subject.batch, torch.tensor(on).to(y.device), finite(S)
    x = part.x[places]
    batch = Batch(
        tuple(part.ids[i] for i in on),
        x,
        None if part.y is None else part.y[places],
        tuple(part.samples[i] for i in on),
    )
    saliency = scaled(raw, (x.shape[2], x.shape[3])).to(x.dtype)
    return Case(subject.classifier, x, y[places], saliency, raw, subject.maps, batch, subject.logits[places])


@dataclass(eq=False)
class Tally:
    """Numbers summed by class and level, over the images that count."""

    judge: Measure
    labels: list[int] = field(default_factory=list[int])
    """Of every image; -1 for one that does not count."""
    sums: dict[int, Float[Tensor, "levels width"]] = field(default_factory=dict[int, Tensor])
    """Of every class with images that count."""

    def add(self, y: Labels, numbers: Float[Tensor, "b levels width"]) -> None:
        """Add a batch."""
        for label, one in zip(y.tolist(), numbers, strict=True):
            counts = not bool(one.isnan().any())
            self.labels.append(label if counts else -1)
            if counts:
                self.sums[label] = self.sums.get(label, 0) + one

    def values(self, means: Float[Tensor, "levels width"]) -> Float[Tensor, " levels"]:
        """Return what the measure reports of the mean numbers at each level."""
        finish = self.judge.finish
        return torch.stack([finish(one[0] if self.judge.width == 1 else one) for one in means]).double()

    def best(self, values: Float[Tensor, " levels"]) -> int:
        """Return the level with the best value, the smallest of equal ones."""
        worst = math.inf if self.judge.higher_is_better is False else -math.inf
        known = values.nan_to_num(nan=worst)
        return int(known.argmin() if self.judge.higher_is_better is False else known.argmax())

    def outcome(self) -> dict[str, Score]:
        """Return every part.

        Raises:
            ValueError: no image counts.
        """
        if not self.sums:
            raise ValueError("no image counts; the measure needs boxes or masks of the images' labels")
        total = sum(label >= 0 for label in self.labels)
        values = self.values(torch.stack(list(self.sums.values())).sum(0) / total)
        best, better = self.best(values), self.judge.higher_is_better
        axis = tuple(map(float, range(len(values))))
        scores = (
            Score(Choice("self"), float(values[0]), better, count=total),
            Score(Choice("all"), float(values[-1]), better, count=total),
            Score(Choice("best"), float(values[best]), better, (), tuple(values.tolist()), axis, total),
            Score(Choice("best_depth"), float(best), None, count=total),
            *self.by_class(axis),
        )
        return {score.metric.name: score for score in scores}

    def by_class(self, axis: tuple[float, ...]) -> tuple[Score, Score]:
        """Return the parts for which each class has a level of its own; a class without a value does not count."""
        own = {label: self.values(sums / self.labels.count(label)) for label, sums in self.sums.items()}
        depth = {label: self.best(one) for label, one in own.items() if not bool(one.isnan().any())}
        each = tuple(float(depth.get(label, math.nan)) for label in self.labels)
        counted = [label for label in self.labels if label in depth]
        d = torch.tensor([depth[label] for label in counted], dtype=torch.long)
        values = torch.stack([own[label] for label in counted]) if counted else torch.zeros(0, len(axis)).double()
        reached, mean = float(values.gather(1, d[:, None]).mean()), float(d.double().mean())
        curve, shares = values.mean(0), 100 * d.bincount(minlength=len(axis)).double() / len(d)
        better, count = self.judge.higher_is_better, len(counted)
        return (
            Score(Choice("class_best"), reached, better, (), tuple(curve.tolist()), axis, count),
            Score(Choice("class_depth"), mean, None, each, tuple(shares.tolist()), axis, count),
        )
