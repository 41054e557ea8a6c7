"""Generators of images: the equilibrium decoder, and the autoencoders it is compared with."""

from generators.architecture import Architecture, load, save
from generators.autoencoders import KINDS, Autoencoder
from generators.convolutional import ConvDecoder, Encoder, matched, parameters
from generators.equilibrium import (
    Search,
    Trained,
    decode,
    equilibrium,
    find_codes,
    matching,
    penalty,
)
from generators.principal import Principal

__all__ = [
    "KINDS",
    "Architecture",
    "Autoencoder",
    "ConvDecoder",
    "Encoder",
    "Principal",
    "Search",
    "Trained",
    "decode",
    "equilibrium",
    "find_codes",
    "load",
    "matched",
    "matching",
    "parameters",
    "penalty",
    "save",
]
