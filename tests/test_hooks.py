from collections import OrderedDict, namedtuple
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sightline.hooks import (
    capture,
    cut,
    differentiable,
    edit,
    first,
    frozen,
    name_of,
    put_first,
    seen,
    submodule,
    substituted,
)


class Repeated(nn.Module):
    """Calls one module twice, and changes a layer's output in place behind it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.conv(self.relu(self.conv(x)) - 0.1)).sum((2, 3))


@pytest.fixture
def repeated(seeded):
    return seeded(Repeated, seed=4)


@pytest.fixture
def image():
    return torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_submodule_by_dotted_name_and_by_a_second_name(pooled):
    model = pooled.model
    model.other = model.last[1]
    assert submodule(model, "last.1") is submodule(model, "other") is model.last[1]
    assert name_of(model, model.other) == "last.1"


@pytest.mark.parametrize(
    ("name", "near"), [("lats", "did you mean last"), ("", "known: drop, head"), ("zzz", "known:")]
)
def test_an_unknown_layer_names_its_neighbors(pooled, name, near):
    with pytest.raises(LookupError, match=f"no layer called '{name}'; {near}"):
        submodule(pooled.model, name)


def test_a_module_of_another_network_is_an_error(pooled, networks):
    with pytest.raises(LookupError, match="Sequential is not inside Pooled; give a module of this very model"):
        name_of(pooled.model, networks.pooled().last)


def test_frozen_evaluates_and_gives_every_flag_back(pooled):
    model = pooled.model
    model.requires_grad_(True).train()
    model.last.eval()
    model.stem[0].weight.requires_grad_(False)
    modes, grads = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    assert True in modes
    assert False in modes
    with frozen(model), frozen(model):
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
    assert modes == [m.training for m in model.modules()]
    assert grads == [p.requires_grad for p in model.parameters()]
    with pytest.raises(KeyError), frozen(model):
        raise KeyError
    assert modes == [m.training for m in model.modules()]
    assert grads == [p.requires_grad for p in model.parameters()]


def test_captured_features_are_those_before_an_in_place_relu(repeated, image):
    with capture(repeated, ["conv", "relu"]) as found:
        repeated(image)
    second = repeated.conv(repeated.conv(image).relu() - 0.1)
    assert (second < 0).any()
    assert torch.equal(found["conv"], second)
    assert torch.equal(found["relu"], second.relu())


def test_cut_makes_a_leaf_of_each_call_and_the_last_one_counts(repeated, image):
    with cut(repeated, "conv") as leaves:
        output = repeated(image.requires_grad_())
    assert [leaf.is_leaf and leaf.requires_grad for leaf in leaves] == [True, True]
    (gradient,) = torch.autograd.grad(output.sum(), leaves[1], retain_graph=True)
    assert torch.equal(gradient, (leaves[1] > 0).double())
    reached = torch.autograd.grad(output.sum(), [leaves[0], image], allow_unused=True)
    assert reached == (None, None)


def test_edit_replaces_an_output_and_only_while_inside(repeated, image):
    before = repeated(image)
    with edit(repeated, "conv", torch.zeros_like):
        assert torch.equal(repeated(image), torch.zeros_like(before))
    assert torch.equal(repeated(image), before)


def test_hooks_are_gone_after_an_error(repeated, trace, plain):
    changed = trace(repeated)
    for look_inside in (
        capture(repeated, ["conv", "relu"]),
        cut(repeated, "conv"),
        edit(repeated, "conv", lambda a: a),
        seen(repeated, torch.zeros(1, 7, 5, 6, dtype=torch.float64), torch.clone),
    ):
        with pytest.raises(RuntimeError), look_inside:
            repeated(torch.zeros(1, 7, 5, 6, dtype=torch.float64))
    with pytest.raises(LookupError), capture(repeated, ["conv", "nothing"]):
        pass
    assert changed() == []


@contextmanager
def heard(module):
    handle = module.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
    yield
    handle.remove()


@contextmanager
def training(module):
    module.train()
    yield
    module.eval()


@pytest.mark.parametrize(
    "change",
    [
        lambda net: edit(net, "conv", torch.zeros_like),
        lambda net: heard(net.conv),
        lambda net: training(net.relu),
        lambda net: substituted({F.relu: lambda z, inplace=False: -z}),
        lambda net: torch.autocast("cpu"),
    ],
    ids=["hook", "pre-hook", "training", "substituted", "autocast"],
)
def test_a_pass_that_somebody_changes_is_not_seen(repeated, image, change):
    with seen(repeated.eval(), image, torch.clone) as found:
        with change(repeated):
            repeated(image)
        assert found == []
        expected = repeated(image)
    assert torch.equal(found[0], expected)


def test_what_a_network_gives_for_another_input_is_not_seen(repeated):
    ones = torch.ones(2, 3, 5, 6, dtype=torch.float64)
    with seen(repeated.eval(), ones, torch.clone) as found:
        repeated(ones + 1)
        repeated(ones[:1])
        repeated.float()(ones.float())
        assert found == []


def test_the_first_pass_is_seen_as_it_was_without_its_graph(repeated, image):
    with seen(repeated.eval(), image, lambda output: 2 * output) as found:
        output = repeated(image)
        kept = output.detach().clone()
        output.detach().zero_()
        repeated(image)
    repeated(image)
    assert len(found) == 1
    assert torch.equal(found[0], 2 * kept)
    assert not found[0].requires_grad


def test_a_scripted_network_shows_nothing(repeated, image):
    scripted = torch.jit.script(repeated.eval())
    with seen(scripted, image, torch.clone) as found:
        scripted(image)
    assert found == []


def test_differentiable_wins_over_the_caller():
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            with differentiable():
                leaf = torch.ones(2).requires_grad_()
                assert torch.autograd.grad((leaf**2).sum(), leaf)[0].tolist() == [2, 2]
            assert not torch.is_grad_enabled()


Pair = namedtuple("Pair", ["a", "b"])


@pytest.mark.parametrize(
    "make",
    [
        lambda t: (t, "rest"),
        lambda t: [t, "rest"],
        lambda t: Pair("before", t),
        lambda t: {"mask": None, "hidden": t},
        lambda t: OrderedDict(mask=None, hidden=t),
    ],
    ids=["tuple", "list", "namedtuple", "dict", "OrderedDict"],
)
def test_the_first_tensor_of_an_output_is_read_and_replaced(make):
    old, new = torch.zeros(1), torch.ones(1)
    output = make(old)
    assert first(output) is old
    changed = put_first(output, new)
    assert type(changed) is type(output)
    assert first(changed) is new
    assert first(output) is old
    assert str(changed) == str(output).replace("0.", "1.")


def test_an_output_without_a_tensor_has_none():
    assert first("text") is None
    assert first({"a": 1}) is None
    assert first((None, [torch.ones(1)])) is None


def test_a_layer_inside_a_tuple_is_captured_and_cut(tokens, x):
    name = "attention"
    with capture(tokens.model, [name]) as found, cut(tokens.model, name) as leaves:
        output = tokens.model(x)
    assert torch.equal(found[name], leaves[0].detach())
    assert torch.autograd.grad(output.sum(), leaves[0])[0].abs().sum() > 0


def test_substituted_functions_are_called_for_modules_and_by_hand():
    def spy(function):
        def call(*args, **kwargs):
            calls.append(function)
            return function(*args, **kwargs)

        return call

    calls = []
    model = nn.Sequential(nn.ReLU(inplace=True), nn.ReLU())
    x = torch.linspace(-1, 1, 5)
    with substituted({F.relu: spy(F.relu), torch.tanh: lambda a: a + 1}):
        assert torch.equal(model(x.clone()), x.relu())
        assert torch.equal(torch.tanh(x), x + 1)
    assert calls == [F.relu, F.relu]
    assert torch.equal(torch.tanh(x), x.tanh())


def test_substitution_ends_with_an_error():
    with pytest.raises(ZeroDivisionError), substituted({torch.tanh: lambda a: 1 / 0}):
        torch.tanh(torch.ones(1))
    assert torch.tanh(torch.zeros(1)) == 0
