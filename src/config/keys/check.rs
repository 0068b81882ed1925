//! Checks for combinations of keys.

use super::key::DiskKey;
use crate::config::raw_value::RawValue;
use crate::config::{
    DirectIo, DiskMode, DiskSource, DiskSpec, Flow, Format, OverlayKind, Partitions, Passthrough,
    Protocol, SinkSpec, SourcePart, SpecError,
};

/// Refuses `offset=` and `len=` beside `partition=`, since the partition table gives both.
pub(super) fn check_part(seen: &[(&'static DiskKey, &RawValue)]) -> Result<(), SpecError> {
    let has = |name: &str| seen.iter().any(|(key, _)| key.name == name);
    let other = ["offset", "len"].into_iter().find(|name| has(name));
    match other.filter(|_| has("partition")) {
        Some(other) => {
            let why = format!("is there beside {other}=, and says both by itself: drop one");
            Err(SpecError::key("partition", why))
        }
        None => Ok(()),
    }
}

/// Checks a reflink overlay: it is a whole file that shares its blocks with another whole file.
pub(super) fn check_reflink(disk: &DiskSpec) -> Result<(), SpecError> {
    if disk.overlay_kind != OverlayKind::Reflink {
        return Ok(());
    }
    let refused = |name, why| Err(SpecError::key(name, why));
    if matches!(disk.source, DiskSource::Remote(_)) {
        let why = "is for files of this host, and this image is on a server: drop it";
        return refused("reflink", why);
    }
    if !matches!(disk.source, DiskSource::File(_)) {
        return refused("reflink", "is for files, and this disk is blank: drop it");
    }
    if disk.part != SourcePart::Whole {
        return refused("reflink", "is for whole files, and this disk is a part of one: drop it");
    }
    if disk.partitions == Partitions::Shown {
        let why = "is not for reflink, whose bytes the kernel reads and writes itself: drop one";
        return refused("partitions", why);
    }
    if disk.overlay.is_none() {
        return refused("reflink", "needs a place to stay: write overlay=DIR,reflink");
    }
    if disk.block.is_some() {
        return refused("block", "is not for reflink, which takes the host's blocks: drop it");
    }
    if disk.limit.is_some() {
        return refused("limit", "is not for reflink, whose space the host counts: drop it");
    }
    Ok(())
}

/// Checks passthrough: only a disk that is one whole file can be passed through.
pub(super) fn check_passthrough(disk: &DiskSpec) -> Result<(), SpecError> {
    if disk.passthrough == Passthrough::Off {
        return Ok(());
    }
    let refused = |why| Err(SpecError::key("passthrough", why));
    if disk.mode == DiskMode::Cow {
        return refused(
            "is for mode=ro and mode=rw, and this disk has an overlay: drop it, or make the \
             overlay one with reflink",
        );
    }
    if disk.part != SourcePart::Whole {
        return refused("is for whole files, and this disk is a part of one: drop it");
    }
    if disk.partitions == Partitions::Shown {
        return refused("does not go with partitions, which the kernel would pass by: drop one");
    }
    Ok(())
}

/// Checks direct I/O: only for files that the daemon itself reads and writes, and only for raw
/// ones.
pub(super) fn check_direct(disk: &DiskSpec) -> Result<(), SpecError> {
    if disk.direct == DirectIo::Off {
        return Ok(());
    }
    let refused = |why| Err(SpecError::key("direct", why));
    if matches!(disk.source, DiskSource::Remote(_)) {
        return refused("is for files of this host, and this image is on a server: drop it");
    }
    if disk.overlay_kind == OverlayKind::Reflink {
        return refused(
            "is not for reflink, whose bytes the kernel reads and writes itself: drop one",
        );
    }
    if disk.passthrough == Passthrough::On {
        return refused(
            "is not for passthrough, where the kernel reads and writes by itself: drop one",
        );
    }
    if disk.format.is_some_and(|format| format != Format::Raw) {
        return refused("is for raw bases: drop it, or convert the base with qemu-img");
    }
    Ok(())
}

/// Checks that a stream has exactly one direction.
pub(super) fn check_flow(
    disk: &DiskSpec,
    seen: &[(&'static DiskKey, &RawValue)],
) -> Result<(), SpecError> {
    let flows = seen.iter().filter(|(key, _)| key.is_flow()).count();
    match (&disk.source, flows) {
        (DiskSource::Stream(_), 0) => Err(SpecError::Missing(
            "a stream needs to=SINK or from=SOURCE: see cowslip mount --help",
        )),
        (DiskSource::Stream(_), 2) => {
            Err(SpecError::key("from", "is there beside to=: a stream flows one way, drop one"))
        }
        _ => Ok(()),
    }
}

/// Checks keys of a stream that depend on other keys.
pub(super) fn check_stream(
    disk: &DiskSpec,
    seen: &[(&'static DiskKey, &RawValue)],
) -> Result<(), SpecError> {
    let DiskSource::Stream(stream) = &disk.source else {
        return Ok(());
    };
    let has = |name: &str| seen.iter().any(|(key, _)| key.name == name);
    let measures = stream.flow == Flow::Out(SinkSpec::Measure);
    if has("spill-compress") && !has("spill") && !measures {
        return Err(SpecError::key(
            "spill-compress",
            "needs spill=SIZE: without it nothing spills",
        ));
    }
    if has("frames") && measures {
        return Err(SpecError::key(
            "frames",
            "has no use with to=measure:, which sends nothing: drop it",
        ));
    }
    Ok(())
}

/// Checks the files of an encrypted connection.
pub(super) fn check_tls(disk: &DiskSpec) -> Result<(), SpecError> {
    let DiskSource::Remote(remote) = &disk.source else { return Ok(()) };
    let files =
        [("tls-ca", &remote.tls_ca), ("tls-cert", &remote.tls_cert), ("tls-key", &remote.tls_key)];
    let given = files.iter().find(|(_, file)| file.is_some());
    match (given, remote.tls_cert.is_some(), remote.tls_key.is_some()) {
        (Some((key, _)), ..) if !remote.address.is_encrypted() => {
            let why = "is for nbds:// and https://, and this connection is not encrypted: drop it";
            Err(SpecError::key(*key, why))
        }
        (_, true, false) => Err(SpecError::key("tls-cert", "needs tls-key= beside it")),
        (_, false, true) => Err(SpecError::key("tls-key", "needs tls-cert= beside it")),
        _ => Ok(()),
    }
}

/// Checks what only HTTP has, and what it has not.
pub(super) fn check_protocol(disk: &DiskSpec) -> Result<(), SpecError> {
    let DiskSource::Remote(remote) = &disk.source else { return Ok(()) };
    match remote.address.protocol() {
        Protocol::Nbd if remote.auth.is_some() => {
            Err(SpecError::key("auth", "is for http:// and https://: drop it"))
        }
        Protocol::Nbd if remote.bmap.is_some() => {
            let why = "is for http:// and https://, and an NBD server tells holes itself: drop it";
            Err(SpecError::key("bmap", why))
        }
        Protocol::Http if remote.bmap.is_some() && disk.format.is_some_and(is_not_raw) => {
            let why = "is of a raw image, and this one is of another format: drop one of them";
            Err(SpecError::key("bmap", why))
        }
        Protocol::Http if disk.mode == DiskMode::ReadWrite => {
            let address = &remote.address;
            let why = format!(
                "is not for {address}, which is only read: drop it, and changes stay in an overlay"
            );
            Err(SpecError::key("mode=rw", why))
        }
        Protocol::Nbd | Protocol::Http => Ok(()),
    }
}

fn is_not_raw(format: Format) -> bool {
    format != Format::Raw
}

/// Checks the mode of a blank disk, which has no base to read or write.
pub(super) fn check_mode(disk: &DiskSpec) -> Result<(), SpecError> {
    match (&disk.source, disk.mode) {
        (DiskSource::File(_) | DiskSource::Remote(_) | DiskSource::Stream(_), _)
        | (DiskSource::Blank(_), DiskMode::Cow) => Ok(()),
        (DiskSource::Blank(_), mode) => {
            let why = "is for files, and this disk is blank: drop it, a blank disk is mode=cow";
            Err(SpecError::key(format!("mode={mode}"), why))
        }
    }
}
