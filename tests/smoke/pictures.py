"""Pictures made on the spot, each unlike the others, as data URLs."""

import base64
import io
import random

from PIL import Image, ImageDraw


def picture(seed: int, kind: str = "png", size: tuple[int, int] | None = None) -> str:
    """Return a data URL of a picture that the seed decides, `size` (in pixels) too if none is given.

    `kind` is png, jpeg or webp.
    """
    rnd = random.Random(seed)
    size = size or (rnd.randrange(120, 420), rnd.randrange(120, 420))
    image = Image.new("RGB", size, tuple(rnd.randbytes(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = rnd.randrange(size[0] - 40), rnd.randrange(size[1] - 40)
        box = (x, y, x + rnd.randrange(20, 120), y + rnd.randrange(20, 120))
        rnd.choice((draw.ellipse, draw.rectangle))(box, fill=tuple(rnd.randbytes(3)))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
