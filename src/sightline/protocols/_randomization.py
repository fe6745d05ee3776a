"""Randomization. A map that explains a network changes when the network's parameters do.

Adebayo, Gilmer, Muelly, Goodfellow, Hardt and Kim, Sanity checks for saliency maps, NeurIPS 2018; in five stages as in
Zhang et al., Opti-CAM, CVIU 2024, appendix G.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sightline.classifier import Classifier, Method
from sightline.data import Indexed, Sample, batches
from sightline.evaluation import cases, checked
from sightline.maps import degenerate, resize
from sightline.metrics import Case, Scored
from sightline.metrics._similarity import Four, Traits, alike
from sightline.registry import unknown
from sightline.runs import Choice, Score
from sightline.types import Saliency

Mode: TypeAlias = Literal["cascading", "independent"]

PARTS = ("spearman", "spearman_absolute", "ssim", "hog")


def randomization(
    method: Method,
    classifier: Classifier,
    samples: Indexed[Sample],
    /,
    *,
    mode: Mode = "cascading",
    stages: int | Sequence[str | Sequence[str]] = 5,
    scored: Scored = "label",
    seed: int = 0,
    batch: int = 16,
) -> dict[str, Score]:
    """Compare each map with those of the same network when its parameters are drawn anew, from the top down.

    "cascading" keeps what earlier stages have drawn, so the last network is random as a whole; "independent" draws one
    stage at a time. The class of every map is the label (`scored`: or what the original network predicts). Maps are
    resized to the image; each likeness is 1 for equal maps and lower is better:

        spearman            rank correlation, in [-1, 1]; near 0 is what unrelated maps have
        spearman_absolute   of the absolute values
        ssim                structural similarity of the maps scaled to [0, 1], Gaussian window
        hog                 rank correlation of the histograms of oriented gradients

    The value, and that of each image, is the likeness after the last stage ("cascading"), or the mean over the stages
    ("independent"); the curve runs over the stages, 1 at stage 0. An image of which a map is constant or not finite,
    as ReLUs often leave it in a random network, is NaN there and does not count.

    `stages`: how many (fewer where the network has fewer layers), or names of layers, one or several a stage: what is
    not named stays as it is. By default fc, layer4, layer3, layer2, then layer1 with the stem, of a ResNet; see
    `groups_of`. Every layer draws as it was made (`reinitialized`).

    *Differs:* the five stages of SPEC 11 leave out the stem; here it goes with the last one, so that all parameters are
    random in the end. Give the names for the other.

    Raises:
        LookupError: an unknown mode, or a layer that the network does not have.
        ValueError: fewer than one stage, one without parameters, no image, or one without a label.
    """
    if mode not in ("cascading", "independent"):
        raise LookupError(unknown(mode, ("cascading", "independent"), "mode"))
    groups = groups_of(classifier.model, stages)
    fresh = reinitialized(classifier.model, seed)
    found = [
        likeness(case, randomized(classifier, fresh, groups, mode))
        for case in cases(method, classifier, batches(samples, batch), scored=scored)
    ]
    if not found:
        raise ValueError("no image was measured; the data set is empty")
    numbers = torch.cat(found)
    final = numbers[:, -1] if mode == "cascading" else numbers.mean(1)
    curve = torch.cat([torch.ones(1, len(PARTS), dtype=torch.float64), numbers.nanmean(0)])
    return scores(final, curve)


def scores(final: Float[Tensor, "n 4"], curve: Float[Tensor, "s 4"] | None = None) -> dict[str, Score]:
    """Return a score a likeness: the mean over the images that count, each image, the curve over the stages."""
    found: dict[str, Score] = {}
    for i, part in enumerate(PARTS):
        points = () if curve is None else tuple(curve[:, i].tolist())
        axis, count = tuple(map(float, range(len(points)))), int(final[:, i].isfinite().sum())
        value, each = float(final[:, i].nanmean()), tuple(final[:, i].tolist())
        found[part] = Score(Choice(part), value, False, each, points, axis, count)
    return found


def likeness(case: Case, others: Iterable[Classifier]) -> Float[Tensor, "b s 4"]:
    """Return the four numbers of each image and classifier: the case's map against theirs for the same class."""
    mine, found = traits(case, case.raw), list[list[Four]]()
    for other in others:
        raw = checked(case.method(other, case.x, case.y), len(case.x))
        found.append([alike(a, b) for a, b in zip(mine, traits(case, raw), strict=True)])
    return torch.tensor(found, dtype=torch.float64).transpose(0, 1)


def traits(case: Case, raw: Saliency) -> list[Traits | None]:
    """Return what is compared of each map, at the images' size; None of one that is constant or not finite."""
    maps = resize(raw.double(), (case.x.shape[2], case.x.shape[3])).cpu()
    return [Traits.of(one[0]) if why is None else None for one, why in zip(maps, degenerate(raw), strict=True)]


def randomized(
    classifier: Classifier, fresh: nn.Module, groups: Sequence[frozenset[str]], mode: Mode = "cascading"
) -> Iterator[Classifier]:
    """Yield the classifier after each stage: a copy that has the parameters of `fresh` in the groups so far.

    One copy lives at a time; the original stays as it is.
    """
    for number in range(1, len(groups) + 1):
        chosen = frozenset[str]().union(*groups[number - 1 if mode == "independent" else 0 : number])
        model = copy.deepcopy(classifier.model)
        drawn = tensors(fresh)
        with torch.no_grad():
            for name, tensor in tensors(model).items():
                if name in chosen:
                    tensor.copy_(drawn[name])
        yield replace(classifier, model=model)


def reinitialized(model: nn.Module, seed: int = 0) -> nn.Module:
    """Return a copy whose every module has drawn its parameters as PyTorch does when it makes one.

    Modules draw by their own `reset_parameters`, batch norms forget their statistics; a parameter that none of these
    touches (class tokens, positions, gains, the projection of nn.MultiheadAttention) is drawn from the normal
    distribution of its own mean and deviation. On the CPU, whatever the device; the global random state is untouched.

    The generator's seed is itself drawn with `seed`: after `manual_seed(0)` a network whose training began with
    `manual_seed(0)` would get back the very parameters that it began with, and they are close to what it has learned.
    """
    fresh = copy.deepcopy(model).cpu()
    drawn = torch.randint(2**31, (), generator=torch.Generator().manual_seed(seed))
    with torch.random.fork_rng([]), torch.no_grad():
        torch.default_generator.manual_seed(int(drawn))
        for module in fresh.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        for before, after in zip(model.parameters(), fresh.parameters(), strict=True):
            if torch.equal(before.cpu(), after):
                after.normal_(float(after.mean()), float(after.std(correction=0)))
    return fresh.to(next((parameter.device for parameter in model.parameters()), torch.device("cpu")))


def groups_of(model: nn.Module, stages: int | Sequence[str | Sequence[str]]) -> list[frozenset[str]]:
    """Return the names of the parameters and buffers of each stage, from the top of the network to its bottom.

    Of a number: with n blocks (see `blocks`) and s stages every stage takes n // s blocks, counted from the last
    registered one, and the last stage all that is left, parameters outside the blocks (tokens, positions) included.

    Raises:
        LookupError: no such layer.
        ValueError: fewer than one stage, or one without parameters.
    """
    names = list(tensors(model))
    learned = frozenset(name for name, _ in model.named_parameters())
    if not learned:
        raise ValueError(f"{type(model).__name__} has no parameters that could be drawn anew")
    if not isinstance(stages, int):
        return [named(names, learned, [one] if isinstance(one, str) else one) for one in checked_stages(stages)]
    if stages < 1:
        raise ValueError(f"expected at least one stage, got {stages}")
    down = blocks(model, stages)[::-1]
    size = max(1, len(down) // stages)
    starts = range(0, min(len(down), size * stages), size)[:-1]
    groups = [below(names, down[start : start + size]) for start in starts]
    return [*groups, frozenset(names).difference(*groups)]


def checked_stages(stages: Sequence[str | Sequence[str]]) -> Sequence[str | Sequence[str]]:
    """Return the stages.

    Raises:
        ValueError: none.
    """
    if isinstance(stages, str) or len(stages) == 0:
        raise ValueError(f"expected a number of stages or a list of layers' names, got {stages!r}")
    return stages


def named(names: Sequence[str], learned: frozenset[str], layers: Sequence[str]) -> frozenset[str]:
    """Return the parameters and buffers of some layers.

    Raises:
        LookupError: a layer without parameters, or none of the network's.
    """
    for layer in layers:
        if not below(names, [layer]) & learned:
            known = {".".join(name.split(".")[:depth]) for name in learned for depth in range(1, name.count(".") + 2)}
            raise LookupError(unknown(layer, known, "layer with parameters"))
    return below(names, layers)


def below(names: Sequence[str], prefixes: Sequence[str]) -> frozenset[str]:
    """Return the dotted names that are one of the prefixes or lie inside it."""
    return frozenset(name for name in names if any(name == one or name.startswith(f"{one}.") for one in prefixes))


def blocks(model: nn.Module, least: int) -> list[str]:
    """Return the names of the blocks with parameters, bottom to top: the network's children, as they are registered.

    Where these are fewer than `least`, the one with most layers gives way to its own children, again and again.
    """
    found = inner(model, "")
    while len(found) < least:
        open_ = [name for name in found if inner(model, name)]
        if not open_:
            break
        widest = max(open_, key=lambda name: layers_in(model.get_submodule(name)))
        place = found.index(widest)
        found[place : place + 1] = inner(model, widest)
    return found


def inner(model: nn.Module, name: str) -> list[str]:
    """Return the names of a block's children that have parameters."""
    children = model.get_submodule(name).named_children()
    start = f"{name}." if name else ""
    return [f"{start}{child}" for child, module in children if next(module.parameters(), None) is not None]


def layers_in(module: nn.Module) -> int:
    """Return how many modules in a block have parameters of their own."""
    return sum(next(one.parameters(recurse=False), None) is not None for one in module.modules())


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name, a shared one once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
