#!/bin/bash
# Installs what CANN's image lacks of the system's packages, on Ubuntu or openEuler. Runs inside the image build.
# Secrets of the build: those of common/apt.sh.
set -euo pipefail
. /src/common/index.sh

# clang                           triton-ascend compiles its kernels with it
# libcurl, libibverbs, libnuma    Mooncake's engine is linked to them
# jemalloc                        for EPD_JEMALLOC=1
with_apt() {
    sh /src/common/apt.sh clang-15 libcurl4 libibverbs1 libjemalloc2 libnuma1
    update-alternatives --install /usr/bin/clang clang /usr/bin/clang-15 20
    update-alternatives --install /usr/bin/clang++ clang++ /usr/bin/clang++-15 20
}

with_dnf() {
    local options=() mirror
    mirror=$(secret os_mirror_url)
    if [ -s /run/secrets/ca ]; then options+=(--setopt=sslcacert=/run/secrets/ca); fi
    if [ -n "$mirror" ]; then
        mkdir /tmp/repositories
        for file in /etc/yum.repos.d/*.repo; do
            sed -E "s@^(baseurl=)https?://[^/]+/@\1${mirror%/}/@" "$file" > "/tmp/repositories/${file##*/}"
        done
        options+=(--setopt=reposdir=/tmp/repositories)
    fi
    dnf "${options[@]}" install -y clang jemalloc libcurl libibverbs numactl-libs
    rm -rf /var/cache/dnf /tmp/repositories
}

if command -v apt-get > /dev/null; then with_apt; else with_dnf; fi
