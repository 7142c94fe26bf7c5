#!/bin/bash
# Installs what vLLM and vllm-ascend need into the Python of CANN's image. Runs inside the image build.
set -euo pipefail
. /src/common/index.sh
UV_PYTHON=$(command -v python3)
export UV_PYTHON
install_locked /src/ascend/requirements.lock
