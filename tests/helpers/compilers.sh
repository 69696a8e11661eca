#!/bin/bash
# The compilers and the Python of `make versions` that Debian 12 has no packages of: each in a Debian or Ubuntu that has it,
# in a folder of its own (4 GB in all), with a command in /usr/local/bin that runs it there. For root, on Debian 12.
set -euo pipefail
ROOTS=${ROOTS:-/srv}

# in_root SUITE ARCHIVE SCRIPT KEYRING COMPONENTS PACKAGES: a system of a suite, from an archive or Debian's own, made by a
# script of debootstrap, in which folders of this machine are seen.
in_root() {
  local root=$ROOTS/$1
  if [ ! -e "$root.done" ]; then
    debootstrap --variant=minbase --keyring="$4" --components="$5" --include="$6" "$1" "$root" "$2" "$3"
    touch "$root.done"
  fi
  for folder in "$(git rev-parse --show-toplevel)" /tmp /dev /root; do
    mkdir -p "$root$folder"
    mountpoint -q "$root$folder" || mount --bind "$folder" "$root$folder"
  done
}

# command_of SUITE NAME...: commands of this machine that run those of a system.
command_of() {
  local suite=$1 name
  for name in "${@:2}"; do
    printf '#!/bin/sh\nexec chroot %s env -C "$PWD" %s "$@"\n' "$ROOTS/$suite" "$name" > "/usr/local/bin/$name"
    chmod +x "/usr/local/bin/$name"
  done
}

keys=/usr/share/keyrings/debian-archive-keyring.gpg
apt-get update
apt-get install -y debootstrap g++-11 g++-12 clang-14 clang-15 clang-16 clang-19 clang-22
in_root sid "" sid $keys main g++-13,g++-14,g++-15,g++-16,clang-21,clang-23,libpython3.14-dev,python3.14
in_root trixie "" sid $keys main clang-17,clang-18,libstdc++-14-dev,ubuntu-archive-keyring
command_of sid g++-13 g++-14 g++-15 g++-16 clang++-21 clang++-23 python3.14
command_of trixie clang++-17 clang++-18
if [ -n "${UBUNTU_ARCHIVE:-}" ]; then
  keys=$ROOTS/trixie/usr/share/keyrings/ubuntu-archive-keyring.gpg
  in_root resolute "$UBUNTU_ARCHIVE" gutsy "$keys" main,universe clang-20,libstdc++-14-dev
  command_of resolute clang++-20
fi
# The headers of Python 3.14, where compilers of this machine find them.
cp -r "$ROOTS/sid/usr/include/python3.14" /usr/include/
cp -r "$ROOTS/sid/usr/include/x86_64-linux-gnu/python3.14" /usr/include/x86_64-linux-gnu/
