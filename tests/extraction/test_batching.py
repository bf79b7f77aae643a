import numpy as np
import pytest
import torch

from extraction import batching
from extraction.batching import BatchSize, equal_sizes, in_fitting_parts


def images(sizes: list[tuple[int, int]]) -> list[tuple[int, torch.Tensor]]:
    """Returns numbered images, each filled with its number."""
    return [(number, torch.full((*size, 3), number, dtype=torch.uint8)) for number, size in enumerate(sizes)]


def brightness(batch) -> torch.Tensor:
    return torch.stack([pixels[0, 0, :1].float() for pixels in batch])


class SmallDevice:
    """An extractor that runs out of memory with more than `most` images."""

    def __init__(self, most: int, error: Exception):
        self.most, self.error, self.tried = most, error, []

    def extract(self, batch) -> torch.Tensor:
        self.tried.append(len(batch))
        if len(batch) > self.most:
            raise self.error
        return brightness(batch)


@pytest.mark.parametrize("limit", [1, 3, 100])
@pytest.mark.parametrize("window", [1, 5, 1000])
def test_each_image_is_in_one_batch_of_its_own_size(monkeypatch, limit, window):
    monkeypatch.setattr(batching, "WINDOW_IMAGES", window)
    rng = np.random.default_rng(window)
    given = images([[(4, 6), (6, 4), (5, 5)][i] for i in rng.integers(0, 3, 60)])
    seen = []
    for numbers, batch in equal_sizes(iter(given), BatchSize(10**9, limit).of):
        assert len(batch) <= limit
        assert len({pixels.shape for pixels in batch}) == 1
        assert [int(pixels[0, 0, 0]) for pixels in batch] == list(numbers)
        seen += numbers
    assert sorted(seen) == list(range(60))


def test_equal_sizes_are_found_across_others():
    sizes = [(4, 6), (6, 4)] * 6
    batches = [numbers for numbers, _ in equal_sizes(iter(images(sizes)), lambda _: 4)]
    assert batches == [(0, 2, 4, 6), (1, 3, 5, 7), (8, 10), (9, 11)]


def test_an_image_of_a_rare_size_waits_no_longer_than_the_window(monkeypatch):
    monkeypatch.setattr(batching, "WINDOW_IMAGES", 4)
    read = []

    def reading():
        for number, pixels in images([(9, 9), *[(4, 6)] * 20]):
            read.append(number)
            yield number, pixels

    next(numbers for numbers, _ in equal_sizes(reading(), lambda _: 3) if 0 in numbers)
    assert len(read) == 5


def test_the_window_is_bounded_in_bytes(monkeypatch):
    monkeypatch.setattr(batching, "WINDOW_BYTES", 3 * 4 * 6 * 3)
    first, _ = next(iter(equal_sizes(iter(images([(4, 6)] * 20)), BatchSize(10**9).of)))
    assert first == (0, 1, 2)


def test_large_images_come_in_smaller_batches():
    size = BatchSize(pixels=1000, images=50)
    assert size.of(torch.empty(10, 20, 3)) == 5
    assert size.of(torch.empty(1, 2, 3)) == 50
    assert size.of(torch.empty(100, 100, 3)) == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_out_of_memory_halves_the_batch_and_continues(error):
    device = SmallDevice(3, error)
    size = BatchSize(10**9, 16)
    batch = [pixels for _, pixels in images([(2, 2)] * 13)]
    parts = list(in_fitting_parts(device.extract, batch, range(13), size))
    assert [number for part, _ in parts for number in range(13)[part]] == list(range(13))
    assert torch.cat([vectors for _, vectors in parts]).flatten().tolist() == list(range(13))
    device.tried.clear()
    list(in_fitting_parts(device.extract, batch, range(13), size))
    assert max(device.tried) <= 3  # sizes that did not fit are not tried again


def test_a_single_image_that_does_not_fit_is_named():
    device = SmallDevice(0, torch.OutOfMemoryError("CUDA out of memory"))
    ((part, error),) = in_fitting_parts(device.extract, [torch.empty(7, 9, 3)], ["b.jpg"], BatchSize(1))
    assert part == slice(0, 1)
    assert "b.jpg" in str(error)


NO_ENGINE = RuntimeError("GET was unable to find an engine to execute this computation")


def test_a_convolution_without_an_engine_is_tried_once_with_half_as_many_images():
    batch = [pixels for _, pixels in images([(2, 2)] * 5)]
    device = SmallDevice(2, NO_ENGINE)
    parts = list(in_fitting_parts(device.extract, batch, range(5), BatchSize(10**9, 5)))
    assert torch.cat([vectors for _, vectors in parts]).flatten().tolist() == list(range(5))
    for most, count, tried in ((1, 5, [5, 2]), (0, 5, [5, 2]), (0, 1, [1])):
        device = SmallDevice(most, NO_ENGINE)
        with pytest.raises(RuntimeError, match="unable to find an engine"):
            list(in_fitting_parts(device.extract, batch[:count], range(count), BatchSize(10**9, 5)))
        assert device.tried == tried


def test_other_errors_are_not_mistaken_for_a_lack_of_memory():
    device = SmallDevice(0, RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        list(in_fitting_parts(device.extract, [torch.empty(2, 2, 3)] * 4, "abcd", BatchSize(100)))
    assert device.tried == [4]
