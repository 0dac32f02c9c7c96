"""From stages to records: every buffer gets memory, every operation its kernels and their operands.

Knows which kernel does what, and where what it needs lies; nothing of time and of batches, which `compiled.py` runs.
"""

from tpcpu.kernels import activations, exchange, expert_attention, messages, taps
from tpcpu.kernels import record as R
from tpcpu.parallel.communicator import AllReduce as AllReduceCall
from tpcpu.parallel.exchanges import HostsRoom, exchange_records, messages_of
from tpcpu.program.attending import Attentions
from tpcpu.program.lowering import Joining, Stage, stages
from tpcpu.program.memory import Buffers, CacheMemory, Place, Records, last_uses, stride_bytes
from tpcpu.program.mixture import Mixtures
from tpcpu.program.operations import (
    Activation,
    Add,
    AllReduce,
    Attention,
    Buffer,
    Embed,
    ExpertAttention,
    Experts,
    GatedAdd,
    Glu,
    Kind,
    Linear,
    LinearByHeads,
    Logits,
    Operation,
    Program,
    RmsNorm,
    RopeAndStore,
    Route,
    ShortConv,
    inputs,
    outputs,
    weights,
)
from tpcpu.program.products import Bound, Input, Products, Weights
from tpcpu.program.weights import Table, float_bits


class Binder:
    """Writes the records of a program for a rank of `threads` threads; `step`: the address of its step's words.

    `tokens` is the largest batch and `wanted` the most logits of one. What the records name lives as long as this.
    """

    def __init__(
        self, program: Program, held: Weights, cache: CacheMemory, *, step: int, threads: int,
        all_reduce: AllReduceCall | None, exact: bool, tokens: int, wanted: int, join: bool,
    ) -> None:  # fmt: skip
        self._program, self._weights, self._cache, self._all_reduce = program, held, cache, all_reduce
        self._tokens, self._wanted, self._threads = tokens, wanted, threads
        self._count = {name: step + 8 * word for name, word in (("tokens", R.TOKENS), ("wanted", R.WANTED))}
        self._interleaved: dict[int, int] = {}
        self._received = 0
        self._between_hosts: HostsRoom | None = None
        self._sent = [op.x for op in program.operations if isinstance(op, AllReduce)]
        """Partial sums that go to the other ranks, message by message."""
        products = [op for op in program.operations if isinstance(op, Linear | ShortConv)]
        self._multiplied = {out for op in products for out in outputs(op)}
        self.records = Records(step)
        self.buffers = Buffers(tokens)
        self._products = Products(
            held, self.buffers, self.records, threads=threads, rows=max(tokens, wanted), exact=exact
        )
        self._mixtures = Mixtures(self._products, self.buffers, self.records, threads=threads, tokens=tokens)
        self._attentions = Attentions(self._products, self.buffers, self.records, cache, threads=threads, tokens=tokens)
        self.logits = Place(0, 0, 0)
        """Where the logits of the wanted tokens go."""
        self._bind(join)

    def _bind(self, join: bool) -> None:
        program = self._program
        alone = program.share.size == 1
        aliases = {op.out.name: op.x.name for op in program.operations if isinstance(op, AllReduce)} if alone else {}
        integer = {id(op) for op in program.operations if self._is_integer(op)}
        planned = stages(program, integer, joining=self._joining(), join=join)
        self.buffers.last_use = last_uses(
            [[buffer for op in stage.operations for buffer in inputs(op)] for stage in planned], aliases
        )
        for number, stage in enumerate(planned):
            self.records.stage = stage
            if stage.waits:
                self.records.wait()
                self.buffers.release(number)
            self._lower(stage)
        self.records.wait()

    def _is_integer(self, op: Operation) -> bool:
        """Whether any product of this operation takes int8 activations."""
        if not isinstance(op, Linear | ShortConv | Experts | Logits):
            return False
        return self._products.is_integer(weight for weight in weights(op) if weight.kind is not Kind.VECTOR)

    def _joining(self) -> Joining:
        if self._program.share.size == 1:
            return Joining.ALONE
        assert self._all_reduce is not None
        if self._all_reduce.kind == "hosts":
            return Joining.HOSTS
        return Joining.WINDOW if self._all_reduce.kind in ("window", "local") else Joining.CALL

    def _lower(self, stage: Stage) -> None:
        match stage.operations:
            case (Add() as add, RmsNorm() as norm):
                self._norm(norm, add, stage.rounded)
            case (RmsNorm() as norm,):
                self._norm(norm, None, stage.rounded)
            case (Embed() as op,):
                self._embed(op)
            case (Add() as op,):
                out = self.buffers.new(op.out)
                words = {**self._sum_inputs(op), R.TOTAL: out.address, R.TOTAL_STRIDE: out.stride}
                self.records.add(activations.add, words)
            case (Linear() as op,):
                self._linear(op, stage.from_copy)
            case (LinearByHeads() as op,):
                x, out = self.buffers[op.x.buffer], self.buffers.new(op.out)
                self._products.add_by_heads(op, x, self._count["tokens"], out)
            case (ShortConv() as op,):
                self._short_conv(op, stage.from_copy)
            case (RopeAndStore() as rope, Attention() as op):
                self._attentions.add(rope, op)
            case (Glu() as op,):
                self._glu(op, stage.rounded)
            case (GatedAdd() as op,):
                self._gated_add(op)
            case (ExpertAttention() as op,):
                self._expert_attention(op)
            case (Route() as route, Experts() as op):
                self._experts(route, op, stage.from_copy)
            case (AllReduce() as op,):
                self._exchange(op, None)
            case (AllReduce() as op, Add() as add):
                self._exchange(op, add)
            case (Logits() as op,):
                self._head(op, stage.from_copy)
            case _:
                raise AssertionError(stage)

    def _embed(self, op: Embed) -> None:
        table = self._weights[op.weight.key]
        assert isinstance(table, Table)
        rows = table.rows
        out = self.buffers.new(op.out)
        words = {R.IN: rows.ctypes.data, R.IN_STRIDE: rows.strides[0], R.ELEMENT: table.form}
        words[R.CONSTANT] = float_bits(op.scale)
        self.records.add(
            activations.embed, {**words, R.OUT: out.address, R.OUT_STRIDE: out.stride, R.WIDTH: op.out.width}
        )

    def _sum_inputs(self, op: Add) -> dict[int, int]:
        x, y = self.buffers[op.x], self.buffers[op.y]
        return {
            R.IN: x.address, R.IN_STRIDE: x.stride, R.SECOND: y.address, R.SECOND_STRIDE: y.stride,
            R.BIAS: self._products.vector(op.bias) if op.bias else 0, R.WIDTH: op.out.width,
        }  # fmt: skip

    def _norm(self, op: RmsNorm, add: Add | None, rounded: bool) -> None:
        words: dict[int, int] = {}
        if add is None:
            x = self.buffers[op.x]
            words.update({R.IN: x.address, R.IN_STRIDE: x.stride})
        else:
            words.update(self._sum_inputs(add))
            total = self.buffers.new(add.out)
            words.update({R.TOTAL: total.address, R.TOTAL_STRIDE: total.stride})
        out = self.buffers.new(op.out)
        words.update({R.OUT: out.address, R.OUT_STRIDE: out.stride, R.WIDTH: op.out.width})
        words.update({R.WEIGHT: self._products.vector(op.weight), R.EPS: float_bits(op.eps)})
        if rounded:
            words.update(self._products.round_to(op.out).words())
        words.update(self._products.copies(RmsNorm, op.out.width))
        several = activations.rms_norm
        self.records.add([activations.rms_norm_one, several, several], words)

    def _glu(self, op: Glu, rounded: bool) -> None:
        x, y, out = self.buffers[op.activated], self.buffers[op.linear], self.buffers.new(op.out)
        words = {**_between(x, out, len(op.out.own)), R.OUT: out.own, R.SECOND: y.address, R.SECOND_STRIDE: y.stride}
        if rounded:
            words.update(self._products.round_to(op.out).words())
        words.update(self._products.copies(Glu, op.out.width))
        words[R.ACTIVATION] = {Activation.SILU: R.SILU, Activation.GELU_TANH: R.GELU_TANH}[op.activation]
        one = activations.glu if op.out.own.start else activations.glu_one
        self.records.add([one, activations.glu, activations.glu], words)

    def _gated_add(self, op: GatedAdd) -> None:
        x, y, gate, out = self.buffers[op.x], self.buffers[op.y], self.buffers[op.gate], self.buffers.new(op.out)
        words = {**_between(x, out, op.x.width), R.SECOND: y.address, R.SECOND_STRIDE: y.stride}
        self.records.add(activations.gated_add, {**words, R.GATE: gate.address, R.GATE_STRIDE: gate.stride})

    def _expert_attention(self, op: ExpertAttention) -> None:
        q, k, v, out = self.buffers[op.q], self.buffers[op.k], self.buffers[op.v], self.buffers.new(op.out)
        words = {**_between(q, out, op.out.width), R.SECOND: k.address, R.SECOND_STRIDE: k.stride}
        self.records.add(expert_attention.attend, {**words, R.THIRD: v.address, R.THIRD_STRIDE: v.stride})

    def _experts(self, route: Route, op: Experts, from_copy: bool) -> None:
        copies = self._copies_of(op.x) if from_copy else 0
        read = Input(op.x, self.buffers[op.x], self._count["tokens"], copies, is_rounded=from_copy)
        choice, out = self.buffers.new(route.out), self.buffers.new(op.out)
        self._mixtures.add(route, op, self.buffers[route.scores], read, choice, out)

    def _copies_of(self, x: Buffer) -> int:
        """Where threads have their copies of x."""
        kind = next(type(op) for op in self._program.operations if isinstance(op, RmsNorm | Glu) and op.out is x)
        return self._products.copies_of(kind, x)

    def _linear(self, op: Linear, from_copy: bool) -> None:
        outs = {segment.out.name: segment.out for segment in op.segments}
        places = {name: self.buffers.new(out) for name, out in outs.items()}
        bound = []
        for s in op.segments:
            place, weight = places[s.out.name], self._products.packed(s.weight)
            bound.append(Bound(weight, place.own + 4 * s.column, place.stride, s.bias, self._direct(s.out)))
        copies = self._copies_of(op.x) if from_copy else 0
        read = Input(op.x, self.buffers[op.x], self._count["tokens"], copies, is_rounded=from_copy)
        self._products.add(read, bound)

    def _direct(self, out: Buffer) -> int:
        """The window's memory where this rank's partial sums of one token belong; 0 for results of other kinds."""
        call = self._all_reduce
        if call is None or call.kind not in ("window", "hosts") or out not in self._sent:
            return 0
        if out not in self._multiplied or stride_bytes(out.width) > call.half_bytes:
            return 0
        half, place = call.place(self._sent.index(out) * messages_of(call), stride_bytes(out.width))
        return call.own + half * call.half_bytes + place

    def _short_conv(self, op: ShortConv, from_copy: bool) -> None:
        x = self.buffers[op.x]
        # The interleave of two tokens lives for this operation only.
        both = Buffer(f"{op.out.name}.taps", 2 * op.x.width, op.weight.columns)
        if both.width not in self._interleaved:
            self._interleaved[both.width] = self.buffers.take(self._tokens * stride_bytes(both.width))
        place = Place(self._interleaved[both.width], stride_bytes(both.width), 0)
        copies = self._products.copies(ShortConv, both.width)
        words = {
            **_between(x, place, op.x.width), **copies,
            R.STATE: self._cache.states[op.state], R.STATE_STRIDE: self._cache.state_bytes[op.state],
            R.STATE_PAGES: self._cache.page_states[op.state],
        }  # fmt: skip
        if from_copy:
            words.update({R.IN_ROW: self._copies_of(op.x), R.IN_ROW_STRIDE: stride_bytes(op.x.width)})
        if self._is_integer(op):
            words.update(self._products.round_to(both).words())
        self.records.add([taps.taps_one, taps.taps, taps.taps], words)
        out = self.buffers.new(op.out)
        bound = Bound(self._products.packed(op.weight), out.own, out.stride, op.bias, self._direct(op.out))
        read = Input(both, place, self._count["tokens"], copies[R.ROW], is_rounded=True)
        self._products.add(read, [bound])

    def _exchange(self, op: AllReduce, add: Add | None) -> None:
        """`add`: what is added to the sum over the ranks in the same pass."""
        if self._program.share.size == 1:
            self.buffers.alias(op.out, op.x)
            return
        call = self._all_reduce
        assert call is not None
        x, out = self.buffers[op.x], self.buffers.new(op.out if add is None else add.out)
        if call.kind == "local":
            self.records.wait()
            words = {**_between(x, out, op.x.width), R.PARTS: 1}
            if add is None:
                self.records.add(activations.sum_parts, words)
            else:
                words.update({R.TOTAL: out.address, R.TOTAL_STRIDE: out.stride, **self._added(add)})
                self.records.add(activations.add, words)
            return
        if call.kind in ("window", "hosts"):
            number, direct = self._sent.index(op.x), self._direct(op.x)
            if not direct:
                self.records.wait()
            words = {**_between(x, out, op.x.width), R.DIRECT: int(direct != 0), **self._added(add)}
            stages = exchange_records(call, number, stride_bytes(op.x.width), words, self._hosts_room)
            for stage, (kernels, words) in enumerate(stages):
                if stage:
                    self.records.wait()
                self.records.add(kernels, words)
            if call.kind == "window" and number + 1 == len(self._sent) and number & 1 == 0:
                self.records.wait()
                self.records.add(exchange.meet, {R.WINDOW: call.table, R.HALF: 1})
            return
        words = {R.SEND: x.address, R.ROW_FLOATS: x.stride // 4, R.FUNCTION: call.function}
        if call.kind == "mpi":
            words.update({R.RECEIVE: out.address, R.DATATYPE: call.handles[0], R.OPERATION: call.handles[1]})
            words[R.COMMUNICATOR] = call.handles[2]
            self.records.add(messages.mpi_all_reduce, words)
            return
        if not self._received:
            self._received = self.buffers.take(self._program.share.size * self._widest_message())
        words.update({R.RECEIVE: self._received, R.DATATYPE: call.handles[0], R.COMMUNICATOR: call.handles[1]})
        self.records.add(messages.all_gather, words)
        self.records.wait()
        received = Place(self._received, x.stride, 0)
        words = {**_between(received, out, op.x.width), R.PARTS: self._program.share.size}
        self.records.add(activations.sum_parts, words)

    def _widest_message(self) -> int:
        """Bytes of the partial sums of a batch."""
        return self._tokens * stride_bytes(max(buffer.width for buffer in self._sent))

    def _hosts_room(self) -> HostsRoom:
        """Memory for exchanges between hosts, which follow one another."""
        if self._between_hosts is None:
            assert self._all_reduce is not None
            sizes = HostsRoom.sizes(self._all_reduce, self._widest_message())
            self._between_hosts = HostsRoom(*map(self.buffers.take, sizes))
        return self._between_hosts

    def _added(self, add: Add | None) -> dict[int, int]:
        """What is added to the sum over the ranks."""
        if add is None:
            return {}
        residual = self.buffers[add.x]
        bias = self._products.vector(add.bias) if add.bias else 0
        return {R.SECOND: residual.address, R.SECOND_STRIDE: residual.stride, R.BIAS: bias}

    def _head(self, op: Logits, from_copy: bool) -> None:
        x = self.buffers[op.x]
        # Only the tokens whose logits are wanted: a buffer of their own.
        chosen = Buffer("wanted", op.x.width, op.x.own)
        place = Place(self.buffers.take(self._wanted * stride_bytes(op.x.width)), stride_bytes(op.x.width), 0)
        words = _between(x, place, op.x.width)
        copies = self._copies_of(op.x) if from_copy else 0
        if self._is_integer(op):
            words.update(self._products.round_to(chosen).words())
        several = activations.select
        self.records.add([activations.nothing if from_copy else several, several, several], words)
        if not from_copy:
            self.records.wait()
        stride = stride_bytes(op.out.width)
        self.logits = Place(self.buffers.take(self._wanted * stride), stride, 0)
        bound = Bound(self._products.packed(op.weight), self.logits.address, stride, None)
        read = Input(chosen, place, self._count["wanted"], copies, is_rounded=True, private=from_copy)
        self._products.add(read, [bound])
        if op.cap:
            self.records.wait()
            words = {R.OUT: self.logits.address, R.OUT_STRIDE: stride, R.WIDTH: op.out.width}
            self.records.add(activations.soft_cap, {**words, R.CONSTANT: float_bits(op.cap)})


def _between(x: Place, out: Place, width: int) -> dict[int, int]:
    return {R.IN: x.address, R.IN_STRIDE: x.stride, R.OUT: out.address, R.OUT_STRIDE: out.stride, R.WIDTH: width}
