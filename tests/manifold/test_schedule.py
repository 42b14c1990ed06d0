"""The course of one image's search: published rates and noise, Adam as torch has it, noise that belongs to (key, step)."""

import math

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmat_ray.config import ProjectionConfig
from dmat_ray.manifold.noise import normal, random_bits
from dmat_ray.manifold.schedule import Schedule, adam, learning_rate, noise_scale, rampdown_start

CPU = torch.device("cpu")
WORD = 1 << 64


@given(steps=st.integers(1, 1000), part=st.floats(0, 1), lr=st.floats(1e-3, 1))
def test_learning_rate_is_the_published_one(steps: int, part: float, lr: float) -> None:
    """Up linearly over 5 % of the steps, down by a cosine over 25 %."""
    config = ProjectionConfig(steps=steps, lr=lr)
    step = min(steps - 1, int(part * steps))
    t = step / steps
    published = lr * (0.5 - 0.5 * math.cos(math.pi * min(1.0, (1.0 - t) / 0.25))) * min(1.0, t / 0.05)
    assert learning_rate(config, step) == pytest.approx(published, abs=1e-12)
    if 0.05 <= t <= 0.75:
        assert learning_rate(config, step) == pytest.approx(lr)
    assert (learning_rate(config, step) == 0) == (step == 0)


@given(steps=st.integers(1, 1000), part=st.floats(0, 1))
def test_noise_is_the_published_one(steps: int, part: float) -> None:
    step = min(steps - 1, int(part * steps))
    expected = 0.05 * max(0.0, 1 - step / steps / 0.75) ** 2
    assert noise_scale(ProjectionConfig(steps=steps), step) == pytest.approx(expected)


def test_ramps_may_be_switched_off() -> None:
    config = ProjectionConfig(steps=10, lr=0.3, lr_rampup=0, lr_rampdown=0)
    assert [learning_rate(config, step) for step in range(10)] == pytest.approx([0.3] * 10)
    assert rampdown_start(config) == 10


@given(steps=st.integers(1, 300), rampdown=st.floats(0, 1), ramp=st.floats(0.01, 1), noise=st.sampled_from([0.0, 0.05]))
def test_tables_hold_what_the_formulas_say(steps: int, rampdown: float, ramp: float, noise: float) -> None:
    config = ProjectionConfig(steps=steps, lr_rampdown=rampdown, noise_ramp=ramp, noise=noise)
    schedule = Schedule(config, CPU)
    assert schedule.rate.tolist() == pytest.approx([learning_rate(config, k) for k in range(steps + 1)], rel=1e-6)
    assert schedule.noise.tolist() == pytest.approx([noise_scale(config, k) for k in range(steps + 1)], rel=1e-6)
    # the w after the last step is looked at without noise; nothing before the ramp down is slowed by it
    assert schedule.noise[-1] == 0
    assert (schedule.noise[: schedule.quiet] > 0).all()
    assert (schedule.noise[schedule.quiet :] == 0).all()
    flat = ProjectionConfig(steps=steps, lr_rampdown=rampdown, lr_rampup=0)
    assert [learning_rate(flat, k) for k in range(schedule.rampdown)] == pytest.approx([flat.lr] * schedule.rampdown)


@pytest.mark.parametrize("beta2", [0.999, 0.9])
def test_adam_is_torchs_for_images_at_steps_and_rates_of_their_own(beta2: float) -> None:
    """Three images enter at different times; each moves as if torch.optim.Adam had it alone."""
    steps, entries = 60, (0, 7, 31)
    config = ProjectionConfig(steps=steps, beta2=beta2)
    schedule, rng = Schedule(config, CPU), torch.Generator().manual_seed(0)
    start = torch.randn(3, 4, 5, generator=rng)
    w, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    alone = [row.clone().requires_grad_() for row in start]
    optimizers = [torch.optim.Adam([row], lr=1.0, betas=(0.9, beta2)) for row in alone]
    updates = torch.zeros(3, dtype=torch.int64)
    for now in range(steps):
        active = torch.tensor([i for i, entry in enumerate(entries) if now >= entry])
        grad = torch.randn(len(active), 4, 5, generator=rng) * 10.0 ** torch.randint(-6, 3, (len(active), 4, 1), generator=rng)
        place, moments = updates[active], (m[active], v[active])
        w[active] -= adam(*moments, grad, schedule.rate[place], schedule.first[place], schedule.second[place], beta2)
        m[active], v[active] = moments
        for row, i in enumerate(active.tolist()):
            optimizers[i].param_groups[0]["lr"] = learning_rate(config, int(updates[i]))
            alone[i].grad = grad[row]
            optimizers[i].step()
        updates[active] += 1
    assert (torch.stack(alone) - start).abs().mean() > 0.1
    torch.testing.assert_close(w, torch.stack(alone).detach(), atol=2e-6, rtol=2e-6)


def splitmix64(state: int, count: int) -> list[int]:
    """The numbers that SplitMix64 makes from a state, in plain integers."""
    numbers = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % WORD
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
        numbers.append(z ^ (z >> 31))
    return numbers


@given(key=st.integers(0, 2**63 - 1), first=st.integers(0, 10**7))
def test_bits_are_those_of_splitmix64(key: int, first: int) -> None:
    assert splitmix64(1234567, 2) == [6457827717110365317, 3203168211198807973]  # as published with the algorithm
    found = random_bits(torch.tensor([5, key]), torch.tensor([0, first]), 4)[1]
    assert [int(x) % WORD for x in found] == splitmix64((key + first * 0x9E3779B97F4A7C15) % WORD, 4)


def test_noise_is_box_and_mullers_of_those_bits() -> None:
    key, step, pairs = 987654321, 3, 5
    bits = splitmix64((key + step * pairs * 0x9E3779B97F4A7C15) % WORD, pairs)
    radius = [math.sqrt(-2 * math.log(((b >> 40) + 1) / 2**24)) for b in bits]
    angle = [2 * math.pi * ((b >> 8) % 2**24) / 2**24 for b in bits]
    expected = [r * math.cos(a) for r, a in zip(radius, angle, strict=True)]
    expected += [r * math.sin(a) for r, a in zip(radius, angle, strict=True)]
    found = normal(torch.tensor([key]), torch.tensor([step]), (3, 3))
    assert found.shape == (1, 3, 3)
    assert found.dtype == torch.float32
    assert found.flatten().tolist() == pytest.approx(expected[:9], abs=2e-6)


def test_noise_is_standard_normal_and_new_for_every_key_and_step() -> None:
    keys, steps = torch.tensor([1, 2, 3, 1, 2, 3]), torch.tensor([0, 0, 0, 1, 1, 1])
    draws = normal(keys, steps, (14, 512))
    for row in draws:
        assert scipy.stats.kstest(row.flatten().numpy(), "norm").pvalue > 1e-3
    correlation = torch.corrcoef(draws.flatten(1)) - torch.eye(6)
    assert correlation.abs().max() < 0.05  # four standard deviations of independent rows
    assert abs(float(scipy.stats.kurtosis(draws.flatten()))) < 0.1


def test_noise_does_not_depend_on_what_stands_beside_it() -> None:
    together = normal(torch.tensor([4, 5, 6]), torch.tensor([9, 2, 7]), (8, 64))
    assert torch.equal(normal(torch.tensor([5]), torch.tensor([2]), (8, 64)), together[1:2])
