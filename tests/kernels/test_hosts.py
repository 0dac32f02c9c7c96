"""Sums over several hosts, bit by bit: ranks are teams of this process, hosts have a window each, and MPI is a function
of this file that the kernels call by its address."""

import ctypes
import threading
from dataclasses import replace

import numpy as np
import pytest

from tests.kernels.binding import same_bits
from tpcpu.formats import floats
from tpcpu.kernels import record as R
from tpcpu.parallel.exchanges import Exchanges, HostsRoom, exchange_records
from tpcpu.parallel.team import Team, aligned
from tpcpu.parallel.window import NEVER, Window, part_bytes
from tpcpu.program.memory import stride_bytes

ALL_GATHER = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_int64] * 7)


class Slices:
    """The ranks with the same slice, one a host: an all-gather of whatever they bring."""

    def __init__(self, hosts):
        self._meeting = threading.Barrier(hosts)
        self._brought = [b""] * hosts
        self.calls = [ALL_GATHER(lambda *arguments, host=host: self._gather(host, *arguments)) for host in range(hosts)]

    def _gather(self, host, source, count, datatype, out, out_count, out_datatype, _communicator):
        assert (count, datatype) == (out_count, out_datatype)
        self._brought[host] = ctypes.string_at(source, count * datatype)
        self._meeting.wait(60)
        whole = b"".join(self._brought)
        ctypes.memmove(out, whole, len(whole))
        self._meeting.wait(60)
        return 0


class Hosts:
    """`shape[h][r]`: the threads of rank r on host h."""

    def __init__(self, shape, wire="float32", two_shot=NEVER):
        slices = min(len(host) for host in shape)
        alike = [Slices(len(shape)) for _ in range(slices)]
        self.keep, self.calls, self.teams = [alike], [], []
        for number, host in enumerate(shape):
            memory = [aligned(part_bytes(len(host)) // 8) for _ in host]
            windows = [Window(rank, [each.ctypes.data for each in memory]) for rank in range(len(host))]
            self.keep.append((memory, windows))
            for rank, (window, threads) in enumerate(zip(windows, host, strict=True)):
                function = 0
                if rank < slices:
                    function = ctypes.cast(alike[rank].calls[number], ctypes.c_void_p).value
                self.teams.append(Team(range(threads), pinned=False, crowded=True))
                self.calls.append(replace(
                    window.all_reduce(host, two_shot), kind="hosts", function=function, wire=wire,
                    handles=(2 if wire == "bf16" else 4, 0), hosts=len(shape), slices=slices, slice=rank,
                ))  # fmt: skip
        self.host_of = [number for number, host in enumerate(shape) for _ in host]

    def together(self, work):
        """Every rank does its work; fails if that takes long."""
        threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(len(self.teams))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()

    def wanted(self, parts, wire="float32"):
        """Parts in rank order inside a host, sums of hosts in host order."""
        sums = {}
        for host, part in zip(self.host_of, parts, strict=True):
            sums[host] = sums[host] + part if host in sums else part.copy()
        total = None
        for number in sorted(sums):
            one = sums[number]
            if wire == "bf16":
                one = floats.to_float32(floats.convert(one, "bfloat16"))
            total = one if total is None else total + one
        return total

    def close(self):
        for team in self.teams:
            team.close()


SHAPES = {
    "1+1": [[1], [1]], "2+1": [[1, 1], [1]], "2x2 threads + 3": [[2, 2], [1, 2, 1]], "1+2+3": [[2], [1, 1], [1, 1, 1]],
}  # fmt: skip


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def shape(request):
    return request.param


@pytest.mark.parametrize("wire", ["float32", "bf16"])
@pytest.mark.parametrize("width", [17, 160, 8192, 300_000])
def test_every_rank_has_the_sum_in_host_order(shape, wire, width):
    hosts = Hosts(shape, wire)
    exchanges = [Exchanges(call, team, width, 4) for call, team in zip(hosts.calls, hosts.teams, strict=True)]
    random = np.random.default_rng(width)
    for _ in range(3):
        for each in exchanges:
            each.x[:] = random.standard_normal(width) * 10.0 ** random.integers(-3, 4, width)
            each.out[:] = 0
        hosts.together(lambda rank: exchanges[rank].run())
        total = hosts.wanted([each.x for each in exchanges], wire)
        for each in exchanges:
            assert same_bits(each.out, total)
    hosts.close()


@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize("two_shot", [NEVER, 0], ids=["one shot", "two shots"])
def test_residual_and_bias_are_added_last(shape, tokens, two_shot):
    """Through the records that a step has, message after message; what lies behind the features stays zero."""
    width, count = 200, 3
    two_shot = two_shot if all(len(set(host)) == 1 for host in shape) else NEVER
    hosts = Hosts(shape, two_shot=two_shot)
    stride, same = stride_bytes(width), np.random.default_rng(1)
    residual, bias = same.standard_normal((tokens, stride // 4)).astype(np.float32), aligned(stride // 8)
    bias = bias.view(np.float32)
    bias[:width] = same.standard_normal(width)
    x = np.random.default_rng(2).standard_normal((len(hosts.teams), count, tokens, stride // 4)).astype(np.float32)
    x[..., width:] = 0
    out = np.zeros_like(x)
    programs, keep = [], []
    for rank, call in enumerate(hosts.calls):
        room = [aligned(size // 8 + 8) for size in HostsRoom.sizes(call, tokens * stride)]
        step = aligned(R.STEP_WORDS)
        step[[R.TEAM, R.TOKENS, R.CLASS]] = hosts.teams[rank].address, tokens, 0 if tokens == 1 else 2
        keep.append((room, step))
        recorded = []
        for number in range(count):
            words = {
                R.IN: x[rank, number].ctypes.data, R.IN_STRIDE: stride, R.WIDTH: width,
                R.OUT: out[rank, number].ctypes.data, R.OUT_STRIDE: stride,
                R.SECOND: residual.ctypes.data, R.SECOND_STRIDE: stride, R.BIAS: bias.ctypes.data,
            }  # fmt: skip
            places = HostsRoom(*(each.ctypes.data for each in room))
            recorded += exchange_records(call, number, stride, words, lambda places=places: places)
        records = np.zeros((len(recorded), R.RECORD_WORDS), np.int64)
        for record, (kernels, words) in zip(records, recorded, strict=True):
            record[R.KERNELS : R.KERNELS + 3] = [kernel.address for kernel in kernels]
            record[[R.BARRIER, R.STEP]] = 7, step.ctypes.data
            for word, value in words.items():
                record[word] = value
        programs.append(records)
    for _ in range(20):
        out[:] = 0
        hosts.together(lambda rank: hosts.teams[rank].run(programs[rank]))
        for number in range(count):
            total = (residual + hosts.wanted(x[:, number])) + bias[: stride // 4]
            for rank in range(len(hosts.teams)):
                assert same_bits(
                    np.ascontiguousarray(out[rank, number, :, :width]), np.ascontiguousarray(total[:, :width])
                )
                assert not out[rank, number, :, width:].any()
    hosts.close()
