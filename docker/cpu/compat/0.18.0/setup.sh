#!/bin/sh
set -eu
# vLLM 0.18 does not start on a CPU without these two preloaded (vllm/v1/worker/cpu_worker.py); 0.32 only warns.
apt-get update
apt-get install -y --no-install-recommends libtcmalloc-minimal4
rm -rf /var/lib/apt/lists/*
mkdir /opt/preload
ln -s /usr/lib/*/libtcmalloc_minimal.so.4 /opt/venv/lib/libiomp5.so /opt/preload
