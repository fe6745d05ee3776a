"""Samples into batches: what is stacked, what stays ragged, what is refused."""

import pytest
import torch

from sightline.data import Batch, Dataset, Indexed, Sample, batches, collate, layers


def sample(i, label=0, side=4, **rest):
    return Sample(f"s{i}", torch.full((3, side, side), float(i)), label, **rest)


class Numbers:
    classes, skipped = ("even", "odd"), {}

    def __init__(self, count):
        self.count, self.read = count, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.read.append(index)
        return sample(index, index % 2)


def test_collate_stacks_images_and_labels():
    batch = collate([sample(3, 1), sample(5, 0)])
    assert batch.ids == ("s3", "s5")
    assert len(batch) == 2
    assert batch.x.shape == (2, 3, 4, 4)
    assert batch.x[:, 0, 0, 0].tolist() == [3, 5]
    assert batch.y.tolist() == [1, 0]
    assert batch.y.dtype == torch.long


def test_ragged_fields_stay_with_their_samples():
    boxes = torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 3]])
    mask = torch.ones(4, 4, dtype=torch.long)
    samples = [sample(0, boxes=boxes, size=(9, 7)), sample(1, mask=mask, parts={"head": mask > 0})]
    batch = collate(samples)
    assert batch.samples[0] is samples[0]
    assert batch.samples[0].boxes is boxes
    assert batch.samples[1].boxes is None
    assert batch.samples[1].parts["head"].all()
    assert samples[0].parts == {}


def test_labels_are_all_there_or_none():
    assert collate([sample(0, 1), sample(1, None)]).y is None
    assert collate([sample(0, None)]).y is None
    assert collate([sample(0, 0)]).y.tolist() == [0]


def test_collate_refuses():
    with pytest.raises(ValueError, match="a batch needs at least one sample, got none"):
        collate([])
    with pytest.raises(ValueError, match=r"one shape, got \[\(3, 4, 4\), \(3, 5, 5\)\]; resize them in the data set"):
        collate([sample(0), sample(1, side=5), sample(2)])


def test_moving_keeps_what_belongs_together():
    batch = collate([sample(0, 1)])
    moved = batch.to("meta")
    assert moved.x.device.type == moved.y.device.type == "meta"
    assert (moved.ids, moved.samples) == (batch.ids, batch.samples)
    assert batch.x.device.type == "cpu"
    assert Batch(("a",), batch.x, None, batch.samples).to("meta").y is None


@pytest.mark.parametrize(("size", "lengths"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (9, [5])])
def test_batches_go_through_the_data_in_order(size, lengths):
    found = list(batches(Numbers(5), size))
    assert [len(batch) for batch in found] == lengths
    assert [name for batch in found for name in batch.ids] == [f"s{i}" for i in range(5)]


def test_batches_of_chosen_indices_read_no_others():
    numbers = Numbers(9)
    found = list(batches(numbers, 2, iter([7, 0, 3])))
    assert [batch.ids for batch in found] == [("s7", "s0"), ("s3",)]
    assert numbers.read == [7, 0, 3]


def test_batches_are_read_when_they_are_asked_for():
    numbers = Numbers(9)
    next(batches(numbers, 2))
    assert numbers.read == [0, 1]


def test_no_data_no_batch():
    assert list(batches(Numbers(0), 4)) == []


@pytest.mark.parametrize("size", [0, -1])
def test_batch_size(size):
    with pytest.raises(ValueError, match=f"a batch holds at least one image, got size={size}"):
        list(batches(Numbers(3), size))


def test_protocols():
    assert isinstance(Numbers(3), Indexed)
    assert isinstance(Numbers(3), Dataset)
    assert isinstance([sample(0)], Indexed)
    assert not isinstance([sample(0)], Dataset)


def test_boxes_are_asked_for_by_class():
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 3.0, 3.0]])
    of_label = Sample("a", torch.zeros(3, 4, 4), 5, boxes=boxes)
    assert torch.equal(of_label.boxes_of(5), boxes)
    assert of_label.boxes_of(6).shape == (0, 4)
    named = Sample("a", torch.zeros(3, 4, 4), 5, boxes=boxes, box_labels=torch.tensor([5, 6]))
    assert named.boxes_of(6).tolist() == [[1, 1, 3, 3]]
    mask = torch.tensor([[0, 0, 6, 0], [0, 6, 255, 0]])
    assert Sample("a", torch.zeros(3, 2, 4), 5, mask=mask).boxes_of(5).tolist() == [[1, 0, 3, 2]]
    assert Sample("a", torch.zeros(3, 2, 4), 5, mask=mask).boxes_of(0).shape == (0, 4)
    assert Sample("a", torch.zeros(3, 2, 4), 5).boxes_of(5) is None


def test_the_region_of_a_class_leaves_out_what_is_ignored():
    sample = Sample("a", torch.zeros(3, 1, 4), 1, mask=torch.tensor([[0, 2, 255, 1]]))
    inside, counted = sample.region_of(1)
    assert inside.tolist() == [[False, True, False, False]]
    assert counted.tolist() == [[True, True, False, True]]
    assert Sample("a", torch.zeros(3, 1, 4), 1).region_of(1) is None
    with pytest.raises(ValueError, match="masks hold classes 0 to 253"):
        sample.region_of(254)


def test_layers_go_down_to_the_data_set():
    class Wrapped:
        def __init__(self, samples):
            self.samples = samples

    inner = [1, 2]
    assert list(layers(Wrapped(Wrapped(inner))))[-1] is inner
