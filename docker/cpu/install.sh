#!/bin/sh
# Installs the locked requirements into /opt/venv. Runs inside the image build, see Dockerfile.
# Secrets of the build, all optional:
#   ca               CA certificates
#   pip_index_url    a mirror of the package index
#   torch_index_url  PyTorch's CPU index. Its torch has no CUDA libraries (saves 5 GB) but no hash in our lock.
set -eu
lock=/src/requirements.lock

secret() { if [ -s "/run/secrets/$1" ]; then cat "/run/secrets/$1"; fi; }
if [ -s /run/secrets/ca ]; then export SSL_CERT_FILE=/run/secrets/ca; fi
if [ -n "$(secret pip_index_url)" ]; then
    UV_DEFAULT_INDEX=$(secret pip_index_url)
    export UV_DEFAULT_INDEX
fi
export UV_NO_CACHE=1 UV_HTTP_TIMEOUT=300

uv venv --python /usr/bin/python3 /opt/venv
torch_index_url=$(secret torch_index_url)
if [ -n "$torch_index_url" ]; then
    pinned() { sed -n "s/^$1==\([^ ;]*\).*/$1==\1+cpu/p" $lock; }
    uv pip install --no-deps --default-index "$torch_index_url" "$(pinned torch)" "$(pinned torchvision)" "$(pinned torchaudio)"
    # A requirement starts in the first column; its hashes follow, indented.
    awk '/^[a-z]/ { skip = /^(torch|triton|nvidia-|cuda-)/ } !skip' $lock > /tmp/requirements.lock
    lock=/tmp/requirements.lock
fi
# The locks are complete, so nothing else may be pulled in.
uv pip install --no-deps --require-hashes -r $lock
uv pip install --no-deps --require-hashes -r /src/wheels.lock
rm -f /tmp/requirements.lock
# Compiled once here, all of it: nothing can be written to the image later, and each process of vLLM would compile
# for 6 s at every start (measured).
/opt/venv/bin/python -m compileall -q -j 0 /opt/venv/lib
