#!/bin/bash
# Installs vLLM, vllm-ascend and triton-ascend into the Python of CANN's image. Runs inside the image build.
# Secrets beside those of common/index.sh:
#   ascend_index_url   Huawei's package index: the only one that has this release of triton-ascend
set -euo pipefail
. /src/common/index.sh
. /src/versions.env
: "${SOC_VERSION:?the chip to build for, e.g. ascend910_9391}"

ascend_index_url=$(secret ascend_index_url)
if [ -z "$ascend_index_url" ]; then
    echo "FAIL: triton-ascend $TRITON_ASCEND_VERSION cannot be found" >&2
    echo "  expected: ASCEND_INDEX_URL, the address of Huawei's package index" >&2
    echo "  fix:      take it from the installation guide of vllm-ascend $VLLM_ASCEND_VERSION; or build on its image," >&2
    echo "            which has all: EPD_ASCEND_SERVING=vendor" >&2
    exit 1
fi

# What the entrypoint of CANN's image does: kernels are compiled with this environment. These files use unset variables.
set +u
# shellcheck source=/dev/null
for file in /usr/local/Ascend/ascend-toolkit/set_env.sh /usr/local/Ascend/nnal/atb/set_env.sh; do . "$file"; done
set -u

UV_PYTHON=$(command -v python3)
export UV_PYTHON SOC_VERSION VLLM_TARGET_DEVICE=empty
uv pip install --no-deps --default-index "$ascend_index_url" "triton-ascend==$TRITON_ASCEND_VERSION"

# vLLM from source, for no device: without CUDA kernels it is 7 MB of Python. vllm-ascend's wheel holds the kernels of
# A2 alone, so that for another chip it is compiled here too (with CANN's compiler; that takes long).
from_source=(--no-binary vllm)
if [ "$SOC_VERSION" != ascend910b1 ]; then from_source+=(--no-binary vllm-ascend); fi
uv pip install --no-deps --no-build-isolation "${from_source[@]}" --require-hashes -r /src/ascend/vllm.lock
