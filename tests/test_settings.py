"""Plain data bound to functions: near names, choices and kinds, scores and erasers by name."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
import torch
from torch import nn

from sightline.classifier import SCORES, probability
from sightline.erase import blur
from sightline.methods import METHODS, edge, gradient, mean, smooth
from sightline.metrics import METRICS
from sightline.protocols import segmentation
from sightline.runs import Choice, arguments
from sightline.settings import bind, method_of, signed

if TYPE_CHECKING:
    from decimal import Decimal


def sample(
    x,
    /,
    *,
    steps: int = 10,
    rate: float = 0.1,
    keep: bool = False,
    name: str = "a",
    mode: Literal["fast", "exact"] = "fast",
    corners: Literal[4, 8] = 4,
    limit: float | None = None,
    either: Literal["all"] | int = "all",
    size: int | tuple[int, int] = 64,
    layers: Sequence[str] = (),
    call: Callable[[int], int] = abs,
    table: Mapping[int, int] | Callable[[int], int] = abs,
    root: str | Path = ".",
    free=None,
    any_kind: Any = None,
):
    return locals()


def test_settings_reach_the_function():
    bound = bind(sample, {"steps": 5, "mode": "exact"})
    assert bound(1) == sample(1, steps=5, mode="exact")
    assert bind(sample, {}) is sample


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("steps", -3),
        ("rate", 0.5),
        ("rate", 1),
        ("keep", True),
        ("name", "b"),
        ("mode", "exact"),
        ("corners", 8),
        ("limit", None),
        ("limit", 2),
        ("either", "all"),
        ("either", 7),
        ("size", 32),
        ("size", [32, 48]),
        ("size", (32, 48)),
        ("layers", ["a", "b"]),
        ("call", len),
        ("table", {1: 2}),
        ("table", len),
        ("root", "here"),
        ("root", Path("here")),
        ("free", object),
        ("any_kind", {"a": 1}),
    ],
)
def test_values_that_fit(setting, value):
    assert bind(sample, {setting: value})(0)[setting] == value


@pytest.mark.parametrize(("setting", "kind"), [("rate", float), ("limit", float), ("steps", int), ("size", int)])
def test_whole_numbers_become_fractions_where_those_are_meant(setting, kind):
    assert type(bind(sample, {setting: 2})(0)[setting]) is kind


@pytest.mark.parametrize("setting", ["name", "root"])
def test_whole_numbers_become_text_where_that_is_meant(setting):
    assert bind(sample, {setting: 2007})(0)[setting] == "2007"


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("steps", 5.0, "a whole number, got 5.0"),
        ("steps", "5", "a whole number, got '5'"),
        ("steps", True, "a whole number, got True"),
        ("steps", None, "a whole number, got None"),
        ("rate", "0.5", "a number, got '0.5'"),
        ("rate", False, "a number, got False"),
        ("keep", 1, "true or false, got 1"),
        ("keep", "true", "true or false, got 'true'"),
        ("name", 0.3, "text, got 0.3"),
        ("name", False, "text, got False"),
        ("mode", 1, "'fast' or 'exact', got 1"),
        ("corners", "4", "4 or 8, got '4'"),
        ("corners", True, "4 or 8, got True"),
        ("limit", "no", "a number or None, got 'no'"),
        ("either", 2.5, "'all' or a whole number, got 2.5"),
        ("size", "32", "a whole number or a list, got '32'"),
        ("layers", "stem", "a list, got 'stem'"),
        ("call", "abs", "a function, got 'abs'"),
        ("table", "{}", "a table or a function, got '{}'"),
    ],
)
def test_values_of_another_kind(setting, value, expected):
    with pytest.raises(TypeError) as caught:
        bind(sample, {setting: value})
    assert str(caught.value) == f"sample: {setting}: expected {expected}"


def test_unknown_setting_names_the_near_ones():
    with pytest.raises(LookupError, match="sample: no setting called 'step'; did you mean steps"):
        bind(sample, {"step": 5})
    with pytest.raises(LookupError, match=r"sample: no setting called 'x'; known: .*steps"):
        bind(sample, {"x": 5})
    with pytest.raises(LookupError, match="opti_cam: no setting called 'stpes'; did you mean steps"):
        bind(METHODS["opti_cam"].method, {"stpes": 5})


def test_a_setting_that_left_its_choice_is_told_how_to_go_back():
    asked = Choice.parse("segmentation?resolve=smooth?size=3&sigma=0.6")
    with pytest.raises(LookupError) as caught:
        bind(segmentation, asked.settings)
    assert str(caught.value).endswith("; if it belongs to smooth, write resolve=(smooth?size=3&sigma=0.6)")
    asked = Choice.parse("segmentation?resolve=superpixel?scale=3&renormalize=true")
    with pytest.raises(LookupError, match=r"write resolve=\(superpixel\?scale=3&renormalize=true\)"):
        bind(segmentation, asked.settings)
    bound = Choice.parse("segmentation?resolve=(smooth?size=3&sigma=0.6)").settings
    assert bind(segmentation, bound)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("mode", "exacct", "sample: mode: no choice called 'exacct'; did you mean exact?"),
        ("corners", 5, "sample: corners: no choice called '5'; known: 4, 8"),
        ("either", "none", "sample: either: no choice called 'none'; known: all"),
    ],
)
def test_unknown_choice_names_the_near_ones(setting, value, message):
    with pytest.raises(LookupError) as caught:
        bind(sample, {setting: value})
    assert str(caught.value) == message


def test_score_by_name():
    grad_cam = METHODS["grad_cam"].method
    assert bind(grad_cam, {"score": "probability"}).keywords == {"score": probability}
    assert arguments(bind(grad_cam, {"score": "sigmoid"})) == {"score": "sigmoid"}
    with pytest.raises(LookupError, match="no score called 'probabilty'; did you mean probability"):
        bind(grad_cam, {"score": "probabilty"})
    with pytest.raises(TypeError, match="grad_cam: score: expected a function, got 5"):
        bind(grad_cam, {"score": 5})
    assert set(SCORES) == {"logit", "log_probability", "probability", "sigmoid"}


def test_erase_by_name_or_table():
    drop = METRICS["average_drop"].metric
    assert bind(drop, {"erase": "mean"}).keywords == {"erase": "mean"}
    assert bind(drop, {"erase": {"name": "rise"}}).keywords == {"erase": "rise"}
    table = {"name": "blur", "sigma": 2.0, "padding": "zeros"}
    erase = bind(drop, {"erase": table}).keywords["erase"]
    x = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(erase(x, x[:, :1]), blur(x, x[:, :1], sigma=2.0, padding="zeros"))
    assert table["name"] == "blur", "the table is left as it was"
    assert bind(drop, {"erase": blur}).keywords == {"erase": blur}


@pytest.mark.parametrize(
    ("erase", "error", "message"),
    [
        ("blakc", LookupError, "no eraser called 'blakc'; did you mean black"),
        ({"name": "blurr", "sigma": 2}, LookupError, "no eraser called 'blurr'; did you mean blur"),
        ({"name": "blur", "sigmma": 2}, LookupError, "blur: no setting called 'sigmma'; did you mean sigma"),
        ({"name": "blur", "sigma": "2"}, TypeError, "blur: sigma: expected a number, got '2'"),
        ({"name": "blur", "padding": "zero"}, LookupError, "padding: no choice called 'zero'; did you mean zeros"),
        ({"sigma": 2}, ValueError, "expected a table with a name, got {'sigma': 2}"),
        (5, LookupError, "no eraser called '5'"),
        (0.5, TypeError, "average_drop: erase: expected text or a function, got 0.5"),
    ],
)
def test_wrong_erasers(erase, error, message):
    with pytest.raises(error, match=message):
        bind(METRICS["average_drop"].metric, {"erase": erase})


def test_a_partial_is_bound_further():
    once = partial(sample, steps=3)
    twice = bind(once, {"steps": 4, "rate": 2})
    assert twice(0) == sample(0, steps=4, rate=2)
    with pytest.raises(LookupError, match="sample: no setting called 'stesp'"):
        bind(once, {"stesp": 3})
    with pytest.raises(TypeError, match="sample: rate: expected a number, got 'x'"):
        bind(once, {"rate": "x"})


class Trained(nn.Module):
    def forward(self, x):
        return x


class Object:
    def __call__(self, x, *, steps: int = 3):
        return x * steps


def relayed(x, **settings):
    return settings


def hidden(x, *, level: "Decimal | None" = None, steps: int = 1):
    return level, steps


def test_functions_that_are_not_ours():
    assert bind(Object(), {"steps": 2})(5) == 10
    with pytest.raises(LookupError, match="Object: no setting called 'stop'; did you mean steps"):
        bind(Object(), {"stop": 2})
    assert bind(relayed, {"anything": 2})(5) == {"anything": 2}
    assert bind(hidden, {"level": 2})(5) == (2, 1), "names for type checkers only cannot be read"
    module = Trained()
    assert bind(module, {}) is module


def test_numbers_are_no_scores_by_accident():
    for name in ("average_drop", "average_increase", "average_gain", "insertion", "deletion"):
        entry = METRICS[name]
        with pytest.raises(LookupError, match=f"{name}: scored: no choice called 'labl'; did you mean label"):
            bind(entry.metric, {"scored": "labl"})


def test_a_method_has_its_settings_and_a_seed_where_it_draws():
    method = method_of(Choice("opti_cam", {"steps": 3}), seed=4)
    assert arguments(method)["steps"] == 3
    assert arguments(method_of(Choice("rise"), seed=4))["seed"] == 4
    assert arguments(method_of(Choice("rise", {"seed": 5}), seed=4))["seed"] == 5


def test_methods_are_combined_by_name(pooled, x):
    text = "mean(smooth(gradient?score=probability)?samples=2&noise=0.5, edge)"
    method = method_of(Choice.parse(text), seed=7)
    by_hand = mean(smooth(partial(gradient, score=probability), samples=2, noise=0.5, seed=7), edge)
    assert torch.equal(method(pooled, x), by_hand(pooled, x))
    assert arguments(method) == arguments(by_hand)
    assert "seed=7" in str(arguments(method))


def test_combined_maps_are_signed_where_a_method_inside_is_or_the_combinator_makes_them_so():
    for text in (
        "cam",
        "smooth(cam)",
        "mean(grad_cam, cam)",
        "contrast(grad_cam)?against=1",
        "smooth(contrast(edge)?against=1)",
    ):
        assert signed(method_of(Choice.parse(text))), text
    for text in ("grad_cam", "smooth(gradient)", "mean(grad_cam, edge)"):
        assert not signed(method_of(Choice.parse(text))), text
    assert signed(METHODS["cam"].method)
    assert not signed(lambda classifier, x, y=None: x)


def test_classes_as_keys_of_a_table_are_numbers():
    method = method_of(Choice("over(grad_cam)", {"classes": {"0": [1, 2], "3": [4]}}))
    assert arguments(method)["classes"] == {"0": [1, 2], "3": [4]}
    assert method.keywords["classes"] == {0: [1, 2], 3: [4]}


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("smooth", LookupError, r"smooth makes a method of others; write smooth\(grad_cam\), say"),
        ("smoth(gradient)", LookupError, "no combinator called 'smoth'; did you mean smooth"),
        ("smooth(gradent)", LookupError, "no method called 'gradent'; did you mean gradient"),
        ("smooth(gradient", ValueError, r"expected combinator\(method, ...\), got 'smooth\(gradient'"),
        ("smooth(gradient, cam)", ValueError, "smooth takes one method, got 'gradient, cam'"),
        ("mean()", ValueError, r"mean takes methods, got '' in 'mean\(\)'"),
        ("grad_cam(gradient)", LookupError, r"grad_cam is a method and takes no other; .*: grad_cam\?key=value"),
        ("smooth(gradient)?smples=3", LookupError, "smooth: no setting called 'smples'; did you mean samples"),
        ("contrast(cam)", ValueError, r"contrast needs against=; write contrast\(cam\)\?against=..."),
    ],
)
def test_what_is_wrong_with_a_combination_is_said(text, error, message):
    with pytest.raises(error, match=message):
        method_of(Choice.parse(text))
