//! The file while it is received, from its first byte to its name.

use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::super::onto;
use super::super::source::Source;
use super::super::spot::Owner;
use super::super::state::{Keeper, State};
use super::super::target::{Kind, Target, device_size};
use super::super::{Frames, Told, TransferError};
use super::place::{Place, check};
use super::records::Head;
use super::{ReceivePlan, Received};
use crate::confined::{self, Located};
use crate::host::{errno, said};
use crate::part::{Part, Slot, path_for};
use crate::spec::{Overwrite, format_size};
use rustix::fs::OFlags;

/// A file or a device that is being received.
pub(super) struct Receiver<'a> {
    pub(super) target: Target,
    /// `None`: a device.
    pub(super) part: Option<(Part, Keeper)>,
    device: PathBuf,
    replace: Overwrite,
    /// Whether what is not written is what was there before.
    pub(super) stands_on_something: bool,
    /// The most bytes of data that are written.
    limit: u64,
    /// What is kept of it; its offset is the last one that was verified.
    pub(super) state: State,
    pub(super) told: Told,
    pub(super) is_verified: bool,
    pub(super) tell: &'a mut dyn FnMut(&Told),
}

impl<'a> Receiver<'a> {
    /// Makes the place ready for the stream that begins with `head`.
    pub(super) fn open(
        place: Place,
        plan: &ReceivePlan,
        head: &Head,
        tell: &'a mut dyn FnMut(&Told),
    ) -> Result<Self, TransferError> {
        check(plan, head, &place)?;
        match place {
            Place::Device(path) => Self::of_device(path, plan, head, tell),
            Place::File { name, owner, part, state } => {
                let part = match (part, state) {
                    (Some(part), Some(old)) => (resume_part(part, &old, head)?, old.overwrite),
                    (old, _) => (begin_part(&name, old, owner)?, false),
                };
                Self::of_part(part, plan, head, tell)
            }
        }
    }

    fn of_device(
        path: PathBuf,
        plan: &ReceivePlan,
        head: &Head,
        tell: &'a mut dyn FnMut(&Told),
    ) -> Result<Self, TransferError> {
        // The kernel's own lock: what is mounted or part of something is not written over.
        let open = || match Located::at(&path)? {
            it if it.metadata().file_type().is_block_device() => {
                it.open(OFlags::RDWR | OFlags::EXCL)
            }
            // Replaced since it was looked at.
            _ => Err(errno(libc::ESTALE)),
        };
        let file = open().map_err(|error| TransferError::host("write", &path, &error))?;
        let size = device_size(&file, &path)?;
        if size < head.size {
            return Err(TransferError::Refused(format!(
                "'{}' has {size} bytes, and what arrives {}: use a larger device",
                path.display(),
                head.size
            )));
        }
        Ok(Self {
            target: Target::new(&Arc::new(file), Kind::Device),
            part: None,
            device: path,
            replace: Overwrite::Yes,
            stands_on_something: true,
            limit: plan.limit,
            state: head.state(),
            told: Told { size: Some(head.size), ..Told::default() },
            is_verified: false,
            tell,
        })
    }

    /// `may_replace`: what the receiver that began the part was told.
    fn of_part(
        (part, may_replace): (Part, bool),
        plan: &ReceivePlan,
        head: &Head,
        tell: &'a mut dyn FnMut(&Told),
    ) -> Result<Self, TransferError> {
        let origin = head.origin();
        let mut clean = origin;
        if let Some(path) = &plan.onto {
            // A pipe is no file to begin with, and would be waited for.
            confined::open_input(path, confined::Access::Read)
                .map_err(|error| TransferError::host("read", path, &error))?;
            let source = Source::open(path)?;
            onto::copy(&source, part.file(), origin)
                .map_err(|error| TransferError::host("copy", path, &error))?;
            clean = u64::MAX;
        }
        let failed = |error: io::Error| TransferError::host("write", part.path(), &error);
        let keeper = Keeper::start(part.slot(), part.file()).map_err(failed)?;
        let mut target = Target::new(part.file(), Kind::File { clean });
        if plan.frames != Frames::Raw {
            target.set_size(head.size).map_err(failed)?;
        }
        let overwrite = may_replace || plan.overwrite == Overwrite::Yes;
        let inode = part.file().metadata().map_err(failed)?.ino();
        // What is sent again is written again, and is not verified until then.
        let state = State { inode, offset: origin, overwrite, ..head.state() };
        Ok(Self {
            target,
            device: PathBuf::new(),
            replace: if overwrite { Overwrite::Yes } else { Overwrite::No },
            stands_on_something: plan.onto.is_some(),
            limit: plan.limit,
            state,
            told: Told { from: origin, reached: origin, size: Some(head.size), ..Told::default() },
            is_verified: false,
            part: Some((part, keeper)),
            tell,
        })
    }

    /// Writes `range`, each piece of which `read` puts into the buffer first.
    pub(super) fn pieces(
        &mut self,
        range: Range<u64>,
        buffer: &mut [u8],
        read: &mut dyn FnMut(&mut [u8]) -> io::Result<()>,
    ) -> Result<(), Failed> {
        self.check_limit(range.end - range.start)?;
        let mut at = range.start;
        while at < range.end {
            let most = buffer.len() as u64;
            let len = usize::try_from((range.end - at).min(most)).unwrap_or(buffer.len());
            read(&mut buffer[..len]).map_err(Failed::Stream)?;
            self.target.write(&buffer[..len], at).map_err(Failed::Target)?;
            at += len as u64;
            self.told.data += len as u64;
            self.told.reached = at;
            (self.tell)(&self.told);
        }
        Ok(())
    }

    /// Whether `len` more bytes of data may be written.
    pub(super) fn check_limit(&self, len: u64) -> Result<(), Failed> {
        if self.told.data.saturating_add(len) > self.limit {
            return Err(Failed::Limit(self.limit));
        }
        Ok(())
    }

    /// Whether there is room for `len` bytes of data, none of which the sender had to send.
    ///
    /// # Errors
    /// `ENOSPC` before the first of them when a file has not.
    pub(super) fn check_room(&self, len: u64) -> Result<(), Failed> {
        let Some((part, _)) = &self.part else { return Ok(()) };
        // A file system that does not tell takes what it can.
        let Ok(found) = rustix::fs::fstatvfs(&**part.file()) else { return Ok(()) };
        let held = part.file().metadata().map_or(0, |found| found.blocks().saturating_mul(512));
        let room = found.f_bavail.saturating_mul(found.f_frsize).saturating_add(held);
        if found.f_frsize > 0 && len > room {
            return Err(Failed::Target(errno(libc::ENOSPC)));
        }
        Ok(())
    }

    /// What reads as zeros.
    pub(super) fn gap(&mut self, range: Range<u64>) -> Result<(), Failed> {
        // Zeros can be told of again and again.
        self.told.holes = self.told.holes.saturating_add(range.end - range.start);
        self.told.reached = range.end;
        self.target.hole(range).map_err(Failed::Target)
    }

    /// Everything has arrived, or not.
    pub(super) fn finish(mut self, read: Result<(), Failed>) -> Result<Received, TransferError> {
        let (told, is_verified) = (self.told, self.is_verified);
        let path = match &self.part {
            Some((part, _)) => part.path().to_owned(),
            None => self.device.clone(),
        };
        let failed = |error: io::Error| TransferError::host("write", &path, &error);
        let Some((part, keeper)) = self.part.take() else {
            read.map_err(|failed| explain(failed, &path, told, &Left::Device))?;
            self.target.sync().map_err(failed)?;
            return Ok(Received { told, is_verified });
        };
        if let Err(broken) = read {
            // Also then: what was verified is to stay, and to be found.
            let kept = keeper.end();
            let offset = State::load(part.slot(), part.file()).map_or(0, |state| state.offset);
            kept.map_err(failed)?;
            return Err(explain(broken, &path, told, &Left::Part { name: part.name(), offset }));
        }
        keeper.end().map_err(failed)?;
        self.target.settle().map_err(failed)?;
        part.commit(self.replace).map_err(TransferError::Late)?;
        State::remove(part.slot()).map_err(|error| TransferError::host("remove", &path, &error))?;
        Ok(Received { told, is_verified })
    }
}

/// The part that `old` speaks of, for a stream that goes on with it.
fn resume_part(part: Part, old: &State, head: &Head) -> Result<Part, TransferError> {
    let failed = |error: io::Error| TransferError::host("write", part.path(), &error);
    if head.origin() < old.offset {
        State::remove(part.slot()).map_err(failed)?;
    }
    // What came after it was never verified.
    part.file().set_len(head.origin()).map_err(failed)?;
    Ok(part)
}

/// A new part of `name`, in place of `old`. `owner`: of the file that it will replace.
fn begin_part(name: &Path, old: Option<Part>, owner: Option<Owner>) -> Result<Part, TransferError> {
    // First: a state must never meet a file that it does not speak of.
    let path = path_for(name);
    let failed = |error: io::Error| TransferError::host("write", &path, &error);
    let slot = match &old {
        Some(old) => Ok(old.slot().clone()),
        None => Slot::of(name),
    };
    State::remove(&slot.map_err(failed)?).map_err(failed)?;
    let part = Part::create(name, old, if owner.is_some() { 0o600 } else { 0o666 })?;
    if let Some(owner) = owner {
        owner.give(part.file()).map_err(failed)?;
    }
    Ok(part)
}

/// Which end failed.
pub(super) enum Failed {
    Stream(io::Error),
    Target(io::Error),
    /// It is more than so many bytes.
    Limit(u64),
}

/// What a broken transfer leaves.
enum Left<'a> {
    Part { name: &'a Path, offset: u64 },
    Device,
}

fn explain(failed: Failed, path: &Path, told: Told, left: &Left<'_>) -> TransferError {
    let error = match failed {
        Failed::Target(error) => return TransferError::host("write", path, &error),
        Failed::Limit(limit) => {
            let (path, limit) = (path.display(), format_size(limit));
            return TransferError::Late(format!(
                "the stream has more data than {limit}: '{path}' has what came before: give a \
                 larger --limit, or remove it"
            ));
        }
        Failed::Stream(error) => error,
    };
    let of = told.size.map_or(String::new(), |size| format!(" of {size}"));
    let at = format!("byte {}{of}", told.reached);
    let what = match error.kind() {
        io::ErrorKind::UnexpectedEof => format!("the stream was cut at {at}"),
        io::ErrorKind::InvalidData => {
            let why = error.get_ref().map_or(String::new(), |why| format!(" ({why})"));
            format!("the stream is damaged at {at} or before{why}")
        }
        _ => format!("cannot read the stream at {at}: {}", said(&error)),
    };
    let left = match left {
        Left::Device => format!("'{}' is only partly written, send it again", path.display()),
        Left::Part { offset: 0, .. } => "no piece of it was whole, send it again".to_owned(),
        Left::Part { name, offset } => format!(
            "'{}' has the first {offset} bytes, verified: 'cowslip send --from {offset} ... | \
             cowslip recv {} --resume' goes on",
            path.display(),
            name.display()
        ),
    };
    TransferError::Broken { what, left }
}
