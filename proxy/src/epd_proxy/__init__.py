"""Load-balancing proxy for vLLM served in separate encode, prefill and decode stages."""

__version__ = "0.1.0"
