"""Occlusion and variable occlusion: slow loops, known answers, and captum where it does the same."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from sightline import erase as fillings
from sightline.classifier import Classifier, log_probability, logit
from sightline.maps import peak, scale
from sightline.methods import occlusion, variable_occlusion
from sightline.methods._occlusion import disc, layout, placed, spread, starts
from sightline.methods._variable_occlusion import (
    COCO,
    Discs,
    draw,
    fit,
    of_boxes,
    of_instances,
    smallest,
    smallest_disc,
    soft,
)

Y = torch.tensor([3, 0, 4])


class Calls(nn.Module):
    """Counts the images it is shown."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.sizes = inner, []

    def forward(self, x):
        self.sizes.append(len(x))
        return self.inner(x)


class Linear(nn.Module):
    """Class 0 is a weighted sum of the image, class 1 nothing."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        z = (x * self.weight).sum((1, 2, 3))
        return torch.stack([z, 0 * z], 1)


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(weight):
    return Classifier(Linear(weight), "", size=tuple(weight.shape[1:]))


def read(classifier, image, label):
    with torch.no_grad():
        return float(classifier(image[None])[0, label])


def slow_soft(inside, h, w, sigma):
    """Smooth the indicator `inside(row, column)`, known beyond the border too, with a Gaussian cut at ceil(4 sigma)."""
    reach = math.ceil(4 * sigma)
    g = [math.exp(-(d**2) / (2 * sigma**2)) if sigma else 1.0 for d in range(-reach, reach + 1)]
    mask = torch.zeros(h, w, dtype=torch.float64)
    for i in range(h):
        for j in range(w):
            for a in range(-reach, reach + 1):
                for b in range(-reach, reach + 1):
                    if inside(i + a, j + b):
                        mask[i, j] += g[a + reach] * g[b + reach] / sum(g) ** 2
    return mask


def slow_masks(h, w, size, grid, shape, soften):
    """Return the masks of all patches, row by row."""
    ratio = math.sqrt(h * w) / 224
    side = max(1, round(size * ratio))
    masks = []
    for p in range(grid):
        for q in range(grid):
            down, across = (p + 0.5) * h / grid - side / 2, (q + 0.5) * w / grid - side / 2
            top, left = (next(n for n in range(-99, 99) if n + 0.5 >= first - 1e-9) for first in (down, across))

            def inside(i, j, top=top, left=left):
                if not (0 <= i - top < side and 0 <= j - left < side):
                    return False
                away = math.hypot(i - top - (side - 1) / 2, j - left - (side - 1) / 2)
                return shape == "square" or away <= side / 2

            masks.append(slow_soft(inside, h, w, soften * ratio if shape == "disc" else 0.0))
    return masks


def slow_occlusion(classifier, image, label, masks, filling):
    """Return the average loss of the patches over each pixel, weighted by how much they hide it."""
    lost, cover = torch.zeros_like(image[0]), torch.zeros_like(image[0])
    for mask in masks:
        change = read(classifier, image, label) - read(classifier, (1 - mask) * image + mask * filling, label)
        lost += change * mask
        cover += mask
    return lost / cover


SETTINGS = [
    {"size": 47.0, "grid": 7, "erase": "mean"},
    {"size": 60.0, "grid": 5, "erase": "blur"},
    {"size": 40.0, "grid": 16, "erase": "black"},
    {"size": 70.0, "grid": 4, "shape": "disc", "soften": 8.0, "erase": "blur"},
]


@pytest.mark.parametrize("chosen", SETTINGS, ids=str)
def test_occlusion_is_slow_loops(chosen, curved):
    h, w = (13, 19) if chosen["grid"] < 16 else (10, 12)
    x, y = noise(2, 3, h, w), torch.tensor([2, 0])
    whole = {"shape": "square", "soften": 10.0, **chosen}
    masks = slow_masks(h, w, *(whole[name] for name in ("size", "grid", "shape", "soften")))
    saliency = occlusion(curved, x, y, **chosen)
    assert saliency.shape == (2, 1, h, w)
    for n in range(2):
        filling = fillings.resolve(chosen["erase"], curved.mean)(x[n : n + 1], x[n : n + 1, :1])[0]
        expected = slow_occlusion(curved, x[n], int(y[n]), masks, filling)
        torch.testing.assert_close(saliency[n, 0], expected, rtol=0, atol=1e-9)


def test_the_defaults_are_the_papers(pooled, x):
    written = occlusion(
        pooled, x, Y, size=35.0, grid=28, shape="square", soften=10.0, score=logit, erase="mean", chunk=64
    )
    assert torch.equal(occlusion(pooled, x, Y), written)


def test_windows_side_by_side_are_captums(curved):
    attr = pytest.importorskip("captum.attr")
    x = noise(3, 3, 24, 24, seed=3)
    window = {"sliding_window_shapes": (3, 4, 4), "strides": (3, 4, 4)}
    color = torch.tensor(curved.mean).double().view(1, 3, 1, 1).expand(1, 3, 24, 24)
    with torch.no_grad():
        theirs = attr.Occlusion(curved).attribute(x, target=Y, baselines=color, **window)
    ours = occlusion(curved, x, Y, size=4 * 224 / 24, grid=6)
    torch.testing.assert_close(ours.expand(-1, 3, -1, -1).float(), theirs, rtol=0, atol=1e-6)


def test_single_pixels_of_a_linear_network_are_input_times_weight():
    weight, x = normal(3, 8, 8), noise(2, 3, 8, 8, seed=1)
    saliency = occlusion(linear(weight), x, torch.tensor([0, 0]), size=1.0, grid=8, erase="black")
    torch.testing.assert_close(saliency, (x * weight).sum(1, keepdim=True), rtol=0, atol=1e-12)


def test_one_patch_over_everything_is_the_whole_loss_everywhere():
    weight, x = normal(3, 6, 6), noise(1, 3, 6, 6, seed=2)
    saliency = occlusion(linear(weight), x, torch.tensor([0]), size=448.0, grid=1, erase="black")
    torch.testing.assert_close(saliency, (x * weight).sum().expand(1, 1, 6, 6), rtol=0, atol=1e-12)


def test_at_224_pixels_there_are_28_squares_of_35_in_steps_of_8():
    first = starts(224, 35, 28)
    assert first.tolist() == [8 * k - 14 for k in range(28)]
    P, rows, columns = layout((224, 224), 35.0, 28, "square", 10.0, torch.zeros(1, dtype=torch.float64))
    cover = spread(torch.ones(1, 28, 28, dtype=torch.float64), P, rows, columns)[0, 0]
    across = [sum(8 * k - 14 <= u < 8 * k + 21 for k in range(28)) for u in range(224)]
    assert torch.equal(cover, torch.tensor(across).double().outer(torch.tensor(across).double()))
    assert placed(P, rows, columns)(torch.tensor([5 * 28 + 9])).sum() == 35**2


def test_the_weighted_sum_of_patches_is_that_of_their_masks():
    P, rows, columns = layout((9, 12), 60.0, 5, "disc", 9.0, torch.zeros(1, dtype=torch.float64))
    values = normal(2, 5, 5)
    expected = torch.einsum("bk,kchw->bchw", values.flatten(1), placed(P, rows, columns)(torch.arange(25)))
    torch.testing.assert_close(spread(values, P, rows, columns), expected, rtol=0, atol=1e-12)


def test_a_disc_is_round():
    for side in (1, 2, 5, 8, 35):
        one = disc(side, torch.zeros(1, dtype=torch.float64))
        assert torch.equal(one, one.T)
        assert torch.equal(one, one.flip(0))
        assert abs(float(one.sum()) - math.pi * side**2 / 4) < max(1.5, 0.1 * side**1.5)


def test_soft_discs_hide_half_at_their_edge_and_squares_stay_hard():
    like = torch.zeros(1, dtype=torch.float64)
    P, rows, columns = layout((224, 224), 120.0, 1, "disc", 10.0, like)
    mask = placed(P, rows, columns)(torch.tensor([0]))[0, 0]
    assert mask[112, 112] > 0.999
    assert 0.4 < mask[112, 112 + 60] < 0.5, "the edge is curved outward"
    assert mask[112, 112 + 95] < 0.01
    P, rows, columns = layout((224, 224), 120.0, 1, "square", 10.0, like)
    assert set(placed(P, rows, columns)(torch.tensor([0])).unique().tolist()) == {0.0, 1.0}


def test_what_the_network_does_not_see_gets_zero_and_offsets_do_not_count(pooled, x):
    blind = linear(torch.zeros(3, 24, 32, dtype=torch.float64))
    assert torch.equal(occlusion(blind, x, 0 * Y, grid=8), torch.zeros(3, 1, 24, 32, dtype=torch.float64))
    expected = occlusion(pooled, x, Y, grid=8)
    with torch.no_grad():
        pooled.model.head.bias += 7
    torch.testing.assert_close(occlusion(pooled, x, Y, grid=8), expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        pooled.model.head.weight *= 3
        pooled.model.head.bias *= 3
    torch.testing.assert_close(occlusion(pooled, x, Y, grid=8), 3 * expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
@pytest.mark.parametrize("method", [occlusion, variable_occlusion])
def test_chunks_bound_the_batch_and_change_nothing(method, chunk, curved, x):
    chosen = {"grid": 8} if method is occlusion else {"discs": 64}
    expected = method(curved, x, Y, **chosen)
    counted = Calls(curved.model)
    saliency = method(replace(curved, model=counted), x, Y, chunk=chunk, **chosen)
    torch.testing.assert_close(saliency, expected, rtol=0, atol=1e-9)
    assert max(counted.sizes[1:]) <= chunk
    assert sum(counted.sizes) == 3 * (1 + 64)


@pytest.mark.parametrize("method", [occlusion, variable_occlusion])
def test_a_filling_made_once_is_that_made_every_time(method, curved, x):
    chosen = {"grid": 8} if method is occlusion else {"discs": 64}
    for name in ("black", "blur", "noise"):
        assert torch.equal(
            method(curved, x, Y, erase=name, **chosen), method(curved, x, Y, erase=fillings.ERASERS[name], **chosen)
        )
    assert not torch.equal(method(curved, x, Y, erase="noise", **chosen), method(curved, x, Y, erase="blur", **chosen))


def test_a_filling_that_looks_at_the_mask_gets_it(curved, x):
    seen = []

    def look(x, saliency):
        seen.append(saliency)
        return torch.zeros_like(x)

    assert torch.equal(occlusion(curved, x, Y, erase=look, grid=8), occlusion(curved, x, Y, erase="black", grid=8))
    kept = torch.cat(seen)
    assert len(kept) == 3 * 64
    assert (kept == 0).flatten(1).any(1).all(), "each mask hides something: 0 = hidden"
    telea = occlusion(curved, x, Y, erase="telea", grid=8)
    assert telea.abs().max() > 0.001


def test_other_scores_are_read(curved, x):
    assert not torch.allclose(occlusion(curved, x, Y, grid=8), occlusion(curved, x, Y, grid=8, score=log_probability))


@pytest.mark.parametrize(
    ("size", "grid", "h", "w"), [(35.0, 5, 24, 32), (35.0, 5, 224, 224), (1.0, 3, 17, 40), (10.0, 7, 64, 64)]
)
def test_patches_that_leave_gaps_are_an_error_that_says_what_covers(size, grid, h, w, pooled, plain):
    x = noise(1, 3, h, w)
    with pytest.raises(
        ValueError, match=f"leave gaps on a grid of {grid} x {grid}; .* cover the image from size="
    ) as error:
        occlusion(pooled, x, size=size, grid=grid)
    enough = float(str(error.value).rpartition("=")[2].removesuffix(" on"))
    assert occlusion(pooled, x, size=enough, grid=grid).isfinite().all()
    with pytest.raises(ValueError, match="leave gaps"):
        occlusion(pooled, x, size=enough / 2, grid=grid)


@pytest.mark.parametrize(
    ("chosen", "error", "message"),
    [
        ({"size": 0.0}, ValueError, "expected size > 0, .*, got size=0.0, grid=28"),
        ({"grid": 0}, ValueError, "grid >= 1, .*grid=0"),
        ({"soften": -1.0}, ValueError, "soften >= 0 .*soften=-1.0"),
        ({"chunk": 0}, ValueError, "chunk >= 1, .*chunk=0"),
        ({"shape": "round"}, LookupError, "no shape called 'round'; known: disc, square"),
        ({"erase": "blurr"}, LookupError, "no eraser called 'blurr'; did you mean blur"),
    ],
)
def test_wrong_settings_of_occlusion_are_errors(chosen, error, message, pooled, x, plain):
    with pytest.raises(error, match=message):
        occlusion(pooled, x, Y, **chosen)


# Variable occlusion


def slow_disc(classifier, image, label, drawn, sigma, share, filling):
    """Return the smallest of the discs behind which the score is lowest."""
    h, w = image.shape[1:]
    found = []
    for cx, cy, R in drawn.tolist():
        mask = slow_soft(lambda i, j: math.hypot(i + 0.5 - cy, j + 0.5 - cx) <= R, h, w, sigma)  # noqa: B023
        found.append((read(classifier, (1 - mask) * image + mask * filling, label), R, (cx, cy, R)))
    best = sorted(found)[: max(1, round(share * len(found)))]
    return min(best, key=lambda one: one[1])[2]


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_variable_occlusion_is_slow_loops(share, curved):
    h, w = 11, 15
    x, y = noise(2, 3, h, w), torch.tensor([2, 0])
    drawn = draw(COCO, 20, (h, w), seed=5)
    chosen = {"discs": 20, "share": share, "seed": 5}
    discs, saliency = smallest_disc(curved, x, y, **chosen), variable_occlusion(curved, x, y, **chosen)
    for n in range(2):
        filling = fillings.blur(x[n : n + 1], x[n : n + 1, :1])[0]
        cx, cy, R = slow_disc(curved, x[n], int(y[n]), drawn, 10 * math.sqrt(h * w) / 224, share, filling)
        assert discs[n].tolist() == [cx, cy, R]
        cone = [[max(0, 1 - math.hypot(i + 0.5 - cy, j + 0.5 - cx) / R) for j in range(w)] for i in range(h)]
        torch.testing.assert_close(saliency[n, 0], torch.tensor(cone, dtype=torch.float64), rtol=0, atol=1e-12)


def test_masks_are_discs_with_soft_edges():
    drawn = torch.tensor([[2.5, 1.5, 3.2], [6.5, 4.5, 0.3], [0.5, 6.5, 9.0]], dtype=torch.float64)
    masks = soft(drawn, (7, 9), 0.8)
    for (cx, cy, R), mask in zip(drawn.tolist(), masks[:, 0], strict=True):
        expected = slow_soft(lambda i, j: math.hypot(i + 0.5 - cy, j + 0.5 - cx) <= R, 7, 9, 0.8)  # noqa: B023
        torch.testing.assert_close(mask, expected, rtol=0, atol=1e-12)
    assert set(soft(drawn, (7, 9), 0.0).unique().tolist()) == {0.0, 1.0}
    assert soft(drawn, (7, 9), 0.0)[1].sum() == 1, "the smallest disc is one pixel"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_peak_of_the_map_is_the_point(dtype, curved, x):
    curved, x = replace(curved, model=curved.model.to(dtype)), x.to(dtype)
    for seed in range(6):
        point = smallest_disc(curved, x, Y, discs=20, seed=seed)[:, :2]
        saliency = variable_occlusion(curved, x, Y, discs=20, seed=seed)
        assert saliency.dtype == dtype
        assert torch.equal(peak(saliency), point)
        assert torch.equal(saliency.amax((1, 2, 3)), torch.ones(3, dtype=dtype))


def test_the_smallest_of_the_lowest_is_taken():
    s = torch.tensor([[1.0, 9], [2, 8], [3, 7], [4, 6], [5, 5]]).double()
    radius = torch.tensor([3.0, 1, 2, 5, 4]).double()
    assert smallest(s, radius, 0.01).tolist() == [0, 4]
    assert smallest(s, radius, 0.4).tolist() == [1, 4]
    assert smallest(s, radius, 0.6).tolist() == [1, 2]
    assert smallest(s, radius, 1.0).tolist() == [1, 1]


def test_the_disc_hides_what_the_network_sees():
    weight = torch.zeros(3, 56, 56, dtype=torch.float64)
    weight[:, 30:38, 12:20] = 1
    x = torch.ones(1, 3, 56, 56, dtype=torch.float64)
    cx, cy, R = smallest_disc(linear(weight), x, torch.tensor([0]), erase="black")[0].tolist()
    assert math.hypot(cx - 16, cy - 34) < R
    assert R < 28


def test_half_the_radii_are_below_24_pixels_at_224():
    many = draw(COCO, 20000, (224, 224), seed=1)
    assert float(many[:, 2].median()) == pytest.approx(math.sqrt(math.exp(7.506) / math.pi), rel=0.02)
    assert math.sqrt(math.exp(7.506) / math.pi) == pytest.approx(24, abs=0.1)
    assert float(draw(COCO, 784, (224, 224))[:, 2].median()) == pytest.approx(24, abs=2)
    areas = (math.pi * many[:, 2] ** 2).log()
    assert float(areas.mean()) == pytest.approx(7.506, abs=0.03)
    assert float(areas.std()) == pytest.approx(1.2848, abs=0.03)


def test_discs_lie_in_the_image_on_pixel_centers_and_scale_with_it():
    base = draw(COCO, 500, (224, 224))
    for h, w in ((224, 224), (112, 112), (30, 90)):
        x, y, R = draw(COCO, 500, (h, w)).unbind(1)
        assert 0 < x.min() <= x.max() < w
        assert 0 < y.min() <= y.max() < h
        assert torch.equal(x % 1, torch.full_like(x, 0.5))
        assert torch.equal(y % 1, torch.full_like(y, 0.5))
        torch.testing.assert_close(R, base[:, 2] * scale((h, w)), rtol=1e-12, atol=0)
        assert (x / w - base[:, 0] / 224).abs().max() < 1 / w
        assert (y / h - base[:, 1] / 224).abs().max() < 1 / h
    coarse = draw(replace(COCO, side=112.0, y_mu=COCO.y_mu / 2, y_sigma=COCO.y_sigma / 2), 500, (224, 224))
    torch.testing.assert_close(coarse[:, 2], 2 * base[:, 2])
    assert torch.equal(coarse[:, :2], base[:, :2])
    many = draw(COCO, 20000, (224, 224), seed=2)
    assert torch.histc(many[:, 0], 8, 0, 224).min() > 2300, "x is uniform"
    assert float(many[:, 1].median()) == pytest.approx(116.08, abs=1.5)


def test_draws_are_seeded_and_leave_the_global_state_alone():
    state = torch.get_rng_state()
    assert torch.equal(draw(COCO, 9, (20, 20)), draw(COCO, 9, (20, 20), seed=0))
    assert not torch.equal(draw(COCO, 9, (20, 20)), draw(COCO, 9, (20, 20), seed=1))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("side", [224.0, 100.0])
def test_fit_finds_known_parameters(side):
    n, area_mu, area_sigma = 20000, math.log(0.02 * side**2), 0.6
    areas = (area_mu + area_sigma * normal(n, seed=1)).exp() / side**2
    heights = 0.52 + 0.08 * normal(n, seed=2)
    kept = (areas <= 1) & (heights >= 0) & (heights <= 1)
    assert kept.all()
    found = fit(areas, heights, side=side)
    for one, true, spread_ in (
        (found.area_mu, area_mu, area_sigma),
        (found.y_mu, 0.52 * side, 0.08 * side),
        (found.area_sigma, area_sigma, area_sigma),
        (found.y_sigma, 0.08 * side, 0.08 * side),
    ):
        assert one == pytest.approx(true, abs=4 * spread_ / math.sqrt(n))
    assert found.side == side


def test_fit_is_the_maximum_likelihood_by_hand_and_undoes_draw():
    found = fit(torch.tensor([0.01, 0.04]), torch.tensor([0.25, 0.75]), side=10.0)
    assert found.area_mu == pytest.approx(math.log(2))
    assert found.area_sigma == pytest.approx(math.log(2))
    assert (found.y_mu, found.y_sigma) == (5.0, 2.5)
    true = Discs(6.0, 0.5, 110.0, 20.0)
    _, y, R = draw(true, 20000, (448, 448), seed=3).unbind(1)
    again = fit(math.pi * R**2 / 448**2, y / 448)
    assert again.area_mu == pytest.approx(6.0, abs=0.02)
    assert again.area_sigma == pytest.approx(0.5, abs=0.02)
    assert again.y_mu == pytest.approx(110.0, abs=0.6)
    assert again.y_sigma == pytest.approx(20.0, abs=0.5)


def test_boxes_and_instances_are_measured_alike():
    instances = torch.zeros(20, 40, dtype=torch.long)
    instances[2:6, 3:13] = 1
    instances[10:18, 20:25] = 7
    instances[0, :] = 255
    boxes = torch.tensor([[3.0, 2, 13, 6], [20, 10, 25, 18]])
    assert of_boxes(boxes, (20, 40)).tolist() == [0.05, (4 + 14) / 2 / 20]
    assert of_instances(instances).tolist() == pytest.approx([0.05, (4 + 14) / 2 / 20])
    round_one = torch.zeros(4, 4, dtype=torch.long)
    round_one[0, 0] = round_one[1, 0] = round_one[1, 1] = 3
    assert of_instances(round_one).tolist() == pytest.approx([3 / 16, (0.5 + 1.5 + 1.5) / 3 / 4])


def test_the_papers_constants():
    assert Discs(7.5060, 1.2848, 116.0759, 47.5054, 224.0) == COCO


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"discs": 0}, r"expected discs >= 1, share in \(0, 1\], .*, got discs=0"),
        ({"share": 0.0}, "share=0.0"),
        ({"share": 1.5}, "share=1.5"),
        ({"soften": -1.0}, "soften=-1.0"),
        ({"chunk": 0}, "chunk=0"),
    ],
)
def test_wrong_settings_of_variable_occlusion_are_errors(chosen, message, pooled, x, plain):
    with pytest.raises(ValueError, match=message):
        variable_occlusion(pooled, x, Y, **chosen)


@pytest.mark.parametrize("numbers", [(7.0, -1.0, 1.0, 1.0), (7.0, 1.0, 1.0, -1.0), (math.nan, 1.0, 1.0, 1.0)])
def test_wrong_distributions_are_errors(numbers):
    with pytest.raises(ValueError, match="expected finite numbers, deviations >= 0 and side > 0, got Discs"):
        Discs(*numbers)
    with pytest.raises(ValueError, match="side > 0"):
        Discs(7.0, 1.0, 1.0, 1.0, side=0.0)


def test_wrong_annotations_are_errors(plain):
    one = torch.tensor([0.5])
    with pytest.raises(ValueError, match="at least two images, got 1 and 1"):
        fit(one, one)
    with pytest.raises(ValueError, match="got 2 and 1"):
        fit(torch.tensor([0.5, 0.5]), one)
    for areas, heights in (([0.5, 0.0], [0.5, 0.5]), ([0.5, 40.0], [0.5, 0.5]), ([0.5, 0.5], [0.5, 100.0])):
        with pytest.raises(ValueError, match=r"expected areas in \(0, 1\] and heights in \[0, 1\]; divide"):
            fit(torch.tensor(areas), torch.tensor(heights))
    with pytest.raises(ValueError, match="at least one box, got none"):
        of_boxes(torch.zeros(0, 4), (4, 4))
    with pytest.raises(ValueError, match="at least one instance, got none"):
        of_instances(torch.full((3, 3), 255))
