"""Names: ours first, then entry points; what is near an unknown one."""

from importlib.metadata import EntryPoint

import pytest

from sightline import registry
from sightline.registry import find, load, unknown


@pytest.fixture
def plugins(monkeypatch):
    asked = []

    def install(**references):
        def entry_points(*, group):
            asked.append(group)
            return [EntryPoint(name, value, group) for name, value in references.items()]

        monkeypatch.setattr(registry, "entry_points", entry_points)
        return asked

    return install


def test_ours_come_first_and_need_no_entry_points(plugins):
    asked = plugins(left="math:sqrt")
    assert find("left", {"left": 1, "right": 2}, "sides") == 1
    assert asked == []


def test_entry_points_of_installed_packages(plugins):
    import math

    asked = plugins(root="math:sqrt")
    assert find("root", {"left": 1}, "sides") is math.sqrt
    assert asked == ["sightline.sides"]


def test_installed_entry_points_are_read():
    with pytest.raises(LookupError, match="no method called 'grad_cma'; did you mean grad_cam"):
        find("grad_cma", {"grad_cam": 1}, "methods")


def test_unknown_names_the_nearest_of_ours_and_theirs(plugins):
    plugins(rightmost="math:sqrt")
    with pytest.raises(LookupError) as caught:
        find("rigth", {"left": 1, "right": 2}, "sides")
    assert str(caught.value) == "no side called 'rigth'; did you mean right or rightmost?"


def test_nothing_near_lists_all():
    assert unknown("zzz", ["b", "a"], "side") == "no side called 'zzz'; known: a, b"


@pytest.mark.parametrize(
    ("reference", "reason"),
    [("nowhere_to_be_found:x", "No module named 'nowhere_to_be_found'"), ("math:sqroot", "sqroot")],
)
def test_a_broken_plugin_is_named(plugins, reference, reason):
    plugins(mine=reference)
    with pytest.raises(LookupError, match=f"cannot load '{reference}', which 'mine' stands for: .*{reason}"):
        find("mine", {}, "methods")


def test_load():
    import math

    assert load("math:sqrt") is math.sqrt


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("nowhere_to_be_found:x", "No module named 'nowhere_to_be_found'"),
        ("math:sqroot", "has no attribute 'sqroot'"),
        ("math", ""),
        ("math:", ""),
        (":sqrt", ""),
        ("", ""),
        (".math:sqrt", ""),
    ],
)
def test_load_says_what_it_expects(reference, reason):
    with pytest.raises(LookupError) as caught:
        load(reference)
    assert str(caught.value).startswith(f"cannot load {reference!r}")
    assert reason in str(caught.value)
    assert str(caught.value).endswith("expected package.module:name")
