"""What tests of figures share: small tables, drawing, and what a referee would send back."""

from __future__ import annotations

import itertools

from matplotlib.text import Text

from figures import FIGURES, style

FEW_STEPS = (0, 50, 400)
OF_REWARD = ("writing", "rollouts", "text_sources", "stated_reliability", "stated_confidence")


def draw(name: str, source, **options):
    entry = FIGURES[name]
    return entry.draw(source, **{**next(iter(entry.variants(source).values())), **options})


def visible_texts(figure) -> list[Text]:
    """All that is written, tick labels only where their tick is in view."""
    hidden = set()
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            slack = 1e-6 * (high - low)
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                if not low - slack <= tick.get_loc() <= high + slack:
                    hidden |= {tick.label1, tick.label2}
    found = figure.findobj(Text)
    return [t for t in found if t.get_visible() and t.get_text().strip() and t not in hidden]


def layout_problems(figure) -> list[str]:
    """Text that is cut off or overlaps other text, and legends over panels."""
    figure.draw_without_rendering()
    canvas = figure.bbox
    boxes = [(t.get_text(), t.get_window_extent()) for t in visible_texts(figure)]
    problems = [
        f"cut off: {text!r}"
        for text, box in boxes
        if box.x0 < -1 or box.y0 < -1 or box.x1 > canvas.x1 + 1 or box.y1 > canvas.y1 + 1
    ]
    for (one, a), (other, b) in itertools.combinations(boxes, 2):
        x = min(a.x1, b.x1) - max(a.x0, b.x0)
        y = min(a.y1, b.y1) - max(a.y0, b.y0)
        if x > 2 and y > 2:  # pixels at 300 dpi
            problems.append(f"overlap: {one!r} and {other!r}")
    legends = [*figure.legends, *(ax.get_legend() for ax in figure.axes if ax.get_legend())]
    for legend, ax in itertools.product(legends, figure.axes):
        if legend.get_window_extent().padded(-2).overlaps(ax.bbox):
            problems.append("legend over a panel")
    return problems


def assert_fit_for_print(figure) -> None:
    assert layout_problems(figure) == []
    assert figure.get_figwidth() <= style.FULL_WIDTH
    sizes = {text.get_fontsize() for text in visible_texts(figure)}
    assert min(sizes) >= 7
    assert max(sizes) <= 8
    for ax in figure.axes:
        if ax.get_xlabel():
            assert ax.get_xlabel()[0].isupper()
