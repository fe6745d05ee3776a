"""Interchange. Maps, label maps and results in the files of other tools, both ways; functions for captum and Quantus.

- WSOL: one `.npy` an image, `ROOT/<image id>.npy`, a float map (h, w) of the input (Choe et al. 2020).
- IRN: one dictionary an image with `keys` (classes), `cam` and `high_res` (Ahn et al. 2019); the original `.npy`,
  which is a pickle, or `.npz`, which is none.
- PNG label maps: class indices with Pascal VOC's palette, 255 = ignore; `segment.json` beside them names the classes.
- COCO results: a JSON list of boxes and run-length masks.
- Overlays: a map over its image as PNG, to look at.
"""

import io
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sightline import viz
from sightline.classifier import Classifier, Method, UnsuitedError
from sightline.data import check_mask
from sightline.images import POLICIES, Size, plan
from sightline.maps import resize as resampled
from sightline.maps import scaled
from sightline.registry import chosen, unknown
from sightline.runs import write_bytes, write_text
from sightline.types import Images, Labels, Logits, Saliency

Form: TypeAlias = Literal["auto", "wsol", "irn", "png", "labels"]

ENDINGS: Mapping[str, tuple[str, ...]] = {
    "wsol": (".npy",),
    "irn": (".npz", ".npy"),
    "png": (".png",),
    "labels": (".png",),
}
"""Form -> endings of its files."""

MEANING = "segment.json"
"""The file beside label maps whose `names` say, value by value, what they mean."""


def write_map(path: Path | str, saliency: Float[Tensor, "*_one i j"]) -> Path:
    """Write one map as WSOL does: float32 (h, w) in `.npy`, atomically.

    Raises:
        ValueError: more than one map, or a path that does not end in .npy.
    """
    if saliency.numel() != saliency.shape[-2] * saliency.shape[-1]:
        raise ValueError(f"expected one map (h, w), got shape {tuple(saliency.shape)}")
    return write_bytes(ending(path, ".npy"), npy(saliency.reshape(saliency.shape[-2:]).float().cpu().numpy()))


def read_map(path: Path | str) -> Float[Tensor, "i j"]:
    """Read one map: `.npy` (h, w) or (1, h, w), or a gray picture, whose range becomes [0, 1].

    Raises:
        FileNotFoundError: no such file.
        ValueError: a pickle, a damaged file, more than one map, or values that are no numbers.
    """
    file = known(path)
    if file.suffix.lower() == ".png":
        return gray(file)
    try:
        values = np.load(file, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{file} holds no map: {error}; a pickled IRN dictionary is read by read_irn(...)") from error
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "biuf" or values.squeeze().ndim != 2:
        given = f"{values.dtype} {values.shape}" if isinstance(values, np.ndarray) else "several arrays"
        raise ValueError(f"{file} holds {given}; expected one map of numbers (h, w)")
    return torch.from_numpy(values.astype(np.float32)).reshape(values.squeeze().shape)


def gray(file: Path) -> Float[Tensor, "i j"]:
    """Read a gray picture of 8 or 16 bits as a map in [0, 1].

    Raises:
        ValueError: no picture, or one with colors.
    """
    try:
        with Image.open(file) as picture:
            values = np.array(picture)
    except OSError as error:
        raise ValueError(f"{file} cannot be decoded: {error}") from error
    if values.ndim != 2:
        raise ValueError(f"{file} has colors; expected a gray picture of the map itself, not an overlay")
    top = 65535 if values.dtype != np.uint8 else 255
    return torch.from_numpy(values.astype(np.float32) / top)


@dataclass(frozen=True, eq=False)
class Cams:
    """The maps of one image for several classes, as IRN keeps them; `high_res` are the same at the image's size."""

    keys: Int[Tensor, " n"]
    cam: Float[Tensor, "n i j"]
    high_res: Float[Tensor, "n _h _w"] | None = None

    def of(self, label: int) -> Float[Tensor, "_i _j"] | None:
        """Return the finer map of a class, None where there is none."""
        places = (self.keys == label).nonzero().flatten().tolist()
        maps = self.cam if self.high_res is None else self.high_res
        return maps[places[0]] if places else None


def write_irn(path: Path | str, cams: Cams, *, pickled: bool = False) -> Path:
    """Write the maps of one image as IRN's dictionary, in `.npz`; as its own pickled `.npy` where `pickled`.

    IRN reads `np.load(path, allow_pickle=True).item()`: `keys` and `cam` are tensors there and `high_res` an array, as
    its own program writes them. The same maps give the same bytes. The pickle needs NumPy 1.26 or later.

    Raises:
        ValueError: a path with another ending, or not one map a class.
    """
    if len(cams.keys) != len(cams.cam):
        raise ValueError(f"expected one map a class, got {len(cams.keys)} classes and {len(cams.cam)} maps")
    parts = {"keys": cams.keys, "cam": cams.cam, "high_res": cams.high_res}
    arrays = {name: part.cpu().numpy() for name, part in parts.items() if part is not None}
    if pickled:
        plain = {name: array if name == "high_res" else Rebuilt(array) for name, array in arrays.items()}
        return write_bytes(ending(path, ".npy"), npy(np.array(plain, dtype=object), pickled=True))
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **arrays)  # type: ignore[arg-type]
    return write_bytes(ending(path, ".npz"), file.getvalue())


@dataclass(frozen=True, eq=False)
class Rebuilt:
    """An array that comes out of a pickle as a tensor; a tensor's own pickle has other bytes each time."""

    array: NDArray[Any]

    def __reduce__(self) -> tuple[Callable[[NDArray[Any]], Tensor], tuple[NDArray[Any]]]:
        """Say how a pickle is read."""
        return torch.from_numpy, (self.array,)


def read_irn(path: Path | str, *, pickled: bool = False) -> Cams:
    """Read IRN's dictionary from `.npz`, or from its own `.npy` where `pickled`.

    A pickle runs code of whoever wrote it: read only files that you trust.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a pickle that was not asked for, or no such dictionary.
    """
    file = known(path)
    if file.suffix == ".npy" and not pickled:
        raise ValueError(f"{file} is a pickle, which runs code of whoever wrote it; if you trust it, say pickled=true")
    try:
        loaded = np.load(file, allow_pickle=pickled)
        arrays = loaded.item() if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
        found = {
            name: torch.as_tensor(np.asarray(arrays[name])) for name in ("keys", "cam", "high_res") if name in arrays
        }
        return Cams(
            found["keys"].long(), found["cam"].float(), found["high_res"].float() if "high_res" in found else None
        )
    except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        raise ValueError(f"{file} holds no IRN dictionary: {error}; expected keys, cam and perhaps high_res") from error


def write_labels(path: Path | str, labels: Int[Tensor, "h w"]) -> Path:
    """Write a label map as PNG with Pascal VOC's palette; 255 is to be ignored.

    Raises:
        ValueError: a path that does not end in .png, or a label outside 0 to 255.
    """
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) <= 255:
        raise ValueError(f"expected labels in 0 to 255, got {int(labels.min())} to {int(labels.max())}")
    picture = Image.fromarray(labels.to(torch.uint8).cpu().numpy())
    picture.putpalette(palette())
    file = io.BytesIO()
    picture.save(file, "PNG")
    return write_bytes(ending(path, ".png"), file.getvalue())


def read_labels(path: Path | str) -> Int[Tensor, "h w"]:
    """Read a label map: the indices of a palette picture, or the values of a gray one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no picture, or one whose pixels are colors.
    """
    file = known(path)
    try:
        with Image.open(file) as picture:
            values = np.array(picture)
    except OSError as error:
        raise ValueError(f"{file} cannot be decoded: {error}") from error
    if values.ndim != 2 or values.dtype != np.uint8:
        raise ValueError(f"{file} holds colors, not labels; expected a palette or gray picture of 8 bits")
    return torch.from_numpy(values.astype(np.int64))


def placed_labels(labels: Int[Tensor, "_h _w"], size: Size, policy: str) -> Int[Tensor, "h w"]:
    """Bring a label map of an original picture to where a resize policy brings the picture, by the nearest pixel.

    Raises:
        LookupError: no such policy.
    """
    enlarged, (top, left) = plan((labels.shape[0], labels.shape[1]), size, policy)
    whole = F.interpolate(labels[None, None].float(), enlarged, mode="nearest-exact")[0, 0].long()
    return whole[top : top + size[0], left : left + size[1]]


def read_names(root: Path | str) -> tuple[str, ...]:
    """Return what the values of the label maps in a folder mean: names[v] of value v, the background's is names[0].

    `sightline segment` writes them into OUT/segment.json; the folder is OUT or OUT/labels. () where nothing says so.

    Raises:
        ValueError: a file that cannot be read.
    """
    folder = Path(root)
    places = [folder, *([folder.parent] if folder.name == "labels" else [])]
    found = next((path for path in (place / MEANING for place in places) if path.is_file()), None)
    try:
        return () if found is None else tuple(map(str, json.loads(found.read_text(encoding="utf-8")).get("names", ())))
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{found} does not say what label maps mean: {error}") from error


def write_overlay(path: Path | str, image: Float[Tensor, "ch h w"], saliency: Float[Tensor, "*_one i j"]) -> Path:
    """Write a map of any range and resolution over its image in [0, 1], as PNG.

    Raises:
        ValueError: a path that does not end in .png, or a map that shows nothing.
    """
    size = (image.shape[1], image.shape[2])
    whole = scaled(saliency.reshape(1, 1, *saliency.shape[-2:]).to(image), size)[0, 0]
    return write_bytes(ending(path, ".png"), viz.png(viz.overlay(image, whole)))


def palette() -> list[int]:
    """Return the 256 colors of Pascal VOC in 0 to 255, flat."""
    return (255 * viz.palette()).round().int().flatten().tolist()


@dataclass(frozen=True, eq=False)
class Detection:
    """One box of an image: half-open x0 y0 x1 y1 in pixels, COCO's category, a score, the mask where it is known."""

    image_id: int | str
    category_id: int
    box: tuple[float, float, float, float]
    score: float
    mask: Bool[Tensor, "h w"] | None = None


def write_coco(path: Path | str, detections: Sequence[Detection]) -> Path:
    """Write COCO's results format, a JSON list with `bbox` x y width height and run-length `segmentation`."""
    return write_text(path, json.dumps([record(one) for one in detections]) + "\n")


def record(detection: Detection) -> dict[str, Any]:
    """Return one detection as COCO writes it."""
    x0, y0, x1, y1 = detection.box
    plain = {"image_id": detection.image_id, "category_id": detection.category_id, "score": detection.score}
    plain["bbox"] = [x0, y0, x1 - x0, y1 - y0]  # type: ignore[assignment]
    return plain if detection.mask is None else {**plain, "segmentation": encoded(detection.mask)}


def read_coco(path: Path | str) -> list[Detection]:
    """Read COCO's results format.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such list.
    """
    file = known(path)
    try:
        return [detection(one) for one in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} holds no COCO results: {error!r}; expected a list of bbox, category_id, score"
        ) from error


def detection(table: Mapping[str, Any]) -> Detection:
    """Read one detection."""
    x, y, w, h = map(float, table["bbox"])
    mask = decoded(table["segmentation"]) if "segmentation" in table else None
    return Detection(table["image_id"], int(table["category_id"]), (x, y, x + w, y + h), float(table["score"]), mask)


def encoded(mask: Bool[Tensor, "h w"]) -> dict[str, Any]:
    """Return COCO's run-length code of a mask: uncompressed counts, column by column, from outside to inside."""
    flat = mask.cpu().numpy().T.reshape(-1).astype(np.int8)
    changes = np.flatnonzero(np.diff(flat, prepend=np.int8(0), append=np.int8(-1)))
    return {"size": list(mask.shape), "counts": np.diff(changes, prepend=0).tolist()}


def decoded(code: Mapping[str, Any]) -> Bool[Tensor, "h w"]:
    """Return the mask of COCO's run-length code; the compressed form needs pycocotools.

    Raises:
        ValueError: counts that do not fill the picture.
    """
    h, w = code["size"]
    counts = code["counts"]
    if isinstance(counts, str | bytes):
        from pycocotools import mask as coco

        packed: Any = {"size": [h, w], "counts": counts.encode() if isinstance(counts, str) else counts}
        return torch.from_numpy(coco.decode(packed).astype(bool))
    if sum(counts) != h * w:
        raise ValueError(f"run lengths of {sum(counts)} pixels do not fill {h} x {w}")
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return torch.from_numpy(flat.reshape(w, h).T.copy())


class StoredMaps:
    """Maps that lie in files, as a method: images are known by their names; see `stored`."""

    def __init__(self, root: Path, form: str, pickled: bool, resize: str) -> None:
        self.root, self.form, self.pickled, self.resize = root, form, pickled, resize

    def __call__(self, classifier: Classifier, x: Images, y: Labels | None = None, /) -> Saliency:
        """Refuse: an image without its name has no map.

        Raises:
            UnsuitedError: always.
        """
        raise UnsuitedError(
            f"the maps in {self.root} belong to named images; a metric that explains other images than those of the "
            "data set (max_sensitivity, adcc, randomization) needs the method itself"
        )

    def of(self, ids: Sequence[str], y: Labels, size: Size) -> Float[Tensor, "n 1 i j"]:
        """Return the maps of named images, as stored where all are of one size, else resized to `size`.

        Raises:
            FileNotFoundError: no map of an image.
            ValueError: a file that holds none, or none of the class.
        """
        pairs = list(zip(ids, y.tolist(), strict=True))
        if self.form == "labels":
            shown = {name: self.labels(name, size) for name in dict.fromkeys(ids)}
            return torch.stack([where(shown[name], label)[None] for name, label in pairs])
        maps = [self.placed(self.read(name, label), size) for name, label in pairs]
        if len({one.shape for one in maps}) > 1:
            maps = [resampled(one, size) for one in maps]
        return torch.cat(maps)

    def labels(self, name: str, size: Size) -> Int[Tensor, "h w"]:
        """Return the label map of an image, at the size of the images."""
        return placed_labels(read_labels(self.file(name)), size, "direct" if self.resize == "input" else self.resize)

    def read(self, name: str, label: int) -> Float[Tensor, "i j"]:
        """Read the map of one image for one class."""
        file = self.file(name)
        if self.form != "irn" and file.suffix != ".npz":
            return read_map(file)
        maps = read_irn(file, pickled=self.pickled)
        found = maps.of(label)
        if found is None:
            held = ", ".join(map(str, maps.keys.tolist())) or "none"
            raise ValueError(
                f"{file} holds no map of class {label}, only of {held}; explain the labels (--explain label), or make "
                "the maps of all classes that are asked for"
            )
        return found

    def file(self, name: str) -> Path:
        """Find the file of an image: its name as it is, or without its ending, and the ending of the form.

        Raises:
            FileNotFoundError: there is none.
        """
        endings = ENDINGS[self.form] if self.form != "auto" else (".npy", ".npz", ".png")
        stems = dict.fromkeys([name, str(Path(name).with_suffix("")), Path(name).name, Path(name).stem])
        tried = [self.root / f"{stem}{end}" for stem in stems for end in endings]
        found = next((path for path in tried if path.is_file()), None)
        if found is None:
            raise FileNotFoundError(
                f"no map of {name!r} in {self.root}; looked for {', '.join(p.name for p in tried[:4])}"
            )
        return found

    def placed(self, saliency: Float[Tensor, "i j"], size: Size) -> Float[Tensor, "1 1 _h _w"]:
        """Bring a map of the original picture to where the resize policy brings the picture."""
        whole = saliency[None, None]
        if self.resize == "input":
            return whole
        enlarged, (top, left) = plan((saliency.shape[0], saliency.shape[1]), size, self.resize)
        return resampled(whole, enlarged)[:, :, top : top + size[0], left : left + size[1]]


def where(labels: Int[Tensor, "h w"], label: int) -> Float[Tensor, "h w"]:
    """Return 1 where a label map shows a class, else 0.

    Raises:
        ValueError: a class for which label maps have no value.
    """
    check_mask(label)
    return (labels == label + 1).float()


def stored(root: Path | str, *, form: Form = "auto", pickled: bool = False, resize: str = "input") -> StoredMaps:
    """Return the maps in a folder as a method that `measure` and the command line score like any other.

    The map of image `id` is `root/id.npy` (WSOL), `root/id.npz` (IRN) or `root/id.png` (gray); the id's own ending and
    its folders may be left out. WSOL and PNG have one map an image, whatever the class.

    Label maps are maps too: 1 where the class is, 0 elsewhere, also where labels are ignored; value v is class v - 1.
    `segmentation?compete=all&normalize=none&threshold=0.5` scores them as they are, mistaken classes included.

    Args:
        root: the folder.
        form: "wsol", "irn", "png" (gray), "labels", or "auto", which goes by the file and takes no labels.
        pickled: read IRN's own pickled files; they run code of whoever wrote them.
        resize: "input" where maps cover what the network sees; else the policy by which the data set resizes, where
            they cover the original pictures.

    Raises:
        FileNotFoundError: no such folder.
        LookupError: no such form or policy.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; expected one map an image in it")
    if form != "auto":
        chosen(form, ENDINGS, "form of maps")
    if resize not in ("input", *POLICIES):
        raise LookupError(unknown(resize, ["input", *POLICIES], "resize policy"))
    return StoredMaps(folder, form, pickled, resize)


def of_captum(attribute: Callable[..., Tensor], *, reduce: Literal["sum", "abs_sum", "max_abs"] = "sum") -> Method:
    """Return a captum attribution as a method: `of_captum(Saliency(Network(classifier)).attribute)`.

    It must have been built on a `Network`, which takes images in [0, 1]. Colors are reduced to one channel: their sum,
    the sum of their sizes, or the largest size.

    Raises:
        LookupError: no such reduction.
    """
    shrink = chosen(reduce, REDUCTIONS, "reduction")

    def method(classifier: Classifier, x: Images, y: Labels | None = None, /) -> Saliency:
        return shrink(attribute(x, target=classifier.labels(x, y)).detach())

    return method


REDUCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda values: values.sum(1, keepdim=True),
    "abs_sum": lambda values: values.abs().sum(1, keepdim=True),
    "max_abs": lambda values: values.abs().amax(1, keepdim=True),
}
"""How channels become one."""


class Network(torch.nn.Module):
    """A classifier as a network of images in [0, 1], as captum and Quantus want it; `network` is the one inside."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.network = classifier.model
        self.classifier = classifier

    def forward(self, x: Images) -> Logits:
        """Return the logits."""
        return self.classifier(x)


def for_quantus(method: Method) -> Callable[..., NDArray[np.float32]]:
    """Return a method as Quantus' `explain_func`: arrays in, one-channel maps at the input's resolution out.

    It explains the network that Quantus hands it, which must be a `Network` (or a changed copy of one).

    Raises:
        TypeError: another network; from the function returned.
    """

    def explain_func(
        model: torch.nn.Module, inputs: NDArray[Any], targets: NDArray[Any], **settings: object
    ) -> NDArray[np.float32]:
        if not isinstance(model, Network):
            raise TypeError(
                f"expected Network(classifier), got {type(model).__name__}; give that to Quantus as the model"
            )
        device = model.classifier.device
        x = torch.as_tensor(inputs, dtype=torch.float32, device=device)
        y = torch.as_tensor(targets, dtype=torch.long, device=device).reshape(-1)
        saliency = resampled(method(model.classifier, x, y).detach(), (x.shape[2], x.shape[3]))
        found: NDArray[np.float32] = saliency.float().cpu().numpy()
        return found

    return explain_func


def known(path: Path | str) -> Path:
    """Return a file's path.

    Raises:
        FileNotFoundError: no such file.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    return file


def ending(path: Path | str, wanted: str) -> Path:
    """Return a path.

    Raises:
        ValueError: another ending than the wanted one.
    """
    if Path(path).suffix != wanted:
        raise ValueError(f"expected a path that ends in {wanted}, got {path}")
    return Path(path)


def npy(array: NDArray[Any], *, pickled: bool = False) -> bytes:
    """Return an array as the bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=pickled)
    return file.getvalue()
