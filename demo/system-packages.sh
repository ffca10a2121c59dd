#!/bin/sh
# Install the Debian packages of missing programs, for `make`.
#
#   system-packages.sh PROGRAM:PACKAGE...     an empty PROGRAM counts as missing
#
# Where it may not install, it says what to install and fails. A server that comes with a package is neither
# started now nor at the next boot.
set -eu

PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
for directory in /usr/lib/postgresql/*/bin; do
    PATH=$PATH:$directory
done
missing=
for pair; do
    program=${pair%%:*}
    if [ -z "$program" ] || ! command -v "$program" >/dev/null; then
        missing="$missing ${pair#*:}"
    fi
done
[ -n "$missing" ] || exit 0

if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "Please install (names of Debian packages):$missing" >&2
    exit 1
fi

echo "Installing$missing"
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 0755 "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
# shellcheck disable=SC2086  # one word for each package
apt-get -qq install --no-install-recommends --yes $missing >/dev/null
if command -v systemctl >/dev/null; then
    for package in $missing; do
        case $package in
            openssh-server) systemctl --quiet disable ssh.service ssh.socket 2>/dev/null || true ;;
            postgresql) systemctl --quiet disable postgresql.service 2>/dev/null || true ;;
            proftpd-core) systemctl --quiet disable proftpd.service 2>/dev/null || true ;;
            redis-server) systemctl --quiet disable redis-server.service 2>/dev/null || true ;;
        esac
    done
fi
