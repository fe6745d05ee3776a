from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sightline.classifier_training import ClassifierConfig, head_name, replace_head, train
from sightline.data import Sample
from sightline.hooks import capture
from sightline.maps import resize
from sightline.methods import METHODS
from sightline.models._gap import from_torchvision, inception_v3_gap, resnet50_gap, vgg16_gap

FACTORIES = {"vgg16": vgg16_gap, "inception_v3": inception_v3_gap, "resnet50": resnet50_gap}
LAST = {"vgg16": ("relu", 1024), "inception_v3": ("relu", 1024), "resnet50": ("layer4", 2048)}
NAMES = list(FACTORIES)


@pytest.fixture(scope="module")
def built():
    return {name: factory(5, size=64) for name, factory in FACTORIES.items()}


@pytest.fixture
def x():
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
def test_an_image_of_224_has_28_cells_a_side(built, name):
    classifier = built[name]
    layer, channels = LAST[name]
    assert (classifier.layer, classifier.size) == (layer, (64, 64))
    image = torch.rand(1, 3, 224, 224)
    with torch.no_grad(), capture(classifier.model, [layer, "head"]) as found:
        logits = classifier(image)
    assert found[layer].shape == (1, channels, 28, 28)
    assert float(found[layer].min()) == 0
    assert found["head"].shape == (1, 5, 28, 28)
    assert torch.allclose(found["head"].mean((2, 3)), logits, atol=1e-3 * float(logits.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_the_small_form_has_half_the_cells_and_the_same_weights(built, name, x):
    small = FACTORIES[name](5, size=64, large=False)
    state, other = built[name].model.state_dict(), small.model.state_dict()
    if name == "vgg16":
        assert list(state) == list(other)
    assert all(torch.equal(state[key], other[key]) for key in state)
    assert small.features(x).shape[2:] == (4, 6)
    assert built[name].features(x).shape[2:] == (8, 12)
    with torch.no_grad(), capture(small.model, [LAST[name][0]]) as found:
        small(torch.rand(1, 3, 224, 224))
    assert found[LAST[name][0]].shape[2:] == (14, 14)


def convolutions(model):
    return [(m.in_channels, m.out_channels, m.kernel_size[0]) for m in model.modules() if isinstance(m, nn.Conv2d)]


def test_vgg_is_thirteen_convolutions_then_two(built):
    model = built["vgg16"].model
    widths = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    trunk = [(a, b, 3) for a, b in pairwise(widths)]
    assert convolutions(model) == [*trunk, (512, 1024, 3), (1024, 5, 1)]
    assert sum(isinstance(m, nn.MaxPool2d) for m in model.modules()) == 3
    assert list(dict(model.named_children())) == ["features", "conv", "relu", "head", "avgpool", "flatten"]
    assert not any(isinstance(m, nn.Linear | nn.Dropout | nn.Identity) for m in model.modules())


def test_inception_ends_at_mixed_6e(built):
    names = list(dict(built["inception_v3"].model.named_children()))
    assert names[0] == "Conv2d_1a_3x3"
    assert names[-6:] == ["Mixed_6e", "conv", "relu", "head", "avgpool", "flatten"]
    assert "AuxLogits" not in names
    assert convolutions(built["inception_v3"].model)[-2:] == [(768, 1024, 3), (1024, 5, 1)]


def test_resnet_has_no_stride_and_no_dilation_in_its_last_stages(built):
    model = built["resnet50"].model
    for stage, stride in (("layer2", 2), ("layer3", 1), ("layer4", 1)):
        block = model.get_submodule(stage)[0]
        assert block.conv2.stride == block.downsample[0].stride == (stride, stride)
    assert all(m.dilation == (1, 1) for m in model.modules() if isinstance(m, nn.Conv2d))
    assert list(dict(model.named_children()))[-4:] == ["layer4", "head", "avgpool", "flatten"]


def bn(z, norm):
    return F.batch_norm(z, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)


def unit(z, module):
    """Convolution, batch norm, ReLU of torchvision's Inception."""
    z = F.conv2d(z, module.conv.weight, None, module.conv.stride, module.conv.padding)
    return bn(z, module.bn).relu()


@pytest.mark.parametrize("large", [True, False])
def test_the_padded_reduction_by_hand(built, large):
    model = (built["inception_v3"] if large else inception_v3_gap(2, size=64, large=False)).model
    block, z = model.Mixed_6a.eval(), torch.rand(1, 288, 10, 10)
    stride = 1 if large else 2
    kernels = [block.branch3x3, *block.branch3x3dbl]
    assert [m.conv.stride[0] for m in kernels] == [stride, 1, 1, stride]
    assert [m.conv.padding[0] for m in kernels] == [1, 0, 1, 1]
    with torch.no_grad():
        deep = z
        for module in block.branch3x3dbl:
            deep = unit(deep, module)
        padded = F.pad(z, (1, 1, 1, 1), value=float("-inf"))
        pooled = padded.unfold(2, 3, stride).unfold(3, 3, stride).amax((4, 5))
        expected = torch.cat([unit(z, block.branch3x3), deep, pooled], 1)
        assert torch.allclose(block(z), expected, atol=1e-5)
    assert expected.shape == (1, 768, 10 // stride, 10 // stride)


@pytest.mark.parametrize("name", NAMES)
def test_cam_is_exact_and_grad_cam_is_proportional_to_it(built, name, x):
    classifier = built[name]
    y = torch.tensor([1, 4])
    cam, grad_cam = METHODS["cam"](classifier, x, y), METHODS["grad_cam"](classifier, x, y)
    assert cam.shape == grad_cam.shape == (2, 1, 8, 12)
    logits = classifier(x).gather(1, y[:, None])[:, 0]
    scale = float(classifier(x).abs().max())
    assert torch.allclose(cam.mean((1, 2, 3)), logits, atol=1e-4 * scale)
    tolerance = 1e-4 * float(cam.abs().max())
    assert torch.allclose(grad_cam * 96, cam.relu(), atol=tolerance)
    with torch.no_grad(), capture(classifier.model, ["head"]) as found:
        classifier(x)
    assert torch.allclose(found["head"][torch.arange(2), y][:, None], cam, atol=tolerance)
    assert float(cam.std()) > 0
    assert resize(cam, (64, 96)).shape == (2, 1, 64, 96)


def test_the_head_is_a_linear_layer_on_pooled_features(built, x):
    for classifier in built.values():
        weight, bias = classifier.model.head.weight[:, :, 0, 0], classifier.model.head.bias
        pooled = classifier.features(x).mean((2, 3))
        logits = classifier(x)
        assert torch.allclose(F.linear(pooled, weight, bias), logits, atol=1e-4 * float(logits.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_new_layers_are_xavier_and_the_seed_makes_everything(built, name):
    before = torch.get_rng_state()
    again = FACTORIES[name](5, size=64)
    assert torch.equal(torch.get_rng_state(), before)
    states = built[name].model.state_dict(), again.model.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))
    for layer in ("conv", "head") if name != "resnet50" else ("head",):
        weight = again.model.get_submodule(layer).weight.detach()
        bound = (6 / (weight[0].numel() + weight.shape[0] * weight[0, 0].numel())) ** 0.5
        assert 0.95 * bound < float(weight.abs().max()) <= 1.0001 * bound
        assert not again.model.get_submodule(layer).bias.any()


def test_another_seed_is_another_network_and_the_layer_is_a_choice(built):
    other = resnet50_gap(5, size=32, seed=1, layer="layer2")
    assert other.layer == "layer2"
    assert not torch.equal(built["resnet50"].model.conv1.weight, other.model.conv1.weight)
    assert not torch.equal(built["resnet50"].model.head.weight, other.model.head.weight)


@pytest.mark.parametrize("name", NAMES)
def test_the_trunk_takes_the_weights_of_torchvision(monkeypatch, name):
    from torchvision import models as zoo

    asked, original = [], zoo.get_model

    def build(called, *, weights, progress=True, **settings):
        asked.append((called, weights))
        with torch.random.fork_rng([]):
            torch.manual_seed(77)
            network = original(called, weights=None, **({"init_weights": False} if called == "inception_v3" else {}))
        asked.append(network.state_dict())
        return network

    monkeypatch.setattr(zoo, "get_model", build)
    classifier = FACTORIES[name](4, size=64, weights="IMAGENET1K_V1")
    assert asked[0] == (name, zoo.get_model_weights(name).IMAGENET1K_V1)
    own, given = classifier.model.state_dict(), asked[1]
    shared = [key for key in own if key.split(".")[0] not in ("conv", "head") and "dbl." not in key]
    assert len(shared) > 20
    assert all(torch.equal(own[key], given[key]) for key in shared)
    deep = [key for key in own if "branch3x3dbl." in key]
    assert len(deep) == (18 if name == "inception_v3" else 0)
    for key in deep:
        first, _, rest = key.partition("branch3x3dbl.")
        number, _, rest = rest.partition(".")
        assert torch.equal(own[key], given[f"{first}branch3x3dbl_{int(number) + 1}.{rest}"])
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    halves = ((0.5,) * 3, (0.5,) * 3)
    assert (classifier.mean, classifier.std) == (halves if name == "inception_v3" else imagenet)


def test_inception_sees_what_torchvision_makes_of_imagenet_normalization(built):
    from torchvision.models import Inception3

    x = torch.rand(2, 3, 8, 8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    theirs = Inception3._transform_input(type("Its", (), {"transform_input": True})(), (x - mean) / std)
    assert torch.allclose(built["inception_v3"].normalize(x), theirs, atol=1e-6)


def test_vgg_features_have_a_normalization_of_their_own(monkeypatch):
    from torchvision import models as zoo

    monkeypatch.setattr(zoo, "get_model", lambda name, *, weights, progress: nn.Flatten())
    _, normalization = from_torchvision("vgg16", "IMAGENET1K_FEATURES")
    assert normalization[1] == pytest.approx([1 / 255] * 3)


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_are_not_there(monkeypatch, name):
    with pytest.raises(LookupError, match=f"no weights of {name} called 'IMAGENET1K_V7'; did you mean IMAGENET1K_V"):
        FACTORIES[name](weights="IMAGENET1K_V7")

    def refuse(*_, **__):
        raise ConnectionRefusedError("no network here")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    file = rf"{'inception_v3_google' if name == 'inception_v3' else name}-\w+\.pth"
    told = (
        rf"cannot download the weights of {name} \(no network here\); put {file} into .*checkpoints, "
        rf"give a local file: {name}_gap\?weights=FILE\.pth, or take random weights: {name}_gap\?weights=none$"
    )
    with pytest.raises(ConnectionError, match=told):
        FACTORIES[name](weights="DEFAULT")


def test_settings_that_do_not_fit():
    with pytest.raises(LookupError, match="no layer called 'layr3'; did you mean layer3"):
        resnet50_gap(2, size=32, layer="layr3")


class Squares:
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return Sample(f"s{index}", torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(index)), index % 2)


@pytest.mark.parametrize("name", NAMES)
def test_one_step_of_training_with_a_new_head_moves_all_layers(name):
    classifier = FACTORIES[name](5, size=32, large=False)
    assert head_name(classifier.model) == "head"
    replace_head(classifier.model, 2)
    before = {key: value.detach().clone() for key, value in classifier.model.named_parameters()}
    layers = {"vgg16": "features.15+relu", "inception_v3": "Mixed_5d+relu", "resnet50": "layer3+layer4"}[name]
    config = ClassifierConfig(epochs=1, batch=4, lr=1e-3, warmup=0.0, regularizer=f"adl?layers={layers}&drop=0")
    train(classifier, Squares(), config, accelerator="cpu")
    still = [key for key, value in classifier.model.named_parameters() if torch.equal(value, before[key])]
    assert not still
    assert classifier(torch.rand(1, 3, 32, 32)).shape == (1, 2)
