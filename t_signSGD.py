"""t-SignSGD: the optimizer of ternary adapters (LoTA-QAF, Eq. 6, https://arxiv.org/abs/2505.18724). Imports torch only.

Each step moves the few entries with the largest gradients by one against their sign, and keeps all in -1 ... 1:

    p <- clip(p - sign(g) * [|g| > max(tau, sigma_t-quantile of |g|)], -1, 1)

There is no learning rate, no weight decay and no gradient clipping; sigma_t alone says how many entries move.
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
    num_training_steps comes with create_scheduler(); until then sigma stays at threshold_ratio.
    The step count and the schedule are part of state_dict, so a resumed run goes on where it was.
    """

    def __init__(self, params, threshold_ratio=0.95, min_grad=0.999, filter_upper=0.9999, int_params=None):
        for name, value in (("threshold_ratio", threshold_ratio), ("min_grad", min_grad),
                            ("filter_upper", filter_upper)):
            if not 0 < value < 1:
                raise ValueError(f"{name} must lie in (0, 1), not {value}")
        # torch's schedulers and Trainer want an "lr"; this method has none, and 1 is the size of its steps.
        super().__init__(params, {"lr": 1.0, "threshold_ratio": threshold_ratio, "min_grad": min_grad,
                                  "filter_upper": filter_upper, "num_training_steps": None, "step": 0})
        if int_params is not None:
            ternary = {id(p) for p in int_params}
            if any(id(p) not in ternary for group in self.param_groups for p in group["params"]):
                raise ValueError("tSignSGD trains ternary parameters only; params holds others")
        self.flipped = {}       # parameter -> entries that moved in the last step, 0-dim tensors on its device

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
        super().load_state_dict(state_dict)
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

    @torch.no_grad()
    def step(self, closure=None):
        """One step. Raises FloatingPointError, before anything moves, where a gradient is not finite."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        norm = self._checked_norm()
        for group in self.param_groups:
            group["step"] += 1
            level = self._sigma(group)
            spike = (group["num_training_steps"] is not None and norm > SPIKE_NORM
                     and group["step"] > FIRST_PHASE * group["num_training_steps"])
            for p in group["params"]:
                if p.grad is None:
                    continue
                size = p.grad.abs()
                moves = size > order_statistic(size, level, math.floor).clamp(min=TAU)
                if spike:
                    moves &= size < order_statistic(size, SPIKE_QUANTILE, math.ceil)
                self.flipped[p] = self._move(p, moves)
        return loss

    @staticmethod
    def _move(p, moves):
        """p <- clip(p - sign(g) * moves, -1, 1); returns how many entries changed, a 0-dim tensor."""
        if p.device.type == "cpu":              # few entries move: touch only those
            where = moves.nonzero(as_tuple=True)
            old = p[where]
            new = (old - p.grad[where].sign()).clamp_(-1, 1)
            p[where] = new
            return (new != old).sum()
        new = torch.where(moves, p - p.grad.sign(), p).clamp_(-1, 1)    # asking which would stop a GPU's queue
        changed = (new != p).sum()
        p.copy_(new)
        return changed

    def _checked_norm(self):
        """The global norm of all gradients, a float."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not gradients:
            return 0.0
        norms = torch._foreach_norm([g.float() for g in gradients])
        norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms])).item()
        if not math.isfinite(norm):
            for group in self.param_groups:
                names = group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))]
                for name, p in zip(names, group["params"], strict=True):
                    if p.grad is not None and not bool(torch.isfinite(p.grad).all()):
                        raise FloatingPointError(f"the gradient of {name} is not finite at step {group['step'] + 1}")
            raise FloatingPointError(f"the gradients' global norm is not finite at step {group['step'] + 1}")
        return norm


def order_statistic(values, level, side):
    """The entry of `values` that bounds its `level`-quantile from below (side=math.floor) or above (math.ceil).

    The linearly interpolated quantile of torch.quantile lies between two neighbouring entries, so no entry lies
    between it and its bounds: "above the quantile" is "above the lower bound", "at or above" is "at or above the
    upper one". Selecting the bound gives the same answer without a sort, for any dtype and beyond the 2**24 entries
    where torch.quantile refuses.

    On a CPU a sample first tells which entries can be the one at all; the answer is exact all the same.
    """
    values = values.flatten()
    count = values.numel()
    rank = side(level * (count - 1))
    if values.device.type == "cpu" and count > 4 * SAMPLE:
        sample = values[::count // SAMPLE]
        expected, deviation = level * len(sample), math.sqrt(level * (1 - level) * len(sample))
        bound = sample.kthvalue(max(1, math.floor(expected - 4 * deviation - 2))).values
        candidates = values[values >= bound]
        if len(candidates) >= count - rank:             # but for a sample far off, which the whole answers for
            return candidates.kthvalue(len(candidates) - (count - rank) + 1).values
    return values.kthvalue(rank + 1).values
