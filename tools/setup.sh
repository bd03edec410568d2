#!/usr/bin/env bash
# Installs what the build needs, from the distribution's own packages: Debian 12 or Ubuntu 24.04. Does nothing, in a
# moment, when everything is there. Uses sudo only when not root.
#   tools/setup.sh           install what is missing
#   tools/setup.sh --list    print the packages and do nothing
set -euo pipefail

packages=(
  build-essential cmake ninja-build ccache pkgconf git        # compiler and build
  libgrpc++-dev protobuf-compiler protobuf-compiler-grpc      # RPC; brings c-ares, re2, OpenSSL, zlib
  libprotobuf-dev libabsl-dev
  prometheus-cpp-dev libcurl4-openssl-dev zlib1g-dev          # /metrics; its CMake package asks for curl and zlib
  libgloo-dev                                                 # collectives between CPU ranks
  libspdlog-dev nlohmann-json3-dev libpcre2-dev libcli11-dev libyaml-cpp-dev
  libgtest-dev libgmock-dev libbenchmark-dev                  # tests
  python3                                                     # test fixtures and checks
)

case "${1:-}" in
  '') ;;
  --list)
    printf '%s\n' "${packages[@]}"
    exit 0
    ;;
  -h | --help)
    sed -n '2,5s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
  *)
    echo "setup: unknown argument '$1'; --help tells more" >&2
    exit 2
    ;;
esac

ID='' VERSION_ID='' PRETTY_NAME='this system'
# shellcheck source=/dev/null
[ -r /etc/os-release ] && . /etc/os-release
case "$ID:$VERSION_ID" in
  debian:12 | ubuntu:24.04) ;;
  *)
    echo "setup: $PRETTY_NAME is not supported: Nibble is built and tested on Debian 12 and Ubuntu 24.04." >&2
    echo "       To try anyway, install the counterparts of these packages and run the scripts with --no-setup:" >&2
    echo "       ${packages[*]}" >&2
    exit 1
    ;;
esac

missing=()
for package in "${packages[@]}"; do
  missing+=("$package")
done
# One query for all: a line for every package that is installed.
while read -r status package; do
  if [ "$status" = installed ]; then
    for i in "${!missing[@]}"; do
      if [ "${missing[$i]}" = "$package" ]; then unset "missing[$i]"; fi
    done
  fi
done < <(dpkg-query -W -f '${db:Status-Status} ${Package}\n' "${packages[@]}" 2>/dev/null || true)

if [ ${#missing[@]} -eq 0 ]; then
  echo "setup: all ${#packages[@]} packages are installed"
  exit 0
fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then
  if ! command -v sudo >/dev/null; then
    echo "setup: not root and there is no sudo; as root run: apt-get install ${missing[*]}" >&2
    exit 1
  fi
  as_root=(sudo)
fi
echo "setup: installing ${#missing[@]} of ${#packages[@]} packages: ${missing[*]}"
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
echo "setup: done"
