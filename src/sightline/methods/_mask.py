"""Masks. The game of meaningful perturbation (Fong and Vedaldi, ICCV 2017), on pixels or on a layer."""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from sightline.classifier import derivative
from sightline.maps import blur, degenerate, resize
from sightline.registry import chosen
from sightline.types import Saliency, Values

Game: TypeAlias = Literal["deletion", "preservation"]
Variation: TypeAlias = Literal["isotropic", "anisotropic"]
Start: TypeAlias = Literal["circle", "random", "half", "zeros", "ones"]
Through: TypeAlias = Callable[[Saliency, Tensor], Values]
"""The score of the images numbered i through a mask each."""

GAMES: Mapping[str, float] = {"deletion": 1.0, "preservation": -1.0}
"""Game -> the sign of the score in what is minimized."""

STARTS: Mapping[str, float | None] = {"circle": None, "random": None, "half": 0.5, "zeros": 0.0, "ones": 1.0}
"""Start -> the mask's value where it is the same everywhere."""

SIDE, RADII, EDGE = 224, range(0, 180, 5), 10.0
"""The discs to start from, and the Gaussian that softens their edge, in pixels of an image of this side (supp. 2)."""

DECIDED = 0.99
"""The share of the score that a disc to start from suppresses or preserves."""

ADVICE: Mapping[str, str] = {
    "not finite": "its optimization diverged: try a smaller lr or another start",
    "all zero": "nothing is worth a perturbation: try a smaller l1, another start or another erase",
    "constant": "no place differs from another: try another start, other penalties or another erase",
}
"""What is wrong with a mask -> what it means and what to do."""


@dataclass(frozen=True)
class Search:
    """A game on masks (m = 1 keeps, m = 0 perturbs) and how it is played.

    Raises:
        ValueError: fewer than one step or one mask a chunk, a learning rate not above zero, a negative penalty, or an
            exponent below one.
        LookupError: an unknown choice.
    """

    game: Game
    steps: int
    lr: float
    l1: float
    tv: float
    beta: float
    tv_norm: Variation
    start: Start
    seed: int
    chunk: int

    def __post_init__(self) -> None:
        chosen(self.game, GAMES, "game")
        chosen(self.start, STARTS, "start")
        chosen(self.tv_norm, VARIATIONS, "variation")
        if self.steps < 1 or not self.lr > 0:
            raise ValueError(f"expected steps >= 1 and lr > 0, got steps={self.steps}, lr={self.lr}")
        if not (self.l1 >= 0 and self.tv >= 0 and self.beta >= 1):
            given = f"l1={self.l1}, tv={self.tv}, beta={self.beta}"
            raise ValueError(f"expected l1 >= 0, tv >= 0 and beta >= 1, got {given}")
        if self.chunk < 1:
            raise ValueError(f"expected chunk >= 1 masked images at a time, got {self.chunk}")

    def turn(self, m: Tensor) -> Tensor:
        """Return the importance that a mask shows, or the mask that shows an importance."""
        return 1 - m if self.game == "deletion" else m

    def penalty(self, m: Saliency) -> Tensor:
        """Return l1 |turn m|_1 + tv sum_u |grad m(u)|^beta, sums over cells (m lies in [0, 1]) and images."""
        return self.l1 * self.turn(m).sum() + self.tv * total_variation(m, self.beta, self.tv_norm).sum()

    def begin(self, f: Through, m: Saliency, size: tuple[int, int]) -> Saliency:
        """Return the first masks, of m's shape; a circle is chosen by the scores of masks of `size`."""
        value = STARTS[self.start]
        if value is not None:
            return torch.full_like(m, value)
        if self.start == "circle":
            return self.circle(f, m, size)
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(m.shape[1:], generator=generator).to(m).expand_as(m)

    def circle(self, f: Through, m: Saliency, size: tuple[int, int]) -> Saliency:
        """Return the smallest centered disc, its edge softened, that decides the game (supp. 2).

        p'(r) = (p(r) - p_full) / (p_orig - p_full), on hard discs: perturbed, p' < .01 (deletion), or kept, p' >= .99
        (preservation). Where p_orig = p_full but for rounding, everything is perturbed.
        """
        scale = math.hypot(*size) / math.hypot(SIDE, SIDE)
        D = discs(size, scale).to(m)
        p = self.tried(f, self.turn(D), len(m))
        orig, full = (p[:, :1], p[:, -1:]) if self.game == "deletion" else (p[:, -1:], p[:, :1])
        left = (p - full) / (orig - full)
        equal = torch.isclose(orig, full, rtol=100 * torch.finfo(p.dtype).eps, atol=0.0)
        decided = (left < 1 - DECIDED if self.game == "deletion" else left >= DECIDED) & ~equal
        r = decided.int().argmax(1)
        soft = resize(blur(D[r], EDGE * scale), (m.shape[2], m.shape[3]), "nearest")
        return torch.where(decided.any(1).view(-1, 1, 1, 1), self.turn(soft), torch.zeros_like(m))

    def tried(self, f: Through, masks: Saliency, count: int) -> Tensor:
        """Return the score of each of `count` images through each mask, `chunk` at a time."""
        pairs = torch.arange(count * len(masks), device=masks.device)
        with torch.no_grad():
            chunks = [pairs[start : start + self.chunk] for start in range(0, len(pairs), self.chunk)]
            values = [f(masks[some % len(masks)], some // len(masks)) for some in chunks]
        return torch.cat(values).view(count, len(masks))

    def descend(self, f: Through, m: Saliency, what: str) -> Saliency:
        """Return where Adam, clipped to [0, 1] after each step, brings each mask; `what` is masked.

        A mask that is not finite any more leaves the batch, and stays as it is.
        """
        m = m.clone()
        adam = torch.optim.Adam([m], lr=self.lr)
        for _ in range(self.steps):
            i = m.flatten(1).isfinite().all(1).nonzero()[:, 0]
            if len(i) == 0:
                break
            leaf = m[i].requires_grad_()
            score = derivative(GAMES[self.game] * f(leaf, i), leaf, what).to(m)
            (penalty,) = torch.autograd.grad(self.penalty(leaf), leaf)
            m.grad = torch.zeros_like(m).index_copy(0, i, score + penalty)
            adam.step()
            m.clamp_(0, 1)
        return m


def isotropic(dy: Tensor, dx: Tensor, beta: float) -> Tensor:
    """Return (dy^2 + dx^2)^(beta / 2); its derivative at zero is zero, also for beta < 2."""
    square = dy.square() + dx.square()
    moves = square > 0
    return torch.where(moves, torch.where(moves, square, 1).pow(beta / 2), 0)


def anisotropic(dy: Tensor, dx: Tensor, beta: float) -> Tensor:
    """Return |dy|^beta + |dx|^beta."""
    return dy.abs().pow(beta) + dx.abs().pow(beta)


VARIATIONS: Mapping[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "isotropic": isotropic,
    "anisotropic": anisotropic,
}


def total_variation(m: Saliency, beta: float, norm: Variation = "isotropic") -> Values:
    """Return sum_u |grad m(u)|^beta of each mask: forward differences, zero behind the last row and column."""
    dy = torch.diff(m, dim=2, append=m[:, :, -1:])
    dx = torch.diff(m, dim=3, append=m[..., -1:])
    return VARIATIONS[norm](dy, dx, beta).sum((1, 2, 3))


def discs(size: tuple[int, int], scale: float) -> Saliency:
    """Return the discs around the middle, by growing radius: the first is empty, the last covers everything.

    A pixel is inside where its center is nearer than the radius.
    """
    y, x = (torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in size)
    radii = scale * torch.tensor(RADII, dtype=torch.float64)
    return (torch.hypot(y[:, None], x) < radii.view(-1, 1, 1, 1)).double()


def settled(S: Saliency, a: Saliency, title: str) -> Saliency:
    """Return the maps S of the masks that show the importance a, within [0, 1], and warn of those that show nothing.

    A map whose mask is not finite is NaN everywhere, one whose mask is constant is exactly constant.
    """
    S = S.clamp(0, 1)
    for number, reason in enumerate(degenerate(a)):
        if reason is not None:
            S[number] = torch.nan if reason == "not finite" else a[number, 0, 0, 0]
            message = f"{title}: the mask of image {number} of {len(S)} ended {reason}; {ADVICE[reason]}"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
    return S
