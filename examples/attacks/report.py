"""The results of the adversarial example, for people."""

from __future__ import annotations

from typing import Any

from experiment import table


def report(results: dict[str, Any]) -> str:
    """Tables of accuracy, training and times."""
    kinds = list(next(iter(results["accuracy"].values())))
    rows = [
        (trained, *(f"{100 * row[name]['accuracy']:.1f}" for name in kinds))
        for trained, row in results["accuracy"].items()
    ]
    blocks = [table(rows, ("trained on", *(f"{name}, %" for name in kinds)))]
    rows = [
        (name, row["steps"], row["last_loss"], row["seconds"])
        for name, row in results["training"].items()
    ]
    blocks.append(table(rows, ("training", "steps", "loss", "seconds")))
    rows = [
        (
            name,
            row["steps"],
            row["loss"],
            "yes" if row["reached"] else "no",
            row["f"],
            row["vjp"],
            1e3 * row["seconds"],
        )
        for name, row in results["times"].items()
    ]
    header = ("attack", "steps", "loss", "as hard as pgd", "f", "vjp", "ms an image")
    blocks.append(table(rows, header))
    worst = max(cell["residual"] for row in results["accuracy"].values() for cell in row.values())
    blocks.append(f"largest relative residual of an equilibrium that was judged: {worst:.1e}")
    return "\n\n".join(blocks)
