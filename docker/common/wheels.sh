#!/bin/sh
# Builds the wheels of our two packages, /src/connector and /src/proxy, into /wheels. Runs inside an image build.
set -eu
for package in connector proxy; do
    /opt/tools/bin/uv build --wheel --no-build-isolation --python /opt/tools/bin/python --out-dir /wheels /src/$package
done
