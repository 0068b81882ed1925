# shellcheck shell=bash
# A Ceph cluster of one node for contrib/interop, and a QEMU that speaks to it. Source it. The cluster is one monitor
# and one OSD, which keeps its data in a file; both listen on loopback and ask for keys. It lies in the current
# directory, and is found there by CEPH_CONF. There is no manager: nothing but statistics needs one.

monitor=''
osd=''

# Ceph's programs wait for their cluster for ever.
in_time() {
    timeout --kill-after=5 60 "$@"
}

a_free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# write_ceph_conf FSID ADDRESS: everything below $PWD, one copy of each object.
write_ceph_conf() {
    cat >ceph.conf <<CONF
[global]
fsid = $1
mon host = $2
public network = 127.0.0.0/8
cluster network = 127.0.0.0/8
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = $PWD/keyring
run dir = $PWD
pid file = $PWD/\$name.pid
log file = $PWD/\$name.log
osd pool default size = 1
osd pool default min size = 1
osd crush chooseleaf type = 0
[mon]
admin socket = $PWD/\$name.asok
mon data = $PWD/mon
mon allow pool size one = true
# The host's own room is its own matter.
mon data avail warn = 0
mon data avail crit = 0
[osd]
admin socket = $PWD/\$name.asok
osd data = $PWD/osd
osd objectstore = bluestore
bluestore block size = 1073741824
CONF
}

# Starts the cluster, with a pool named `pool` in it. For `check`, so every command says itself what it failed at.
start_ceph() {
    local fsid address uuid
    fsid=$(</proc/sys/kernel/random/uuid)
    uuid=$(</proc/sys/kernel/random/uuid)
    address="v2:127.0.0.1:$(a_free_port)"
    write_ceph_conf "$fsid" "$address"
    ceph-authtool --create-keyring keyring --gen-key -n mon. --cap mon 'allow *' &&
        ceph-authtool keyring --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' &&
        ceph-authtool keyring --gen-key -n osd.0 --cap mon 'allow profile osd' --cap osd 'allow *' &&
        monmaptool --create --fsid "$fsid" --addv a "[$address]" monmap &&
        ceph-mon --mkfs -i a --monmap monmap --keyring keyring || return
    ceph-mon -f -i a >mon.out 2>&1 &
    monitor=$!
    mkdir osd && in_time ceph osd new "$uuid" &&
        in_time ceph-osd -i 0 --mkfs --osd-uuid "$uuid" || return
    ceph-osd -f -i 0 >osd.out 2>&1 &
    osd=$!
    # These wait for the OSD.
    in_time ceph osd pool create pool 8 && in_time rbd pool init pool
}

# Ends the cluster at once, also one that is stopped. Nobody needs its data any more.
end_ceph() {
    local daemon
    for daemon in $osd $monitor; do
        kill -KILL "$daemon" 2>/dev/null || true
        wait "$daemon" 2>/dev/null || true
    done
    osd='' monitor=''
}

# unpack_qemu DIR: unpacks QEMU's tools with their driver for Ceph below DIR, both of one version: a QEMU loads no
# drivers of another one, and the one that is installed stays as it is.
unpack_qemu() {
    local version package
    version=$(apt-cache policy qemu-block-extra | sed -n 's/^  Candidate: //p')
    mkdir -p "$1"
    # As root, in a directory that apt's own user cannot enter.
    (cd "$1" && apt-get -q -o APT::Sandbox::User=root download \
        "qemu-utils=$version" "qemu-block-extra=$version") || return
    for package in "$1"/*.deb; do
        dpkg -x "$package" "$1" || return
    done
    "$1/usr/bin/qemu-nbd" --version
}
