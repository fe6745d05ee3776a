"""Attention, read and followed: the formulas once more with loops, and the ways in which networks compute it."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from sightline.classifier import UnsuitedError, check_logits, log_probability, logit, wrap
from sightline.hooks import differentiable, frozen, substituted
from sightline.layers import Tokens
from sightline.methods import METHODS, generic_attention, raw_attention, rollout, transformer_attribution
from sightline.methods import _attention as attention
from sightline.methods import _transformer_attribution as tibav
from sightline.models import MiniViT

NAMES = ["raw_attention", "rollout", "generic_attention", "transformer_attribution"]
every_method = pytest.mark.parametrize("name", NAMES)


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, t):
        a = self.norm1(t)
        q, k, v = (f(a).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        t = t + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return t + self.down(F.gelu(self.up(self.norm2(t))))


class Tiny(nn.Module):
    """Two blocks of two heads: small enough for loops."""

    def __init__(self, width=6, classes=4, prefix=1):
        super().__init__()
        self.width, self.prefix = width, prefix
        self.embed = nn.Conv2d(3, width, 8, 8)
        self.others = nn.Parameter(torch.randn(1, prefix, width))
        self.blocks = nn.ModuleList(Block(width, 2) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        for name, parameter in self.named_parameters():
            if "blocks" in name and parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.8)

    def tokens(self, x):
        patches = self.embed(x).flatten(2).transpose(1, 2)
        return torch.cat([self.others.expand(len(x), -1, -1), patches], 1)

    def forward(self, x):
        t = self.tokens(x)
        for block in self.blocks:
            t = block(t)
        t = self.norm(t)
        return self.head(t[:, 0] if self.prefix else t.mean(1))


@pytest.fixture(scope="module")
def tiny(seeded):
    return wrap(seeded(Tiny, seed=1), normalization="none", size=(16, 24))


@pytest.fixture
def x():
    return torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.fixture
def y():
    return torch.tensor([3, 0, 1])


def by_hand(block, t, nudge=0):
    """Return what a block computes of the tokens (t, c) of one image, head by head and token by token."""
    a = block.norm1(t)
    q, k, v = block.q(a), block.k(a), block.v(a)
    d = t.shape[1] // block.heads
    A = torch.stack(
        [
            torch.stack(
                [
                    torch.stack([q[i, h * d : h * d + d] @ row / math.sqrt(d) for row in k[:, h * d : h * d + d]])
                    for i in range(len(t))
                ]
            ).softmax(1)
            for h in range(block.heads)
        ]
    )
    A = A + nudge
    mixed = torch.cat([A[h] @ v[:, h * d : h * d + d] for h in range(block.heads)], 1)
    shortcut = t + block.out(mixed)
    hidden = block.up(block.norm2(shortcut))
    grown = block.down(F.gelu(hidden))
    return {
        "t": t,
        "a": a,
        "q": q,
        "k": k,
        "v": v,
        "A": A,
        "mixed": mixed,
        "out": block.out(mixed),
        "sum": shortcut,
        "normed": block.norm2(shortcut),
        "gelu": F.gelu(hidden),
        "grown": grown,
        "end": shortcut + grown,
    }


def run_by_hand(model, image, nudges=(0, 0)):
    t, steps = model.tokens(image[None])[0], []
    for block, nudge in zip(model.blocks, nudges, strict=True):
        steps.append(by_hand(block, t, nudge))
        t = steps[-1]["end"]
    t = model.norm(t)
    return steps, model.head(t[0] if model.prefix else t.mean(0))


def matrices_by_hand(model, x):
    return [[step["A"] for step in run_by_hand(model, image)[0]] for image in x]


def on_grid(row):
    return row[1:].reshape(1, 1, 2, 3)


def test_the_network_by_hand_is_the_network(tiny, x):
    with torch.no_grad():
        assert_close(torch.stack([run_by_hand(tiny.model, image)[1] for image in x]), tiny(x))


def test_raw_attention_is_the_class_token_s_row_of_the_last_block_s_mean_head(tiny, x):
    with torch.no_grad():
        expected = torch.cat([on_grid(A[-1].mean(0)[0]) for A in matrices_by_hand(tiny.model, x)])
    assert_close(raw_attention(tiny, x), expected)


@pytest.mark.parametrize("fusion", ["mean", "max", "min"])
@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("discard", [0.0, 0.4])
def test_rollout_multiplies_attention_with_shortcuts_of_rows_that_sum_to_one(tiny, x, fusion, start, discard):
    fuse = {"mean": lambda A: A.mean(0), "max": lambda A: A.max(0)[0], "min": lambda A: A.min(0)[0]}[fusion]
    expected = []
    with torch.no_grad():
        for matrices in matrices_by_hand(tiny.model, x):
            row = None
            for A in matrices[start:][::-1]:
                N = fuse(A).clone()
                lowest = sorted((float(N[i, j]), i, j) for i in range(7) for j in range(7))[: int(discard * 49)]
                for _, i, j in lowest:
                    N[i, j] = N[i, j] if j == 0 else 0
                for i in range(7):
                    N[i] /= 2
                    N[i, i] += 0.5
                    N[i] /= N[i].sum()
                row = N[0] if row is None else torch.stack([sum(row[i] * N[i, j] for i in range(7)) for j in range(7)])
            expected.append(on_grid(row))
    assert_close(rollout(tiny, x, fusion=fusion, start=start, discard=discard), torch.cat(expected))


@pytest.mark.parametrize("score", [logit, log_probability])
def test_generic_attention_is_the_update_with_gradient_times_attention(tiny, x, y, score):
    expected = []
    for image, label in zip(x, y, strict=True):
        nudges = [torch.zeros(2, 7, 7, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        steps, logits = run_by_hand(tiny.model, image, nudges)
        gradients = torch.autograd.grad(score(logits[None], label[None]).sum(), nudges)
        R = torch.eye(7, dtype=torch.float64)
        for step, G in zip(steps, gradients, strict=True):
            mean = torch.stack([(G[h] * step["A"][h]).clamp(min=0) for h in range(2)]).mean(0)
            R = R + mean.detach() @ R
        expected.append(on_grid(R[0]))
    assert_close(generic_attention(tiny, x, y, score=score), torch.cat(expected))


# Relevance, rule by rule, with loops.


def linear_by_hand(x, w, R):
    """z+: the terms x_j w_ij >= 0 share R_i."""
    out = torch.zeros_like(x)
    for n in range(len(x)):
        for i in range(len(w)):
            terms = [max(float(x[n, j] * w[i, j]), 0.0) for j in range(x.shape[1])]
            for j, term in enumerate(terms):
                out[n, j] += term / sum(terms) * R[n, i] if sum(terms) else 0.0
    return out


def conserved(R_u, R_v, R):
    su, sv, s = float(R_u.sum()), float(R_v.sum()), float(R.sum())
    share = abs(su) / (abs(su) + abs(sv))
    return R_u * share * s / su, R_v * (1 - share) * s / sv


def sum_by_hand(u, v, R):
    return conserved(u / (u + v) * R, v / (u + v) * R, R)


def matmul_by_hand(u, v, R):
    """All heads of an image at once: the sums run over them."""
    R_u, R_v = torch.zeros_like(u), torch.zeros_like(v)
    f = u @ v
    for h in range(u.shape[0]):
        for i in range(u.shape[1]):
            for j in range(v.shape[2]):
                for k in range(u.shape[2]):
                    term = u[h, i, k] * v[h, k, j] / f[h, i, j] * R[h, i, j]
                    R_u[h, i, k] += term
                    R_v[h, k, j] += term
    return conserved(R_u, R_v, R)


def heads(z):
    return z.reshape(len(z), 2, -1).transpose(0, 1)


def joined(z):
    return z.transpose(0, 1).flatten(1)


def relevance_by_hand(model, image, label):
    """Return the relevance of each block's attention, and of the tokens below."""
    steps, _ = run_by_hand(model, image)
    last = model.norm(steps[-1]["end"])
    one_hot = torch.zeros(1, 4, dtype=torch.float64)
    one_hot[0, label] = 1
    R = torch.zeros_like(last)
    R[0] = linear_by_hand(last[:1], model.head.weight, one_hot)[0]
    found = []
    for block, s in zip(reversed(list(model.blocks)), reversed(steps), strict=True):
        R, R_grown = sum_by_hand(s["sum"], s["grown"], R)
        R_gelu = linear_by_hand(s["gelu"], block.down.weight, R_grown)
        R = R + linear_by_hand(s["normed"], block.up.weight, R_gelu)
        R, R_out = sum_by_hand(s["t"], s["out"], R)
        R_mixed = linear_by_hand(s["mixed"], block.out.weight, R_out)
        R_A, R_v = matmul_by_hand(s["A"], heads(s["v"]), heads(R_mixed))
        R_q, R_k = matmul_by_hand(heads(s["q"]), heads(s["k"]).transpose(1, 2), R_A)
        for layer, part in ((block.q, R_q), (block.k, R_k.transpose(1, 2)), (block.v, R_v)):
            R = R + linear_by_hand(s["a"], layer.weight, joined(part))
        found.insert(0, R_A)
    return found, R


@pytest.mark.parametrize("score", [logit, log_probability])
def test_transformer_attribution_is_the_rules_with_loops(tiny, x, y, score):
    expected = []
    for image, label in zip(x, y, strict=True):
        nudges = [torch.zeros(2, 7, 7, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        logits = run_by_hand(tiny.model, image, nudges)[1]
        G = torch.autograd.grad(score(logits[None], label[None]).sum(), nudges)
        with torch.no_grad():
            R = relevance_by_hand(tiny.model, image, label)[0]
        C = torch.eye(7, dtype=torch.float64)
        for g, r in zip(G, R, strict=True):
            C = (torch.eye(7, dtype=torch.float64) + (g * r).clamp(min=0).mean(0)) @ C
        expected.append(on_grid(C[0]))
    assert_close(transformer_attribution(tiny, x, y, score=score), torch.cat(expected), rtol=1e-7, atol=1e-12)


def relevance(f, R, *inputs):
    """Return the relevance of the inputs when that of f's output is R."""
    images = tibav.Relevances(len(inputs[0]))
    leaves = [one.detach().clone().requires_grad_() for one in inputs]
    with differentiable(), substituted(tibav.rules_of(images)):
        output = f(*leaves)
    with images.flowing():
        return torch.autograd.grad(output, leaves, R)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def per_image(R):
    return R.flatten(1).sum(1)


def quickgelu(x):
    return x * torch.sigmoid(1.702 * x)


W = normal(9, 20, seed=5)
KEEPING = {
    "linear": (lambda x: F.linear(x, W, torch.ones(9, dtype=torch.float64)), ((3, 4, 20),), (3, 4, 9)),
    "linear by keyword": (lambda x: F.linear(input=x, weight=W), ((3, 4, 20),), (3, 4, 9)),
    "matmul with weights": (lambda x: x @ W.T, ((3, 4, 20),), (3, 4, 9)),
    "weights first": (lambda x: torch.matmul(W, x), ((3, 20, 4),), (3, 9, 4)),
    "mean": (lambda x: x.mean(1), ((3, 20, 9),), (3, 9)),
    "sum": (lambda x: torch.sum(x, 1), ((3, 20, 9),), (3, 9)),
    "pooling": (lambda x: nn.AdaptiveAvgPool1d(1)(x), ((3, 9, 20),), (3, 9, 1)),
    "shortcut": (lambda u, v: u + v, ((3, 4, 9), (3, 4, 9)), (3, 4, 9)),
    "in place": (lambda u, v: u.clone().add_(v), ((3, 4, 9), (3, 4, 9)), (3, 4, 9)),
    "difference": (lambda u, v: u - v, ((3, 4, 9), (3, 4, 9)), (3, 4, 9)),
    "broadcast": (lambda u, v: u + v, ((3, 4, 9), (3, 1, 9)), (3, 4, 9)),
    "gate": (lambda u, v: u * v, ((3, 4, 9), (3, 4, 9)), (3, 4, 9)),
    "matmul": (lambda u, v: u @ v, ((3, 2, 4, 9), (3, 2, 9, 5)), (3, 2, 4, 5)),
    "bmm": (torch.bmm, ((3, 4, 9), (3, 9, 5)), (3, 4, 5)),
    "einsum": (lambda u, v: torch.einsum("bik,bjk->bij", u, v), ((3, 4, 9), (3, 5, 9)), (3, 4, 5)),
    "softmax": (lambda x: x.softmax(-1), ((3, 4, 9),), (3, 4, 9)),
    "layer norm": (lambda x: F.layer_norm(x, (9,)), ((3, 4, 9),), (3, 4, 9)),
    "rms norm": (lambda x: F.rms_norm(x, (9,)), ((3, 4, 9),), (3, 4, 9)),
    "gelu": (nn.GELU(), ((3, 4, 9),), (3, 4, 9)),
    "quick gelu": (quickgelu, ((3, 4, 9),), (3, 4, 9)),
    "constants": (lambda x: -(3 * x / 7 + W[0, :9]) * W[1, :9], ((3, 4, 9),), (3, 4, 9)),
    "spread constants": (lambda x: x + W[:4, :9], ((3, 1, 9),), (3, 4, 9)),
    "moves": (lambda x: torch.cat([x[:, 1:], x[:, :1]], 1).transpose(1, 2).reshape(3, 4, 9), ((3, 4, 9),), (3, 4, 9)),
    "attention": (F.scaled_dot_product_attention, ((3, 2, 4, 9), (3, 2, 5, 9), (3, 2, 5, 9)), (3, 2, 4, 9)),
}


@pytest.mark.parametrize("name", [name for name in KEEPING if name != "attention"])
def test_a_rule_keeps_the_sum_of_each_image_s_relevance(name):
    f, shapes, shape = KEEPING[name]
    R = normal(*shape, seed=1)
    shares = relevance(f, R, *(normal(*one, seed=2 + n) for n, one in enumerate(shapes)))
    assert_close(sum(map(per_image, shares)), per_image(R), rtol=1e-9, atol=1e-9)


def test_a_linear_layer_shares_among_its_positive_terms_alone():
    x, R = normal(2, 20), normal(2, 9, seed=1)
    assert_close(relevance(lambda x: F.linear(x, W, W[:, 0]), R, x)[0], linear_by_hand(x, W, R))
    (mean,) = relevance(lambda x: x.mean(1), torch.ones(1, dtype=torch.float64), torch.tensor([[1.0, -5, 3]]).double())
    assert_close(mean, torch.tensor([[0.25, 0, 0.75]]).double())


def test_sums_and_products_share_by_contribution():
    u, v, R = normal(1, 3, 5), normal(1, 3, 5, seed=1), normal(1, 3, 5, seed=2)
    for share, expected in zip(relevance(torch.add, R, u, v), sum_by_hand(u, v, R), strict=True):
        assert_close(share, expected)
    u, v = normal(1, 2, 3, 4), normal(1, 2, 4, 5, seed=1)
    R = normal(1, 2, 3, 5, seed=2)
    for share, expected in zip(relevance(torch.matmul, R, u, v), matmul_by_hand(u[0], v[0], R[0]), strict=True):
        assert_close(share[0], expected)
        assert_close(share.sum(), R.sum() / 2)


def test_relevance_is_absorbed_where_no_term_is_positive_and_where_the_sum_is_zero():
    down = -torch.ones(1, 3, dtype=torch.float64)
    assert relevance(lambda x: F.linear(x, down), torch.ones(1, 1).double(), -down)[0].tolist() == [[0, 0, 0]]
    shares = relevance(torch.add, torch.ones(1, 3).double(), down, -down)
    assert [share.tolist() for share in shares] == [[[0, 0, 0]]] * 2


def test_whole_blocks_keep_the_sum_of_each_image_s_relevance(seeded):
    model = seeded(Tiny, 32, seed=3)

    def blocks(t):
        for block in model.blocks:
            q = block.norm1(t)
            q, k, v = (f(q).unflatten(-1, (2, -1)).transpose(1, 2) for f in (block.q, block.k, block.v))
            mixed = (q @ k.transpose(-1, -2) * 0.25).softmax(-1) @ v
            t = t + block.out(mixed.transpose(1, 2).flatten(2))
            t = t + block.down(F.gelu(block.up(block.norm2(t))))
        return model.norm(t)

    R = normal(3, 7, 32, seed=1)
    with frozen(model):
        (found,) = relevance(blocks, R, normal(3, 7, 32))
    assert_close(per_image(found), per_image(R), rtol=1e-9, atol=1e-9)


def test_gradients_are_ordinary_beside_relevance(tiny, x, y):
    with differentiable(), frozen(tiny.model):
        plain = attention.read(tiny, x)
        ruled = attention.read(tiny, x.clone().requires_grad_(), tibav.rules_of(tibav.Relevances(3)))
        pairs = zip(plain.gradients(logit(plain.logits, y)), ruled.gradients(logit(ruled.logits, y)), strict=True)
        for a, b in pairs:
            assert_close(a, b)
    assert_close(plain.logits, ruled.logits)


# Networks.


def encoder(batch_first, norm_first=True):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Conv2d(3, 16, 8, 8)
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first, norm_first=norm_first)
            self.blocks = nn.ModuleList([layer, nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first)])
            self.head = nn.Linear(16, 5)

        def forward(self, x):
            t = self.embed(x).flatten(2).permute(*((0, 2, 1) if batch_first else (2, 0, 1)))
            for block in self.blocks:
                t = block(t)
            return self.head(t.mean(1 if batch_first else 0))

    return Encoder


def torchvision_vit():
    from torchvision.models import VisionTransformer

    model = VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5)
    nn.init.normal_(model.heads.head.weight)
    return model


def timm_vit(**settings):
    timm = pytest.importorskip("timm")
    model = timm.models.vision_transformer.VisionTransformer(
        32, 8, embed_dim=16, depth=2, num_heads=2, num_classes=5, **settings
    )
    return lively(model)


def timm_distilled():
    timm = pytest.importorskip("timm")
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    return lively(timm.models.deit.VisionTransformerDistilled(**settings))


def lively(model):
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def hugging_face(name, implementation):
    def make():
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = getattr(transformers, f"{name}Config")(**sizes, image_size=32, patch_size=8, num_labels=5)
        config._attn_implementation = implementation
        return lively(getattr(transformers, f"{name}ForImageClassification")(config))

    return make


ZOO = {
    "mini": (lambda: lively(MiniViT(5, size=32, dim=12, depth=2)), 1, (0,)),
    "torchvision": (torchvision_vit, 1, (0,)),
    "timm": (timm_vit, 1, (0,)),
    "timm, layer scale and key norm": (lambda: timm_vit(init_values=0.1, qk_norm=True), 1, (0,)),
    "timm, registers": (lambda: timm_vit(reg_tokens=2), 3, (0,)),
    "timm, registers and mean": (
        lambda: timm_vit(reg_tokens=2, class_token=False, no_embed_class=True, global_pool="avg"),
        2,
        tuple(range(2, 18)),
    ),
    "timm, distilled": (timm_distilled, 2, (0, 1)),
    "encoder": (encoder(True), 0, tuple(range(16))),
    "encoder, tokens first": (encoder(False), 0, tuple(range(16))),
    "hf sdpa": (hugging_face("ViT", "sdpa"), 1, (0,)),
    "hf eager": (hugging_face("ViT", "eager"), 1, (0,)),
    "hf deit": (hugging_face("DeiT", "sdpa"), 2, (0,)),
}
every_network = pytest.mark.parametrize("network", ZOO)


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


@pytest.fixture
def built(seeded):
    return lambda make: wrap(seeded(make, seed=6), normalization="none", size=32)


@every_network
def test_reading_changes_no_logits_and_finds_tokens_and_rows(network, built, images):
    make, prefix, rows = ZOO[network]
    classifier = built(make)
    with differentiable(), frozen(classifier.model):
        seen = attention.read(classifier, images)
    with torch.no_grad():
        assert_close(seen.logits, classifier(images), rtol=1e-6 if "eager" in network else 1e-12, atol=1e-12)
    assert seen.tokens == Tokens(prefix, (8, 8))
    assert seen.rows == rows
    assert [A.shape for A in seen.blocks] == [(2, len(seen.blocks[0][0]), 16 + prefix, 16 + prefix)] * 2


@every_network
@every_method
def test_a_network_is_explained_and_left_as_it_was(network, name, built, images, trace, plain):
    classifier = built(ZOO[network][0])
    values = [{**vars(module)} for module in classifier.model.modules()]
    changed = trace(classifier.model, images)
    saliency = METHODS[name](classifier, images)
    assert changed() == []
    assert all(
        before[key] is after
        for before, module in zip(values, classifier.model.modules(), strict=True)
        for key, after in vars(module).items()
    )
    assert saliency.shape == (2, 1, 4, 4)
    assert (saliency >= 0).all()
    assert (saliency.amax((1, 2, 3)) > saliency.amin((1, 2, 3))).all()
    alone = torch.cat([METHODS[name](classifier, images[i : i + 1]) for i in range(2)])
    assert_close(saliency, alone, rtol=1e-6, atol=1e-9)


@every_method
def test_fused_and_explicit_attention_of_timm_give_the_same(name, built, images):
    classifier = built(timm_vit)
    fused = METHODS[name](classifier, images)
    assert all(block.attn.fused_attn for block in classifier.model.blocks)
    for block in classifier.model.blocks:
        block.attn.fused_attn = False
    assert_close(METHODS[name](classifier, images), fused, rtol=1e-7, atol=1e-12)


@every_method
def test_fused_and_explicit_attention_of_hugging_face_give_the_same(name, built, images):
    """Eager attention takes its softmax in float32."""
    y = torch.tensor([1, 2])
    fused, eager = (METHODS[name](built(hugging_face("ViT", kind)), images, y) for kind in ("sdpa", "eager"))
    assert_close(fused, eager, rtol=2e-3, atol=1e-6)


@every_method
def test_tokens_first_or_images_first_is_the_same_even_with_as_many_images_as_tokens(name, seeded):
    images = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def built(make):
        return wrap(seeded(make, seed=6), normalization="none", size=16)

    first, second = (built(encoder(batch_first)) for batch_first in (True, False))
    saliency = METHODS[name](first, images)
    assert_close(METHODS[name](second, images), saliency, rtol=1e-7, atol=1e-12)
    assert_close(METHODS[name](first, images[1:3]), saliency[1:3], rtol=1e-7, atol=1e-12)


@every_method
def test_folded_heads_are_unfolded(name, built, images):
    class Folded(MiniViT):
        pass

    def fold(attention, x):
        q, k, v = attention.qkv(x).unflatten(-1, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2)
        weights = torch.softmax(torch.bmm(q, k.transpose(1, 2)) * q.shape[-1] ** -0.5, dim=-1)
        mixed = torch.bmm(weights, v).unflatten(0, (-1, attention.heads))
        return attention.project(mixed.transpose(1, 2).flatten(2))

    expected = METHODS[name](built(ZOO["mini"][0]), images)
    folded = built(ZOO["mini"][0])
    for block in folded.model.blocks:
        block.attention.forward = fold.__get__(block.attention)
    assert_close(METHODS[name](folded, images), expected, rtol=1e-7, atol=1e-12)


def test_multi_head_attention_is_torch_s_with_masks_and_separate_widths(seeded):
    module = seeded(nn.MultiheadAttention, 8, 2, batch_first=True)
    separate = seeded(nn.MultiheadAttention, 8, 2, kdim=5, vdim=3, bias=False)
    q, hidden = normal(3, 4, 8), torch.zeros(3, 4, dtype=torch.bool)
    hidden[0, 2:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    calls = [
        lambda: module(q, q, q),
        lambda: module(q, q, q, need_weights=False),
        lambda: module(q, q, q, average_attn_weights=False),
        lambda: module(q, q, q, attn_mask=causal, is_causal=True, need_weights=False),
        lambda: module(q, q, q, attn_mask=causal.isinf(), key_padding_mask=hidden),
        lambda: module(q, q, q, attn_mask=causal.expand(6, 4, 4) * 0.5, need_weights=False),
        lambda: separate(q, normal(5, 4, 5), normal(5, 4, 3)),
    ]
    for call in calls:
        with torch.no_grad():
            expected, weights = call()
        with attention.watched({}) as found:
            output, explicit = call()
        assert_close(output, expected)
        assert len(found) == 1
        assert (weights is None) == (explicit is None)
        if weights is not None:
            assert_close(explicit, weights)


def test_scaled_dot_product_attention_is_torch_s():
    q, k, v = (normal(2, 4, 5, 6, seed=n) for n in range(3))
    for settings in (
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": normal(5, 5, seed=4)},
        {"attn_mask": normal(2, 1, 5, 5, seed=4) > -1},
    ):
        with attention.watched({}) as found:
            explicit = F.scaled_dot_product_attention(q, k, v, **settings)
        assert_close(explicit, F.scaled_dot_product_attention(q, k, v, **settings))
        assert found[0].shape == (2, 4, 5, 5)
    grouped = F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True)
    assert_close(attention.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True), grouped)


def test_other_softmaxes_are_no_attention(built, images):
    class Gated(MiniViT):
        def forward(self, x):
            t = self.tokens(x)
            t = t * F.softmax(t, 1) * 17 + 0 * F.softmax(t, -1)
            t = t * torch.softmax(torch.ones(len(t), 2, 17, 17, dtype=t.dtype), dim=1).mean()
            return self.head(self.norm(self.blocks(t))[:, 0]).softmax(1)

    classifier = built(lambda: lively(Gated(5, size=32, dim=12, depth=2)))
    with differentiable(), frozen(classifier.model):
        assert len(attention.read(classifier, images).matrices) == 2


def test_rows_without_a_gradient_are_the_first_or_all(built, images):
    for network, rows in (("mini", (0,)), ("timm, registers and mean", (0,)), ("encoder", tuple(range(16)))):
        classifier = built(ZOO[network][0])
        nn.init.zeros_(classifier.model.head.weight)
        with differentiable(), frozen(classifier.model):
            assert attention.read(classifier, images).rows == rows


def test_the_mean_row_of_mean_pooled_networks_leaves_the_shortcut_out(built, images):
    classifier = built(encoder(True))
    with differentiable(), frozen(classifier.model):
        seen = attention.read(classifier, images)
        G = seen.gradients(logit(seen.logits, torch.tensor([1, 1])))
    first, second = ((g * A).relu().mean(1) for g, A in zip(G, seen.blocks, strict=True))
    eye = torch.eye(16, dtype=torch.float64)
    expected = ((eye + second) @ (eye + first) - eye).mean(1).view(2, 1, 4, 4)
    assert_close(generic_attention(classifier, images, torch.tensor([1, 1])), expected)


def test_in_place_shortcuts_are_shortcuts(seeded, x, y):
    class InPlace(Tiny):
        def forward(self, x):
            t = self.tokens(x)
            for block in self.blocks:
                old = t
                t = t.clone()
                a = block.norm1(old)
                q, k, v = (f(a).unflatten(-1, (2, -1)).transpose(1, 2) for f in (block.q, block.k, block.v))
                t += block.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
                rest = block.down(F.gelu(block.up(block.norm2(t))))
                rest += t
                rest *= 1.0
                t = rest
            return self.head(self.norm(t)[:, 0])

    inside, beside = (wrap(seeded(c, seed=1), normalization="none", size=(16, 24)) for c in (InPlace, Tiny))
    assert_close(transformer_attribution(inside, x, y), transformer_attribution(beside, x, y))


# What cannot be explained.


@every_method
def test_a_network_without_attention_is_refused(name, pooled, x):
    with pytest.raises(ValueError, match=r"Pooled computes no attention: no softmax over tokens .* use grad_cam"):
        METHODS[name](pooled, x)


@every_method
def test_windows_are_refused(name, built, images):
    from torchvision.models.swin_transformer import SwinTransformer

    swin = built(lambda: SwinTransformer([2, 2], 8, [1, 1], [1, 1], [4, 4], num_classes=5))
    with pytest.raises(
        ValueError, match=r"SwinTransformer has shapes \(32, 1, 16, 16\).* for 2 images; .* use grad_cam"
    ):
        METHODS[name](swin, images)


@every_method
def test_attention_pooling_is_refused(name, built, images):
    classifier = built(lambda: timm_vit(class_token=False, global_pool="map"))
    with pytest.raises(
        ValueError, match=r"shapes \(2, 2, 16, 16\), \(2, 2, 1, 16\) .* \(windows and attention pooling"
    ):
        METHODS[name](classifier, images)


class Rows(nn.Module):
    """Its tokens are rows of pixels: no convolution tells how they lie."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(96, 8), nn.Linear(8, 5)

    def forward(self, x):
        t = self.embed(x.transpose(1, 2).flatten(2))
        return self.head(F.scaled_dot_product_attention(t, t, t).mean(1))


@every_method
def test_the_classifier_s_own_grid_counts(name, seeded, pooled, images):
    rows = replace(pooled, model=seeded(Rows), to_grid=Tokens(0, (1, 32)))
    assert METHODS[name](rows, images).shape == (2, 1, 32, 1)


@every_method
def test_tokens_that_are_no_grid_are_refused(name, seeded, pooled, images, plain):
    classifier = replace(pooled, model=seeded(Rows))
    with pytest.raises(ValueError, match="over 32 tokens, which are no grid of patches on 32 x 32 images; use "):
        METHODS[name](classifier, images)


def test_functions_without_a_rule_are_named(seeded, x):
    class Odd(Tiny):
        def forward(self, x):
            t = torch.sin(self.tokens(x))
            for block in self.blocks:
                t = torch.cosh(torch.atan(block(t)))
            return self.head(self.norm(t)[:, 0])

    odd = wrap(seeded(Odd), normalization="none", size=(16, 24))
    with pytest.raises(ValueError, match=r"Odd uses Atan, Cosh between .* use generic_attention or rollout"):
        transformer_attribution(odd, x)
    assert generic_attention(odd, x).isfinite().all()


def test_weights_that_depend_on_the_image_have_no_rule(seeded, x):
    class Dynamic(Tiny):
        def forward(self, x):
            logits = super().forward(x)
            return F.linear(logits, torch.outer(logits[0], logits[0]))

    with pytest.raises(ValueError, match=r"Dynamic uses (.*, )?Mm"):
        transformer_attribution(wrap(seeded(Dynamic), normalization="none", size=(16, 24)), x)


def test_attention_without_a_batch_dimension_is_refused(seeded, plain):
    module = seeded(nn.MultiheadAttention, 8, 2)
    with (
        attention.watched({}),
        pytest.raises(ValueError, match="without a batch dimension is not from tokens to tokens"),
    ):
        module(normal(4, 8), normal(4, 8), normal(4, 8))


@pytest.mark.parametrize("settings", [{"add_zero_attn": True}, {"add_bias_kv": True}])
def test_keys_that_are_no_tokens_are_refused(settings, seeded, plain):
    module = seeded(nn.MultiheadAttention, 8, 2, **settings)
    with attention.watched({}), pytest.raises(ValueError, match=r"with (bias_k and bias_v|add_zero_attn) is not from"):
        module(normal(4, 3, 8), normal(4, 3, 8), normal(4, 3, 8))


def test_bad_settings_are_refused(tiny, x, plain):
    for discard in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"expected 0 <= discard < 1, .* got {discard}"):
            rollout(tiny, x, discard=discard)
    for start in (-1, 2):
        with pytest.raises(ValueError, match=f"expected 0 <= start < 2, the number of blocks, got {start}"):
            rollout(tiny, x, start=start)
    with pytest.raises(LookupError, match="no fusion called 'maximum'; did you mean max"):
        rollout(tiny, x, fusion="maximum")


@every_method
def test_wrong_labels_are_an_error_even_where_they_change_nothing(name, tiny, x, plain):
    with pytest.raises(ValueError, match=r"label 4 is outside 0\.\.3"):
        METHODS[name](tiny, x, torch.tensor([0, 4, 1]))


def test_one_output_is_two_classes(seeded, x):
    classifier = wrap(seeded(Tiny, classes=1, seed=1), normalization="none", size=(16, 24))
    for label in (0, 1):
        saliency = transformer_attribution(classifier, x, torch.full((3,), label))
        assert bool(saliency.any()) == (label == 1)
    assert check_logits(classifier(x), 3, "Tiny").shape == (3, 2)


def test_relevance_in_half_precision_is_refused(tokens, x):
    half = replace(tokens, model=tokens.model.bfloat16())
    with pytest.raises(
        UnsuitedError, match=r"computes in torch\.bfloat16, too coarse .*; call model\.float\(\), or use"
    ):
        transformer_attribution(half, x.bfloat16())
    assert generic_attention(half, x.bfloat16()).isfinite().all()
