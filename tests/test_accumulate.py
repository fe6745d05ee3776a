"""Sums over a data set: against numpy in float64, in any order, and joined from what several processes held."""

import numpy as np
import pytest
import torch

from sightline.accumulate import Accumulate
from sightline.metrics import Measure


def nothing(case):
    raise AssertionError("the measure itself is not called here")


def measure(**settings):
    return Measure(nothing, True, **settings)


def numbers(count, width=1, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(50, 20, (count, width)))


def filled(one, values, batches):
    sums = Accumulate(one)
    for batch in batches:
        sums.update(values[batch], torch.tensor(batch))
    return sums


def outcome(sums):
    return tuple(part.reshape(-1) for part in sums.compute()[:2])


def test_mean_and_numbers_of_each_image():
    values = numbers(10)
    mean, per_image = outcome(filled(measure(), values, [[0, 1, 2], [3], [4, 5, 6, 7, 8, 9]]))
    assert mean.dtype == per_image.dtype == torch.float64
    assert mean.item() == pytest.approx(np.mean(values.numpy()), rel=1e-15)
    assert per_image.tolist() == values[:, 0].tolist()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_batch_size_does_not_matter(size):
    values = numbers(23, seed=size)
    batches = [list(range(start, min(start + size, 23))) for start in range(0, 23, size)]
    mean, per_image = outcome(filled(measure(), values, batches))
    assert mean.item() == pytest.approx(values.mean().item(), rel=1e-14)
    assert torch.equal(per_image, values[:, 0])


def test_images_come_out_in_the_order_of_the_data_whatever_came_first():
    values = numbers(6)
    per_image = outcome(filled(measure(), values, [[5, 2], [0], [4, 1, 3]]))[1]
    assert torch.equal(per_image, values[:, 0])


def test_float32_numbers_are_summed_in_double():
    values = torch.full((1000, 1), 0.1, dtype=torch.float32)
    for batches in ([[i] for i in range(1000)], [list(range(1000))]):
        mean = outcome(filled(measure(), values, batches))[0]
        assert mean.item() == pytest.approx(float(np.float32(0.1)), rel=1e-13)


def test_one_image_is_still_a_list():
    mean, per_image = outcome(filled(measure(), numbers(1), [[0]]))
    assert mean.shape == per_image.shape == (1,)


def test_a_curve_is_averaged_point_by_point_and_finished_for_each_image():
    values = numbers(5, width=4)
    sums = filled(measure(width=4, finish=lambda curve: curve[..., 0] - curve[..., -1]), values, [[0, 1], [2, 3, 4]])
    mean, per_image = outcome(sums)
    assert np.allclose(mean, values.numpy().mean(0), rtol=1e-14)
    assert torch.allclose(per_image, values[:, 0] - values[:, 3], rtol=1e-14)
    assert sums.finished(mean).item() == pytest.approx(per_image.mean().item(), rel=1e-12)


def test_mean_state_keeps_no_image():
    values = numbers(6, width=3)
    sums = filled(measure(width=3, state="mean"), values, [[0, 1, 2], [3, 4, 5]])
    assert (sums.values, sums.places) == ([], [])
    mean, per_image = outcome(sums)
    assert np.allclose(mean, values.numpy().mean(0), rtol=1e-14)
    assert per_image.tolist() == []


def test_reset_forgets():
    values = numbers(4)
    sums = filled(measure(), values, [[0, 1, 2, 3]])
    outcome(sums)
    sums.reset()
    sums.update(values[2:3], torch.tensor([0]))
    mean, per_image = outcome(sums)
    assert mean.item() == per_image.item() == values[2].item()
    assert sums.count == 1


def test_update_after_compute_counts():
    values = numbers(4)
    sums = filled(measure(), values, [[0, 1]])
    outcome(sums)
    sums.update(values[2:], torch.tensor([2, 3]))
    assert outcome(sums)[0].item() == pytest.approx(values.mean().item(), rel=1e-14)


def test_an_image_with_nan_does_not_count():
    values = numbers(6, width=2)
    values[[1, 4], [0, 1]] = torch.nan
    counted = [0, 2, 3, 5]
    sums = filled(measure(width=2, finish=lambda v: v.sum(-1)), values, [[0, 1], [2, 3, 4, 5]])
    mean, per_image, count = sums.compute()
    assert torch.allclose(mean, values[counted].mean(0), rtol=1e-14)
    assert count.item() == 4
    assert per_image.isnan().tolist() == [False, True, False, False, True, False]
    assert torch.allclose(per_image[counted], values[counted].sum(1), rtol=1e-14)


def test_where_no_image_counts_the_mean_is_nan():
    sums = filled(measure(), torch.full((3, 1), torch.nan, dtype=torch.float64), [[0, 1, 2]])
    mean, per_image, count = sums.compute()
    assert mean.isnan().all()
    assert per_image.isnan().all()
    assert count.item() == 0


def test_a_width_may_be_found_out():
    values = numbers(5, width=4)
    sums = filled(measure(width=None, state="mean", finish=lambda v: v.sum(-1)), values, [[0, 1], [2, 3, 4]])
    assert torch.allclose(outcome(sums)[0], values.mean(0), rtol=1e-14)
    assert sums.finished(outcome(sums)[0]).shape == ()


def test_a_pool_keeps_everything_in_order():
    values = numbers(5, width=3)
    values[2, 1] = torch.nan
    sums = filled(measure(width=None, state="pool"), values, [[4, 0], [1, 2, 3]])
    assert torch.equal(sums.compute()[1], values[[0, 1, 3, 4]])


@pytest.mark.parametrize("state", ["per_image", "mean", "pool"])
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("parts", [[[0, 1], [2, 3], [4, 5], [6]], [[6, 0, 2], [], [5, 4, 1, 3]]])
def test_what_others_held_adds_up_to_the_whole(state, width, parts):
    values = numbers(7, width)
    values[3] = torch.nan
    one = measure(state=state, width=width, finish=lambda v: v if width == 1 else v.sum(-1))
    alone = outcome(filled(one, values, [list(range(7))]))
    total = Accumulate(one)
    for part in parts:
        total.add(filled(one, values, [part] if part else []).held())
    for part, whole in zip(outcome(total), alone, strict=True):
        assert torch.allclose(part, whole, rtol=1e-14, equal_nan=True)
    assert total.count == 6


def test_what_is_held_is_added_bit_by_bit_as_batches_are():
    values = numbers(9, 2)
    batches = [[0, 1], [2, 3], [4, 5], [6, 7], [8]]
    total = Accumulate(measure(width=2, state="mean"))
    for batch in batches:
        total.add(filled(measure(width=2, state="mean"), values, [batch]).held())
    assert torch.equal(total.total, filled(measure(width=2, state="mean"), values, batches).total)


def test_nothing_added():
    with (
        pytest.warns(UserWarning, match="before the ``update`` method"),
        pytest.raises(ValueError, match="no image was measured; the data set is empty"),
    ):
        Accumulate(measure()).compute()
