"""`sightline gallery`: the picture tables of the papers."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from sightline.cli._options import SETTING

if TYPE_CHECKING:
    from sightline.backgrounds import Resolve
    from sightline.classifier import Method
    from sightline.data import Batch
    from sightline.erase import Eraser
    from sightline.gallery import Explained, Gallery
    from sightline.metrics import Scored
    from sightline.protocols._cues import Cues
    from sightline.running import Scene
    from sightline.runs import Choice, Spec

SHOWS = ("maps", "masks", "boxes", "pairs", "regions", "segments")

BELONGS: Mapping[str, tuple[str, ...]] = {
    "truth": ("maps",),
    "erase": ("masks",),
    "rule": ("masks", "boxes"),
    "as_is": ("masks", "boxes", "pairs", "segments"),
    "against": ("pairs",),
    "tau_cam": ("regions",),
    "tau_sm": ("regions",),
    "resolve": ("segments",),
    "threshold": ("segments",),
}
"""Option -> the kinds of gallery that read it."""

DEFAULTS: Mapping[str, Any] = {
    "truth": "none",
    "erase": "black",
    "rule": "matched_area",
    "tau_cam": 0.25,
    "tau_sm": 0.15,
    "resolve": ("basic",),
    "threshold": 0.15,
}
"""What such an option is where it is not given."""


@dataclass(frozen=True)
class Look:
    """What a gallery shows, as the options say."""

    show: str = "maps"
    explain: Literal["label", "predicted"] = "label"
    truth: Literal["none", "boxes", "mask"] | None = None
    erase: str | None = None
    rule: Literal["matched_area", "mean", "soft"] | None = None
    as_is: bool = False
    against: str | None = None
    tau_cam: float | None = None
    tau_sm: float | None = None
    resolve: tuple[str, ...] = ()
    threshold: float | None = None
    turn: bool = False
    side: int | None = None

    def has(self, option: str) -> bool:
        """Tell whether an option was given; zero is a value too."""
        value = getattr(self, option)
        return value is not None and value is not False and value != ()


@dataclass(frozen=True, eq=False)
class Stage:
    """One network on its data set, with everything that it is compared on."""

    title: str
    spec: "Spec"
    scene: "Scene"

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.scene.classifier.classes or self.scene.dataset.classes


@dataclass(frozen=True, eq=False)
class Plate:
    """What was drawn of one network, and what there is to say of it."""

    gallery: "Gallery"
    methods: tuple[str, ...]
    explained: tuple[str, ...]
    record: Mapping[str, Any]


@click.command("gallery", short_help="Draw the picture tables of the papers.")
@click.option("--data", default="creatures", show_default=True, help="A data set: creatures?split=test.")
@click.option(
    "--model", "models", multiple=True, default=("creatures",), show_default=True, help="A model; repeatable."
)
@click.option("--method", multiple=True, help="A method; repeatable; grad_cam by itself.")
@click.option("--name", "names", multiple=True, help="What the picture calls a method; once for each, in order.")
@click.option("--model-name", "model_names", multiple=True, help="What it calls a model; once for each, in order.")
@click.option("--images", type=click.IntRange(min=1), default=7, show_default=True, help="How many, consecutive.")
@click.option("--start", type=click.IntRange(min=0), default=0, show_default=True, help="The first image's number.")
@click.option("--class", "classes", multiple=True, help="Only images of this class, name or number; repeatable.")
@click.option("--random-classes", type=click.IntRange(min=1), help="Draw so many classes, a picture for each.")
@click.option("--show", type=click.Choice(SHOWS), default="maps", show_default=True, help="What is drawn; see above.")
@click.option(
    "--explain", type=click.Choice(("label", "predicted")), default="label", show_default=True, help="Whose map."
)
@click.option("--truth", type=click.Choice(("boxes", "mask")), help="maps: outline what is true.")
@click.option("--erase", help="masks: what takes the place of what is hidden; black, or color?mean=0.35, blur ...")
@click.option("--rule", type=click.Choice(("matched_area", "mean", "soft")), help="masks, boxes: from map to mask.")
@click.option("--as-is", is_flag=True, help="masks, boxes, pairs, segments: take maps unscaled, as a learned mask is.")
@click.option("--against", help="pairs: the other class, name or number.")
@click.option("--tau-cam", type=float, help="regions: from where on the CAM finds the object; 0.25.")
@click.option("--tau-sm", type=float, help="regions: from where on the saliency is high; 0.15.")
@click.option("--resolve", multiple=True, help="segments: basic, smooth, superpixel?scale=50 ...; repeatable.")
@click.option("--threshold", type=float, help="segments: up to where a pixel is background; 0.15.")
@click.option("--turn", is_flag=True, help="Images in rows and methods in columns.")
@click.option("--side", type=click.IntRange(min=16), help="Side of a cell in pixels; at least 112 by itself.")
@click.option("--layer", default=None, help="The layer to explain, by its dotted name.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of what is drawn at random.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("gallery.png"), show_default=True, help="The picture."
)
@SETTING
def command(
    data: str,
    models: tuple[str, ...],
    method: tuple[str, ...],
    names: tuple[str, ...],
    model_names: tuple[str, ...],
    images: int,
    start: int,
    classes: tuple[str, ...],
    random_classes: int | None,
    layer: str | None,
    seed: int,
    out: Path,
    settings: tuple[str, ...],
    **look: Any,
) -> None:
    """Draw consecutive images of a data set in columns and what methods make of them in rows: OUT.png, and OUT.json
    with everything that determines it.

    maps: each method's map over the images. masks: clean, masked in, masked out and inpainted, a block a method (figure
    2 of CASM). boxes: the box around each map and the true ones, with their IoU. pairs: the maps of the image's class
    and of another one, their difference, and where the data set knows it the parts that differ (figure 1 of CALM).
    regions: what CAM and saliency find of the object, and the distances from their hyperplanes. segments: the label
    maps that the maps of all classes in the image give (figures 1 and 5 of CAMs against saliency maps).

    With several models each gets a block. With --random-classes each class gets a picture of its own, OUT-CLASS.png.
    """
    from sightline.cli._options import methods
    from sightline.running import chosen_method, scene
    from sightline.runs import Choice, Spec

    wanted = checked(Look(**look), out, classes, random_classes)
    chosen = methods(listed(method, wanted), settings)
    choices = dict(zip(titled(chosen, names), chosen, strict=True))
    networks = [Choice.parse(model) for model in models]
    if len(networks) > 1 and wanted.explain == "predicted":
        raise ValueError("of several models each may predict another class; draw one, or explain the label")
    specs = [Spec(one, Choice.parse(data), chosen[0], (), layer=layer, seed=seed) for one in networks]
    functions = {title: chosen_method(replace(specs[0], method=one)) for title, one in choices.items()}
    each = zip(titled(networks, model_names, "model"), specs, strict=True)
    stages = [Stage(title, spec, scene(spec)) for title, spec in each]
    on, known = stages[0].scene, stages[0].classes
    if wanted.against is not None:
        numbered(wanted.against, known)
    if random_classes is None:
        pages = {out: frozenset(numbered(one, known) for one in classes) or None}
    else:
        pages = paged(on, out, random_classes, against=wanted.against, seed=seed)
    found = places(on, pages, images, start)
    for page, indices in found.items():
        if len(indices) < images:
            click.echo(f"{page}: only {len(indices)} of {images} images are there", err=True)
        drawn(page, stages, functions, indices=indices, look=wanted, record=partial(recorded, choices))


def listed(method: Sequence[str], look: Look) -> tuple[str, ...]:
    """Return the methods to draw.

    Raises:
        ValueError: some for a gallery that has its own.
    """
    if look.show != "regions":
        return tuple(method) or ("grad_cam",)
    if method:
        raise ValueError("--show regions draws the network's CAM and saliency; leave --method out")
    return ("gradient",)


def checked(look: Look, out: Path, classes: Sequence[str], random_classes: int | None) -> Look:
    """Return the options, checked against each other, with the defaults of this kind of gallery.

    Raises:
        LookupError: no such eraser or background resolve.
        ValueError: an option that the kind of gallery does not read, or one that is missing.
    """
    for option, kinds in BELONGS.items():
        if look.has(option) and look.show not in kinds:
            flag = f"--{option.replace('_', '-')}"
            raise ValueError(f"{flag} belongs to --show {' or '.join(kinds)}, and this is --show {look.show}")
    if look.show == "pairs" and look.against is None:
        raise ValueError("--show pairs needs --against, the class to compare with")
    if look.show == "boxes" and look.rule == "soft":
        raise ValueError("--rule soft marks no region that a box could go around; use matched_area or mean")
    if out.suffix.lower() != ".png":
        raise ValueError(f"the picture is a PNG, got --out {out}; call it {out.name}.png")
    if look.erase is not None:
        eraser(look.erase)
    resolves_of(look.resolve)
    if classes and random_classes:
        raise ValueError("--class and --random-classes both say which classes; give one of them")
    defaults = {option: value for option, value in DEFAULTS.items() if look.show in BELONGS[option]}
    return replace(look, **{option: value for option, value in defaults.items() if not look.has(option)})


def resolves_of(texts: Sequence[str]) -> "dict[str, Resolve]":
    """Return background resolves by their texts.

    Raises:
        LookupError, TypeError, ValueError: see `backgrounds.resolve_of`.
    """
    from sightline.backgrounds import resolve_of

    return {text: resolve_of(text) for text in texts}


def titled(chosen: "Sequence[Choice]", names: Sequence[str], kind: str = "method") -> tuple[str, ...]:
    """Return what each method is called: as the names say, else its text, a file by the parts of its path that matter.

    So too for models, which are another `kind`.

    Raises:
        ValueError: not one name a method, or two methods of one name.
    """
    flag = "--name" if kind == "method" else f"--{kind}-name"
    if names and len(names) != len(chosen):
        raise ValueError(f"expected a {flag} for each of {len(chosen)} {kind}s, got {len(names)}")
    files = [Path(one.name).with_suffix("").parts for one in chosen if one.name.endswith(".safetensors")]
    length = next((n for n in range(1, 9) if len({parts[-n:] for parts in files}) == len(files)), 9)
    titles = tuple(names) or tuple(
        "/".join(Path(one.name).with_suffix("").parts[-length:]) if one.name.endswith(".safetensors") else str(one)
        for one in chosen
    )
    if twice := [title for title in titles if titles.count(title) > 1]:
        raise ValueError(f"two {kind}s are called {twice[0]!r}; tell them apart with {flag}, once for each {kind}")
    return titles


def paged(on: "Scene", out: Path, count: int, *, against: str | None, seed: int) -> "dict[Path, frozenset[int] | None]":
    """Return the paths of pictures of random classes, with the class of each; never the one that is compared with.

    Raises:
        LookupError: no such class to compare with.
        ValueError: a data set without class names, or more classes than there are.
    """
    from sightline.gallery import drawn_classes
    from sightline.runs import file_name

    if not on.dataset.classes:
        raise ValueError("--random-classes needs a data set that names its classes; give --class")
    known = on.classifier.classes or on.dataset.classes
    apart = None if against is None else numbered(against, known)
    listed = [number for number in (numbered(one, known) for one in on.dataset.classes) if number != apart]
    labels = drawn_classes(listed, count, seed)
    return {out.with_stem(f"{out.stem}-{file_name(named(one, known))}"): frozenset({one}) for one in labels}


def places(
    on: "Scene", pages: "Mapping[Path, frozenset[int] | None]", images: int, start: int
) -> dict[Path, list[int]]:
    """Return where the images of each picture are.

    Raises:
        ValueError: a start outside the data set, or no image for a picture.
    """
    from sightline.gallery import consecutive

    known = on.classifier.classes or on.dataset.classes
    found = dict(zip(pages, consecutive(on.samples, images, list(pages.values()), start=start), strict=True))
    if empty := [page for page, indices in found.items() if not indices]:
        asked = ", ".join(named(one, known) for one in sorted(pages[empty[0]] or ()))
        raise ValueError(
            f"no image of class {asked} among images {start} to {len(on.samples) - 1} of the data set; "
            "take another class, or an earlier start"
        )
    return found


def numbered(text: str, known: Sequence[str]) -> int:
    """Return a class's number.

    Raises:
        LookupError: no such class.
    """
    from sightline.explanation import number

    found = number(text, known)
    if found < 0 or (known and found >= len(known)):
        raise LookupError(f"there are classes 0 to {len(known) - 1}, got {found}" if known else f"no class {found}")
    return found


def named(label: int, known: Sequence[str]) -> str:
    """Return a class's name, its number where it has none."""
    return known[label] if known else str(label)


def drawn(
    page: Path,
    stages: Sequence[Stage],
    functions: "Mapping[str, Method]",
    *,
    indices: Sequence[int],
    look: Look,
    record: Callable[..., dict[str, Any]],
) -> None:
    """Write one picture and its record."""
    from sightline import viz
    from sightline.gallery import stacked
    from sightline.runs import describe, strict, write_bytes, write_text
    from sightline.table import plural

    plates = {one.title: plate(one, functions, indices, look, record) for one in stages}
    first = plates[stages[0].title]
    samples = [stages[0].scene.samples[index] for index in indices]
    each = zip(indices, samples, first.explained, strict=True)
    images = [{"index": i, "id": one.id, "label": one.label, "explained": name or None} for i, one, name in each]
    told = {title: one.record for title, one in plates.items()}
    table = {**(first.record if len(plates) == 1 else {"models": told}), **asdict(look), "images": images}
    text = json.dumps(strict(table), indent=1, sort_keys=True, default=describe)
    gallery = first.gallery if len(plates) == 1 else stacked({title: one.gallery for title, one in plates.items()})
    write_bytes(page, viz.png((gallery.turned() if look.turn else gallery).sheet()))
    write_text(page.with_suffix(".json"), text + "\n")
    methods = dict.fromkeys(name for one in plates.values() for name in one.methods)
    click.echo(f"{page}: {plural(len(indices), 'image')}; {', '.join(methods)}")


def plate(
    stage: Stage,
    functions: "Mapping[str, Method]",
    indices: Sequence[int],
    look: Look,
    record: Callable[..., dict[str, Any]],
) -> Plate:
    """Explain the images with one network, and draw its gallery."""
    from sightline.data import collate
    from sightline.gallery import explained_labels, headings
    from sightline.runs import arguments

    on, segments = stage.scene, look.show == "segments"
    batch = collate([on.samples[index] for index in indices])
    made, skipped = attempted(functions, on, batch, "predicted" if segments else look.explain)
    for title, reason in skipped.items():
        click.echo(f"skipped {title}: {reason}", err=True)
    labels = explained_labels(made[0].case)
    classes = tuple("" if segments else named(label, stage.classes) for label in labels)
    gallery = shown(made, stage, headings(batch.samples, classes), look)
    notes = {
        one.title: {
            "arguments": arguments(functions[one.title]),
            "problems": one.problems,
            **({"iou": gallery.numbers[one.title]} if one.title in gallery.numbers else {}),
        }
        for one in made
    }
    told = {**record(stage.spec, notes), "skipped": skipped, "arguments": on.arguments}
    return Plate(gallery, tuple(one.title for one in made), classes, told)


def recorded(chosen: "Mapping[str, Choice]", spec: "Spec", notes: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the choices, with what is noted of every method that was drawn, and the versions."""
    from sightline.runs import provenance

    plain = spec.plain()
    asked: dict[str, Any] = {key: plain[key] for key in ("model", "data", "layer", "seed") if key in plain}
    methods = {title: {"method": chosen[title].plain(), **note} for title, note in notes.items()}
    return {**asked, "methods": methods, **provenance()}


def attempted(
    functions: "Mapping[str, Method]", on: "Scene", batch: "Batch", explain: "Scored"
) -> "tuple[list[Explained], dict[str, str]]":
    """Explain the images with every method; of several, one that the network does not suit is skipped.

    Raises:
        UnsuitedError: none is left.
    """
    from sightline.classifier import UnsuitedError
    from sightline.cli._options import bar
    from sightline.gallery import explained

    made: list[Explained] = []
    skipped: dict[str, str] = {}
    with bar() as progress:
        task = progress.add_task("explaining", total=len(functions), note="")
        for title, function in functions.items():
            progress.update(task, note=title)
            try:
                made.append(explained(title, function, on.classifier, batch, explain=explain))
            except UnsuitedError as error:
                if len(skipped) == len(functions) - 1:
                    raise
                skipped[title] = str(error)
            progress.advance(task)
    return made, skipped


def shown(made: "Sequence[Explained]", stage: Stage, columns: Sequence[str], look: Look) -> "Gallery":
    """Return the gallery that the options ask for.

    Raises:
        LookupError, ValueError: what the kind of gallery needs and the maps or images do not have.
    """
    from sightline import gallery

    if look.as_is and look.show in ("masks", "boxes"):
        check_unscaled(made)
    normalize, side, rule = not look.as_is, look.side, look.rule or "matched_area"
    if look.show == "masks":
        fill = eraser(look.erase or "black")
        return gallery.masks(made, columns, rule=rule, normalize=normalize, erase=fill, side=side)
    if look.show == "boxes" and rule != "soft":
        return gallery.boxes(made, columns, rule=rule, normalize=normalize, side=side)
    if look.show == "pairs" and look.against is not None:
        against = numbered(look.against, stage.classes)
        name, cues = named(against, stage.classes), known_cues(stage.scene)
        return gallery.pairs(made, columns, against=against, name=name, cues=cues, normalize=normalize, side=side)
    if look.show == "regions" and look.tau_cam is not None and look.tau_sm is not None:
        return gallery.regions(made[0], columns, tau_cam=look.tau_cam, tau_sm=look.tau_sm, side=side)
    if look.show == "segments" and look.threshold is not None:
        names, level = stage.classes, look.threshold
        found = resolves_of(look.resolve)
        return gallery.segments(
            made, columns, names=names, resolves=found, threshold=level, normalize=normalize, side=side
        )
    return gallery.maps(made, columns, truth=look.truth or "none", side=side)


def check_unscaled(made: "Sequence[Explained]") -> None:
    """Check that maps may be taken as they are.

    Raises:
        ValueError: maps outside [0, 1].
    """
    for one in made:
        low, high = float(one.case.raw.min()), float(one.case.raw.max())
        if low < 0 or high > 1:
            raise ValueError(
                f"--as-is takes maps in [0, 1], and those of {one.title} lie in [{low:g}, {high:g}]; leave it out, or "
                f"draw {one.title} without it in a picture of its own"
            )


def known_cues(on: "Scene") -> "Cues | None":
    """Return where the data set's classes differ; None where it does not know."""
    from sightline.protocols._cues import cues_of

    try:
        return cues_of(on.samples)
    except (ValueError, FileNotFoundError) as error:
        click.echo(f"the true difference is not drawn: {error}", err=True)
        return None


def eraser(text: str) -> "Eraser":
    """Read an eraser as the options of metrics do, or a color: color?mean=0.35, color?mean=[0.5, 0.4, 0.3].

    Raises:
        LookupError: no such eraser.
        ValueError: a color without its values in [0, 1].
    """
    from sightline.erase import Eraser, color
    from sightline.runs import Choice
    from sightline.settings import interpreted

    choice = Choice.parse(text)
    if choice.name != "color":
        found: Eraser = interpreted("erase", choice.plain(), Eraser)
        return found
    mean: Any = choice.settings.get("mean")
    values: list[Any] = mean if isinstance(mean, list) else [mean]
    if set(choice.settings) != {"mean"} or not all(isinstance(one, int | float) and 0 <= one <= 1 for one in values):
        raise ValueError(f"expected a color in [0, 1], color?mean=0.35 or color?mean=[0.5, 0.4, 0.3], got {text!r}")
    return partial(color, mean=tuple(map(float, values)))
