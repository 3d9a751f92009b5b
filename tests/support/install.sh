#!/bin/sh
# Installs those of the given Debian packages that are missing: sh tests/support/install.sh PACKAGE...
# Where none is missing it does and prints nothing.
set -eu

if ! command -v apt-get >/dev/null; then
    echo "No apt-get here. Needed are what Debian calls: $*" >&2
    exit 0
fi

missing=
for package; do
    case $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true) in
        installed*) ;;
        *) missing="$missing $package" ;;
    esac
done
[ -n "$missing" ] || exit 0

as_root=
if [ "$(id -u)" -ne 0 ]; then
    if sudo -n true 2>/dev/null; then
        as_root='sudo -n'
    elif [ -t 0 ] && command -v sudo >/dev/null; then
        as_root=sudo
    else
        echo "These Debian packages are missing, and only root may install them. Try, as root:" >&2
        echo "    apt-get install --no-install-recommends$missing" >&2
        exit 1
    fi
fi
apt="$as_root env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300"

echo "Installing Debian packages:$missing"
# The tests start servers of their own: the system's need not start, and where they cannot, as in
# a container, the installation must not fail.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap '$as_root rm -f "$policy"' EXIT
    trap 'exit 130' INT TERM
    printf '#!/bin/sh\nexit 101\n' | $as_root tee "$policy" >/dev/null
    $as_root chmod 755 "$policy"
fi
$apt update || echo "apt-get update failed; trying with the package lists at hand" >&2
# apt runs postgresql's configuration script ahead of the installation, and that calls a program of
# postgresql-common's
case $missing in
    *\ postgresql*) $apt install -y --no-install-recommends postgresql-common >/dev/null || true ;;
esac
# shellcheck disable=SC2086
if ! $apt install -y --no-install-recommends $missing >/dev/null; then
    echo "apt-get could not install:$missing. Try: $as_root apt-get update, then make again" >&2
    exit 1
fi
if [ -d /run/systemd/system ]; then
    case $missing in
        *openssh-server* | *postgresql*)
            echo "The next boot starts their services. If you do not want that:"
            echo "    systemctl disable ssh ssh.socket postgresql" ;;
    esac
fi
