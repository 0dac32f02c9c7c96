"""A model shape as a GGUF file of random weights, in the formats that llama.cpp is fastest with.

Knows GGUF's names and the layout of its blocks; only `write` needs the package `gguf`. Knows nothing of tpcpu: it also
runs under another interpreter, the one that has llama.cpp.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Tensor(NamedTuple):
    """One tensor of a GGUF file: `rows` of `columns` weights in blocks of `type`."""

    name: str
    rows: int
    columns: int
    type: str

    @property
    def blocks(self) -> int:
        return self.rows * self.columns // BLOCKS[self.type].weights

    @property
    def nbytes(self) -> int:
        return self.blocks * BLOCKS[self.type].layout.itemsize


class Block(NamedTuple):
    """How a block of weights is stored: its fields in order, and the scales that make its weights about 1 wide."""

    weights: int
    layout: np.dtype[Any]
    scales: dict[str, float]


BLOCKS = {
    "F32": Block(1, np.dtype([("value", "<f4")]), {}),
    # d × (q − 8), q from 0 to 15
    "Q4_0": Block(32, np.dtype([("d", "<f2"), ("q", "u1", 16)]), {"d": 1 / 4.6}),
    # d × codebook[q], from −127 to 113
    "IQ4_NL": Block(32, np.dtype([("d", "<f2"), ("q", "u1", 16)]), {"d": 1 / 70}),
    # d × scale × q − dmin × least, 6 bits each for scale and least, q from 0 to 15
    "Q4_K": Block(
        256,
        np.dtype([("d", "<f2"), ("dmin", "<f2"), ("s", "u1", 12), ("q", "u1", 128)]),
        {"d": 1 / 260, "dmin": 7 / 260},
    ),
    # d × scale × (q − 32), scale a signed byte, here from −16 to 15, q from 0 to 63
    "Q6_K": Block(256, np.dtype([("q", "u1", 128), ("h", "u1", 64), ("s", "i1", 16), ("d", "<f2")]), {"d": 1 / 171}),
}

FORMATS = ("Q4_0", "IQ4_NL", "Q4_K_M")
"""The four-bit formats that llama.cpp repacks for AVX2 and AVX-512."""


def more_bits(layer: int, layers: int) -> bool:
    """Which layers get Q6_K for two of their weights under Q4_K_M: the first, the last, and every third between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def tensors(shape: Mapping[str, Any], format_name: str) -> list[Tensor]:
    """What the file of a Llama shape (LlamaConfig's fields) holds, with the types that `llama-quantize` gives.

    The head is Q6_K, as in every published file of these formats. IQ4_NL keeps the value projection at four bits, which
    `llama-quantize` would not: in the peer's favour. Raises ValueError for widths that a format cannot divide.
    """
    hidden, ffn, vocab = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    queries, keys = (shape["head_dim"] * shape[which] for which in ("num_attention_heads", "num_key_value_heads"))
    layers = shape["num_hidden_layers"]
    most = "Q4_K" if format_name == "Q4_K_M" else format_name
    tied = shape["tie_word_embeddings"]

    found = [Tensor("token_embd.weight", vocab, hidden, "Q6_K" if tied else most)]
    for i in range(layers):
        better = "Q6_K" if format_name == "Q4_K_M" and more_bits(i, layers) else most
        found += [
            Tensor(f"blk.{i}.attn_norm.weight", 1, hidden, "F32"),
            Tensor(f"blk.{i}.attn_q.weight", queries, hidden, most),
            Tensor(f"blk.{i}.attn_k.weight", keys, hidden, most),
            Tensor(f"blk.{i}.attn_v.weight", keys, hidden, better),
            Tensor(f"blk.{i}.attn_output.weight", hidden, queries, most),
            Tensor(f"blk.{i}.ffn_norm.weight", 1, hidden, "F32"),
            Tensor(f"blk.{i}.ffn_gate.weight", ffn, hidden, most),
            Tensor(f"blk.{i}.ffn_up.weight", ffn, hidden, most),
            Tensor(f"blk.{i}.ffn_down.weight", hidden, ffn, better),
        ]
    found.append(Tensor("output_norm.weight", 1, hidden, "F32"))
    if not tied:
        found.append(Tensor("output.weight", vocab, hidden, "Q6_K"))
    for tensor in found:
        if tensor.columns % BLOCKS[tensor.type].weights:
            raise ValueError(
                f"{format_name}: {tensor.name} has rows of {tensor.columns} weights, expected a multiple of "
                f"{BLOCKS[tensor.type].weights} for {tensor.type}"
            )
    return found


def bytes_per_token(shape: Mapping[str, Any], format_name: str) -> int:
    """Bytes of the weights that one token multiplies; of an embedding of its own, none."""
    return sum(
        tensor.nbytes
        for tensor in tensors(shape, format_name)
        if tensor.name != "token_embd.weight" or shape["tie_word_embeddings"]
    )


def random_blocks(tensor: Tensor, random: np.random.Generator, width: float = 0.02) -> np.ndarray[Any, Any]:
    """Valid blocks of random weights around 0, about `width` wide; a norm's weights are 1. `(blocks,)` of records."""
    block = BLOCKS[tensor.type]
    if tensor.type == "F32":
        return np.ones(tensor.blocks, block.layout)
    made = np.frombuffer(random.bytes(tensor.nbytes), block.layout).copy()
    if tensor.type == "Q6_K":
        made["s"] >>= 3  # with whole bytes, `d` would be too small for a half
    for field, value in block.scales.items():
        made[field] = value * width
    return made


def write(path: str, shape: Mapping[str, Any], format_name: str) -> None:
    """The file, whose vocabulary is numbers only: no text passes through it. Holds one tensor in memory at a time."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(shape["max_position_embeddings"])
    writer.add_embedding_length(shape["hidden_size"])
    writer.add_block_count(shape["num_hidden_layers"])
    writer.add_feed_forward_length(shape["intermediate_size"])
    writer.add_head_count(shape["num_attention_heads"])
    writer.add_head_count_kv(shape["num_key_value_heads"])
    writer.add_key_length(shape["head_dim"])
    writer.add_value_length(shape["head_dim"])
    writer.add_rope_dimension_count(shape["head_dim"])
    writer.add_rope_freq_base(shape["rope_theta"])
    writer.add_layer_norm_rms_eps(shape["rms_norm_eps"])
    writer.add_vocab_size(shape["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    held = tensors(shape, format_name)
    for tensor in held:
        row = (tensor.columns,) if tensor.type == "F32" else (tensor.rows, tensor.nbytes // tensor.rows)
        kind = np.dtype(np.float32 if tensor.type == "F32" else np.uint8)
        writer.add_tensor_info(tensor.name, row, kind, tensor.nbytes, gguf.GGMLQuantizationType[tensor.type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    random = np.random.default_rng(0)
    for tensor in held:
        writer.write_tensor_data(random_blocks(tensor, random).view(np.uint8))
    writer.close()
