"""Who writes the answers: the protocol, the plain reference sampler, and the fast embedded engine."""

from bridle.language.sampler.protocol import Sampled, Sampler, SamplingSettings, Stop
from bridle.language.sampler.reference import ReferenceSampler

__all__ = ["ReferenceSampler", "Sampled", "Sampler", "SamplingSettings", "Stop"]
