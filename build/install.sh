#!/bin/sh
# Installs Pinaivu Box: downloads the executable for this machine, verifies it, and puts it into
# ~/.local/bin.  `install.sh --help` lists the options.
#
# What is downloaded counts only if it is in SHA256SUMS, and that only with a signature of the release
# key.  Until everything is verified and the executable has been started once, nothing is installed.
set -eu

# Filled in by build/release.
RELEASES=""
PUBLIC_KEY=""
VERSION=""

MAX_SUMS_BYTES=65536
MAX_EXECUTABLE_MB=4096

usage() {
  cat <<'END'
Usage: install.sh [OPTIONS]

  --to FOLDER        Install into FOLDER.  [default: PINAIVU_BIN, or ~/.local/bin]
  --variant VARIANT  cpu, cuda or vulkan.  [default: cuda with an NVIDIA GPU, else cpu]
  --sha256 DIGEST    Install the executable with this SHA-256, from a place that you trust, without
                     verifying a signature (for systems without OpenSSL 3).
  --uninstall        Remove the executable from FOLDER; models, keys and receipts stay.
  --help             Show this.

PINAIVU_RELEASES is the page with the releases, if it is another one than the default.
END
}

say() { printf '%s\n' "$*"; }

fail() {
  printf 'install.sh: %s\n' "$*" >&2
  exit 1
}

has() { command -v "$1" >/dev/null 2>&1; }

main() {
  folder=${PINAIVU_BIN:-${HOME:-}/.local/bin} variant="" digest="" uninstall=""
  while [ $# -gt 0 ]; do
    case $1 in
      --help | -h) usage && exit 0 ;;
      --uninstall) uninstall=yes && shift && continue ;;
      --to | --variant | --sha256) [ $# -gt 1 ] || fail "$1 needs a value." ;;
      *) fail "'$1' is not known: see install.sh --help." ;;
    esac
    case $1 in
      --to) folder=$2 ;;
      --variant) variant=$2 ;;
      --sha256) digest=$2 ;;
    esac
    shift 2
  done
  case $folder in
    /.local/bin) fail "HOME is not set: name a folder with --to." ;;
    /*) ;;
    *) folder=$PWD/$folder ;;
  esac
  if [ -n "$uninstall" ]; then
    uninstall
  else
    install
  fi
}

uninstall() {
  [ -e "$folder/pinaivu" ] || fail "there is no $folder/pinaivu: name its folder with --to."
  rm -f "$folder/pinaivu" "$folder/pinaivu.previous" || fail "$folder/pinaivu cannot be removed."
  say "Removed $folder/pinaivu."
  say "What it has unpacked is in ~/.cache/pinaivu: rm -r it at will."
  say "Models, keys and receipts are in ~/.local/share/pinaivu (or PINAIVU_HOME): nothing was removed there."
}

install() {
  releases=${PINAIVU_RELEASES:-$RELEASES}
  releases=${releases%/}
  [ -n "$releases" ] || fail "this script is not part of a release: set PINAIVU_RELEASES to the page with the releases."
  check_tools
  find_platform
  find_variant
  mkdir -p "$folder" 2>/dev/null || fail "$folder cannot be made: name another folder with --to."
  # In the same folder, so that the last step is a rename.
  work=$(mktemp -d "$folder/.pinaivu-XXXXXX" 2>/dev/null) ||
    fail "$folder cannot be written: name another folder with --to."
  trap 'rm -rf "$work"' EXIT
  trap 'exit 130' HUP INT TERM

  say "Fetching the newest release from $releases"
  fetch "$releases/latest/download/SHA256SUMS" sums "$MAX_SUMS_BYTES"
  read_sums
  [ -n "$digest" ] || verify_signature
  check_version
  say "Downloading $name"
  fetch "$releases/download/v$version/$name" pinaivu $((MAX_EXECUTABLE_MB * 1048576))
  verify_digest
  try_it
  put_it_there
  tell
}

check_tools() {
  if has curl; then
    client=curl
  elif has wget; then
    client=wget
  else
    fail "curl or wget is needed: install one of them (Debian, Ubuntu: apt install curl)."
  fi
  if has sha256sum; then
    hash=sha256sum
  elif has shasum; then
    hash="shasum -a 256"
  else
    fail "sha256sum is needed: install it (it is part of coreutils and of busybox)."
  fi
  if [ -n "$digest" ]; then
    case $digest in
      *[!0-9a-f]*) fail "--sha256 is 64 digits of 0-9 and a-f." ;;
    esac
    [ ${#digest} -eq 64 ] || fail "--sha256 is 64 digits of 0-9 and a-f."
    return
  fi
  [ -n "$PUBLIC_KEY" ] || fail "this script has no release key, so it cannot verify a release: use that of a release, or --sha256."
  # Version 3 is the first that verifies Ed25519 signatures of files on the command line.
  without="pass the executable's SHA-256 from the page of the release, where SHA256SUMS has it, as --sha256"
  has openssl ||
    fail "OpenSSL 3 is needed to verify the signature of the release: install it (Debian, Ubuntu: apt install openssl), or $without."
  openssl pkeyutl -help 2>&1 | grep -q rawin ||
    fail "OpenSSL 3 is needed to verify the signature of the release, and this system has $(openssl version | cut -d " " -f 1-2) (Debian has version 3 from 12 on, Ubuntu from 22.04 on): $without."
}

find_platform() {
  system=$(uname -s) machine=$(uname -m)
  case $system/$machine in
    Linux/x86_64 | Linux/amd64) platform=linux-x86_64 ;;
    Linux/aarch64 | Linux/arm64) platform=linux-aarch64 ;;
    *) fail "there is no executable for $system on $machine: build it from source." ;;
  esac
}

find_variant() {
  hint=""
  case $variant in
    cpu | cuda | vulkan) return ;;
    "") ;;
    *) fail "--variant is cpu, cuda or vulkan." ;;
  esac
  variant=cpu
  if [ -e /dev/nvidia0 ] || { has nvidia-smi && nvidia-smi -L >/dev/null 2>&1; }; then
    variant=cuda
    hint="It is the variant for NVIDIA's GPUs, since this machine has one; --variant cpu installs a smaller one without."
  elif ls /dev/dri/renderD* >/dev/null 2>&1; then
    hint="This machine has a graphics card: --variant vulkan installs the executable that computes on AMD's and Intel's."
  fi
}

# fetch URL FILE BYTES: downloads at most so much into the work folder.
fetch() {
  limit=$3
  rm -f "$work/status"
  {
    if [ $client = curl ]; then
      # Who asked for https is led to https only.
      case $1 in https:*) only="=https" ;; *) only="=http,https" ;; esac
      curl -fsSL --proto "$only" --proto-redir "$only" --connect-timeout 30 \
        --speed-time 60 --speed-limit 100 -- "$1" 2>"$work/error" || echo "$?" >"$work/status"
    else
      wget -q -t 1 -T 60 -O - "$1" 2>"$work/error" || echo "$?" >"$work/status"
    fi
  } | head -c $((limit + 1)) >"$work/$2" || fail "$folder has no room for $1."
  if [ "$(wc -c <"$work/$2")" -gt "$limit" ]; then
    fail "$1 is longer than it can be ($limit bytes): nothing was installed."
  fi
  if [ -e "$work/status" ]; then
    reason=$(tail -n 1 "$work/error" | tr -cd '[:print:]')
    fail "$1 cannot be downloaded (${reason:-$client failed with $(cat "$work/status")}): nothing was installed."
  fi
}

# The name of the file for this machine, and the version in it.
read_sums() {
  suffix=$platform
  [ "$variant" = cpu ] || suffix=$platform-$variant
  found=$(sed -n "s/^[0-9a-f]\{64\} [ *]\(pinaivu-[0-9][0-9A-Za-z.+-]*-$suffix\)\$/\1/p" "$work/sums")
  case $found in
    "")
      grep -q "^[0-9a-f]\{64\} [ *]pinaivu-" "$work/sums" ||
        fail "$releases does not answer with a release: check PINAIVU_RELEASES, or try again later."
      fail "the newest release has no variant $variant for $platform: choose another with --variant."
      ;;
    *"
"*) fail "SHA256SUMS names more than one version: nothing was installed." ;;
  esac
  name=$found
  version=${name#pinaivu-}
  version=${version%-"$suffix"}
  listed=$(sed -n "s/^\([0-9a-f]\{64\}\) [ *]$name\$/\1/p" "$work/sums")
  if [ -n "$digest" ] && [ "$digest" != "$listed" ]; then
    fail "$name of the newest release has another SHA-256 than --sha256 says: nothing was installed."
  fi
}

verify_signature() {
  fetch "$releases/download/v$version/SHA256SUMS.sig" signature 64
  printf '%s\n' "$PUBLIC_KEY" >"$work/key.pem"
  openssl pkeyutl -verify -pubin -inkey "$work/key.pem" -rawin -in "$work/sums" \
    -sigfile "$work/signature" >/dev/null 2>&1 ||
    fail "the signature of release $version is not of the release key: nothing was installed; try again later, and if that does not help, tell the authors."
}

# An old release is signed, too: who can only repeat it must not bring its mistakes back.
check_version() {
  if [ -n "$VERSION" ] && is_older "$version" "$VERSION"; then
    fail "$releases offers release $version, which is older than this script ($VERSION): nothing was installed."
  fi
  [ -x "$folder/pinaivu" ] || return 0
  installed=$("$folder/pinaivu" --version 2>/dev/null | sed -n 's/^pinaivu, version //p')
  if [ -n "$installed" ] && is_older "$version" "$installed"; then
    fail "$folder/pinaivu is $installed, newer than the newest release at $releases ($version): nothing was changed."
  fi
}

# Whether the first of two versions is older: by its three numbers, and a release comes after its
# pre-releases, which are compared as text.
is_older() {
  [ "$1" != "$2" ] || return 1
  awk -v one="$1" -v other="$2" 'BEGIN {
    split(one, a, "-"); split(other, b, "-"); split(a[1], m, "."); split(b[1], n, ".")
    for (i = 1; i <= 3; i++) if (m[i] + 0 != n[i] + 0) exit !(m[i] + 0 < n[i] + 0)
    if (a[2] == "" || b[2] == "") exit !(a[2] != "")
    exit !((a[2] "") < (b[2] ""))
  }'
}

verify_digest() {
  found=$($hash <"$work/pinaivu" | cut -c 1-64)
  [ "$found" = "$listed" ] ||
    fail "$name is not the file that was released (its SHA-256 is $found): nothing was installed; try again."
}

try_it() {
  chmod 755 "$work/pinaivu"
  said=$("$work/pinaivu" --version 2>"$work/error") ||
    fail "$name does not run on this system: $(head -n 1 "$work/error")"
  [ "$said" = "pinaivu, version $version" ] ||
    fail "$name says that it is '$said': nothing was installed."
}

put_it_there() {
  before=""
  if [ -e "$folder/pinaivu" ]; then
    ln "$folder/pinaivu" "$work/previous" 2>/dev/null || cp -p "$folder/pinaivu" "$work/previous"
    mv -f "$work/previous" "$folder/pinaivu.previous"
    before=yes
  fi
  mv -f "$work/pinaivu" "$folder/pinaivu"
}

tell() {
  say
  say "Installed Pinaivu Box $version as $folder/pinaivu."
  [ -z "$hint" ] || say "$hint"
  [ -z "$before" ] || say "The one before is $folder/pinaivu.previous; a box that is running goes on with it until it is restarted."
  case :$PATH: in
    *":$folder:"*) command=pinaivu ;;
    *)
      command=$folder/pinaivu
      say "$folder is not in PATH: add it to call 'pinaivu' (export PATH=\"$folder:\$PATH\" in ~/.profile)."
      ;;
  esac
  say "Start it:  $command serve"
  say "Undo it:   rm $folder/pinaivu"
}

main "$@"
