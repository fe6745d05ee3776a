"""Pictures: colors, overlays, contact sheets, encoding."""

import re
from io import BytesIO

import matplotlib
import pytest
import torch
from PIL import Image

from sightline import viz


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def test_colorize_takes_the_nearest_of_256_colors():
    saliency = torch.tensor([[0.0, 0.25], [0.503, 1.0]])
    colors = viz.colorize(saliency, cmap="magma")
    assert colors.shape == (3, 2, 2)
    for i in range(2):
        for j in range(2):
            expected = matplotlib.colormaps["magma"](round(255 * float(saliency[i, j])))[:3]
            assert colors[:, i, j].tolist() == pytest.approx(expected, abs=1e-6)


def test_colorize_gives_a_batch_what_it_gives_each_map():
    maps = noise(3, 1, 4, 5)
    colors = viz.colorize(maps)
    assert colors.shape == (3, 3, 4, 5)
    for one, color in zip(maps, colors, strict=True):
        assert torch.equal(viz.colorize(one[0]), color)


@pytest.mark.parametrize(
    ("saliency", "message"),
    [
        (torch.tensor([[0.0, 1.5]]), "saliency in [0, 1], got 0 to 1.5; scale it with maps.unit"),
        (torch.tensor([[0.0, -0.5]]), "got -0.5 to 0"),
        (torch.tensor([[0.0, float("nan")]]), "not finite"),
        (torch.zeros(2, 3, 4, 4), "expected maps of shape (h, w) or (b, 1, h, w), got (2, 3, 4, 4)"),
        (torch.zeros(3, 4, 4), "got (3, 4, 4)"),
    ],
)
def test_colorize_refuses(saliency: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        viz.colorize(saliency)


def test_an_unknown_color_map_names_its_neighbors():
    with pytest.raises(LookupError, match="no color map called 'infermo'; did you mean inferno"):
        viz.colorize(noise(2, 2), cmap="infermo")


def test_overlay_is_its_formula():
    x, s = noise(3, 4, 5), noise(4, 5, seed=1)
    out = viz.overlay(x, s, alpha=0.7, fade=0.4, cmap="viridis")
    for i in range(4):
        for j in range(5):
            r, g, b = x[:, i, j].tolist()
            w = float(s[i, j]) ** 0.7
            color = matplotlib.colormaps["viridis"](round(255 * float(s[i, j])))
            luma = 0.299 * r + 0.587 * g + 0.114 * b
            for k, value in enumerate((r, g, b)):
                photo = value + 0.4 * (1 - w) * (luma / 2 - value)
                assert float(out[k, i, j]) == pytest.approx((1 - 0.7 * w) * photo + 0.7 * w * color[k], abs=1e-5)


def test_overlay_shows_the_photo_where_nothing_matters_and_leaves_its_inputs_alone():
    x, s = noise(3, 6, 6), noise(6, 6, seed=1)
    s[2, 3], s[4, 4] = 0, 1
    before = x.clone(), s.clone()
    assert torch.allclose(viz.overlay(x, s, fade=0.0)[:, 2, 3], x[:, 2, 3])
    top = torch.tensor(matplotlib.colormaps["inferno"](255)[:3], dtype=torch.float32)
    assert torch.allclose(viz.overlay(x, s, alpha=1.0)[:, 4, 4], top)
    assert torch.equal(x, before[0])
    assert torch.equal(s, before[1])


@pytest.mark.parametrize("draw", [viz.overlay, viz.overlay_signed])
@pytest.mark.parametrize(
    ("saliency", "reason"),
    [(0.0, "all zero"), (0.4, "constant"), (float("nan"), "not finite"), (float("inf"), "not finite")],
)
def test_a_map_that_says_nothing_is_never_drawn(draw, saliency: float, reason: str):
    with pytest.raises(ValueError, match=f"the map is {reason}: it says nothing about where"):
        draw(noise(3, 4, 4), torch.full((4, 4), saliency))


@pytest.mark.parametrize("draw", [viz.overlay, viz.overlay_signed])
def test_overlays_refuse_other_sizes_and_images_out_of_range(draw):
    with pytest.raises(ValueError, match=r"\(2, 2\) over an image of \(4, 4\) pixels; bring it there with maps.resize"):
        draw(noise(3, 4, 4), noise(2, 2))
    with pytest.raises(ValueError, match=r"image in \[0, 1\].*undo the normalization or divide by 255"):
        draw(noise(3, 4, 4) * 255, noise(4, 4))
    with pytest.raises(ValueError, match="expected one image"):
        draw(noise(4, 4, 4), noise(4, 4))


def test_overlay_repeats_gray():
    gray, s = noise(1, 4, 4), noise(4, 4, seed=1)
    assert torch.equal(viz.overlay(gray, s), viz.overlay(gray.repeat(3, 1, 1), s))


def test_signed_maps_are_red_for_blue_against_and_photo_at_zero():
    x = torch.full((3, 1, 3), 0.5)
    s = torch.tensor([[8.0, 0.0, -8.0]])
    out = viz.overlay_signed(x, s, alpha=1.0, fade=0.0)
    assert out[:, 0, 0].tolist() == pytest.approx([1, 0, 0], abs=1e-6)
    assert out[:, 0, 1].tolist() == pytest.approx([0.5] * 3)
    assert out[:, 0, 2].tolist() == pytest.approx([0, 0, 1], abs=1e-6)


def test_signed_maps_have_no_scale():
    x, s = noise(3, 5, 5), noise(5, 5, seed=1) - 0.5
    assert torch.allclose(viz.overlay_signed(x, s), viz.overlay_signed(x, 1000 * s), atol=1e-5)
    assert not torch.allclose(viz.overlay_signed(x, s), viz.overlay_signed(x, -s), atol=1e-2)


def test_to_pil_rounds_and_keeps_channels_apart():
    image = torch.zeros(3, 2, 4)
    image[0, 0, 1], image[1, 1, 3], image[2, 0, 0] = 1.0, 0.5, 0.2
    picture = viz.to_pil(image)
    assert (picture.size, picture.mode) == ((4, 2), "RGB")
    assert picture.getpixel((1, 0)) == (255, 0, 0)
    assert picture.getpixel((3, 1)) == (0, round(127.5), 0)
    assert picture.getpixel((0, 0)) == (0, 0, 51)
    assert viz.to_pil(torch.full((1, 1, 1), 0.2)).getpixel((0, 0)) == (51, 51, 51)


def test_png_is_lossless_and_the_same_every_time():
    image = noise(3, 9, 7)
    data = viz.png(image)
    assert data == viz.png(image.clone()) == viz.png(viz.to_pil(image))
    assert Image.open(BytesIO(data)).tobytes() == viz.to_pil(image).tobytes()
    assert b"tIME" not in data


def test_jpeg_is_near_and_smaller():
    i, j = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="ij")
    image = viz.overlay(torch.stack([i, j, 1 - i]), i * j)
    data = viz.jpeg(image)
    pixels = torch.tensor(list(Image.open(BytesIO(data)).tobytes())).view(64, 64, 3).permute(2, 0, 1) / 255
    assert (pixels - image).abs().mean() < 0.01
    assert data == viz.jpeg(image)
    assert len(data) < len(viz.png(image))


def test_grid_places_pictures_in_cells():
    red, blue = torch.zeros(3, 4, 4), torch.zeros(3, 2, 4)
    red[0], blue[2] = 1, 1
    sheet = viz.grid([[red, blue], [None, red]], cell=20, gap=4)
    assert sheet.size == (4 + 2 * 24, 4 + 2 * 24)
    assert sheet.getpixel((0, 0)) == viz.PAPER
    assert sheet.getpixel((4 + 10, 4 + 10)) == (255, 0, 0)
    assert sheet.getpixel((28 + 10, 4 + 10)) == (0, 0, 255)
    assert sheet.getpixel((28 + 10, 4 + 2)) == viz.PAPER, "a wide picture keeps its shape"
    assert sheet.getpixel((4 + 10, 28 + 10)) == viz.VOID
    assert sheet.getpixel((28 + 10, 28 + 10)) == (255, 0, 0)


def test_grid_makes_room_for_titles_and_draws_them():
    image = torch.ones(3, 8, 8)
    plain = viz.grid([[image, image]], cell=40)
    titled = viz.grid([[image, image]], columns=["photo", "a_rather_long_method_name"], titles=["finch"], cell=40)
    assert titled.height > plain.height
    assert titled.width > plain.width
    assert plain.convert("L").getextrema() == (255, 255)
    left = titled.crop((0, 0, titled.width - 2 * 48, titled.height)).convert("L")
    above = titled.crop((titled.width - 2 * 48, 0, titled.width, titled.height - 48)).convert("L")
    assert left.getextrema()[0] < 100
    assert above.getextrema()[0] < 100


def test_grid_writes_captions_below_their_pictures():
    image = torch.ones(3, 8, 8)
    plain = viz.grid([[image, image], [image, image]], cell=40)
    told = viz.grid([[image, image], [image, image]], captions=[(), ("", "IoU 0.5")], cell=40)
    assert told.width == plain.width
    assert told.height > plain.height
    assert told.crop((0, 0, told.width, plain.height - 8)).convert("L").getextrema() == (255, 255)
    below = told.crop((0, plain.height - 8, told.width, told.height)).convert("L")
    dark = torch.tensor(list(below.tobytes())).view(below.height, below.width) < 128
    assert dark.any()
    assert not dark[:, :48].any(), "the first picture has no caption"
    assert not dark[-4:].any(), "what stands below is inside the sheet"


def test_letters_beyond_ascii_are_drawn():
    def written(title: str) -> Image.Image:
        return viz.grid([[torch.ones(3, 8, 8)]], titles=[title], cell=64)

    assert written("éé").tobytes() != written("жж").tobytes(), "Pillow's own font draws both as boxes"
    assert written("nnnn").width < written("nnné").width, "a plain text keeps the narrower font"


def test_grid_sets_blocks_apart_and_writes_their_names_upright():
    red = torch.zeros(3, 4, 4)
    red[0] = 1
    plain = viz.grid([[red]] * 3, cell=40, gap=4)
    made = viz.grid([[red]] * 3, blocks=[("one two", 2), ("three", 1)], cell=40, gap=4)
    assert made.height == plain.height + 8, "two gaps more between blocks"
    left = made.width - 44
    column = [made.getpixel((left + 20, y)) == (255, 0, 0) for y in range(made.height)]
    assert [y for y in range(1, made.height) if column[y] != column[y - 1]] == [4, 44, 48, 88, 100, 140]
    names = made.crop((0, 0, left, made.height)).convert("L")
    dark = torch.tensor(list(names.tobytes())).view(names.height, names.width) < 128
    assert dark[4:88].any()
    assert dark[100:140].any()
    assert not dark[88:100].any()
    assert viz.grid([[red]] * 3, blocks=[("", 3)], cell=40, gap=4).size == plain.size


@pytest.mark.parametrize(
    "title", ["smooth(gradient)(samples=8)", "a/b/casm-with-a-long-name", "Mmmmmmmmmmmmmmmmmmmmmmm"]
)
def test_titles_above_stay_above_their_pictures(title):
    image = torch.ones(3, 8, 8)
    sheet = viz.grid([[image, image]], columns=["", title], cell=100).convert("L")
    assert sheet.crop((0, 0, 116, sheet.height)).getextrema() == (255, 255)
    assert sheet.crop((116, 0, 216, sheet.height)).getextrema()[0] < 100
    assert sheet.crop((217, 0, sheet.width, sheet.height)).getextrema() == (255, 255)


def test_a_title_keeps_its_line_breaks():
    image = torch.ones(3, 8, 8)
    one, two = (viz.grid([[image]], columns=[title], cell=200).height for title in ("a b", "a\nb"))
    assert two > one


def test_outline_draws_the_border_inside_the_region_and_along_the_edge():
    region = torch.zeros(9, 11, dtype=torch.bool)
    region[2:8, 6:11] = True
    drawn = viz.outline(torch.ones(3, 9, 11), region, color=(1.0, 0.0, 0.0), width=1)
    line = drawn[1] == 0
    for i in range(9):
        for j in range(11):
            around = [(i + a, j + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
            whole = all(0 <= u < 9 and 0 <= v < 11 and bool(region[u, v]) for u, v in around)
            assert bool(line[i, j]) == (bool(region[i, j]) and not whole)
    assert (drawn[0] == 1).all()
    with pytest.raises(ValueError, match="expected a region of \\(9, 11\\) pixels, got \\(4, 4\\)"):
        viz.outline(torch.ones(3, 9, 11), region[:4, :4], color=(1.0, 0.0, 0.0))
    with pytest.raises(ValueError, match="at least one pixel, got width=0"):
        viz.outline(torch.ones(3, 9, 11), region, color=(1.0, 0.0, 0.0), width=0)


def test_grid_refuses_captions_and_blocks_of_other_rows():
    image = torch.ones(3, 4, 4)
    for captions in ([("a", "b")], [("a",), ("b",)], [(), (), ()]):
        with pytest.raises(ValueError, match="expected 2 rows of 2 captions or none"):
            viz.grid([[image, image]] * 2, captions=captions)
    for blocks in ([("a", 1)], [("a", 2), ("b", 0)], [("a", 3)]):
        with pytest.raises(ValueError, match="expected blocks of 2 rows in all"):
            viz.grid([[image, image]] * 2, blocks=blocks)


@pytest.mark.parametrize(
    ("rows", "columns", "titles", "message"),
    [
        ([], [], [], "at least one picture"),
        ([[]], [], [], "at least one picture"),
        ([[None], [None, None]], [], [], "expected rows of one length, got [1, 2]; fill gaps with None"),
        ([[None, None]], ["a"], [], "expected 2 column titles, got 1"),
        ([[None]], [], ["a", "b"], "expected 1 row titles, got 2"),
    ],
)
def test_grid_refuses(rows, columns, titles, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        viz.grid(rows, columns=columns, titles=titles)
