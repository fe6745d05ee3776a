"""Classifiers. A network with all that a method must know of it: its layer, its grid, its normalization, its score."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sightline import layers
from sightline.hooks import capture, cut, differentiable, edit, first, frozen, name_of, submodule
from sightline.layers import ToGrid, channels_first
from sightline.types import Features, Images, Labels, Logits, Saliency, Score, Values

Normalization: TypeAlias = str | tuple[Sequence[float], Sequence[float]]

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's colors, red green blue in [0, 1]."""


class UnsuitedError(ValueError):
    """The network does not offer what a method needs; the message names methods that work."""


@runtime_checkable
class Method(Protocol):
    """What explains: every function, partial, combinator's closure and trained module that has this call."""

    def __call__(self, classifier: "Classifier", x: Images, y: Labels | None = None, /) -> Saliency: ...


def logit(logits: Logits, y: Labels) -> Values:
    """Return the label's logit."""
    return logits.gather(1, y[:, None])[:, 0]


def log_probability(logits: Logits, y: Labels) -> Values:
    """Return the logarithm of the label's softmax probability."""
    return logit(logits.log_softmax(1), y)


def probability(logits: Logits, y: Labels) -> Values:
    """Return the label's softmax probability."""
    return logit(logits.softmax(1), y)


def sigmoid(logits: Logits, y: Labels) -> Values:
    """Return the label's sigmoid, for multi-label networks."""
    return logit(logits, y).sigmoid()


def margin(against: int) -> Score:
    """Return the score: the label's logit minus that of the class `against`."""
    return lambda logits, y: logit(logits, y) - logits[:, against]


def total(classes: Sequence[int]) -> Score:
    """Return the score: the sum of the logits of several classes, whatever the label."""
    return lambda logits, y: logits[:, list(classes)].sum(1)


SCORES: Mapping[str, Score] = {
    "logit": logit,
    "log_probability": log_probability,
    "probability": probability,
    "sigmoid": sigmoid,
}


class Absent(nn.Module):
    """No network: for maps of other tools, judged by annotations alone. Any forward pass is refused."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        """Refuse.

        Raises:
            UnsuitedError: always.
        """
        raise UnsuitedError(
            "this asks the classifier, and there is none (model 'none'); name the network that the maps explain"
        )


@dataclass(frozen=True, eq=False)
class Classifier:
    """A network, the layer that is explained, and how to read both.

    `to_grid(output, x)` turns the layer's output into (b, c, i, j). Images come in [0, 1] and are normalized here, so
    the layers keep the user's own names. `score` counts only for methods whose paper has no read-out of its own.
    """

    model: nn.Module
    layer: str
    score: Score = logit
    to_grid: ToGrid = channels_first
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    size: tuple[int, int] = (224, 224)
    channels: int = 3
    classes: tuple[str, ...] = ()

    def __call__(self, x: Images) -> Logits:
        """Return the logits; a network with one output counts as two classes with logits (0, z).

        Raises:
            TypeError, ValueError: images of a wrong kind or shape, not finite; logits not (b, k) or not finite.
        """
        check_images(x, self.channels)
        with frozen(self.model):
            output = self.model(self.normalize(x))
        return self.read(output, len(x))

    def read(self, output: Any, count: int) -> Logits:
        """Return the logits of so many images in what the network gave for them.

        Raises:
            TypeError, ValueError: as a call.
        """
        return check_logits(read_logits(output), count, type(self.model).__name__)

    @property
    def device(self) -> torch.device:
        """Where the network's parameters are; the CPU for a network without any."""
        return next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))

    def normalize(self, x: Images) -> Images:
        """Return (x - mean) / std in the network's own precision."""
        weight = next((p for p in self.model.parameters() if p.is_floating_point()), None)
        x = x if weight is None else x.to(weight.dtype)
        return (x - x.new_tensor(self.mean).view(1, -1, 1, 1)) / x.new_tensor(self.std).view(1, -1, 1, 1)

    def labels(self, x: Images, y: Labels | Sequence[int] | int | None) -> Labels:
        """Return one checked label an image; None means the predicted class."""
        with torch.no_grad():
            return check_labels(self(x), y)

    def at(self, layer: str | nn.Module) -> "Classifier":
        """Return the same classifier, explained at another layer.

        Raises:
            LookupError, ValueError: no such layer, or one that cannot be explained (see `wrap`).
        """
        with differentiable(), frozen(self.model):
            chosen = layers.inspect(self.model, look(self), called(self.model, layer))
        return replace(self, layer=chosen.name, to_grid=chosen.to_grid)

    def scores(self, x: Images, y: Labels | None, score: Score | None = None) -> Values:
        """Return the score of each image, differentiable with respect to x."""
        logits = self(x)
        return (score or self.score)(logits, check_labels(logits, y))

    def gradient(self, x: Images, y: Labels | None, score: Score | None = None) -> Images:
        """Return the gradient of the score with respect to the images.

        Raises:
            UnsuitedError: the images do not reach the logits differentiably.
        """
        check_images(x, self.channels)
        with differentiable(), frozen(self.model):
            leaf = x.detach().clone().requires_grad_()
            return derivative(self.scores(leaf, y, score), leaf, "the image")

    def features(self, x: Images) -> Features:
        """Return the layer's output on its grid."""
        return self.features_and_logits(x)[0]

    def features_and_logits(self, x: Images) -> tuple[Features, Logits]:
        """Return the layer's output on its grid, and the logits, of one forward pass."""
        with torch.no_grad(), capture(self.model, [self.layer]) as found:
            logits = self(x)
        return self.to_grid(self.reached(found.get(self.layer)), x), logits

    def features_and_gradient(
        self, x: Images, y: Labels | None, score: Score | None = None
    ) -> tuple[Features, Features]:
        """Return the layer's output A and the gradient of the score with respect to it, both on the grid.

        Costs one forward pass and the backward pass of what lies behind the layer.

        Raises:
            ValueError: the layer did not run.
            UnsuitedError: it does not reach the logits.
        """
        with differentiable(), frozen(self.model), cut(self.model, self.layer) as leaves:
            values = self.scores(x.detach().clone(), y, score)
            leaf = self.reached(leaves[-1] if leaves else None)
            gradient = derivative(values, leaf, f"layer {self.layer!r}")
        return self.to_grid(leaf.detach(), x), self.to_grid(gradient, x)

    def logits_with(self, x: Float[Tensor, "1 ch h w"], features: Float[Tensor, "n c i j"]) -> Float[Tensor, "n k"]:
        """Return the logits of one image when its layer gives each of `features` (n, c, i, j) in turn.

        The layers before run once, those behind on n inputs; what is not on the grid (class tokens) stays. Of a layer
        that runs twice the last output is replaced.
        """
        with torch.no_grad(), cut(self.model, self.layer) as calls:
            self(x)

        def run(images: Tensor) -> Tensor:
            left = [*calls]

            def put(output: Tensor) -> Tensor:
                left.pop()
                return output if left else self.replaced(output, x, features)

            with frozen(self.model), edit(self.model, self.layer, put):
                output = self.model(self.normalize(images))
            return self.read(output, len(features))

        try:
            return run(x)
        except (RuntimeError, TypeError):  # what lies behind wants the batch size of the input: to join both, say
            return run(x.expand(len(features), -1, -1, -1))

    def places(self, output: Tensor, x: Images) -> Int[Tensor, "c i j"]:
        """Return where in the layer's flat output for one image each feature of the grid lies."""
        numbers = torch.arange(output[0].numel(), dtype=torch.float64).view(1, *output.shape[1:])
        return self.to_grid(numbers, x[:1])[0].long().to(output.device)

    def replaced(self, output: Tensor, x: Float[Tensor, "1 ch h w"], features: Float[Tensor, "n c i j"]) -> Tensor:
        """Return n copies of the layer's output for one image, with each of `features` (n, c, i, j) on the grid."""
        places = self.places(output, x).flatten().expand(len(features), -1)
        several = output.expand(len(features), *output.shape[1:]).flatten(1)
        return several.scatter(1, places, features.flatten(1)).view(-1, *output.shape[1:])

    def reached(self, output: Tensor | None) -> Tensor:
        """Return the layer's output.

        Raises:
            ValueError: the layer did not run.
        """
        if output is None:
            raise ValueError(f"layer {self.layer!r} did not run in the forward pass; choose another with .at(layer)")
        return output


PerClass: TypeAlias = Callable[[Classifier, Images, Int[Tensor, "b n"]], Float[Tensor, "b n _i _j"]]
"""A method that explains several classes of each image in one call (`methods.per_class`)."""


def classes_of(classifier: Classifier) -> int:
    """Return how many classes a network has."""
    with torch.no_grad():
        return classifier(torch.zeros(1, classifier.channels, *classifier.size, device=classifier.device)).shape[1]


def derivative(values: Values, leaf: Tensor, what: str) -> Tensor:
    """Return the derivative of the values' sum with respect to a leaf; `what` names it in the error.

    Raises:
        UnsuitedError: the leaf does not reach the values, or the network detaches.
    """
    found = torch.autograd.grad(values.sum(), leaf, allow_unused=True)[0] if values.requires_grad else None
    if found is None:
        raise UnsuitedError(
            f"{what} gets no gradient: it does not reach the logits, or the network detaches or runs under no_grad; "
            "choose another layer, or a method without gradients, such as score_cam"
        )
    return found


def wrap(
    model: nn.Module,
    *,
    layer: str | nn.Module | None = None,
    normalization: Normalization | None = None,
    size: int | tuple[int, int] | None = None,
    classes: Sequence[str] = (),
) -> Classifier:
    """Make a classifier of any network: find its last spatial layer, its grid, its input size and channels.

    Args:
        model: any module from images to (b, k) logits (or an object with `.logits`).
        layer: a module of the network or its dotted name; by default the last one that lies on the image.
        normalization: `"imagenet"`, `"none"` (the network normalizes itself) or (mean, std); by default what timm
            recorded in the network. It is never guessed.
        size: height and width in pixels; by default what the network says of itself, else 224.
        classes: names of the classes; by default those that a Hugging Face network knows.

    Raises:
        TypeError: not a network.
        ValueError: unknown normalization, a network that cannot run, or a layer that cannot be explained (one cell,
            behind the pooling, no gradient); the message names a better one.
        LookupError: no such layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}; pass the network itself")
    if 0 in (getattr(model, "num_classes", None), getattr(model, "num_labels", None)):
        raise ValueError(f"{type(model).__name__} has no classification head; build it with num_classes=k")
    channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    mean, std = normalization_of(model, normalization, channels)
    shape = input_size(model) if size is None else (size, size) if isinstance(size, int) else size
    if min(shape) < 1:
        raise ValueError(f"expected a size of at least one pixel, got {shape}; pass size=(height, width)")
    draft = Classifier(model, "", mean=mean, std=std, size=shape, channels=channels)
    with differentiable(), frozen(model):
        found = look(draft)
        names = tuple(classes) or names_in(model, found.logits.shape[1])
        if names and len(names) != found.logits.shape[1]:
            raise ValueError(f"got {len(names)} class names for {found.logits.shape[1]} classes")
        chosen = layers.infer(model, found) if layer is None else layers.inspect(model, found, called(model, layer))
    return replace(draft, layer=chosen.name, to_grid=chosen.to_grid, classes=names)


def names_in(model: nn.Module, count: int) -> tuple[str, ...]:
    """Return the names of `count` classes in a Hugging Face network's configuration; none where they are LABEL_0 ..."""
    named = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(named, Mapping) or {*named} != {*range(count)}:
        return ()
    names = tuple(str(named[number]) for number in range(count))
    return () if names == tuple(f"LABEL_{number}" for number in range(count)) else names


def look(classifier: Classifier) -> layers.Probe:
    """Run the probe: two fixed noise images of the classifier's own size.

    Raises:
        ValueError: the network cannot run on them.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((2, classifier.channels, *classifier.size), generator=generator).to(classifier.device)
    return layers.probe(classifier.model, partial(tried, classifier), x)


def tried(classifier: Classifier, x: Images) -> Logits:
    """Return the logits of a network that may not run on images of this size.

    Raises:
        ValueError: it does not.
    """
    name, (h, w) = type(classifier.model).__name__, x.shape[2:]
    try:
        output = classifier.model(classifier.normalize(x))
    except UnsuitedError:
        raise
    except (RuntimeError, AssertionError, IndexError, ValueError) as error:
        raise ValueError(f"{name} cannot run on {h} x {w} images: {error}; pass size=(height, width)") from error
    return classifier.read(output, len(x))


def called(model: nn.Module, layer: str | nn.Module) -> str:
    """Return a layer's dotted name, the first one of a layer with several."""
    return name_of(model, submodule(model, layer) if isinstance(layer, str) else layer)


def input_size(model: nn.Module) -> tuple[int, int]:
    """Return the height and width that the network asks for, where it says so; else 224."""
    config, cfg = getattr(model, "config", None), getattr(model, "pretrained_cfg", None) or {}
    size = cfg.get("input_size", (3, None))[1:] if isinstance(cfg, Mapping) else None
    patches = next((said for module in model.modules() if (said := getattr(module, "img_size", None))), None)
    for said in (getattr(model, "image_size", None), patches, size, getattr(config, "image_size", None)):
        if isinstance(said, int):
            return said, said
        if isinstance(said, tuple | list) and len(said) == 2 and all(isinstance(n, int) for n in said):
            return said[0], said[1]
    return 224, 224


def normalization_of(
    model: nn.Module, choice: Normalization | None, channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation per channel.

    Raises:
        TypeError: no pair of sequences of numbers.
        ValueError: nothing said and nothing recorded, an unknown name, or a wrong number of values.
    """
    recorded = getattr(model, "pretrained_cfg", None)
    if choice is None and isinstance(recorded, Mapping) and "mean" in recorded:
        choice = recorded["mean"], recorded["std"]
    if choice is None:
        raise ValueError(
            f"how does {type(model).__name__} want its images normalized? Pass normalization='imagenet', "
            "normalization='none' (the network normalizes itself) or normalization=(mean, std), of a Hugging Face "
            "network its processor's (image_mean, image_std)"
        )
    if isinstance(choice, str):
        if choice not in ("imagenet", "none"):
            raise ValueError(f"no normalization called {choice!r}; use 'imagenet', 'none' or (mean, std)")
        choice = IMAGENET if choice == "imagenet" else ((0.0,), (1.0,))
    try:
        mean, std = (tuple(map(float, values)) for values in choice)
    except (TypeError, ValueError) as error:
        raise TypeError(f"expected normalization=(mean, std), one number a channel each, got {choice!r}") from error
    if len(mean) not in (1, channels) or len(std) != len(mean) or min(std) <= 0:
        raise ValueError(f"expected a mean and a positive std of {channels} channels, got {mean} and {std}")
    return mean, std


def read_logits(output: Any) -> Tensor:
    """Return the logits in a network's output: a tensor, `.logits`, or the first tensor of a tuple or mapping.

    Raises:
        TypeError: no tensor in it.
        ValueError: features of a network without a head.
    """
    if not hasattr(output, "logits") and hasattr(output, "last_hidden_state"):
        raise ValueError(
            f"the network returned {type(output).__name__} without logits: it has no classification head; build it "
            "with one: transformers' ...ForImageClassification, num_labels=k"
        )
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    found = first(output) if found is None else found
    if not isinstance(found, Tensor):
        raise TypeError(f"the network returned {type(output).__name__} without logits; expected a tensor (b, k)")
    return found


def check_images(x: Tensor, channels: int) -> None:
    """Check kind, shape and finiteness.

    Raises:
        TypeError: not a float tensor.
        ValueError: not (b, channels, h, w), an empty batch, NaN or infinity.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        given = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"expected images as a float tensor in [0, 1], got {given}")
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"expected images of shape (b, {channels}, h, w), got {tuple(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"expected at least one image, got an empty batch of shape {tuple(x.shape)}")
    if not bool(x.isfinite().all()):
        raise ValueError("the images hold NaN or infinity; expected values in [0, 1]")


def check_range(x: Images) -> None:
    """Check that the images lie in [0, 1].

    Raises:
        ValueError: they do not.
    """
    low, high = float(x.min()), float(x.max())
    if low < 0 or high > 1:
        hint = (
            "divide by 255" if low >= 0 and high > 1.5 else "undo the normalization: the classifier normalizes itself"
        )
        raise ValueError(f"expected images in [0, 1], got values from {low:.4g} to {high:.4g}; {hint}")


def check_logits(logits: Tensor, count: int, model: str) -> Logits:
    """Check shape and finiteness; make two classes of one output.

    Raises:
        ValueError: not (b, k), or not finite.
    """
    if logits.ndim != 2 or len(logits) != count:
        raise ValueError(
            f"{model} returned shape {tuple(logits.shape)} for {count} images; expected ({count}, classes)"
        )
    if not bool(logits.isfinite().all()):
        raise ValueError(f"{model} returned logits that are not finite; check its weights and its normalization")
    return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits


def tensor_of(y: Any) -> Tensor:
    """Return labels as a tensor.

    Raises:
        TypeError: they are none.
    """
    try:
        found: Tensor = torch.as_tensor(y)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"expected a label, or one an image, as integers, got {y!r}: {error}") from error
    return found


def check_labels(logits: Logits, y: Labels | Sequence[int] | int | None) -> Labels:
    """Return one label an image, copied to the logits' device; None means the predicted class.

    Raises:
        TypeError: labels that are no integers.
        ValueError: a wrong number of labels, or one outside the classes.
    """
    count, classes = logits.shape
    if y is None:
        return logits.argmax(1)
    labels = y if isinstance(y, Tensor) else tensor_of(y)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"expected integer labels, got {labels.dtype}")
    labels = labels.expand(count) if labels.ndim == 0 else labels
    if tuple(labels.shape) != (count,):
        raise ValueError(f"expected {count} labels, one an image, got shape {tuple(labels.shape)}")
    if wrong := [label for label in labels.tolist() if not 0 <= label < classes]:
        raise ValueError(f"label {wrong[0]} is outside 0..{classes - 1}: the network has {classes} classes")
    return labels.to(logits.device, torch.long, copy=True)
