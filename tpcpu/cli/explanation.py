"""The program of a rank in words, and what a token costs: the work of `tpcpu explain`."""

import argparse
import dataclasses
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

from tpcpu.checkpoint import Checkpoint
from tpcpu.checkpoint.folder import read_json
from tpcpu.cli.alike import spans
from tpcpu.cli.listing import listing, size
from tpcpu.cli.output import Output
from tpcpu.errors import UsageError
from tpcpu.formats import mxfp4
from tpcpu.models import Model, read_config
from tpcpu.parallel.partition import Share
from tpcpu.program import cost
from tpcpu.program.operations import Program, inputs, outputs, weights

DEFAULT_CONTEXT = 8192


def explain(args: argparse.Namespace) -> int:
    """Prints; always 0. Raises ConfigError, CheckpointError, UsageError, LaunchError."""
    config = _config(args)
    model = read_config(config)
    if not 0 <= args.rank < args.ranks:
        raise UsageError(f"--rank {args.rank}: found no such rank among {args.ranks}; 0 to {args.ranks - 1} work")
    storage = _storage(args, config)
    limit = model.config.max_position_embeddings
    context = args.context or min(limit, DEFAULT_CONTEXT)
    if context > limit:
        raise UsageError(f"--context {context}: the model's positions end at {limit}; 1 to {limit} work")
    with _nothing_collected():
        programs = [model.program(Share(rank, args.ranks)) for rank in range(args.ranks)]
        out = Output(args.json)
        for line in _text(model, programs, args, storage, context):
            out.line(line)
        if args.json:
            out.result(_json(model, programs, args, storage, context))
    return 0


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Programs are some hundred thousand records for every rank, all of them needed: to look for garbage among them
    again and again takes longer than everything else."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _config(args: argparse.Namespace) -> dict[str, Any]:
    if args.config is not None:
        path = Path(args.config).expanduser()
        return read_json(path / "config.json" if path.is_dir() else path)
    with Checkpoint.open(args.model) as checkpoint:
        return checkpoint.config


def _storage(args: argparse.Namespace, config: dict[str, Any]) -> cost.Storage:
    """The formats in memory: as asked for, or as the config says that they are stored."""
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    floats = "float32" if config.get("dtype", config.get("torch_dtype")) == "float32" else "bf16"
    stored = {"bitsandbytes": "nf4", "tpcpu_int8": "int8"}.get(str(method), "nf4" if args.config else floats)
    matrices = args.format or stored
    head = args.lm_head or ("int8" if matrices in ("nf4", "int8") else matrices)
    experts = mxfp4.METHOD if mxfp4.is_announced(config) else ""
    return cost.Storage(matrices=matrices, head=head, embedding=floats, experts=experts)


def _text(
    model: Model, programs: Sequence[Program], args: argparse.Namespace, storage: cost.Storage, context: int
) -> list[str]:
    shown = programs[args.rank]
    spent = cost.total(cost.costs(shown, storage))
    bits = cost.bits_per_nf4_weight(programs, storage)
    read = cost.weight_bytes_per_token(programs, storage)
    needed = cost.parameters_of_token(shown)
    some = f", {_count(needed)} for a token" if needed < cost.parameters(shown) else ""
    experts = f", experts {storage.experts}" if storage.experts else ""
    lines = [
        f"{model.model_type}, {model.config.num_hidden_layers} layers, {_count(cost.parameters(shown))} parameters"
        f"{some}: the program of rank {args.rank} of {args.ranks}",
        f"in memory: weights {storage.matrices}{experts}, head {storage.head}, embedding {storage.embedding}, "
        f"cache {storage.cache}, norms and biases float32",
        "",
        *listing(shown, storage, every_layer=args.layers == "all"),
        "",
        f"One token on rank {args.rank}",
        f"  weights read   {size(spent.weight_bytes)}, and {size(spent.other_bytes)} of norms, biases and embedding",
        f"  cache          {size(spent.cache_bytes)} written; {size(spent.cache_bytes_per_position)} read for every "
        f"position, {size(spent.cache_bytes_per_position * context)} at the end of a context of {context}",
        f"  arithmetic     {_count(spent.operations)} operations, {_count(spent.operations_per_position)} more "
        "for every position",
        f"  messages       {spent.messages} all-reduces, {size(spent.message_bytes)}"
        + ("" if args.ranks > 1 else "; one rank sends nothing"),
        f"  waits          {spent.barriers} of the rank's threads for one another, "
        f"{cost.barriers_per_layer(shown, storage)} a layer",
    ]
    if args.threads:
        even = cost.balance(shown, args.threads, storage)
        lines.append(
            f"  threads        {args.threads} share blocks of {cost.PANEL_ROWS} rows by 1024 features: "
            f"mean / largest share {even:.3f}"
        )
    lines += [
        "",
        f"All ranks: {size(read)} of weights read for a token"
        + (f"; {bits:.3f} bits for an NF4 weight" if bits else ""),
        *_shares(programs, storage, context),
        f"The embedding, {size(cost.embedding_bytes(shown, storage))}, is held once per host.",
    ]
    return lines


def _shares(programs: Sequence[Program], storage: cost.Storage, context: int) -> list[str]:
    """A line for each rank; equal ones that follow one another stand once."""
    rows = []
    memories = [cost.memory(program, storage, context) for program in programs]
    whole = sum(held.weights for held in memories)
    for program, held in zip(programs, memories, strict=True):
        share = f"{100 * held.weights / whole:.2f} %" if whole else "-"
        heads = {kv.heads for kv in program.kv}
        rows.append(
            (size(held.weights), share, size(held.vectors), size(held.cache + held.states), size(held.total),
             "/".join(map(str, sorted(heads))))
        )  # fmt: skip
    header = ("rank", "weights", "share", "norms, biases", f"cache of {context}", "in memory", "kv heads")
    table = [header]
    for row, alike in groupby(range(len(rows)), key=lambda rank: rows[rank]):
        table.append((spans(list(alike)), *row))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]


def _count(number: int) -> str:
    for value, word in ((1e9, "billion"), (1e6, "million")):
        if number >= value:
            return f"{number / value:.2f} {word}"
    return f"{number:,}"


def _json(
    model: Model, programs: Sequence[Program], args: argparse.Namespace, storage: cost.Storage, context: int
) -> dict[str, Any]:
    shown = programs[args.rank]
    spent = cost.costs(shown, storage)
    return {
        "model_type": model.model_type,
        "parameters": cost.parameters(shown),
        "parameters_per_token": cost.parameters_of_token(shown),
        "ranks": args.ranks,
        "rank": args.rank,
        "context": context,
        "formats": dataclasses.asdict(storage),
        "operations": [
            {
                "operation": type(operation).__name__,
                "layer": layer,
                "inputs": [_buffer(buffer) for buffer in inputs(operation)],
                "outputs": [_buffer(buffer) for buffer in outputs(operation)],
                "weights": [
                    {
                        "name": weight.name,
                        "kind": weight.kind.value,
                        "full_shape": list(weight.full_shape),
                        "rows": [weight.rows.start, weight.rows.stop],
                        "columns": [weight.columns.start, weight.columns.stop],
                        "format": storage.of(weight),
                        "bytes": cost.weight_bytes(weight, storage.of(weight)),
                    }
                    for weight in weights(operation)
                ],
                "cost": dataclasses.asdict(one),
            }
            for operation, layer, one in zip(shown.operations, shown.layer_of, spent, strict=True)
        ],
        "total": dataclasses.asdict(cost.total(spent)),
        "weight_bytes_per_token": cost.weight_bytes_per_token(programs, storage),
        "memory_per_rank": [
            dataclasses.asdict(held) | {"total": held.total}
            for held in (cost.memory(program, storage, context) for program in programs)
        ],
        "embedding_bytes_per_host": cost.embedding_bytes(shown, storage),
        "bits_per_nf4_weight": cost.bits_per_nf4_weight(programs, storage),
        "barriers_per_layer": cost.barriers_per_layer(shown, storage),
        "threads": args.threads,
        "balance": cost.balance(shown, args.threads, storage) if args.threads else None,
    }


def _buffer(buffer: Any) -> dict[str, Any]:
    return {"name": buffer.name, "width": buffer.width, "own": [buffer.own.start, buffer.own.stop]}
