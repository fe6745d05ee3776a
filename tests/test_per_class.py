"""Several classes at once: the general form, and the one pass of CAM and RISE."""

from functools import partial

import pytest
import torch
from torch import nn

from sightline.classifier import wrap
from sightline.methods import cam, flip_and_scale, grad_cam, gradient, per_class, rise
from sightline.methods._per_class import one_pass

FEW = partial(rise, samples=12, p=0.5, seed=3)
LARGER = flip_and_scale(cam, scales=(1.0, 2.0), positive=True)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


@pytest.fixture
def classifier():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return wrap(Net().double(), normalization="none", size=16)


@pytest.mark.parametrize(("method", "size"), [(cam, 8), (grad_cam, 8), (FEW, 16), (LARGER, 16)])
def test_each_map_is_the_map_of_its_class(classifier, method, size):
    x = torch.rand(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    classes = torch.tensor([[0, 3], [2, 2], [1, 0]])
    maps = per_class(method)(classifier, x, classes)
    assert maps.shape == (3, 2, size, size)
    for image in range(3):
        for place in range(2):
            alone = method(classifier, x[image : image + 1], classes[image, place : place + 1])
            torch.testing.assert_close(maps[image, place], alone[0, 0], rtol=0, atol=1e-9)


def test_cam_takes_one_forward_for_all_classes(classifier):
    calls = []
    handle = classifier.model.head.register_forward_hook(lambda *_: calls.append(1))
    per_class(cam)(classifier, torch.rand(2, 3, 16, 16, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.long))
    handle.remove()
    assert len(calls) == 1


def test_scales_and_flips_have_one_pass_where_their_method_has(classifier):
    images = []
    handle = classifier.model.head.register_forward_hook(lambda _, args, __: images.append(len(args[0])))
    per_class(LARGER)(classifier, torch.rand(2, 3, 16, 16, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.long))
    handle.remove()
    assert images == [4, 4], "two scales, each with two images and their mirror images"
    assert one_pass(flip_and_scale(LARGER)) is not None
    assert one_pass(flip_and_scale(gradient)) is None


def test_a_class_that_the_network_lacks_is_an_error(classifier):
    with pytest.raises(ValueError, match=r"label 4 is outside 0\.\.3"):
        per_class(cam)(classifier, torch.rand(1, 3, 16, 16, dtype=torch.float64), torch.tensor([[0, 4]]))


def test_rise_takes_the_passes_of_one_class_for_all(classifier):
    images = []
    handle = classifier.model.head.register_forward_hook(lambda _, args, __: images.append(len(args[0])))
    per_class(FEW)(classifier, torch.rand(2, 3, 16, 16, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.long))
    handle.remove()
    assert sum(images) == 2 + 2 * 12


def test_settings_are_read_from_a_partial(classifier):
    x, classes = torch.rand(2, 3, 16, 16, dtype=torch.float64), torch.tensor([[0, 1], [2, 3]])
    few = per_class(FEW)(classifier, x, classes)
    assert torch.equal(few, per_class(partial(FEW, chunk=64))(classifier, x, classes))
    assert not torch.allclose(few, per_class(partial(FEW, seed=4))(classifier, x, classes))
    filled = per_class(partial(FEW, erase="mean", cells=3))(classifier, x, classes)
    for place in range(2):
        alone = rise(classifier, x, classes[:, place], samples=12, p=0.5, seed=3, erase="mean", cells=3)
        torch.testing.assert_close(filled[:, place : place + 1], alone, rtol=0, atol=1e-9)
    assert torch.equal(per_class(partial(cam))(classifier, x, classes), per_class(cam)(classifier, x, classes))


def test_settings_of_other_methods_are_kept(classifier):
    x, classes = torch.rand(2, 3, 16, 16, dtype=torch.float64), torch.tensor([[0, 1], [2, 3]])
    doubled = partial(grad_cam, score=lambda logits, y: 2 * logits.gather(1, y[:, None])[:, 0])
    expected = 2 * per_class(grad_cam)(classifier, x, classes)
    torch.testing.assert_close(per_class(doubled)(classifier, x, classes), expected)


def test_a_method_that_cannot_be_hashed_is_called_class_by_class(classifier):
    class Method:
        __hash__ = None

        def __call__(self, classifier, x, y=None, /):
            return y.view(-1, 1, 1, 1).double().expand(-1, 1, 2, 2)

    maps = per_class(Method())(
        classifier, torch.rand(2, 3, 16, 16, dtype=torch.float64), torch.tensor([[0, 1], [2, 3]])
    )
    assert maps[:, :, 0, 0].tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize("method", [cam, FEW])
def test_a_wrong_class_is_an_error_in_any_column(classifier, method):
    with pytest.raises(ValueError, match=r"label -1 is outside 0\.\.3"):
        per_class(method)(classifier, torch.rand(1, 3, 16, 16, dtype=torch.float64), torch.tensor([[0, -1]]))
