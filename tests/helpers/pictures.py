"""Small real pictures: cut-outs of the photographs that come inside scikit-image."""

from PIL import Image
from skimage import data


def cut_outs(number, size=24, step=32):
    """Return distinct squares, taken evenly over four photographs."""
    photographs = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    squares = [
        photograph[top : top + step, left : left + step]
        for photograph in photographs
        for top in range(0, photograph.shape[0] - step, step)
        for left in range(0, photograph.shape[1] - step, step)
    ]
    return [Image.fromarray(square).resize((size, size)) for square in squares[:: len(squares) // number][:number]]


def captions(number):
    """Return two texts for each cut-out."""
    return [[f"cut-out number {i}", f"the {i}th square"] for i in range(number)]
