"""Maps, labels and results in other tools' files: what is written is read, what is wrong is said."""

import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from torch.testing import assert_close

from sightline.classifier import UnsuitedError
from sightline.images import fit
from sightline.interchange import (
    Cams,
    Detection,
    Network,
    decoded,
    encoded,
    for_quantus,
    of_captum,
    palette,
    placed_labels,
    read_coco,
    read_irn,
    read_labels,
    read_map,
    read_names,
    stored,
    write_coco,
    write_irn,
    write_labels,
    write_map,
    write_overlay,
)
from sightline.methods import grad_cam, gradient


@pytest.fixture
def field():
    return torch.rand(5, 7, generator=torch.Generator().manual_seed(3))


def test_a_wsol_map_is_a_plain_array_that_numpy_reads(tmp_path, field):
    path = write_map(tmp_path / "val" / "a.JPEG.npy", field[None, None])
    assert np.load(path).dtype == np.float32
    assert np.load(path).shape == (5, 7)
    assert torch.equal(read_map(path), field)


def test_maps_with_a_channel_and_gray_pictures_are_read(tmp_path, field):
    np.save(tmp_path / "a.npy", field[None].double().numpy())
    assert torch.equal(read_map(tmp_path / "a.npy"), field)
    Image.fromarray(np.array([[0, 51], [255, 102]], np.uint8)).save(tmp_path / "b.png")
    assert_close(read_map(tmp_path / "b.png"), torch.tensor([[0, 0.2], [1, 0.4]]))
    Image.fromarray(np.array([[0, 65535]], np.uint16)).save(tmp_path / "c.png")
    assert read_map(tmp_path / "c.png").tolist() == [[0, 1]]


def test_what_is_no_map_is_said(tmp_path, field):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_map(tmp_path / "none.npy")
    with pytest.raises(ValueError, match=r"expected one map \(h, w\), got shape \(2, 5, 7\)"):
        write_map(tmp_path / "a.npy", field.expand(2, 5, 7))
    with pytest.raises(ValueError, match=r"ends in \.npy, got .*a\.npz"):
        write_map(tmp_path / "a.npz", field)
    np.save(tmp_path / "b.npy", np.zeros((3, 4, 5)))
    with pytest.raises(ValueError, match=r"float64 \(3, 4, 5\); expected one map"):
        read_map(tmp_path / "b.npy")
    np.save(tmp_path / "c.npy", np.array(["a"]))
    with pytest.raises(ValueError, match="expected one map of numbers"):
        read_map(tmp_path / "c.npy")
    (tmp_path / "d.npy").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="holds no map"):
        read_map(tmp_path / "d.npy")
    Image.new("RGB", (3, 3)).save(tmp_path / "e.png")
    with pytest.raises(ValueError, match="has colors; expected a gray picture"):
        read_map(tmp_path / "e.png")


@pytest.mark.parametrize("pickled", [False, True])
def test_an_irn_dictionary_comes_back(tmp_path, pickled):
    cams = Cams(torch.tensor([3, 14]), torch.rand(2, 4, 5), torch.rand(2, 16, 20))
    path = write_irn(tmp_path / f"a.{'npy' if pickled else 'npz'}", cams, pickled=pickled)
    found = read_irn(path, pickled=pickled)
    assert found.keys.tolist() == [3, 14]
    assert torch.equal(found.cam, cams.cam)
    assert torch.equal(found.of(14), cams.high_res[1])
    assert found.of(5) is None
    coarse = Cams(cams.keys, cams.cam)
    assert torch.equal(coarse.of(3), cams.cam[0])


def test_irn_reads_what_is_written_for_it(tmp_path):
    """By the lines of its programs that read: `step/cam_to_ir_label.py` and `step/make_sem_seg_labels.py`."""
    cams = Cams(torch.tensor([3, 14]), torch.rand(2, 4, 5), torch.rand(2, 16, 20))
    write_irn(tmp_path / "2007_000032.npy", cams, pickled=True)
    cam_dict = np.load(os.path.join(tmp_path, "2007_000032" + ".npy"), allow_pickle=True).item()  # noqa: PTH118
    assert type(cam_dict) is dict
    assert list(cam_dict) == ["keys", "cam", "high_res"]
    keys = np.pad(cam_dict["keys"] + 1, (1, 0), mode="constant")
    assert keys.tolist() == [0, 4, 15]
    planes = np.pad(cam_dict["high_res"], ((1, 0), (0, 0), (0, 0)), mode="constant", constant_values=0.3)
    assert np.array_equal(planes[1:], cams.high_res.numpy())
    assert (planes.dtype, type(cam_dict["high_res"])) == (np.float32, np.ndarray)
    assert torch.equal(cam_dict["cam"].cpu(), cams.cam)
    assert (cam_dict["cam"].dtype, cam_dict["keys"].dtype) == (torch.float32, torch.int64)


def test_the_same_maps_are_the_same_pickle(tmp_path):
    found, kept = [], []
    for number in range(3):
        kept.append(torch.rand(number + 1))
        cams = Cams(torch.arange(2), torch.arange(40.0).view(2, 4, 5), torch.ones(2, 16, 20))
        found.append(write_irn(tmp_path / f"{number}.npy", cams, pickled=True).read_bytes())
    assert found[0] == found[1] == found[2]


def test_irn_s_own_pickle_is_read_as_irn_writes_it_and_only_when_asked_for(tmp_path, plain):
    np.save(tmp_path / "a.npy", {"keys": torch.tensor([1]), "cam": torch.ones(1, 2, 2), "high_res": np.ones((1, 8, 8))})
    with pytest.raises(ValueError, match="runs code of whoever wrote it; if you trust it, say pickled=true"):
        read_irn(tmp_path / "a.npy")
    assert read_irn(tmp_path / "a.npy", pickled=True).of(1).shape == (8, 8)
    with pytest.raises(ValueError, match="read_irn"):
        read_map(tmp_path / "a.npy")
    np.savez(tmp_path / "b.npz", wrong=np.ones(3))
    with pytest.raises(ValueError, match="holds no IRN dictionary: 'keys'; expected keys, cam"):
        read_irn(tmp_path / "b.npz")
    with pytest.raises(ValueError, match="got 2 classes and 1 maps"):
        write_irn(tmp_path / "c.npz", Cams(torch.tensor([1, 2]), torch.ones(1, 2, 2)))


def test_label_maps_have_voc_s_palette_and_keep_255(tmp_path):
    labels = torch.tensor([[0, 1, 20], [255, 3, 0]])
    path = write_labels(tmp_path / "a.png", labels)
    assert torch.equal(read_labels(path), labels)
    assert np.array(Image.open(path).convert("RGB"))[0].tolist() == [[0, 0, 0], [128, 0, 0], [0, 64, 128]]
    assert palette()[3 * 255 :] == [224, 224, 192]
    with pytest.raises(ValueError, match="expected labels in 0 to 255, got 0 to 256"):
        write_labels(tmp_path / "b.png", torch.tensor([[0, 256]]))
    Image.new("RGB", (3, 3)).save(tmp_path / "c.png")
    with pytest.raises(ValueError, match="holds colors, not labels"):
        read_labels(tmp_path / "c.png")


def test_a_folder_says_what_its_label_maps_mean(tmp_path):
    assert read_names(tmp_path) == ()
    (tmp_path / "segment.json").write_text('{"names": ["background", "newt"], "threshold": 0.3}')
    for folder in ("labels", "other"):
        (tmp_path / folder).mkdir()
    assert read_names(tmp_path) == read_names(tmp_path / "labels") == ("background", "newt")
    assert read_names(tmp_path / "other") == ()
    for text in ("[", "[]", '{"names": 3}'):
        (tmp_path / "segment.json").write_text(text)
        with pytest.raises(ValueError, match=r"segment\.json does not say what label maps mean"):
            read_names(tmp_path)


def test_label_maps_have_no_value_for_high_classes(tmp_path):
    write_labels(tmp_path / "a.png", torch.tensor([[0, 254], [255, 254]]))
    maps, size = stored(tmp_path, form="labels"), (2, 2)
    assert maps.of(["a"], torch.tensor([253]), size).tolist() == [[[[0, 1], [0, 1]]]]
    for label in (254, 255, 299):
        with pytest.raises(ValueError, match=f"class {label} has no value"):
            maps.of(["a"], torch.tensor([label]), size)


@pytest.mark.parametrize("policy", ["direct", "crop", "crop256"])
@pytest.mark.parametrize("source", [(20, 30), (30, 20), (7, 7)])
def test_labels_go_where_the_picture_goes(policy, source):
    """The picture holds the label map's rows and columns: each pixel of the labels is within one of what it shows."""
    rows, columns = torch.meshgrid(torch.arange(source[0]), torch.arange(source[1]), indexing="ij")
    found = [placed_labels(one, (9, 11), policy) for one in (rows, columns)]
    shown = fit(torch.stack([rows, columns]).float() / 30, (9, 11), policy) * 30
    for one, other in zip(found, shown, strict=True):
        assert one.shape == (9, 11)
        assert (one - other).abs().max() < 2
        assert (one.float().mean() - other.mean()).abs() < 0.6
    assert placed_labels(rows, source, "direct").equal(rows)


def palette_by_bits():
    """Pascal VOC's rule: bit k of the index goes to bit 7 - k // 3 of channel k mod 3."""
    colors = []
    for index in range(256):
        color = [0, 0, 0]
        for k in range(8):
            color[k % 3] |= (index >> k & 1) << (7 - k // 3)
        colors += color
    return colors


def test_the_palette_is_voc_s():
    assert palette() == palette_by_bits()


@given(arrays.arrays(bool, st.tuples(st.integers(1, 6), st.integers(1, 6))))
@settings(max_examples=60, deadline=None)
def test_run_lengths_come_back_and_are_coco_s(mask):
    code = encoded(torch.from_numpy(mask))
    assert torch.equal(decoded(code), torch.from_numpy(mask))
    coco = pytest.importorskip("pycocotools.mask")
    packed = coco.frPyObjects(code, *code["size"])
    assert (coco.decode(packed).astype(bool) == mask).all()
    assert torch.equal(decoded({"size": packed["size"], "counts": packed["counts"].decode()}), torch.from_numpy(mask))


def test_coco_results_come_back(tmp_path):
    mask = torch.tensor([[True, False, True], [False, True, True]])
    given_ones = [Detection(7, 3, (1.0, 2.0, 4.5, 8.0), 0.25, mask), Detection("a", 1, (0.0, 0.0, 1.0, 1.0), 1.0)]
    path = write_coco(tmp_path / "results.json", given_ones)
    table = json.loads(path.read_text())
    assert table[0]["bbox"] == [1, 2, 3.5, 6]
    assert "segmentation" not in table[1]
    first, second = read_coco(path)
    assert (first.image_id, first.category_id, first.box, first.score) == (7, 3, (1, 2, 4.5, 8), 0.25)
    assert torch.equal(first.mask, mask)
    assert second.mask is None
    path.write_text('[{"bbox": [1, 2]}]')
    with pytest.raises(ValueError, match="holds no COCO results"):
        read_coco(path)
    with pytest.raises(ValueError, match="run lengths of 3 pixels do not fill 2 x 3"):
        decoded({"size": [2, 3], "counts": [1, 2]})


def test_stored_maps_are_found_by_name_whatever_the_ending(tmp_path, field):
    write_map(tmp_path / "val" / "a.jpg.npy", field)
    write_map(tmp_path / "b.npy", 2 * field)
    found = stored(tmp_path).of(["val/a.jpg", "deep/b.jpg"], torch.tensor([0, 1]), (5, 7))
    assert torch.equal(found, torch.stack([field, 2 * field])[:, None])
    with pytest.raises(FileNotFoundError, match=r"no map of 'c\.jpg' in .*; looked for c\.jpg\.npy"):
        stored(tmp_path).of(["c.jpg"], torch.tensor([0]), (5, 7))


def test_stored_maps_of_several_classes_answer_for_the_class(tmp_path):
    cams = Cams(torch.tensor([4, 9]), torch.rand(2, 3, 3))
    write_irn(tmp_path / "a.npz", cams)
    maps = stored(tmp_path, form="irn")
    assert torch.equal(maps.of(["a"], torch.tensor([9]), (3, 3))[0, 0], cams.cam[1])
    with pytest.raises(ValueError, match=r"holds no map of class 5, only of 4, 9; explain the labels"):
        maps.of(["a"], torch.tensor([5]), (3, 3))


def test_label_maps_are_maps_of_each_class(tmp_path):
    labels = torch.tensor([[0, 1, 5, 255], [1, 1, 5, 0]])
    write_labels(tmp_path / "a.png", labels)
    maps = stored(tmp_path, form="labels")
    found = maps.of(["a", "a", "a"], torch.tensor([0, 4, 2]), (2, 4))
    assert torch.equal(found[:, 0], torch.stack([labels == 1, labels == 5, labels == 3]).float())
    larger = maps.of(["a"], torch.tensor([4]), (4, 8))
    assert torch.equal(larger[0, 0], (labels == 5).float().repeat_interleave(2, 0).repeat_interleave(2, 1))
    cut = stored(tmp_path, form="labels", resize="crop").of(["a"], torch.tensor([4]), (2, 2))
    assert torch.equal(cut[0, 0], torch.tensor([[0.0, 1.0], [0.0, 1.0]]))


def test_maps_of_the_original_picture_are_cut_like_the_picture(tmp_path):
    write_map(tmp_path / "a.npy", torch.arange(8.0).expand(4, 8))
    cut = stored(tmp_path, resize="crop").of(["a"], torch.tensor([0]), (4, 4))
    assert cut[0, 0, 0].tolist() == [2, 3, 4, 5]
    assert stored(tmp_path).of(["a"], torch.tensor([0]), (4, 4)).shape == (1, 1, 4, 8)


def test_maps_of_several_sizes_come_in_the_size_of_the_images(tmp_path, field):
    write_map(tmp_path / "a.npy", field)
    write_map(tmp_path / "b.npy", field[:3])
    assert stored(tmp_path).of(["a", "b"], torch.tensor([0, 0]), (6, 6)).shape == (2, 1, 6, 6)


def test_stored_maps_refuse_what_they_cannot_do(tmp_path, pooled, x):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        stored(tmp_path / "nowhere")
    with pytest.raises(LookupError, match="no resize policy called 'squash'"):
        stored(tmp_path, resize="squash")
    with pytest.raises(UnsuitedError, match="needs the method itself"):
        stored(tmp_path)(pooled, x)


def test_an_overlay_is_a_picture_of_the_image_s_size(tmp_path, field):
    path = write_overlay(tmp_path / "a.png", torch.full((3, 20, 28), 0.5), field[None, None])
    picture = np.array(Image.open(path).convert("RGB"))
    assert picture.shape == (20, 28, 3)
    assert picture.reshape(-1, 3).std(0).min() > 5
    with pytest.raises(ValueError, match="all zero"):
        write_overlay(tmp_path / "b.png", torch.zeros(3, 4, 4), torch.ones(4, 4))


def test_a_captum_attribution_is_a_method(pooled, x):
    captum = pytest.importorskip("captum.attr")
    method = of_captum(captum.Saliency(Network(pooled)).attribute, reduce="max_abs")
    y = torch.tensor([0, 2, 4])
    with pytest.warns(UserWarning, match="did not already require gradients"):
        assert_close(method(pooled, x, y), gradient(pooled, x, y))


def test_an_unknown_reduction_is_refused(plain):
    with pytest.raises(LookupError, match="no reduction called 'mean'"):
        of_captum(lambda x: x, reduce="mean")


def test_quantus_gets_arrays_of_the_network_it_hands_over(pooled, curved, x):
    explain = for_quantus(grad_cam)
    found = explain(Network(pooled.at("stem")), x.float().numpy(), np.array([0, 1, 2]), device="cpu")
    assert found.shape == (3, 1, 24, 32)
    assert found.dtype == np.float32
    y = torch.tensor([0, 1, 2])
    same = torch.nn.functional.interpolate(grad_cam(pooled.at("stem"), x.float(), y), (24, 32), mode="bilinear")
    assert_close(torch.from_numpy(found), same.float())
    with pytest.raises(TypeError, match=r"expected Network\(classifier\), got Pooled"):
        explain(pooled.model, x.numpy(), np.array([0, 1, 2]))
