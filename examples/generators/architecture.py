"""One description of a task's networks: made of equal size, saved, and loaded again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from experiment import write_json
from generators.convolutional import ConvDecoder, Encoder, matched, parameters
from mdeq import Decoder


@dataclass(frozen=True)
class Architecture:
    """What the networks of every method have in common.

    Args:
        latent: the length of a code.
        image: (channels, side) of the images.
        channels: of the equilibrium decoder's branches, finest first.
        stride: its finest branch is at 1/``stride`` of the image's size.
        skip: whether a code also reaches its state past the cell.
    """

    latent: int
    image: tuple[int, int]
    channels: tuple[int, ...]
    stride: int
    skip: bool = True

    def equilibrium(self) -> Decoder:
        """The equilibrium decoder."""
        return Decoder(self.latent, self.image, self.channels, stride=self.stride, skip=self.skip)

    def convolutional(self) -> ConvDecoder:
        """A decoder of plain convolutions with as many parameters, or nearly."""
        with torch.device("meta"):
            target = parameters(self.equilibrium())
        return matched(self.latent, self.image, target)

    def encoder(self, outputs: int) -> Encoder:
        """An encoder."""
        return Encoder(self.image, outputs)


def save(folder: Path, name: str, architecture: Architecture, decoder: nn.Module) -> None:
    """Write ``name.pt``, a decoder's weights, and ``name.json``, what it is."""
    kind = "equilibrium" if isinstance(decoder, Decoder) else "convolutional"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", {"kind": kind, "architecture": asdict(architecture)})
    torch.save(decoder.state_dict(), folder / f"{name}.pt")


def load(folder: Path, name: str) -> tuple[Architecture, nn.Module]:
    """The decoder of that name, with its weights frozen."""
    path = folder / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there. Expected a decoder that examples/generative.py trained; run it "
            "first, with this folder as its --out."
        )
    facts = json.loads(path.read_text(encoding="utf-8"))
    given = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in facts["architecture"].items()
    }
    architecture = Architecture(**given)
    make = {"equilibrium": architecture.equilibrium, "convolutional": architecture.convolutional}
    decoder = make[facts["kind"]]()
    weights = torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=True)
    decoder.load_state_dict(weights)
    return architecture, decoder.requires_grad_(False)
