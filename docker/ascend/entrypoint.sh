#!/bin/bash
# What the entrypoint of CANN's image does, in its order, and then the role. Health checks run without this: epd-serve
# needs none of it.
for file in /usr/local/Ascend/ascend-toolkit/set_env.sh \
    /usr/local/Ascend/cann-*/share/info/ascendnpu-ir/bin/set_env.sh \
    /usr/local/Ascend/nnal/atb/set_env.sh; do
    # shellcheck source=/dev/null
    if [ -r "$file" ]; then source "$file"; fi
done

if [ "${EPD_JEMALLOC:-0}" = 1 ]; then
    # Ubuntu and openEuler keep it in different folders; the linker's cache knows both.
    library=$(ldconfig -p | awk '/libjemalloc\.so\.2/ { print $NF; exit }')
    if [ -z "$library" ]; then
        echo "epd-entrypoint: EPD_JEMALLOC=1: expected libjemalloc.so.2 in the image, found none; leave EPD_JEMALLOC out" >&2
        exit 2
    fi
    export LD_PRELOAD="$library${LD_PRELOAD:+:$LD_PRELOAD}"
fi
exec epd-serve "$@"
