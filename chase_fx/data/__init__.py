"""Small image data for the demo and the examples: Fashion-MNIST, or scikit-learn's digits where it cannot be had.

Example:
    >>> from chase_fx.data import load_digits
    >>> digits = load_digits(validation=100)
    >>> digits.train.images.shape, len(digits.validation), len(digits.test)
    (torch.Size([1338, 1, 28, 28]), 100, 359)
"""

from chase_fx.data.errors import DataError, DataUnavailableError
from chase_fx.data.images import Dataset, Split, load_digits, load_fashion_mnist, load_images

__all__ = ["DataError", "DataUnavailableError", "Dataset", "Split", "load_digits", "load_fashion_mnist", "load_images"]
