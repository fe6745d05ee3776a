"""Small networks of fixed seeds, images, and what a network looks like from outside before and after a call."""

import copy
import random
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sightline.classifier import Classifier, wrap

torch.set_num_threads(1)
"""Tests run in several processes; more threads than cores only wait for each other."""

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a script, which tests of Ctrl-C inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)

NORMALIZATION = (0.45, 0.5, 0.55), (0.25, 0.3, 0.2)


class Pooled(nn.Module):
    """Two convolutions with batch norm, global average pooling, dropout, one linear layer: CAM is defined."""

    def __init__(self, features=6, classes=5):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.last = nn.Sequential(nn.Conv2d(8, features, 3, 2, 1), nn.BatchNorm2d(features), nn.ReLU(inplace=True))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(features, classes)

    def forward(self, x):
        return self.head(self.drop(self.pool(self.last(self.stem(x))).flatten(1)))


class Curved(nn.Module):
    """A layer in the middle whose gradients differ from cell to cell: what lies behind is neither linear nor pooled."""

    def __init__(self, features=6, classes=5):
        super().__init__()
        self.last = nn.Sequential(nn.Conv2d(3, features, 3, 2, 1), nn.BatchNorm2d(features), nn.ReLU())
        self.top = nn.Sequential(nn.Conv2d(features, 7, 3, 2, 1), nn.Tanh(), nn.Conv2d(7, 8, 3, 2, 1), nn.Softplus())
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, classes)

    def behind(self, a):
        return self.head(self.drop(self.top(a)).square().mean((2, 3)))

    def forward(self, x):
        return self.behind(self.last(x))


class Tokens(nn.Module):
    """A transformer of two blocks: patches of 8 pixels behind `prefix` other tokens, features of either sign."""

    def __init__(self, classes=5, prefix=1, patch=8, width=12, trained=True):
        super().__init__()
        self.prefix = prefix
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.others = nn.Parameter(torch.randn(1, prefix, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm = nn.LayerNorm(width)
        if trained:
            nn.init.uniform_(self.norm1.weight, 0.5, 1.5)
            nn.init.uniform_(self.norm1.bias, -0.5, 0.5)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        t = torch.cat([self.others.expand(len(x), -1, -1), self.embed(x).flatten(2).transpose(1, 2)], 1)
        a = self.norm1(t)
        t = t + self.attention(a, a, a, need_weights=False)[0]
        t = t + self.mlp(self.norm2(t))
        return self.head(self.drop(self.norm(t)[:, 0]))


@dataclass(frozen=True)
class Networks:
    """The classes above, for tests that build their own."""

    pooled: type[Pooled] = Pooled
    curved: type[Curved] = Curved
    tokens: type[Tokens] = Tokens


@pytest.fixture(scope="session")
def networks() -> Networks:
    return Networks()


@pytest.fixture(scope="session")
def seeded() -> Callable[..., nn.Module]:
    """Build a network in float64 whose weights come from `seed` alone; batch norms get statistics that matter."""

    def build(make, *args, seed=0, dtype=torch.float64, **settings):
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            model = make(*args, **settings)
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    nn.init.uniform_(module.running_mean, -0.2, 0.2)
                    nn.init.uniform_(module.running_var, 0.1, 0.3)
                    nn.init.uniform_(module.weight, 0.7, 1.3)
                    nn.init.uniform_(module.bias, -0.2, 0.2)
        return model.to(dtype).eval()

    return build


@pytest.fixture(scope="session")
def classifiers(seeded) -> dict[str, Classifier]:
    """The three networks as classifiers; tests get copies."""
    networks = {"pooled": (Pooled, 7, "last"), "curved": (Curved, 33, "last"), "tokens": (Tokens, 3, "norm1")}
    return {
        name: wrap(seeded(make, seed=seed), layer=layer, normalization=NORMALIZATION, size=(24, 32))
        for name, (make, seed, layer) in networks.items()
    }


@pytest.fixture
def pooled(classifiers) -> Classifier:
    return copy.deepcopy(classifiers["pooled"])


@pytest.fixture
def curved(classifiers) -> Classifier:
    return copy.deepcopy(classifiers["curved"])


@pytest.fixture
def tokens(classifiers) -> Classifier:
    return copy.deepcopy(classifiers["tokens"])


@pytest.fixture
def x() -> Tensor:
    return torch.rand(3, 3, 24, 32, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


@pytest.fixture
def plain() -> Iterator[None]:
    """Switch the checks of shapes and types off, as they are for a user: our own errors are seen, and Python's random
    state, from which beartype draws, stays."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def hooks_of(module):
    return {name: list(value) for name, value in vars(module).items() if name.endswith("_hooks") and value is not None}


def look(model, *tensors):
    generator = np.random.get_state()
    return {
        "training": [module.training for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [hooks_of(module) for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "grad": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "state": [value.clone() for value in model.state_dict().values()],
        "versions": [value._version for value in [*model.parameters(), *model.buffers()]],
        "tensors": [tensor.clone() for tensor in tensors],
        "tensor flags": [(tensor.requires_grad, tensor.grad is None) for tensor in tensors],
        "torch": torch.get_rng_state(),
        "numpy": (generator[0], torch.from_numpy(generator[1].astype(np.int64)), *generator[2:]),
        "python": random.getstate(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()),
    }


def same(before, after):
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        return torch.equal(before, after)
    if isinstance(before, list | tuple):
        return len(before) == len(after) and all(map(same, before, after))
    return before == after


@pytest.fixture(scope="session")
def trace() -> Callable[..., Callable[[], list[str]]]:
    """Look at a network and tensors; the returned function looks again and names what has changed."""

    def start(model, *tensors):
        before = look(model, *tensors)

        def changed():
            after = look(model, *tensors)
            return [name for name in before if not same(before[name], after[name])]

        return changed

    return start


@pytest.fixture
def crf_library(monkeypatch):
    """Return what puts a field of its own in the place of pydensecrf's."""

    def install(field):
        module = ModuleType("pydensecrf.densecrf")
        module.DenseCRF2D = field
        monkeypatch.setitem(sys.modules, "pydensecrf", ModuleType("pydensecrf"))
        monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", module)
        return field

    return install
