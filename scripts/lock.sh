#!/bin/sh
# Resolve every requirements file to a lock with hashes. Needs uv on the PATH. Run after changing an *.in file.
set -eu
cd "$(dirname "$0")/.."

lock() { # lock INPUT [uv options…]
    in=$1
    shift
    echo "locking $in"
    uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header "$@" "$in" -o "${in%.in}.lock"
}

# vLLM 0.23.0 leaves most of its requirements open, and newer FastAPI, Starlette or Transformers break it (FastAPI 0.138:
# every request answers 500). So nothing newer than its own release is taken, but for what was released for it later.
lock docker/cpu/requirements.in --exclude-newer 2026-06-12 --exclude-newer-package mooncake-transfer-engine-non-cuda=2026-09-01
lock docker/cpu/wheels.in --no-deps
lock docker/cpu/test.in --constraint docker/cpu/requirements.lock
lock docker/build.in
lock tests/requirements.in proxy/pyproject.toml connector/pyproject.toml
