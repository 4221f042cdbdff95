"""The drawn pictures: any size, the same for a seed, and alike to photographs in what matters."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from latentcache.demo.draw import draw_image


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), width_px=st.integers(1, 90), height_px=st.integers(1, 90))
def test_pictures_of_any_size_depend_only_on_the_seed(
    seed: int, width_px: int, height_px: int
) -> None:
    first, caption = draw_image(np.random.default_rng(seed), width_px, height_px)
    again, same_caption = draw_image(np.random.default_rng(seed), width_px, height_px)
    assert first.dtype == np.uint8
    assert first.shape == (height_px, width_px, 3)
    assert np.array_equal(first, again)
    assert caption == same_caption
    assert caption.strip()


def test_pictures_are_varied_and_have_the_statistics_of_photographs() -> None:
    """Bounds around what 250 photographs at this size measured, the number in each comment."""
    rng = np.random.default_rng(1)
    drawn = [draw_image(rng, 256, 256) for _ in range(64)]
    pictures = np.stack([pixels for pixels, _ in drawn]) / 255.0
    assert len({pixels.tobytes() for pixels, _ in drawn}) == 64
    assert len({caption for _, caption in drawn}) > 20
    assert 0.35 < pictures.mean() < 0.6  # 0.47
    assert 0.2 < pictures.std() < 0.33  # 0.27
    luminance = pictures.mean(axis=-1)
    chroma = pictures - luminance[..., None]
    assert 0.05 < chroma.var() / luminance.var() < 0.25  # 0.12
    # The structure function grows with distance: neighbours are alike, far pixels hardly.
    near = np.square(np.diff(luminance, axis=2)).mean()
    far = np.square(luminance[:, :, 64:] - luminance[:, :, :-64]).mean()
    assert 6 < far / near < 25  # 15
