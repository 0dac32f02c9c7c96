"""Whatever a config.json holds, it is a model whose programs can be built, or one ConfigError."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.configs import PUBLISHED
from tpcpu.errors import ConfigError, LaunchError
from tpcpu.models import read_config
from tpcpu.parallel.partition import Share

KEYS = sorted(
    {key for config in PUBLISHED.values() for key in config}
    | set("head_dim rope_scaling rope_parameters sliding_window use_moe use_shareqk partial_rotary_factor".split())
)
keys = st.sampled_from(KEYS) | st.text(max_size=8)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([0, 1, 2, 3, 16, 64, 2**24, 2**31 - 1, 2**31, 10**400, "silu", "llama", "yuan", 1e-5, 1e308]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def outcome(action):
    """What an action gives, or the one line with which it is refused."""
    try:
        return action()
    except (ConfigError, LaunchError) as error:
        return str(error)


def read_or_refuse(config, size):
    model = outcome(lambda: read_config(config))
    if isinstance(model, str):
        assert "\n" not in model
        assert len(model) < 1000
    # Sizes as large as a config may ask for are read, too; building programs is for those of a test's size.
    elif model.config.num_hidden_layers < 100:
        for rank in range(size):
            program = outcome(lambda rank=rank: model.program(Share(rank, size)))
            if isinstance(program, str):
                assert program.endswith("ranks work")
            else:
                assert len(program.operations) == len(program.layer_of)
                assert len({weight.key for weight in program.weights}) == len(program.weights)


@given(st.dictionaries(keys, json_values, max_size=12) | json_values)
@settings(max_examples=200, deadline=None)
def test_random_objects(config):
    read_or_refuse(config, 1)


@given(
    st.sampled_from(sorted(PUBLISHED)),
    st.dictionaries(keys, json_values, max_size=3),
    st.sets(st.sampled_from(KEYS), max_size=1),
)
@settings(max_examples=200, deadline=None)
def test_mutations_of_published_configs(name, changed, dropped):
    config = json.loads(json.dumps(PUBLISHED[name])) | {"num_hidden_layers": 1} | changed
    read_or_refuse({key: value for key, value in config.items() if key not in dropped}, 2)


@given(
    hidden=st.integers(1, 300).map(lambda n: 2 * n),
    heads=st.integers(1, 12),
    group=st.integers(1, 4),
    dim=st.integers(1, 50).map(lambda n: 2 * n),
    ffn=st.integers(1, 700),
    vocab=st.integers(1, 300),
    size=st.integers(1, 8),
    bias=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_every_size_divides_over_any_ranks(hidden, heads, group, dim, ffn, vocab, size, bias):
    """What a rank multiplies is divided without a gap, and every row of a divided weight is held."""
    config = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": 1,
        "num_attention_heads": heads * group, "num_key_value_heads": heads, "head_dim": dim, "vocab_size": vocab,
        "attention_bias": bias, "mlp_bias": bias,
    }  # fmt: skip
    model = read_config(config)
    size = min(size, model.max_ranks)
    programs = [model.program(Share(rank, size)) for rank in range(size)]
    for weights in zip(*(program.weights for program in programs), strict=True):
        assert len({weight.name for weight in weights}) == 1
        rows = {row for weight in weights for row in range(weight.rows.start, weight.rows.stop)}
        columns = {column for weight in weights for column in range(weight.columns.start, weight.columns.stop)}
        assert rows == set(range(weights[0].full_rows)), weights[0].name
        assert columns == set(range(weights[0].full_columns)), weights[0].name


def test_the_largest_config_is_built_in_bounded_time():
    largest = PUBLISHED["llama-1b"] | {
        "hidden_size": 2**24, "intermediate_size": 2**24, "num_hidden_layers": 2**12, "num_attention_heads": 2**16,
        "num_key_value_heads": 2**16, "head_dim": 2**8, "vocab_size": 2**31 - 1,
    }  # fmt: skip
    program = read_config(largest).program(Share(1, 3))
    assert program.layer_of.count(2**12 - 1) == program.layer_of.count(0)
