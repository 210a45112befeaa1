"""Pictures of every kind as 8-bit colours or greys."""

import numpy as np
from PIL import Image, UnidentifiedImageError

WIDE = ("I", "F")  # how the names of modes of more than 8 bits begin: whole numbers, fractions


def in_eight_bits(image: Image.Image, mode: str) -> Image.Image:
    """Return a picture as "RGB" or "L", from 0 to 255.

    16 bits are scaled, from 65,535 to 255, and fractions from 1 to 255; what is transparent shows white behind it.
    UnidentifiedImageError for whole numbers outside 0 to 65,535, or fractions outside 0 to 1.
    """
    if image.mode.startswith(WIDE):
        numbers, most = np.asarray(image), 1 if image.mode == "F" else 65_535
        if not 0 <= numbers.min() <= numbers.max() <= most:
            raise UnidentifiedImageError(f"its numbers of mode {image.mode} are not between 0 and {most}")
        image = Image.fromarray(np.rint(numbers * (255 / most)).astype(np.uint8))
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert(mode)
