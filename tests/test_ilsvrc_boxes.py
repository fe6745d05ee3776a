"""A map that marks the whole image, on the boxes of ILSVRC's validation images: known errors (SPEC 5.7)."""

from pathlib import Path

import pytest
import torch

from sightline.classifier import Absent, Classifier
from sightline.data import Sample, collate
from sightline.datasets._geometry import moved
from sightline.methods import fake_cam
from sightline.metrics import Case, f1, localization_error

LISTS = Path(__file__).parents[2] / "shared" / "data" / "metadata" / "ILSVRC" / "test"

pytestmark = pytest.mark.skipif(
    not (LISTS / "localization.txt").exists(), reason="the WSOL metadata of ILSVRC is not in ../shared/data"
)


def rows(name):
    return [line.split(",") for line in (LISTS / name).read_text().splitlines() if line]


@pytest.mark.parametrize(("resize", "error", "score"), [("direct", 59.7, 55.6), ("crop", 54.3, 57.7)])
def test_a_full_image_box_has_the_known_errors(resize, error, score):
    sizes = {name: (int(h), int(w)) for name, w, h in rows("image_sizes.txt")}
    boxes = {}
    for name, *corners in rows("localization.txt"):
        boxes.setdefault(name, []).append([float(corner) for corner in corners])
    chosen = sorted(boxes)[::10]
    errors, scores = [], []
    for start in range(0, len(chosen), 32):
        x = torch.zeros(1, 3, 224, 224)
        samples = []
        for name in chosen[start : start + 32]:
            h, w = sizes[name]
            place = moved(torch.zeros(3, h, w), 224, resize, boxes=torch.tensor(boxes[name]))
            samples.append(Sample(name, x[0], 0, boxes=place.boxes))
        several, y = x.expand(len(samples), -1, -1, -1), torch.zeros(len(samples), dtype=torch.long)
        classifier = Classifier(Absent(1), "none")
        whole = fake_cam(classifier, several, y)
        case = Case(classifier, several, y, whole, whole, fake_cam, collate(samples), torch.zeros(len(samples), 1))
        errors.append(localization_error()(case))
        scores.append(f1()(case))
    assert torch.cat(errors).mean().item() == pytest.approx(error, abs=2)
    assert torch.cat(scores).mean().item() == pytest.approx(score, abs=1.5)
