"""The memory that a unit holds while it reads, and the check that no image of its shard is lost."""

from __future__ import annotations

from latentcache.engine.stages import ByteBudget, StageTimes
from latentcache.images.source import RejectedSample, Sample

# Bytes of a sample under construction that each unit may hold beside the shared budget. Nearly all
# samples are smaller, so reading them does not wait.
_FREE_BYTES = 32 * 2**20

# The most names of extra image fields that a receipt lists.
_MAX_FIELDS = 16


class SampleBudget:
    """The bytes of the sample that a unit is reading, held in a budget that units share.

    A thread must not wait for bytes while it holds bytes of the same budget, because two units
    could then wait for each other. So the first `_FREE_BYTES` of a sample are not counted, and a
    larger sample acquires `max_sample_bytes` at once.

    Args:
        fetched: the budget, which also holds samples that wait to be decoded.
        max_sample_bytes: the largest size of a sample.
        times: the times of reading, which count a wait for bytes as busy unless it is moved.
    """

    def __init__(
        self, fetched: ByteBudget, max_sample_bytes: int, times: StageTimes | None = None
    ) -> None:
        self._fetched = fetched
        self._max_sample_bytes = max_sample_bytes
        self._times = times or StageTimes()
        self._held = 0

    def reserve(self, num_bytes: int) -> None:
        """Wait until the sample under construction may hold `num_bytes` in total."""
        if num_bytes > _FREE_BYTES and not self._held:
            self._acquire(self._max_sample_bytes)
            self._held = self._max_sample_bytes

    def finish(self, num_bytes: int) -> None:
        """Hold `num_bytes` for the finished sample; its consumer releases them."""
        if self._held:
            self._fetched.release(self._held - num_bytes)
            self._held = 0
        else:
            self._acquire(num_bytes)

    def _acquire(self, num_bytes: int) -> None:
        waited_s = self._fetched.acquire(num_bytes)
        self._times.add(busy_s=-waited_s, wait_s=waited_s)

    def close(self) -> None:
        """Release the bytes of an unfinished sample."""
        self._fetched.release(self._held)
        self._held = 0


class SampleCounts:
    """Counts of the samples and images of a shard, to be checked against rows and rejects."""

    def __init__(self) -> None:
        self.num_samples = self.num_images = self.num_extra_images = 0
        self.extra_image_fields: list[str] = []

    def add(self, sample: Sample | RejectedSample) -> None:
        """Count a sample that was read."""
        self.num_samples += 1
        self.num_images += sample.num_images
        self.num_extra_images += max(0, sample.num_images - 1)
        if isinstance(sample, Sample) and sample.extra_images:
            fields = dict.fromkeys([*self.extra_image_fields, *sample.extra_images])
            self.extra_image_fields = list(fields)[:_MAX_FIELDS]

    def check(
        self, title: str, num_rows: int, num_rejects: int, num_rejects_with_image: int
    ) -> None:
        """Raise unless samples = rows + rejects, and images = rows + rejects + extra images.

        Args:
            title: the title of the unit, for the error.
            num_rows, num_rejects: the numbers of rows and rejects written.
            num_rejects_with_image: the number of these rejects that stand for an image.

        Raises:
            AssertionError: the unit would lose or double a sample or an image.
        """
        if num_rows + num_rejects != self.num_samples:
            raise AssertionError(
                f"{title}: {self.num_samples} samples were read, but {num_rows} rows and "
                f"{num_rejects} rejects were written"
            )
        if num_rows + num_rejects_with_image + self.num_extra_images != self.num_images:
            raise AssertionError(
                f"{title}: {self.num_images} images were read, but {num_rows} rows, "
                f"{num_rejects_with_image} rejects with an image and {self.num_extra_images} extra "
                "images were written"
            )
