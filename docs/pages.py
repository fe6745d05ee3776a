"""Write a page of every method and combinator into docs/methods, and with --pictures its picture too; and a page of
every metric and protocol into docs/metrics.

The pictures explain drawn creatures with the embedded network; those of attention and of segmenters need trained ones:

    sightline train classifier --data "creatures?split=train" --test "creatures?split=test" \
        --model "mini_vit?dim=96&depth=4" --epochs 12 --set augment=flip+crop --set optimizer=adamw --set lr=0.001 \
        --set weight_decay=0.05 --set batch=64 --out out/creatures-vit
    sightline train segmenter --model "mini_seg?weights=creatures" --data "creatures?split=train&count=2000" \
        --test "creatures?split=test&count=200" --epochs 3 --out out/creatures-segmenter
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
from sightline.metrics import METRICS
from sightline.models import load
from sightline.protocols import PROTOCOLS
from sightline.runs import Choice, describe
from sightline.settings import method_of, signed

HERE = Path(__file__).parent
TEXTS = tomllib.loads((HERE / "methods.toml").read_text(encoding="utf-8"))
JUDGES = tomllib.loads((HERE / "metrics.toml").read_text(encoding="utf-8"))
DIRECTIONS = {True: "higher is better", False: "lower is better", None: "neither higher nor lower is better"}
SHOWN = (3, 11, 46)
TRANSFORMER = Path("out/creatures-vit/classifier.safetensors")
SEGMENTER = Path("out/creatures-segmenter/segmenter.safetensors")
MODELS = {
    "cnn": "torchvision:resnet50",
    "transformer": "torchvision:vit_b_16",
    "calm": "calm.safetensors",
    "segmenter": "segmenter.safetensors",
}
"""Kind of network -> the model of the example on a page."""
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
    model = MODELS[kind(name)]
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
        f"```sh\nsightline explain photo.jpg --model {model} --method '{command(name)}'\n```",
    ]
    return "\n\n".join(lines) + "\n"


def kind(name: str) -> str:
    """Return which kind of network a method's picture shows."""
    needs = METHODS[name].needs if name in METHODS else ()
    special = {"attention": "transformer", "CALM": "calm", "segmenter": "segmenter"}
    return next((special[need] for need in needs if need in special), "cnn")


def command(name: str) -> str:
    """Return the example as the command line reads it."""
    chosen = example(name)
    settings = "&".join(f"{key}={value}" for key, value in chosen.settings.items())
    return f"{chosen.name}?{settings}" if settings else chosen.name


def signature(name: str, function: Callable[..., object]) -> str:
    """Return the call with its defaults, without annotations."""
    parameters = inspect.signature(function).parameters.values()
    parts = [p.name if p.default is p.empty else f"{p.name}={shown(p.default)}" for p in parameters]
    return f"{name}({', '.join(parts)})"


def shown(default: object) -> str:
    """Return a default as a reader writes it."""
    return str(describe(default)) if callable(default) else repr(default)


def index() -> str:
    """Return the page that lists them all."""
    lines = ["# Methods", "", "| method | what it shows | paper | cost an image |", "| :-- | :-- | :-- | :-- |"]
    lines += [f"| [{n}]({n}.md) | {e.summary} | {e.paper} | {e.cost} |" for n, e in METHODS.items()]
    lines += ["", "## Combinators", "", "They make a method of others: `smooth(gradient)?samples=20`.", ""]
    lines += ["| combinator | what it gives | paper | cost an image |", "| :-- | :-- | :-- | :-- |"]
    lines += [f"| [{n}]({n}.md) | {e.summary} | {e.paper} | {e.cost} |" for n, e in COMBINATORS.items()]
    return "\n".join(lines) + "\n"


def judge_page(name: str) -> str:
    """Return the page of a metric or protocol."""
    entry = METRICS.get(name) or PROTOCOLS[name]
    function = METRICS[name].metric if name in METRICS else PROTOCOLS[name].protocol
    module = inspect.cleandoc(sys.modules[function.__module__].__doc__ or "").replace("\n", " ")
    text, unit = JUDGES[name], f" Unit: {entry.unit}." if entry.unit else ""
    lines = [
        f"# {name}",
        f"{entry.summary[0].upper()}{entry.summary[1:]}.",
        module,
        f"Direction: {direction(name)}. Range: {text['range']}.{unit}",
        f"## Definition\n\n```text\n{signature(name, function)}\n\n{inspect.getdoc(function)}\n```",
        f"## Variants\n\n{text['variants']}",
        f"## Pitfalls\n\n{text['pitfalls']}",
        f"## Who computes it differently\n\n{text['elsewhere']}",
    ]
    return "\n\n".join(lines) + "\n"


def direction(name: str) -> str:
    """Say which way a metric is better, of a protocol for each of its numbers."""
    if name in METRICS:
        return DIRECTIONS[METRICS[name].higher_is_better]
    parts = PROTOCOLS[name].parts
    if len(set(parts.values())) == 1:
        return f"{', '.join(f'`{part}`' for part in parts)}: {DIRECTIONS[next(iter(parts.values()))]}"
    return "; ".join(f"`{part}`: {DIRECTIONS[better]}" for part, better in parts.items())


def judge_index() -> str:
    """Return the page that lists metrics and protocols."""
    arrows = {True: "↑", False: "↓", None: ""}
    lines = ["# Metrics", "", "One explained batch at a time; `sightline evaluate --metric NAME?setting=value`.", ""]
    lines += ["| metric | what it measures | better | unit | paper |", "| :-- | :-- | :-- | :-- | :-- |"]
    lines += [
        f"| [{n}]({n}.md) | {e.summary} | {arrows[e.higher_is_better]} | {e.unit} | {e.paper} |"
        for n, e in METRICS.items()
    ]
    lines += [
        "",
        "## Protocols",
        "",
        "Whole data sets, several models, splits, class pairs or reruns; asked for like a metric.",
        "",
    ]
    lines += ["| protocol | what it measures | numbers | needs | paper |", "| :-- | :-- | :-- | :-- | :-- |"]
    lines += [
        f"| [{n}]({n}.md) | {e.summary} | {', '.join(f'{part} {arrows[up]}'.strip() for part, up in e.parts.items())} "
        f"| {', '.join(f'`{one}=`' for one in e.needs)} | {e.paper} |"
        for n, e in PROTOCOLS.items()
    ]
    return "\n".join(lines) + "\n"


def picture(name: str, classifiers: dict[str, Classifier]) -> bytes:
    """Return the map of each shown creature over it; the creature alone where a map says nothing."""
    method = method_of(example(name))
    classifier = classifiers[kind(name)]
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
    """Write the pages, and the pictures that are asked for: all, or those named behind --pictures."""
    folder = HERE / "methods"
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text(index(), encoding="utf-8")
    names = [*METHODS, *COMBINATORS]
    for name in names:
        (folder / f"{name}.md").write_text(page(name), encoding="utf-8")
    judges = HERE / "metrics"
    judges.mkdir(exist_ok=True)
    (judges / "README.md").write_text(judge_index(), encoding="utf-8")
    for name in (*METRICS, *PROTOCOLS):
        (judges / f"{name}.md").write_text(judge_page(name), encoding="utf-8")
    if "--pictures" not in sys.argv:
        return
    wanted = sys.argv[sys.argv.index("--pictures") + 1 :] or names
    classifiers = {"cnn": load("creatures"), "calm": load("creatures_calm")}
    trained = {"transformer": TRANSFORMER, "segmenter": SEGMENTER}
    classifiers |= {name: load(str(path)) for name, path in trained.items() if path.exists()}
    for name in wanted:
        (folder / f"{name}.jpg").write_bytes(picture(name, classifiers))
        print(folder / f"{name}.jpg", flush=True)


if __name__ == "__main__":
    main()
