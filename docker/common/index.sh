# shellcheck shell=sh
# Sourced by the scripts that install Python packages in an image build: where these come from.
# Secrets of the build, all optional:
#   ca               CA certificates
#   pip_index_url    a mirror of the package index
#   torch_index_url  PyTorch's CPU index. Its torch has no CUDA libraries (saves 5 GB) but no hash in our locks.
secret() { if [ -s "/run/secrets/$1" ]; then cat "/run/secrets/$1"; fi; }
if [ -s /run/secrets/ca ]; then export SSL_CERT_FILE=/run/secrets/ca PIP_CERT=/run/secrets/ca; fi
if [ -n "$(secret pip_index_url)" ]; then
    PIP_INDEX_URL=$(secret pip_index_url)
    UV_DEFAULT_INDEX=$PIP_INDEX_URL
    export PIP_INDEX_URL UV_DEFAULT_INDEX
fi
# The one of the tools' stage, mounted there; not on the PATH, where the tools' Python would hide the image's.
uv() { /opt/tools/bin/uv "$@"; }
export PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1 UV_HTTP_TIMEOUT=300

# install_locked LOCK: what the lock names and nothing else, as the lock is complete.
install_locked() {
    lock=$1
    torch_index_url=$(secret torch_index_url)
    if [ -n "$torch_index_url" ]; then
        pinned() { sed -n "s/^$1==\([^ ;]*\).*/$1==\1+cpu/p" "$lock"; }
        uv pip install --no-deps --default-index "$torch_index_url" \
            "$(pinned torch)" "$(pinned torchvision)" "$(pinned torchaudio)"
        # A requirement starts in the first column; its hashes follow, indented.
        awk '/^[a-z]/ { skip = /^(torch|torchvision|torchaudio|triton|nvidia-[a-z0-9-]*|cuda-[a-z0-9-]*)==/ } !skip' \
            "$lock" > /tmp/without-torch.lock
        lock=/tmp/without-torch.lock
    fi
    uv pip install --no-deps --require-hashes -r "$lock"
    rm -f /tmp/without-torch.lock
}
