#!/bin/sh
# Makes .venv on Debian 12 (root): Debian packages, then the hash-locked Python set. Repeats are cheap.
# Usage: deploy/setup.sh [test]   "test" also installs the container engine and the packet tools the suite drives.
set -eu
cd "$(dirname "$0")/.."

packages="python3 python3-venv clang llvm libbpf1 libbpf-dev bpftool iproute2 util-linux iputils-ping procps libseccomp2"
[ "${1:-}" = test ] && packages="$packages docker.io nftables git systemd"

missing=""
for package in $packages; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
done
if [ -n "$missing" ]; then
    if [ "$(id -u)" != 0 ]; then
        echo "setup: these Debian packages are missing and only root may install them:$missing" >&2
        echo "setup: run 'apt-get install$missing' as root, then repeat" >&2
        exit 1
    fi
    echo "setup: installing$missing"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    # shellcheck disable=SC2086  # a list of names, split on purpose
    apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi

stamp=.venv/.installed
want=$(cat requirements/*.txt pyproject.toml deploy/setup.sh | sha256sum)
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$want" ]; then
    echo "setup: installing the locked Python packages into .venv"
    # Debian's interpreter, which is the one of hosts; nothing of Debian's own Python packages is seen.
    [ -x .venv/bin/python ] || /usr/bin/python3 -m venv .venv
    .venv/bin/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/bootstrap.txt
    # With byte code, as pip leaves it: modules may write none, and would compile what they import at each start.
    .venv/bin/uv pip install -q --python .venv/bin/python --compile-bytecode --require-hashes -r requirements/lock.txt
    .venv/bin/uv pip install -q --python .venv/bin/python --no-deps --no-build-isolation -e .
    echo "$want" > "$stamp"
fi
