#!/bin/sh
# Resolve every requirements file to a lock with hashes. Needs uv on the PATH. Run after changing an *.in file.
set -eu
cd "$(dirname "$0")/.."

lock() { # lock OUTPUT INPUT… [uv options…]
    out=$1
    shift
    echo "locking $out"
    uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header "$@" -o "$out"
}

# vLLM 0.23.0 leaves most of its requirements open, and newer FastAPI, Starlette or Transformers break it (FastAPI 0.138:
# every request answers 500). So nothing newer than its own release is taken, but for what was released for it later.
lock docker/cpu/requirements.lock docker/cpu/requirements.in proxy/pyproject.toml connector/pyproject.toml \
    --exclude-newer 2026-06-12 --exclude-newer-package mooncake-transfer-engine-non-cuda=2026-09-01
lock docker/cpu/wheels.lock docker/cpu/wheels.in --no-deps
# Other versions of vLLM, each with what was there when it was released, but for Mooncake and what the proxy needs.
compat() { # compat VLLM DATE [uv options…]
    folder=docker/cpu/compat/$1
    date=$2
    shift 2
    # vLLM's metadata asks for the build `+cpu` of torch, which PyPI has not.
    grep '^torch==' "$folder/requirements.in" | lock "$folder/requirements.lock" "$folder/requirements.in" \
        proxy/pyproject.toml connector/pyproject.toml --override /dev/stdin --exclude-newer "$date" \
        --exclude-newer-package mooncake-transfer-engine-non-cuda=2026-09-01 --exclude-newer-package xxhash=2026-09-01 "$@"
}
compat 0.14.1 2026-01-26 --exclude-newer-package aiohttp=2026-06-12
compat 0.18.0 2026-04-08 --exclude-newer-package aiohttp=2026-06-12
compat 0.32.0 2026-10-22
lock docker/cpu/test.lock docker/cpu/test.in --constraint docker/cpu/requirements.lock
# torch-npu and Mooncake's NPU build are of the releases that vllm-ascend 0.23.0 was made with. triton, which torch asks
# for on x86, would take the place of triton-ascend.
lock docker/ascend/requirements.lock docker/ascend/requirements.in connector/pyproject.toml \
    --exclude-newer 2026-06-12 --exclude-newer-package torch-npu=2026-08-01 \
    --exclude-newer-package mooncake-transfer-engine-npu=2026-09-01 --no-emit-package triton
lock docker/ascend/vllm.lock docker/ascend/vllm.in --no-deps
lock docker/store/requirements.lock docker/store/requirements.in
lock docker/build.lock docker/build.in
lock docker/proxy/compile.lock docker/proxy/compile.in
lock proxy/requirements.lock proxy/pyproject.toml --all-extras
lock tests/requirements.lock tests/requirements.in proxy/pyproject.toml connector/pyproject.toml --all-extras
lock docker/proxy/test.lock docker/proxy/test.in --constraint proxy/requirements.lock --constraint tests/requirements.lock
