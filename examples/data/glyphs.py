"""Printed characters of many scripts: a stand-in for Omniglot that needs no files and no network.

The fonts are those that come with matplotlib. A class is a letter, and its 20 drawers are the fonts
that have it, each with a slant, turn, size, place and weight of its own.
"""

from __future__ import annotations

import math
import unicodedata
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps
from torch import Tensor
from tqdm import tqdm

from data.characters import DRAWERS, Characters, Split, check_options

STYLES = {
    "DejaVuSans": ("", "-Bold", "-Oblique", "-BoldOblique"),
    "DejaVuSerif": ("", "-Bold", "-Italic", "-BoldItalic"),
    "STIXGeneral": ("", "Bol", "Italic", "BolIta"),
    "DejaVuSansMono": ("", "-Bold", "-Oblique", "-BoldOblique"),
}
FONTS = tuple(family + style for family, styles in STYLES.items() for style in styles)
PLAIN = FONTS[0]
FEWEST = 4  # fonts that must have a letter, so that its drawers differ by more than the jitter
# As in Omniglot, the alphabets to be tested on are not among those to be trained on.
SCRIPTS = {
    "background": ("Canadian", "Georgian", "Lao", "Latin"),
    "evaluation": ("Arabic", "Armenian", "Coptic", "Cyrillic", "Greek", "Hebrew"),
}
SMALLEST = 0.4  # of the font's size; a dot or dash, once enlarged, is not a letter any more
ALIKE = 0.85  # correlation of two letters' pixels above which they count as one
FINE = 3  # drawn this many times larger, then averaged


def glyphs(split: Split, size: int = 28, *, quiet: bool = False) -> Characters:
    """Letters of some scripts, or of the others, in 20 drawings each; the same on every call.

    ``background`` has over 400 letters and ``evaluation`` over 200, of other scripts. Letters that
    look alike, such as Latin A and Greek Α, count as one, within a split and between them.

    Raises:
        FileNotFoundError: matplotlib's fonts are not where they should be.
        ValueError: there is no such split.
    """
    check_options(split, size)
    letters = alphabet()
    # Drawn for both splits, so that a letter's drawings do not depend on what else is asked for.
    jitter = np.random.default_rng(0).uniform(-1, 1, (len(letters), DRAWERS, 6))
    wanted = [
        (letter, fonts, offsets)
        for (letter, fonts), offsets in zip(letters.items(), jitter, strict=True)
        if script(letter) in SCRIPTS[split]
    ]
    pixels = torch.empty(len(wanted), DRAWERS, 1, size, size)
    bar = tqdm(wanted, "glyphs", disable=quiet, leave=False)
    for into, (letter, fonts, offsets) in zip(pixels, bar, strict=True):
        drawings = [
            _drawing(letter, fonts[drawer % len(fonts)], size, offsets[drawer])
            for drawer in range(DRAWERS)
        ]
        into[:, 0] = torch.from_numpy(np.stack(drawings))
    return Characters(pixels, tuple(f"{script(name)}/U+{ord(name):04X}" for name, *_ in wanted))


@cache
def alphabet() -> dict[str, list[str]]:
    """The letters that no other one looks like, each with the fonts that have it."""
    fonts_of: dict[str, list[str]] = {}
    for font in FONTS:
        for code in FT2Font(_file(font)).get_charmap():
            fonts_of.setdefault(chr(code), []).append(font)
    letters = [
        letter
        for letter, fonts in sorted(fonts_of.items())
        if PLAIN in fonts and len(fonts) >= FEWEST and _is_plain(letter)
    ]
    return {letter: fonts_of[letter] for letter in _distinct(letters)}


def script(letter: str) -> str:
    """The first word of the letter's name in Unicode, as Latin or Greek."""
    return unicodedata.name(letter, "?").split()[0].capitalize()


def _is_plain(letter: str) -> bool:
    """Whether it is a letter of one of the scripts, unaccented and not small."""
    return (
        unicodedata.category(letter) in ("Lu", "Ll", "Lo")
        # Unicode takes accented letters and ligatures apart: too much like one another.
        and not unicodedata.decomposition(letter)
        and any(script(letter) in scripts for scripts in SCRIPTS.values())
        and max(_ink(letter, PLAIN, 48, stroke=0).size) > 48 * SMALLEST
    )


def _distinct(letters: list[str]) -> list[str]:
    """The letters in order, without those that look like an earlier one."""
    seen = torch.stack([_silhouette(letter) for letter in letters])
    correlation = torch.corrcoef(seen.flatten(1))
    kept: list[int] = []
    for index in range(len(letters)):
        if not (correlation[index, kept] > ALIKE).any():
            kept.append(index)
    return [letters[index] for index in kept]


def _silhouette(letter: str, side: int = 24) -> Tensor:
    """The letter in the plain font, of one size wherever it stands, a little blurred."""
    ink = ImageOps.pad(_ink(letter, PLAIN, 2 * side, stroke=0), (side, side))
    return torch.from_numpy(np.array(ink.filter(ImageFilter.BoxBlur(1)), dtype=np.float64))


def _drawing(letter: str, font: str, size: int, offsets: np.ndarray) -> np.ndarray:
    """The letter as one drawer draws it; the six offsets lie between −1 and 1."""
    turn, slant, zoom, right, down, weight = offsets
    side = FINE * size
    ink = _ink(letter, font, side, stroke=round((1 + weight) * side / 84))
    # The longer side takes 60 to 80 % of the picture.
    scale = max(ink.size) / (side * (0.7 + 0.1 * zoom))
    cosine, sine = math.cos(0.2 * turn), math.sin(0.2 * turn)
    # Pillow wants the way back: from a place in the picture to the place in the ink.
    back = scale * np.array([[1, 0.2 * slant], [0, 1]]) @ [[cosine, sine], [-sine, cosine]]
    centre = side * (0.5 + 0.08 * np.array([right, down]))
    shift = np.array(ink.size) / 2 - back @ centre
    coefficients = (*back[0], shift[0], *back[1], shift[1])
    drawn = ink.transform(
        (side, side), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC
    )
    return np.asarray(drawn.reduce(FINE), dtype=np.float32) / 255


def _ink(letter: str, font: str, height: int, stroke: int) -> Image.Image:
    """The letter, white on black and cut to its edges."""
    typeface = _typeface(font, height)
    left, top, right, bottom = typeface.getbbox(letter, stroke_width=stroke)
    canvas = Image.new("L", (math.ceil(right - left), math.ceil(bottom - top)))
    draw = ImageDraw.Draw(canvas)
    draw.text((-left, -top), letter, 255, typeface, stroke_width=stroke)
    return canvas.crop(canvas.getbbox())


@cache
def _typeface(font: str, height: int) -> ImageFont.FreeTypeFont:
    # The basic layout is the one that every build of Pillow has.
    return ImageFont.truetype(_file(font), height, layout_engine=ImageFont.Layout.BASIC)


def _file(font: str) -> str:
    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{font}.ttf")
    if not path.is_file():
        raise FileNotFoundError(
            f"The font {path} is not there, though matplotlib brings it. Reinstall matplotlib."
        )
    return str(path)
