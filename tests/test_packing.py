"""LoTA.packing against the bit stream written out in Python integers and against GPTQModel's own reading."""
import os

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
os.environ["GPTQMODEL_DISABLE_PACK_EXT"] = "1"          # pack in Python: no compiler is needed for these tests

import oracle
import pytest
import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

from LoTA.packing import SUPPORTED_BITS, count_different, pack_rows, step_at, unpack_rows, unpack_zeros, words_of

BITS = (2, 3, 4, 8)


def random_grid(shape, bits, seed=0):
    """Values over the whole grid; the first and the last value are the grid's top, so sign bits are in use."""
    values = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed))
    values[0] = values[-1] = 2**bits - 1
    return values.to(torch.uint8)


def word_count(rows, bits):
    return -(-rows * bits // 32)


def filled_up(packed, bits):
    """Zero words up to a whole unit of 32 values at 3 bits, the unit in which GPTQModel reads."""
    missing = -packed.shape[0] % 3 if bits == 3 else 0
    return torch.cat([packed, packed.new_zeros(missing, packed.shape[1])])


def test_supported_bits():
    """The tests below cover every bit width that the module says it supports."""
    assert tuple(SUPPORTED_BITS) == BITS


@pytest.mark.parametrize("rows", [1, 7, 10, 11, 22, 31, 32, 33, 64, 75, 96])
@pytest.mark.parametrize("bits", BITS)
def test_pack_rows_is_the_bit_stream(bits, rows):
    """pack_rows gives the stream's words exactly, then only zeros, for whole units and for odd row counts."""
    values = random_grid((rows, 5), bits)
    packed = pack_rows(values, bits)
    assert packed.dtype == torch.int32
    assert torch.equal(packed[:word_count(rows, bits)], oracle.pack_columns(values, bits))
    assert not packed[word_count(rows, bits):].any()


@pytest.mark.parametrize("rows", [1, 7, 10, 11, 22, 31, 32, 33, 64, 75, 96])
@pytest.mark.parametrize("bits", BITS)
def test_unpack_rows_reads_any_words(bits, rows):
    """Random words, the sign bit included, are read as the oracle reads them, and packed back to the same words."""
    words = filled_up(torch.zeros(word_count(rows, bits), 3, dtype=torch.int32), bits).shape[0]
    packed = torch.randint(-2**31, 2**31, (words, 3), generator=torch.Generator().manual_seed(rows)).int()
    values = unpack_rows(packed, bits, rows)
    assert values.dtype == torch.uint8 and values.shape == (rows, 3)
    assert torch.equal(values.long(), oracle.unpack_columns(packed, bits, rows))
    whole = words * 32 // bits
    assert torch.equal(pack_rows(unpack_rows(packed, bits, whole), bits), packed)


@pytest.mark.parametrize("rows", [1, 11, 33, 40])
@pytest.mark.parametrize("bits", BITS)
def test_unpack_rows_reads_the_least_number_of_words(bits, rows):
    """ceil(rows * bits / 32) words are enough, as unpack_rows says, also where they are no whole unit at 3 bits."""
    values = random_grid((rows, 2), bits, seed=1)
    assert torch.equal(unpack_rows(oracle.pack_columns(values, bits), bits, rows), values)


@pytest.mark.parametrize("bits", BITS)
def test_round_trip_of_a_transposed_tensor(bits):
    """Strided input and int64 values pack like their contiguous uint8 copy; unpacking gives the values back."""
    values = random_grid((6, 64), bits, seed=2).t()
    packed = pack_rows(values.long(), bits)
    assert torch.equal(packed, oracle.pack_columns(values, bits))
    assert torch.equal(unpack_rows(packed.t().contiguous().t(), bits, 64), values)


@pytest.mark.parametrize("cols", [32, 45, 64])
@pytest.mark.parametrize("bits", BITS)
def test_unpack_zeros_adds_the_one_of_gptq(bits, cols):
    """"gptq" stores z - 1 and "gptq_v2" stores z: both read back as z, and they differ in what they store."""
    zeros = random_grid((cols, 4), bits, seed=3).clamp_(min=1)
    stored_v1 = filled_up(oracle.pack_columns(zeros - 1, bits), bits).t().contiguous()
    stored_v2 = filled_up(oracle.pack_columns(zeros, bits), bits).t().contiguous()
    before = stored_v1.clone()
    assert torch.equal(unpack_zeros(stored_v1, bits, cols, "gptq"), zeros.t())
    assert torch.equal(unpack_zeros(stored_v2, bits, cols, "gptq_v2"), zeros.t())
    assert torch.equal(unpack_zeros(stored_v1, bits, cols, "gptq_v2"), zeros.t() - 1)
    assert torch.equal(stored_v1, before)


# --- GPTQModel ----------------------------------------------------------------------------------------------------

def torch_linear(bits, rows, cols, qweight, qzeros, scales, g_idx):
    """GPTQModel's layer around these tensors, in eval mode, without post_init() and its torch.compile."""
    layer = TorchLinear(bits=bits, group_size=16, sym=False, desc_act=True, in_features=rows, out_features=cols)
    layer.qweight, layer.qzeros, layer.scales, layer.g_idx = qweight, qzeros, scales, g_idx
    return layer.eval()


def random_layer(bits, rows, cols, seed):
    """(W_int, zeros with 0 and the grid's top among them, float16 scales, shuffled g_idx)."""
    generator = torch.Generator().manual_seed(seed)
    g_idx = (torch.arange(rows) // 16)[torch.randperm(rows, generator=generator)].int()
    groups = -(-rows // 16)
    scales = (torch.rand(groups, cols, generator=generator) + 0.5).half()
    zeros = random_grid((groups, cols), bits, seed + 1)
    zeros[:, :2], zeros[:, -2:] = 0, 0
    zeros[:, 5] = 2**bits - 1
    return random_grid((rows, cols), bits, seed + 2), zeros, scales, g_idx


def product(weight_int, zeros, scales, g_idx):
    """s (W - z), rounded once to float16: what any right reading of the layer gives."""
    g_idx = g_idx.long()
    return (scales.double()[g_idx] * (weight_int.double() - zeros.double()[g_idx])).half()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("rows", [64, 40])
@pytest.mark.parametrize("bits", BITS)
def test_gptqmodel_reads_what_pack_rows_packed(bits, rows, training):
    """TorchLinear's dequantized weight, by both its code paths, is s (W - z) of the integers that were packed."""
    weight_int, zeros, scales, g_idx = random_layer(bits, rows, 32, seed=4)
    layer = torch_linear(bits, rows, 32, pack_rows(weight_int, bits), pack_rows(zeros.t(), bits).t().contiguous(),
                         scales, g_idx).train(training)
    assert torch.equal(layer.dequantize_weight(), product(weight_int, zeros, scales, g_idx))
    assert torch.equal(unpack_rows(layer.qweight, bits, rows), weight_int)
    assert torch.equal(unpack_zeros(layer.qzeros, bits, 32, "gptq_v2"), zeros)


@pytest.mark.parametrize("bits", BITS)
def test_unpack_reads_what_gptqmodel_packed(bits):
    """GPTQModel's pack() of s (W - z) unpacks to W and z, and our packing makes the very same words."""
    weight_int, zeros, _, g_idx = random_layer(bits, 64, 32, seed=5)
    scales = torch.full((4, 32), 0.5)
    linear = torch.nn.Linear(64, 32, bias=False)
    linear.weight.data = product(weight_int, zeros, scales, g_idx).float().t().contiguous()
    layer = TorchLinear(bits=bits, group_size=16, sym=False, desc_act=True, in_features=64, out_features=32)
    layer.pack(linear, scales.t().contiguous(), zeros.t().float().contiguous(), g_idx, workers=1)
    assert torch.equal(unpack_rows(layer.qweight, bits, 64), weight_int)
    assert torch.equal(unpack_zeros(layer.qzeros, bits, 32, "gptq_v2"), zeros)
    assert torch.equal(pack_rows(weight_int, bits), layer.qweight)
    assert torch.equal(pack_rows(zeros.t(), bits).t(), layer.qzeros)


@pytest.mark.parametrize("bits", BITS)
def test_gptq_zeros_read_like_gptqmodels_conversion(bits):
    """Any words at all, read as "gptq", are the zero points that GPTQModel's v1 -> v2 conversion makes of them."""
    weight_int, _, scales, g_idx = random_layer(bits, 64, 32, seed=6)
    qzeros = torch.randint(-2**31, 2**31, (4, bits), generator=torch.Generator().manual_seed(7)).int()
    qzeros[0], qzeros[1] = -1, 0
    layer = torch_linear(bits, 64, 32, pack_rows(weight_int, bits), qzeros.clone(), scales, g_idx)
    layer.qzero_format(format=1)
    convert_gptq_v1_to_v2_format_module(layer, bits=bits, pack_dtype=torch.int32)
    zeros = unpack_zeros(qzeros, bits, 32, "gptq")
    assert torch.equal(zeros, oracle.unpack_columns(layer.qzeros.t(), bits, 32).t().to(torch.uint8))
    assert torch.equal(layer.dequantize_weight(), product(weight_int, zeros, scales, g_idx))


@pytest.mark.parametrize("bits", BITS)
def test_zero_points_of_zero_survive_gptq(bits):
    """Zero points of 0, stored as 0 - 1, come back as 0, and their neighbours unharmed: GPTQModel's own storing."""
    _, zeros, _, _ = random_layer(bits, 64, 32, seed=8)
    assert (zeros == 0).any() and (zeros == 2**bits - 1).any()
    packed = pack_rows(zeros.t(), bits).t().contiguous()
    if bits == 3:               # GPTQModel wraps each field by itself where values straddle words
        stored = pack_rows((zeros.t().int() - 1) % 8, bits).t().contiguous()
    else:                       # and subtracts whole words otherwise, so that a zero borrows from its neighbour
        stored = packed - sum(1 << shift for shift in range(0, 32, bits))
    assert torch.equal(unpack_zeros(stored, bits, 32, "gptq"), zeros)
    assert not torch.equal(unpack_zeros(stored, bits, 32, "gptq_v2"), zeros)


@pytest.mark.parametrize("bits", BITS)
def test_step_at(bits):
    """Steps at scattered places, several in one word: the oracle's integers after them, the grid's ends kept."""
    generator = torch.Generator().manual_seed(bits)
    rows, cols, maxq = 70, 9, 2**bits - 1
    values = torch.randint(0, maxq + 1, (rows, cols), generator=generator)
    step = torch.randint(-1, 2, (rows, cols), generator=generator)
    where = (torch.rand(rows, cols, generator=generator) < 0.5).nonzero(as_tuple=True)
    packed = oracle.pack_columns(values, bits)
    before = packed.clone()
    taken = step_at(packed, bits, *where, step[where].float())
    want = values.clone()
    want[where] = (values[where] + step[where]).clamp(0, maxq)
    assert torch.equal(packed, oracle.pack_columns(want, bits))
    assert torch.equal(taken, want[where] - values[where])
    assert bool((taken != step[where]).any())
    assert count_different(packed, before, bits) == int((want != values).sum()) == int((taken != 0).sum())
    assert count_different(before, before, bits) == 0


@pytest.mark.parametrize("bits", BITS)
def test_words_of(bits):
    """The words of aligned rows unpack to these rows; rows that begin inside a word have none."""
    values = torch.randint(0, 2**bits, (96, 4), generator=torch.Generator().manual_seed(1))
    packed = oracle.pack_columns(values, bits)
    for start, stop in ((0, 96), (32, 64), (64, 90)):
        rows = slice(start, stop)
        assert torch.equal(unpack_rows(packed[words_of(rows, bits)], bits, stop - start).long(), values[rows])
    assert words_of(slice(33, 64), bits) is None
