"""Pseudo labels: what they are, derived slowly; that neither processes, nor kill -9, nor broken files change them."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import interpolate

from sightline import models, segmenting, viz
from sightline.backgrounds import resolve_of
from sightline.datasets import DATASETS
from sightline.explainers._segmenter_training import Pseudo
from sightline.interchange import read_irn, read_labels, read_names, stored, write_labels
from sightline.learning import learn
from sightline.methods import cam, grad_cam
from sightline.protocols import segmentation
from sightline.recipes import Recipe
from sightline.runs import Choice, arguments
from sightline.segmenting import Manifest, Segmenting, file_of, repeated, segment

SCENES = {"variant": "scenes", "count": 7}
TINY = Segmenting(Choice("creatures"), Choice("creatures", SCENES), Choice("cam"), threshold=0.2, batch=2)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(segmenting, "SHOWN", 1)


@pytest.fixture(scope="session")
def scenes():
    return DATASETS["creatures"](**SCENES)


@pytest.fixture(scope="session")
def classifier():
    return models.load("creatures")


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A segmenting in one process, and what it returned."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmenting, "SHOWN", 1)
        return out, segment(TINY, out)


@pytest.fixture
def pictures(tmp_path, scenes):
    """Six pictures of 64 x 80 to 64 x 120 pixels in two folders of classes."""
    root = tmp_path / "pictures"
    for index in range(6):
        sample = scenes[index]
        name = ("common pip", "dot-headed newt")[index % 2]
        (root / name).mkdir(parents=True, exist_ok=True)
        picture = viz.to_pil(sample.image).resize((80 + 8 * index, 64))
        picture.save(root / name / f"{index}.png")
    return root


def contents(out):
    """All files with their bytes, but for what tells of time and processes."""
    files = (path for path in sorted(out.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in files
        if path.parent.name != "done" and path.name != "timing.json"
    }


def lines(out):
    return [json.loads(line) for path in (out / "done").iterdir() for line in path.read_text().splitlines()]


def part(monkeypatch, rank, world, spec, out):
    """Segment as one of several processes."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))
    return segment(spec, out)


def slow_maps(classifier, sample, classes, method=cam):
    """The normalized maps at the input's size, class by class."""
    found = []
    for label in classes:
        raw = method(classifier, sample.image[None], torch.tensor([label])).double()
        large = interpolate(raw, tuple(sample.image.shape[1:]), mode="bilinear", align_corners=False)[0, 0]
        found.append(large / large.max() if large.max() > 0 else torch.zeros_like(large))
    return torch.stack(found)


def slow_labels(maps, classes, low, high):
    """The label of each pixel, one after the other."""
    found = torch.zeros(maps.shape[1:], dtype=torch.long)
    for i in range(maps.shape[1]):
        for j in range(maps.shape[2]):
            values = maps[:, i, j].tolist()
            best = max(range(len(classes)), key=lambda k: values[k])
            if values[best] > high:
                found[i, j] = classes[best] + 1
            elif values[best] > low:
                found[i, j] = 255
    return found


def present(sample):
    return [label for label in range(20) if sample.labels[label]]


def test_labels_are_those_of_every_pixel_one_after_the_other(whole, scenes, classifier):
    out, _ = whole
    for index in (0, 1, 6):
        sample = scenes[index]
        classes = present(sample)
        expected = slow_labels(slow_maps(classifier, sample, classes), classes, 0.2, 0.2)
        assert torch.equal(read_labels(out / "labels" / f"{sample.id}.png"), expected)


def test_between_two_thresholds_pixels_are_ignored(scenes, classifier, tmp_path):
    segment(replace(TINY, threshold=(0.1, 0.4), images=2), tmp_path / "out")
    for index in (0, 1):
        sample = scenes[index]
        classes = present(sample)
        found = read_labels(tmp_path / "out" / "labels" / f"{sample.id}.png")
        assert torch.equal(found, slow_labels(slow_maps(classifier, sample, classes), classes, 0.1, 0.4))
        assert (found == 255).any()


def test_the_manifest_counts_every_pixel(whole):
    out, manifest = whole
    values = torch.stack([read_labels(path) for path in sorted((out / "labels").iterdir())])
    assert len(values) == manifest.images == 7
    assert manifest.background == int((values == 0).sum())
    assert manifest.ignored == 0
    names = DATASETS["creatures"]().classes
    counted = {names[value - 1]: int((values == value).sum()) for value in range(1, 21) if (values == value).any()}
    assert manifest.classes == counted
    assert sum(manifest.shares.values()) == pytest.approx(1)
    written = json.loads((out / "manifest.json").read_text())
    assert written == json.loads(json.dumps(manifest.plain()))
    assert "second" not in (out / "manifest.json").read_text()


def test_the_labels_score_what_the_segmentation_protocol_says(whole, scenes, classifier):
    out, _ = whole
    hits, union = torch.zeros(21), torch.zeros(21)
    for sample in (scenes[i] for i in range(7)):
        labels = read_labels(out / "labels" / f"{sample.id}.png")
        for value in range(21):
            a, b = labels == value, sample.mask == value
            hits[value] += (a & b).sum()
            union[value] += (a | b).sum()
    expected = segmentation(cam, classifier, scenes, threshold=0.2)["miou"].value
    assert 100 * (hits[union > 0] / union[union > 0]).mean().item() == pytest.approx(expected, abs=1e-4)


def test_label_maps_are_scored_like_any_map(whole, scenes, classifier):
    maps = stored(whole[0] / "labels", form="labels")
    found = segmentation(maps, classifier, scenes, normalize="none", threshold=0.5)
    expected = segmentation(cam, classifier, scenes, threshold=TINY.low)
    for name in ("miou", "fg_precision", "dr_recall", "ndr_recall_micro"):
        assert found[name].value == expected[name].value, name


def test_label_maps_are_scored_with_their_mistakes(whole, scenes, classifier, tmp_path):
    hits, union, painted = torch.zeros(21), torch.zeros(21), set()
    for sample in (scenes[i] for i in range(7)):
        labels = read_labels(whole[0] / "labels" / f"{sample.id}.png")
        absent = next(value for value in range(1, 21) if not (sample.mask == value).any())
        labels[: labels.shape[0] // 3] = absent
        painted.add(absent)
        write_labels(tmp_path / f"{sample.id}.png", labels)
        for value in range(21):
            a, b = labels == value, sample.mask == value
            hits[value] += (a & b).sum()
            union[value] += (a | b).sum()
    maps = stored(tmp_path, form="labels")
    found = segmentation(maps, classifier, scenes, compete="all", normalize="none", threshold=0.5)
    assert painted
    assert found["miou"].value == pytest.approx(100 * (hits / union)[union > 0].mean().item(), abs=1e-4)


def test_three_processes_write_the_bytes_of_one(whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    returned = [part(monkeypatch, rank, 3, TINY, out) for rank in (2, 0, 1)]
    assert returned[:2] == [None, None]
    assert returned[2] == whole[1]
    assert contents(out) == contents(whole[0])
    assert len(contents(out)) == 7 + 3
    assert sorted(record["batch"] for record in lines(out)) == [0, 1, 2, 3]
    ranks = {path.stem: [json.loads(line)["batch"] for line in path.open()] for path in (out / "done").iterdir()}
    assert ranks == {"0": [0, 3], "1": [1], "2": [2]}


def test_another_number_of_processes_does_what_is_left(whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert part(monkeypatch, 1, 3, TINY, out) is None
    assert not (out / "manifest.json").exists()
    kept = (out / "labels" / "creatures-scenes-test-00002-s0.png").stat().st_mtime_ns
    told = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    segment(TINY, out, report=lambda *at: told.append(at))
    assert (out / "labels" / "creatures-scenes-test-00002-s0.png").stat().st_mtime_ns == kept
    assert contents(out) == contents(whole[0])
    assert sorted(record["batch"] for record in lines(out)) == [0, 1, 2, 3]
    assert [at[:2] for at in told] == [(2, 7), (4, 7), (6, 7), (7, 7)]
    assert told[0][2] == ""
    assert told[1][2].endswith(" images/s")


def test_a_finished_folder_is_left_as_it_is(whole):
    before = contents(whole[0]), lines(whole[0])
    assert segment(TINY, whole[0]) == whole[1]
    assert (contents(whole[0]), lines(whole[0])) == before


KILLED = """
import sys, time
from sightline import segmenting
from sightline.runs import Choice
slow = segmenting.written
def written(*given):
    time.sleep(0.1)
    return slow(*given)
segmenting.written = written
data = Choice("creatures", {"variant": "scenes", "count": 12})
segmenting.segment(segmenting.Segmenting(Choice("creatures"), data, Choice("cam"), batch=1), sys.argv[1])
"""


def test_kill_9_loses_nothing_and_nothing_is_done_twice(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "killed")], env=environment)
    log = tmp_path / "killed" / "done" / "0.jsonl"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_bytes().count(b"\n") > 2) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = log.read_bytes().count(b"\n")
    assert 2 < done < 12
    assert not (tmp_path / "killed" / "manifest.json").exists()
    (tmp_path / "killed" / "labels" / ".a.png.x1y2z3_8").write_bytes(b"cut off")
    data = Choice("creatures", {"variant": "scenes", "count": 12})
    spec = Segmenting(Choice("creatures"), data, Choice("cam"), batch=1)
    manifests = [segment(spec, tmp_path / name) for name in ("killed", "whole")]
    assert manifests[0] == manifests[1]
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert sorted(record["batch"] for record in lines(tmp_path / "killed")) == list(range(12))


def test_a_line_that_was_cut_off_does_not_count(whole, tmp_path):
    out = tmp_path / "out"
    segment(TINY, out)
    log = out / "done" / "0.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    (out / "labels" / "creatures-scenes-test-00006-s0.png").unlink()
    (out / "manifest.json").unlink()
    assert segment(TINY, out) == whole[1]
    assert contents(out) == contents(whole[0])
    whole_lines, torn = [], 0
    for line in log.read_text().splitlines():
        try:
            whole_lines.append(json.loads(line)["batch"])
        except ValueError:
            torn += 1
    assert (whole_lines, torn) == ([0, 1, 2, 3], 1)


def test_a_batch_that_two_processes_did_counts_once(whole, tmp_path):
    out = tmp_path / "out"
    segment(TINY, out)
    log = out / "done" / "0.jsonl"
    (out / "done" / "1.jsonl").write_bytes(log.read_bytes())
    assert segment(TINY, out) == whole[1]
    assert json.loads((out / "timing.json").read_text())["images"] == 7


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"threshold": 0.3}, "threshold was 0.2 and is 0.3;"),
        ({"method": Choice("cam", {"score": "probability"})}, "method"),
        ({"images": 6}, "images was 0 and is 6; listed.images was 7 and is 6;"),
        ({"resolve": Choice("smooth", {"sigma": 2})}, "resolve was basic and is {'name': 'smooth', 'sigma': 2};"),
    ],
)
def test_a_folder_belongs_to_one_segmenting(whole, change, told):
    before = contents(whole[0])
    if "method" in change:
        change = {"method": Choice("grad_cam")}
        told = "method was cam and is grad_cam;"
    with pytest.raises(ValueError, match="belongs to another segmenting") as error:
        segment(replace(TINY, **change), whole[0])
    assert told in str(error.value)
    assert str(error.value).endswith("delete it, or take another --out")
    assert contents(whole[0]) == before


def test_a_broken_claim_is_told(whole, tmp_path):
    out = shutil.copytree(whole[0], tmp_path / "out")
    (out / "segment.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"segment\.json is broken \(.*delete its folder"):
        segment(TINY, out)


def test_a_folder_of_before_there_were_names_gets_them(whole, tmp_path):
    """Claims said irn = false then, and lines had the ids of their images."""
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    claim = json.loads((out / "segment.json").read_text())
    del claim["names"]
    (out / "segment.json").write_text(json.dumps({**claim, "irn": False}))
    older = [{**{k: v for k, v in one.items() if k != "images"}, "ids": ["a"] * one["images"]} for one in lines(out)]
    (out / "done" / "0.jsonl").write_text("".join(json.dumps(one) + "\n" for one in older))
    (out / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"threshold was 0\.2 and is 0\.3; delete"):
        segment(replace(TINY, threshold=0.3), out)
    assert segment(TINY, out) == whole[1]
    assert contents(out) == contents(whole[0])


def test_a_folder_without_labels_may_change_hands(tmp_path):
    with pytest.raises(ValueError, match="5 superpixel"):
        failing(tmp_path)
    assert (tmp_path / "segment.json").exists()
    assert isinstance(segment(replace(TINY, images=1), tmp_path), Manifest)


def failing(out):
    """A segmenting that stops before its first label map."""

    def broken(image, maps):
        raise ValueError("5 superpixels")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmenting, "resolve_of", lambda what, divided: broken)
        segment(TINY, out)


def test_a_folder_of_pictures_that_has_changed_is_another_one(pictures, tmp_path):
    spec = replace(TINY, data=Choice("folder", {"root": str(pictures)}))
    segment(spec, tmp_path / "out")
    (pictures / "common pip" / "0.png").rename(pictures / "common pip" / "1.png")
    with pytest.raises(ValueError, match=r"another segmenting: listed.files was \w+ and is \w+;"):
        segment(spec, tmp_path / "out")


def test_weights_that_have_changed_are_another_segmenting(tmp_path, classifier):
    path = models.save(classifier, tmp_path / "net.safetensors", model=Choice("mini_resnet", {"classes": 20}))
    spec = replace(TINY, model=Choice(str(path)), images=1)
    segment(spec, tmp_path / "out")
    with torch.no_grad():
        changed = models.load(str(path))
        next(changed.model.parameters()).mul_(1.01)
    models.save(changed, path, model=Choice("mini_resnet", {"classes": 20}))
    with pytest.raises(ValueError, match="another segmenting: weights"):
        segment(spec, tmp_path / "out")


def test_labels_have_the_size_of_the_original_or_of_the_input(pictures, tmp_path, classifier):
    data = Choice("folder", {"root": str(pictures)})
    for size in ("original", "input"):
        segment(replace(TINY, data=data, size=size), tmp_path / size)
    samples = DATASETS["folder"](pictures, size=64)
    for sample in (samples[i] for i in range(len(samples))):
        name = sample.id.replace(".png", "")
        label = classifier.classes.index(name.split("/")[0])
        maps = slow_maps(classifier, sample, [label])
        found = {size: read_labels(tmp_path / size / "labels" / f"{name}.png") for size in ("original", "input")}
        assert found["input"].shape == (64, 64)
        assert torch.equal(found["input"], slow_labels(maps, [label], 0.2, 0.2))
        assert found["original"].shape == sample.size == Image.open(pictures / sample.id).size[::-1]
        large = interpolate(maps[None], sample.size, mode="bilinear", align_corners=False)[0]
        assert torch.equal(found["original"], slow_labels(large, [label], 0.2, 0.2))


def test_what_was_cut_off_has_no_labels(pictures, tmp_path):
    data = Choice("folder", {"root": str(pictures), "resize": "crop"})
    with pytest.raises(ValueError, match=r"resize=crop.* add resize=direct .*or take size input"):
        segment(replace(TINY, data=data), tmp_path / "out")
    segment(replace(TINY, data=data, size="input", images=1), tmp_path / "out")


def test_the_network_can_say_which_classes_compete(scenes, classifier, tmp_path):
    expected = {"top": [], "top?most=3": [], "predicted": [], "predicted?above=0.2": [], "all": []}
    for index in range(3):
        with torch.no_grad():
            logits = classifier(scenes[index].image[None])[0].tolist()
        order = sorted(range(20), key=lambda label: -logits[label])
        likely = {
            above: [k for k in range(20) if 1 / (1 + math.exp(-logits[k])) > above or k == order[0]]
            for above in (0.5, 0.2)
        }
        chosen = (order[:1], sorted(order[:3]), likely[0.5], likely[0.2], list(range(20)))
        for listed, classes in zip(expected.values(), chosen, strict=True):
            listed.append(classes)
    assert len({str(listed) for listed in expected.values()}) == 5
    for number, (name, listed) in enumerate(expected.items()):
        out = tmp_path / str(number)
        segment(replace(TINY, classes=Choice.parse(name), images=3, irn="npz"), out)
        for index, classes in enumerate(listed):
            sample = scenes[index]
            found = read_irn(out / "irn" / f"{sample.id}.npz")
            assert found.keys.tolist() == classes
            assert set(read_labels(out / "labels" / f"{sample.id}.png").unique().tolist()) <= {
                0,
                *(label + 1 for label in classes),
            }


@pytest.mark.parametrize("form", ["npz", "npy"])
def test_irn_files_hold_the_maps_whose_threshold_gives_the_labels(pictures, tmp_path, form):
    data = Choice("folder", {"root": str(pictures)})
    segment(replace(TINY, data=data, classes=Choice("top", {"most": 2}), irn=form, images=3), tmp_path / "out")
    files = sorted((tmp_path / "out" / "irn").rglob(f"*.{form}"))
    assert len(files) == 3
    for path in files:
        labels = read_labels(
            tmp_path / "out" / "labels" / path.relative_to(tmp_path / "out" / "irn").with_suffix(".png")
        )
        kept = read_irn(path, pickled=form == "npy")
        h, w = labels.shape
        assert kept.high_res.shape == (2, h, w)
        assert kept.cam.shape == (2, (h - 1) // 4 + 1, (w - 1) // 4 + 1)
        small = interpolate(kept.high_res[None], tuple(kept.cam.shape[1:]), mode="bilinear", align_corners=False)[0]
        cut = torch.where(small > 0, small, 0)
        assert torch.equal(kept.cam, cut / cut.amax((1, 2), keepdim=True))
        assert kept.high_res.min() == 0
        assert kept.cam.amax((1, 2)).tolist() == [1, 1]
        keys = [0, *(kept.keys + 1).tolist()]
        planes = torch.cat([torch.full((1, h, w), 0.2), kept.high_res])
        assert (torch.tensor(keys)[planes.argmax(0)] == labels).float().mean() > 0.999


def test_an_image_without_labels_says_what_to_do(scenes, pictures, tmp_path):
    data = Choice("folder", {"root": str(pictures), "labels": False})
    with pytest.raises(ValueError, match=r"has no label .*classes predicted, top .*or all"):
        segment(replace(TINY, data=data), tmp_path / "out")
    segment(replace(TINY, data=data, classes=Choice("top"), images=2), tmp_path / "out")


def test_classes_of_other_names_do_not_matter_where_the_network_says(pictures, tmp_path):
    (pictures / "common pip").rename(pictures / "sparrow")
    data = Choice("folder", {"root": str(pictures)})
    with pytest.raises(ValueError, match="none of the classifier's"):
        segment(replace(TINY, data=data), tmp_path / "out")
    manifest = segment(replace(TINY, data=data, classes=Choice("top")), tmp_path / "out")
    assert manifest.images == 6
    assert "sparrow" not in manifest.classes


def test_an_image_with_no_class_is_background(tmp_path, monkeypatch):
    monkeypatch.setitem(segmenting.COMPETE, "labels", lambda classifier, batch, count: [()] * len(batch))
    manifest = segment(replace(TINY, images=2, irn="npz"), tmp_path / "out")
    assert (manifest.background, manifest.ignored, manifest.classes) == (2 * 64 * 64, 0, {})
    kept = read_irn(next((tmp_path / "out" / "irn").iterdir()))
    assert (kept.keys.tolist(), kept.high_res.shape, kept.cam.shape) == ([], (0, 64, 64), (0, 16, 16))


@pytest.mark.parametrize("check", ["none", "decode"])
def test_broken_pictures_are_skipped_and_told(pictures, tmp_path, check):
    broken = pictures / "common pip" / "2.png"
    broken.write_bytes(broken.read_bytes()[:200])
    settings = {} if check == "none" else {"check": check}
    spec = replace(TINY, data=Choice("folder", {"root": str(pictures), **settings}))
    manifest = segment(spec, tmp_path / "out")
    assert manifest.images == 5
    assert list(manifest.skipped) == ["common pip/2.png"]
    assert "2.png" in manifest.skipped["common pip/2.png"]
    names = sorted(str(path.relative_to(tmp_path / "out" / "labels")) for path in (tmp_path / "out").rglob("*/*/*.png"))
    assert names == [f"{name}/{i}.png" for name, i in [("common pip", 0), ("common pip", 4)]] + [
        f"dot-headed newt/{i}.png" for i in (1, 3, 5)
    ]
    assert (check == "none") == any(record["skipped"] for record in lines(tmp_path / "out"))


def test_files_are_not_decoded_beforehand(pictures, tmp_path):
    out = tmp_path / "out"
    segment(replace(TINY, data=Choice("folder", {"root": str(pictures)}), images=1), out)
    assert json.loads((out / "segment.json").read_text())["arguments"]["data"]["check"] == "none"


def test_a_batch_of_broken_pictures_alone_is_done(pictures, tmp_path):
    for name in ("common pip/0.png", "common pip/2.png"):
        (pictures / name).write_bytes(b"\x89PNG broken")
    spec = replace(TINY, data=Choice("folder", {"root": str(pictures)}))
    manifest = segment(spec, tmp_path / "out")
    assert (manifest.images, list(manifest.skipped)) == (4, ["common pip/0.png", "common pip/2.png"])


def test_two_pictures_of_one_name_are_an_error_before_any_work(pictures, tmp_path):
    source = pictures / "common pip" / "0.png"
    Image.open(source).save(source.with_suffix(".jpg"))
    spec = replace(TINY, data=Choice("folder", {"root": str(pictures)}))
    with pytest.raises(ValueError, match=r"0\.jpg and common pip/0\.png would both have the label map common"):
        segment(spec, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_label_map_lies_outside_the_folder(tmp_path, monkeypatch):
    fetch = segmenting.fetch

    def outside(work, index):
        fetched = fetch(work, index)
        return replace(fetched, found=replace(fetched.found, id="../../secret.jpg"))

    monkeypatch.setattr(segmenting, "fetch", outside)
    with pytest.raises(ValueError, match=r"'\.\./\.\./secret\.jpg' would lie outside"):
        segment(TINY, tmp_path / "a" / "out")
    assert not list(tmp_path.rglob("secret*"))


@pytest.mark.parametrize("normalize", ["max", "none"])
def test_maps_that_show_nothing_are_listed_and_leave_the_others_alone(
    tmp_path, monkeypatch, scenes, classifier, normalize
):
    def broken(classifier, x, y=None, /):
        maps = cam(classifier, x, y)
        maps[y == 1] = float("nan")
        maps[y == 10] = 0
        return maps

    monkeypatch.setattr(segmenting, "chosen_method", lambda spec: broken)
    spec = replace(TINY, classes=Choice("all"), images=3, normalize=normalize)
    manifest = segment(spec, tmp_path / "out")
    assert manifest.shares["foreground"] > 0.1
    expected = []
    for sample in (scenes[i] for i in range(3)):
        for label, name in enumerate(classifier.classes):
            raw = broken(classifier, sample.image[None], torch.tensor([label]))
            shown = interpolate(raw, tuple(sample.image.shape[1:]), mode="bilinear", align_corners=False)
            if label in (1, 10):
                expected.append((sample.id, name, "not finite" if label == 1 else "all zero"))
            elif normalize == "max" and shown.max() <= 0:
                expected.append((sample.id, name, "nowhere positive"))
    assert manifest.degenerate == tuple(expected)
    assert len(expected) > 6 or normalize == "none"
    assert not {classifier.classes[1], classifier.classes[10]} & set(manifest.classes)


def test_log_odds_are_taken_as_they_are(tmp_path, monkeypatch, scenes):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(21, 16, 16, generator=generator, dtype=torch.float64)

    def odds(classifier, x, y=None, /):
        return (logits[y + 1] - logits[0])[:, None]

    monkeypatch.setattr(segmenting, "chosen_method", lambda spec: odds)
    spec = replace(TINY, classes=Choice("all"), images=1, normalize="none", threshold=0.0)
    segment(spec, tmp_path / "out")
    large = interpolate(logits[None], (64, 64), mode="bilinear", align_corners=False)[0]
    assert torch.equal(read_labels(tmp_path / "out" / "labels" / f"{scenes[0].id}.png"), large.argmax(0))


def test_maps_are_resolved_at_the_size_of_the_input(pictures, tmp_path, classifier):
    resolve = {"name": "smooth", "size": 5, "sigma": 2.0}
    data = Choice("folder", {"root": str(pictures)})
    segment(replace(TINY, data=data, resolve=Choice.of(resolve), images=2), tmp_path / "out")
    sample = DATASETS["folder"](pictures, size=64)[0]
    label = classifier.classes.index("common pip")
    maps = resolve_of(resolve)(sample.image, slow_maps(classifier, sample, [label]))
    large = interpolate(maps[None], sample.size, mode="bilinear", align_corners=False)[0]
    found = read_labels(tmp_path / "out" / "labels" / "common pip" / "0.png")
    assert torch.equal(found, slow_labels(large, [label], 0.2, 0.2))


def test_seed_layer_and_method_are_those_asked_for(scenes, classifier, tmp_path):
    spec = replace(TINY, method=Choice("grad_cam"), layer="layer3", images=1)
    segment(spec, tmp_path / "out")
    sample = scenes[0]
    maps = slow_maps(classifier.at("layer3"), sample, present(sample), grad_cam)
    expected = slow_labels(maps, present(sample), 0.2, 0.2)
    assert torch.equal(read_labels(tmp_path / "out" / "labels" / f"{sample.id}.png"), expected)
    noisy = replace(TINY, method=Choice.parse("smooth(gradient)?samples=2"), images=1)
    for seed in (0, 0, 1):
        segment(replace(noisy, seed=seed), tmp_path / f"seed-{seed}-{len(list(tmp_path.iterdir()))}")
    a, b, c = (next(iter(contents(path / "labels").values())) for path in sorted(tmp_path.glob("seed-*")))
    assert a == b != c


def test_timing_tells_of_stages_and_processes(whole):
    table = json.loads((whole[0] / "timing.json").read_text())
    assert table["images"] == 7
    assert table["images_per_second_of_a_process"] > 0
    assert list(table["seconds"]) == ["read", "explain", "resolve", "write", "all"]
    assert all(seconds > 0 for seconds in table["seconds"].values())
    assert table["processes"]["0"]["images"] == 7


def test_the_contact_sheet_shows_pictures_and_labels(whole, scenes, monkeypatch):
    monkeypatch.setattr(segmenting, "SHOWN", 24)
    segment(TINY, whole[0])
    sheet = np.array(Image.open(whole[0] / "contact.png").convert("RGB")).astype(float)
    assert sheet.shape[1] == 8 * 168 + 8
    monkeypatch.setattr(segmenting, "SHOWN", 1)
    segment(TINY, whole[0])
    assert Image.open(whole[0] / "contact.png").width == 2 * 168 + 8
    labels = read_labels(whole[0] / "labels" / f"{scenes[0].id}.png").numpy()
    picture, drawn = sheet[8:168, 8:168], sheet[8:168, 176:336]
    near = np.array(Image.fromarray(labels.astype(np.uint8)).resize((160, 160), Image.Resampling.NEAREST))
    apart = np.abs(picture - drawn).sum(2)
    inside = np.array(Image.fromarray((near > 0).astype(np.uint8)).resize((160, 160)))
    assert apart[inside == 1].mean() > 10 * apart[inside == 0].mean() + 10


def test_a_specification_reads_what_it_writes(tmp_path):
    table = {
        "model": "creatures",
        "data": {"name": "creatures", "count": 3},
        "method": "flip_and_scale(cam)",
        "resolve": "smooth?sigma=3",
        "threshold": [0.05, 0.3],
        "classes": "predicted?above=0.25",
        "normalize": "unit",
        "size": "input",
        "irn": "npz",
        "batch": 4,
        "images": 2,
        "seed": 3,
        "layer": "layer3",
    }
    spec = Segmenting.of(table)
    assert (spec.low, spec.high, spec.batch, spec.irn) == (0.05, 0.3, 4, "npz")
    forms = [Segmenting.of({**table, "irn": said}).irn for said in (True, False, "npy", None)]
    assert forms == ["npy", None, "npy", None]
    assert spec.resolve == Choice("smooth", {"sigma": 3})
    assert Segmenting.of(spec.plain()) == spec
    assert Segmenting.of({**table, "threshold": 1}).threshold == 1.0
    assert Segmenting.of({**table, "threshold": [0.2, 0.2]}).threshold == 0.2
    assert "layer" not in TINY.plain()
    assert spec.changed(batch=5, seed=None) == replace(spec, batch=5)
    path = tmp_path / "spec.toml"
    path.write_text('model = "creatures"\ndata = "creatures"\nmethod = "cam"\nthreshold = [0.1, 0.2]\n')
    read = Segmenting.read(path, batch=3)
    assert (read.low, read.high, read.batch, read.classes) == (0.1, 0.2, 3, Choice("labels"))


PLAIN = {"model": "creatures", "data": "creatures", "method": "cam"}


@pytest.mark.parametrize(
    ("table", "error", "told"),
    [
        ({"model": "creatures"}, ValueError, "lacks data, method"),
        ({**PLAIN, "treshold": 1}, LookupError, "threshold"),
        ({**PLAIN, "threshold": "high"}, TypeError, "a number or a list \\[low, high\\], got 'high'"),
        ({**PLAIN, "threshold": [1, 2, 3]}, TypeError, "a number or a list"),
        ({**PLAIN, "threshold": [0.3, 0.1]}, ValueError, "low <= high"),
        ({**PLAIN, "threshold": float("nan")}, ValueError, "low <= high"),
        ({**PLAIN, "batch": 0}, ValueError, "batch >= 1"),
        ({**PLAIN, "threshold": 2}, ValueError, r"expected a threshold in \[0, 1\], a share .* got 2"),
        ({**PLAIN, "threshold": -0.1, "normalize": "unit"}, ValueError, r"in \[0, 1\], a share .* got -0\.1"),
        ({**PLAIN, "images": -1}, ValueError, "images >= 0"),
        ({**PLAIN, "batch": 2.5}, TypeError, "batch: expected a whole number, got 2.5"),
        ({**PLAIN, "irn": 1}, TypeError, "expected irn to be one of npy, npz, or true or false, got 1"),
        ({**PLAIN, "irn": "np"}, LookupError, "form of IRN's dictionaries called 'np'"),
        ({**PLAIN, "resolve": "crf?threshold=0.2"}, ValueError, "leave out crf\\?threshold="),
        ({**PLAIN, "size": "orignal"}, LookupError, "original"),
        ({**PLAIN, "normalize": "maximum"}, LookupError, "normalization"),
    ],
)
def test_a_specification_that_does_not_fit_says_why(table, error, told, tmp_path):
    with pytest.raises(error, match=told):
        Segmenting.of(table)


def test_an_error_in_a_file_names_it(tmp_path):
    path = tmp_path / "spec.toml"
    path.write_text('model = "creatures"\n')
    with pytest.raises(ValueError, match=r"spec\.toml: the segmenting lacks"):
        Segmenting.read(path)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"method": Choice("camm")}, LookupError, "cam"),
        ({"classes": Choice("label")}, LookupError, "labels"),
        ({"classes": Choice("top", {"many": 2})}, LookupError, "most"),
        ({"classes": Choice("top", {"most": 21})}, ValueError, "1 to 20"),
        ({"resolve": Choice("smoth")}, LookupError, "smooth"),
        ({"model": Choice("none")}, ValueError, "254 classes, and the network has 1000"),
    ],
)
def test_names_that_do_not_fit_are_errors_before_any_work(change, error, told, tmp_path):
    with pytest.raises(error, match=told):
        segment(replace(TINY, **change), tmp_path / "out")
    assert not (tmp_path / "out" / "labels").exists()


@pytest.mark.parametrize(("rank", "world"), [(3, 3), (-1, 2), (0, 0)])
def test_a_process_that_cannot_be_is_an_error(rank, world, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match=f"RANK={rank}, WORLD_SIZE={world}"):
        part(monkeypatch, rank, world, TINY, tmp_path / "out")


def test_maps_of_other_tools_become_labels(whole, scenes, classifier, tmp_path):
    for index in range(2):
        sample = scenes[index]
        (tmp_path / "maps").mkdir(exist_ok=True)
        np.save(tmp_path / "maps" / f"{sample.id}.npy", np.eye(64, dtype=np.float32))
    method, model = Choice("maps", {"root": str(tmp_path / "maps")}), Choice("none", {"classes": 20, "size": 64})
    segment(replace(TINY, model=model, method=method, images=2), tmp_path / "out")
    found = read_labels(tmp_path / "out" / "labels" / f"{scenes[0].id}.png")
    assert torch.equal(found > 0, torch.eye(64).bool())
    assert found.max() == present(scenes[0])[0] + 1


def test_what_a_folder_belongs_to_is_the_same_in_every_process():
    claims = [
        segmenting.opened(replace(TINY, method=Choice.parse("flip_and_scale(cam)")), Path("out")).recorded
        for _ in range(2)
    ]
    assert json.dumps(claims[0], default=list) == json.dumps(claims[1], default=list)
    assert "0x" not in json.dumps(claims[0], default=list)


@given(st.lists(st.text("ab/.", min_size=1, max_size=4), max_size=8), st.sampled_from([".png", ".jpg", ""]))
@settings(max_examples=40, deadline=None)
def test_twins_are_found_exactly_where_there_are_some(stems, ending):
    files = [f"x{stem}y{ending}" for stem in stems]
    found = repeated(files)
    assert (found is not None) == (len({file_of(file) for file in files}) < len(files))


def test_classes_of_one_name_are_told_apart(tmp_path, monkeypatch, classifier):
    names = ("crane", "heron", "crane", *map(str, range(17)))
    monkeypatch.setattr(models, "load", lambda choice: replace(classifier, classes=names))
    data = replace(TINY, classes=Choice("all"), images=3)
    manifest = segment(data, tmp_path / "out")
    assert {"crane (0)", "heron", "crane (2)"} <= set(manifest.classes)
    assert sum(manifest.classes.values()) + manifest.background == 3 * 64 * 64


def test_endings_of_pictures_are_left_out_and_others_kept():
    names = {"a/b.jpg": "a/b", "a.v1": "a.v1", "a.b.JPEG": "a.b", "2007_000032.jpg": "2007_000032", "a": "a"}
    assert {name: file_of(name) for name in names} == names
    assert repeated(["a.jpg", "b.jpg", "a.png"]) == ("a.jpg", "a.png")


def test_arguments_are_recorded_in_full(whole):
    table = json.loads((whole[0] / "segment.json").read_text())
    assert table["threshold"] == 0.2
    assert table["arguments"]["data"]["variant"] == "scenes"
    assert table["arguments"]["resolve"] == arguments(resolve_of("basic"))
    assert table["versions"]["torch"] == torch.__version__.split("+")[0]
    assert table["listed"] == {"images": 7, "files": None}


def test_each_batch_keeps_what_is_known_of_it(whole):
    records = sorted(lines(whole[0]), key=lambda record: record["batch"])
    assert [record["images"] for record in records] == [2, 2, 2, 1]
    for record in records:
        assert sum(record["pixels"].values()) == 64 * 64 * record["images"]
        assert list(record["seconds"]) == ["read", "explain", "resolve", "write", "all"]
        assert record["degenerate"] == record["skipped"] == []


def test_lines_do_not_grow_with_the_batch_and_are_read_twice_at_most(tmp_path, monkeypatch):
    """Once for what is to do, once for what came out."""
    read, readings = segmenting.records, []
    monkeypatch.setattr(segmenting, "records", lambda folder: [readings.append(folder), read(folder)][1])
    sizes = []
    for batch in (1, 7):
        segment(replace(TINY, batch=batch), tmp_path / str(batch))
        sizes.append(max(len(json.dumps({**one, "seconds": 0, "pixels": 0})) for one in lines(tmp_path / str(batch))))
    assert sizes[0] == sizes[1]
    assert len(readings) == 4


def test_a_folder_says_what_its_values_mean(whole, tmp_path, monkeypatch, classifier):
    assert json.loads((whole[0] / "segment.json").read_text())["names"] == ["background", *classifier.classes]
    names = DATASETS["creatures"]().classes
    monkeypatch.setattr(models, "load", lambda choice: replace(classifier, classes=()))
    segment(replace(TINY, images=1), tmp_path / "out")
    assert read_names(tmp_path / "out" / "labels") == ("background", *names)


def test_a_segmenter_of_class_folders_gets_its_own_numbers(pictures, tmp_path, classifier):
    """The folders' classes are 0 and 1; the classifier that makes the labels has 20, in another order."""
    data = Choice("folder", {"root": str(pictures)})
    segment(replace(TINY, data=data, normalize="unit"), tmp_path / "out")
    samples = DATASETS["folder"](pictures, size=32)
    theirs = [classifier.classes.index(name) for name in samples.classes]
    assert theirs != [0, 1]
    pseudo = Pseudo(samples, tmp_path / "out", samples.classes)
    for index in range(len(samples)):
        mask = pseudo[index].mask
        assert {*mask.unique().tolist()} == {0, samples[index].label + 1}


@pytest.mark.parametrize("resize", ["direct", "crop", "crop256"])
def test_a_segmenter_learns_from_labels_of_the_original_pictures(pictures, tmp_path, resize):
    data = Choice("folder", {"root": str(pictures)})
    segment(replace(TINY, data=data, normalize="unit"), tmp_path / "out")
    network = {"name": "mini_seg", "widths": [4, 6, 8, 10], "width": 5, "size": 32}
    settings = {"labels": str(tmp_path / "out"), "epochs": 1, "batch": 3, "augment": "none"}
    told = {"data": {**data.plain(), "resize": resize}, "model": network, "settings": settings}
    path = learn("segmenter", Recipe.of(told), tmp_path / "net")
    assert json.loads(path.with_suffix(".json").read_text())["extra"]["images"] == 6


def test_a_segmenter_learns_from_labels_of_pictures_without_classes(pictures, tmp_path, classifier):
    data = Choice("folder", {"root": str(pictures), "labels": False})
    segment(replace(TINY, data=data, classes=Choice("predicted")), tmp_path / "out")
    network = {"name": "mini_seg", "widths": [4, 6, 8, 10], "width": 5, "size": 32}
    settings = {"labels": str(tmp_path / "out"), "epochs": 1, "batch": 3, "augment": "none"}
    told = {"data": data.plain(), "model": network, "settings": settings}
    path = learn("segmenter", Recipe.of(told), tmp_path / "net")
    assert models.load(str(path)).classes == classifier.classes
    with pytest.raises(ValueError, match=r"or, for a segmenter, label maps whose segment\.json names them"):
        learn("segmenter", Recipe.of({**told, "settings": {"epochs": 1}}), tmp_path / "other")


class Fields:
    """What stands in for the library: shapes and images are noted, and foreground floods one pixel to the right."""

    made: list["Fields"] = []  # noqa: RUF012

    def __init__(self, width, height, labels):
        self.shape = labels, height, width
        Fields.made.append(self)

    def setUnaryEnergy(self, energy):  # noqa: N802
        self.energy = energy

    def addPairwiseGaussian(self, **settings): ...  # noqa: N802

    def addPairwiseBilateral(self, *, rgbim, **settings):  # noqa: N802
        self.pixels = rgbim

    def inference(self, iterations):
        return flooded(torch.from_numpy(self.energy).argmin(0).view(self.shape[1:]), self.shape[0]).flatten(1).numpy()


def flooded(labels, count):
    """One-hot labels after each pixel of background has taken the label on its left."""
    labels = torch.where(labels > 0, labels, labels.roll(1, 1))
    return (torch.arange(count)[:, None, None] == labels).float()


@pytest.fixture
def library(crf_library):
    crf_library(Fields)
    Fields.made.clear()


@pytest.mark.parametrize("size", ["original", "input"])
@pytest.mark.parametrize("threshold", [(0.1, 0.4), 0.2])
def test_each_threshold_has_a_crf_at_the_size_of_the_labels(library, pictures, tmp_path, classifier, size, threshold):
    low, high = threshold if isinstance(threshold, tuple) else (threshold, threshold)
    data, crf = Choice("folder", {"root": str(pictures)}), Choice("crf", {"iterations": 3})
    spec = replace(TINY, data=data, resolve=crf, threshold=threshold, size=size, images=1, irn="npz")
    segment(replace(spec, classes=Choice("top")), tmp_path / "out")
    sample = DATASETS["folder"](pictures, size=64)[0]
    label = int(classifier(sample.image[None]).argmax())
    maps = slow_maps(classifier, sample, [label])
    sides = sample.size if size == "original" else (64, 64)
    maps = interpolate(maps[None], sides, mode="bilinear", align_corners=False)[0]
    background, foreground = (flooded((maps[0] > level).long(), 2)[1] for level in (low, high))
    expected = torch.zeros(sides, dtype=torch.long)
    for i in range(sides[0]):
        for j in range(sides[1]):
            expected[i, j] = label + 1 if foreground[i, j] else 255 if background[i, j] else 0
    assert torch.equal(read_labels(tmp_path / "out" / "labels" / "common pip" / "0.png"), expected)
    assert (expected == 255).any() == (low < high)
    ran = [made for made in Fields.made if made.shape[1:] == sides]
    assert len(ran) == (2 if low < high else 1)
    assert all(made.pixels.shape == (*sides, 3) for made in ran)
    assert np.abs(ran[0].pixels.mean((0, 1)) - 255 * sample.image.mean((1, 2)).numpy()).max() < 2
    kept = read_irn(tmp_path / "out" / "irn" / "common pip" / "0.npz")
    assert torch.equal(kept.high_res, maps.float().relu())


@pytest.mark.parametrize(("asked", "divided"), [({}, False), ({"renormalize": True}, True)])
def test_smoothing_keeps_maps_as_they_were_asked_for(tmp_path, scenes, classifier, asked, divided):
    """Nothing divides the maps by their maximum, unless the settings say so."""
    resolve = {"name": "smooth", "size": 5, "sigma": 2.0}
    spec = replace(TINY, normalize="none", resolve=Choice.of({**resolve, **asked}), threshold=0.9, images=1)
    segment(spec, tmp_path / "out")
    sample = scenes[0]
    raw = [cam(classifier, sample.image[None], torch.tensor([label])).double() for label in present(sample)]
    large = torch.cat([interpolate(one, (64, 64), mode="bilinear", align_corners=False)[0] for one in raw])
    maps = resolve_of({**resolve, "renormalize": divided})(sample.image, large)
    found = read_labels(tmp_path / "out" / "labels" / f"{sample.id}.png")
    assert torch.equal(found, slow_labels(maps, present(sample), 0.9, 0.9))
    assert not torch.equal(found, slow_labels(maps / 2, present(sample), 0.9, 0.9))
    claim = json.loads((tmp_path / "out" / "segment.json").read_text())
    assert claim["arguments"]["resolve"]["renormalize"] is divided


def counted(monkeypatch, classifier):
    """How many images each run of the network gets."""
    seen, original = [], models.load

    def load(choice):
        loaded = original(choice)
        loaded.model.register_forward_hook(lambda module, given, out: seen.append(len(given[0])))
        return loaded

    monkeypatch.setattr(models, "load", load)
    return seen


@pytest.mark.parametrize("method", ["cam", "rise?samples=4"])
def test_all_classes_of_a_batch_cost_the_passes_of_one(tmp_path, monkeypatch, classifier, method):
    passes = {}
    for most in (1, 4):
        with monkeypatch.context() as patch:
            seen = counted(patch, classifier)
            spec = replace(TINY, method=Choice.parse(method), classes=Choice("top", {"most": most}))
            segment(spec, tmp_path / str(most))
        passes[most] = seen
    assert passes[1] == passes[4]


def test_images_with_different_numbers_of_classes_get_their_own_maps(tmp_path, monkeypatch, scenes, classifier):
    listed = {"a": (), "b": (3,), "c": (0, 7, 12), "d": (19, 3)}

    def some(classifier, batch, count, /):
        return [listed[sample.id] for sample in batch.samples]

    monkeypatch.setitem(segmenting.COMPETE, "labels", some)
    samples = [replace(scenes[n], id=name) for n, name in enumerate(listed)]
    monkeypatch.setattr(segmenting, "labeled", lambda dataset, classifier: samples)
    segment(replace(TINY, images=4, batch=3), tmp_path / "out")
    for sample in samples:
        classes = listed[sample.id]
        found = read_labels(tmp_path / "out" / "labels" / f"{sample.id}.png")
        maps = slow_maps(classifier, sample, classes) if classes else torch.zeros(0, 64, 64)
        expected = slow_labels(maps, classes, 0.2, 0.2) if classes else torch.zeros(64, 64, dtype=torch.long)
        assert torch.equal(found, expected)


def test_all_classes_are_never_there_at_the_size_of_the_labels(pictures, tmp_path, monkeypatch, classifier):
    seen, original = [], segmenting.resize

    def resize(maps, size, *mode):
        seen.append((maps.shape[0] * maps.shape[1], tuple(size)))
        return original(maps, size, *mode)

    monkeypatch.setattr(segmenting, "resize", resize)
    data = Choice("folder", {"root": str(pictures)})
    segment(replace(TINY, data=data, classes=Choice("all"), threshold=(0.2, 0.6), images=2), tmp_path / "out")
    assert max(count for count, size in seen if size != (64, 64)) == 1
    for sample in (DATASETS["folder"](pictures, size=64)[index] for index in range(2)):
        maps = interpolate(
            slow_maps(classifier, sample, range(20))[None], sample.size, mode="bilinear", align_corners=False
        )[0]
        found = read_labels(tmp_path / "out" / "labels" / sample.id)
        assert torch.equal(found, slow_labels(maps, range(20), 0.2, 0.6))


def test_irn_s_pickles_are_the_same_in_any_number_of_processes(tmp_path, monkeypatch):
    spec = replace(TINY, irn="npy", images=4)
    segment(spec, tmp_path / "one")
    for rank in (1, 0):
        part(monkeypatch, rank, 2, spec, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(list((tmp_path / "one" / "irn").iterdir())) == 4
