//! Every key there is, and what each does to the spec.

use super::{For, Key, Set, Switch};
use crate::spec::{
    Compress, Direct, DiskSpec, FinishWhen, Flow, Frames, Locking, Mode, OverlayKind, Overwrite,
    Pad, Part, Partitions, Passthrough, Resize, SpecError, Spool, StreamSpec, Target, error, flow,
};

/// Every key there is.
pub(super) static KEYS: &[Key] = &[
    row("overlay", For::Cow, "DIR", Set::Path(|disk, path| disk.overlay = Some(path))),
    row("reflink", For::Cow, "on|off", Set::Switch(set_reflink)),
    // A blank disk takes `mode=cow` too; `check_mode` refuses it the others.
    row("mode", For::All, "cow|ro|rw", Set::Word(set_mode)),
    row("format", For::Files, "raw|qcow2|...", Set::Word(set_format)),
    row("block", For::Cow, "4K", Set::Size(set_block)),
    row("limit", For::Cow, "SIZE", Set::Size(|disk, size| some(&mut disk.limit, size))),
    row("size", For::Cow, "SIZE", Set::Size(|disk, size| some(&mut disk.size, size))),
    row("resize", For::Cow, "on|off", Set::Switch(set_resize)),
    row(
        "cow-on-read",
        For::Cow,
        "on|off",
        Set::Switch(|disk, switch| {
            disk.copy_up.read = switch == Switch::On;
        }),
    ),
    row(
        "cow-on-cache",
        For::Cow,
        "on|off",
        Set::Switch(|disk, switch| {
            disk.copy_up.cache = switch == Switch::On;
        }),
    ),
    row("uid", For::All, "1000", Set::Id(|disk, id| disk.uid = Some(id))),
    row("gid", For::All, "1000", Set::Id(|disk, id| disk.gid = Some(id))),
    row("perm", For::All, "0644", Set::Perm(|disk, perm| disk.perm = Some(perm))),
    row("lock", For::Files, "on|off", Set::Switch(set_lock)),
    row("passthrough", For::Files, "on|off", Set::Switch(set_passthrough)),
    row("direct", For::Disks, "on|off", Set::Switch(set_direct)),
    row("offset", For::Files, "1M", Set::Size(set_offset)),
    row("len", For::Files, "4G", Set::Size(set_len)),
    row(
        "partition",
        For::Files,
        "1",
        Set::Ordinal(|disk, number| disk.part = Part::Partition(number)),
    ),
    row("partitions", For::Disks, "on|off", Set::Switch(set_partitions)),
    // First of a stream's: the others depend on its direction.
    row("to", For::Streams, SINKS, Set::Flow(flow::to)),
    row("from", For::Streams, SOURCES, Set::Flow(flow::from)),
    row("window", For::Outputs, "64M", Set::StreamSize(|stream, size| stream.window = size)),
    row(
        "read-window",
        For::Streams,
        "64M",
        Set::StreamSize(|stream, size| {
            stream.read_window = size;
        }),
    ),
    row("spill", For::Outputs, "1G", Set::StreamSize(|stream, size| stream.spill = Some(size))),
    row("spill-compress", For::Outputs, "on|off|lz4", Set::StreamWord(set_compress)),
    row("finish", For::Outputs, "explicit|umount|close", Set::StreamWord(set_finish)),
    row("pad", For::Outputs, "on|off", Set::StreamSwitch(set_pad)),
    row("frames", For::Outputs, "raw|rbd", Set::StreamWord(set_frames)),
    row("overwrite", For::Outputs, "on|off", Set::StreamSwitch(set_overwrite)),
    row("spool", For::Inputs, "on|off", Set::StreamSwitch(set_spool)),
];

/// What `to=` takes.
const SINKS: &str = "fifo:PATH, file:PATH, cmd:COMMAND, stdout or measure:";

/// What `from=` takes.
const SOURCES: &str = "fifo:PATH, file:PATH, cmd:COMMAND or stdin";

pub(super) const fn row(name: &'static str, applies: For, sample: &'static str, set: Set) -> Key {
    Key { name, applies, set, sample }
}

fn some(field: &mut Option<u64>, size: u64) -> Result<(), SpecError> {
    *field = Some(size);
    Ok(())
}

fn set_mode(disk: &mut DiskSpec, text: &str) -> Result<(), SpecError> {
    disk.mode = error::choose("mode", text, Mode::NAMES)?;
    Ok(())
}

fn set_format(disk: &mut DiskSpec, text: &str) -> Result<(), SpecError> {
    disk.format = Some(text.parse()?);
    Ok(())
}

fn set_block(disk: &mut DiskSpec, size: u64) -> Result<(), SpecError> {
    // 512 is the smallest sector, 2 MiB the largest page and qcow2's largest cluster.
    let block = u32::try_from(size).ok().filter(|block| block.is_power_of_two());
    let block = block.filter(|block| (512..=2 << 20).contains(block));
    if block.is_none() {
        let wanted = "a block size: take a power of two from 512 to 2M, as in 4K or 64K";
        return Err(SpecError::value(size.to_string(), wanted));
    }
    disk.block = block;
    Ok(())
}

fn set_offset(disk: &mut DiskSpec, offset: u64) -> Result<(), SpecError> {
    // The smallest sector: nothing on a disk begins between two of them.
    if !offset.is_multiple_of(512) {
        let wanted = "an offset: take a multiple of 512, as in 1M";
        return Err(SpecError::value(offset.to_string(), wanted));
    }
    let len = match disk.part {
        Part::Bytes { len, .. } => len,
        Part::Whole | Part::Partition(_) => None,
    };
    disk.part = Part::Bytes { offset, len };
    Ok(())
}

fn set_len(disk: &mut DiskSpec, len: u64) -> Result<(), SpecError> {
    if len == 0 {
        return Err(SpecError::value("0", "a length: take one byte or more, or drop it"));
    }
    let offset = match disk.part {
        Part::Bytes { offset, .. } => offset,
        Part::Whole | Part::Partition(_) => 0,
    };
    disk.part = Part::Bytes { offset, len: Some(len) };
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
        Switch::On => Direct::On,
        Switch::Off => Direct::Off,
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
    stream.compress = error::choose("compression", text, Compress::NAMES)?;
    Ok(())
}

fn set_finish(stream: &mut StreamSpec, text: &str) -> Result<(), SpecError> {
    stream.finish = error::choose("end", text, FinishWhen::NAMES)?;
    Ok(())
}

fn set_frames(stream: &mut StreamSpec, text: &str) -> Result<(), SpecError> {
    // Formats that a stream cannot have are better answered with the way that there is.
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
            stream.frames = error::choose("frames", text, Frames::NAMES)?;
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
    let Flow::Out(Target::File { overwrite, .. }) = &mut stream.flow else {
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
