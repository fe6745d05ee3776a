"""Oxford-IIIT Pets. Parkhi, Vedaldi, Zisserman and Jawahar, Cats and dogs, CVPR 2012: 37 breeds with trimaps."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sightline.data import Sample
from sightline.datasets._folder import known_folder, known_size, spread
from sightline.datasets._geometry import moved, stored
from sightline.datasets._voc import decoded_plane, things, tight, usable_pairs
from sightline.images import Size
from sightline.registry import chosen, unknown

BREEDS = (
    "Abyssinian", "American Bulldog", "American Pit Bull Terrier", "Basset Hound", "Beagle", "Bengal", "Birman",
    "Bombay", "Boxer", "British Shorthair", "Chihuahua", "Egyptian Mau", "English Cocker Spaniel", "English Setter",
    "German Shorthaired", "Great Pyrenees", "Havanese", "Japanese Chin", "Keeshond", "Leonberger", "Maine Coon",
    "Miniature Pinscher", "Newfoundland", "Persian", "Pomeranian", "Pug", "Ragdoll", "Russian Blue", "Saint Bernard",
    "Samoyed", "Scottish Terrier", "Shiba Inu", "Siamese", "Sphynx", "Staffordshire Bull Terrier", "Wheaten Terrier",
    "Yorkshire Terrier",
)  # fmt: skip
"""The breeds in the order of their official numbers, in torchvision's spelling."""

CATS = {
    "Abyssinian", "Bengal", "Birman", "Bombay", "British Shorthair", "Egyptian Mau", "Maine Coon", "Persian",
    "Ragdoll", "Russian Blue", "Siamese", "Sphynx",
}  # fmt: skip

SPECIES = ("Cat", "Dog")
SPLITS = ("trainval", "test")
TASKS = ("breed", "species")
INSIDE: Mapping[str, tuple[int, ...]] = {"trimap": (1, 3), "foreground": (1,), "head": (), "none": ()}
"""Kind of box -> the numbers of the trimap that it encloses."""

LAYOUT = (
    "root (or root/oxford-iiit-pet) with images/*.jpg, annotations/trainval.txt, annotations/test.txt, "
    "annotations/trimaps/*.png and annotations/xmls/*.xml (head boxes)"
)


@dataclass(frozen=True, eq=False)
class Pets:
    """Images of one split; `labels` are indices into `classes`, `heads` half-open boxes in pixels of the files."""

    root: Path
    files: tuple[str, ...]
    labels: tuple[int, ...]
    heads: tuple[Float[Tensor, "n 4"], ...] | None
    inside: tuple[int, ...]
    classes: tuple[str, ...]
    groups: tuple[str, ...]
    """The species of every class."""
    skipped: Mapping[str, str]
    size: Size
    resize: str

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int, /) -> Sample:
        """Decode one image with its trimap, and resize them together.

        Raises:
            FileNotFoundError, ImageError: the image or its trimap is missing, broken or of another size, and was not
                decoded when the data set was read.
        """
        file, label = self.files[index], self.labels[index]
        image = stored(self.root / "images" / file)
        original = (image.shape[1], image.shape[2])
        trimap = decoded_plane(_trimap(self.root, file), original, _no_trimap)
        boxes = _around(trimap, self.inside) if self.heads is None else self.heads[index]
        mask = trimap.new_tensor([0, label + 1, 0, 255])[trimap]
        together = moved(image, self.size, self.resize, boxes=boxes, mask=mask)
        return Sample(file, together.image, label=label, boxes=together.boxes, mask=together.mask, size=original)


def pets(
    root: str | Path,
    split: str = "test",
    *,
    task: str = "breed",
    breeds: Sequence[str] | None = None,
    boxes: str = "trimap",
    official: bool = True,
    size: int | Size = 224,
    resize: str = "direct",
    count: int | None = None,
    check: str = "decode",
) -> Pets:
    """Read Oxford-IIIT Pets.

    `mask` is label + 1 on the animal, 0 behind it, and 255, ignored, on the border of the trimap between them. `groups`
    are the species of the classes. The classes are the same in both splits, whichever breeds occur in them.

    Args:
        root: the folder.
        split: "trainval" or "test", the official ones.
        task: "breed", or "species": classes Cat and Dog.
        breeds: keep these breeds only, as classes in the order given; None keeps all 37. See `BREEDS`.
        boxes: "trimap", the tightest box around foreground and border; "foreground", around the foreground alone;
            "head", the official head boxes (trainval only; images without one are skipped); "none".
        official: leave out trimaps that annotations/provenance.csv says are not official, where a copy has that file;
            `skipped` says in one line how many.
        size: height and width of the samples, or the side of a square.
        resize: a policy of `sightline.images.POLICIES`.
        count: look at so many images only, evenly spaced; the broken ones among them are skipped all the same.
        check: how images and trimaps are looked at before they are listed, see `folder`.

    Raises:
        FileNotFoundError: no such folder, or a list is missing in it.
        LookupError: an unknown split, task, breed, kind of box, policy or check.
        ValueError: a damaged list, head boxes of the test split, no image can be used, or a count outside 1 to the
            number of images.
    """
    for name, known, kind in ((split, SPLITS, "split of Pets"), (task, TASKS, "task of Pets")):
        if name not in known:
            raise LookupError(unknown(name, known, kind))
    inside, kept = chosen(boxes, INSIDE, "kind of box"), _kept(breeds)
    home, target = _home(known_folder(root, LAYOUT)), known_size(size, resize)
    if boxes == "head" and split == "test":
        raise ValueError("head boxes exist for the split 'trainval' only; read that, or ask for boxes='trimap'")
    of_breeds = [animal for animal in _listed(home, split) if BREEDS[animal.number] in kept]
    if not of_breeds:
        raise ValueError(f"no image of {', '.join(kept)} in {home / 'annotations' / f'{split}.txt'}")
    animals, left_out = _official(home, of_breeds) if official else (of_breeds, {})
    picked = {animals[index].file: animals[index] for index in spread(len(animals), count)}
    heads, headless = _heads(home, list(picked)) if boxes == "head" else (None, {})
    pairs = {file: _trimap(home, file) for file in picked if file not in headless}
    files, broken = usable_pairs(home / "images", pairs, check, _no_trimap)
    by_breed = task == "breed"
    return Pets(
        home,
        files,
        tuple(kept.index(BREEDS[picked[f].number]) if by_breed else picked[f].species for f in files),
        None if heads is None else tuple(heads[file] for file in files),
        inside,
        kept if by_breed else SPECIES,
        tuple(SPECIES[breed not in CATS] for breed in kept) if by_breed else SPECIES,
        left_out | headless | broken,
        target,
        resize,
    )


class _Animal(NamedTuple):
    """A line of a list; `number` is an index into `BREEDS`, `species` one into `SPECIES`."""

    file: str
    number: int
    species: int


def _kept(breeds: Sequence[str] | None) -> tuple[str, ...]:
    """Check the breeds asked for."""
    if breeds is None:
        return BREEDS
    if isinstance(breeds, str) or not breeds or len(set(breeds)) < len(breeds):
        raise ValueError(f"expected a list of different breeds, got {breeds!r}")
    if strangers := [breed for breed in breeds if breed not in BREEDS]:
        raise LookupError(unknown(strangers[0], BREEDS, "breed"))
    return tuple(breeds)


def _home(root: Path) -> Path:
    """Take the folder itself or the one around it."""
    inner = root / "oxford-iiit-pet"
    home = inner if inner.is_dir() else root
    for folder in ("images", "annotations/trimaps"):
        if not (home / folder).is_dir():
            raise FileNotFoundError(f"no {folder} in {home}; expected {LAYOUT}")
    return home


def _listed(home: Path, split: str) -> list[_Animal]:
    """Read lines of an image's name, breed and species, both counted from 1, and one word more."""
    path = home / "annotations" / f"{split}.txt"
    if not path.is_file():
        raise FileNotFoundError(f"no annotations/{split}.txt in {home}; expected {LAYOUT}")
    try:
        lines = [line.split() for line in path.read_text().splitlines() if line.strip() and line[0] != "#"]
        return [_animal(words) for words in lines]
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; expected lines 'Breed_1 breed species rank'") from error


def _animal(words: list[str]) -> _Animal:
    """Read one line, and check that name and numbers agree: copies are known that count the breeds anew."""
    name, number, species, _ = words
    breed = " ".join(part.title() for part in name.rsplit("_", 1)[0].split("_"))
    if breed not in BREEDS or (int(number), int(species)) != (BREEDS.index(breed) + 1, 2 - (breed in CATS)):
        raise ValueError(f"{name} is not of breed {number} and species {species}")
    return _Animal(f"{name}.jpg", int(number) - 1, int(species) - 1)


def _official(home: Path, animals: list[_Animal]) -> tuple[list[_Animal], dict[str, str]]:
    """Keep the images whose trimap is official, as far as the copy says that others are not.

    Raises:
        ValueError: none is, or the file that says so is damaged.
    """
    path = home / "annotations" / "provenance.csv"
    if not path.is_file():
        return animals, {}
    try:
        with path.open(newline="") as file:
            rebuilt = {f"{row['image']}.jpg" for row in csv.DictReader(file) if row["trimap_source"] != "official"}
    except (KeyError, csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}; expected columns image and trimap_source") from error
    kept = [animal for animal in animals if animal.file not in rebuilt]
    if len(kept) == len(animals):
        return animals, {}
    if not kept:
        raise ValueError(f"none of the {len(animals)} trimaps is official by {path}; official=False takes them")
    reason = f"{len(animals) - len(kept)} of {len(animals)} images are left out, their trimaps are not official"
    return kept, {"annotations/provenance.csv": f"{reason}; official=False takes them"}


def _heads(home: Path, files: list[str]) -> tuple[dict[str, Float[Tensor, "n 4"]], dict[str, str]]:
    """Read head boxes, and say which images have none.

    Raises:
        ValueError: no image has one.
    """
    read: dict[str, Float[Tensor, "n 4"]] = {}
    skipped: dict[str, str] = {}
    for file in files:
        try:
            found = things(home / "annotations" / "xmls" / f"{Path(file).stem}.xml")
            read[file] = torch.tensor([thing.box for thing in found], dtype=torch.float32).reshape(-1, 4)
        except (ValueError, FileNotFoundError) as error:
            skipped[file] = f"{error}; boxes='trimap' needs no head box"
    if not read:
        raise ValueError(f"none of the {len(files)} images has a head box; the first: {skipped[files[0]]}")
    return read, skipped


def _trimap(home: Path, file: str) -> Path:
    return home / "annotations" / "trimaps" / f"{Path(file).stem}.png"


def _no_trimap(trimap: Int[Tensor, "h w"]) -> str:
    """Say what is wrong with a trimap; nothing if it can be used."""
    strange = trimap[(trimap < 1) | (trimap > 3)]
    return f"has the number {int(strange[0])}; expected 1 animal, 2 behind it, 3 border" if len(strange) else ""


def _around(trimap: Int[Tensor, "h w"], inside: tuple[int, ...]) -> Float[Tensor, "n 4"] | None:
    """Draw the tightest box around pixels with these numbers; None where no numbers are asked for."""
    if not inside:
        return None
    region = torch.isin(trimap, trimap.new_tensor(inside))
    return torch.tensor([tight(region)] if region.any() else []).reshape(-1, 4)
