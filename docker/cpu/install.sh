#!/bin/sh
# Installs the locked requirements into /opt/venv. Runs inside the image build, see Dockerfile.
set -eu
. /src/common/index.sh
uv venv --python /usr/bin/python3 /opt/venv
install_locked /src/locks/requirements.lock
# Without their dependencies: see requirements.in. In compat/ vLLM is in the one lock, and vllm-ascend in none.
if [ -f /src/locks/wheels.lock ]; then uv pip install --no-deps --require-hashes -r /src/locks/wheels.lock; fi
# Compiled once here, all of it: nothing can be written to the image later, and each process of vLLM would compile
# for 6 s at every start (measured). torch 2.13 has tests in it that only Python 3.12 can read, py312_….
/opt/venv/bin/python -m compileall -q -j 0 -x '/py312_' /opt/venv/lib
# vLLM wants these two preloaded on a CPU: 0.18 does not start without them, later ones warn. glibc's malloc gives the
# memory of large tensors back each time, and to get 32 MiB anew takes 25 ms (measured). Intel's OpenMP is for x86-64 only.
mkdir /opt/preload
ln -s "$(ls /usr/lib/*/libtcmalloc_minimal.so.4)" /opt/preload
if [ "$(uname -m)" = x86_64 ]; then ln -s "$(ls /opt/venv/lib/libiomp5.so)" /opt/preload; fi
