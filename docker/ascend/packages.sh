#!/bin/bash
# Installs what CANN's image lacks of the system's packages, on Ubuntu or openEuler. Runs inside the image build.
# Secret of the build, optional: os_mirror_url, a mirror of the distribution's archive (https://mirror.example/ubuntu).
set -euo pipefail
. /src/common/index.sh

# clang                           triton-ascend compiles its kernels with it
# libcurl, libibverbs, libnuma    Mooncake's engine is linked to them
# jemalloc                        for EPD_JEMALLOC=1
with_apt() {
    local options=()
    if [ -n "$mirror" ]; then
        sed -E "s@https?://[^ /]+/(ubuntu|ubuntu-ports|debian)/?@${mirror%/}/@" /etc/apt/sources.list > /tmp/sources.list
        options=(-o Dir::Etc::sourcelist=/tmp/sources.list -o Dir::Etc::sourceparts=-)
    fi
    apt-get "${options[@]}" update
    DEBIAN_FRONTEND=noninteractive apt-get "${options[@]}" install -y --no-install-recommends \
        clang-15 libcurl4 libibverbs1 libjemalloc2 libnuma1
    update-alternatives --install /usr/bin/clang clang /usr/bin/clang-15 20
    update-alternatives --install /usr/bin/clang++ clang++ /usr/bin/clang++-15 20
    rm -rf /var/lib/apt/lists/* /tmp/sources.list
}

with_dnf() {
    local options=()
    if [ -n "$mirror" ]; then
        mkdir /tmp/repositories
        for file in /etc/yum.repos.d/*.repo; do
            sed -E "s@^(baseurl=)https?://[^/]+/@\1${mirror%/}/@" "$file" > "/tmp/repositories/${file##*/}"
        done
        options=(--setopt=reposdir=/tmp/repositories)
    fi
    dnf "${options[@]}" install -y clang jemalloc libcurl libibverbs numactl-libs
    rm -rf /var/cache/dnf /tmp/repositories
}

mirror=$(secret os_mirror_url)
if command -v apt-get > /dev/null; then with_apt; else with_dnf; fi
