import pytest
import torch

from sightline.data import Sample, batches
from sightline.evaluation import measure
from sightline.metrics import coverage


def scores(pooled, samples, raw, **settings):
    def method(classifier, x, y=None, /):
        return raw

    return measure(method, pooled, batches(samples, len(samples)), {"coverage": coverage(**settings)}).scores[0]


def sample(name, mask=None, label=0, instances=None):
    return Sample(name, torch.rand(3, 24, 32, dtype=torch.float64), label, mask=mask, instances=instances)


def quarter(value, row, column):
    mask = torch.zeros(24, 32, dtype=torch.long)
    mask[12 * row : 12 * row + 12, 16 * column : 16 * column + 16] = value
    return mask


def test_it_is_the_mean_of_the_map_over_the_object(pooled):
    raw = torch.rand(2, 1, 24, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    masks = [quarter(1, 0, 0), quarter(3, 1, 1)]
    found = scores(pooled, [sample("a", masks[0], 0), sample("b", masks[1], 2)], raw, normalize=False)
    by_hand = [
        100 * sum(float(raw[i, 0, r, c]) for r in rows for c in columns) / (12 * 16)
        for i, rows, columns in ((0, range(12), range(16)), (1, range(12, 24), range(16, 32)))
    ]
    assert found.per_image == pytest.approx(by_hand)
    assert found.value == pytest.approx(sum(by_hand) / 2)
    scaled = (raw - raw.amin((2, 3), keepdim=True)) / (raw.amax((2, 3), keepdim=True) - raw.amin((2, 3), keepdim=True))
    normalized = scores(pooled, [sample("a", masks[0], 0), sample("b", masks[1], 2)], raw)
    assert normalized.per_image[0] == pytest.approx(100 * float(scaled[0, 0, :12, :16].mean()))


def test_each_copy_has_its_own_share(pooled):
    raw = torch.zeros(1, 1, 24, 32, dtype=torch.float64)
    raw[..., :16] = 1
    twins = quarter(1, 0, 0) + quarter(2, 0, 1)
    one = [sample("a", (twins > 0).long(), 0, instances=twins)]
    assert scores(pooled, one, raw, instance=1).value == 100
    assert scores(pooled, one, raw, instance=2).value == 0
    assert scores(pooled, one, raw).value == pytest.approx(50)


def test_an_image_without_the_object_does_not_count(pooled):
    raw = torch.rand(2, 1, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = scores(pooled, [sample("a", quarter(1, 0, 0)), sample("b", quarter(2, 0, 0))], raw)
    assert found.count == 1
    assert found.value == pytest.approx(found.per_image[0])


@pytest.mark.parametrize(
    ("one", "settings", "message"),
    [
        (sample("a"), {}, "coverage needs a mask and a label, and 'a' has none"),
        (sample("a", quarter(1, 0, 0)), {"instance": 1}, "coverage needs instances, and 'a' has none"),
        (sample("a", quarter(1, 0, 0)), {"normalize": False}, r"expects maps in \[0, 1\], and that of 'a'"),
    ],
)
def test_what_is_missing_is_told(pooled, one, settings, message):
    with pytest.raises(ValueError, match=message):
        scores(pooled, [one], 2 * torch.ones(1, 1, 2, 2, dtype=torch.float64), **settings)


def test_instances_count_from_one():
    with pytest.raises(ValueError, match="expected instance >= 1"):
        coverage(instance=0)
