# shellcheck shell=bash
# Shared by the scripts here: find or install what they need. Source it; it goes to the repository's root.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

# A plain user's PATH lacks mkfs and losetup, and a non-login shell's lacks rustup's cargo.
export PATH="$PATH:${CARGO_HOME:-$HOME/.cargo}/bin:/usr/sbin:/sbin"

die() {
    printf 'contrib/%s: %s\n' "${0##*/}" "$1" >&2
    exit 1
}

have() {
    command -v "$1" >/dev/null
}

# as_root WHY COMMAND...: runs it as root, or says that WHY needs that.
as_root() {
    if ((EUID == 0)); then
        "${@:2}"
    elif have sudo; then
        sudo "${@:2}"
    else
        die "needs root to $1: run this as root, or install sudo"
    fi
}

# apt WHY ARGUMENT...: apt-get, which is heard only when it fails.
apt() {
    local said status=0
    # Asked before anything is hidden: this may be where it ends.
    as_root "$1" true || return
    said=$(mktemp)
    # Noninteractive by env, since sudo drops variables; the lock is waited for, as unattended-upgrades may hold it.
    as_root "$1" env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 "${@:2}" \
        </dev/null >"$said" 2>&1 || status=$?
    ((status == 0)) || cat "$said" >&2
    rm -f "$said"
    return "$status"
}

# Installs packages and nothing beyond: what is already there is neither upgraded nor removed.
install_packages() {
    have apt-get || die "not a Debian system: install the equivalents of: $*"
    echo "installing: $*"
    apt "install $*" update || die "apt-get update failed: check the network and /etc/apt/sources.list"
    apt "install $*" install -y --no-install-recommends --no-upgrade --no-remove "$@" ||
        die "could not install: $*: see apt-get's message above"
}

# Whether apt-get can install a package. (`apt-cache show` is content with one that others only mention.)
is_offered() {
    [[ $(LC_ALL=C apt-cache policy "$1" 2>/dev/null) =~ 'Candidate: '[^\(] ]]
}

# need COMMAND=PACKAGE...: installs the packages whose command is missing, in one go. Asking for commands,
# not packages, leaves a hand-built or backported tool alone.
need() {
    local pair missing=()
    for pair; do
        # One package may have several of them.
        have "${pair%%=*}" || [[ " ${missing[*]} " == *" ${pair#*=} "* ]] || missing+=("${pair#*=}")
    done
    # The linker alone does not do: gcc without libc6-dev is a common half.
    [[ $(cc -print-file-name=crt1.o 2>/dev/null) == /* ]] || missing+=(gcc libc6-dev)
    ((${#missing[@]} == 0)) || install_packages "${missing[@]}"
}

# Whether the cargo in PATH runs and is at least version $1.
cargo_is_at_least() {
    local version
    version=$(cargo --version 2>/dev/null | cut -d' ' -f2) || return 1
    [[ $(printf '%s\n' "$1" "$version" | sort -V | head -n1) == "$1" ]]
}

# Makes `cargo` one that can build this. A toolchain is added beside the user's own, never put in its place.
need_rust() {
    local msrv
    msrv=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' Cargo.toml)
    cargo_is_at_least "$msrv" && return
    # Debian 12 and 13 have a cargo that is too old; 13 has rustup. It and Debian's cargo exclude each other.
    if ! have rustup && ! have cargo && have apt-get; then
        # A new machine may not know yet what there is.
        is_offered rustup || apt 'ask for rustup' update || true
        ! is_offered rustup || install_packages rustup ca-certificates
    fi
    have rustup || die "needs Rust $msrv or newer (Debian's is older): install it from https://rustup.rs, then run this again"
    rustup toolchain install "$msrv" --profile minimal --component clippy,rustfmt --no-self-update ||
        die "rustup could not install Rust $msrv: check the network"
    export RUSTUP_TOOLCHAIN=$msrv
    # Ahead of any older cargo in PATH.
    PATH="$(dirname "$(rustup which cargo)"):$PATH"
    cargo_is_at_least "$msrv" || die "needs Rust $msrv or newer: run 'rustup update', then run this again"
}

# Has cargo run the tests as root: built as you, run as root, since they mount loop devices.
tests_as_root() {
    local host
    ((EUID == 0)) && return
    have sudo || die "the tests mount loop devices and need root: run this as root, or install sudo"
    host=$(rustc -vV | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')
    export "CARGO_TARGET_${host}_RUNNER=sudo -E"
}

need_fuse() {
    [[ -c /dev/fuse ]] ||
        die "no /dev/fuse: run 'modprobe fuse' as root, or in a container add --device /dev/fuse --cap-add SYS_ADMIN"
}
