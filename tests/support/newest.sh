#!/bin/sh
# Runs tests on the newest Python to be had: sh tests/support/newest.sh [pytest's arguments]
#
# PYTHON    the Python that all tests run on anyway
# PACKAGES  the Debian packages that the tests need
# CACHE     a folder outside of the checkout, for a small Debian
#
# The newest python3.N in PATH is taken where it is newer than PYTHON, in build/newest; else that
# of Debian testing, which is installed below CACHE and renewed once a month. For that one must be
# root, in reach of Debian's packages. Where no newer Python can be had, this says so, loudly, and
# ends with 0; only tests that fail end it otherwise.
set -eu

CA=/etc/ssl/certs/ca-certificates.crt
WANTED="-r requirements.txt -c tests/requirements.txt"
WANTED="$WANTED pytest pytest-timeout hypothesis asyncssh keyring sqlglot"

skip() {
    echo "**********************************************************************" >&2
    echo "*** NOT TESTED on a Python newer than $version: $*" >&2
    echo "**********************************************************************" >&2
    exit 0
}

version_of() {
    "$@" -c 'import sys; print("%d.%d" % sys.version_info[:2])'
}

# ------------------------------------------------------------------ a python3.N in PATH

version=$(version_of "$PYTHON")
minor=40
# it must run: the one that pyenv puts in PATH may be no more than a promise
while [ "$minor" -gt "${version#*.}" ] && ! "python3.$minor" -c '' 2>/dev/null; do
    minor=$((minor - 1))
done
if [ "$minor" -gt "${version#*.}" ]; then
    echo "Testing on $(command -v "python3.$minor")"
    # shellcheck disable=SC2086
    sh tests/support/install.sh $PACKAGES
    "python3.$minor" -m venv --clear build/newest || skip "python3.$minor: its venv fails"
    # shellcheck disable=SC2086
    build/newest/bin/python -m pip install --quiet $WANTED || skip "pip fails on python3.$minor"
    exec build/newest/bin/python -m pytest -p no:cacheprovider "$@"
fi

# ------------------------------------------------------------------ Debian testing's

# in_root ROOT COMMAND...: in a Debian of its own, that sees the checkout, read-only, as /checkout.
# Mounts and processes are in namespaces: both go when the command ends, however it ends.
in_root() {
    unshare --mount --pid --fork --kill-child sh -euc '
        root=$1
        shift
        mount -t proc proc "$root/proc"
        mount --rbind /dev "$root/dev"
        mount --bind . "$root/checkout"
        mount -o remount,bind,ro "$root/checkout"
        cp -L /etc/resolv.conf "$root/etc/resolv.conf"
        chroot "$root" env -u TMPDIR HOME=/root LC_ALL=C.UTF-8 PYTHONDONTWRITEBYTECODE=1 \
            PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
            sh -euc "cd /checkout && exec timeout -k 10 1200 \"\$@\"" sh "$@" || exit $?
    ' sh "$@"
}

make_root() {
    echo "Installing Debian testing in $root: this takes a minute or two"
    rm -rf --one-file-system "$new"
    mkdir -p "$CACHE"
    # debootstrap mounts, too
    unshare --mount timeout -k 10 1200 debootstrap --variant=minbase \
        --include=python3,python3-venv,ca-certificates testing "$new" >"$CACHE/log" 2>&1 &&
        mkdir "$new/checkout" || return
    if [ -e "$CA" ]; then  # a company's own authorities are in it
        cp "$CA" "$new$CA" || return
    fi
    # shellcheck disable=SC2086
    in_root "$new" sh tests/support/install.sh $PACKAGES >>"$CACHE/log" 2>&1 &&
        in_root "$new" python3 -m venv /venv >>"$CACHE/log" 2>&1 &&
        in_root "$new" /venv/bin/python -m pip install $WANTED >>"$CACHE/log" 2>&1 &&
        rm -rf "$new/var/cache/apt" "$new/root/.cache" &&
        printf '%s' "$made_of" >"$new/ready" &&
        rm -rf --one-file-system "$root" &&
        mv "$new" "$root"
}

root=$CACHE/testing
new=$root.new
made_of=$(cat tests/support/newest.sh requirements.txt tests/requirements.txt | cksum)
made_of="$made_of $PACKAGES"

[ "$(id -u)" -eq 0 ] || skip "only root can install Debian testing in $CACHE"
command -v unshare >/dev/null && unshare --mount --pid --fork true 2>/dev/null ||
    skip "unshare cannot make namespaces here"
mkdir -p "$CACHE"
exec 9>"$CACHE/lock"
flock 9
if [ "$(cat "$root/ready" 2>/dev/null)" != "$made_of" ] ||
    [ -z "$(find "$root/ready" -mtime -30)" ]; then
    sh tests/support/install.sh debootstrap debian-archive-keyring &&
        command -v debootstrap >/dev/null || skip "debootstrap is not to be had"
    if ! make_root; then
        tail -n 20 "$CACHE/log" >&2
        skip "Debian testing cannot be installed; see above and $CACHE/log"
    fi
fi
exec 9>&-

newest=$(version_of in_root "$root" python3)
[ "${newest#*.}" -gt "${version#*.}" ] || skip "the newest to be had is Python $newest"
echo "Testing on Python $newest of Debian testing, in $root"
in_root "$root" /venv/bin/python -m pytest -p no:cacheprovider "$@"
