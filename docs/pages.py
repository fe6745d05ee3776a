"""Write a page of every method and combinator into docs/methods, and with --pictures its picture too.

The pictures explain drawn creatures with the embedded network; those of attention need a trained transformer:

    sightline train classifier --data "creatures?split=train" --test "creatures?split=test" \
        --model "mini_vit?dim=96&depth=4" --epochs 12 --set augment=flip+crop --set optimizer=adamw --set lr=0.001 \
        --set weight_decay=0.05 --set batch=64 --out out/creatures-vit
"""

import inspect
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import torch

from sightline import viz
from sightline.classifier import Classifier
from sightline.datasets import creatures
from sightline.explanation import laid
from sightline.maps import degenerate
from sightline.methods import COMBINATORS, METHODS
from sightline.models import load
from sightline.runs import Choice
from sightline.settings import method_of, signed

HERE = Path(__file__).parent
TEXTS = tomllib.loads((HERE / "methods.toml").read_text(encoding="utf-8"))
SHOWN = (3, 11, 46)
TRANSFORMER = Path("out/creatures-vit/classifier.safetensors")
EXAMPLES = {
    "over": Choice("over(grad_cam)", {"classes": [1, 3, 4, 5]}),
    "contrast": Choice("contrast(cam)", {"against": 0}),
    "mean": Choice("mean(grad_cam, guided_backprop)", {"normalize": "unit"}),
    "product": Choice("product(grad_cam, guided_backprop)", {"normalize": "unit"}),
    "flip_and_scale": Choice("flip_and_scale(cam)"),
}
"""Combinators in the pictures, where `name(gradient)` says too little."""


def example(name: str) -> Choice:
    """Return what the picture of a method or combinator shows."""
    return EXAMPLES.get(name, Choice(name if name in METHODS else f"{name}(gradient)"))


def page(name: str) -> str:
    """Return the page of a method or combinator."""
    entry = METHODS.get(name) or COMBINATORS[name]
    function = METHODS[name].method if name in METHODS else COMBINATORS[name].combinator
    module = inspect.cleandoc(sys.modules[function.__module__].__doc__ or "").replace("\n", " ")
    network = "vit_b_16" if name in METHODS and "attention" in METHODS[name].needs else "resnet50"
    needs = f"It needs: {', '.join(entry.needs)}. " if name in METHODS and entry.needs else ""
    text = TEXTS[name]
    lines = [
        f"# {name}",
        f"{entry.summary[0].upper()}{entry.summary[1:]}.",
        f"![{example(name)} on three creatures]({name}.jpg)",
        module,
        f"{needs}Cost an image: {entry.cost}.",
        f"## When to use it\n\n{text['use']}",
        f"## When not\n\n{text['avoid']}",
        f"## Definition\n\n```text\n{signature(name, function)}\n\n{inspect.getdoc(function)}\n```",
        f"```sh\nsightline explain photo.jpg --model torchvision:{network} --method '{command(name)}'\n```",
    ]
    return "\n\n".join(lines) + "\n"


def command(name: str) -> str:
    """Return the example as the command line reads it."""
    chosen = example(name)
    settings = "&".join(f"{key}={value}" for key, value in chosen.settings.items())
    return f"{chosen.name}?{settings}" if settings else chosen.name


def signature(name: str, function: Callable[..., object]) -> str:
    """Return the call with its defaults, without annotations."""
    parameters = inspect.signature(function).parameters.values()
    shown = [
        p.name if p.default is p.empty else f"{p.name}={getattr(p.default, '__name__', repr(p.default))}"
        for p in parameters
    ]
    return f"{name}({', '.join(shown)})"


def index() -> str:
    """Return the page that lists them all."""
    lines = ["# Methods", "", "| method | what it shows | paper | cost an image |", "| :-- | :-- | :-- | :-- |"]
    lines += [f"| [{n}]({n}.md) | {e.summary} | {e.paper} | {e.cost} |" for n, e in METHODS.items()]
    lines += ["", "## Combinators", "", "They make a method of others: `smooth(gradient)?samples=20`.", ""]
    lines += ["| combinator | what it gives | paper | cost an image |", "| :-- | :-- | :-- | :-- |"]
    lines += [f"| [{n}]({n}.md) | {e.summary} | {e.paper} | {e.cost} |" for n, e in COMBINATORS.items()]
    return "\n".join(lines) + "\n"


def picture(name: str, classifiers: dict[str, Classifier]) -> bytes:
    """Return the map of each shown creature over it; the creature alone where a map says nothing."""
    method = method_of(example(name))
    needs = METHODS[name].needs if name in METHODS else ()
    classifier = classifiers["transformer" if "attention" in needs else "cnn"]
    dataset, large = creatures("test", size=64), creatures("test", size=224)
    samples = [dataset[index] for index in SHOWN]
    maps = method(classifier, torch.stack([s.image for s in samples]), torch.tensor([s.label for s in samples]))
    photos = [large[index].image for index in SHOWN]
    empty = degenerate(maps)
    cells = [
        photo if nothing else laid(photo, raw.detach(), signed=signed(method))
        for photo, raw, nothing in zip(photos, maps, empty, strict=True)
    ]
    return viz.jpeg(torch.cat(cells, 2))


def main() -> None:
    """Write pages, and the pictures that are asked for: all, or those named behind --pictures."""
    folder = HERE / "methods"
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(index(), encoding="utf-8")
    names = [*METHODS, *COMBINATORS]
    for name in names:
        (folder / f"{name}.md").write_text(page(name), encoding="utf-8")
    if "--pictures" not in sys.argv:
        return
    wanted = sys.argv[sys.argv.index("--pictures") + 1 :] or names
    classifiers = {"cnn": load("creatures")}
    if TRANSFORMER.exists():
        classifiers["transformer"] = load(str(TRANSFORMER))
    for name in wanted:
        (folder / f"{name}.jpg").write_bytes(picture(name, classifiers))
        print(folder / f"{name}.jpg", flush=True)


if __name__ == "__main__":
    main()
