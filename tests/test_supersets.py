"""Supersets: hierarchies, the list that the paper prints, levels, names, and maps over them."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline import supersets
from sightline.datasets import creatures
from sightline.datasets._pets import BREEDS, CATS
from sightline.methods import cam, grad_cam, over
from sightline.runs import Choice, arguments
from sightline.settings import method_of
from sightline.supersets import (
    Hierarchy,
    Listed,
    Partition,
    Superset,
    hierarchy_of,
    imagenet,
    levels,
    members,
    partition,
    printed,
)

ANIMALS = {
    "animal": "entity",
    "thing": "entity",
    "hoofed": "animal",
    "swine": "hoofed",
    "bovid": "hoofed",
    "boar": "swine",
    "hog": "swine",
    "ox": "bovid",
    "horse": "hoofed",
    "car": "thing",
    "truck": "thing",
    "minivan": ["truck", "car"],
    "jeep": "car",
    "robot": ["thing", "animal"],
    "kite": "thing",
}
LEAVES = ("boar", "hog", "ox", "horse", "minivan", "jeep", "robot", "kite")


@pytest.fixture(scope="module")
def animals():
    return Hierarchy.of(ANIMALS)


def slow_lineages(parents, node):
    """Every path from a node up to a root."""
    above = parents.get(node, ())
    above = [above] if isinstance(above, str) else above
    return [[node, *path] for one in above for path in slow_lineages(parents, one)] or [[node]]


# Hierarchies


def test_depth_is_the_shortest_path_from_the_root():
    hierarchy = Hierarchy.of({"b": "a", "c": "b", "d": ["c", "a"], "e": "d"})
    assert hierarchy.depth == {"a": 0, "b": 1, "c": 2, "d": 1, "e": 2}
    assert hierarchy.path("e") == ("e", "d", "a")
    assert hierarchy.ancestors("e") == ("d", "c", "a", "b")


def test_leaves_have_nothing_below_them_and_a_leaf_is_its_own(animals):
    assert animals.leaves("hoofed") == ("horse", "boar", "hog", "ox")
    assert set(animals.leaves("entity")) == set(LEAVES)
    assert animals.leaves("kite") == ("kite",)


def test_of_equally_near_parents_the_first_is_on_the_path(animals):
    assert animals.path("minivan") == ("minivan", "truck", "thing", "entity")
    assert Hierarchy.of({**ANIMALS, "minivan": ["car", "truck"]}).path("minivan")[1] == "car"


@st.composite
def relations(draw):
    """A relation without a circle: parents have lower numbers."""
    count = draw(st.integers(2, 9))
    rows = [draw(st.lists(st.integers(0, i - 1), max_size=3, unique=True)) for i in range(1, count)]
    return {str(i): [str(one) for one in row] for i, row in enumerate(rows, 1)} | {"0": []}


@settings(max_examples=40, deadline=None)
@given(relations())
def test_depth_path_and_ancestors_are_those_of_all_paths(parents):
    hierarchy = Hierarchy.of(parents)
    for node in hierarchy.depth:
        paths = slow_lineages(parents, node)
        assert hierarchy.depth[node] == min(map(len, paths)) - 1
        assert list(hierarchy.path(node)) in [path for path in paths if len(path) == min(map(len, paths))]
        assert set(hierarchy.ancestors(node)) == {one for path in paths for one in path[1:]}
        below = {one for one in hierarchy.depth if any(node in path for path in slow_lineages(parents, one))}
        tops = {one for several in parents.values() for one in several}
        assert set(hierarchy.leaves(node)) == below - tops


def test_a_circle_is_named():
    with pytest.raises(ValueError, match=r"a circle, each a kind of the next: (a -> b -> c -> a|b -> c|c -> a)"):
        Hierarchy.of({"a": "b", "b": "c", "c": "a", "d": "a"})
    with pytest.raises(ValueError, match=r"circle, .*: a -> a"):
        Hierarchy.of({"a": "a"})


def test_an_is_a_file_has_the_parent_first(tmp_path):
    path = tmp_path / "wordnet.is_a.txt"
    path.write_text("n1 n2\n\nn1 n3\nn3 n4\nn2 n4\nn2 n4\n")
    assert Hierarchy.read(path) == Hierarchy.of({"n2": "n1", "n3": "n1", "n4": ["n3", "n2"]})


def test_names_with_spaces_are_parted_by_a_tab(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("body plan\tcommon pip\n")
    assert Hierarchy.read(path).parents == {"common pip": ("body plan",)}


def test_a_json_file_says_the_same(tmp_path, animals):
    path = tmp_path / "is_a.json"
    path.write_text(json.dumps(ANIMALS))
    assert Hierarchy.read(path) == animals
    assert hierarchy_of(str(path), LEAVES) == hierarchy_of(ANIMALS, LEAVES) == hierarchy_of(animals, LEAVES) == animals


@pytest.mark.parametrize("line", ["n3", "n3 n4 n5", "n3\t", "a\tb\tc"])
def test_a_malformed_line_is_named_by_its_number(tmp_path, line):
    path = tmp_path / "is_a.txt"
    path.write_text(f"n1 n2\n\n{line}\n")
    with pytest.raises(ValueError, match=r"is_a.txt, line 3: expected 'parent child', got 'n3|line 3: .*got 'a"):
        Hierarchy.read(path)


def test_what_is_wrong_with_a_hierarchy_is_said(tmp_path, plain, animals):
    broken, listed, binary = (tmp_path / name for name in ("broken.json", "list.json", "binary.txt"))
    broken.write_text("{")
    listed.write_text("[1]")
    binary.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"broken.json is not JSON"):
        Hierarchy.read(broken)
    with pytest.raises(ValueError, match=r"list.json: expected a table \{name: ...\}, got a list"):
        Hierarchy.read(listed)
    with pytest.raises(ValueError, match=r"binary.txt is not text in UTF-8"):
        Hierarchy.read(binary)
    with pytest.raises(TypeError, match="expected the parent of 'a', a name or a list of names, got 3"):
        Hierarchy.of({"a": 3})
    with pytest.raises(TypeError, match=r"expected the parent of 'a'.*got \['b', 3\]"):
        Hierarchy.of({"a": ["b", 3]})
    with pytest.raises(LookupError, match="no node of the hierarchy called 'bovids'; did you mean bovid"):
        animals.ancestors("bovids")
    with pytest.raises(LookupError, match=r"no node of the hierarchy called 'cat'; its 3001 are such as 'n0'$"):
        Hierarchy.of({f"n{i}": "n0" for i in range(1, 3001)}).known("cat")
    with pytest.raises(LookupError, match=r"no hierarchy called 'petz'; did you mean pets.*or give the path of a file"):
        hierarchy_of("petz", LEAVES)
    with pytest.raises(FileNotFoundError, match=r"no file missing.txt; expected creatures or pets, or the path"):
        hierarchy_of("missing.txt", LEAVES)


# Partitions


LIST = (
    Listed("swine", "swine", 3),
    Listed("hoofed", "ungulate", 4),
    Listed("bovid", "bovid", 1),
    Listed("car", "car", 3),
    Listed("truck", "truck", 1),
    Listed("car", "automobile", 5),
)


@pytest.fixture(scope="module")
def parts(animals):
    return partition(animals, LIST, LEAVES)


def test_a_class_goes_to_the_entry_closest_to_the_root_and_of_equal_ones_to_the_first(parts):
    """Swine and bovid lie inside the hoofed; the minivan is below car and truck, both two steps from the root."""
    assert [(one.label, one.classes) for one in parts.supersets] == [
        ("ungulate hoofed", ("boar", "hog", "ox", "horse")),
        ("car", ("minivan", "jeep")),
        ("robot", ("robot",)),
        ("kite", ("kite",)),
    ]
    assert parts.members == {
        **dict.fromkeys(range(4), (0, 1, 2, 3)),
        **dict.fromkeys((4, 5), (4, 5)),
        6: (6,),
        7: (7,),
    }


def test_the_order_of_the_list_decides_between_equally_close_entries(animals):
    found = partition(animals, (Listed("truck"), Listed("car")), LEAVES)
    assert [one.classes for one in found.supersets[:2]] == [("minivan",), ("jeep",)]


def test_an_entry_that_is_a_class_itself_has_this_class(animals):
    found = partition(animals, (Listed("kite", "toy"), Listed("robot")), LEAVES)
    assert [(one.label, one.classes) for one in found.supersets[:2]] == [("toy kite", ("kite",)), ("robot", ("robot",))]
    assert found.report.covered == 2


def test_the_report_says_what_the_list_got_wrong_and_what_was_made_of_it(parts):
    report = parts.report
    assert (report.groups, report.covered, report.repeated) == (4, 6, ("car",))
    assert report.nested == {"swine": ("hoofed",), "bovid": ("hoofed",)}
    assert report.twice == {
        "boar": ("hoofed", "swine"),
        "hog": ("hoofed", "swine"),
        "ox": ("hoofed", "bovid"),
        "minivan": ("car", "truck"),
    }
    numbers = {one.entry.node: (one.entry.printed, one.actual, one.kept) for one in report.counts}
    assert numbers == {
        "swine": (3, 2, 0),
        "hoofed": (4, 4, 4),
        "bovid": (1, 1, 0),
        "car": (3, 2, 2),
        "truck": (1, 1, 0),
    }
    assert [one.entry.node for one in report.miscounted] == ["swine", "car"]
    assert str(report).splitlines() == [
        "4 groups, 6 classes below 5 entries",
        "car: listed more than once, taken once",
        "swine: inside ungulate, keeps 0 of 2 classes",
        "bovid: inside ungulate, keeps 0 of 1 classes",
        "swine: printed 3, has 2 classes",
        "car: printed 3, has 2 classes",
        "class boar: below ungulate, swine, goes to ungulate",
        "class hog: below ungulate, swine, goes to ungulate",
        "class ox: below ungulate, bovid, goes to ungulate",
        "class minivan: below car, truck, goes to car",
    ]


@settings(max_examples=40, deadline=None)
@given(relations(), st.data())
def test_every_class_is_in_exactly_one_superset_by_the_rule(parents, data):
    hierarchy = Hierarchy.of(parents)
    nodes = sorted(hierarchy.depth)
    classes = data.draw(st.lists(st.sampled_from(nodes), min_size=1, unique=True))
    listed = data.draw(st.lists(st.sampled_from(nodes), max_size=5))
    found = partition(hierarchy, [Listed(one) for one in listed], classes)
    assert Counter(one for superset in found.supersets for one in superset.classes) == Counter(classes)
    for superset in found.supersets:
        for one in superset.classes:
            above = {node for path in slow_lineages(parents, one) for node in path}
            depths = [(min(map(len, slow_lineages(parents, n))), listed.index(n), n) for n in listed if n in above]
            assert superset.node == (min(depths)[2] if depths else one)
    assert set(found.members) == set(range(len(classes)))
    assert found.report.groups == len(found.supersets)


def test_what_does_not_go_into_a_partition_is_said(animals, plain):
    with pytest.raises(LookupError, match="no node of the hierarchy called 'swin'; did you mean swine"):
        partition(animals, [Listed("swin")], LEAVES)
    with pytest.raises(LookupError, match="no node of the hierarchy called 'kitten'; did you mean kite"):
        partition(animals, LIST, ("kitten",))
    with pytest.raises(ValueError, match="expected every class once, got 'ox' 2 times"):
        partition(animals, LIST, ("ox", "boar", "ox"))


@pytest.mark.parametrize("groups", [[("a",)], [("a", "b"), ("b",)], [("a", "b"), ("c",)]])
def test_a_partition_that_is_none_cannot_be_made(groups, parts):
    supersets_ = tuple(Superset(str(i), "", group) for i, group in enumerate(groups))
    with pytest.raises(ValueError, match=r"expected each class in one superset, got '[bc]' in [012]"):
        Partition(("a", "b"), supersets_, parts.report)


# ImageNet's printed list


def test_the_printed_list_is_that_of_the_paper():
    """Appendix A's note: 120 entries, 687 classes in all, 682 without the repetition of pot and power tool."""
    listed = printed()
    assert len(listed) == 120
    assert sum(one.printed for one in listed) == 687
    assert sum({one.node: one.printed for one in listed}.values()) == 682
    twice = [one for one, count in Counter(listed).items() if count > 1]
    assert twice == [Listed("n03990474", "pot", 3), Listed("n03997484", "power tool", 2)]
    assert len({one.node for one in listed}) == len({one.name for one in listed}) == 118
    assert listed[0] == Listed("n02083346", "canine", 116)
    assert [one.name for one in listed[39:42]] == ["piece of cloth", "wheel", "swine"]
    assert listed[-1] == Listed("n09433442", "shore", 2)
    counts = [one.printed for one in listed]
    assert counts == sorted(counts, reverse=True)
    assert counts.count(2) == 49
    assert "telephone, phone" in {one.name for one in listed}


def test_imagenet_reads_an_is_a_file(tmp_path):
    """A small stand-in: an entity with every entry below it, bovid and swine below ungulate, two dogs, one bovid."""
    lines = [f"n00001740 {one.node}" for one in printed() if one.name not in ("bovid", "swine")]
    lines += ["n02370806 n02401031", "n02370806 n02395003"]
    lines += ["n02083346 n00000001", "n02083346 n00000002", "n02401031 n00000003", "n00001740 n00000004"]
    path = tmp_path / "wordnet.is_a.txt"
    path.write_text("\n".join(lines))
    found = imagenet(path, ["n00000004", "n00000002", "n00000003", "n00000001"])
    assert [(one.label, one.classes) for one in found.supersets] == [
        ("canine n02083346", ("n00000002", "n00000001")),
        ("ungulate n02370806", ("n00000003",)),
        ("n00000004", ("n00000004",)),
    ]
    assert found.members == {0: (0,), 1: (1, 3), 2: (2,), 3: (1, 3)}
    assert found.report.repeated == ("n03990474", "n03997484")
    assert found.report.nested == {"n02401031": ("n02370806",), "n02395003": ("n02370806",)}
    assert found.report.twice == {"n00000003": ("n02370806", "n02401031")}
    with pytest.raises(ValueError, match="expected WordNet ids such as n02123045, got 'tabby'"):
        imagenet(path, ["n00000001", "tabby"])
    with pytest.raises(LookupError, match="no node of the hierarchy called 'n00000009'"):
        imagenet(path, ["n00000009"])


# Levels


def test_levels_go_from_each_class_alone_to_all(animals):
    found = levels(animals, LEAVES)
    by_name = [{LEAVES[i]: "".join(LEAVES[j][0] for j in one) for i, one in level.items()} for level in found]
    alone = {one: one[0] for one in LEAVES}
    assert by_name[0] == alone
    # below the first ancestor: swine, swine, bovid, hoofed, truck (the first parent), car, thing, thing
    assert by_name[1] == {
        "boar": "bh", "hog": "bh", "ox": "o", "horse": "bhoh", "minivan": "m", "jeep": "mj", "robot": "mjrk",
        "kite": "mjrk",
    }  # fmt: skip
    assert by_name[2] == {
        "boar": "bhoh", "hog": "bhoh", "ox": "bhoh", "horse": "bhohr", "minivan": "mjrk", "jeep": "mjrk",
        "robot": "bhohmjrk", "kite": "bhohmjrk",
    }  # fmt: skip
    assert by_name[3]["ox"] == "bhohr"
    assert set(by_name[4].values()) == {"bhohmjrk"}
    assert len(found) == 5
    assert all(type(one) is tuple for level in found for one in level.values())


@settings(max_examples=40, deadline=None)
@given(relations(), st.data())
def test_levels_grow_from_one_class_to_all_of_them(parents, data):
    hierarchy = Hierarchy.of(parents)
    classes = data.draw(st.lists(st.sampled_from(sorted(hierarchy.depth)), min_size=1, unique=True))
    found = levels(hierarchy, classes)
    everything = tuple(range(len(classes)))
    assert found[0] == {i: (i,) for i in everything}
    assert len(classes) == 1 or set(found[-1].values()) == {everything}
    for smaller, larger in pairwise(found):
        for i in everything:
            assert set(smaller[i]) <= set(larger[i]), "a superset never shrinks"
    for d, level in enumerate(found[1:-1], 1):
        for i, one in enumerate(classes):
            node = hierarchy.path(one)[: d + 1][-1]
            below = [j for j, two in enumerate(classes) if any(node in path for path in slow_lineages(parents, two))]
            assert level[i] == tuple(below)


def test_two_roots_are_joined_by_one_more_level():
    found = levels(Hierarchy.of({"a": "x", "b": "x", "c": "y"}), ("a", "b", "c"))
    assert [level[0] for level in found] == [(0,), (0, 1), (0, 1, 2)]
    assert [level[2] for level in found] == [(2,), (2,), (0, 1, 2)]


def test_a_class_is_the_node_of_its_name_else_of_its_number():
    hierarchy = Hierarchy.of({"0": "low", "pip": "high", "low": "any", "high": "any"})
    assert levels(hierarchy, ("mouse", "pip"))[1] == {0: (0,), 1: (1,)}
    with pytest.raises(LookupError, match="no node of the hierarchy called 'mouse'"):
        levels(hierarchy, ("pip", "mouse"))
    with pytest.raises(ValueError, match="expected the names of the classes, as the hierarchy has them, got none"):
        levels(hierarchy, ())


# Names


def test_all_is_every_class_with_every_other():
    assert members("all", ("a", "b", "c")) == dict.fromkeys(range(3), (0, 1, 2))
    assert members("all", (), 2) == dict.fromkeys(range(2), (0, 1))


def test_the_supersets_of_creatures_are_their_body_plans():
    drawn = creatures("test", count=1)
    found = members("creatures", drawn.classes)
    for i, plan in enumerate(drawn.groups):
        assert found[i] == tuple(j for j, other in enumerate(drawn.groups) if other == plan)
    assert len(set(found.values())) == 2


def test_the_supersets_of_pets_are_the_species_however_breeds_are_written():
    """The table of the data set's own reader says the same."""
    species = {True: "cat", False: "dog"}
    assert {breed.lower(): species[breed in CATS] for breed in BREEDS} == supersets.SPECIES
    for written in (BREEDS, [one.replace(" ", "_").lower() for one in BREEDS], [one.upper() for one in BREEDS]):
        found = members("pets", written)
        assert all((j in found[i]) == ((BREEDS[i] in CATS) == (BREEDS[j] in CATS)) for i in found for j in found)
    assert members("pets", ("Abyssinian", "american_bulldog", "Bengal")) == {0: (0, 2), 1: (1,), 2: (0, 2)}


def test_a_file_says_supersets_by_names_or_numbers(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"cat": "pet", "1": "pet", "plane": "craft", "never seen": "x", "3": 7}))
    assert members(str(path), ("cat", "dog", "plane", "bus")) == {0: (0, 1), 1: (0, 1), 2: (2,), 3: (3,)}
    path.write_text(json.dumps({"0": "a", "1": "b", "2": "a"}))
    assert members(str(path), (), 3) == {0: (0, 2), 1: (1,), 2: (0, 2)}


def test_what_is_wrong_with_names_is_said(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"cat": "pet"}))
    for name in ("creatures", "pets"):
        with pytest.raises(
            ValueError, match=f"'{name}' goes by the names of the classes, and this classifier has none"
        ):
            members(name, (), 4)
    with pytest.raises(
        ValueError, match=r"no creature is called 'crow' \(class 1\); expected names that end in pip or"
    ):
        members("creatures", ("common pip", "crow"))
    with pytest.raises(ValueError, match=r"no pet is called 'Wolf' \(class 0\); expected breeds of Oxford-IIIT Pets"):
        members("pets", ("Wolf",))
    with pytest.raises(
        ValueError, match=r"mine.json has no superset for class 1 \(dog\), and for 2 of 3 classes in all"
    ):
        members(str(path), ("cat", "dog", "emu"))
    with pytest.raises(ValueError, match=r"has no superset for class 0, and for 2 of 2 classes"):
        members(str(path), (), 2)
    path.write_text(json.dumps({"cat": ["pet"]}))
    with pytest.raises(ValueError, match=r"expected \{class: superset\}, got the superset \['pet'\]; write its name"):
        members(str(path), ("cat",))
    with pytest.raises(LookupError, match="no superset called 'creature'; did you mean creatures"):
        members("creature", ("common pip",))
    with pytest.raises(LookupError, match=r"or give the path of a file \(.json\)"):
        members("nothing of the kind", ("a",))
    with pytest.raises(FileNotFoundError, match=r"no file gone.json; expected all or creatures or pets, or the path"):
        members("gone.json", ("a",))


def test_a_partition_is_written_as_a_file_that_is_read_by_name(tmp_path, parts):
    by_class, by_number = parts.write(tmp_path / "a.json"), parts.write(tmp_path / "b.json", by="number")
    assert members(str(by_class), LEAVES) == parts.members
    assert members(str(by_number), (), 8) == parts.members
    assert json.loads(by_class.read_text())["ox"] == "ungulate hoofed"


def test_hierarchies_of_creatures_and_pets_have_three_levels():
    drawn = creatures("test", count=1)
    found = levels(hierarchy_of("creatures", drawn.classes), drawn.classes)
    assert found[1] == members("creatures", drawn.classes)
    assert found[2] == members("all", drawn.classes)
    assert len(found) == 3
    names = ("Abyssinian", "american_bulldog", "Bengal")
    found = levels(hierarchy_of("pets", names), names)
    assert [level[0] for level in found] == [(0,), (0, 2), (0, 1, 2)]
    assert hierarchy_of("pets", names).path("Bengal") == ("Bengal", "cat", "pet")
    with pytest.raises(ValueError, match="goes by the names of the classes"):
        hierarchy_of("pets", ())


# Maps over them


@pytest.fixture
def named_classifier(pooled):
    return replace(pooled, classes=("common pip", "common newt", "carnival pip", "orchid newt", "midnight pip"))


def test_over_a_name_is_over_the_classes_it_stands_for(named_classifier, x, tmp_path):
    y = torch.tensor([3, 0, 4])
    sets = {0: (0, 2, 4), 1: (1, 3), 2: (0, 2, 4), 3: (1, 3), 4: (0, 2, 4)}
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({str(i): "even" if i % 2 == 0 else "odd" for i in range(5)}))
    for method in (cam, partial(grad_cam)):
        for normalize in ("none", "unit"):
            made = over(method, "creatures", normalize=normalize)(named_classifier, x, y)
            assert torch.equal(made, over(method, sets, normalize=normalize)(named_classifier, x, y))
            assert torch.equal(made, over(method, str(path), normalize=normalize)(named_classifier, x, y))
    by_hand = torch.stack(
        [sum(cam(named_classifier, x[i : i + 1], torch.tensor([c]))[0] for c in sets[int(y[i])]) for i in range(3)]
    )
    torch.testing.assert_close(over(cam, "creatures")(named_classifier, x, y), by_hand, rtol=0, atol=1e-12)


def test_over_all_needs_no_names(pooled, x):
    y = torch.tensor([3, 0, 4])
    assert torch.equal(over(cam, "all")(pooled, x, y), over(cam, range(5))(pooled, x, y))
    with pytest.raises(ValueError, match="'pets' goes by the names of the classes, and this classifier has none"):
        over(cam, "pets")(pooled, x, y)


def test_a_command_line_names_supersets_and_the_record_keeps_the_name(named_classifier, x):
    y = torch.tensor([3, 0, 4])
    method = method_of(Choice.parse("over(cam)?classes=creatures&normalize=unit"))
    assert torch.equal(method(named_classifier, x, y), over(cam, "creatures", normalize="unit")(named_classifier, x, y))
    assert arguments(method)["classes"] == "creatures"
    with pytest.raises(LookupError, match="no superset called 'cretures'; did you mean creatures"):
        method_of(Choice.parse("over(cam)?classes=cretures"))(named_classifier, x, y)


def test_supersets_need_no_torch():
    code = "import sys, sightline.supersets; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
