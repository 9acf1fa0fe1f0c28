"""When do the two objectives disagree? Draws docs/objectives.svg: ``python -m benchmarks.objectives [FILE]``.

Two answers a, a follow-up o with P(o = a | a) = 0.9, and the teacher's P(a | o) by Bayes' rule. Drawn is the
expected ascent of each objective on the logit of a = 1, from `fastsdpo.sdpo_loss`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import fastsdpo

SAYS = torch.tensor([[0.9, 0.1], [0.1, 0.9]])  # P(o | a)


def ascent(rate: float, mode: str, *, depends: bool = True) -> float:
    """Of the logit of a = 1, where P(a = 1) is ``rate``; without ``depends`` o is drawn whatever a is."""
    prior = torch.tensor([1 - rate, rate])
    joint = prior[:, None] * SAYS
    teacher = (joint / joint.sum(0)).T.log()
    weights = joint if depends else prior[:, None] * joint.sum(0)
    answers, follow_ups = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    student = prior.log().repeat(4, 1).requires_grad_()
    out = fastsdpo.sdpo_loss(
        student, teacher[follow_ups], answers, mode=mode, alpha=1.0, weights=weights[answers, follow_ups]
    )
    out.loss.backward()
    assert student.grad is not None
    return -float(student.grad[:, 1].sum())


def main(argv: list[str]) -> None:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.hashsalt": "objectives", "font.sans-serif": ["DejaVu Sans", "Arial"]})
    matplotlib.rcParams["svg.fonttype"] = "none"  # letters, and not their outlines
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    rates = [n / 50 for n in range(1, 50)]
    for mode, color in (("sampled_token", "#4477aa"), ("full", "#cc3311")):
        axes.plot(rates, [ascent(rate, mode) for rate in rates], color=color, label=f"{mode}, o depends on a")
    alike = [ascent(rate, "sampled_token", depends=False) for rate in rates[::4]]
    axes.plot(rates[::4], alike, "o", color="#999999", label="sampled_token, o does not")
    axes.axhline(0, color="#999999", linewidth=0.8)
    axes.set_xlabel("p(a = 1)")
    axes.set_ylabel("ascent of the logit of a = 1")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(argv[0] if argv else Path(__file__).parents[1] / "docs/objectives.svg", metadata=nothing)


if __name__ == "__main__":
    main(sys.argv[1:])
