//! The table of keys, and the effect of each key on the spec.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::key::{DiskKey, KeyScope, KeySetter, Switch};
use crate::config::raw_value::absolute;
use crate::config::{
    AuthSource, BmapSource, CommandLineError, DirectIo, DiskMode, DiskSpec, FinishWhen, Flow,
    Locking, OverlayKind, Overwrite, Pad, Partitions, Passthrough, RemoteSpec, Resize, SinkSpec,
    SourcePart, SpecError, SpillCompression, Spool, StreamFrames, StreamSpec, error, flow,
    is_block_size, split_command,
};

/// Every key.
pub(super) static KEYS: &[DiskKey] = &[
    row("overlay", KeyScope::Cow, "DIR", KeySetter::Path(|disk, path| disk.overlay = Some(path))),
    row("reflink", KeyScope::Cow, "on|off", KeySetter::Switch(set_reflink)),
    // A blank disk accepts `mode=cow`; `check_mode` refuses the other modes.
    row("mode", KeyScope::Disks, "cow|ro|rw", KeySetter::Word(set_mode)),
    row("format", KeyScope::Files, "raw|qcow2|...", KeySetter::Word(set_format)),
    row("block", KeyScope::Cow, "4K", KeySetter::Size(set_block)),
    row(
        "limit",
        KeyScope::Cow,
        "SIZE",
        KeySetter::Size(|disk, size| set_some(&mut disk.limit, size)),
    ),
    row(
        "size",
        KeyScope::Cow,
        "SIZE",
        KeySetter::Size(|disk, size| set_some(&mut disk.size, size)),
    ),
    row("resize", KeyScope::Cow, "on|off", KeySetter::Switch(set_resize)),
    row(
        "cow-on-read",
        KeyScope::Cow,
        "on|off",
        KeySetter::Switch(|disk, switch| {
            disk.copy_up.read = switch == Switch::On;
        }),
    ),
    row(
        "cow-on-cache",
        KeyScope::Cow,
        "on|off",
        KeySetter::Switch(|disk, switch| {
            disk.copy_up.cache = switch == Switch::On;
        }),
    ),
    row("uid", KeyScope::All, "1000", KeySetter::Id(|disk, id| disk.uid = Some(id))),
    row("gid", KeyScope::All, "1000", KeySetter::Id(|disk, id| disk.gid = Some(id))),
    row("perm", KeyScope::All, "0644", KeySetter::Perm(|disk, perm| disk.perm = Some(perm))),
    row("lock", KeyScope::HostFiles, "on|off", KeySetter::Switch(set_lock)),
    row("passthrough", KeyScope::HostFiles, "on|off", KeySetter::Switch(set_passthrough)),
    row("direct", KeyScope::Disks, "on|off", KeySetter::Switch(set_direct)),
    row("offset", KeyScope::Files, "1M", KeySetter::Size(set_offset)),
    row("len", KeyScope::Files, "4G", KeySetter::Size(set_len)),
    row(
        "partition",
        KeyScope::Files,
        "1",
        KeySetter::Ordinal(|disk, number| disk.part = SourcePart::Partition(number)),
    ),
    row("partitions", KeyScope::Disks, "on|off", KeySetter::Switch(set_partitions)),
    row("fetch", KeyScope::Remote, "256K", KeySetter::RemoteSize(set_fetch)),
    row("ahead", KeyScope::Remote, "16M", KeySetter::RemoteSize(set_ahead)),
    row("conns", KeyScope::Remote, "8", KeySetter::RemoteOrdinal(set_conns)),
    row(
        "read-cache",
        KeyScope::Remote,
        "DIR",
        KeySetter::RemotePath(|remote, dir| {
            remote.read_cache = Some(dir);
        }),
    ),
    row(
        "trace",
        KeyScope::Remote,
        "FILE",
        KeySetter::RemotePath(|remote, file| {
            remote.trace = Some(file);
        }),
    ),
    row("prefetch-rate", KeyScope::Remote, "20M", KeySetter::RemoteSize(set_prefetch_rate)),
    row(
        "tls-ca",
        KeyScope::Remote,
        "FILE",
        KeySetter::RemotePath(|remote, file| {
            remote.tls_ca = Some(file);
        }),
    ),
    row(
        "tls-cert",
        KeyScope::Remote,
        "FILE",
        KeySetter::RemotePath(|remote, file| {
            remote.tls_cert = Some(file);
        }),
    ),
    row(
        "tls-key",
        KeyScope::Remote,
        "FILE",
        KeySetter::RemotePath(|remote, file| {
            remote.tls_key = Some(file);
        }),
    ),
    row("auth", KeyScope::Remote, "FILE|cmd:COMMAND", KeySetter::RemoteText(set_auth)),
    row("bmap", KeyScope::Remote, "FILE|URL", KeySetter::RemoteText(set_bmap)),
    row("read-cache-size", KeyScope::Remote, "4G", KeySetter::RemoteSize(set_cache_size)),
    // The direction is the first key of a stream: the others depend on it.
    row("to", KeyScope::Streams, SINK_FORMS, KeySetter::Flow(flow::parse_to)),
    row("from", KeyScope::Streams, SOURCE_FORMS, KeySetter::Flow(flow::parse_from)),
    row(
        "window",
        KeyScope::Outputs,
        "64M",
        KeySetter::StreamSize(|stream, size| stream.window = size),
    ),
    row(
        "read-window",
        KeyScope::Streams,
        "64M",
        KeySetter::StreamSize(|stream, size| {
            stream.read_window = size;
        }),
    ),
    row(
        "spill",
        KeyScope::Outputs,
        "1G",
        KeySetter::StreamSize(|stream, size| stream.spill = Some(size)),
    ),
    row(
        "spill-compress",
        KeyScope::Outputs,
        "on|off|lz4",
        KeySetter::StreamSwitchWord(set_compress),
    ),
    row("finish", KeyScope::Outputs, "explicit|umount|close", KeySetter::StreamWord(set_finish)),
    row("pad", KeyScope::Outputs, "on|off", KeySetter::StreamSwitch(set_pad)),
    row("frames", KeyScope::Outputs, "raw|rbd", KeySetter::StreamWord(set_frames)),
    row("overwrite", KeyScope::Outputs, "on|off", KeySetter::StreamSwitch(set_overwrite)),
    row("spool", KeyScope::Inputs, "on|off", KeySetter::StreamSwitch(set_spool)),
];

/// The forms of a value of `to=`.
const SINK_FORMS: &str = "fifo:PATH, file:PATH, cmd:COMMAND, stdout or measure:";

/// The forms of a value of `from=`.
const SOURCE_FORMS: &str = "fifo:PATH, file:PATH, cmd:COMMAND or stdin";

const fn row(name: &'static str, scope: KeyScope, sample: &'static str, set: KeySetter) -> DiskKey {
    DiskKey { name, scope, set, sample }
}

fn set_some(field: &mut Option<u64>, size: u64) -> Result<(), SpecError> {
    *field = Some(size);
    Ok(())
}

fn set_mode(disk: &mut DiskSpec, text: &str) -> Result<(), SpecError> {
    disk.mode = error::parse_choice("mode", text, DiskMode::NAMES)?;
    Ok(())
}

fn set_format(disk: &mut DiskSpec, text: &str) -> Result<(), SpecError> {
    disk.format = Some(text.parse()?);
    Ok(())
}

fn set_block(disk: &mut DiskSpec, size: u64) -> Result<(), SpecError> {
    let block = u32::try_from(size).ok().filter(|block| is_block_size(*block));
    if block.is_none() {
        let wanted = "a block size: take a power of two from 512 to 2M, as in 4K or 64K";
        return Err(SpecError::value(size.to_string(), wanted));
    }
    disk.block = block;
    Ok(())
}

fn set_offset(disk: &mut DiskSpec, offset: u64) -> Result<(), SpecError> {
    // The smallest sector size: nothing on a disk starts in the middle of a sector.
    if !offset.is_multiple_of(512) {
        let wanted = "an offset: take a multiple of 512, as in 1M";
        return Err(SpecError::value(offset.to_string(), wanted));
    }
    let len = match disk.part {
        SourcePart::Bytes { len, .. } => len,
        SourcePart::Whole | SourcePart::Partition(_) => None,
    };
    disk.part = SourcePart::Bytes { offset, len };
    Ok(())
}

fn set_len(disk: &mut DiskSpec, len: u64) -> Result<(), SpecError> {
    if len == 0 {
        return Err(SpecError::value("0", "a length: take one byte or more, or drop it"));
    }
    let offset = match disk.part {
        SourcePart::Bytes { offset, .. } => offset,
        SourcePart::Whole | SourcePart::Partition(_) => 0,
    };
    disk.part = SourcePart::Bytes { offset, len: Some(len) };
    Ok(())
}

fn set_fetch(remote: &mut RemoteSpec, size: u64) -> Result<(), SpecError> {
    if !size.is_power_of_two() || !(4 << 10..=4 << 20).contains(&size) {
        let wanted = "an amount to fetch: take a power of two from 4K to 4M, as in 256K";
        return Err(SpecError::value(size.to_string(), wanted));
    }
    remote.fetch = size;
    Ok(())
}

fn set_ahead(remote: &mut RemoteSpec, size: u64) -> Result<(), SpecError> {
    if size > 1 << 30 {
        let wanted = "an amount to read ahead: take 0 to 1G, as in 16M";
        return Err(SpecError::value(size.to_string(), wanted));
    }
    remote.ahead = size;
    Ok(())
}

fn set_prefetch_rate(remote: &mut RemoteSpec, rate: u64) -> Result<(), SpecError> {
    if rate < 4 << 10 {
        let wanted = "a number of bytes a second: take 4K or more, as in 20M";
        return Err(SpecError::value(rate.to_string(), wanted));
    }
    remote.prefetch_rate = rate;
    Ok(())
}

fn set_conns(remote: &mut RemoteSpec, count: u32) -> Result<(), SpecError> {
    if count > 64 {
        return Err(SpecError::value(count.to_string(), "a number of connections: take 1 to 64"));
    }
    remote.conns = count;
    Ok(())
}

fn set_auth(remote: &mut RemoteSpec, value: &OsStr, dir: &Path) -> Result<(), SpecError> {
    let Some(line) = value.as_bytes().strip_prefix(b"cmd:") else {
        remote.auth = Some(AuthSource::File(absolute(value, dir)?));
        return Ok(());
    };
    let mut programs = split_command(OsStr::from_bytes(line))
        .map_err(|fault| {
            SpecError::Missing(match fault {
                CommandLineError::NeedsShell => "cowslip runs no shell; write auth=cmd:sh -c '...'",
                CommandLineError::Unterminated => {
                    "a quote or a backslash has no end in the command"
                }
                CommandLineError::NoProgram => {
                    "a program is missing: write auth=cmd:COMMAND [ARG]..."
                }
            })
        })?
        .0;
    let (Some(words), true) = (programs.pop(), programs.is_empty()) else {
        let why = "one program prints the header lines: write auth=cmd:sh -c '...' for several";
        return Err(SpecError::Missing(why));
    };
    remote.auth = Some(AuthSource::Command(words));
    dir.clone_into(&mut remote.dir);
    Ok(())
}

fn set_bmap(remote: &mut RemoteSpec, text: &OsStr, dir: &Path) -> Result<(), SpecError> {
    remote.bmap = Some(BmapSource::parse(text, dir)?);
    Ok(())
}

fn set_cache_size(remote: &mut RemoteSpec, size: u64) -> Result<(), SpecError> {
    if size < 64 << 20 {
        let wanted = "a size for a cache: take 64M or more, as in 4G";
        return Err(SpecError::value(size.to_string(), wanted));
    }
    remote.read_cache_size = size;
    Ok(())
}

fn set_partitions(disk: &mut DiskSpec, switch: Switch) {
    disk.partitions = match switch {
        Switch::On => Partitions::Shown,
        Switch::Off => Partitions::Hidden,
    };
}

fn set_reflink(disk: &mut DiskSpec, switch: Switch) {
    disk.overlay_kind = match switch {
        Switch::On => OverlayKind::Reflink,
        Switch::Off => OverlayKind::Blocks,
    };
}

fn set_passthrough(disk: &mut DiskSpec, switch: Switch) {
    disk.passthrough = match switch {
        Switch::On => Passthrough::On,
        Switch::Off => Passthrough::Off,
    };
}

fn set_direct(disk: &mut DiskSpec, switch: Switch) {
    disk.direct = match switch {
        Switch::On => DirectIo::On,
        Switch::Off => DirectIo::Off,
    };
}

fn set_resize(disk: &mut DiskSpec, switch: Switch) {
    disk.resize = match switch {
        Switch::On => Resize::Follow,
        Switch::Off => Resize::Fixed,
    };
}

fn set_lock(disk: &mut DiskSpec, switch: Switch) {
    disk.locking = match switch {
        Switch::On => Locking::Qemu,
        Switch::Off => Locking::Off,
    };
}

fn set_compress(stream: &mut StreamSpec, text: &str) -> Result<(), SpecError> {
    stream.compress = error::parse_choice("compression", text, SpillCompression::NAMES)?;
    Ok(())
}

fn set_finish(stream: &mut StreamSpec, text: &str) -> Result<(), SpecError> {
    stream.finish = error::parse_choice("end", text, FinishWhen::NAMES)?;
    Ok(())
}

fn set_frames(stream: &mut StreamSpec, text: &str) -> Result<(), SpecError> {
    // For formats that a stream cannot produce, say how to get one instead.
    let why = match text {
        "android-sparse" => {
            "puts the number of its chunks before them, which a stream knows only at its end: write \
             to=file:PATH, then run img2simg PATH OUT"
        }
        "tar" => {
            "puts the map of all holes before the data, which a stream knows only at its end: write \
             to=file:PATH, then run tar -S -cf OUT PATH"
        }
        _ => {
            stream.frames = error::parse_choice("frames", text, StreamFrames::NAMES)?;
            return Ok(());
        }
    };
    Err(SpecError::key(text, why))
}

fn set_pad(stream: &mut StreamSpec, switch: Switch) -> Result<(), SpecError> {
    stream.pad = match switch {
        Switch::On => Pad::Size,
        Switch::Off => Pad::Highest,
    };
    Ok(())
}

fn set_overwrite(stream: &mut StreamSpec, switch: Switch) -> Result<(), SpecError> {
    let Flow::Out(SinkSpec::File { overwrite, .. }) = &mut stream.flow else {
        return Err(SpecError::key("overwrite", "is for to=file:PATH: drop it"));
    };
    *overwrite = match switch {
        Switch::On => Overwrite::Yes,
        Switch::Off => Overwrite::No,
    };
    Ok(())
}

fn set_spool(stream: &mut StreamSpec, switch: Switch) -> Result<(), SpecError> {
    if let Flow::In { spool, .. } = &mut stream.flow {
        *spool = match switch {
            Switch::On => Spool::On,
            Switch::Off => Spool::Off,
        };
    }
    Ok(())
}
