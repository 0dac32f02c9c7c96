"""Scales of blocks, as a tile needs them: float32 as they are stored, or decoded from their doubly quantised form, or
the powers of two that bytes name.

A doubly quantised scale is `code[q] * group + offset`, each step rounded to float32 as the published dequantiser rounds
it. Codes are decoded for four blocks of a panel at a time and kept on the stack while the tile goes through these. A
panel's groups are fetched once per span where blocks of a row fill whole spans, once per four blocks where they fill
whole fours, else for every block: groups run along the whole tensor and may change anywhere in a row.
"""

from llvmlite import ir
from numba.core import cgutils

from tpcpu.kernels import record as R
from tpcpu.kernels.isa import has_byte_permute, selected
from tpcpu.kernels.memory import F32, I32
from tpcpu.kernels.record import BLOCK
from tpcpu.kernels.simd import emit as e
from tpcpu.kernels.simd import instructions as isa

ROWS = selected().panel_rows
TOGETHER = 4
"""Blocks whose scales are decoded together: 64 codes of 16 rows, one register."""
PREFETCH = 512
"""Bytes of codes that are asked for ahead: as many blocks as `tiles.PREFETCH` has of values, and a little more."""


class StoredScales:
    """float32, block by block, the rows of a panel together."""

    def __init__(self, o):
        self.o = o

    def decode(self, block, blocks):
        """Nothing to do."""

    def load(self, p, blocks, block, _inside, _half):
        """The scales of `block` in panel p; a panel has `blocks`."""
        b = self.o.b
        at = b.mul(b.add(b.mul(e.offset(b, self.o.panel, p), blocks), block), e.const(ROWS))
        return e.load(b, e.offset(b, self.o.scales, at, 4), e.F32V)


class PowerScales:
    """Bytes n that stand for 2^(n - 127), of both halves of a block one after the other."""

    def __init__(self, o):
        self.o = o

    def decode(self, block, blocks):
        """Nothing to do ahead."""

    def load(self, p, blocks, block, _inside, half):
        """The scales of one half of `block` in panel p; a panel has `blocks`."""
        b = self.o.b
        at = b.mul(b.add(b.mul(e.offset(b, self.o.panel, p), blocks), block), e.const(R.HALVES * ROWS))
        address = e.offset(b, b.add(self.o.scales, at), half * ROWS)
        if self.o.prefetches and half == 0:
            e.prefetch(b, e.offset(b, address, R.HALVES * PREFETCH))
        return powers(b, address)


def powers(b, address):
    """The float32 2^(n - 127) of bytes n, one of each row of a panel."""
    bits = b.shl(e.widen_bytes(b, address), e.constants([23] * ROWS, I32))
    # Below the smallest exponent of float32 there is one more power.
    least = e.constants([1 << 22] * ROWS, I32)
    return b.bitcast(b.select(b.icmp_signed(">", bits, least), bits, least), e.F32V)


def half_sum(b, address):
    """Minus the bias of the weights times the sum of the 32 int8 at an address, an int32."""
    half = BLOCK // R.HALVES
    wide = ir.VectorType(ir.IntType(16), half)
    values = b.sext(e.load(b, address, ir.VectorType(ir.IntType(8), half)), wide)
    total = e.intrinsic_call(b, f"llvm.vector.reduce.add.v{half}i16", ir.IntType(16), [values])
    return b.mul(b.sext(total, I32), e.const(-isa.WEIGHT_BIAS, I32))


class CodedScales:
    """Codes (uint8) into a table, times the scale of a group of 256 blocks, plus an offset."""

    def __init__(self, o):
        self.o = o
        b = o.b
        self.code = e.load_word(b, o.segment, R.S_CODE)
        self.groups = e.load_word(b, o.segment, R.S_GROUPS)
        self.offset = e.splat(b, b.bitcast(b.trunc(e.load_word(b, o.segment, R.S_OFFSET), I32), F32), e.F32V)
        full, first = (e.load_word(b, o.segment, word) for word in (R.S_FULL_BLOCKS, R.S_FIRST_BLOCK))
        self.numbers = []
        """For each panel the number, in the whole tensor, of every row's first block."""
        lanes = e.constants(range(ROWS), I32)
        for p in range(o.panels):
            row = b.mul(e.offset(b, o.panel, p), e.const(ROWS))
            rows = b.add(e.splat(b, b.trunc(row, I32), e.I32V), lanes)
            starts = b.mul(rows, e.splat(b, b.trunc(full, I32), e.I32V))
            self.numbers.append(b.add(starts, e.splat(b, b.trunc(first, I32), e.I32V)))
        either = b.or_(full, first)
        self.whole_fours = b.icmp_signed("==", b.and_(either, e.const(TOGETHER - 1)), e.const(0))
        whole_spans = b.icmp_signed("==", b.and_(either, e.const(R.SPAN - 1)), e.const(0))
        self.every = b.select(whole_spans, e.const(R.SPAN - 1), e.const(TOGETHER - 1))
        """Groups are fetched where `block & every` is 0."""
        self.group = [cgutils.alloca_once(b, e.F32V) for _ in range(o.panels)]
        # Zeros first: what a branch has not written yet must not be undefined.
        for register in self.group:
            b.store(ir.Constant(e.F32V, [0.0] * ROWS), register)
        of = ir.ArrayType(e.F32V, TOGETHER)
        self.decoded = [cgutils.alloca_once(b, of) for _ in range(o.panels)]

    def decode(self, block, blocks):
        """Decodes the scales of TOGETHER blocks from `block` on; behind a panel's last block they mean nothing."""
        b = self.o.b
        fetch = b.and_(self.whole_fours, b.icmp_signed("==", b.and_(block, self.every), e.const(0)))
        with b.if_then(fetch):
            for p in range(self.o.panels):
                b.store(self._fetch(p, block), self.group[p])
        for p in range(self.o.panels):
            at = b.mul(b.add(b.mul(e.offset(b, self.o.panel, p), blocks), block), e.const(ROWS))
            address = b.add(self.o.scales, at)
            if self.o.prefetches:
                e.prefetch(b, e.offset(b, address, PREFETCH))
            values = self._values(address)
            with b.if_else(self.whole_fours) as (alike, apart):
                with alike:
                    group = b.load(self.group[p])
                    self._keep(p, values, [group] * TOGETHER)
                with apart:
                    self._keep(p, values, [self._fetch(p, e.offset(b, block, j)) for j in range(TOGETHER)])

    def load(self, p, _blocks, _block, inside, _half):
        """The scales of one of the decoded blocks, `inside` of them."""
        b = self.o.b
        return b.load(b.gep(self.decoded[p], [e.const(0, I32), b.trunc(inside, I32)]))

    def _keep(self, p, values, groups):
        b = self.o.b
        for j, (value, group) in enumerate(zip(values, groups, strict=True)):
            # Rounded after the multiply: no fused multiply-add here.
            scale = b.fadd(b.fmul(value, group), self.offset)
            b.store(scale, b.gep(self.decoded[p], [e.const(0, I32), e.const(j, I32)]))

    def _fetch(self, p, block):
        """The group scales of a block of each row of panel p."""
        b = self.o.b
        number = b.add(self.numbers[p], e.splat(b, b.trunc(block, I32), e.I32V))
        return isa.gather_f32(b, self.groups, b.lshr(number, e.constants([8] * ROWS, I32)))

    def _values(self, address):
        """What the codes of TOGETHER blocks stand for."""
        b = self.o.b
        if has_byte_permute():
            return _from_planes(b, e.load(b, address, e.BYTEV), self.code)
        return [isa.gather_f32(b, self.code, e.widen_bytes(b, e.offset(b, address, j * ROWS))) for j in range(TOGETHER)]


def _from_planes(b, codes, table):
    """Sixteen times four values of a table of 256, looked up byte by byte: `vpermi2b` finds 64 bytes among 128.

    The table's bytes lie in planes behind it: the lowest byte of all values, then the next (`weights.code_table`).
    """
    # Unpacking works inside quarters of a register: rows 4i..4i+3 of all four blocks go to quarter i first.
    order = [16 * j + 4 * quarter + i for quarter in range(4) for j in range(4) for i in range(4)]
    of = codes.type
    undefined = ir.Constant(of, ir.Undefined)
    codes = b.shuffle_vector(codes, undefined, e.constants(order, I32))
    upper = b.icmp_signed("<", codes, ir.Constant(of, [0] * 64))
    planes = []
    for plane in range(4):
        quarters = [e.load(b, e.offset(b, table, 1024 + 256 * plane + 64 * i), of) for i in range(4)]
        low, high = (
            e.intrinsic_call(b, "llvm.x86.avx512.vpermi2var.qi.512", of, [quarters[i], codes, quarters[i + 1]])
            for i in (0, 2)
        )
        planes.append(b.select(upper, high, low))

    def unpack(low, high, lanes, width):
        # The elements of two registers in turn, inside each quarter: the first half of it, then the second.
        size = lanes // 4
        indices = [
            [quarter * size + half * size // 2 + i + lanes * which
             for quarter in range(4) for i in range(size // 2) for which in range(2)]
            for half in range(2)
        ]  # fmt: skip
        of = ir.VectorType(ir.IntType(width), lanes)
        low, high = b.bitcast(low, of), b.bitcast(high, of)
        return [b.shuffle_vector(low, high, e.constants(each, I32)) for each in indices]

    lower = unpack(planes[0], planes[1], 64, 8)
    higher = unpack(planes[2], planes[3], 64, 8)
    words = [piece for low, high in zip(lower, higher, strict=True) for piece in unpack(low, high, 32, 16)]
    # Register j now has, in quarter i, rows 4i..4i+3 of block j.
    return [b.bitcast(word, e.F32V) for word in words]
