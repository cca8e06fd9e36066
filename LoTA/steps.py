"""How the product of two adapter matrices becomes a step on the integer grid: one rule for each method. Imports torch.

    Threshold   --method lota    ternary A and B; a weight steps by one where |A @ B| passes omega (LoTA-QAF, Eq. 3, 4)
    Rounding    --method lrqat   fixed-point A and B; dW = scaling * A @ B in units of the weights is divided by the
                                 scale and rounded, so a weight may take a step of any size, as in LR-QAT
                                 (https://arxiv.org/abs/2406.06385)

All else is the same for both: the clamp to the grid, W, mu, the scales, the gradients, the merge (LoTA.ternary).

Both rules are exact on every machine, because A and B are integers times a power of two. The sums of A @ B are then
sums of integers, and float32 holds them in any order. What follows is the same few operations for each weight by
itself, and IEEE arithmetic rounds each of them in one way only.
"""
import math
import zlib
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from LoTA import UserError
from LoTA.packed import SMALLEST_SCALE, Groups, PackedLayer, Rows

EXACT_IN_FLOAT32 = 2**24            # integers up to here are exact in float32 ...
EXACT_IN_BFLOAT16 = 2**8            # ... and in bfloat16
LARGEST_FACTOR = 127                # of the integers of a fixed-point matrix: 8 bits with a sign
LARGEST_STEP = 256.0                # no grid is wider, so a longer step ends where this one ends


@dataclass(frozen=True)
class Factors:
    """A and B as a rule multiplies them.

    A: [in, r]. B: [r, out]. Both hold integers, in a dtype in which A @ B is exact.
    unit: float32, 0-dim, what a product of 1 is worth in units of the weights. None: a product is in units of the grid.
    """
    A: torch.Tensor
    B: torch.Tensor
    unit: torch.Tensor | None = None


@dataclass(frozen=True)
class Threshold:
    """The rule of LoTA-QAF. A and B hold -1, 0, 1, and dW = A @ B is in units of the grid.

    omega: the threshold of Eq. 3. kappa: the divisor of Eq. 4's group mean; None leaves Eq. 4's offset out.
    """
    omega: float
    kappa: float | None

    @property
    def has_offset(self) -> bool:
        """Whether A and B say mu too."""
        return self.kappa is not None

    def check(self, rank: int, largest_group: int) -> None:
        """Raises UserError where omega or the rank leave the range in which the rule is defined and exact.

        largest_group: the rows of the largest group, because sums over a group must be exact too.
        """
        if not 0 < self.omega < rank:
            raise UserError(f"omega (--interval_point) must lie in (0, r): it is {self.omega:g}, the rank is {rank}")
        if rank * largest_group > EXACT_IN_FLOAT32:
            raise UserError(f"rank {rank} is too large: rank x rows of a group is {rank * largest_group}, and float32 "
                            f"adds up integers exactly to {EXACT_IN_FLOAT32} only")

    def factors(self, lora_A: torch.Tensor, lora_B: torch.Tensor) -> Factors:
        dtype = product_dtype(lora_B.shape[0], lora_B.device)
        return Factors(lora_A.to(dtype), lora_B.to(dtype))

    def step(self, factors: Factors, rows: Rows, first: int, last: int, packed: PackedLayer,
             delta_w_sum: torch.Tensor | None) -> torch.Tensor:
        """The steps of the rows of groups first ... last - 1 before the clamp to the grid, float32 [rows, out].

        delta_w_sum: group_sums(). This rule does not read it.
        """
        return ternary_step(factors.A[rows] @ factors.B, self.omega)

    def grid_steps(self, factors: Factors, rows: torch.Tensor, packed: PackedLayer) -> torch.Tensor:
        """dW of any rows, float32 [rows, out], in units of the grid."""
        return factors.A[rows].float() @ factors.B.float()

    def group_sums(self, factors: Factors, packed: PackedLayer) -> torch.Tensor:
        """The sum of dW over each group, float32 [groups, out]. It is exact."""
        return packed.groups.sum(factors.A.float()) @ factors.B.float()

    def offset(self, delta_w_sum: torch.Tensor, step_sum: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """Eq. 4: mu = (sum dW - omega * sum W^) / (kappa * n), float32 [groups, out]. kappa must not be None.

        Both sums [groups, out] run over the rows of a group and are exact integers. sizes: int64 [groups], the rows n
        of each group.
        """
        return (delta_w_sum - self.omega * step_sum) / (self.kappa * sizes[:, None])

    def values(self, lora_A: torch.Tensor, lora_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(A, B) as the gradients multiply with them."""
        return lora_A, lora_B

    def gradient_scales(self, packed: PackedLayer) -> torch.Tensor:
        """What dL/dW is multiplied by in dL/d(dW), float32 [groups, out]: s, because dW is in units of the grid."""
        return packed.scales.float()

    def gradient_of_A(self, grad_A: torch.Tensor, groups: Groups) -> torch.Tensor:
        """What the optimizer gets of dL/dA [in, r]: all of it."""
        return grad_A


@dataclass(frozen=True, eq=False)
class Rounding:
    """The rule of LR-QAT. A and B are real parameters, used in fixed point; dW is in units of the weights.

        dW = scaling * A @ B
        W^ = round(dW / s + u)          s: the scales of the checkpoint, also where scales are learned

    A large scale keeps small changes from ever reaching the next integer. So a dither u in (-1/2, 1/2) may be added
    below the rounding. Where dW is 0 it rounds to 0, so the first forward is the quantized model exactly. As soon as dW
    moves, the weights nearest to a border step first, and over many weights the mean step is dW / s.

    The mean over a group may go into mu. With m = (sum dW / s) / n over the n rows of the group:

        W^ = round(dW / s - m + u)
        mu = (sum dW / s - sum W^) / n

    So what the rows of a group have in common moves no integer, and is exact, as in QA-LoRA, whose product is m alone.
    Only where the rows differ are there steps, with the noise that rounding brings. mu takes up what the rounding and
    the grid's ends left over too, so that the mean of each group moves by that of dW, exactly.

    scaling: alpha / r. seed: the dither is pseudo-random noise, from this number and the place of the weight; None: it
    is not. dither: int8 [in, out], the dither in steps of 1/256, see dither_value(); it takes the place of the noise.
    mean: whether the mean goes into mu.
    """
    scaling: float
    seed: int | None = None
    dither: torch.Tensor | None = field(default=None, repr=False)
    mean: bool = False

    kappa = None                        # the gradients pass W^ + mu as a whole, and mu has no part of its own

    @property
    def has_offset(self) -> bool:
        """Whether A and B say mu too."""
        return self.mean

    def check(self, rank: int, largest_group: int) -> None:
        """Raises UserError where the rank leaves the range in which the rule is exact. largest_group: unused."""
        largest = EXACT_IN_FLOAT32 // LARGEST_FACTOR**2
        if rank > largest:
            raise UserError(f"rank {rank} is too large: A and B have 8 bits, and float32 adds up their products "
                            f"exactly to rank {largest} only")
        if self.scaling <= 0:
            raise UserError("--lora_alpha must be positive")

    def factors(self, lora_A: torch.Tensor, lora_B: torch.Tensor) -> Factors:
        (A, of_A), (B, of_B) = fixed_point(lora_A), fixed_point(lora_B)
        return Factors(A, B, power_of_two(of_A) * power_of_two(of_B) * self.scaling)

    def step(self, factors: Factors, rows: Rows, first: int, last: int, packed: PackedLayer,
             delta_w_sum: torch.Tensor | None) -> torch.Tensor:
        """The steps of the rows of groups first ... last - 1 before the clamp to the grid, float32 [rows, out].

        delta_w_sum: group_sums() of all groups, or None where the mean does not go into mu.
        """
        step = (factors.A[rows] @ factors.B).mul_(factors.unit)
        by_group = step.view(last - first, -1, step.shape[1])
        by_group.div_(self.divisors(packed)[first:last, None])
        if delta_w_sum is not None:
            by_group.sub_(self.means(delta_w_sum[first:last], packed.groups.sizes[first:last])[:, None])
        dither = self.dither_of(rows, packed)
        if dither is not None:
            step += dither_value(dither)
        return step.clamp_(-LARGEST_STEP, LARGEST_STEP).round_()

    def grid_steps(self, factors: Factors, rows: torch.Tensor, packed: PackedLayer) -> torch.Tensor:
        """dW / s of any rows, float32 [rows, out]: how many steps of the grid dW is, before dither and rounding."""
        return (factors.A[rows] @ factors.B).mul_(factors.unit).div_(self.divisors(packed)[packed.groups.g_idx[rows]])

    def group_sums(self, factors: Factors, packed: PackedLayer) -> torch.Tensor:
        """The sum of dW / s over each group, float64 [groups, out].

        float64 holds the sums of integers exactly. The two operations after them are rounded in one way only.
        """
        sums = packed.groups.sum(factors.A).double() @ factors.B.double()
        return sums.mul_(factors.unit).div_(self.divisors(packed))

    def offset(self, delta_w_sum: torch.Tensor, step_sum: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """mu = (sum dW / s - sum W^) / n, float32 [groups, out].

        delta_w_sum: group_sums(). step_sum: of the steps that were taken, exact integers. sizes: n of each group.
        """
        return self.means(delta_w_sum - step_sum, sizes)

    @staticmethod
    def means(sums: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """float64 sums [groups, out] over the rows of a group as means, float32. sizes: the rows n of each group."""
        return (sums / sizes[:, None]).float()

    def divisors(self, packed: PackedLayer) -> torch.Tensor:
        """The scales that dW is divided by, float32 [groups, out]. A group whose weights are all 0 may have scale 0."""
        return packed.base_scales.float().clamp(min=SMALLEST_SCALE)

    def dither_of(self, rows: Rows, packed: PackedLayer) -> torch.Tensor | None:
        """The dither of some rows, int8 [rows, out], or None."""
        if self.dither is not None:
            return self.dither[rows]
        if self.seed is None:
            return None
        device = packed.qweight.device
        rows = torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, slice) else rows
        return noise(self.seed, rows, packed.shape[1])

    def with_dither(self, packed: PackedLayer) -> "Rounding":
        """The same rule with its noise as a tensor, which takes a byte a weight and saves making it in every step."""
        return self if self.seed is None else replace(
            self, seed=None, dither=self.dither_of(slice(0, packed.shape[0]), packed))

    def values(self, lora_A: torch.Tensor, lora_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(A, B) as the gradients multiply with them: in fixed point. bfloat16 holds them exactly too."""
        return tuple(integers * power_of_two(e) for integers, e in map(fixed_point, (lora_A, lora_B)))

    def gradient_scales(self, packed: PackedLayer) -> torch.Tensor:
        """What dL/dW is multiplied by in dL/d(A @ B), float32 [groups, out].

        W = s' * (W_int - z + dW / s), straight through the rounding and the clamp. s' are the learned scales.
        """
        return (packed.scales.float() / self.divisors(packed)).mul_(self.scaling)

    def gradient_of_A(self, grad_A: torch.Tensor, groups: Groups) -> torch.Tensor:
        """What the optimizer gets of dL/dA [in, r], float32.

        Where the mean goes into mu, the mean over a group of n rows stays, and what differs from it is divided by
        sqrt(n). Random gradients of n rows are sqrt(n) times as large as their mean. AdamW's steps have one size,
        whatever the gradient's, so it would hardly see the mean. But the mean acts on the output exactly, and
        differences act by way of the rounding.
        """
        if not self.mean:
            return grad_A
        sizes = groups.sizes[:, None]
        mean = (groups.sum(grad_A) / sizes)[groups.g_idx]
        return mean + (grad_A - mean) / sizes.sqrt()[groups.g_idx]


Rule = Threshold | Rounding


def ternary_step(delta_w: torch.Tensor, omega: float) -> torch.Tensor:
    """Eq. 3 before its boundary check: +1 where dW > omega, -1 where dW < -omega, else 0. Float32, of dW's shape.

    dW holds integers, so "above omega" means "above floor(omega)". The dtype of product_dtype() holds floor(omega)
    exactly, because floor(omega) < r.
    """
    return F.hardshrink(delta_w, math.floor(omega)).float().sign_()


def fixed_point(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(integers in -127 ... 127 as float32, e as int32 0-dim): the matrix is rounded to integers * 2**e.

    e is the smallest at which the largest entry needs no more than 127, in -60 ... 60. All operations are exact or
    rounded in one way only, so the integers are the same on every machine. A matrix that was rounded so is not changed
    by a second rounding.
    """
    matrix = matrix.detach().float()
    # No division by 127, because CUDA multiplies by its rounded inverse. The largest entry is mantissa * 2**exponent.
    mantissa, exponent = torch.frexp(matrix.abs().amax())
    exponent = (exponent - 7 + (mantissa > LARGEST_FACTOR / 128).int()).clamp_(-60, 60)
    return (matrix * power_of_two(-exponent)).round_(), exponent


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2**exponent as float32, exactly. exponent: int32 in -126 ... 127. torch.ldexp would take a power function."""
    return (exponent + 127 << 23).view(torch.float32)


def layer_seed(name: str) -> int:
    """The seed of a layer's dither, in 0 ... 2**32 - 1, from the layer's name in the GPTQ model."""
    return zlib.crc32(name.encode())


def noise(seed: int, rows: torch.Tensor, width: int) -> torch.Tensor:
    """Pseudo-random int8 [len(rows), width], the same on every device: a hash of the seed and of the weight's place.

    rows: int64, indices into a layer of `width` outputs. The hash is two rounds of xor-shift and multiply with the
    constants of lowbias32 (https://github.com/skeeto/hash-prospector). int32 products wrap as unsigned ones do.
    """
    x = (rows[:, None] * width + torch.arange(width, device=rows.device)).to(torch.int32)
    x ^= as_int32(seed)
    x ^= (x >> 16) & 0xFFFF                                     # >> on int32 fills in the sign
    x *= as_int32(0x7FEB352D)
    x ^= (x >> 15) & 0x1FFFF
    x *= as_int32(0x846CA68B)
    return (x >> 24).to(torch.int8)


def as_int32(number: int) -> int:
    """The int32 that has the same 32 bits as `number`, in 0 ... 2**32 - 1."""
    return number - 2**32 if number >= 2**31 else number


def dither_value(dither: torch.Tensor) -> torch.Tensor:
    """u in (-1/2, 1/2) of int8 numbers, float32: the middles of 256 equal parts, so that none is at a border."""
    return dither.float().add_(0.5).mul_(1 / 256)


def dither_from_fraction(fraction: torch.Tensor) -> torch.Tensor:
    """int8 whose dither_value() is next to `fraction`, which is cut to (-1/2, 1/2). The inverse of dither_value()."""
    return fraction.float().mul(256).sub_(0.5).round_().clamp_(-128, 127).to(torch.int8)


def product_dtype(rank: int, device: torch.device) -> torch.dtype:
    """The fastest dtype in which A @ B of ternary matrices, integers in -r ... r, is exact.

    That is bfloat16 up to r = 256 where the hardware multiplies it, else float32.
    """
    if rank > EXACT_IN_BFLOAT16:
        return torch.float32
    if device.type == "cpu":
        has = getattr(torch.cpu, "get_capabilities", dict)()
        return torch.bfloat16 if has.get("avx512_bf16") or has.get("amx_bf16") else torch.float32
    return torch.bfloat16
