"""From a specification to a run: everything is found by name, recorded, drawn, and comes out the same again."""

from dataclasses import replace
from importlib.metadata import EntryPoint

import numpy as np
import pytest
import torch
from PIL import Image

from sightline import models, registry, running
from sightline.classifier import UnsuitedError
from sightline.data import Sample, batches
from sightline.datasets import creatures
from sightline.evaluation import measure
from sightline.interchange import write_map
from sightline.methods import METHODS, Entry, grad_cam
from sightline.metrics import average_drop, insertion
from sightline.models import mini_resnet
from sightline.running import (
    KEPT,
    Channeled,
    Recent,
    Relabeled,
    labeled,
    named,
    run,
    scene,
    thumbnail,
    worth_showing,
)
from sightline.runs import Choice, Run, Score, Scores, Spec, describe, file_name, provenance
from sightline.table import tables

TABLE = {
    "model": {"name": "mini_resnet", "classes": 20},
    "data": {"name": "creatures", "count": 5},
    "method": "grad_cam",
    "metrics": ["average_drop", {"name": "insertion", "steps": 4}],
    "batch": 2,
}


def spec(**changes):
    return Spec.of({**TABLE, **changes})


def prepare(asked):
    """Check the names, then open classifier and data, as `run` does."""
    return *named(asked), scene(asked)


def numbers(made):
    return replace(made.scores, seconds=0.0)


@pytest.fixture
def pictures(tmp_path):
    """Two classes of three pictures each, one of them broken, in an order that is not the classifier's."""
    rng = np.random.default_rng(0)
    for name in ("newt", "wren"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(
                tmp_path / "pictures" / name / f"{i}.png"
            )
    (tmp_path / "pictures" / "newt" / "1.png").write_bytes(b"")
    return {"name": "folder", "root": str(tmp_path / "pictures")}


@pytest.fixture
def network(tmp_path):
    """A network whose classes have names, as a file."""
    built = replace(mini_resnet(3), classes=("wren", "newt", "pip"))
    return str(models.save(built, tmp_path / "named.safetensors", model=Choice("mini_resnet", {"classes": 3})))


# Runs


def test_a_run_is_what_measure_gives_with_everything_recorded(tmp_path):
    told = []
    made = run(
        spec(), folder=tmp_path / "out" / "pictures", report=lambda done, count, note: told.append((done, count))
    )
    classifier, data = mini_resnet(20), creatures(count=5, size=64)
    metrics = {"average_drop": average_drop(), "insertion": insertion(steps=4)}
    expected = measure(grad_cam, classifier, batches(data, 2), metrics)
    assert [score.metric for score in made.scores.scores] == [Choice("average_drop"), Choice("insertion", {"steps": 4})]
    for score, other in zip(made.scores.scores, expected.scores, strict=True):
        assert replace(score, metric=other.metric) == other
    assert made.scores.ids == tuple(data[i].id for i in range(5))
    assert made.scores.labels == tuple(data[i].label for i in range(5))
    assert made.scores.seconds > 0
    assert told == [(2, 5), (4, 5), (5, 5)]
    assert made.classes == data.classes
    assert made.provenance == provenance()
    assert made.spec == spec()
    assert Run.read(made.write(tmp_path / "out" / "run.json")) == made


def test_the_same_specification_gives_the_same_numbers(tmp_path):
    asked = spec(method={"name": "opti_cam", "steps": 3}, metrics=["average_gain", {"name": "deletion", "steps": 3}])
    torch.manual_seed(1)
    first = run(asked)
    torch.manual_seed(2)
    second = run(asked)
    assert numbers(first) == numbers(second)
    assert (first.arguments, first.pictures) == (second.arguments, {})
    assert numbers(run(replace(asked, batch=5)))["average_gain"].value == pytest.approx(
        first.scores["average_gain"].value, rel=1e-3
    )


def test_arguments_are_recorded_with_their_defaults():
    made = run(spec(method={"name": "opti_cam", "steps": 2, "erase": {"name": "blur", "sigma": 3.0}}, layer="layer3"))
    method, metrics, data = (made.arguments[key] for key in ("method", "metrics", "data"))
    assert method["erase"] == "blur(sigma=3.0)"
    assert (method["steps"], method["lr"], method["score"]) == (2, 0.1, "logit")
    whole = {"erase": "black", "exponent": 1.0, "region": "map", "on": "boxes", "scored": "label"}
    assert metrics["average_drop"] == whole
    assert metrics["insertion(steps=4)"].items() >= {
        "steps": 4, "erase": "rise", "ties": "row_major", "score": "probability", "scored": "predicted", "seed": 0,
    }.items()  # fmt: skip
    drawn = {"split": "test", "count": 5, "size": 64, "variant": "plain", "seed": 0, "rho": 0.95, "only": None}
    assert data == drawn
    assert made.arguments["model"] == {"layer": "layer3", "mean": [0.5], "std": [0.25], "size": [64, 64]}
    assert describe(made.arguments) == made.arguments


def test_the_resize_policy_of_pictures_is_recorded(pictures):
    asked = spec(model={"name": "mini_resnet", "classes": 2}, data={**pictures, "resize": "crop"})
    made = run(asked)
    assert made.arguments["data"].items() >= {"resize": "crop", "size": 64, "labels": True}.items()
    assert made.skipped == {"newt/1.png": f"{pictures['root']}/newt/1.png is empty (0 bytes)"}
    assert made.scores.ids == ("newt/0.png", "newt/2.png", "wren/0.png", "wren/1.png", "wren/2.png")
    assert made.classes == ("newt", "wren")


def test_a_fast_classifier_gives_the_numbers_of_the_plain_one_to_what_is_promised(monkeypatch):
    made, asked = [], running.fast

    def noted(classifier, *, precision):
        made.append(precision)
        return asked(classifier, precision=precision)

    monkeypatch.setattr(running, "fast", noted)
    plain, exact, half = (run(spec(**({} if one is None else {"fast": one}))) for one in (None, "exact", "bf16"))
    assert made == ["exact", "bf16"]
    assert (plain.spec.fast, exact.spec.fast, half.spec.fast) == (None, "exact", "bf16")
    for score, other, narrow in zip(plain.scores.scores, exact.scores.scores, half.scores.scores, strict=True):
        assert other.value == pytest.approx(score.value, rel=1e-3)
        assert narrow.value == pytest.approx(score.value, rel=0.1)
        assert narrow.value != score.value
    assert [table.heading for table in tables([plain, exact, half])] == [
        "mini_resnet(classes=20) on creatures(count=5), fast None",
        "mini_resnet(classes=20) on creatures(count=5), fast exact",
        "mini_resnet(classes=20) on creatures(count=5), fast bf16",
    ]
    with pytest.raises(ValueError, match="expected fast to be exact or bf16, got 'int8'"):
        spec(fast="int8")


def test_seeds_reach_methods_and_metrics():
    tied = {"name": "insertion", "steps": 3, "ties": "random"}
    runs = [run(spec(method="random", metrics=[tied], seed=seed)) for seed in (1, 1, 2)]
    assert numbers(runs[0]) == numbers(runs[1])
    assert numbers(runs[0]) != numbers(runs[2])
    assert [made.arguments["method"]["seed"] for made in runs] == [1, 1, 2]
    assert runs[2].arguments["metrics"]["insertion(steps=3, ties=random)"]["seed"] == 2
    assert runs[2].arguments["data"]["seed"] == 0, "the images are the same"
    own = run(spec(method={"name": "random", "seed": 1}, metrics=[{**tied, "seed": 1}], seed=2))
    assert own.scores["insertion"].value == runs[0].scores["insertion"].value


@pytest.mark.parametrize(("images", "count"), [(0, 5), (3, 3), (99, 5)])
def test_images_is_how_many_from_the_first(images, count):
    made = run(spec(images=images))
    assert made.scores.ids == tuple(creatures(count=5)[i].id for i in range(count))


def test_explain_reaches_measure():
    least, label = (run(spec(explain=explain, metrics=["average_drop"])) for explain in ("least", "label"))
    scored = run(spec(metrics=["average_drop"]))
    assert numbers(label) == numbers(scored)
    assert numbers(least) != numbers(label)


def test_two_settings_of_one_metric():
    metrics = [{"name": "average_drop", "exponent": 1.0}, {"name": "average_drop", "exponent": 0.1}]
    made = run(spec(metrics=metrics))
    assert [score.metric.settings["exponent"] for score in made.scores.scores] == [1, 0.1]
    assert made.scores.scores[0].value != made.scores.scores[1].value
    with pytest.raises(ValueError, match=r"the metric average_drop\(exponent=0.1\) is listed twice"):
        run(spec(metrics=[*metrics, metrics[1]]))


def test_methods_share_a_scene():
    asked = [spec(method=name) for name in ("grad_cam", "layer_cam")]
    shared = scene(asked[0])
    for one in asked:
        together, alone = run(one, on=shared), run(one)
        assert numbers(together) == numbers(alone)
        assert together.arguments == alone.arguments


class Counted:
    def __init__(self, count):
        self.count, self.read = count, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.read.append(index)
        return Sample(f"s{index}", torch.zeros(3, 1, 1), 0)


def test_a_scene_keeps_what_was_read_last():
    data = Counted(KEPT + 10)
    recent = Recent(data)
    assert len(recent) == KEPT + 10
    for _ in range(2):
        assert [recent[i].id for i in range(5)] == [f"s{i}" for i in range(5)]
    assert data.read == [0, 1, 2, 3, 4]
    for i in range(len(recent)):
        recent[i]
    recent[len(recent) - 1], recent[0]
    assert data.read == [*range(KEPT + 10), 0]


def test_names_and_settings_are_checked_before_anything_is_opened():
    nowhere = {"model": "nowhere.safetensors", "data": {"name": "folder", "root": "nowhere"}}
    for change, message in (
        ({"method": "grad_cma"}, "no method called"),
        ({"metrics": [{"name": "insertion", "steps": 0}]}, "expected steps >= 1"),
        ({"explain": "first"}, "expected explain to be one of"),
    ):
        with pytest.raises((LookupError, ValueError), match=message):
            run(spec(**nowhere, **change))
    with pytest.raises(FileNotFoundError):
        run(spec(**nowhere))


# Labels


def test_classes_meet_by_their_names(network, pictures):
    made = run(spec(model=network, data=pictures))
    assert made.scores.labels == (1, 1, 0, 0, 0)
    assert made.classes == ("wren", "newt", "pip")
    by_number = run(spec(model={"name": "mini_resnet", "classes": 3}, data=pictures))
    assert by_number.scores.labels == (0, 0, 1, 1, 1)
    assert by_number.scores.predicted == made.scores.predicted


def test_classes_that_the_network_does_not_have(network, pictures, tmp_path):
    (tmp_path / "pictures" / "newt").rename(tmp_path / "pictures" / "newts")
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        run(spec(model=network, data=pictures))
    assert str(caught.value) == (
        "1 classes of the data are none of the classifier's: no class called 'newts'; did you mean newt?; rename them, "
        "or take a network of these classes; a folder can be read without labels (labels=false), and segment needs "
        "none with --classes predicted"
    )
    made = run(spec(model=network, data={**pictures, "labels": False}, metrics=[{"name": "deletion", "steps": 2}]))
    assert made.scores.labels == (None,) * 5
    assert made.scores.accuracy is None


class Data:
    classes, skipped = ("a", "b"), {}

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return Sample(f"s{index}", torch.zeros(3, 4, 4), (0, 1, None)[index])


def test_relabeled_samples_keep_the_rest():
    data, classifier = Data(), mini_resnet(3)
    for names in ((), ("a", "b")):
        same = labeled(data, replace(classifier, classes=names))
        assert [same[i].label for i in range(len(same))] == [0, 1, None]
    turned = labeled(data, replace(classifier, classes=("b", "c", "a")))
    assert isinstance(turned, Relabeled)
    assert [turned[i].label for i in range(len(turned))] == [2, 0, None]
    assert [turned[i].id for i in range(3)] == ["s0", "s1", "s2"]


def test_a_gray_network_gets_the_luma_and_no_other_count_of_channels_is_converted():
    data = creatures(count=2, size=64)
    for names in ((), data.classes[::-1]):
        seen = labeled(data, replace(mini_resnet(20, channels=1), classes=names))
        x = data[1].image
        assert seen[1].image.shape == (1, 64, 64)
        torch.testing.assert_close(seen[1].image[0], 0.299 * x[0] + 0.587 * x[1] + 0.114 * x[2], rtol=0, atol=1e-6)
        assert (seen[1].id, seen[1].label) == (data[1].id, (names or data.classes).index(data.classes[data[1].label]))
    assert torch.equal(labeled(data, mini_resnet(20))[0].image, data[0].image)
    gray = Channeled(data, 1)
    assert Channeled(gray, 1)[0].image.shape == (1, 64, 64)
    with pytest.raises(ValueError, match=f"{data[0].id} has 3 channels and the network reads 4; only colors for a"):
        labeled(data, mini_resnet(20, channels=4))[0]
    with pytest.raises(ValueError, match="has 1 channels and the network reads 3; only colors"):
        Channeled(gray, 3)[0]


# Pictures


def test_pictures_lie_beside_the_run(tmp_path):
    made = run(spec(data={"name": "creatures", "count": 12}), folder=tmp_path / "pics")
    shown = worth_showing(made.scores)
    assert set(made.pictures) == {made.scores.ids[i] for i in shown}
    files = [file for kept in made.pictures.values() for file in kept.values()]
    assert sorted(files) == sorted(f"pics/{path.name}" for path in (tmp_path / "pics").iterdir())
    for index in shown:
        kept = made.pictures[made.scores.ids[index]]
        assert kept["image"] == f"pics/{index}.jpg"
        assert kept["overlay"] == f"pics/{index}-grad_cam.jpg"
        image, overlay = (np.asarray(Image.open(tmp_path / kept[key])).astype(float) for key in ("image", "overlay"))
        assert image.shape == overlay.shape == (160, 160, 3)
        original = np.asarray(Image.fromarray(image.astype(np.uint8)).resize((64, 64), Image.Resampling.BOX)) / 255
        sample = creatures(count=12)[index].image.permute(1, 2, 0).numpy()
        assert np.abs(original - sample).mean() < 0.03
        assert np.abs(image - overlay).mean() > 5


def scores(*columns):
    kept = tuple(Score(Choice(f"m{i}"), 0.0, True, tuple(map(float, values))) for i, values in enumerate(columns))
    count = max(map(len, columns))
    return Scores(kept, tuple(map(str, range(count))), (None,) * count, (0,) * count, (1.0,) * count, 0.0)


def test_the_first_the_best_and_the_worst_are_shown():
    rising, peak = range(100), [50 - abs(50 - i) for i in range(100)]
    assert worth_showing(scores(rising)) == [*range(8), 97, 98, 99]
    assert worth_showing(scores(rising, peak)) == [*range(8), 97, 98, 99], "by the first metric"
    other = scores(rising, peak)
    second = replace(other.scores[1], metric=Choice("insertion", {"steps": 4}))
    assert worth_showing(replace(other, scores=(other.scores[0], second))) == [*range(8), 49, 50, 51, 99]
    assert worth_showing(scores(range(4))) == [0, 1, 2, 3]
    assert worth_showing(scores([5])) == [0]
    assert worth_showing(replace(scores(rising), scores=(Score(Choice("mean"), 0.0, True),))) == list(range(8))


def blank(classifier, x, y=None, /):
    """Explain every class but the predicted one; of that it says nothing."""
    silent = y == classifier.labels(x, None)
    return torch.where(silent.view(-1, 1, 1, 1), 0.0, classifier.features(x).mean(1, keepdim=True))


def test_a_picture_without_a_map_has_no_overlay(tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "blank", Entry(f"{__name__}:blank", ""))
    made = run(spec(method="blank", metrics=["average_drop"]), folder=tmp_path / "pics")
    spoken = [a != b for a, b in zip(made.scores.labels, made.scores.predicted, strict=True)]
    assert any(spoken), "maps of the label are there, those of the predicted class are drawn"
    assert [list(kept) for kept in made.pictures.values()] == [["image"]] * 5
    assert set(made.scores.degenerate) == {
        name for name, other in zip(made.scores.ids, spoken, strict=True) if not other
    }
    label = run(spec(method="blank", metrics=["average_drop"], explain="label"), folder=tmp_path / "pics")
    assert ["overlay" in kept for kept in label.pictures.values()] == spoken


@pytest.mark.parametrize("method", ["fake_cam", "input_x_gradient"])
def test_maps_of_single_pixels_are_drawn_smaller_than_they_are(tmp_path, pictures, method):
    asked = spec(
        model={"name": "mini_resnet", "classes": 2, "size": 480}, data=pictures, method=method, metrics=["average_drop"]
    )
    made = run(replace(asked, images=1), folder=tmp_path / "pics")
    assert set(made.pictures["newt/0.png"]) == {"image", "overlay"}


@pytest.mark.parametrize(("size", "expected"), [((64, 64), (160, 160)), ((64, 32), (160, 80)), ((20, 900), (4, 160))])
def test_thumbnails(size, expected):
    assert tuple(thumbnail(torch.rand(3, *size)).shape) == (3, *expected)
    assert tuple(thumbnail(torch.rand(1, *size).double()).shape) == (1, *expected)


def test_file_names():
    assert file_name(str(Choice("grad_cam"))) == "grad_cam"
    assert file_name(str(Choice("opti_cam", {"lr": 0.1, "path": "a/b"}))) == "opti_cam-lr-0.1--path-a-b"


# Errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "mini_resent"}, LookupError, "no model called 'mini_resent'; did you mean mini_resnet"),
        ({"model": {"name": "mini_resnet", "clases": 3}}, LookupError, "did you mean classes"),
        ({"data": "creature"}, LookupError, "no dataset called 'creature'; did you mean creatures"),
        ({"data": {"name": "creatures", "cuont": 3}}, LookupError, "no setting called 'cuont'; did you mean count"),
        ({"data": "folder"}, ValueError, "folder needs root=, the folder that holds it"),
        (
            {"data": {"name": "folder", "root": "nowhere/at/all"}},
            FileNotFoundError,
            "there is no folder nowhere/at/all",
        ),
        (
            {"data": {"name": "creatures", "count": "5"}},
            TypeError,
            "creatures: count: expected a whole number or None, got '5'",
        ),
        ({"method": "grad_cma"}, LookupError, "no method called 'grad_cma'; did you mean"),
        ({"method": {"name": "opti_cam", "stpes": 5}}, LookupError, "opti_cam: no setting called 'stpes'"),
        ({"method": {"name": "opti_cam", "objective": "maks"}}, LookupError, "did you mean mask"),
        ({"metrics": ["avrage_drop"]}, LookupError, "no metric called 'avrage_drop'; did you mean average_drop"),
        ({"metrics": [{"name": "insertion", "steps": 0}]}, ValueError, "expected steps >= 1"),
        ({"metrics": [{"name": "average_drop", "erase": "blakc"}]}, LookupError, "did you mean black"),
        ({"explain": "first"}, ValueError, "scored, label, predicted, second, least, got 'first'"),
        ({"layer": "layer5"}, LookupError, "no layer called 'layer5'; did you mean layer4"),
    ],
)
def test_what_does_not_fit_is_said_before_any_image_is_seen(change, error, message):
    with pytest.raises(error, match=message):
        prepare(spec(**change))


def test_labels_outside_the_classes():
    with pytest.raises(ValueError, match=r"label \d+ is outside 0\.\.3: the network has 4 classes"):
        run(spec(model={"name": "mini_resnet", "classes": 4}))


def test_no_metric_and_no_image(plain):
    with pytest.raises(ValueError, match="the specification lists no metric; expected at least one"):
        run(spec(metrics=[]))
    with pytest.raises(ValueError, match="no image was measured; the data set is empty"):
        run(spec(data={"name": "creatures", "count": 0}))


OWN = Entry(f"{__name__}:blank", "", signed=True)


def test_plugins_stand_beside_ours(tmp_path, monkeypatch):
    point = EntryPoint("own", f"{__name__}:OWN", "sightline.methods")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == point.group else [])
    assert named(spec(method="own"))[0] is blank
    made = run(spec(method="own", explain="least"), folder=tmp_path)
    assert all("overlay" in kept for kept in made.pictures.values())


def test_relabeled_masks_boxes_and_labels_follow():
    class Two:
        classes, skipped = ("b", "a"), {}

        def __len__(self):
            return 1

        def __getitem__(self, index):
            mask = torch.tensor([[0, 1, 2, 255]])
            return Sample(
                "one", torch.zeros(3, 1, 4), 0, torch.tensor([1, 0]), box_labels=torch.tensor([1, 0]), mask=mask
            )

    one = Relabeled(Two(), (3, 1), 5)[0]
    assert one.label == 3
    assert one.labels.tolist() == [0, 0, 0, 1, 0]
    assert one.box_labels.tolist() == [1, 3]
    assert one.mask.tolist() == [[0, 4, 2, 255]]


CLASSIFIERS = [{"name": "mini_vgg", "classes": 20}, {"name": "mini_resnet", "classes": 20, "seed": 3}]


def test_a_protocol_is_asked_for_like_a_metric_and_gives_a_score_a_part():
    listed = ["average_drop", {"name": "multi_classifier_accuracy", "classifiers": CLASSIFIERS}]
    told = []
    made = run(spec(metrics=listed), report=lambda *said: told.append(said))
    parts = [f"multi_classifier_accuracy.{part}" for part in ("clean", "masked_in", "masked_out", "inpainted")]
    assert [score.metric.name for score in made.scores.scores] == ["average_drop", *parts]
    assert made.scores.scores[1].higher_is_better is None
    assert made.scores.scores[2].metric.settings == {"classifiers": CLASSIFIERS}
    assert len(made.scores.scores[2].curve) == 2
    assert told[-1] == (5, 5, "multi_classifier_accuracy")
    key = str(Spec.of({**TABLE, "metrics": listed}).metrics[1])
    assert made.arguments["metrics"][key]["classifiers"] == CLASSIFIERS
    assert made.arguments["metrics"][key]["rule"] == "matched_area"


def test_protocols_alone_need_no_metric_and_see_only_the_images_asked_for():
    held_out = {"name": "creatures", "split": "val", "count": 4}
    made = run(spec(metrics=[{"name": "weak_localization", "held_out": held_out}], images=3))
    assert {score.metric.name.partition(".")[0] for score in made.scores.scores} == {"weak_localization"}
    assert made.scores["weak_localization.value"].count == 3
    assert len(made.scores.ids) == 3
    assert made.scores.seconds > 0


def test_a_protocol_s_needs_and_settings_are_checked_first():
    with pytest.raises(ValueError, match="weak_localization needs held_out="):
        named(spec(metrics=["weak_localization"]))
    with pytest.raises(LookupError, match="no setting called 'clasifiers'"):
        named(spec(metrics=[{"name": "multi_classifier_accuracy", "clasifiers": [], "classifiers": []}]))
    with pytest.raises(LookupError, match="no metric called 'cue_localisation'; did you mean cue_localization"):
        named(spec(metrics=["cue_localisation"]))


def test_maps_in_files_are_scored_like_a_method_s(tmp_path):
    on = scene(spec())
    for batch in batches(on.samples, 2):
        maps = grad_cam(on.classifier, batch.x, batch.y)
        for name, one in zip(batch.ids, maps, strict=True):
            write_map(tmp_path / f"{name}.npy", one)
    asked = {"metrics": ["localization_error", "pxap", "average_drop"], "explain": "label"}
    ours = run(spec(**asked))
    theirs = run(spec(method={"name": "maps", "root": str(tmp_path)}, **asked), folder=tmp_path / "pictures")
    assert [score.value for score in theirs.scores.scores] == pytest.approx(
        [score.value for score in ours.scores.scores]
    )
    assert theirs.pictures
    with pytest.raises(ValueError, match="maps needs root=, the folder of the maps"):
        named(spec(method="maps"))
    with pytest.raises(UnsuitedError, match="needs the method itself"):
        run(spec(method={"name": "maps", "root": str(tmp_path)}, metrics=["max_sensitivity"]))


def test_maps_are_kept_where_another_run_finds_them(tmp_path):
    asked = {"metrics": ["pxap"], "explain": "label"}
    ours = run(spec(**asked), keep=tmp_path)
    assert len(list(tmp_path.glob("*.npy"))) == 5
    theirs = run(spec(method={"name": "maps", "root": str(tmp_path)}, **asked))
    assert theirs.scores["pxap"].value == pytest.approx(ours.scores["pxap"].value)


def test_a_name_that_leaves_the_folder_is_refused(tmp_path):
    class Wandering:
        classes, skipped = (), {}

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return Sample("../out", torch.rand(3, 64, 64), 0)

    on = replace(scene(spec()), samples=Wandering())
    with pytest.raises(ValueError, match=r"the map of '\.\./out' would lie outside"):
        run(spec(metrics=["average_drop"]), on=on, keep=tmp_path / "maps")


def test_maps_are_judged_without_a_classifier(tmp_path):
    for sample in creatures("test", count=5):
        write_map(tmp_path / f"{sample.id}.npy", (sample.mask == sample.label + 1).float())
    alone = {"model": {"name": "none", "size": 64, "classes": 20}, "method": {"name": "maps", "root": str(tmp_path)}}
    made = run(
        spec(**alone, metrics=["localization_error", "pxap", "max_box_accuracy_v2"]), folder=tmp_path / "pictures"
    )
    assert [score.value for score in made.scores.scores] == pytest.approx([0, 100, 100])
    assert made.scores.accuracy is None
    assert Run.read(made.write(tmp_path / "run.json")).scores.predicted == (-1,) * 5
    for metric in ("official_metric", "average_drop", "insertion"):
        with pytest.raises(UnsuitedError, match=r"there is none \(model 'none'\)"):
            run(spec(**alone, metrics=[metric]))
