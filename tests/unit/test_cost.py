"""The planner's figures against those published for Yuan 2.0 and against counting one by one."""

import math
import time

import numpy as np
import pytest

from tests.configs import PUBLISHED
from tpcpu.models import read_config
from tpcpu.parallel.partition import Range, Share
from tpcpu.program import cost
from tpcpu.program.cost import Storage, costs, memory, weight_bytes
from tpcpu.program.operations import AllReduce, Experts, Kind, Linear, Logits, ShortConv, Weight

BF16 = Storage("bf16", "bf16", "bf16")


def world(name, size):
    model = read_config(PUBLISHED[name])
    return [model.program(Share(rank, size)) for rank in range(size)]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("yuan2-2b", 2_088_724_480),
        ("yuan2-51b", 51_842_105_344),
        ("yuan2-102b", 102_577_954_816),
        ("chatglm3-6b", 6_243_584_000),
        ("glm-4-9b", 9_399_951_360),
        ("qwen-72b", 72_287_920_128),
        ("baichuan2-13b", 13_896_668_160),
        ("llama-1b", 1_104_218_112),
    ],
)
def test_parameters(name, count):
    """The published 2.1, 51.8 and 102.6 billion, to the last one; those of folders on Hugging Face; the 1.10 billion of
    the common small Llama."""
    assert cost.parameters(*world(name, 1)) == count


@pytest.mark.parametrize(
    ("name", "count", "of_token"),
    [
        ("qwen3-30b-a3b", 30_532_122_624, 3_353_032_704),
        ("yuan2-m32", 39_942_842_368, 3_704_055_808),
        ("gpt-oss-20b", 20_914_757_184, 3_608_307_264 + 201088 * 2880),
        ("deepseek-v2-lite", 15_706_484_224, 2_661_150_208),
        ("deepseek-v3", 671_026_419_200, 37_552_297_472),
    ],
)
def test_parameters_of_a_mixture(name, count, of_token):
    """The published 30.5, 40, 20.9, 15.7 and 671 billion, of which 3.3, 3.7, 3.6, without the embedding, 2.4, without
    embedding and head, and 37 are needed for a token."""
    (program,) = world(name, 1)
    assert cost.parameters(program) == count
    assert cost.parameters_of_token(program) == of_token


def test_experts_in_a_format_of_their_own():
    """17 bytes for 32 weights of mxfp4; other matrices, the head and the router are what they would be without."""
    (program,) = world("gpt-oss-20b", 1)
    storage = Storage(experts="mxfp4")
    held = {weight: storage.of(weight) for weight in program.weights}
    assert {form for weight, form in held.items() if weight.kind is Kind.EXPERT} == {"mxfp4"}
    assert {held[weight] for weight in program.weights if weight.kind is Kind.MATRIX} == {"nf4"}
    experts = sum(weight_bytes(weight, form) for weight, form in held.items() if weight.kind is Kind.EXPERT)
    assert experts == 24 * 32 * 3 * 2880 * 2880 * 17 // 32
    cut = Weight("w", Kind.EXPERT, (64, 96), Range(0, 64), Range(0, 96))
    assert storage.of(cut) == "bf16"


@pytest.mark.parametrize("size", [4, 8, 16])
def test_deepseek_v3_on_several_ranks(size):
    """Counted by hand: 61 layers, 58 of them with 256 experts of which 8 are read; what makes queries and latent
    vectors narrow, and routers, on every rank; a head in 8 bits; 576 features of a token and layer in the cache."""
    hidden, narrow, rank, heads, expert = 7168, 1536, 512, 128, 3 * 7168 * 2048
    on_all = 61 * (narrow + rank + 64) * hidden
    up, down = heads * 192 * narrow + heads * 256 * rank, hidden * heads * 128
    divided = 61 * (up + down) + 3 * 3 * hidden * 18432 + 58 * expert
    routers, head = 58 * 256 * hidden * 2, 129280 * hidden * (1 + 4 / 64)
    nf4 = 0.5 + 1 / 64
    storage, model = Storage(), read_config(PUBLISHED["deepseek-v3"])
    program = model.program(Share(1, size))
    held = memory(program, storage, 1000)
    experts = 58 * expert / size
    assert held.weights == pytest.approx(
        nf4 * (on_all + divided / size + 256 * experts) + routers + head / size, rel=3e-3
    ), "group scales are the rest"
    spent = cost.total(costs(program, storage))
    assert spent.weight_bytes == pytest.approx(
        nf4 * (on_all + divided / size + 8 * experts) + routers + head / size, rel=3e-3
    )
    assert held.cache == 1000 * spent.cache_bytes == 1000 * 61 * 576 * 2
    assert spent.cache_bytes_per_position == spent.cache_bytes
    assert spent.messages == 2 * 61
    gigabytes = {4: (87.1, 5.41), 8: (43.9, 3.05), 16: (22.3, 1.87)}[size]
    assert [round(held.weights / 1e9, 1), round(spent.weight_bytes / 1e9, 2)] == list(gigabytes)


def test_values_in_keys_are_kept_once():
    """Formats of the cache; rows that are no multiple of 16 are filled up."""
    config = PUBLISHED["deepseek-v2-lite"] | {"num_hidden_layers": 1, "kv_lora_rank": 40}
    program = read_config(config).program(Share())
    for name, nbytes in (("bf16", 2 * 112), ("int8", 112 + 4), ("float32", 4 * 112)):
        assert memory(program, Storage(cache=name), 64).cache == 64 * nbytes


@pytest.mark.parametrize("size", [1, 3])
def test_a_mixture_reads_the_chosen_experts_only(size):
    """Eight of 128 are read, all are kept, the router in the floats that it has; each rank has some of every one."""
    model = read_config(PUBLISHED["qwen3-30b-a3b"] | {"num_hidden_layers": 1})
    storage = Storage()
    programs = [model.program(Share(rank, size)) for rank in range(size)]
    for program in programs:
        (op,) = (op for op in program.operations if isinstance(op, Experts))
        (spent,) = (
            one for op, one in zip(program.operations, costs(program, storage), strict=True) if isinstance(op, Experts)
        )
        one = sum(weight_bytes(weight, "nf4") for weight in op.experts[77].weights)
        assert spent.weight_bytes == 8 * one
        assert memory(program, storage, 64).weights == cost.total(costs(program, storage)).weight_bytes + 120 * one
        (router,) = (weight for weight in program.weights if weight.kind is Kind.ROUTER)
        assert (storage.of(router), router.size) == ("bf16", 128 * 2048)
    held = sum(weight.size for program in programs for weight in program.weights if "experts" in weight.name)
    assert held == 128 * 3 * 2048 * 768


@pytest.mark.parametrize(
    ("name", "linear", "conv", "head", "vectors"),
    [
        ("yuan2-2b", 1_610_612_736, 201_326_592, 276_561_920, 223_232),
        ("yuan2-51b", 45_097_156_608, 5_637_144_576, 1_106_247_680, 1_556_480),
        ("yuan2-102b", 90_194_313_216, 11_274_289_152, 1_106_247_680, 3_104_768),
    ],
)
@pytest.mark.parametrize("size", [1, 4, 8])
def test_parameters_by_kind_and_their_division(name, linear, conv, head, vectors, size):
    """At these sizes nothing that multiplies is held twice; norms and the second convolution's bias are."""
    programs = world(name, size)
    held = {
        kind: sum(weight.size for program in programs for weight in program.weights if weight.kind is kind)
        for kind in Kind
    }
    assert (held[Kind.MATRIX], held[Kind.CONV], held[Kind.HEAD]) == (linear, conv, head)
    assert held[Kind.VECTOR] == vectors or size > 1


@pytest.mark.parametrize(
    ("name", "linear", "conv", "head", "sixteen_bit", "mixed", "all_nf4"),
    [
        ("yuan2-2b", 0.831, 0.104, 0.143, 4.177, 1.488, 1.078),
        ("yuan2-51b", 23.264, 2.908, 0.571, 103.684, 28.388, 26.746),
        ("yuan2-102b", 46.528, 5.816, 0.571, 205.156, 54.563, 52.921),
    ],
)
def test_gigabytes_per_token(name, linear, conv, head, sixteen_bit, mixed, all_nf4):
    """The tables of weight bytes per token: each kind in NF4, and the whole at three mixes of formats."""
    (program,) = world(name, 1)
    by_kind = dict.fromkeys((Linear, ShortConv, Logits), 0)
    for operation, spent in zip(program.operations, cost.costs(program, Storage("nf4", "nf4")), strict=True):
        if type(operation) in by_kind:
            by_kind[type(operation)] += spent.weight_bytes
    assert [round(count / 1e9, 3) for count in by_kind.values()] == [linear, conv, head]

    def gigabytes(storage):
        return cost.weight_bytes_per_token([program], storage) / 1e9

    # The published tables count norms and biases, too: 2 bytes each here.
    vectors = 2e-9 * sum(weight.size for weight in program.weights if weight.kind is Kind.VECTOR)
    assert gigabytes(BF16) + vectors == pytest.approx(sixteen_bit, abs=6e-4)
    assert gigabytes(Storage("nf4", "bf16")) + vectors == pytest.approx(mixed, abs=6e-4)
    assert gigabytes(Storage("nf4", "nf4")) + vectors == pytest.approx(all_nf4, abs=6e-4)


def test_the_reference_job():
    """53.5 GB of weights a token in NF4 with the int8 head, 13.4 GB on each of four ranks, 252 messages of 32 KiB."""
    programs = world("yuan2-102b", 4)
    storage = Storage()
    assert cost.weight_bytes_per_token(programs, storage) / 1e9 == pytest.approx(53.5, abs=0.05)
    for program in programs:
        spent = cost.total(cost.costs(program, storage))
        assert spent.messages == 252
        assert spent.message_bytes == 252 * 32768
        assert cost.memory(program, storage, 0).weights == spent.weight_bytes
        assert cost.memory(program, storage, 0).weights / 1e9 == pytest.approx(13.4, abs=0.05)
        # A whole sequence of 4096 positions is 11.27 GB in 16 bits over all ranks.
        assert cost.memory(program, storage, 4096).cache == 4096 * 2_752_512 // 4
        assert cost.memory(program, storage, 1, sequences=3).cache == 3 * 2_752_512 // 4
    whole = cost.total(cost.costs(*world("yuan2-102b", 1), storage))
    assert whole.cache_bytes == whole.cache_bytes_per_position == 2_752_512
    assert whole.operations == pytest.approx(2 * 102.57e9, rel=1e-3)
    assert cost.embedding_bytes(programs[0], storage) == 2 * 1_106_247_680


@pytest.mark.parametrize(("size", "bits"), [(1, 4.127), (4, 4.128), (8, 4.130)])
def test_bits_per_nf4_weight(size, bits):
    """Copies of group scales that ranks share cost little: at most 4.14 bits up to 8 ranks."""
    found = cost.bits_per_nf4_weight(world("yuan2-102b", size), Storage())
    assert found == pytest.approx(bits, abs=1.1e-3)
    assert found <= 4.14


def test_bits_where_nothing_is_nf4():
    assert cost.bits_per_nf4_weight(world("yuan2-2b", 1), BF16) is None


@pytest.mark.parametrize("columns", [64, 128, 192, 704, 2048, 5632, 8192])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [1, 7, 100, 1025])
def test_scale_groups_are_counted_one_by_one(rows, columns, size):
    for rank in range(size):
        part = Share(rank, size).split(columns, 64)
        for held in (Range(0, rows), Range(rows // 3, rows)):
            weight = Weight("w", Kind.MATRIX, (rows, columns), held, part)
            per_row = columns // 64
            blocks = np.arange(held.start, held.stop)[:, None] * per_row + np.arange(part.start // 64, part.stop // 64)
            assert cost.groups_touched(weight) == len(np.unique(blocks // 256))


def test_bytes_of_one_weight():
    whole = Weight("w", Kind.MATRIX, (512, 128), Range(0, 512), Range(0, 128))
    assert cost.weight_bytes(whole, "nf4") == 512 * 128 // 2 + 1024 + 4 * 4
    assert cost.weight_bytes(whole, "int8") == 512 * 128 + 4 * 1024
    assert cost.weight_bytes(whole, "bf16") == 2 * 512 * 128
    assert cost.weight_bytes(whole, "float32") == 4 * 512 * 128
    empty = Weight("w", Kind.MATRIX, (512, 128), Range(7, 7), Range(0, 128))
    assert all(cost.weight_bytes(empty, stored) == 0 for stored in cost.FORMATS)


def test_rows_that_cannot_be_cut_into_blocks_stay_bf16():
    weight = Weight("w", Kind.MATRIX, (64, 172), Range(0, 64), Range(0, 172))
    assert Storage("nf4").of(weight) == Storage("int8").of(weight) == "bf16"
    assert Storage("float32").of(weight) == "float32"
    convolution = Weight("c", Kind.CONV, (32, 32, 2, 1), Range(0, 32), Range(0, 64))
    assert Storage("nf4").of(convolution) == "nf4"
    vector = Weight("v", Kind.VECTOR, (64,), Range(0, 64), Range(0, 1))
    assert Storage("nf4").of(vector) == "float32"


@pytest.mark.parametrize("size", [3, 5])
def test_uneven_ranks_hold_the_whole_between_them(size):
    """64 heads over 3 or 5 ranks; a column split at whole heads of 128 cuts no block, so nothing is held twice."""
    held = [cost.memory(program, BF16, 0).weights for program in world("yuan2-102b", size)]
    assert sum(held) == cost.memory(*world("yuan2-102b", 1), BF16, 0).weights
    assert max(held) / min(held) < 1.1


def test_blocks_and_heads_held_twice_are_counted():
    """Heads of 24 end inside blocks of 64, and 3 ranks share 2 key/value heads."""
    model = read_config({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 24, "vocab_size": 16,
    })  # fmt: skip
    programs = [model.program(Share(rank, 3)) for rank in range(3)]
    held = {
        name: sum(w.size for p in programs for w in p.weights if w.name.endswith(f"{name}.weight"))
        for name in ("q_proj", "k_proj", "o_proj", "down_proj")
    }
    assert held == {"q_proj": 64 * 144, "k_proj": 64 * 24 * 4, "o_proj": 64 * (64 + 128 + 80), "down_proj": 64 * 64}


def test_a_message_is_the_same_for_every_rank():
    for program in world("llama-1b", 3):
        spent = [
            one for one, operation in zip(cost.costs(program, Storage()), program.operations, strict=True)
            if isinstance(operation, AllReduce)
        ]  # fmt: skip
        assert len(spent) == 32
        assert {one.message_bytes for one in spent} == {8192}


def layer_waits(program, number=3):
    """Names of a layer's operations before or in which threads wait, each as often as they do."""
    waits = zip(program.operations, program.layer_of, cost.barriers(program, Storage()), strict=True)
    return [type(op).__name__ for op, layer, count in waits if layer == number for _ in range(count)]


def test_barriers_follow_the_data():
    """A Llama layer: threads make norms, gates and roundings for themselves and wait only for each other's rows."""
    (program,) = world("llama-1b", 1)
    names = [type(op).__name__ for op, number in zip(program.operations, program.layer_of, strict=True) if number == 3]
    assert names == (
        "RmsNorm Linear RopeAndStore Attention Linear AllReduce Add RmsNorm Linear Glu Linear AllReduce Add".split()
    )
    # Rotation and attention are one stage, with a wait inside; the last sum joins the next layer's norm.
    assert layer_waits(program) == "RopeAndStore RopeAndStore Linear Add Glu Add".split()
    assert cost.barriers_per_layer(program, Storage()) == 6


def test_barriers_beside_an_exchange():
    """Of several ranks, slices are added without a wait, and threads meet before they read the whole sum."""
    program = world("llama-1b", 2)[0]
    assert layer_waits(program) == "RmsNorm RopeAndStore RopeAndStore Linear RmsNorm Glu".split()


def test_the_reference_job_waits_eight_times_a_layer():
    for program in world("yuan2-102b", 4):
        assert cost.barriers_per_layer(program, Storage()) <= 8


def test_balance_over_threads():
    (program,) = world("llama-1b", 1)
    assert cost.balance(program, 1, Storage()) == 1
    assert cost.balance(program, 2, Storage()) == 1
    assert 0.9 < cost.balance(program, 24, Storage()) < 1
    # 64 rows of 16 panels in each: 4 threads of 5 work.
    narrow = read_config({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 64,
    }).program(Share())  # fmt: skip
    by_hand = [(64 * 3, 12), (64, 4), (64 * 2, 8), (64, 4), (64, 4)]
    mean, largest = (sum(f) for f in zip(*((r / 5, 16 * math.ceil(p / 5)) for r, p in by_hand), strict=True))
    assert cost.balance(narrow, 5, BF16) == pytest.approx(mean / largest)


def test_balance_divides_inputs_too():
    # The reference job: 64 panels of the first convolution would keep 56 threads busy by 0.57.
    assert cost.balance(world("yuan2-102b", 4)[0], 56, Storage()) >= 0.98


def test_the_largest_job_is_counted_quickly():
    start = time.perf_counter()
    program = world("yuan2-102b", 8)[3]
    cost.costs(program, Storage())
    cost.balance(program, 64, Storage())
    assert time.perf_counter() - start < 5
