#!/bin/sh
# apt.sh PACKAGE…: installs packages of Debian or Ubuntu. Runs inside an image build.
# Secrets of the build, both optional; neither is left in the image:
#   ca             CA certificates, for a mirror with https
#   os_mirror_url  a mirror of the distribution's archive (https://mirror.example/debian). Debian's security archive is
#                  then the folder beside it, where mirrors have it: …/debian-security
set -eu
. /src/common/index.sh
own=/tmp/apt
mkdir -p "$own/parts"
export APT_CONFIG="$own/apt.conf"
: > "$APT_CONFIG"
if [ -s /run/secrets/ca ]; then
    # A copy, as apt downloads as another user, who may not read a secret.
    install -m 644 /run/secrets/ca "$own/ca.pem"
    echo "Acquire::https::CAInfo \"$own/ca.pem\";" >> "$APT_CONFIG"
fi
mirror=$(secret os_mirror_url)
mirror=${mirror%/}
if [ -n "$mirror" ]; then
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
        if [ ! -f "$file" ]; then continue; fi
        case $file in */sources.list) copy=$own/sources.list ;; *) copy=$own/parts/${file##*/} ;; esac
        sed -E -e "s@https?://[^ ]+/debian-security/?( |\$)@$mirror-security\1@" \
            -e "s@https?://[^ ]+/(debian|ubuntu|ubuntu-ports)/?( |\$)@$mirror\2@" "$file" > "$copy"
    done
    echo "Dir::Etc::sourcelist \"$own/sources.list\"; Dir::Etc::sourceparts \"$own/parts\";" >> "$APT_CONFIG"
fi
chmod -R a+rX "$own"
apt-get update
DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@"
rm -rf /var/lib/apt/lists/* "$own"
