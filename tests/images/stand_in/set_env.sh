# shellcheck shell=bash
# Leaves a trace of being sourced, once for the toolkit and once for ATB.
export STAND_IN_SOURCED="${STAND_IN_SOURCED}${BASH_SOURCE[0]##/usr/local/Ascend/} "
