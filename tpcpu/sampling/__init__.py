"""Sampling: what a request asks for, the filters, and the choice of one token. Knows logits and ids, nothing else."""

from tpcpu.sampling.params import SamplingParams
from tpcpu.sampling.sampler import Sampled, Sampler

__all__ = ["Sampled", "Sampler", "SamplingParams"]
