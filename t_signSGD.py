"""t-SignSGD: the optimizer of ternary adapters (LoTA-QAF, Eq. 6, https://arxiv.org/abs/2505.18724). Imports torch only.

Each step moves the few entries with the largest gradients by one against their sign, and keeps all in -1 ... 1:

    p <- clip(p - sign(g) * [|g| > max(tau, sigma_t-quantile of |g|)], -1, 1)

There is no learning rate, no weight decay and no gradient clipping; sigma_t alone says how many entries move. Beyond
the paper: with `momentum`, g is an average of the gradients since the entry last moved; and a `real_optimizer` may go
along, for parameters that are real numbers.
"""
import math

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

TAU = 1e-9                  # gradients up to here never move an entry
FIRST_PHASE = 0.8           # the share of the steps in which sigma goes from threshold_ratio to min_grad
SPIKE_NORM = 10.0           # in the last phase, gradients of a larger global norm ...
SPIKE_QUANTILE = 0.99995    # ... leave the entries at or above this quantile alone
SAMPLE = 8192               # entries of the sample that narrows a selection down
BATCH_ENTRIES = 1 << 25     # entries that a GPU treats in one go


def sigma(t, num_steps, threshold_ratio, min_grad, filter_upper):
    """sigma_t for step t = 1 ... num_steps: linear in both phases, `filter_upper` from the last step on."""
    first_phase = FIRST_PHASE * num_steps
    if t >= num_steps:
        return filter_upper
    if t <= first_phase:
        return threshold_ratio + t / first_phase * (min_grad - threshold_ratio)
    return min_grad + (t - first_phase) / (num_steps - first_phase) * (filter_upper - min_grad)


class tSignSGD(Optimizer):
    """t-SignSGD over ternary parameters.

    params: ternary tensors, or (name, tensor) pairs, whose names are used in errors. threshold_ratio, min_grad,
    filter_upper: sigma at the start, after 80 % of the steps, and at the end, each in (0, 1). int_params: where
    given, the ternary ones among `params`; any other raises ValueError, for this optimizer can train no others.
    momentum in [0, 1): the weight of the past in the average of gradients that moves the entries; 0, the paper's,
    takes each step's own. An entry that moves starts its average anew: what moved it is spent. real_optimizer: another
    torch optimizer, over parameters that are not ternary; it steps along, and its learning rates fall to 0.
    num_training_steps comes with create_scheduler(); until then sigma stays at threshold_ratio.
    The step count and the schedule are part of state_dict, so a resumed run goes on where it was.
    """

    def __init__(self, params, threshold_ratio=0.95, min_grad=0.999, filter_upper=0.9999, int_params=None,
                 momentum=0.0, real_optimizer=None):
        for name, value in (("threshold_ratio", threshold_ratio), ("min_grad", min_grad),
                            ("filter_upper", filter_upper)):
            if not 0 < value < 1:
                raise ValueError(f"{name} must lie in (0, 1), not {value}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), not {momentum}")
        # torch's schedulers and Trainer want an "lr"; this method has none, and 1 is the size of its steps.
        super().__init__(params, {"lr": 1.0, "threshold_ratio": threshold_ratio, "min_grad": min_grad,
                                  "filter_upper": filter_upper, "num_training_steps": None, "step": 0})
        if int_params is not None:
            ternary = {id(p) for p in int_params}
            if any(id(p) not in ternary for group in self.param_groups for p in group["params"]):
                raise ValueError("tSignSGD trains ternary parameters only; params holds others")
        self.momentum, self.real_optimizer = momentum, real_optimizer
        self.real_rates = [group["lr"] for group in self.real_groups()]
        self.flipped = {}       # parameter -> entries that moved in the last step, 0-dim tensors on its device
        self._judged = None     # (names, step, their gradients' norms on the way to the CPU)

    def real_groups(self):
        return self.real_optimizer.param_groups if self.real_optimizer else []

    def create_scheduler(self, num_training_steps):
        """Fixes the run's real number of optimizer steps; returns the constant learning-rate scheduler that
        Trainer asks for. Raises ValueError unless num_training_steps > 0."""
        if num_training_steps <= 0:
            raise ValueError(f"num_training_steps must be positive, not {num_training_steps}")
        for group in self.param_groups:
            group["num_training_steps"] = num_training_steps
        return LambdaLR(self, lambda _: 1.0)

    def load_state_dict(self, state_dict):
        """Takes the step count from the state. The number of steps too, unless create_scheduler() was called before:
        a run resumed with another length follows the schedule of its own length."""
        own = [group["num_training_steps"] for group in self.param_groups]
        if self.real_optimizer:
            self.real_optimizer.load_state_dict(state_dict["real"])
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "real"})
        for group, num_training_steps in zip(self.param_groups, own, strict=True):
            group["num_training_steps"] = num_training_steps or group["num_training_steps"]

    def current_sigma(self):
        """sigma_t of the last step taken."""
        return self._sigma(self.param_groups[0])

    @staticmethod
    def _sigma(group):
        if group["num_training_steps"] is None:
            return group["threshold_ratio"]
        return sigma(group["step"], group["num_training_steps"], group["threshold_ratio"], group["min_grad"],
                     group["filter_upper"])

    def state_dict(self):
        self.raise_unless_finite()
        state = super().state_dict()
        return {**state, "real": self.real_optimizer.state_dict()} if self.real_optimizer else state

    def zero_grad(self, set_to_none=True):
        super().zero_grad(set_to_none)
        if self.real_optimizer:
            self.real_optimizer.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure=None):
        """One step. Raises FloatingPointError where a gradient is not finite; then nothing has moved.

        On a GPU nothing here waits for it: no ternary entry moves, and the error comes with the next step,
        state_dict() or raise_unless_finite().
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.raise_unless_finite()
        finite, spike = self._judge_gradients()
        for group in self.param_groups:
            group["step"] += 1
            level = self._sigma(group)
            last_phase = (group["num_training_steps"] is not None
                          and group["step"] > FIRST_PHASE * group["num_training_steps"])
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                if p.device.type == "cpu":
                    self.flipped[p] = move_one(p, self._direction(p), level, last_phase and bool(spike),
                                               forget=self.momentum > 0)
            for batch in batches([p for p in parameters if p.device.type != "cpu"]):
                flipped = move_together(batch, [self._direction(p) for p in batch], level,
                                        spike if last_phase else None, finite, forget=self.momentum > 0)
                self.flipped.update(zip(batch, flipped, strict=True))
        if self.real_optimizer:
            group = self.param_groups[0]
            for own, rate in zip(self.real_groups(), self.real_rates, strict=True):
                if group["num_training_steps"] is not None:
                    own["lr"] = rate * max(0.0, 1 - (group["step"] - 1) / group["num_training_steps"])
                for p in own["params"]:
                    if p.grad is not None and p.device.type != "cpu":
                        p.grad.masked_fill_(~finite.to(p.device), 0.0)
            self.real_optimizer.step()
        return loss

    def _direction(self, p):
        """What moves the entries of p: its gradient, or the average of its gradients."""
        if not self.momentum:
            return p.grad
        state = self.state[p]
        if "average" not in state:
            state["average"] = torch.zeros(p.shape, dtype=p.grad.dtype, device=p.device)        # contiguous
        return state["average"].lerp_(p.grad, 1 - self.momentum)

    def _judge_gradients(self):
        """(all gradients are finite, their global norm is beyond SPIKE_NORM): 0-dim tensors on the first's device."""
        named = [pair for group in self.param_groups for pair in with_gradients(group)]
        ternary = len(named)
        named += [pair for group in self.real_groups() for pair in with_gradients(group)]
        if not named:
            return torch.tensor(True), torch.tensor(False)
        norms = torch._foreach_norm([p.grad for _, p in named], 2, torch.float32)
        norms = torch.stack([n.to(norms[0].device) for n in norms])
        # A norm beyond float32's range counts as not finite too.
        self._judged = [name for name, _ in named], self.param_groups[0]["step"] + 1, _to_host(norms)
        if norms.device.type == "cpu":
            self.raise_unless_finite()
        return torch.isfinite(norms).all(), torch.linalg.vector_norm(norms[:ternary]) > SPIKE_NORM

    def raise_unless_finite(self):
        """Raises FloatingPointError where a gradient of the step that was judged last was not finite."""
        if self._judged is None:
            return
        names, step, (norms, ready) = self._judged
        self._judged = None
        if ready is not None:
            ready.synchronize()         # of the step before: long reached
        wrong = [name for name, finite in zip(names, torch.isfinite(norms).tolist(), strict=True) if not finite]
        if wrong:       # Trainer's gradient norm spreads one NaN to all gradients: then no name is to blame
            which = "no gradient is" if len(wrong) == len(names) > 1 else f"the gradient of {wrong[0]} is not"
            raise FloatingPointError(f"{which} finite at step {step}")


def with_gradients(group):
    """(name, parameter) of those in an optimizer's group that have a gradient."""
    names = group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))]
    return [(name, p) for name, p in zip(names, group["params"], strict=True) if p.grad is not None]


def _to_host(values):
    """(a copy on the CPU, the event after which it is there or None), without waiting for it."""
    if values.device.type != "cuda":
        return values.cpu(), None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return host, ready


@torch.no_grad()
def move_one(p, gradient, level, spike, forget=False):
    """Eq. 6 on one tensor, touching only the entries that move: fast where a look at the data costs nothing (a CPU).

    forget: set `gradient`, which is contiguous then, to 0 where an entry changed. Returns how many changed, a 0-dim
    tensor.
    """
    size, gradient, flat = gradient.abs().flatten(), gradient.flatten(), p.view(-1)
    where, chosen, low = largest(size, math.floor(level * (len(size) - 1)))
    moves = chosen > low.clamp(min=TAU)
    if spike:
        moves &= chosen < order_statistic(size, SPIKE_QUANTILE, math.ceil)
    where = where[moves]
    old = flat.index_select(0, where)
    new = (old - gradient.index_select(0, where).sign_()).clamp_(-1, 1)
    flat.index_copy_(0, where, new)
    changed = new != old
    if forget:
        gradient.index_fill_(0, where[changed], 0)
    return torch.count_nonzero(changed)


def batches(parameters):
    """Lists of parameters of equal shape, dtype and device, of up to BATCH_ENTRIES entries together."""
    alike = {}
    for p in parameters:
        alike.setdefault((p.shape, p.dtype, p.grad.dtype, p.device), []).append(p)
    for together in alike.values():
        count = max(1, BATCH_ENTRIES // max(1, together[0].numel()))
        yield from (together[i:i + count] for i in range(0, len(together), count))


@torch.no_grad()
def move_together(parameters, gradients, level, spike, finite, forget=False):
    """Eq. 6 on tensors of one shape in a few launches, none of which the CPU waits for. Moves nothing unless `finite`.

    spike: whether the largest entries stay, or None before the last phase; both are 0-dim tensors. forget: set the
    gradients to 0 where an entry changed. Returns how many entries of each changed, [len(parameters)].
    """
    device = parameters[0].device
    gradient = torch.stack([g.flatten() for g in gradients])
    size, last = gradient.abs(), gradient.shape[1] - 1
    moves = size > size.kthvalue(math.floor(level * last) + 1, 1, keepdim=True).values.clamp(min=TAU)
    if spike is not None:
        high = size.kthvalue(math.ceil(SPIKE_QUANTILE * last) + 1, 1, keepdim=True).values
        moves &= (size < high) | ~spike.to(device)
    moves &= finite.to(device)
    old = torch.stack([p.flatten() for p in parameters])
    new = torch.where(moves, old - gradient.sign(), old).clamp_(-1, 1)
    torch._foreach_copy_(parameters, [n.view(parameters[0].shape) for n in new])
    changed = new != old
    if forget:
        torch._foreach_mul_(gradients, [(~c).view(parameters[0].shape).to(gradients[0].dtype) for c in changed])
    return torch.count_nonzero(changed, 1)


def largest(values, rank):
    """(places, values) of some largest entries of a flat tensor, and its entry of `rank`, counted from 0 upwards.

    All entries above the one of this rank are among them. A sample tells where to look; where it misleads, all entries
    are taken: the answer is exact either way.
    """
    count = len(values)
    if count <= 4 * SAMPLE:
        return torch.arange(count, device=values.device), values, values.kthvalue(rank + 1).values
    sample = values[::count // SAMPLE]
    level = rank / (count - 1)
    expected, margin = level * len(sample), 4 * math.sqrt(level * (1 - level) * len(sample)) + 2
    below = sample.kthvalue(max(1, math.floor(expected - margin))).values
    above = sample.kthvalue(min(len(sample), math.ceil(expected + margin))).values
    where = (values >= below).nonzero().flatten()
    chosen = values.index_select(0, where)
    rank -= count - len(where)                      # among the chosen
    near = chosen[chosen <= above]                  # the chosen from the smallest up to `above`: ranks stay
    if 0 <= rank < len(near):
        return where, chosen, near.kthvalue(rank + 1).values
    return torch.arange(count, device=values.device), values, values.kthvalue(rank + count - len(where) + 1).values


def order_statistic(values, level, side):
    """The entry of `values` that bounds its `level`-quantile from below (side=math.floor) or above (math.ceil).

    The linearly interpolated quantile of torch.quantile lies between two neighbouring entries, so no entry lies
    between it and its bounds: "above the quantile" is "above the lower bound", "at or above" is "at or above the
    upper one". Selecting the bound gives the same answer without a sort, for any dtype and beyond the 2**24 entries
    where torch.quantile refuses.
    """
    return largest(values.flatten(), side(level * (values.numel() - 1)))[2]
