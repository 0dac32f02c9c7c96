"""A measurement's results as lines for people."""

from typing import Any

from tpcpu.bench.ceilings import STEADY, Reading, spread


def _parts(shares_of_time: dict[str, float]) -> str:
    return ", ".join(f"{kind} {100 * share:.1f} %" for kind, share in shares_of_time.items())


def report_lines(
    result: dict[str, Any], reading: Reading, found: dict[str, list[float]], fractions: list[float]
) -> list[str]:
    several = f"{result['batch']} requests at a time, " if result["batch"] > 1 else ""
    lines = [
        f"{result['model']}: {result['ranks']} x {result['threads_per_rank']} threads, {result['isa']}, "
        f"{result['arithmetic']} arithmetic; {several}{result['new_tokens']} tokens after {result['prompt_tokens']}, "
        f"medians of {len(fractions)} (least to most)",
        f"decode    {spread(found['decode_tokens_per_s'])} tokens/s, {result['decode_ms_per_token']:.3f} ms/token, "
        f"{result['weight_bytes_per_token']:,} bytes/token, {result['bandwidth_fraction']:.3f} of read bandwidth",
        f"          beside the reading just before and after: {spread(fractions, 3)} of it",
        f"          {_parts(result['time_share'])}",
        f"prefill   {spread(found['prefill_tokens_per_s'])} tokens/s, {result['prefill_gops']:.1f} GOPS, "
        f"{result['arithmetic_fraction']:.3f} of the peak",
        f"          {_parts(result['prefill_time_share'])}",
        f"          attention {result['prefill_attention_gflops']:.1f} GFLOPS, "
        f"{result['prefill_attention_fraction']:.3f} of the peak; "
        f"{result['prefill_outside_attention_tokens_per_s']:.1f} tokens/s outside it",
    ]
    if "cached_ttft_ms" in found:
        lines.append(
            f"cached    {spread(found['cached_ttft_ms'])} ms to the first token, "
            f"{result['cached_ttft_ratio']:.3f} of the {result['ttft_ms']:.1f} without"
        )
    if "speculate_ratio" in found:
        lines.append(
            f"drafts    {spread(found['speculate_tokens_per_s'])} tokens/s, {result['speculate_ratio']:.2f} x the "
            f"{result['plain_tokens_per_s']:.2f} without; {result['accepted_tokens']:.0f} of "
            f"{result['drafted_tokens']:.0f} right, {result['speculate_steps']:.0f} steps"
        )
    lines += [
        f"peaks     {result['int8_peak_gops']:.0f} GOPS int8, {result['fma_peak_gflops']:.0f} GFLOPS float32",
        f"loading   {result['load_s']:.2f} s, {result['load_gbs']:.2f} GB/s; compiling {result['compile_s']:.2f} s; "
        f"at most {result['peak_rss_gb']:.2f} GB resident",
        f"reading   {result['read_bandwidth_gbs']:.2f} GB/s at best",
    ]
    if reading.steadiness < STEADY:
        lines.append(
            f"warning: read bandwidth fell to {reading.steadiness:.2f} of its best while this was measured: "
            f"neighbours, or another place on the host; measure again, or look at the runs beside their own readings"
        )
    lines += [f"  {max(values):6.2f} at best, {spread(values)}: {name}" for name, values in reading.gbs.items()]
    return lines
