#!/bin/sh
# Makes /opt/tools, the programs that build and install our wheels. Runs inside an image build; later stages mount it.
set -eu
. /src/common/index.sh
python3 -m venv /opt/tools
/opt/tools/bin/pip install --require-hashes -r /src/build.lock
