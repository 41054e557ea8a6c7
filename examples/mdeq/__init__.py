"""The multiscale equilibrium model that the paper's tasks share."""

from mdeq.cell import Cell
from mdeq.classifier import Classifier, FilmClassifier
from mdeq.decoder import Decoder

__all__ = ["Cell", "Classifier", "Decoder", "FilmClassifier"]
