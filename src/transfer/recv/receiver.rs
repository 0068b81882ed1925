//! The file or device being received, from its first byte until it gets its name.

use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::super::destination::FileOwner;
use super::super::old_copy;
use super::super::source::TransferSource;
use super::super::state::{ReceiveState, STATE_SUFFIX, StateWriter};
use super::super::target_writer::{TargetKind, TargetWriter, device_size};
use super::super::{TransferError, TransferFormat, TransferProgress};
use super::head::StreamHead;
use super::preflight::{CheckedDestination, check_stream};
use super::{ReceivePlan, Received};
use crate::base::lock::OutputLock;
use crate::config::{Overwrite, format_size};
use crate::confined;
use crate::host::{os_error, os_message};
use crate::part_file::{FileSlot, PartFile, part_path};
use crate::trusted_path;
use rustix::fs::OFlags;

/// A file or a device being received.
pub(super) struct Receiver<'a> {
    pub(super) target: TargetWriter,
    /// The part and the writer of its state; `None` for a device.
    pub(super) part: Option<(PartFile, StateWriter)>,
    /// Keeps all disks off a device; `None` for a file.
    _device_lock: Option<OutputLock>,
    device_path: PathBuf,
    /// The owner and mode of the file that the part replaces; `None` without one.
    owner: Option<FileOwner>,
    overwrite: Overwrite,
    /// Whether ranges that are not written keep the content they had before.
    pub(super) keeps_old_content: bool,
    /// The most bytes of data to write.
    limit: u64,
    /// The state to store for the part; its offset is the last one that was verified.
    pub(super) state: ReceiveState,
    pub(super) progress: TransferProgress,
    pub(super) is_verified: bool,
    pub(super) on_progress: &'a mut dyn FnMut(&TransferProgress),
}

impl<'a> Receiver<'a> {
    /// Prepares `destination` for the stream that begins with `head`.
    pub(super) fn open(
        destination: CheckedDestination,
        plan: &ReceivePlan,
        head: &StreamHead,
        on_progress: &'a mut dyn FnMut(&TransferProgress),
    ) -> Result<Self, TransferError> {
        check_stream(plan, head, &destination)?;
        match destination {
            CheckedDestination::Device(path) => Self::open_device(path, plan, head, on_progress),
            CheckedDestination::File { name, owner, part, state } => {
                let part = match (part, state) {
                    (Some(part), Some(old)) => (resume_part(part, &old, head)?, old.overwrite),
                    (old, _) => (create_part(&name, old, owner.is_some())?, false),
                };
                let opened = Self::open_part(part, plan, head, on_progress)?;
                Ok(Self { owner, ..opened })
            }
        }
    }

    fn open_device(
        path: PathBuf,
        plan: &ReceivePlan,
        head: &StreamHead,
        on_progress: &'a mut dyn FnMut(&TransferProgress),
    ) -> Result<Self, TransferError> {
        // O_EXCL on a block device is the kernel's own lock: a device that is mounted or in use is
        // not overwritten.
        let open = || match trusted_path::locate(&path)? {
            it if it.metadata().file_type().is_block_device() => {
                it.open(OFlags::RDWR | OFlags::EXCL)
            }
            // The path was replaced since it was checked.
            _ => Err(os_error(libc::ESTALE)),
        };
        let file = open().map_err(|error| TransferError::host("write", &path, &error))?;
        let file = Arc::new(file);
        let lock = OutputLock::take(&file, &path)
            .map_err(|error| TransferError::Refused(error.to_string()))?;
        let size = device_size(&file, &path)?;
        if size < head.size {
            return Err(TransferError::Refused(format!(
                "'{}' has {size} bytes, and what arrives {}: use a larger device",
                path.display(),
                head.size
            )));
        }
        Ok(Self {
            target: TargetWriter::new(&file, TargetKind::Device),
            part: None,
            _device_lock: Some(lock),
            device_path: path,
            owner: None,
            overwrite: Overwrite::Yes,
            keeps_old_content: true,
            limit: plan.limit,
            state: head.state(),
            progress: TransferProgress { size: Some(head.size), ..TransferProgress::default() },
            is_verified: false,
            on_progress,
        })
    }

    /// Opens a part; `may_replace` is the setting of the receiver that began it.
    fn open_part(
        (part, may_replace): (PartFile, bool),
        plan: &ReceivePlan,
        head: &StreamHead,
        on_progress: &'a mut dyn FnMut(&TransferProgress),
    ) -> Result<Self, TransferError> {
        let origin = head.origin();
        let mut clean = origin;
        if let Some(path) = &plan.onto {
            // A pipe cannot serve as the old file, and opening one would block.
            confined::open_input(path, confined::FileAccess::Read)
                .map_err(|error| TransferError::host("read", path, &error))?;
            let source = TransferSource::open(path)?;
            old_copy::copy(&source, part.file(), origin)
                .map_err(|error| TransferError::host("copy", path, &error))?;
            clean = u64::MAX;
        }
        let failed = |error: io::Error| TransferError::host("write", part.path(), &error);
        let state_writer = StateWriter::start(part.slot(), part.file()).map_err(failed)?;
        let mut target = TargetWriter::new(part.file(), TargetKind::File { clean });
        if plan.frames != TransferFormat::Raw {
            target.set_size(head.size).map_err(failed)?;
        }
        let overwrite = may_replace || plan.overwrite == Overwrite::Yes;
        let inode = part.file().metadata().map_err(failed)?.ino();
        // Bytes that are sent again are written again, and count as verified only after that.
        let state = ReceiveState { inode, offset: origin, overwrite, ..head.state() };
        Ok(Self {
            target,
            _device_lock: None,
            device_path: PathBuf::new(),
            owner: None,
            overwrite: if overwrite { Overwrite::Yes } else { Overwrite::No },
            keeps_old_content: plan.onto.is_some(),
            limit: plan.limit,
            state,
            progress: TransferProgress {
                from: origin,
                reached: origin,
                size: Some(head.size),
                ..TransferProgress::default()
            },
            is_verified: false,
            part: Some((part, state_writer)),
            on_progress,
        })
    }

    /// Writes `range` in pieces; `read` fills the buffer with each piece.
    pub(super) fn write_data(
        &mut self,
        range: Range<u64>,
        buffer: &mut [u8],
        read: &mut dyn FnMut(&mut [u8]) -> io::Result<()>,
    ) -> Result<(), ReceiveError> {
        self.check_limit(range.end - range.start)?;
        let mut at = range.start;
        while at < range.end {
            let most = buffer.len() as u64;
            let len = usize::try_from((range.end - at).min(most)).unwrap_or(buffer.len());
            read(&mut buffer[..len]).map_err(ReceiveError::Stream)?;
            self.target.write(&buffer[..len], at).map_err(ReceiveError::Target)?;
            at += len as u64;
            self.progress.data += len as u64;
            self.progress.reached = at;
            (self.on_progress)(&self.progress);
        }
        Ok(())
    }

    /// Checks whether `len` more bytes of data may be written.
    pub(super) fn check_limit(&self, len: u64) -> Result<(), ReceiveError> {
        if self.progress.data.saturating_add(len) > self.limit {
            return Err(ReceiveError::Limit(self.limit));
        }
        Ok(())
    }

    /// Checks whether there is room for `len` bytes of data that the sender did not have to send.
    ///
    /// # Errors
    /// `ENOSPC`, before the first byte is written, if a file has no room for all of them.
    pub(super) fn check_space(&self, len: u64) -> Result<(), ReceiveError> {
        let Some((part, _)) = &self.part else { return Ok(()) };
        // If the file system does not report its free space, write as much as it accepts.
        let Ok(found) = rustix::fs::fstatvfs(&**part.file()) else { return Ok(()) };
        let held = part.file().metadata().map_or(0, |found| found.blocks().saturating_mul(512));
        let room = found.f_bavail.saturating_mul(found.f_frsize).saturating_add(held);
        if found.f_frsize > 0 && len > room {
            return Err(ReceiveError::Target(os_error(libc::ENOSPC)));
        }
        Ok(())
    }

    /// Writes zeros to `range`, as a hole.
    pub(super) fn write_zeros(&mut self, range: Range<u64>) -> Result<(), ReceiveError> {
        // A stream may repeat zeros without limit, so the count saturates.
        self.progress.holes = self.progress.holes.saturating_add(range.end - range.start);
        self.progress.reached = range.end;
        self.target.write_hole(range).map_err(ReceiveError::Target)
    }

    /// Completes the file after everything has arrived, or reports why `read` failed.
    pub(super) fn finish(
        mut self,
        read: Result<(), ReceiveError>,
    ) -> Result<Received, TransferError> {
        let (progress, is_verified) = (self.progress, self.is_verified);
        let path = match &self.part {
            Some((part, _)) => part.path().to_owned(),
            None => self.device_path.clone(),
        };
        let failed = |error: io::Error| TransferError::host("write", &path, &error);
        let Some((part, state_writer)) = self.part.take() else {
            read.map_err(|failed| explain(failed, &path, progress, &PartialResult::Device))?;
            self.target.sync().map_err(failed)?;
            return Ok(Received { progress, is_verified });
        };
        if let Err(broken) = read {
            // Also after a failure: the verified bytes stay and must be found by a later resume.
            let kept = state_writer.finish();
            let offset =
                ReceiveState::load(part.slot(), part.file()).map_or(0, |state| state.offset);
            kept.map_err(failed)?;
            return Err(explain(
                broken,
                &path,
                progress,
                &PartialResult::Part { name: part.name(), offset },
            ));
        }
        state_writer.finish().map_err(failed)?;
        self.target.flush_hole().map_err(failed)?;
        commit_as(self.owner, &part, self.overwrite)?;
        ReceiveState::remove(part.slot()).map_err(|error| {
            let state = path.with_file_name(part.slot().with_suffix(STATE_SUFFIX));
            TransferError::host("remove", &state, &error)
        })?;
        Ok(Received { progress, is_verified })
    }
}

/// Prepares the part described by `old` for a stream that continues it.
fn resume_part(
    part: PartFile,
    old: &ReceiveState,
    head: &StreamHead,
) -> Result<PartFile, TransferError> {
    let failed = |error: io::Error| TransferError::host("write", part.path(), &error);
    if head.origin() < old.offset {
        ReceiveState::remove(part.slot()).map_err(failed)?;
    }
    // The bytes after the origin were never verified.
    part.file().set_len(head.origin()).map_err(failed)?;
    Ok(part)
}

/// Renames the complete `part` to its name, with the owner and mode of the file that it replaces.
///
/// Until then the part is the caller's own: another owner could write to it while it is verified,
/// and a part of another user can be neither resumed nor begun anew.
fn commit_as(
    owner: Option<FileOwner>,
    part: &PartFile,
    overwrite: Overwrite,
) -> Result<(), TransferError> {
    let failed = |error: io::Error| TransferError::host("write", part.path(), &error);
    let Some(owner) = owner else {
        return part.commit(overwrite).map_err(TransferError::AfterStart);
    };
    let own = FileOwner::of(part.file()).map_err(failed)?;
    // The data first: what may take long, or fail, happens while the part is the caller's.
    part.file().sync_all().map_err(failed)?;
    let applied = owner.apply_to(part.file()).map_err(failed);
    applied.and_then(|()| part.commit(overwrite).map_err(TransferError::AfterStart)).inspect_err(
        |_| {
            // What is left must stay the caller's. After a failure of the last sync it has its name.
            if part.has_its_name() {
                let _ = own.apply_to(part.file());
            }
        },
    )
}

/// Creates a part of `name` in place of `old`. `is_private` until it replaces another file.
fn create_part(
    name: &Path,
    old: Option<PartFile>,
    is_private: bool,
) -> Result<PartFile, TransferError> {
    // Remove the state first: a state must never meet a file that it does not describe.
    let path = part_path(name);
    let failed = |error: io::Error| TransferError::host("write", &path, &error);
    let slot = match &old {
        Some(old) => Ok(old.slot().clone()),
        None => FileSlot::of(name),
    };
    ReceiveState::remove(&slot.map_err(failed)?).map_err(failed)?;
    Ok(PartFile::create(name, old, if is_private { 0o600 } else { 0o666 })?)
}

/// The end of the transfer that failed.
pub(super) enum ReceiveError {
    Stream(io::Error),
    Target(io::Error),
    /// The data exceeds this limit in bytes.
    Limit(u64),
}

/// The remains of a broken transfer.
enum PartialResult<'a> {
    Part { name: &'a Path, offset: u64 },
    Device,
}

fn explain(
    failed: ReceiveError,
    path: &Path,
    progress: TransferProgress,
    left: &PartialResult<'_>,
) -> TransferError {
    let error = match failed {
        ReceiveError::Target(error) => return TransferError::host("write", path, &error),
        ReceiveError::Limit(limit) => {
            let (path, limit) = (path.display(), format_size(limit));
            return TransferError::AfterStart(format!(
                "the stream has more data than {limit}: '{path}' has what came before: give a \
                 larger --limit, or remove it"
            ));
        }
        ReceiveError::Stream(error) => error,
    };
    let of = progress.size.map_or(String::new(), |size| format!(" of {size}"));
    let at = format!("byte {}{of}", progress.reached);
    let what = match error.kind() {
        io::ErrorKind::UnexpectedEof => format!("the stream was cut at {at}"),
        io::ErrorKind::InvalidData => {
            let why = error.get_ref().map_or(String::new(), |why| format!(" ({why})"));
            format!("the stream is damaged at {at} or before{why}")
        }
        _ => format!("cannot read the stream at {at}: {}", os_message(&error)),
    };
    let left = match left {
        PartialResult::Device => {
            format!("'{}' is only partly written, send it again", path.display())
        }
        PartialResult::Part { offset: 0, .. } => {
            "no piece of it was whole, send it again".to_owned()
        }
        PartialResult::Part { name, offset } => format!(
            "'{}' has the first {offset} bytes, verified: 'cowslip send --from {offset} ... | \
             cowslip recv {} --resume' goes on",
            path.display(),
            name.display()
        ),
    };
    TransferError::Broken { what, left }
}
