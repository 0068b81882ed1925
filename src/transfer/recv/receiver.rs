//! The file while it is received, from its first byte to its name.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
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
use crate::host::said;
use crate::part::{Part, path_for};
use crate::spec::Overwrite;

/// A file or a device that is being received.
pub(super) struct Receiver<'a> {
    pub(super) target: Target,
    /// `None`: a device.
    pub(super) part: Option<(Part, Keeper)>,
    device: PathBuf,
    replace: Overwrite,
    /// Whether what is not written is what was there before.
    pub(super) stands_on_something: bool,
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
            Place::Device(path) => Self::of_device(path, head, tell),
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
        head: &Head,
        tell: &'a mut dyn FnMut(&Told),
    ) -> Result<Self, TransferError> {
        // The kernel's own lock: what is mounted or part of something is not written over.
        let mut options = File::options();
        let file = options.read(true).write(true).custom_flags(libc::O_EXCL).open(&path);
        let file = file.map_err(|error| TransferError::host("write", &path, &error))?;
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
            let source = Source::open(path)?;
            onto::copy(&source, part.file(), origin)
                .map_err(|error| TransferError::host("copy", path, &error))?;
            clean = u64::MAX;
        }
        let failed = |error: io::Error| TransferError::host("write", part.path(), &error);
        let keeper = Keeper::start(part.path(), part.file()).map_err(failed)?;
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

    /// What reads as zeros.
    pub(super) fn gap(&mut self, range: Range<u64>) -> Result<(), Failed> {
        self.told.holes += range.end - range.start;
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
            let offset = State::load(part.path(), part.file()).map_or(0, |state| state.offset);
            kept.map_err(failed)?;
            return Err(explain(broken, &path, told, &Left::Part { name: part.name(), offset }));
        }
        keeper.end().map_err(failed)?;
        self.target.settle().map_err(failed)?;
        part.commit(self.replace).map_err(TransferError::Late)?;
        State::remove(part.path()).map_err(|error| TransferError::host("remove", &path, &error))?;
        Ok(Received { told, is_verified })
    }
}

/// The part that `old` speaks of, for a stream that goes on with it.
fn resume_part(part: Part, old: &State, head: &Head) -> Result<Part, TransferError> {
    let failed = |error: io::Error| TransferError::host("write", part.path(), &error);
    if head.origin() < old.offset {
        State::remove(part.path()).map_err(failed)?;
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
    State::remove(&path).map_err(failed)?;
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
}

/// What a broken transfer leaves.
enum Left<'a> {
    Part { name: &'a Path, offset: u64 },
    Device,
}

fn explain(failed: Failed, path: &Path, told: Told, left: &Left<'_>) -> TransferError {
    let error = match failed {
        Failed::Target(error) => return TransferError::host("write", path, &error),
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
