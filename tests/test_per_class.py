"""Several classes at once: the general form and CAM's one pass."""

import pytest
import torch
from torch import nn

from sightline.classifier import wrap
from sightline.methods import cam, grad_cam, per_class


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


@pytest.mark.parametrize("method", [cam, grad_cam])
def test_each_map_is_the_map_of_its_class(classifier, method):
    x = torch.rand(3, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    classes = torch.tensor([[0, 3], [2, 2], [1, 0]])
    maps = per_class(method)(classifier, x, classes)
    assert maps.shape == (3, 2, 8, 8)
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


def test_a_class_that_the_network_lacks_is_an_error(classifier):
    with pytest.raises(ValueError, match=r"label 4 is outside 0\.\.3"):
        per_class(cam)(classifier, torch.rand(1, 3, 16, 16, dtype=torch.float64), torch.tensor([[0, 4]]))
