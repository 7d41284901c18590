import pytest

from lightning_itm.gradient_monitor.figure import plot_gradients, spans

CURVES = {
    "step": [1, 2, 3, 4],
    "loss": [0.2, 0.2, 0.1, 0.05],
    "level": [0.1, 0.2, 0.9, 1.1],
    "selective": [0, 1, 1, 0],
    "image_norm": [1.0, 2.0, 3.0, 4.0],
    "text_norm": [4.0, 3.0, 2.0, 1.0],
}


@pytest.mark.parametrize(
    ("is_on", "expected"),
    [
        ([0, 0, 0], []),
        ([1, 1, 1], [(5, 9)]),
        ([1, 0, 0], [(5, 7)]),
        ([1, 0, 1], [(5, 7), (9, 9)]),
        ([], []),
    ],
)
def test_spans(is_on, expected):
    assert spans([5, 7, 9][: len(is_on)], is_on) == expected


def test_spans_of_unequal_lengths():
    with pytest.raises(ValueError, match="shorter"):
        spans([1, 2, 3], [1, 0])


class TestPlotGradients:
    def test_draws_each_curve(self):
        loss, norms, level = plot_gradients(CURVES, low=0.5, high=0.8).axes
        assert loss.lines[0].get_ydata().tolist() == CURVES["loss"]
        assert {line.get_label(): line.get_ydata().tolist() for line in norms.lines} == {
            "image": CURVES["image_norm"],
            "text": CURVES["text_norm"],
        }
        assert level.lines[0].get_ydata().tolist() == CURVES["level"]
        assert [line.get_ydata()[0] for line in level.lines[1:]] == [0.5, 0.8]

    def test_shades_the_steps_with_the_rule_on(self):
        for axes in plot_gradients(CURVES, low=0.5, high=0.8).axes:
            (patch,) = axes.patches  # a polygon in older versions of matplotlib
            box = axes.transData.inverted().transform_bbox(patch.get_window_extent())
            assert (box.x0, box.x1) == pytest.approx((2, 4))

    def test_says_once_what_the_shade_is(self):
        axes = plot_gradients({**CURVES, "selective": [1, 0, 1, 0]}, low=0.5, high=0.8).axes
        words = [text.get_text() for ax in axes if ax.get_legend() for text in ax.get_legend().get_texts()]
        assert words == ["selective negatives on", "image", "text"]

    def test_without_a_span_there_is_nothing_to_say(self):
        loss, *_ = plot_gradients({**CURVES, "selective": [0, 0, 0, 0]}, low=0.5, high=0.8).axes
        assert loss.get_legend() is None

    def test_the_level_has_plain_numbers_also_within_a_power_of_ten(self):
        figure = plot_gradients({**CURVES, "level": [1.5, 4.0, 6.0, 3.0]}, low=2.5, high=3.5)
        figure.draw_without_rendering()
        shown = {label.get_text() for label in figure.axes[2].get_yticklabels()}
        assert {"2", "5"} <= shown
        assert not any("$" in label for label in shown)
