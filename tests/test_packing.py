"""LoTA.packing against the bit stream written out in Python integers, and against GPTQModel's own layer."""
import os

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
os.environ["GPTQMODEL_DISABLE_PACK_EXT"] = "1"          # GPTQModel packs in Python then, and needs no compiler

import oracle
import pytest
import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
from pairs import pairwise

from LoTA import SUPPORTED_BITS, packing
from LoTA.packing import count_different, pack_rows, step_at, unpack_rows, unpack_zeros, values_at, words_of

ANY_BITS = range(1, 9)          # what LoTA.packing is written for; GPTQModel's layer takes SUPPORTED_BITS only
ROW_COUNTS = range(1, 98)       # whole words and parts of them, up to three units of 32 values and one value more


def random_integers(shape, bits, seed=0):
    """Integers over the whole grid. The first and the last are the grid's top, so the words' sign bits are in use."""
    values = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed))
    values[0] = values[-1] = 2**bits - 1
    return values.to(torch.uint8)


def word_count(rows, bits):
    return -(-rows * bits // 32)


def filled_up(packed, bits):
    """Zero words up to whole units of 32 values, where values lie in two words: the unit that GPTQModel reads."""
    missing = -packed.shape[0] % bits if 32 % bits else 0
    return torch.cat([packed, packed.new_zeros(missing, packed.shape[1])])


def test_supported_bits():
    """The tests below cover every number of bits that the project supports."""
    assert set(SUPPORTED_BITS) <= set(ANY_BITS)


@pytest.mark.parametrize("bits", ANY_BITS)
def test_pack_rows_is_the_bit_stream(bits):
    """The words are the bit stream's, and zeros fill them up to whole units. The fewest words are enough to unpack."""
    for rows in ROW_COUNTS:
        values = random_integers((rows, 5), bits, seed=rows)
        packed, stream = pack_rows(values, bits), oracle.pack_columns(values, bits)
        assert packed.dtype == torch.int32 and len(stream) == word_count(rows, bits)
        assert torch.equal(packed, filled_up(stream, bits)), rows
        assert torch.equal(unpack_rows(stream, bits, rows), values), rows


@pytest.mark.parametrize("bits", ANY_BITS)
def test_unpack_rows_reads_any_words(bits):
    """Random words, sign bits among them, are read as the oracle reads them, and packed back to the same words."""
    for rows in ROW_COUNTS:
        words = len(filled_up(torch.zeros(word_count(rows, bits), 3, dtype=torch.int32), bits))
        packed = torch.randint(-2**31, 2**31, (words, 3), generator=torch.Generator().manual_seed(rows)).int()
        values = unpack_rows(packed, bits, rows)
        assert values.dtype == torch.uint8 and values.shape == (rows, 3)
        assert torch.equal(values.long(), oracle.unpack_columns(packed, bits, rows)), rows
        whole = words * 32 // bits
        assert torch.equal(pack_rows(unpack_rows(packed, bits, whole), bits), packed), rows


@pytest.mark.parametrize("bits", ANY_BITS)
def test_unpacking_in_pieces(bits, monkeypatch):
    """However many entries are unpacked at a time, the integers are the same, in float32 too."""
    values = random_integers((97, 3), bits)
    packed = pack_rows(values, bits)
    for entries in (1, 200, 1 << 19):
        monkeypatch.setattr(packing, "UNPACK_ENTRIES", entries)
        assert torch.equal(unpack_rows(packed, bits, 97), values), entries
        in_float32 = unpack_rows(packed, bits, 97, torch.float32)
        assert in_float32.dtype == torch.float32 and torch.equal(in_float32, values.float()), entries


@pytest.mark.parametrize("bits", ANY_BITS)
def test_round_trip_of_a_transposed_tensor(bits):
    """Strided int64 values pack like their contiguous uint8 copy, and strided words unpack to these values."""
    values = random_integers((6, 64), bits, seed=2).t()
    packed = pack_rows(values.long(), bits)
    assert torch.equal(packed, oracle.pack_columns(values, bits))
    assert torch.equal(unpack_rows(packed.t().contiguous().t(), bits, 64), values)


@pytest.mark.parametrize("bits", ANY_BITS)
def test_unpack_zeros_adds_the_one_of_gptq(bits):
    """"gptq" stores z - 1 and "gptq_v2" stores z. Both read back as z, from different words."""
    for cols in (32, 45, 64):
        zeros = random_integers((cols, 4), bits, seed=3).clamp_(min=1)
        stored_v1 = filled_up(oracle.pack_columns(zeros - 1, bits), bits).t().contiguous()
        stored_v2 = filled_up(oracle.pack_columns(zeros, bits), bits).t().contiguous()
        before = stored_v1.clone()
        assert torch.equal(unpack_zeros(stored_v1, bits, cols, "gptq"), zeros.t())
        assert torch.equal(unpack_zeros(stored_v2, bits, cols, "gptq_v2"), zeros.t())
        assert torch.equal(unpack_zeros(stored_v1, bits, cols, "gptq_v2"), zeros.t() - 1)
        assert torch.equal(stored_v1, before)


# --- GPTQModel ----------------------------------------------------------------------------------------------------

def torch_linear(bits, rows, cols, qweight, qzeros, scales, g_idx):
    """GPTQModel's layer of these tensors, in eval mode. post_init() is left out, because it runs torch.compile."""
    layer = TorchLinear(bits=bits, group_size=16, sym=False, desc_act=True, in_features=rows, out_features=cols)
    layer.qweight, layer.qzeros, layer.scales, layer.g_idx = qweight, qzeros, scales, g_idx
    return layer.eval()


def random_layer(bits, rows, cols, seed):
    """(W_int, zeros, float16 scales, shuffled g_idx). Zero points of 0 and of the grid's top are among the zeros."""
    generator = torch.Generator().manual_seed(seed)
    g_idx = (torch.arange(rows) // 16)[torch.randperm(rows, generator=generator)].int()
    groups = -(-rows // 16)
    scales = (torch.rand(groups, cols, generator=generator) + 0.5).half()
    zeros = random_integers((groups, cols), bits, seed + 1)
    zeros[:, :2], zeros[:, -2:] = 0, 0
    zeros[:, 5] = 2**bits - 1
    return random_integers((rows, cols), bits, seed + 2), zeros, scales, g_idx


def product(weight_int, zeros, scales, g_idx):
    """s (W - z), rounded once to float16. Every right reading of the layer gives it."""
    g_idx = g_idx.long()
    return (scales.double()[g_idx] * (weight_int.double() - zeros.double()[g_idx])).half()


@pytest.mark.parametrize("bits, rows, training", pairwise(bits=SUPPORTED_BITS, rows=(64, 40), training=(False, True)))
def test_gptqmodel_reads_what_pack_rows_packed(bits, rows, training):
    """TorchLinear makes s (W - z) of the packed integers, in evaluation and by its other code path, in training."""
    weight_int, zeros, scales, g_idx = random_layer(bits, rows, 32, seed=4)
    layer = torch_linear(bits, rows, 32, pack_rows(weight_int, bits), pack_rows(zeros.t(), bits).t().contiguous(),
                         scales, g_idx).train(training)
    assert torch.equal(layer.dequantize_weight(), product(weight_int, zeros, scales, g_idx))
    assert torch.equal(unpack_rows(layer.qweight, bits, rows), weight_int)
    assert torch.equal(unpack_zeros(layer.qzeros, bits, 32, "gptq_v2"), zeros)


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_unpack_reads_what_gptqmodel_packed(bits):
    """GPTQModel's pack() of s (W - z) unpacks to W and z, and pack_rows() makes the very same words."""
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


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_gptq_zeros_read_like_gptqmodels_conversion(bits):
    """Any words read as "gptq" are the zero points that GPTQModel's conversion to "gptq_v2" makes of them."""
    weight_int, _, scales, g_idx = random_layer(bits, 64, 32, seed=6)
    qzeros = torch.randint(-2**31, 2**31, (4, bits), generator=torch.Generator().manual_seed(7)).int()
    qzeros[0], qzeros[1] = -1, 0
    layer = torch_linear(bits, 64, 32, pack_rows(weight_int, bits), qzeros.clone(), scales, g_idx)
    layer.qzero_format(format=1)
    convert_gptq_v1_to_v2_format_module(layer, bits=bits, pack_dtype=torch.int32)
    zeros = unpack_zeros(qzeros, bits, 32, "gptq")
    assert torch.equal(zeros, oracle.unpack_columns(layer.qzeros.t(), bits, 32).t().to(torch.uint8))
    assert torch.equal(layer.dequantize_weight(), product(weight_int, zeros, scales, g_idx))


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_zero_points_of_zero_survive_gptq(bits):
    """A zero point of 0, stored as 0 - 1 in GPTQModel's way, comes back as 0 and leaves its neighbours alone."""
    _, zeros, _, _ = random_layer(bits, 64, 32, seed=8)
    assert (zeros == 0).any() and (zeros == 2**bits - 1).any()
    packed = pack_rows(zeros.t(), bits).t().contiguous()
    if bits == 3:               # values lie in two words, and GPTQModel wraps each by itself
        stored = pack_rows((zeros.t().int() - 1) % 8, bits).t().contiguous()
    else:                       # GPTQModel subtracts from whole words, so a zero borrows from its neighbour
        stored = packed - sum(1 << shift for shift in range(0, 32, bits))
    assert torch.equal(unpack_zeros(stored, bits, 32, "gptq"), zeros)
    assert not torch.equal(unpack_zeros(stored, bits, 32, "gptq_v2"), zeros)


# --- changing packed integers -------------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", ANY_BITS)
def test_step_at(bits):
    """Steps at scattered places, several in one word: the integers take them, but none leaves the grid."""
    generator = torch.Generator().manual_seed(bits)
    rows, cols, maxq = 70, 9, 2**bits - 1
    values = torch.randint(0, maxq + 1, (rows, cols), generator=generator)
    values[::7], values[3::7] = 0, maxq         # where a step may be blocked
    step = torch.randint(-1, 2, (rows, cols), generator=generator)
    where = (torch.rand(rows, cols, generator=generator) < 0.5).nonzero(as_tuple=True)
    packed = oracle.pack_columns(values, bits)
    before = packed.clone()
    assert torch.equal(values_at(packed, bits, *where), values[where])
    taken = step_at(packed, bits, *where, step[where].float())
    want = values.clone()
    want[where] = (values[where] + step[where]).clamp(0, maxq)
    assert torch.equal(packed, oracle.pack_columns(want, bits))
    assert torch.equal(taken, want[where] - values[where])
    assert set(step[where][taken != step[where]].tolist()) == {-1, 1}           # both ends blocked some
    assert count_different(packed, before, bits) == int((want != values).sum()) == int((taken != 0).sum())
    assert count_different(before, before, bits) == 0


@pytest.mark.parametrize("bits", ANY_BITS)
def test_words_of(bits):
    """The words of rows that begin a word unpack to these rows. Rows that begin inside a word have none."""
    values = torch.randint(0, 2**bits, (96, 4), generator=torch.Generator().manual_seed(1))
    packed = oracle.pack_columns(values, bits)
    for start, stop in ((0, 96), (32, 64), (64, 90)):
        rows = slice(start, stop)
        assert torch.equal(unpack_rows(packed[words_of(rows, bits)], bits, stop - start).long(), values[rows])
    assert words_of(slice(33, 64), bits) is None
