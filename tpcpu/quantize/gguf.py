"""A GGUF file as the checkpoint that it was made of: Hugging Face's names, its config, its order of rows.

Knows GGUF's metadata and names for the architectures of `_FAMILIES`; what else a file holds is refused by name. The
tokenizer is in `gguf_tokenizer`, the bytes of tensors in `formats.ggml`.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from tpcpu.checkpoint import Checkpoint, Stack, StoredTensor
from tpcpu.checkpoint.gguf_file import GgufFile
from tpcpu.errors import CheckpointError
from tpcpu.formats import ggml

_ABSENT = object()

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_STACKS = tuple(Stack(f"ffn_{name}_exps", (f"{name}_proj.weight",), 3) for name in ("gate", "up", "down"))
"""Tensors that hold a matrix of every expert; they keep their names until they are taken apart."""
_GEMMA_NAMES = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
"""Where Gemma's differ: norms before and after."""
_FREQUENCIES = "rope_freqs.weight"


@dataclass(frozen=True)
class _Family:
    """`interleaved`: rows of q and k are stored in pairs, as rotary embeddings of neighbours want them.

    `experts`: every layer is a mixture, whose weights are normalised. `gemma`: some layers have windows, and norms are
    stored with the 1 that is added to their weights.
    """

    model_type: str
    architecture: str
    interleaved: bool = False
    experts: bool = False
    gemma: bool = False

    def name_of(self, stored: str) -> str | None:
        """Hugging Face's name of a module."""
        return (_GEMMA_NAMES.get(stored) if self.gemma else None) or _NAMES.get(stored)


_FAMILIES = {
    "llama": _Family("llama", "LlamaForCausalLM", interleaved=True),
    "qwen2": _Family("qwen2", "Qwen2ForCausalLM"),
    "qwen3": _Family("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": _Family("qwen3_moe", "Qwen3MoeForCausalLM", experts=True),
    "gemma2": _Family("gemma2", "Gemma2ForCausalLM", gemma=True),
    "gemma3": _Family("gemma3_text", "Gemma3ForCausalLM", gemma=True),
}
"""By GGUF's names of architectures."""


class GgufCheckpoint(Checkpoint):
    """A GGUF file, or the files that it was split into; `array` gives rows of bytes, in the file's order."""

    metadata: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Raises CheckpointError for a file that is damaged, not mapped here, or one of several that are not there."""
        sizes = {number: (kind.name, kind.weights, kind.nbytes) for number, kind in ggml.TYPES.items()}
        opened = [GgufFile(file, sizes) for file in _all_files(Path(path).expanduser())]
        metadata = opened[0].metadata
        where = f"{path}: general.architecture"
        name = metadata.get("general.architecture")
        if not isinstance(name, str) or name not in _FAMILIES:
            raise CheckpointError(f"{where} is {name!r:.80}; read are {', '.join(_FAMILIES)}")
        if metadata.get("general.type", "model") != "model":
            raise CheckpointError(f"{path}: general.type is {metadata['general.type']!r:.80}, expected a model")
        for file in opened:
            file.rename({tensor.name: _renamed(tensor, _FAMILIES[name]) for tensor in file.tensors})
        self = cls()
        self._take(opened, {})
        self.take_apart(_STACKS)
        self.path, self.metadata, self._family = opened[0].path, metadata, _FAMILIES[name]
        self.config, self.generation_config = _config(self, name), {}
        self.tensors = {key: tensor for key, tensor in self.tensors.items() if key != _FREQUENCIES}
        return self

    _family: _Family

    def added(self, name: str) -> float:
        """What the file's values of a tensor have more than the model's."""
        return 1.0 if self._family.gemma and name.endswith("norm.weight") else 0.0

    def order(self, name: str) -> npt.NDArray[np.int64] | None:
        """Which row of the file each row of the tensor is; None where they are as they stand."""
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if not self._family.interleaved or heads is None:
            return None
        count, rows = self.config[heads], self[name].shape[0]
        if rows % (2 * count):
            raise CheckpointError(f"{self[name].file}: tensor {name} has {rows} rows, which {count} heads cannot share")
        return np.arange(rows).reshape(count, rows // count // 2, 2).swapaxes(1, 2).reshape(-1)


def _all_files(path: Path) -> list[Path]:
    """The file, or all of those that it is one of."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    split = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if split is None:
        return [path]
    count = int(split[3])
    files = [path.with_name(f"{split[1]}-{number:05}-of-{split[3]}.gguf") for number in range(1, count + 1)]
    if absent := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(f"{path}: is one of {count} files; not there: {', '.join(absent[:3])}")
    return files


def _renamed(tensor: StoredTensor, family: _Family) -> str:
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", tensor.name)
    if found is not None and found[1] is not None and any(found[2] == stack.stored for stack in _STACKS):
        return f"model.layers.{found[1]}.mlp.experts.{found[2]}"
    name = None if found is None else family.name_of(found[2])
    if tensor.name == _FREQUENCIES:
        return _FREQUENCIES
    if found is None or name is None:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.name!r:.80} is not known; leaving it out would change the model's answers"
        )
    return f"model.layers.{found[1]}.{name}.{found[3]}" if found[1] is not None else f"{name}.{found[3]}"


def _config(checkpoint: GgufCheckpoint, name: str) -> dict[str, Any]:
    """config.json. Raises CheckpointError for what is missing or has no counterpart there."""
    metadata, path = checkpoint.metadata, checkpoint.path

    def get(key: str, kind: type, default: Any = _ABSENT) -> Any:
        value = metadata.get(f"{name}.{key}", default)
        if value is _ABSENT:
            raise CheckpointError(f"{path}: its metadata lack {name}.{key}")
        if value is not default and type(value) is not kind:
            raise CheckpointError(f"{path}: {name}.{key} is {value!r:.80}, expected {kind.__name__}")
        return value

    def refuse(key: str, *harmless: Any) -> None:
        value = get(key, type(harmless[0]), harmless[0])
        if value not in harmless:
            raise CheckpointError(f"{path}: {name}.{key} is {value!r:.80}, which is not read from GGUF files")

    if not checkpoint._family.experts:
        refuse("expert_count", 0)
    refuse("expert_weights_scale", 1.0, 0.0)
    refuse("rope.scaling.attn_factor", 1.0)
    refuse("attention.causal", True)
    refuse("logit_scale", 1.0, 0.0)
    hidden, heads = get("embedding_length", int), get("attention.head_count", int)
    kv_heads = get("attention.head_count_kv", int, heads)
    if min(heads, kv_heads, hidden) < 1:
        raise CheckpointError(f"{path}: {heads} heads, {kv_heads} of keys, {hidden} features; all must be positive")
    head_dim = get("attention.key_length", int, hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (size := get(key, int, head_dim)) != head_dim:
            raise CheckpointError(f"{path}: {name}.{key} is {size}, but heads have {head_dim} features")
    window = get("attention.sliding_window", int, 0)
    family, context = checkpoint._family, get("context_length", int)
    if 0 < window < context and not family.gemma:
        if name != "llama":
            refuse("attention.sliding_window", 0)
        family = _Family("mistral", "MistralForCausalLM")
    embedding = checkpoint["model.embed_tokens.weight"]
    config = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length", int),
        "num_hidden_layers": get("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon", float),
        "rope_theta": get("rope.freq_base", float, 10000.0),
        "max_position_embeddings": context,
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "lm_head.weight" not in checkpoint.tensors,
        "torch_dtype": "bfloat16",
    }
    if family.experts:
        config |= {
            "num_experts": get("expert_count", int),
            "num_experts_per_tok": get("expert_used_count", int),
            "moe_intermediate_size": get("expert_feed_forward_length", int),
            "norm_topk_prob": True,
        }
    if family.model_type == "mistral":
        config["sliding_window"] = window
    if family.model_type == "llama":
        config["attention_bias"] = "model.layers.0.self_attn.q_proj.bias" in checkpoint.tensors
    if family.gemma:
        del config["hidden_act"]
        # Queries of the largest ones, which files do not tell apart otherwise, are scaled by other than their heads.
        largest = config["num_hidden_layers"] == {"gemma2": 46, "gemma3": 62}[name]
        config |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": get("attention.sliding_window", int),
            "query_pre_attn_scalar": hidden // heads if largest else head_dim,
        }
        refuse("attention.sliding_window_pattern", {"gemma2": 2, "gemma3": 6}[name])
    if name == "gemma2":
        config["attn_logit_softcapping"] = get("attn_logit_softcapping", float, 50.0)
        config["final_logit_softcapping"] = get("final_logit_softcapping", float, 30.0)
    if name == "gemma3":
        refuse("attn_logit_softcapping", 0.0)
        refuse("final_logit_softcapping", 0.0)
        config["rope_local_base_freq"] = get("rope.freq_base_swa", float, 10000.0)
        config["rope_theta"] = get("rope.freq_base", float, 1e6)
    if (scaling := _rope_scaling(checkpoint, name, get, config)) is not None:
        config["rope_scaling"] = scaling
    for key in ("bos", "eos"):
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if type(number) is int:
            config[f"{key}_token_id"] = number
    return config


def _rope_scaling(checkpoint: GgufCheckpoint, name: str, get: Any, config: dict[str, Any]) -> dict[str, Any] | None:
    kind = get("rope.scaling.type", str, "none")
    if _FREQUENCIES in checkpoint.tensors:
        return _llama3_scaling(checkpoint, config)
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": get("rope.scaling.factor", float)}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = get("rope.scaling.original_context_length", int)
    elif kind != "linear":
        raise CheckpointError(f"{checkpoint.path}: {name}.rope.scaling.type is {kind!r:.80}; read are linear and yarn")
    return scaling


def _llama3_scaling(checkpoint: GgufCheckpoint, config: dict[str, Any]) -> dict[str, Any]:
    """Llama 3.1's scaling, whose factors stand in a tensor instead of the metadata: found again, and compared."""
    tensor = checkpoint[_FREQUENCIES]
    if tensor.dtype != "F32" or tensor.shape != (config["head_dim"] // 2,):
        raise CheckpointError(
            f"{tensor.file}: tensor {_FREQUENCIES} is {tensor.dtype} of {list(tensor.shape)}, expected F32 of"
            f" {config['head_dim'] // 2}"
        )
    stored = ggml.dequantize("F32", checkpoint.array(_FREQUENCIES)).reshape(-1)
    factor = float(stored[-1])
    scaling = {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    turns = 8192 / (2 * math.pi) / config["rope_theta"] ** (2 * np.arange(stored.size) / (2 * stored.size))
    with np.errstate(all="ignore"):
        smooth = np.clip((turns - 1) / 3, 0, 1)
        expected = 1 / ((1 - smooth) / factor + smooth)
        same = np.allclose(stored, expected, rtol=1e-4)
    if not same:
        raise CheckpointError(f"{tensor.file}: tensor {_FREQUENCIES} holds other factors than those of Llama 3.1")
    return scaling
