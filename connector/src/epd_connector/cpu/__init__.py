"""What lets vllm-ascend's layerwise KV connector run on host memory, for the CPU profile only.

Name ``epd_connector.cpu.layerwise`` as vLLM's ``kv_connector_module_path``; nothing else needs loading.
"""
