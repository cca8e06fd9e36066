"""t-SignSGD against the float64 oracle, whose quantile is torch.quantile: every entry is equal after every step."""
import copy
import io
import math
import warnings

import oracle
import pytest
import torch
from pairs import pairwise
from torch.optim.lr_scheduler import LRScheduler

import t_signSGD
from t_signSGD import (
    HALVINGS,
    batches,
    move_one,
    move_together,
    order_statistic,
    promised_by_flips,
    share_of_rate,
    sigma,
    tSignSGD,
)

SHAPES = ((8, 40), (24, 8), (1, 7), (3, 1001))
WAYS = ("one by one", "together")


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def ternary_parameters(shapes=SHAPES, dtype=torch.float32, seed=0):
    generator = seeded(seed)
    return [torch.nn.Parameter(torch.randint(-1, 2, shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(parameters, t, kind="normal"):
    """The gradients of step t. They depend on t alone, so that a resumed run gets the same ones."""
    generator = seeded(1000 + t)
    for p in parameters:
        if kind == "normal":
            g = torch.randn(p.shape, generator=generator) * 0.01
        elif kind == "ties":                # seven values, each many times; one is 0
            g = torch.randint(-3, 4, p.shape, generator=generator) * 0.25
        elif kind == "tiny":                # most of them below tau, some above
            g = torch.randn(p.shape, generator=generator) * 1e-9
        elif kind == "large":               # beyond the spike norm
            g = torch.randn(p.shape, generator=generator) * 100
        else:
            g = torch.zeros(p.shape)
        p.grad = g.to(p.dtype)


def values(parameters):
    return [p.detach().clone() for p in parameters]


def gradients(parameters):
    return [p.grad.clone() for p in parameters]


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    """How tensors step: "one by one" as a CPU does it, or "together" as a GPU does it, though on the CPU here."""
    if request.param == "together":
        def move_one(p, gradient, sigma_t, spike, forget):
            count, = move_together([p], [gradient], sigma_t, torch.tensor(spike), torch.tensor(True), forget)
            return count
        monkeypatch.setattr(t_signSGD, "move_one", move_one)
    return request.param


# --- the schedule -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("t, want", [(1, 0.95 + 0.049 / 80), (40, 0.9745), (80, 0.999), (81, 0.999 + 0.0009 / 20),
                                     (90, 0.99945), (99, 0.999 + 0.0009 * 19 / 20), (100, 0.9999), (150, 0.9999)])
def test_sigma_at_named_points(t, want):
    """Worked by hand for 100 steps: start, middle, turn, last phase, end and beyond the end."""
    assert sigma(t, 100, 0.95, 0.999, 0.9999) == pytest.approx(want, rel=1e-14)
    assert oracle.sigma(t, 100) == pytest.approx(want, rel=1e-14)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7, 33, 300])
def test_sigma_over_whole_runs(steps):
    """Every step of short and long runs is the oracle's. With these settings sigma rises at every step."""
    levels = [sigma(t, steps, 0.5, 0.9, 0.99) for t in range(1, steps + 1)]
    assert levels == [pytest.approx(oracle.sigma(t, steps, 0.5, 0.9, 0.99), rel=1e-14) for t in range(1, steps + 1)]
    assert levels == sorted(set(levels)) and levels[-1] == 0.99


def test_current_sigma_follows_the_steps():
    """current_sigma() is the last step's, with the defaults 0.95, 0.999, 0.9999. Unscheduled it stays at 0.95."""
    parameters = ternary_parameters([(4, 4)])
    free, scheduled = tSignSGD(parameters), tSignSGD(parameters)
    scheduled.create_scheduler(10)
    for t in range(1, 13):
        set_gradients(parameters, t)
        free.step()
        scheduled.step()
        assert scheduled.current_sigma() == pytest.approx(oracle.sigma(t, 10), rel=1e-14)
        assert free.current_sigma() == 0.95
    assert scheduled.current_sigma() == 0.9999


# --- the order statistic ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("level", [0.07, 0.29, 0.5, 0.9, 0.95, 0.951225, 0.999, 0.9999, 0.99995])
def test_order_statistic_bounds_the_quantile(level):
    """It is an entry of the tensor beside float64 torch.quantile, with and without ties, in every dtype.

    So "above it" and "at or above it" choose the very same entries as the interpolated quantile does. Left out are
    ranks a rounding away from a whole number (0.07 * 100). There float64 interpolation gives the entry itself, though
    the quantile lies just beyond it.
    """
    for size in [*range(1, 65), 101, 1000, 1001, 4096, 20001]:
        rank = level * (size - 1)
        if 0 < abs(rank - round(rank)) < 1e-9:
            continue
        for wide in (torch.randn(size, generator=seeded(size)).abs(), torch.arange(size) % 5,
                     torch.randperm(size, generator=seeded(size))):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                entries = wide.to(dtype)
                quantile = torch.quantile(entries.double(), level)
                below, above = order_statistic(entries, level, math.floor), order_statistic(entries, level, math.ceil)
                assert below.dtype == dtype and below in entries and above in entries
                assert torch.equal(entries > below, entries.double() > quantile), (size, dtype)
                assert torch.equal(entries >= above, entries.double() >= quantile), (size, dtype)


def test_order_statistic_of_two_dims_by_hand():
    """0 ... 10 in a matrix: the 0.95 quantile 9.5 lies between 9 and 10. At a whole rank both sides are the entry."""
    entries = torch.tensor([[10.0, 3, 0, 7, 1, 9, 2, 8, 4, 6, 5]])
    assert order_statistic(entries, 0.95, math.floor) == 9 and order_statistic(entries, 0.95, math.ceil) == 10
    assert order_statistic(entries, 0.5, math.floor) == order_statistic(entries, 0.5, math.ceil) == 5


@pytest.mark.parametrize("kind", ["random", "sorted", "mostly zero", "ties", "strided", "constant"])
def test_order_statistic_of_large_tensors(kind):
    """A sample narrows the selection down here. The entry is still the one that a full sort finds.

    That holds too where the sample misleads.
    """
    count = 100_003
    generator = seeded(0)
    values = torch.rand(count, generator=generator)
    if kind == "sorted":
        values = values.sort().values
    elif kind == "mostly zero":
        values[torch.rand(count, generator=generator) < 0.97] = 0
    elif kind == "ties":
        values = (values * 50).round()
    elif kind == "strided":
        values[::12] += 1                       # every entry of the sample is among the largest
    elif kind == "constant":
        values.fill_(0.5)
    ordered = values.sort().values
    for level in (0.5, 0.95, 0.999, 0.9999, 0.99995):
        for side in (math.floor, math.ceil):
            assert order_statistic(values, level, side) == ordered[side(level * (count - 1))], (level, side)


# --- steps --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, start, dtype, way", pairwise(
    kind=("normal", "ties", "tiny", "large", "zero"), start=(0.5, 0.95), dtype=(torch.float32, torch.bfloat16),
    way=WAYS, also=[("large", 0.95, torch.float32, way) for way in WAYS]), indirect=["way"])
def test_steps_are_the_oracles(kind, start, dtype, way):
    """40 steps through both phases: after each, all entries are the oracle's, ternary, and `flipped` counts moves."""
    steps, parameters = 40, ternary_parameters(dtype=dtype)
    optimizer = tSignSGD(parameters, threshold_ratio=start, min_grad=0.97, filter_upper=0.999)
    optimizer.create_scheduler(steps)
    moved = clipped = 0
    for t in range(1, steps + 1):
        set_gradients(parameters, t, kind)
        before, grads = values(parameters), gradients(parameters)
        optimizer.step()
        level = oracle.sigma(t, steps, start, 0.97, 0.999)
        want = oracle.sign_step(before, grads, level, t > 0.8 * steps)
        for p, old, new, g in zip(parameters, before, want, grads, strict=True):
            assert p.dtype == dtype and torch.equal(p.detach().double(), new), f"step {t}"
            assert torch.equal(p.grad, g)
            assert set(p.detach().flatten().tolist()) <= {-1.0, 0.0, 1.0}
            changed = int((p != old).sum())
            assert int(optimizer.flipped[p]) == changed
            moved += changed
            above = g.double().abs() > max(1e-9, torch.quantile(g.double().abs(), level).item())
            clipped += int((above & (old.double() == -g.double().sign())).sum())
    if kind == "zero":
        assert moved == 0
    else:
        assert moved > 0 and clipped > 0


@pytest.mark.parametrize("value, dtype, way", pairwise(
    value=(0.9e-9, 1.1e-9), dtype=(torch.float32, torch.bfloat16), way=WAYS), indirect=["way"])
def test_tau(value, dtype, way):
    """All other gradients are 0, and so is the quantile, yet an entry moves only by a gradient beyond tau = 1e-9."""
    moves = value > 1e-9
    p = torch.nn.Parameter(torch.zeros(100, dtype=dtype))
    p.grad = torch.zeros(100, dtype=dtype)
    p.grad[7], p.grad[8] = value, -value
    tSignSGD([p]).step()
    assert p.detach().nonzero().flatten().tolist() == ([7, 8] if moves else [])
    assert (p[7] == -1 and p[8] == 1) == moves


@pytest.mark.parametrize("start", [0.95, 0.8])
def test_share_of_entries_that_move(start):
    """Of 1,001 different gradients those above the quantile's rank move. By hand: 50 at 0.95, 200 at 0.8."""
    p = torch.nn.Parameter(torch.zeros(1001))
    p.grad = torch.arange(1.0, 1002)[torch.randperm(1001, generator=seeded(0))]
    optimizer = tSignSGD([p], threshold_ratio=start)
    optimizer.step()
    count = round((1 - start) * 1000)
    assert torch.equal(p.detach() == -1, p.grad > 1001 - count)
    assert int(optimizer.flipped[p]) == count == int((p != 0).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_entries_than_torch_quantile_takes(dtype):
    """2**24 + 3 entries of 251 sizes: exactly those above the quantile move. The test sorts nothing."""
    size, kinds = 2**24 + 3, 251
    magnitude = torch.arange(size) * 7919 % kinds
    p = torch.nn.Parameter(torch.zeros(size, dtype=dtype))
    p.grad = torch.where(torch.arange(size) % 3 == 0, -magnitude, magnitude).to(dtype)
    up_to = torch.bincount(magnitude, minlength=kinds).cumsum(0)       # entries of at most each size
    rank = math.floor(0.95 * (size - 1))
    quantile = int((up_to <= rank).sum())                               # the entry of that rank, and of ranks near it
    assert up_to[quantile] > rank + 1 and 0 < quantile < kinds - 1
    tSignSGD([p]).step()
    assert torch.equal(p.detach(), torch.where(magnitude > quantile, -p.grad.sign(), 0))
    assert int((p != 0).sum()) == size - int(up_to[quantile])


def test_tensors_of_one_shape_move_together(monkeypatch):
    """Five tensors of two shapes, cut into batches: each moves as it does alone. None moves unless all are finite."""
    shapes = [(4, 30), (4, 30), (7, 11), (4, 30), (7, 11)]
    together, alone = ternary_parameters(shapes), ternary_parameters(shapes)
    for parameters in (together, alone):
        set_gradients(parameters, 1, "large")
    monkeypatch.setattr(t_signSGD, "BATCH_ENTRIES", 240)
    cut = list(batches(together))
    assert [[id(p) for p in batch] for batch in cut] == [
        [id(together[i]) for i in batch] for batch in ((0, 1), (3,), (2, 4))]
    before = values(together)
    for batch in cut:
        none = move_together(batch, [p.grad for p in batch], 0.9, torch.tensor(True), torch.tensor(False))
        assert none.tolist() == [0] * len(batch)
    assert all(torch.equal(p, b) for p, b in zip(together, before, strict=True))
    counts = {}
    for batch in cut:
        moved = move_together(batch, [p.grad for p in batch], 0.9, torch.tensor(True), torch.tensor(True))
        counts.update(zip(batch, moved, strict=True))
    for p, q in zip(together, alone, strict=True):
        assert counts[p] == move_one(q, q.grad, 0.9, True) > 0
        assert torch.equal(p, q)


@pytest.mark.parametrize("norm, phase_over, spared", [(10.5, True, True), (9.5, True, False), (10.5, False, False)])
def test_spike_rule(norm, phase_over, spared, way):
    """In the last phase, with a global norm beyond 10, the entries at or above the 0.99995 quantile stay.

    Of 40,001 different gradients these are the three largest. Two tensors share the norm, because neither may pass 10
    alone.
    """
    parameters = [torch.nn.Parameter(torch.zeros(40001)) for _ in range(2)]
    for p in parameters:
        g = torch.arange(1.0, 40002)[torch.randperm(40001, generator=seeded(1))]
        p.grad = g * (norm / 2**0.5 / g.norm())
    optimizer = tSignSGD(parameters, threshold_ratio=0.99, min_grad=0.99, filter_upper=0.99)
    optimizer.create_scheduler(10)
    optimizer.param_groups[0]["step"] = 8 if phase_over else 7
    before, grads = values(parameters), gradients(parameters)
    optimizer.step()
    for p, want in zip(parameters, oracle.sign_step(before, grads, 0.99, phase_over), strict=True):
        assert torch.equal(p.detach().double(), want)
        top = p.grad.argsort(descending=True)
        assert not p[top[400:]].any() and bool((p[top[3:400]] == -1).all())
        assert bool((p[top[:3]] == (0 if spared else -1)).all())


def test_no_spike_rule_without_a_schedule():
    """Before create_scheduler() there is no last phase, so the largest gradients move, however large they are."""
    p = torch.nn.Parameter(torch.zeros(101))
    p.grad = torch.arange(101.0)
    tSignSGD([p]).step()
    assert p.detach().nonzero().flatten().tolist() == [96, 97, 98, 99, 100]


def test_parameters_without_gradients_and_closures():
    """A parameter without a gradient stays. The closure runs with gradients on, and step() returns its loss."""
    parameters = ternary_parameters([(6, 6), (5, 5)])
    before = values(parameters)
    optimizer = tSignSGD(parameters, threshold_ratio=0.5)

    def closure():
        loss = (parameters[0] * torch.arange(36.0).view(6, 6)).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == (before[0] * torch.arange(36.0).view(6, 6)).sum()
    assert torch.equal(parameters[1], before[1]) and not torch.equal(parameters[0], before[0])
    want, = oracle.sign_step(before[:1], [parameters[0].grad], 0.5, False)
    assert torch.equal(parameters[0].detach().double(), want)


# --- what it refuses ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("value, dtype", pairwise(
    value=(math.nan, math.inf, -math.inf), dtype=(torch.float32, torch.bfloat16)))
def test_gradients_that_are_not_finite(value, dtype):
    """The error names the tensor, no tensor has moved, and the step does not count."""
    parameters = ternary_parameters([(8, 8), (8, 9), (9, 8)], dtype)
    optimizer = tSignSGD([(f"layers.{i}.lora_A.weight", p) for i, p in enumerate(parameters)], threshold_ratio=0.5)
    optimizer.create_scheduler(10)
    set_gradients(parameters, 1)
    optimizer.step()
    set_gradients(parameters, 2)
    parameters[1].grad[3, 3] = value
    before = values(parameters)
    with pytest.raises(FloatingPointError, match=r"layers\.1\.lora_A\.weight.*step 2"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    set_gradients(parameters, 2)
    grads = gradients(parameters)
    optimizer.step()
    want = oracle.sign_step(before, grads, oracle.sigma(2, 10, 0.5), False)
    assert all(torch.equal(p.detach().double(), w) for p, w in zip(parameters, want, strict=True))


def test_unnamed_parameters_are_counted_in_errors():
    """Without names the error gives the position."""
    parameters = ternary_parameters([(2, 2), (2, 3)])
    set_gradients(parameters, 1)
    parameters[1].grad[0] = math.nan
    with pytest.raises(FloatingPointError, match="parameter 1 "):
        tSignSGD(parameters).step()


@pytest.mark.parametrize("name", ["threshold_ratio", "min_grad", "filter_upper"])
def test_levels_outside_0_and_1(name):
    """Each level must lie in the open interval (0, 1), and the error says which does not."""
    for value in (0, 1, -0.1, 1.5):
        with pytest.raises(ValueError, match=name):
            tSignSGD(ternary_parameters(), **{name: value})


def test_int_params():
    """A model's other parameters stay, also one whose entries equal a ternary one's. Names stay with their tensors."""
    ternary, real = ternary_parameters([(2, 2)])[0], torch.nn.Parameter(torch.full((3,), 0.5))
    equal = torch.nn.Parameter(ternary.detach().clone())
    named = [("real", real), ("a", ternary), ("b", equal)]
    optimizer = tSignSGD([{"params": named[:1]}, {"params": named[1:]}], int_params=[ternary])
    assert [(group["params"], group["param_names"]) for group in optimizer.param_groups] == [([ternary], ["a"])]
    before = values([ternary, equal, real])
    for p in (ternary, equal, real):
        p.grad = torch.where(p.detach() < 0, -1.0, 1.0) * torch.arange(1.0, p.numel() + 1).view_as(p)
    optimizer.step()
    after = values([ternary, equal, real])
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1]) and torch.equal(before[2], after[2])
    with pytest.raises(ValueError, match="nothing would be trained"):
        tSignSGD([real], int_params=[ternary])


def test_settings_are_given_by_name():
    """In the published optimizer the second argument is a learning rate. Here it would become sigma."""
    with pytest.raises(TypeError):
        tSignSGD(ternary_parameters(), 1e-5)


# --- torch's machinery --------------------------------------------------------------------------------------------

def test_create_scheduler():
    """It is a constant scheduler of torch's own kind. The order of calls gives no warning, and its state survives."""
    parameters = ternary_parameters()
    optimizer = tSignSGD(parameters)
    scheduler = optimizer.create_scheduler(5)
    assert isinstance(scheduler, LRScheduler) and scheduler.optimizer is optimizer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t in range(1, 6):
            set_gradients(parameters, t)
            optimizer.step()
            scheduler.step()
            assert scheduler.get_last_lr() == [1.0]
    again = tSignSGD(ternary_parameters()).create_scheduler(5)
    again.load_state_dict(scheduler.state_dict())
    assert again.last_epoch == 5
    for steps in (0, -3):
        with pytest.raises(ValueError, match=str(steps)):
            optimizer.create_scheduler(steps)


def run(parameters, optimizer, first, last):
    for t in range(first, last + 1):
        set_gradients(parameters, t, "normal")
        optimizer.step()
    return values(parameters)


@pytest.mark.parametrize("schedule_first", [True, False])
@pytest.mark.parametrize("stop", [7, 17])
def test_a_resumed_run_goes_on_where_it_was(stop, schedule_first):
    """The state is saved to bytes in either phase and loaded into a new optimizer, whose scheduler is made or not.

    Every entry and sigma go on as in an uninterrupted run. Without the state they would not.
    """
    levels = dict(threshold_ratio=0.6, min_grad=0.9, filter_upper=0.99)
    parameters = ternary_parameters()
    optimizer = tSignSGD(parameters, **levels)
    optimizer.create_scheduler(20)
    halfway = run(parameters, optimizer, 1, stop)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    whole = run(parameters, optimizer, stop + 1, 20)

    def resumed(load):
        copies = [torch.nn.Parameter(p.clone()) for p in halfway]
        other = tSignSGD(copies, **levels)
        if schedule_first or not load:
            other.create_scheduler(20)
        if load:
            file.seek(0)
            other.load_state_dict(torch.load(file, weights_only=True))
            assert other.current_sigma() == pytest.approx(oracle.sigma(stop, 20, 0.6, 0.9, 0.99), rel=1e-14)
        return run(copies, other, stop + 1, 20)

    assert all(torch.equal(a, b) for a, b in zip(whole, resumed(True), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(whole, resumed(False), strict=True))


def test_another_length_on_resuming_follows_its_own_schedule():
    """The resumed run's create_scheduler() sets the number of steps. The step count comes from the state."""
    p = torch.nn.Parameter(torch.zeros(10))
    first = tSignSGD([p])
    first.create_scheduler(10)
    for _ in range(4):
        p.grad = torch.randn(10)
        first.step()
    second = tSignSGD([p])
    second.create_scheduler(20)
    second.load_state_dict(first.state_dict())
    second.step()
    assert second.current_sigma() == pytest.approx(0.95 + 5 / 16 * 0.049, abs=1e-12)
    third = tSignSGD([p])
    third.load_state_dict(first.state_dict())
    third.step()
    assert third.current_sigma() == pytest.approx(0.95 + 5 / 8 * 0.049, abs=1e-12)


def test_momentum_moves_by_the_average_of_the_gradients(way):
    """Each step is the oracle's on the average of gradients: 0.9 of the last average plus 0.1 of the new gradient.

    The average of an entry is 0 after it moved. A run that is resumed goes on with its averages. A run without momentum
    ends elsewhere. Gradients lie transposed in memory, as the layer hands them over.
    """
    parameters, plain = ternary_parameters(), ternary_parameters()
    optimizer, other = tSignSGD(parameters, threshold_ratio=0.8, momentum=0.9), tSignSGD(plain, threshold_ratio=0.8)
    averages = [torch.zeros(p.shape, dtype=torch.float64) for p in parameters]
    for t in range(1, 9):
        if t == 5:
            state, copies = optimizer.state_dict(), [torch.nn.Parameter(p.detach().clone()) for p in parameters]
            parameters, optimizer = copies, tSignSGD(copies, threshold_ratio=0.8, momentum=0.9)
            optimizer.load_state_dict(state)
        for some in (parameters, plain):
            set_gradients(some, t)
            for p in some:
                p.grad = p.grad.t().contiguous().t() if p.ndim == 2 else p.grad
        before = values(parameters)
        averages = [0.9 * a + 0.1 * p.grad.double() for a, p in zip(averages, parameters, strict=True)]
        optimizer.step()
        other.step()
        for p, want in zip(parameters, oracle.sign_step(before, averages, 0.8, False), strict=True):
            assert torch.equal(p.detach().double(), want), t
        averages = [torch.where(p.detach() == old, average, 0)
                    for average, p, old in zip(averages, parameters, before, strict=True)]
    assert not all(torch.equal(p, q) for p, q in zip(parameters, plain, strict=True))
    with pytest.raises(ValueError, match="momentum"):
        tSignSGD(parameters, momentum=1.0)


def test_a_real_optimizer_goes_along():
    """Real parameters take AdamW's steps, and each group's learning rate falls to 0 over the run.

    A resumed run goes on with them, and zero_grad() reaches them.
    """
    rates = 0.1, 0.3

    def gradient(t, i):
        return torch.randn(6, 5, generator=seeded(10 * t + i))

    def made(real):
        optimizer = tSignSGD(ternary_parameters([(4, 4)]), real_optimizer=torch.optim.AdamW(
            [{"params": [p], "lr": rate} for p, rate in zip(real, rates, strict=True)], weight_decay=0.0))
        optimizer.create_scheduler(10)
        return optimizer

    def zeros():
        return [torch.nn.Parameter(torch.zeros(6, 5)) for _ in rates]
    ours, own = zeros(), zeros()
    optimizer = made(ours)
    adamw = [torch.optim.AdamW([p], weight_decay=0.0) for p in own]
    for t in range(1, 11):
        if t == 6:
            again = [torch.nn.Parameter(p.detach().clone()) for p in ours]
            resumed = made(again)
            resumed.load_state_dict(optimizer.state_dict())
            ours, optimizer = again, resumed
        for i, rate in enumerate(rates):
            ours[i].grad, own[i].grad = gradient(t, i), gradient(t, i)
            adamw[i].param_groups[0]["lr"] = rate * (1 - (t - 1) / 10)
            adamw[i].step()
        optimizer.step()
        assert all(torch.equal(p, q) for p, q in zip(ours, own, strict=True)), t
    assert all(bool(p.any()) for p in ours) and not torch.equal(*ours)
    optimizer.zero_grad()
    assert all(p.grad is None for p in ours)


def test_a_real_gradient_that_is_not_finite_stops_everything():
    """The error names the parameter, and neither it nor a ternary entry has moved.

    Where no gradient is finite, as Trainer's clipping leaves them, no name is blamed. Real gradients do not count in
    the spike norm.
    """
    real = [torch.nn.Parameter(torch.zeros(3, 2)) for _ in range(2)]
    parameters = ternary_parameters([(4, 4)])
    optimizer = tSignSGD(parameters, threshold_ratio=0.5, real_optimizer=torch.optim.AdamW(
        [(f"mu {i}", p) for i, p in enumerate(real)], lr=0.1))
    set_gradients(parameters, 1)
    for p in real:
        p.grad = torch.ones(3, 2)
    real[1].grad[0, 0] = math.inf
    before = values(parameters)
    with pytest.raises(FloatingPointError, match="the gradient of mu 1 is not finite at step 1"):
        optimizer.step()
    assert torch.equal(parameters[0], before[0]) and not any(bool(p.any()) for p in real)
    torch.nn.utils.clip_grad_norm_([*parameters, *real], math.inf)
    with pytest.raises(FloatingPointError, match="no gradient is finite at step 1"):
        optimizer.step()
    real[0].grad, real[1].grad = torch.ones(3, 2), torch.full((3, 2), 1e6)
    parameters[0].grad = torch.full((4, 4), 0.1)
    _, spike = optimizer._judge_gradients()
    assert not spike


# --- the limit of a step ------------------------------------------------------------------------------------------

def test_what_flips_promise_by_hand():
    """sigma 0.5 of 11 entries flips 5, then 3, 2 and at least 1. The gradient counts, where the direction chooses.

    The entry with the second largest direction is at its end, and promises nothing.
    """
    p = torch.nn.Parameter(torch.tensor([0, 0, -1, 0, 0, 0, 0, 0, 0, 0, 1.0]))
    p.grad = torch.tensor([64, 32, 16, 8, -4, 2, 0, 0, 0, 0, 1.0])
    direction = torch.tensor([7, 6, 10, 8, -9, 1, 0, 0, 0, 0, 11.0])
    promised = promised_by_flips(p, direction, 0.5)             # by direction: 1, at its end, 4, 8, 64
    assert promised.tolist() == [77.0, 5.0, 1.0, *[1.0] * (HALVINGS - 2)]
    assert promised_by_flips(p, direction.view(1, 11).t().flatten(), 0.9).tolist() == [1.0] * (HALVINGS + 1)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("limit, times", [(1e9, 0), (3.0, 1), (2.0, 2), (1.0, 3)])
def test_a_limit_halves_the_flips_of_all_tensors(way, momentum, limit, times):
    """The step is that of sigma 1 - 0.2 / 2**times. With it the flips promise no more than the limit, and before more.

    Promises are those of the gradients over omega, also with momentum.
    """
    parameters, copies = ternary_parameters(seed=1), ternary_parameters(seed=1)
    level = 1 - 0.2 / 2**times
    limited = tSignSGD(parameters, threshold_ratio=0.8, momentum=momentum, flip_limit=limit, omega=2.0)
    plain = tSignSGD(copies, threshold_ratio=level)
    set_gradients(parameters, 1)
    set_gradients(copies, 1)
    promised = [sum(promised_by_flips(p, p.grad, at)[0].item() for p in parameters) / 2
                for at in (level, 1 - 0.4 / 2**times)]
    assert promised[0] <= limit and (times == 0 or promised[1] > limit)
    limited.step()
    plain.step()
    assert limited.current_sigma() == pytest.approx(level, abs=1e-15) and limited.halvings == times
    assert all(torch.equal(p, q) for p, q in zip(parameters, copies, strict=True))


@pytest.mark.parametrize("warm_up, want", [(0.0, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0]),
                                           (0.4, [0.25, 0.45, 0.6, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0]),
                                           (0.1, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0]),
                                           (0.15, [1 / 1.5, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0])])
def test_learning_rates_rise_and_fall(warm_up, want):
    """By hand for 10 steps and one beyond: the line from 1 to 0, times t / (warm_up * 10) up to 1."""
    real = torch.nn.Parameter(torch.zeros(3))
    optimizer = tSignSGD(ternary_parameters([(4, 4)]), warm_up=warm_up,
                         real_optimizer=torch.optim.AdamW([real], lr=0.5))
    optimizer.create_scheduler(10)
    rates = []
    for _ in want:
        real.grad = torch.ones(3)
        optimizer.step()
        rates.append(optimizer.real_groups()[0]["lr"])
    assert rates == pytest.approx([0.5 * share for share in want], abs=1e-15)
    assert [share_of_rate(t, 10, warm_up) for t in range(1, 12)] == pytest.approx(want, abs=1e-15)


@pytest.mark.parametrize("warm_up", [-0.1, 1.0, math.nan])
def test_warm_ups_that_are_none(warm_up):
    with pytest.raises(ValueError, match="warm_up must lie in"):
        tSignSGD(ternary_parameters([(4, 4)]), warm_up=warm_up)


def test_a_resumed_run_keeps_to_its_limit():
    """Ten steps in one go, and five and five: the same entries, real and ternary. The limit acts in some steps only."""
    def made(parameters, real):
        optimizer = tSignSGD(parameters, threshold_ratio=0.8, momentum=0.9, flip_limit=1.5, omega=2.0, warm_up=0.7,
                             real_optimizer=torch.optim.AdamW([real], lr=0.1, weight_decay=0.0))
        optimizer.create_scheduler(10)
        return optimizer

    def gradients_of(t, parameters, real):
        set_gradients(parameters, t)
        for p in parameters:
            p.grad *= 3 if t % 3 else 0.1
        real.grad = torch.randn(real.shape, generator=seeded(t)) * (3 if t % 3 else 0.1)

    whole, real = ternary_parameters(), torch.nn.Parameter(torch.zeros(6, 5))
    optimizer, seen = made(whole, real), []
    for t in range(1, 11):
        if t == 6:
            state = optimizer.state_dict()
            parts = [torch.nn.Parameter(p.detach().clone()) for p in whole]
            again = torch.nn.Parameter(real.detach().clone())
            resumed = made(parts, again)
            resumed.load_state_dict(copy.deepcopy(state))
        gradients_of(t, whole, real)
        optimizer.step()
        seen.append(optimizer.halvings)
        if t > 5:
            gradients_of(t, parts, again)
            resumed.step()
    assert all(torch.equal(p, q) for p, q in zip([*whole, real], [*parts, again], strict=True))
    assert 0 in seen and max(seen) > 0


@pytest.mark.parametrize("limit", [0, -1.0, math.nan])
def test_limits_that_are_none(limit):
    with pytest.raises(ValueError, match="flip_limit must be positive"):
        tSignSGD(ternary_parameters([(4, 4)]), flip_limit=limit)
