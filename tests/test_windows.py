"""Windows: the formula against measured gradients and perturbed pixels, on networks made by hand."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sightline.classifier import UnsuitedError, wrap
from sightline.cli._windows import command
from sightline.models import mini_resnet, mini_vit
from sightline.models._kernel_net import kernel_net
from sightline.windows import Window, measured_windows, window, window_in_cells

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
"""Torch's own, when it first differentiates forwards."""


class Stack(nn.Module):
    """Convolutions or poolings by (kind, kernel, stride, dilation), average pooling and a linear head."""

    def __init__(self, layers, width=6):
        super().__init__()
        channels = 3
        for number, (kind, kernel, stride, dilation) in enumerate(layers):
            padding = dilation * (kernel - 1) // 2
            if kind == "max":
                self.add_module(f"layer{number}", nn.MaxPool2d(kernel, stride, padding, dilation))
                continue
            convolution = nn.Conv2d(channels, width, kernel, stride, padding, dilation)
            self.add_module(f"layer{number}", nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)))
            channels = width
        self.count = len(layers)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        for number in range(self.count):
            x = self.get_submodule(f"layer{number}")(x)
        return self.head(x.mean((2, 3)))


def classifier_of(layers, size=(32, 40), seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Stack(layers)
        for one in model.modules():
            if isinstance(one, nn.BatchNorm2d):
                one.running_mean.uniform_(-0.2, 0.2)
                one.running_var.uniform_(0.5, 2)
    return wrap(model, normalization="none", size=size)


def formula(layers):
    return [(kernel, stride, dilation) for _, kernel, stride, dilation in layers]


CONV = "conv"
STACKS = {
    "plain": [(CONV, 3, 1, 1), (CONV, 3, 1, 1), (CONV, 5, 1, 1)],
    "points": [(CONV, 1, 1, 1), (CONV, 1, 1, 1)],
    "strided": [(CONV, 3, 2, 1), (CONV, 3, 1, 1), (CONV, 3, 2, 1)],
    "dilated": [(CONV, 3, 1, 2), (CONV, 3, 1, 2)],
    "pooled": [(CONV, 3, 1, 1), ("max", 2, 2, 1), (CONV, 3, 1, 1)],
}


@pytest.mark.parametrize(("kernel", "side"), [(1, 1), (3, 11), (5, 21), (7, 31)])
def test_five_equal_convolutions_have_the_windows_of_the_paper(kernel, side):
    assert window([(kernel, 1)] * 5) == window_in_cells([(kernel, 1)] * 5) == side
    for depth in range(6):
        assert window([(kernel, 1)] * depth) == 1 + depth * (kernel - 1)


@pytest.mark.parametrize("layers", STACKS.values(), ids=STACKS)
def test_the_formula_counts_the_pixels_under_the_kernels(layers):
    seen = {0}
    for kernel, stride, dilation in reversed(formula(layers)):
        seen = {cell * stride + dilation * tap for cell in seen for tap in range(kernel)}
    assert window(formula(layers)) == max(seen) - min(seen) + 1
    jump = 1
    for _, stride, _ in formula(layers):
        jump *= stride
    reached = [sum(0 <= pixel - cell * jump <= max(seen) for cell in range(-99, 99)) for pixel in range(jump)]
    assert window_in_cells(formula(layers)) == max(reached)


@pytest.mark.parametrize("layers", STACKS.values(), ids=STACKS)
def test_measured_windows_are_those_of_the_formula(layers):
    found = measured_windows(classifier_of(layers))
    kept = [number for number, one in enumerate(layers) if one[0] == CONV]
    assert [one.layer for one in found] == [f"layer{number}" for number in kept], "a pooling is not explained"
    for number, one in zip(kept, found, strict=True):
        numbers = formula(layers[: number + 1])
        strides = torch.tensor([stride for _, stride, _ in numbers]).prod().item()
        assert one.size == (32, 40)
        assert one.grid == (32 // strides, 40 // strides)
        assert one.pixels == (window(numbers),) * 2
        assert all(side in (window_in_cells(numbers) - 1, window_in_cells(numbers)) for side in one.cells)
        assert strides > 1 or one.cells == one.pixels


@pytest.mark.parametrize("name", ["strided", "dilated", "pooled"])
def test_perturbing_one_pixel_changes_the_cells_of_its_window_and_no_other(name):
    classifier = classifier_of(STACKS[name], size=(16, 24))
    found = measured_windows(classifier, tries=16)[-1]
    model = copy.deepcopy(classifier.model).double().eval()
    generator = torch.Generator().manual_seed(1)
    changed, share = torch.zeros(found.grid, dtype=torch.bool), torch.zeros(16, 24, dtype=torch.bool)

    def features(x):
        for number in range(model.count):
            x = model.get_submodule(f"layer{number}")(x)
        return x[0]

    with torch.no_grad():
        for _ in range(6):
            x = torch.rand(1, 3, 16, 24, generator=generator, dtype=torch.float64)
            base = features(x)
            for p in range(16):
                for q in range(24):
                    other = x.clone()
                    other[0, :, p, q] = torch.rand(3, generator=generator, dtype=torch.float64)
                    moved = (features(other) != base).any(0)
                    share[p, q] |= moved[found.grid[0] // 2, found.grid[1] // 2]
                    if (p, q) == (8, 12):
                        changed |= moved
    rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
    assert found.cells == (int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1)
    rows, columns = share.any(1).nonzero(), share.any(0).nonzero()
    assert found.pixels == (int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1)
    assert found.share == pytest.approx(100 * float(share.double().mean()))


def test_dilation_leaves_holes_in_the_share():
    found = measured_windows(classifier_of(STACKS["dilated"][:1]))[0]
    assert found.pixels == (5, 5)
    assert found.share == pytest.approx(100 * 9 / (32 * 40))


def test_more_tries_find_more_behind_max_pooling():
    layers = [("max", 4, 4, 1), (CONV, 1, 1, 1)]
    one, many = (measured_windows(classifier_of(layers), tries=n)[0] for n in (1, 64))
    assert one.share < many.share == pytest.approx(100 * 16 / (32 * 40))
    assert many.pixels == (4, 4)


def test_a_window_is_cut_off_at_the_border_of_the_image():
    found = measured_windows(classifier_of([(CONV, 15, 1, 1)] * 2, size=(16, 40)))[-1]
    assert found.pixels == (16, 29)
    assert not found.whole


def test_attention_and_squeezing_see_the_whole_image():
    with_tokens = {one.layer: one for one in measured_windows(mini_vit(7, dim=24, depth=2, size=32))}
    assert with_tokens["patch_embed"].pixels == (8, 8)
    assert with_tokens["blocks.0.norm1"].cells == (1, 1)
    last = with_tokens["blocks.1.norm1"]
    assert last == Window("blocks.1.norm1", (32, 32), (4, 4), (4, 4), (32, 32), 100.0)
    assert last.whole

    class Squeezed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3, padding=1)
            self.gate, self.head = nn.Conv2d(4, 4, 1), nn.Linear(4, 3)
            self.last = nn.Identity()

        def forward(self, x):
            a = self.stem(x)
            return self.head(self.last(a * self.gate(a.mean((2, 3), keepdim=True)).sigmoid()).mean((2, 3)))

    found = measured_windows(wrap(Squeezed(), layer="last", normalization="none", size=12))
    assert [(one.layer, one.whole) for one in found] == [("stem", False), ("last", True)]


@pytest.mark.parametrize("layers", STACKS.values(), ids=STACKS)
def test_the_formula_is_read_off_the_network(layers):
    found = measured_windows(classifier_of(layers), tries=2)
    kept = [number for number, one in enumerate(layers) if one[0] == CONV]
    for number, one in zip(kept, found, strict=True):
        assert one.formula == (window(formula(layers[: number + 1])),) * 2
        assert all(most >= seen for most, seen in zip(one.formula, one.pixels, strict=True))


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_a_kernel_net_has_the_windows_of_the_paper(kernel):
    found = measured_windows(kernel_net(kernel=kernel, channels=4, size=24), tries=3)
    assert [one.formula for one in found] == [(1 + depth * (kernel - 1),) * 2 for depth in range(1, 6)]
    assert all(one.pixels == one.formula for one in found)


class Written(nn.Module):
    """A network whose last layer reads what `body` makes of an image."""

    def __init__(self, body, width=4):
        super().__init__()
        self.body, self.last, self.head = body, nn.Identity(), nn.Linear(width, 3)

    def forward(self, x):
        return self.head(self.last(self.body(x)).mean((2, 3)))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.a, self.b = function, nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.function(self, x)


def written(*modules):
    model = Written(nn.Sequential(*(Function(one) if not isinstance(one, nn.Module) else one for one in modules)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for one in model.modules():
            if isinstance(one, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                one.reset_parameters()
    return measured_windows(wrap(model, layer="last", normalization="none", size=(32, 40)), layers=["last"])[0]


CHAINS = {
    "flat": ((nn.Conv2d(3, 4, (3, 5), padding=(1, 2)), nn.ELU(), nn.Conv2d(4, 4, (1, 3), padding=(0, 1))), (3, 7)),
    "average": ((nn.Conv2d(3, 4, 3, padding=1), nn.AvgPool2d(2), nn.Conv2d(4, 4, 3, padding=1)), (8, 8)),
    "functional": ((lambda m, x: F.max_pool2d(m.a(x).relu_(), 3, 2, 1), nn.GELU()), (5, 5)),
    "plain average": ((lambda m, x: F.avg_pool2d(m.b(2 * m.a(x) - 1), 3),), (7, 7)),
    "depthwise": ((nn.Conv2d(3, 4, 1), nn.ZeroPad2d(2), nn.Conv2d(4, 4, 5, groups=4), nn.SiLU(), nn.Dropout()), (5, 5)),
}


@pytest.mark.parametrize(("modules", "sides"), CHAINS.values(), ids=CHAINS)
def test_a_chain_may_be_written_in_any_way(modules, sides):
    found = written(*modules)
    assert found.formula == sides
    assert all(most >= seen for most, seen in zip(sides, found.pixels, strict=True))
    assert found.pixels == sides


BRANCHES = {
    "residual": (lambda m, x: m.a(x) + m.b(m.a(x)), (5, 5)),
    "joined": (lambda m, x: m.b(torch.cat([m.a(x)[:, :2], m.a(x)[:, 2:]], 1)), (5, 5)),
    "split": (lambda m, x: m.b(torch.cat(m.a(x).split(2, 1)[::-1], 1)), (5, 5)),
    "gated": (lambda m, x: m.a(x) * m.b(m.a(x)).sigmoid(), (5, 5)),
    "squared": (lambda m, x: m.a(x) * m.a(x), (3, 3)),
    "pooled": (lambda m, x: m.a(x) + F.max_pool2d(m.b(m.a(x)), 3, 1, 1), (7, 7)),
    "projected": (lambda m, x: F.max_pool2d(m.a(x), 2) + F.avg_pool2d(m.b(m.a(x)), 3, 2, 1), (7, 7)),
    "to the right": (lambda m, x: m.a(x) + m.b(F.pad(m.a(x), (4, -4, 0, 0))), (5, 8)),
}


@pytest.mark.parametrize(("module", "sides"), BRANCHES.values(), ids=BRANCHES)
def test_branches_see_what_any_of_them_sees(module, sides):
    found = written(module)
    assert found.formula == found.pixels == sides


@pytest.mark.parametrize("width", [4, 8])
def test_the_formula_of_a_residual_network_is_that_of_its_longest_path(width):
    model = mini_resnet(5, widths=(width,) * 4, size=96)
    found = {one.layer: one for one in measured_windows(model, tries=3)}
    side, jump = 1, 1
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        assert found[stage].formula is not None
        assert all(most >= seen for most, seen in zip(found[stage].formula, found[stage].pixels, strict=True))
    for name, module in model.model.named_modules():
        if isinstance(module, nn.Conv2d) and "down" not in name and "short" not in name and "skip" not in name:
            side += (module.kernel_size[0] - 1) * jump
            jump *= module.stride[0]
    assert found["layer4"].formula == (side, side)


WHOLE = {
    "squeezed": lambda m, x: m.a(x) - m.a(x).mean((2, 3), keepdim=True),
    "one cell": lambda m, x: m.a(x) * F.conv2d(m.a(x), torch.ones(4, 4, 32, 40, dtype=x.dtype) / 1e3).sigmoid(),
    "cut": lambda m, x: m.b(F.pad(m.a(x), (4, 0, 0, 0)))[:, :, :, 4:],
    "resized": lambda m, x: F.interpolate(m.a(x), scale_factor=0.5),
    "turned": lambda m, x: m.a(x).flip(2),
    "global": lambda m, x: F.adaptive_avg_pool2d(m.a(x), 4),
    "of this image": nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4, track_running_stats=False)),
    "layers": nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(1, 4)),
    "transposed": nn.ConvTranspose2d(3, 4, 3, padding=1),
}


@pytest.mark.parametrize("module", WHOLE.values(), ids=WHOLE)
def test_what_moves_cells_or_sees_all_has_no_formula(module):
    assert written(module).formula is None


def test_layers_may_be_named_and_the_explained_one_is_always_there():
    classifier = mini_resnet(7, widths=(4, 4, 6, 8), size=48, layer="layer2.conv2")
    assert [one.layer for one in measured_windows(classifier, tries=2)] == [
        "stem", "layer1", "layer2", "layer3", "layer4", "layer2.conv2",
    ]  # fmt: skip
    assert [one.layer for one in measured_windows(classifier, layers=["layer3", "stem.0"], tries=2)] == [
        "layer3",
        "stem.0",
    ]


def test_the_network_and_the_random_state_are_as_before_and_the_seed_decides():
    classifier = classifier_of(STACKS["pooled"])
    classifier.model.train()
    weights = copy.deepcopy(classifier.model.state_dict())
    state = torch.get_rng_state()
    assert measured_windows(classifier, seed=3) == measured_windows(classifier, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert classifier.model.training
    for name, value in classifier.model.state_dict().items():
        assert value.dtype == weights[name].dtype
        assert torch.equal(value, weights[name])
    assert not any(module._forward_hooks for module in classifier.model.modules())


class Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def test_errors_teach():
    classifier = classifier_of(STACKS["plain"])
    with pytest.raises(ValueError, match="expected at least one try, got 0"):
        measured_windows(classifier, tries=0)
    with pytest.raises(LookupError, match="no layer called 'layr1'"):
        measured_windows(classifier, layers=["layr1"])
    for wrong in ((3,), (3, 1, 1, 1), (0, 1), (3, 0)):
        with pytest.raises(ValueError, match=r"expected layers as \(kernel, stride\) or"):
            window([(3, 1), wrong])

    class Closed(Stack):
        def forward(self, x):
            return super().forward(Opaque.apply(x))

    with pytest.raises(UnsuitedError, match="Closed has an operation that torch cannot differentiate forwards"):
        measured_windows(wrap(Closed(STACKS["plain"]), normalization="none", size=24))


def test_the_command_prints_a_line_a_layer(capsys):
    model = "mini_resnet?widths=[4,4,6,8]"
    command(["--model", model, "--layer", "layer2", "--layer", "layer4", "--tries", "12"], standalone_mode=False)
    told = capsys.readouterr().out
    assert "layer2" in told
    assert "23 x 23" in told
    assert "whole" in told
    assert "stem" not in told
    lines = [line.split() for line in told.splitlines()]
    assert [line[-5:-1] for line in lines if line[:1] == ["layer2"]] == [["23", "x", "23", "12.9"]]
    command(["--model", "kernel_net?size=24&channels=4", "--layer", "layer2", "--tries", "3"], standalone_mode=False)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("layer2"))
    assert line.count("5 x 5") == 3
