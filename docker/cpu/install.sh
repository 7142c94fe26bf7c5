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
