"""Pictures on disk that the tests of this folder share."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twelve pictures of 30 x 20 pixels in two classes; the red of each is its number, the green the column."""
    for k in range(12):
        pixels = np.zeros((20, 30, 3), dtype=np.uint8)
        pixels[:, :, 0], pixels[:, :, 1], pixels[:, :, 2] = 20 * k, np.arange(30) * 8, np.arange(20)[:, None] * 8
        (tmp_path / f"class{k % 2}").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / f"class{k % 2}" / f"{k:02d}.png")
    return tmp_path
