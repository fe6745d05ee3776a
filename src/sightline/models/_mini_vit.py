"""MiniViT. A vision transformer of 2.7 M parameters: patches of 8 pixels, width 192, six blocks, three heads.

After Dosovitskiy et al.: An image is worth 16x16 words. ICLR 2021. *Differs:* positions are stored as a grid and
interpolated to the grid of the input; the class token has no position of its own, since it would only be added to it.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sightline.classifier import Classifier, wrap
from sightline.models._mini_resnet import CENTERED, seeded
from sightline.types import Images, Logits


class MiniViT(nn.Module):
    """Patch embedding, a class token, pre-norm blocks, a last norm and a linear layer on the class token.

    `size` is the side of the images for which the positions are stored; other sizes, also non-square ones, work.

    Raises:
        ValueError: a width that the heads do not divide.
    """

    def __init__(
        self,
        classes: int = 20,
        *,
        channels: int = 3,
        size: int = 64,
        patch: int = 8,
        dim: int = 192,
        depth: int = 6,
        heads: int = 3,
    ) -> None:
        super().__init__()
        self.taps: tuple[str, ...] = tuple(f"blocks.{n}.norm1" for n in range(depth))
        self.patch_embed = nn.Conv2d(channels, dim, patch, patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, dim))
        self.positions = nn.Parameter(torch.empty(1, dim, size // patch, size // patch))
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)
        self.apply(initialize)
        for parameter in (self.class_token, self.positions):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, x: Images) -> Logits:
        """Return logits (b, classes).

        Raises:
            ValueError: a height or width that is no multiple of the patch.
        """
        logits: Tensor = self.head(self.norm(self.blocks(self.tokens(x)))[:, 0])
        return logits

    def tokens(self, x: Images) -> Float[Tensor, "b t d"]:
        """Return the class token and, row by row, the patches with their positions added.

        Raises:
            ValueError: a height or width that is no multiple of the patch.
        """
        patch = self.patch_embed.kernel_size[0]
        if x.shape[-2] % patch or x.shape[-1] % patch:
            raise ValueError(
                f"expected a height and width divisible by {patch}, got {tuple(x.shape[-2:])}; resize the images"
            )
        a = self.patch_embed(x)
        a = (a + at_grid(self.positions, a.shape[-2:])).flatten(2).transpose(1, 2)
        return torch.cat([self.class_token.expand(len(a), -1, -1), a], dim=1)


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each behind a layer norm and beside a shortcut."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """Return tokens of the same shape."""
        x = x + self.attention(self.norm1(x))
        tokens: Tensor = x + self.mlp(self.norm2(x))
        return tokens


class Attention(nn.Module):
    """Softmax(q k^T / sqrt(d)) v for each head; a hook on `probabilities` sees the matrix (b, heads, t, t)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"expected a width that {heads} heads divide, got {dim}")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.probabilities = nn.Softmax(dim=-1)
        self.project = nn.Linear(dim, dim)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """Return tokens of the same shape."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = self.probabilities(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5)
        mixed: Tensor = self.project((weights @ v).transpose(1, 2).flatten(2))
        return mixed


def at_grid(positions: Float[Tensor, "1 d i j"], grid: torch.Size) -> Float[Tensor, "1 d _i _j"]:
    """Interpolate stored positions (bicubic) to another grid."""
    if positions.shape[-2:] == grid:
        return positions
    return F.interpolate(positions, size=tuple(grid), mode="bicubic", align_corners=False)


def initialize(module: nn.Module) -> None:
    """Draw a linear layer's weights from a normal of 0.02 cut at 2; a patch embedding's as He et al. (fan in)."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear")


def mini_vit(
    classes: int = 20,
    *,
    channels: int = 3,
    patch: int = 8,
    dim: int = 192,
    depth: int = 6,
    heads: int = 3,
    size: int = 64,
    layer: str | None = None,
    seed: int = 0,
) -> Classifier:
    """Return a classifier over a MiniViT with random weights."""
    with seeded(seed):
        model = MiniViT(classes, channels=channels, size=size, patch=patch, dim=dim, depth=depth, heads=heads)
    return wrap(model, layer=layer, normalization=CENTERED, size=size)
