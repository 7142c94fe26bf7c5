#!/bin/sh
# Installs the locked requirements into /opt/venv. Runs inside the image build, see Dockerfile.
#   TORCH_INDEX_URL  optional: PyTorch's CPU index. Its torch has no CUDA libraries (saves 5 GB) but no hash in our lock.
#   PIP_INDEX_URL    optional: a mirror of the package index.
set -eu
lock=/src/requirements.lock

if [ -s /run/secrets/ca.pem ]; then export SSL_CERT_FILE=/run/secrets/ca.pem; fi
if [ -n "${PIP_INDEX_URL:-}" ]; then export UV_DEFAULT_INDEX="$PIP_INDEX_URL"; fi
export UV_NO_CACHE=1 UV_HTTP_TIMEOUT=300

uv venv --python /usr/bin/python3 /opt/venv
if [ -n "${TORCH_INDEX_URL:-}" ]; then
    pinned() { sed -n "s/^$1==\([^ ;]*\).*/$1==\1+cpu/p" $lock; }
    uv pip install --no-deps --default-index "$TORCH_INDEX_URL" "$(pinned torch)" "$(pinned torchvision)" "$(pinned torchaudio)"
    # A requirement starts in the first column; its hashes follow, indented.
    awk '/^[a-z]/ { skip = /^(torch|triton|nvidia-|cuda-)/ } !skip' $lock > /tmp/requirements.lock
    lock=/tmp/requirements.lock
fi
# The locks are complete, so nothing else may be pulled in.
uv pip install --no-deps --require-hashes -r $lock
uv pip install --no-deps --require-hashes -r /src/wheels.lock
rm -f /tmp/requirements.lock
