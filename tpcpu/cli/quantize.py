"""`tpcpu quantize SRC DST`: write a checkpoint in fewer bits, showing how far it is.

Knows flags and the terminal. The work is `tpcpu.quantize`.
"""

import argparse
from dataclasses import asdict
from typing import Any

from tpcpu.cli.output import Output
from tpcpu.cli.progress import ByteProgress

FORMATS = ("nf4", "int8", "bf16", "float32")


def add_parser(subparsers: Any) -> None:
    """Add this command to the main program's parser."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "quantize",
        help="write a checkpoint in 4 or 8 bits",
        description="Write the checkpoint SRC to the new folder DST.",
    )
    parser.add_argument(
        "src", metavar="SRC", help="a Hugging Face folder, a hub name in the local cache, or a GGUF file"
    )
    parser.add_argument("dst", metavar="DST", help="a folder that does not exist; complete or absent afterwards")
    parser.add_argument("--format", choices=FORMATS, default="nf4", help="default: %(default)s")
    parser.add_argument("--jobs", type=int, metavar="N", help="threads; default: one per core")
    parser.add_argument("--json", action="store_true", help="print what was done as one JSON line")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from tpcpu.quantize import quantize

    output = Output(args.json)
    progress = ByteProgress("quantising", output)
    try:
        report = quantize(args.src, args.dst, args.format, progress=progress.show, jobs=args.jobs)
    except KeyboardInterrupt:
        progress.close()
        output.note(f"interrupted; the same command goes on after the files finished in {args.dst}.partial")
        return 130
    finally:
        progress.close()
    speed = report.source_bytes / max(report.seconds, 1e-9) / 1e9
    again = f", {report.resumed_files} of them finished before" if report.resumed_files else ""
    output.note(
        f"{args.dst}: {report.source_bytes / 1e9:.2f} GB became {report.written_bytes / 1e9:.2f} GB ({args.format}) in "
        f"{report.seconds:.1f} s{'' if again else f', {speed:.2f} GB/s'}; files: {report.files}{again}"
    )
    for name, reason in report.kept.items():
        output.note(f"not quantised: {name}: {reason}")
    for name in report.dropped:
        output.note(f"left out, not needed: {name}")
    output.result({"path": args.dst, "format": args.format} | asdict(report))
    return 0
