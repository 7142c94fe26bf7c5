#!/bin/sh
# Installs the locked requirements into /opt/venv. Runs inside the image build, see Dockerfile.
set -eu
. /src/common/index.sh
uv venv --python /usr/bin/python3 /opt/venv
install_locked /src/cpu/requirements.lock
# Without their dependencies: see requirements.in.
uv pip install --no-deps --require-hashes -r /src/cpu/wheels.lock
# Compiled once here, all of it: nothing can be written to the image later, and each process of vLLM would compile
# for 6 s at every start (measured).
/opt/venv/bin/python -m compileall -q -j 0 /opt/venv/lib
