import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lightning_itm.gradient_monitor.switch import (
    HEALTHY,
    MEMORY,
    GradientSwitch,
    Switch,
    measure_gradient,
    switched,
    upgrade_switch_state,
)

OPTIONS = {"low": 0.25, "high": 0.75, "min_steps": 3}
DEFAULTS = {"low": 0.5, "high": 0.8, "smoothing": 0.9, "min_steps": 5}  # of GradientNormMonitor
MARGIN = 0.2
HEALTHY_VALUE = 20.0  # κ of a small model that has not collapsed, by benchmarks/relative_gradient.py


@given(levels=st.lists(st.sampled_from([0.1, 0.25, 0.5, 0.75, 0.9, float("nan")]), max_size=40))
def test_equals_the_rule_step_by_step(levels):
    switch, is_on, age = Switch(torch.tensor(False), torch.tensor(0)), False, 0
    for level in levels:
        switch = switched(switch, torch.tensor(level), **OPTIONS)
        wants = level > 0.75 if is_on else level < 0.25
        if wants and age + 1 >= 3:
            is_on, age = not is_on, 0
        else:
            age += 1
        assert (bool(switch.is_on), int(switch.age)) == (is_on, age)


class TestGradientSwitch:
    def make(self, **options):
        return GradientSwitch(2, **{"low": 0.25, "high": 0.75, "smoothing": 0.5, "min_steps": 1, **options})

    def run(self, switch, sizes, loss=1.0, steps=1, margin=0.0):
        for _ in range(steps):
            level = switch.update(torch.tensor(sizes), torch.tensor(loss), margin)
        return float(level)

    def follow(self, switch, relative, losses):
        """Return whether the switch was on after each step, given κ `(steps, towers)` and the losses."""
        states = []
        for values, loss in zip(relative, losses, strict=True):
            switch.update(values * loss, torch.tensor(loss), MARGIN)
            states.append(bool(switch.is_on))
        return states

    def test_the_lowest_tower_decides(self):
        switch = self.make()
        self.run(switch, [20.0, 5.0], steps=9)
        assert not switch.is_on
        assert self.run(switch, [20.0, 1.0], steps=9) == pytest.approx(0.2, abs=0.01)
        assert switch.is_on

    def test_a_converged_model_is_no_collapse(self):
        """Loss and gradient fall together, by a factor of a thousand."""
        switch = self.make()
        for step in range(70):
            level = self.run(switch, [8 * 0.9**step, 8 * 0.9**step], 0.3 * 0.9**step)
            assert level > 0.99
        assert not switch.is_on

    def test_a_vanishing_gradient_is(self):
        switch = self.make()
        for step in range(30):
            self.run(switch, [8 * 0.8**step, 8 * 0.8**step], 0.2)
        assert switch.is_on

    def test_a_collapse_from_the_start_needs_no_better_days(self):
        switch = self.make()
        assert self.run(switch, [0.02, 0.02], 0.2) < 0.25
        assert switch.is_on

    @pytest.mark.parametrize("scale", [1e-4, 1.0, 2e4])
    def test_the_scale_of_the_loss_is_no_matter(self, scale):
        """So neither is its reduction."""
        switch, plain = self.make(), self.make()
        levels = [self.run(switch, [scale * 5 * 0.9**step, scale * 9.0], scale * 0.2) for step in range(20)]
        expected = [self.run(plain, [5 * 0.9**step, 9.0], 0.2) for step in range(20)]
        assert levels == pytest.approx(expected, rel=1e-4)

    def test_a_tower_that_is_not_trained_decides_nothing(self):
        switch = self.make()
        assert self.run(switch, [-1.0, 5.0], 0.2, steps=500) == pytest.approx(25 / 25, rel=1e-2)
        assert not switch.is_on

    def test_a_tower_that_is_frozen_or_freed_in_between(self):
        switch = self.make(smoothing=0.9)
        self.run(switch, [5.0, 5.0], 0.2, steps=20)
        assert self.run(switch, [-1.0, 5.0], 0.2, steps=50) > 0.9
        switch = self.make(smoothing=0.9)
        self.run(switch, [-1.0, 5.0], 0.2, steps=50)
        assert self.run(switch, [5.0, 5.0], 0.2) > 0.9

    def test_a_gradient_of_exactly_nothing_is_a_collapse(self):
        switch = self.make()
        self.run(switch, [0.0, 0.0], 0.2)
        assert switch.is_on

    def test_below_half_of_the_margin_nothing_has_collapsed(self):
        switch = self.make()
        self.run(switch, [0.02, 0.02], 0.09, margin=0.2, steps=9)
        assert not switch.is_on
        self.run(switch, [0.02, 0.02], 0.2, margin=0.2, steps=9)
        assert switch.is_on
        self.run(switch, [0.02, 0.02], 0.02, margin=0.2, steps=9)
        assert not switch.is_on

    def test_steps_without_any_loss_change_nothing(self):
        switch = self.make()
        self.run(switch, [8.0, 8.0], 0.2, steps=5)
        self.run(switch, [0.0, 0.0], 0.0, steps=2000)
        assert not switch.is_on
        assert switch.num_skipped == 0

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_steps_that_are_not_finite_are_counted_and_change_nothing(self, bad):
        switch = self.make()
        self.run(switch, [8.0, 8.0], steps=5)
        before = {name: value.clone() for name, value in switch.state_dict().items()}
        self.run(switch, [bad, 8.0])
        self.run(switch, [8.0, 8.0], bad)
        assert switch.num_skipped == 2
        assert all(
            torch.equal(value, before[name]) for name, value in switch.state_dict().items() if name != "num_skipped"
        )

    def test_the_healthy_value_is_kept_within_bounds(self):
        switch = self.make()
        self.run(switch, [5000.0, 5000.0], steps=300)
        assert self.run(switch, [400.0, 400.0], steps=30) == pytest.approx(400 / HEALTHY[1], rel=1e-3)

    @pytest.mark.parametrize("spike", [1e3, 1e8])
    @pytest.mark.parametrize("at", [0, 50])
    def test_one_finite_spike_does_not_turn_it_on(self, spike, at):
        """The first version took the highest value for the healthy one, and was on for 84 % of the steps after a spike."""
        torch.manual_seed(0)
        healthy = HEALTHY_VALUE * torch.exp(0.3 * torch.randn(400, 2))
        healthy[at, 0] *= spike
        switch = GradientSwitch(2, **DEFAULTS)
        states = self.follow(switch, healthy, [MARGIN] * 400)
        assert sum(states) == 0
        collapsing = HEALTHY_VALUE * 0.9 ** torch.arange(60.0)[:, None].expand(-1, 2)
        assert self.follow(switch, collapsing, [MARGIN] * 60)[-1]

    @pytest.mark.parametrize("value", [0.02, 2.0])
    def test_collapsed_from_the_first_step(self, value):
        """The rule of the first version did not turn on for the value 2, which was the healthy one for it."""
        switch = GradientSwitch(2, **DEFAULTS)
        states = self.follow(switch, torch.full((30, 2), value), [MARGIN] * 30)
        assert states.index(True) < 2 * DEFAULTS["min_steps"]
        assert states[-1]

    def test_the_healthy_value_is_forgotten(self):
        """A fall by a factor of ten in 2,000 steps is no collapse. The first version was on for the last 1,388 of them."""
        relative = 100 * 10 ** -torch.linspace(0, 1, 2000)[:, None].expand(-1, 2)
        switch = GradientSwitch(2, **DEFAULTS)
        assert sum(self.follow(switch, relative, [0.7 * MARGIN] * 2000)) == 0
        assert switch.reference.exp().tolist() == pytest.approx([10, 10], rel=0.2)

    def test_the_reference_stays_while_the_switch_is_on(self):
        switch = GradientSwitch(2, **DEFAULTS)
        self.follow(switch, torch.full((200, 2), HEALTHY_VALUE), [MARGIN] * 200)
        assert self.follow(switch, torch.full((50, 2), 5.0), [MARGIN] * 50)[-1]
        before = switch.reference.clone()
        assert self.follow(switch, torch.full((500, 2), 5.0), [MARGIN] * 500)[-1]
        assert torch.equal(switch.reference, before)
        assert before.exp().tolist() == pytest.approx([HEALTHY_VALUE] * 2, rel=0.1)

    def test_the_reference_learns_nothing_from_a_converged_model(self):
        """Its κ is many times larger. When harder negatives come, κ falls back to what it was before."""
        switch = GradientSwitch(2, **DEFAULTS)
        for value, loss in ((6.0, MARGIN), (50.0, 0.1 * MARGIN), (6.0, MARGIN)):
            assert sum(self.follow(switch, torch.full((200, 2), value), [loss] * 200)) == 0

    def test_a_small_gradient_with_a_loss_below_the_margin_is_no_collapse(self):
        switch = GradientSwitch(2, **DEFAULTS)
        assert sum(self.follow(switch, torch.full((50, 2), 2.0), [0.6 * MARGIN] * 50)) == 0

    def test_a_state_of_the_first_version_is_upgraded(self):
        switch = GradientSwitch(2, **DEFAULTS)
        state = switch.state_dict()
        older = {name: value for name, value in state.items() if name not in ("reference", "num_healthy")}
        switch.load_state_dict(upgrade_switch_state({**older, "highest": torch.tensor([0.0, 20.0])}))
        assert switch.reference.exp().tolist() == pytest.approx([HEALTHY[0], 20.0])
        assert switch.num_healthy.tolist() == [MEMORY, MEMORY]
        assert upgrade_switch_state(state).keys() == state.keys()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"low": 0.8}, "0 < `low` < `high` <= 1, got low=0.8 and high=0.75"),
            ({"high": 1.5}, "got low=0.25 and high=1.5"),
            ({"low": 0.0}, "got low=0.0"),
            ({"smoothing": 1.0}, r"`smoothing` to be in \[0, 1\), got 1.0"),
            ({"min_steps": 0}, "`min_steps` to be at least 1, got 0"),
        ],
    )
    def test_wrong_arguments(self, options, message):
        with pytest.raises(ValueError, match=message):
            self.make(**options)


class TestMeasureGradient:
    def test_equals_a_loop(self):
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (4,), (5, 2))]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        norm = sum(float(one.grad.square().sum()) for one in parameters) ** 0.5
        sensitivity = max(float(one.grad.norm() * one.detach().norm()) for one in parameters if one.ndim == 2)
        assert measure_gradient(parameters).tolist() == pytest.approx([norm, sensitivity])

    def test_biases_count_where_there_is_no_matrix(self):
        bias = nn.Parameter(torch.tensor([3.0, 4.0]))
        bias.grad = torch.tensor([0.0, 2.0])
        assert measure_gradient([bias]).tolist() == pytest.approx([2, 10])

    def test_squares_of_half_precision_do_not_overflow(self):
        weight = nn.Parameter(torch.full((2, 2), 300.0, dtype=torch.float16))
        weight.grad = torch.full_like(weight, 300.0)
        assert measure_gradient([weight]).tolist() == pytest.approx([600, 360000])

    def test_a_tower_without_gradients(self):
        assert measure_gradient([nn.Parameter(torch.ones(2, 2))]).tolist() == [-1, -1]
