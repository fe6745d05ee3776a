"""Types. The shapes of this library, named once.

b images, k classes, c channels of a layer, h w pixels, i j cells of a map. Images are float in [0, 1]; saliency is raw
and larger means more important.
"""

from collections.abc import Callable
from typing import TypeAlias

from jaxtyping import Float, Int
from torch import Tensor

Images: TypeAlias = Float[Tensor, "b ch h w"]
"""Images in [0, 1]; ch = 3, or 1 for a gray network."""

Labels: TypeAlias = Int[Tensor, " b"]
"""One class index an image."""

Logits: TypeAlias = Float[Tensor, "b k"]
"""Unnormalized scores, one a class."""

Values: TypeAlias = Float[Tensor, " b"]
"""One number an image."""

Features: TypeAlias = Float[Tensor, "b c i j"]
"""A layer's output on its spatial grid, channels first."""

Saliency: TypeAlias = Float[Tensor, "b 1 _i _j"]
"""A raw map at the method's own resolution; larger = more important."""

Score: TypeAlias = Callable[[Logits, Labels], Values]
"""What is explained: one differentiable number an image, from its logits and its label."""

Erase: TypeAlias = Callable[[Images, Saliency], Images]
"""The filling for what is removed: result = m * x + (1 - m) * erase(x, m)."""
