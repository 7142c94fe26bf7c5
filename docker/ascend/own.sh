#!/bin/bash
# Installs our two packages and checks what the image has. Runs inside the image build.
set -euo pipefail
. /src/common/index.sh
UV_PYTHON=$(command -v python3)
export UV_PYTHON

# The connector beside vLLM, whose requirements cover its own but for xxhash.
uv pip install --no-deps --offline /wheels/epd_connector-*.whl
if ! python3 -c "import xxhash" 2> /dev/null; then
    awk '/^[a-z]/ { wanted = /^xxhash==/ } wanted' /src/ascend/requirements.lock > /tmp/xxhash.lock
    uv pip install --no-deps --require-hashes -r /tmp/xxhash.lock
    rm /tmp/xxhash.lock
fi
python3 -I /src/ascend/check.py /src/versions.env

# The proxy by itself: what it needs is newer than what the vendor tested vLLM with.
uv venv --python "$UV_PYTHON" /opt/proxy
uv pip install --python /opt/proxy --no-deps --require-hashes -r /src/proxy.lock
uv pip install --python /opt/proxy --no-deps --offline /wheels/epd_proxy-*.whl
ln -s /opt/proxy/bin/epd-proxy /usr/local/bin/epd-proxy
epd-proxy --help > /dev/null

# The device nodes of NPUs belong to uid 1000 (HwHiAiUser); a process of that uid needs a line in /etc/passwd.
if ! getent passwd 1000 > /dev/null; then
    groupadd --gid 1000 HwHiAiUser
    useradd --uid 1000 --gid 1000 --home-dir /tmp --shell /usr/sbin/nologin HwHiAiUser
fi
install -d -o 1000 -g 1000 /models /cache
