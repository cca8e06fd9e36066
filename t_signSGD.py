"""t-SignSGD: the optimizer of ternary adapters (LoTA-QAF, Eq. 6, https://arxiv.org/abs/2505.18724). Imports torch only.

Each step moves the few entries with the largest gradients by one against their sign, and keeps all in -1 ... 1:

    p <- clip(p - sign(g) * [|g| > max(tau, sigma_t-quantile of |g|)], -1, 1)

The quantile is taken over each tensor by itself. There is no learning rate, no weight decay and no gradient clipping,
because every move has the size 1 and sigma_t bounds how many entries move. As in the published scripts, entries with
outstanding gradients do not move in the last phase while the gradients' norm is large (SPIKE_NORM). Three things are
this project's own. With `momentum`, g is an average of the gradients since the entry last moved. A
`real_optimizer` steps along for parameters that are real numbers. A `flip_limit` bounds what the flips of one step may
promise.

Flips promise the sum of |gradient| / omega over their entries: by so much the loss would change, if it were linear. A
small promise is kept. Where it is many times the loss, the step leaves the region where gradients say anything. The sum
over all layers grows with the model, so a sigma that suits a small model breaks a large one. A promise means the same
in every model.
"""
import math
from collections.abc import Callable, Iterator

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

TAU = 1e-9                  # gradients up to here never move an entry
FIRST_PHASE = 0.8           # the share of the steps in which sigma goes from threshold_ratio to min_grad
SPIKE_NORM = 10.0           # in the last phase, while the global norm of the ternary gradients exceeds this ...
SPIKE_QUANTILE = 0.99995    # ... entries whose |g| is at or above this quantile of their tensor are not moved
HALVINGS = 16               # so often at most are the flips of a step halved, to keep to flip_limit
SAMPLE = 8192               # entries of the sample with which largest() finds where to look
BATCH_ENTRIES = 1 << 25     # entries that a GPU steps together


def sigma(t: int, num_steps: int, threshold_ratio: float, min_grad: float, filter_upper: float) -> float:
    """sigma_t for step t = 1 ... num_steps: linear in both phases, and `filter_upper` from the last step on."""
    first_phase = FIRST_PHASE * num_steps
    if t >= num_steps:
        return filter_upper
    if t <= first_phase:
        return threshold_ratio + t / first_phase * (min_grad - threshold_ratio)
    return min_grad + (t - first_phase) / (num_steps - first_phase) * (filter_upper - min_grad)


def share_of_rate(t: int, num_steps: int, warm_up: float) -> float:
    """What a learning rate is multiplied with at step t = 1 ... num_steps: a line from 1 to 0, and before it a rise.

    warm_up: the share of the steps in which it rises.
    """
    falling = max(0.0, 1 - (t - 1) / num_steps)
    return falling * min(1.0, t / (warm_up * num_steps)) if warm_up else falling


class tSignSGD(Optimizer):
    """t-SignSGD over ternary parameters.

    params: ternary tensors, or (name, tensor) pairs, or groups of them; errors use the names. All other settings are
        given by name, because the published scripts' optimizer takes others at their places.
    threshold_ratio, min_grad, filter_upper: sigma at the start, after 80 % of the steps, and at the end. The names are
        those of the published scripts; all three are levels of a quantile. Raises ValueError outside (0, 1).
    int_params: the ternary ones among `params`. Where it is given, the others are left as they are, as in the published
        scripts. Raises ValueError where it holds none of `params`.
    momentum: in [0, 1), the weight of the past in the average of gradients that moves an entry. 0 is the paper's way:
        each step's own gradient. An entry that moves resets its average to 0, so that the same gradients do not move
        it twice.
    real_optimizer: another torch optimizer, over parameters that are not ternary. It steps with this one. After
        create_scheduler() its learning rates fall linearly towards 0.
    warm_up: the share of the steps in which the real optimizer's rates rise, see share_of_rate(). Raises ValueError
        outside [0, 1).
    flip_limit: how much, in units of the loss, the flips of one step may promise. The share that flips is halved until
        they keep to it, at most HALVINGS times. The schedule of sigma goes on. None, as published, sets no
        limit. On a GPU a limit makes the CPU wait for the gradients. Raises ValueError unless it is positive.
    omega: so many flips of one sign make a step of an integer, so one flip promises |gradient| / omega. It serves
        flip_limit only.

    create_scheduler() sets the number of steps. Until it is called, sigma stays at threshold_ratio.
    The step count and the schedule are part of state_dict(), so a resumed run goes on where it was.
    """

    def __init__(self, params, *, threshold_ratio: float = 0.95, min_grad: float = 0.999, filter_upper: float = 0.9999,
                 int_params=None, momentum: float = 0.0, real_optimizer: Optimizer | None = None,
                 warm_up: float = 0.0, flip_limit: float | None = None, omega: float = 1.0):
        for name, value in (("threshold_ratio", threshold_ratio), ("min_grad", min_grad),
                            ("filter_upper", filter_upper)):
            if not 0 < value < 1:
                raise ValueError(f"{name} must lie in (0, 1), not {value}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), not {momentum}")
        if not 0 <= warm_up < 1:
            raise ValueError(f"warm_up must lie in [0, 1), not {warm_up}")
        if flip_limit is not None and not flip_limit > 0:
            raise ValueError(f"flip_limit must be positive, not {flip_limit}")
        # torch's schedulers and Trainer want an "lr". This method has none; 1 is the size of its steps.
        super().__init__(params, {"lr": 1.0, "threshold_ratio": threshold_ratio, "min_grad": min_grad,
                                  "filter_upper": filter_upper, "num_training_steps": None, "step": 0})
        if int_params is not None:
            self._keep_only({id(p) for p in int_params})
        self.momentum, self.real_optimizer = momentum, real_optimizer
        self.real_rates = [group["lr"] for group in self.real_groups()]
        self.warm_up, self.flip_limit, self.omega = warm_up, flip_limit, omega
        self.halvings = 0       # how often the last step halved the share that flips
        self.flipped = {}       # {parameter: how many entries the last step changed, a 0-dim tensor on its device}
        self._pending = None    # (names, step, (the norms of their gradients, the event after which the CPU has them))

    def _keep_only(self, ternary: set[int]) -> None:
        """Drops every parameter whose id is not in `ternary`, and the groups that are then empty."""
        for group in self.param_groups:
            kept = [i for i, p in enumerate(group["params"]) if id(p) in ternary]
            for key in {"params", "param_names"} & group.keys():
                group[key] = [group[key][i] for i in kept]
        self.param_groups = [group for group in self.param_groups if group["params"]]
        if not self.param_groups:
            raise ValueError("int_params holds none of params, so nothing would be trained")

    def real_groups(self) -> list[dict]:
        """The parameter groups of the real optimizer, or none."""
        return self.real_optimizer.param_groups if self.real_optimizer else []

    def create_scheduler(self, num_training_steps: int) -> LambdaLR:
        """Sets the number of optimizer steps of the run. Returns the constant scheduler that Trainer asks for.

        Raises ValueError unless num_training_steps > 0.
        """
        if num_training_steps <= 0:
            raise ValueError(f"num_training_steps must be positive, not {num_training_steps}")
        for group in self.param_groups:
            group["num_training_steps"] = num_training_steps
        return LambdaLR(self, lambda _: 1.0)

    def load_state_dict(self, state_dict: dict) -> None:
        """Restores the step count, the levels of sigma and the averages.

        The number of steps is restored too, unless create_scheduler() has set one: a run that is resumed with another
        length follows the schedule of its own length.
        """
        own = [group["num_training_steps"] for group in self.param_groups]
        if self.real_optimizer:
            self.real_optimizer.load_state_dict(state_dict["real"])
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "real"})
        for group, num_training_steps in zip(self.param_groups, own, strict=True):
            group["num_training_steps"] = num_training_steps or group["num_training_steps"]

    def current_sigma(self) -> float:
        """The sigma that the last step flipped with: sigma_t, or more where flip_limit halved the flips."""
        return halved(self._sigma(self.param_groups[0]), self.halvings)

    @staticmethod
    def _sigma(group: dict) -> float:
        if group["num_training_steps"] is None:
            return group["threshold_ratio"]
        return sigma(group["step"], group["num_training_steps"], group["threshold_ratio"], group["min_grad"],
                     group["filter_upper"])

    def state_dict(self) -> dict:
        self.raise_unless_finite()
        state = super().state_dict()
        return {**state, "real": self.real_optimizer.state_dict()} if self.real_optimizer else state

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        if self.real_optimizer:
            self.real_optimizer.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """One step. Returns what `closure` returns, or None.

        Raises FloatingPointError where a gradient is not finite; no ternary entry has moved then. On a GPU the check
        must not wait for the device, so the error comes with the next step, with state_dict() or with
        raise_unless_finite().
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.raise_unless_finite()
        finite, spike = self._judge_gradients()
        directions = {p: self._direction(p) for group in self.param_groups for p in group["params"]
                      if p.grad is not None}
        for group in self.param_groups:
            group["step"] += 1
        if self.flip_limit is not None:
            self._keep_to_limit(directions)
        for group in self.param_groups:
            sigma_t = halved(self._sigma(group), self.halvings)
            last_phase = (group["num_training_steps"] is not None
                          and group["step"] > FIRST_PHASE * group["num_training_steps"])
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                if p.device.type == "cpu":
                    self.flipped[p] = move_one(p, directions[p], sigma_t, last_phase and bool(spike),
                                               forget=self.momentum > 0)
            for batch in batches([p for p in parameters if p.device.type != "cpu"]):
                flipped = move_together(batch, [directions[p] for p in batch], sigma_t,
                                        spike if last_phase else None, finite, forget=self.momentum > 0)
                self.flipped.update(zip(batch, flipped, strict=True))
        if self.real_optimizer:
            group = self.param_groups[0]
            for own, rate in zip(self.real_groups(), self.real_rates, strict=True):
                if group["num_training_steps"] is not None:
                    own["lr"] = rate * share_of_rate(group["step"], group["num_training_steps"], self.warm_up)
                for p in own["params"]:
                    if p.grad is not None and p.device.type != "cpu":
                        p.grad.masked_fill_(~finite.to(p.device), 0.0)
            self.real_optimizer.step()
        return loss

    def _keep_to_limit(self, directions: dict[torch.Tensor, torch.Tensor]) -> None:
        """Sets self.halvings so that the flips promise no more than flip_limit.

        directions: {ternary parameter: what moves its entries}.
        """
        promises = [promised_by_flips(p, directions[p], self._sigma(group)) for group in self.param_groups
                    for p in group["params"] if p in directions]
        total = sum(promise.to(promises[0].device) for promise in promises)
        within = [promise / self.omega <= self.flip_limit for promise in total.tolist()] if promises else [True]
        self.halvings = within.index(True) if any(within) else HALVINGS

    def _direction(self, p: torch.Tensor) -> torch.Tensor:
        """What moves the entries of p: its gradient, or with momentum the average of its gradients."""
        if not self.momentum:
            return p.grad
        state = self.state[p]
        if "average" not in state:
            # Contiguous, because move_one() resets entries through a flat view.
            state["average"] = torch.zeros(p.shape, dtype=p.grad.dtype, device=p.device)
        return state["average"].lerp_(p.grad, 1 - self.momentum)

    def _judge_gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(whether all gradients are finite, whether the ternary ones' global norm is beyond SPIKE_NORM).

        Both are 0-dim tensors on the device of the first gradient.
        """
        named = [pair for group in self.param_groups for pair in with_gradients(group)]
        ternary = len(named)
        named += [pair for group in self.real_groups() for pair in with_gradients(group)]
        if not named:
            return torch.tensor(True), torch.tensor(False)
        norms = torch._foreach_norm([p.grad for _, p in named], 2, torch.float32)
        norms = torch.stack([n.to(norms[0].device) for n in norms])
        # A norm beyond float32's range is not finite either.
        self._pending = [name for name, _ in named], self.param_groups[0]["step"] + 1, _to_host(norms)
        if norms.device.type == "cpu":
            self.raise_unless_finite()
        return torch.isfinite(norms).all(), torch.linalg.vector_norm(norms[:ternary]) > SPIKE_NORM

    def raise_unless_finite(self) -> None:
        """Raises FloatingPointError where a gradient that the last step() saw is not finite."""
        if self._pending is None:
            return
        names, step, (norms, ready) = self._pending
        self._pending = None
        if ready is not None:
            ready.synchronize()         # within step() the event is one step old, so this rarely waits
        wrong = [name for name, finite in zip(names, torch.isfinite(norms).tolist(), strict=True) if not finite]
        if wrong:       # Trainer's clipping spreads one NaN to all gradients; no single name is right then
            which = "no gradient is" if len(wrong) == len(names) > 1 else f"the gradient of {wrong[0]} is not"
            raise FloatingPointError(f"{which} finite at step {step}")


def halved(sigma_t: float, times: int) -> float:
    """sigma where the share 1 - sigma_t is halved so many times; sigma_t itself for none."""
    return 1 - (1 - sigma_t) / 2**times if times else sigma_t


@torch.no_grad()
def promised_by_flips(p: torch.Tensor, direction: torch.Tensor, sigma_t: float) -> torch.Tensor:
    """Float32 [HALVINGS + 1]: the sum of p's |gradient| over the entries that would flip, after 0, 1, ... halvings.

    direction: what moves the entries of p, of its shape. An entry that is at its end already does not count.
    """
    last = p.numel() - 1
    counts = [last - math.floor(halved(sigma_t, times) * last) for times in range(HALVINGS + 1)]
    direction = direction.flatten()
    top = direction.abs().topk(counts[0]).indices
    can_move = p.flatten()[top] * direction[top].sign() > -1
    promises = (p.grad.flatten()[top].abs() * can_move).float()
    return torch.cat([promises.new_zeros(1), promises.cumsum(0)])[counts]


def with_gradients(group: dict) -> list[tuple[str, torch.Tensor]]:
    """(name, parameter) of the parameters in an optimizer's group that have a gradient."""
    names = group.get("param_names") or [f"parameter {i}" for i in range(len(group["params"]))]
    return [(name, p) for name, p in zip(names, group["params"], strict=True) if p.grad is not None]


def _to_host(values: torch.Tensor) -> tuple[torch.Tensor, "torch.cuda.Event | None"]:
    """(a copy on the CPU, the event after which the copy is complete or None), without waiting for the device."""
    if values.device.type != "cuda":
        return values.cpu(), None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return host, ready


@torch.no_grad()
def move_one(p: torch.Tensor, gradient: torch.Tensor, sigma_t: float, spike: bool,
             forget: bool = False) -> torch.Tensor:
    """Eq. 6 on one tensor, in place. Returns how many entries changed, a 0-dim tensor.

    p, gradient: of one shape; p is contiguous. It reads every |g| once and writes only the entries that move, which is
    the fastest way on a CPU.
    spike: whether entries at or above SPIKE_QUANTILE are not moved. forget: set `gradient`, which must be contiguous
    then, to 0 where an entry changed.
    """
    magnitude, gradient, flat = gradient.abs().flatten(), gradient.flatten(), p.view(-1)
    indices, chosen, low = largest(magnitude, math.floor(sigma_t * (len(magnitude) - 1)))
    moves = chosen > low.clamp(min=TAU)
    if spike:
        moves &= chosen < order_statistic(magnitude, SPIKE_QUANTILE, math.ceil)
    indices = indices[moves]
    old = flat.index_select(0, indices)
    new = (old - gradient.index_select(0, indices).sign_()).clamp_(-1, 1)
    flat.index_copy_(0, indices, new)
    changed = new != old
    if forget:
        gradient.index_fill_(0, indices[changed], 0)
    return torch.count_nonzero(changed)


def batches(parameters: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Lists of parameters of equal shape, dtype and device, with up to BATCH_ENTRIES entries together."""
    alike = {}
    for p in parameters:
        alike.setdefault((p.shape, p.dtype, p.grad.dtype, p.device), []).append(p)
    for together in alike.values():
        count = max(1, BATCH_ENTRIES // max(1, together[0].numel()))
        yield from (together[i:i + count] for i in range(0, len(together), count))


@torch.no_grad()
def move_together(parameters: list[torch.Tensor], gradients: list[torch.Tensor], sigma_t: float,
                  spike: torch.Tensor | None, finite: torch.Tensor, forget: bool = False) -> torch.Tensor:
    """Eq. 6 on tensors of one shape, in place. Returns how many entries of each changed, [len(parameters)].

    It takes a few launches, and the CPU waits for none of them.
    spike: a 0-dim tensor, whether entries at or above SPIKE_QUANTILE are not moved; None before the last phase.
    finite: a 0-dim tensor; where it is False nothing moves. forget: set the gradients to 0 where an entry changed.
    """
    device = parameters[0].device
    gradient = torch.stack([g.flatten() for g in gradients])
    magnitude, last = gradient.abs(), gradient.shape[1] - 1
    moves = magnitude > magnitude.kthvalue(math.floor(sigma_t * last) + 1, 1, keepdim=True).values.clamp(min=TAU)
    if spike is not None:
        high = magnitude.kthvalue(math.ceil(SPIKE_QUANTILE * last) + 1, 1, keepdim=True).values
        moves &= (magnitude < high) | ~spike.to(device)
    moves &= finite.to(device)
    old = torch.stack([p.flatten() for p in parameters])
    new = torch.where(moves, old - gradient.sign(), old).clamp_(-1, 1)
    torch._foreach_copy_(parameters, [n.view(parameters[0].shape) for n in new])
    changed = new != old
    if forget:
        torch._foreach_mul_(gradients, [(~c).view(parameters[0].shape).to(gradients[0].dtype) for c in changed])
    return torch.count_nonzero(changed, 1)


def largest(values: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(indices int64 [m], values[indices] [m], pivot) of a flat tensor [n].

    The pivot is the 0-dim entry with this rank, counted from 0 for the smallest. The indices hold every entry above the
    pivot, and some or all of the others. A sample says where to look. Where it misleads, all entries are taken, so the
    pivot is exact either way.
    """
    count = len(values)
    if count > 4 * SAMPLE:
        sample = values[::count // SAMPLE]
        share = rank / (count - 1)
        expected, margin = share * len(sample), 4 * math.sqrt(share * (1 - share) * len(sample)) + 2
        below = sample.kthvalue(max(1, math.floor(expected - margin))).values
        above = sample.kthvalue(min(len(sample), math.ceil(expected + margin))).values
        indices = (values >= below).nonzero().flatten()
        chosen = values.index_select(0, indices)
        rank_among_chosen = rank - (count - len(indices))
        near = chosen[chosen <= above]              # the smallest of the chosen, so an entry has one rank in both
        if 0 <= rank_among_chosen < len(near):
            return indices, chosen, near.kthvalue(rank_among_chosen + 1).values
    return torch.arange(count, device=values.device), values, values.kthvalue(rank + 1).values


def order_statistic(values: torch.Tensor, level: float, side: Callable[[float], int]) -> torch.Tensor:
    """The entry of `values` that bounds its `level`-quantile from below (side=math.floor) or above (math.ceil).

    torch.quantile interpolates between two neighbouring entries, so no entry lies between the quantile and its bounds.
    "Above the quantile" is therefore "above the lower bound", and "at or above it" is "at or above the upper bound".
    Selecting a bound needs no sort. It works for any dtype and beyond the 2**24 entries where torch.quantile refuses.
    """
    return largest(values.flatten(), side(level * (values.numel() - 1)))[2]
