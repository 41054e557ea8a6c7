"""The data sets of the examples, read from the files that their publishers give out.

Every reader takes ``folder``, where the files are (``--data`` of the scripts), or None to download
them once into the user's cache. `faces` and `image_folder` read what the user has; `glyphs` needs
no file at all.
"""

from data.characters import Characters, rotated
from data.cifar10 import cifar10
from data.faces import faces
from data.glyphs import glyphs
from data.images import Images, image_folder
from data.mnist import mnist
from data.omniglot import omniglot

__all__ = [
    "Characters",
    "Images",
    "cifar10",
    "faces",
    "glyphs",
    "image_folder",
    "mnist",
    "omniglot",
    "rotated",
]
