"""Supersets. Classes that share their parts, for maps summed over them, and the hierarchies they are levels of.

Kim, Choe, Akata and Oh, Keep CALM and improve visual feature attribution, ICCV 2021, section 5.4 and supplement F.
"""

import csv
import json
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from sightline.registry import chosen, unknown
from sightline.runs import write_text

Members: TypeAlias = Mapping[int, tuple[int, ...]]
"""Class -> the classes of its superset, itself among them."""

Parents: TypeAlias = Mapping[Any, str | Sequence[str]]
"""Node -> its parent, or several."""

By: TypeAlias = Literal["class", "number"]

PRINTED = Path(__file__).with_name("imagenet_supersets.csv")
"""The 120 supersets of ImageNet that the paper prints (supplement, table 4), in its order, with its repetitions."""

FEW = 200
"""Nodes among which names near to a wrong one are looked for."""

WNID = re.compile(r"n\d{8}")

PLANS: Mapping[str, str] = MappingProxyType({"pip": "winged", "newt": "finned"})
"""Last word of a creature's name -> its body plan."""

BREEDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "cat": (
            "abyssinian", "bengal", "birman", "bombay", "british shorthair", "egyptian mau", "maine coon", "persian",
            "ragdoll", "russian blue", "siamese", "sphynx",
        ),
        "dog": (
            "american bulldog", "american pit bull terrier", "basset hound", "beagle", "boxer", "chihuahua",
            "english cocker spaniel", "english setter", "german shorthaired", "great pyrenees", "havanese",
            "japanese chin", "keeshond", "leonberger", "miniature pinscher", "newfoundland", "pomeranian", "pug",
            "saint bernard", "samoyed", "scottish terrier", "shiba inu", "staffordshire bull terrier",
            "wheaten terrier", "yorkshire terrier",
        ),
    }
)  # fmt: skip
"""Species of Oxford-IIIT Pets -> its breeds, in small letters."""

SPECIES: Mapping[str, str] = MappingProxyType({breed: kind for kind, breeds in BREEDS.items() for breed in breeds})
"""Breed -> its species."""


def members(name: str, classes: Sequence[str], count: int | None = None) -> Members:
    """Return the supersets that a name stands for: class -> the classes that belong together with it.

    "all": every class with every other. "creatures": the two body plans of the drawn creatures. "pets": cats and dogs
    of Oxford-IIIT Pets. Else a JSON file {class: superset}, where a class is called by its name or its number;
    `Partition.write` writes such files. `classes` are the names of a classifier's classes in order, `count` how many
    there are where it has no names.

    Raises:
        LookupError: an unknown name.
        FileNotFoundError: no such file.
        ValueError: a classifier without the names that are asked for, a class that is in no superset, or a file that is
            no table from classes to supersets.
    """
    number = len(classes) if count is None else count
    if name == "all":
        return grouped(["all"] * number)
    if name in NAMED:
        return grouped(NAMED[name].groups(named(name, classes)))
    path = located(name, ("all", *NAMED), "superset", ".json")
    table = json_table(path)
    if strange := [one for one in table.values() if not isinstance(one, str | int)]:
        raise ValueError(f"{path}: expected {{class: superset}}, got the superset {strange[0]!r}; write its name")
    keys = [key_of(i, classes, table) for i in range(number)]
    if missing := [i for i, key in enumerate(keys) if key is None]:
        raise ValueError(
            f"{path} has no superset for {called(missing[0], classes)}, and for {len(missing)} of {number} classes in "
            "all; write one for each, by its name or its number (a class alone is a superset too)"
        )
    return grouped([str(table[key]) for key in keys if key is not None])


def hierarchy_of(given: "Hierarchy | Parents | str", classes: Sequence[str]) -> "Hierarchy":
    """Return the hierarchy that is meant.

    "creatures": class, body plan, creature. "pets": breed, species, pet. Else a hierarchy, a mapping from nodes to
    their parents, or the path of a file, see `Hierarchy.read`.

    Raises:
        LookupError: an unknown name.
        FileNotFoundError: no such file.
        ValueError: a classifier without the names that are asked for, a class that is none of them, or a damaged file.
    """
    if isinstance(given, Hierarchy):
        return given
    if not isinstance(given, str):
        return Hierarchy.of(given)
    if given not in NAMED:
        return Hierarchy.read(located(given, NAMED, "hierarchy", ".txt", ".json"))
    kind = NAMED[given]
    groups = kind.groups(named(given, classes))
    return Hierarchy.of({**dict(zip(classes, groups, strict=True)), **dict.fromkeys(groups, kind.root)})


def levels(hierarchy: "Hierarchy", classes: Sequence[str]) -> tuple[Members, ...]:
    """Return the supersets of every depth, from each class alone to all of them.

        Y_0(y) = {y},   Y_d(y) = the classes below the d-th node of the shortest path from y to the root

    A path that has ended stays at its root. Of several parents equally near to the root the first in the hierarchy
    counts; Y_d has all classes below the node, on whatever path. Where several roots are left, all classes are one
    level more. A class is the node of its name, else of its number.

    Raises:
        LookupError: a class that the hierarchy does not have.
        ValueError: no classes.
    """
    if not classes:
        raise ValueError("expected the names of the classes, as the hierarchy has them, got none")
    paths = [hierarchy.path(node_of(i, classes, hierarchy)) for i in range(len(classes))]
    below = dict[str, list[int]]()
    for i, path in enumerate(paths):
        for node in (path[0], *hierarchy.ancestors(path[0])):
            below.setdefault(node, []).append(i)
    sets: list[Members] = [{i: (i,) for i in range(len(classes))}]
    for d in range(1, max(map(len, paths))):
        sets.append({i: tuple(below[path[min(d, len(path) - 1)]]) for i, path in enumerate(paths)})
    everything = tuple(range(len(classes)))
    if any(one != everything for one in sets[-1].values()):
        sets.append(dict.fromkeys(everything, everything))
    return tuple(sets)


def partition(hierarchy: "Hierarchy", listed: Sequence["Listed"], classes: Sequence[str]) -> "Partition":
    """Put every class into exactly one superset.

    A class goes to the listed node above it (or itself) that is closest to the root, of equally close ones to the first
    in the list; a class without one is a superset of its own. What the list says twice or wrongly is in `report`.

    Raises:
        LookupError: a class or a listed node that the hierarchy does not have.
        ValueError: a class that is given twice.
    """
    if doubled := [one for one, count in Counter(classes).items() if count > 1]:
        raise ValueError(f"expected every class once, got {doubled[0]!r} {classes.count(doubled[0])} times")
    entries = dict[str, Listed]()
    for entry in listed:
        entries.setdefault(hierarchy.known(entry.node), entry)
    covering = {one: covers(hierarchy, entries, one) for one in classes}
    kept = dict[str, list[str]]()
    for one, nodes in covering.items():
        kept.setdefault(nodes[0] if nodes else one, []).append(one)
    shown = [Superset(node, entry.name, tuple(kept[node])) for node, entry in entries.items() if node in kept]
    alone = [Superset(one, "", (one,)) for one, nodes in covering.items() if not nodes]
    under = Counter(node for nodes in covering.values() for node in nodes)
    report = Report(
        groups=len(shown) + len(alone),
        covered=len(classes) - len(alone),
        counts=tuple(Count(entry, under[node], len(kept.get(node, ()))) for node, entry in entries.items()),
        repeated=tuple(node for node, count in Counter(entry.node for entry in listed).items() if count > 1),
        nested={node: above for node in entries if (above := inside(hierarchy, entries, node))},
        twice={one: nodes for one, nodes in covering.items() if len(nodes) > 1},
    )
    return Partition(tuple(classes), (*shown, *alone), report)


def inside(hierarchy: "Hierarchy", entries: Iterable[str], node: str) -> tuple[str, ...]:
    """Return the listed nodes above a node, in the list's order."""
    above = set(hierarchy.ancestors(node))
    return tuple(entry for entry in entries if entry in above)


def covers(hierarchy: "Hierarchy", entries: Iterable[str], one: str) -> tuple[str, ...]:
    """Return the listed nodes above a class, itself too; the closest to the root first, of equal ones as listed."""
    lineage = {one, *hierarchy.ancestors(one)}
    return tuple(sorted((entry for entry in entries if entry in lineage), key=lambda entry: hierarchy.depth[entry]))


def imagenet(is_a: Path | str, wnids: Sequence[str]) -> "Partition":
    """Return the supersets of ImageNet classes by the list that the paper prints, and the is-a file of WordNet.

    `wnids` are the WordNet ids of the classes in order, n02123045 say; `is_a` is the file wordnet.is_a.txt, see
    `Hierarchy.read`.

    *Differs:* the paper speaks of 450 supersets that part the 1000 classes, and its list does not: it repeats two
    entries, some lie inside others, and many counts are not those of the classes there. `partition` says what was done.

    Raises:
        FileNotFoundError: no such file.
        LookupError: a class or an entry of the list that the file does not have.
        ValueError: classes that are not called by WordNet ids, or a malformed file.
    """
    if strange := [one for one in wnids if not WNID.fullmatch(one)]:
        raise ValueError(f"expected WordNet ids such as n02123045, got {strange[0]!r}; give the classes' ids in order")
    return partition(Hierarchy.read(is_a), printed(), wnids)


def printed() -> tuple["Listed", ...]:
    """Return the 120 supersets of ImageNet that the paper prints, as it prints them."""
    with PRINTED.open(encoding="utf-8", newline="") as file:
        return tuple(Listed(row["wnid"], row["name"], int(row["printed"])) for row in csv.DictReader(file))


@dataclass(frozen=True)
class Hierarchy:
    """What is a kind of what: nodes and their parents, of which a node may have several.

    Depth is the number of steps on the shortest path from a root, a node without parents.
    """

    parents: Mapping[str, tuple[str, ...]]
    """Node -> its parents; a root may be left out."""

    def __post_init__(self) -> None:
        """Check that there is no circle.

        Raises:
            ValueError: there is one; it is named.
        """
        try:
            TopologicalSorter(self.parents).prepare()
        except CycleError as error:
            circle = " -> ".join(reversed(error.args[1]))
            raise ValueError(f"the hierarchy runs in a circle, each a kind of the next: {circle}; break it") from error

    @classmethod
    def of(cls, parents: Parents) -> "Hierarchy":
        """Read a mapping from each node to its parent, or to a list of them.

        Raises:
            TypeError: a parent that is no name.
            ValueError: a circle.
        """
        table = dict[str, tuple[str, ...]]()
        for node, above in parents.items():
            several = [above] if isinstance(above, str) else above
            if not isinstance(several, list | tuple) or not all(isinstance(one, str) for one in several):
                raise TypeError(f"expected the parent of {str(node)!r}, a name or a list of names, got {above!r}")
            table[str(node)] = tuple(dict.fromkeys(several))
        return cls(table)

    @classmethod
    def read(cls, path: Path | str) -> "Hierarchy":
        """Read a file of lines `parent child`, as WordNet's wordnet.is_a.txt, or a JSON table {child: parent(s)}.

        Names with spaces in them are parted by a tab. Empty lines are passed over.

        Raises:
            FileNotFoundError: no such file.
            TypeError, ValueError: a malformed line, which is named by its number; no table; a circle.
        """
        if Path(path).suffix == ".json":
            return cls.of(json_table(Path(path)))
        table = dict[str, dict[str, None]]()
        for number, line in enumerate(text_of(Path(path)).splitlines(), 1):
            if not line.strip():
                continue
            words = [word.strip() for word in line.split("\t")] if "\t" in line.strip() else line.split()
            if len(words) != 2 or not all(words):
                raise ValueError(f"{path}, line {number}: expected 'parent child', got {line.strip()!r}")
            table.setdefault(words[1], {})[words[0]] = None
        return cls({child: tuple(above) for child, above in table.items()})

    @cached_property
    def depth(self) -> Mapping[str, int]:
        """Node -> how many steps it is from the nearest root."""
        found = dict[str, int]()
        for node in TopologicalSorter(self.parents).static_order():
            found[node] = 1 + min((found[above] for above in self.parents.get(node, ())), default=-1)
        return found

    @cached_property
    def children(self) -> Mapping[str, tuple[str, ...]]:
        """Node -> the nodes directly below it, where there are some."""
        found = dict[str, list[str]]()
        for node, several in self.parents.items():
            for above in several:
                found.setdefault(above, []).append(node)
        return {node: tuple(below) for node, below in found.items()}

    def known(self, node: str) -> str:
        """Return the node.

        Raises:
            LookupError: no such node.
        """
        if node in self.depth:
            return node
        if len(self.depth) > FEW:
            example = min(self.depth, key=lambda one: (self.depth[one], one))
            raise LookupError(
                f"no node of the hierarchy called {node!r}; its {len(self.depth)} are such as {example!r}"
            )
        raise LookupError(unknown(node, self.depth, "node of the hierarchy"))

    def ancestors(self, node: str) -> tuple[str, ...]:
        """Return all nodes above one, the nearest first.

        Raises:
            LookupError: no such node.
        """
        return reached(self.known(node), self.parents)

    def leaves(self, node: str) -> tuple[str, ...]:
        """Return the nodes below one that have nothing below them; a leaf is its own.

        Raises:
            LookupError: no such node.
        """
        return tuple(one for one in (self.known(node), *reached(node, self.children)) if one not in self.children)

    def path(self, node: str) -> tuple[str, ...]:
        """Return the shortest path from a node, itself first, to a root; of equal parents the first is taken.

        Raises:
            LookupError: no such node.
        """
        steps = [self.known(node)]
        while above := self.parents.get(steps[-1]):
            steps.append(min(above, key=lambda one: self.depth[one]))
        return tuple(steps)


@dataclass(frozen=True)
class Listed:
    """An entry of a list of supersets: a node, what it is called, and how many classes it is said to have."""

    node: str
    name: str = ""
    printed: int | None = None


@dataclass(frozen=True)
class Superset:
    """Classes that belong together, and the node above them; a class alone is its own node."""

    node: str
    name: str
    classes: tuple[str, ...]

    @property
    def label(self) -> str:
        """What tells it from the others: its name, if it has one, and its node."""
        return f"{self.name} {self.node}" if self.name not in ("", self.node) else self.node


@dataclass(frozen=True)
class Count:
    """How many classes an entry is said to have, has below it, and got."""

    entry: Listed
    actual: int
    kept: int


@dataclass(frozen=True)
class Report:
    """What was found wrong in a list of supersets, and what was made of it."""

    groups: int
    """Supersets in all, those of a single class too."""
    covered: int
    """Classes below at least one entry."""
    counts: tuple[Count, ...]
    """Each entry once, in the list's order; one that got no class is no superset."""
    repeated: tuple[str, ...]
    """Nodes that are listed more than once; they count once."""
    nested: Mapping[str, tuple[str, ...]]
    """Node that lies below others of the list -> those, in the list's order."""
    twice: Mapping[str, tuple[str, ...]]
    """Class below several entries -> their nodes; the first one got it."""

    @property
    def miscounted(self) -> tuple[Count, ...]:
        """The entries that have another number of classes than printed."""
        return tuple(one for one in self.counts if one.entry.printed not in (None, one.actual))

    def __str__(self) -> str:
        of = {one.entry.node: one for one in self.counts}
        lines = [f"{self.groups} groups, {self.covered} classes below {len(of)} entries"]
        lines += [f"{told(of[node])}: listed more than once, taken once" for node in self.repeated]
        for node, outer in self.nested.items():
            around = " and ".join(told(of[one]) for one in outer)
            lines.append(f"{told(of[node])}: inside {around}, keeps {of[node].kept} of {of[node].actual} classes")
        lines += [f"{told(one)}: printed {one.entry.printed}, has {one.actual} classes" for one in self.miscounted]
        lines += [
            f"class {one}: below {', '.join(told(of[n]) for n in nodes)}, goes to {told(of[nodes[0]])}"
            for one, nodes in self.twice.items()
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Partition:
    """Classes in supersets, each in exactly one; those of the list first, then the classes alone."""

    classes: tuple[str, ...]
    supersets: tuple[Superset, ...]
    report: Report

    def __post_init__(self) -> None:
        """Check that every class is in exactly one superset.

        Raises:
            ValueError: one is not.
        """
        found = Counter(one for superset in self.supersets for one in superset.classes)
        if wrong := [one for one in (*self.classes, *found) if (one in self.classes, found[one]) != (True, 1)]:
            raise ValueError(f"expected each class in one superset, got {wrong[0]!r} in {found[wrong[0]]}")

    @cached_property
    def members(self) -> Members:
        """Number of each class -> the numbers of the classes in its superset, as `over` takes them."""
        return grouped(list(self.plain().values()))

    def plain(self, by: By = "class") -> dict[str, str]:
        """Return {class: superset}, a class called by its name or its number.

        Raises:
            LookupError: another way to call it.
        """
        numbers = list(map(str, range(len(self.classes))))
        keys = chosen(by, {"class": self.classes, "number": numbers}, "way to call a class")
        home = {one: superset.label for superset in self.supersets for one in superset.classes}
        return {key: home[one] for key, one in zip(keys, self.classes, strict=True)}

    def write(self, path: Path | str, by: By = "class") -> Path:
        """Write the table of `plain` as JSON: a name for `members`, and so for `over`."""
        return write_text(path, json.dumps(self.plain(by), indent=1) + "\n")


@dataclass(frozen=True)
class Kind:
    """Supersets that go by the names of classes."""

    root: str
    """What all of them are."""
    group: Callable[[str], str | None]
    """A class's name, in small letters -> its group."""
    expected: str

    def groups(self, classes: Sequence[str]) -> list[str]:
        """Return the group of each class.

        Raises:
            ValueError: a class of none.
        """
        found = dict[str, str]()
        for i, one in enumerate(classes):
            if (group := self.group(words(one))) is None:
                raise ValueError(f"no {self.root} is called {one!r} (class {i}); expected {self.expected}")
            found[one] = group
        return [found[one] for one in classes]


NAMED: Mapping[str, Kind] = MappingProxyType(
    {
        "creatures": Kind("creature", lambda name: PLANS.get(name.rpartition(" ")[2]), "names that end in pip or newt"),
        "pets": Kind("pet", SPECIES.get, "breeds of Oxford-IIIT Pets, Maine Coon or maine_coon say"),
    }
)


def grouped(groups: Sequence[str]) -> Members:
    """Return class -> the classes of its group, from the group of each class."""
    found = dict[str, list[int]]()
    for i, group in enumerate(groups):
        found.setdefault(group, []).append(i)
    return {i: tuple(found[group]) for i, group in enumerate(groups)}


def words(name: str) -> str:
    """Return a name in small letters, its words parted by single spaces."""
    return " ".join(re.split(r"[\s_-]+", name.strip().lower()))


def named(name: str, classes: Sequence[str]) -> Sequence[str]:
    """Return the names of the classes.

    Raises:
        ValueError: there are none.
    """
    if not classes:
        raise ValueError(f"{name!r} goes by the names of the classes, and this classifier has none; wrap(classes=...)")
    return classes


def located(name: str, known: Iterable[str], kind: str, *endings: str) -> Path:
    """Return the path of a file that is meant.

    Raises:
        LookupError: it looks like a name, not like a path.
        FileNotFoundError: no such file.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.suffix in endings or len(path.parts) > 1:
        raise FileNotFoundError(f"no file {name}; expected {' or '.join(known)}, or the path of a {kind} file")
    raise LookupError(f"{unknown(name, known, kind)}; or give the path of a file ({', '.join(endings)})")


def json_table(path: Path) -> dict[str, Any]:
    """Read a JSON table.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, or no table.
    """
    try:
        table = json.loads(text_of(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path}: expected a table {{name: ...}}, got a {type(table).__name__}")
    return table


def text_of(path: Path) -> str:
    """Read a text file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8: {error}") from error


def reached(node: str, steps: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Return all that is reached from a node, without itself, the nearest first."""
    seen, left = dict.fromkeys([node]), deque([node])
    while left:
        new = [one for one in steps.get(left.popleft(), ()) if one not in seen]
        seen.update(dict.fromkeys(new))
        left += dict.fromkeys(new)
    return tuple(seen)[1:]


def key_of(i: int, classes: Sequence[str], known: Mapping[str, Any]) -> str | None:
    """Return by what a table knows a class: its name, else its number; None if by neither."""
    return next((key for key in (*classes[i : i + 1], str(i)) if key in known), None)


def node_of(i: int, classes: Sequence[str], hierarchy: Hierarchy) -> str:
    """Return the node of a class.

    Raises:
        LookupError: the hierarchy does not have it.
    """
    key = key_of(i, classes, hierarchy.depth)
    return hierarchy.known(classes[i]) if key is None else key


def called(i: int, classes: Sequence[str]) -> str:
    """Return what a class is called in a message."""
    return f"class {i} ({classes[i]})" if i < len(classes) else f"class {i}"


def told(one: Count) -> str:
    """Return what an entry is called in a report."""
    return one.entry.name or one.entry.node
