//! Receiving: records become a file, under its name only when all of it is vouched for.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::checkpoint::{Mark, Stage};
use super::error::plain;
use super::onto;
use super::part::{Owner, Part, Spot, with_suffix};
use super::source::Source;
use super::state::{Keeper, State, VERSION};
use super::target::{Kind, Target, device_size};
use super::wire::{Event, Wire, damaged};
use super::zeros::{Holds, runs};
use super::{BUFFER, Told, TransferError};
use crate::spec::Frames;

/// What to do about a file of that name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// Leave it alone.
    Refuse,
    /// Replace it.
    Overwrite,
}

/// Where to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// With nothing.
    Anew,
    /// With what arrived before.
    Resume,
}

/// What to receive, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReceivePlan {
    /// The file or device.
    pub path: PathBuf,
    /// What to do about a file of that name.
    pub existing: Existing,
    /// Where to begin.
    pub begin: Begin,
    /// What comes over the wire.
    pub frames: Frames,
    /// The file that a stream of changes is put onto; it stays as it is.
    pub onto: Option<PathBuf>,
}

/// What was received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// How much of what.
    pub told: Told,
    /// Whether checkpoints vouched for it: other senders send none.
    pub is_verified: bool,
}

/// Where to send from so that `receive` can resume `path`; 0 when there is nothing to resume.
///
/// # Errors
/// A line when it is no file, or cannot be read.
pub fn resume_offset(path: &Path) -> Result<u64, TransferError> {
    let name = match Spot::of(path)? {
        Spot::Free(name) | Spot::File(name, _) => name,
        Spot::Device(name) => return Err(no_resume(&name)),
    };
    // Not locked: in a pipeline the receiver that will resume may have been started already.
    let path = with_suffix(&name, ".part");
    match File::open(&path) {
        Ok(file) => Ok(State::load(&path, &file).map_or(0, |state| state.offset)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(TransferError::host("read", &path, &error)),
    }
}

/// Receives a file from `input`; `tell` hears how far it is.
///
/// # Errors
/// A line: a file that is there already, a stream that is cut, damaged or another one than the
/// part's, what the host refuses. Nothing has the name then that did not have it before.
pub fn receive<R: Read>(
    input: R,
    plan: &ReceivePlan,
    tell: &mut dyn FnMut(&Told),
) -> Result<Received, TransferError> {
    let place = Place::of(plan)?;
    if plan.frames == Frames::Raw {
        let mut receiver = Receiver::open(place, plan, &Head::default(), tell)?;
        let read = receiver.plain(input);
        return receiver.finish(read);
    }
    let mut wire = Wire::new(input).map_err(|error| nothing(&error))?;
    let head = Head::read(&mut wire).map_err(|error| nothing(&error))?;
    let mut receiver = Receiver::open(place, plan, &head, tell)?;
    let read = receiver.records(&mut wire, head);
    receiver.finish(read)
}

/// The error for a stream of which nothing was used.
fn nothing(error: &io::Error) -> TransferError {
    let what = match error.kind() {
        io::ErrorKind::InvalidData => "what arrives is no rbd diff v2, or is damaged".to_owned(),
        io::ErrorKind::UnexpectedEof => "the stream was cut at its beginning".to_owned(),
        _ => format!("cannot read the stream: {}", plain(error)),
    };
    let left = "nothing was written; 'cowslip send' makes such a stream, and --frames raw takes \
                plain bytes";
    TransferError::Broken { what, left: left.to_owned() }
}

fn no_resume(path: &Path) -> TransferError {
    let path = path.display();
    let line = format!("'{path}' is a device: only a file can be resumed, send all of it");
    TransferError::Refused(line)
}

/// What a stream says before its first byte.
#[derive(Debug, Default)]
struct Head {
    size: u64,
    since: Option<String>,
    /// Its first checkpoint; other senders send none.
    mark: Option<Mark>,
    /// What was read too far.
    next: Option<Event>,
}

impl Head {
    fn read<R: Read>(wire: &mut Wire<R>) -> io::Result<Self> {
        let (mut head, mut size) = (Self::default(), None);
        loop {
            match wire.event()? {
                Event::Size(bytes) => size = Some(bytes),
                Event::Since(name) => head.since = Some(name),
                Event::Checkpoint(mark, Stage::Middle) => head.mark = Some(mark),
                other => head.next = Some(other),
            }
            if head.mark.is_some() || head.next.is_some() {
                // Past what a file can be there is no size, and nothing to make room for.
                head.size =
                    size.filter(|size| *size <= crate::spec::MAX_SIZE).ok_or_else(damaged)?;
                return Ok(head);
            }
        }
    }
}

/// Where it may go.
enum Place {
    File { name: PathBuf, owner: Option<Owner>, part: Option<Part>, state: Option<State> },
    Device(PathBuf),
}

impl Place {
    fn of(plan: &ReceivePlan) -> Result<Self, TransferError> {
        let spot = Spot::of(&plan.path)?;
        let shown = plan.path.display();
        let overwrite = plan.existing == Existing::Overwrite;
        let (name, owner) = match spot {
            Spot::Device(name) if plan.begin == Begin::Resume => return Err(no_resume(&name)),
            Spot::Device(name) if overwrite => return Ok(Self::Device(name)),
            Spot::Device(_) => {
                let line = format!("'{shown}' is a device: --overwrite writes to it");
                return Err(TransferError::Refused(line));
            }
            Spot::Free(name) => (name, None),
            Spot::File(name, owner) => (name, Some(owner)),
        };
        let part = Part::find(&name)?;
        let state = part.as_ref().and_then(|part| State::load(&part.path, &part.file));
        let resumes = plan.begin == Begin::Resume;
        let may_replace = overwrite || resumes && state.as_ref().is_some_and(|it| it.overwrite);
        if owner.is_some() && !may_replace {
            let line = format!("'{shown}' exists: --overwrite replaces it");
            return Err(TransferError::Refused(line));
        }
        if let Some(state) = &state
            && !resumes
            && !overwrite
        {
            let line = format!(
                "'{shown}.part' holds the first {} bytes of it: --resume goes on with them, \
                 --overwrite begins anew",
                state.offset
            );
            return Err(TransferError::Refused(line));
        }
        let state = state.filter(|_| resumes);
        Ok(Self::File { name, owner, part, state })
    }
}

struct Receiver<'a> {
    target: Target,
    file: Arc<File>,
    /// `None`: a device.
    part: Option<(Part, Keeper)>,
    device: PathBuf,
    replace: bool,
    /// What is kept of it; its offset is the last one that was verified.
    state: State,
    told: Told,
    is_verified: bool,
    tell: &'a mut dyn FnMut(&Told),
}

impl<'a> Receiver<'a> {
    /// Makes the place ready for the stream that begins with `head`.
    fn open(
        place: Place,
        plan: &ReceivePlan,
        head: &Head,
        tell: &'a mut dyn FnMut(&Told),
    ) -> Result<Self, TransferError> {
        let overwrite = plan.existing == Existing::Overwrite;
        let origin = head.mark.map_or(0, |mark| mark.origin);
        let mut state = State {
            version: VERSION,
            inode: 0,
            offset: 0,
            size: head.size,
            identity: head.mark.map_or(0, |mark| mark.identity),
            since: head.since.clone(),
            overwrite,
        };
        check(plan, head, &place)?;
        let told = Told { size: Some(head.size), ..Told::default() };
        let part = match place {
            Place::Device(path) => {
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
                let file = Arc::new(file);
                return Ok(Self {
                    target: Target::new(&file, Kind::Device),
                    file,
                    part: None,
                    device: path,
                    replace: true,
                    state,
                    told,
                    is_verified: false,
                    tell,
                });
            }
            Place::File { part: Some(part), state: Some(old), .. } => {
                // What is sent again is written again, and is not verified until then.
                state.offset = origin;
                state.overwrite |= old.overwrite;
                let failed = |error: io::Error| TransferError::host("write", &part.path, &error);
                if origin < old.offset {
                    State::remove(&part.path).map_err(failed)?;
                }
                // What came after it was never verified.
                part.file.set_len(origin).map_err(failed)?;
                part
            }
            Place::File { name, owner, part, .. } => Part::create(&name, part, owner)?,
        };
        let mut clean = origin;
        if let Some(path) = &plan.onto {
            let source = Source::open(path)?;
            onto::copy(&source, &part.file, origin)
                .map_err(|error| TransferError::host("copy", path, &error))?;
            clean = u64::MAX;
        }
        let failed = |error: io::Error| TransferError::host("write", &part.path, &error);
        let meta = part.file.metadata().map_err(failed)?;
        state.inode = meta.ino();
        let keeper = Keeper::start(&part.path, &part.file).map_err(failed)?;
        let mut target = Target::new(&part.file, Kind::File { clean });
        if plan.frames == Frames::Rbd {
            target.set_size(head.size).map_err(failed)?;
        }
        Ok(Self {
            target,
            file: Arc::clone(&part.file),
            device: PathBuf::new(),
            replace: state.overwrite,
            state,
            told: Told { from: origin, reached: origin, ..told },
            is_verified: false,
            part: Some((part, keeper)),
            tell,
        })
    }

    /// Takes the records of a stream.
    fn records<R: Read>(&mut self, wire: &mut Wire<R>, head: Head) -> Result<(), Failed> {
        let ours = head.mark;
        let has_gaps = head.since.is_some() || ours.is_none();
        let mut verified = ours.map_or(0, |mark| mark.end);
        let mut next = head.next;
        let mut is_whole = false;
        let mut buffer = vec![0; BUFFER];
        loop {
            let event = match next.take() {
                Some(event) => event,
                None => wire.event().map_err(Failed::Stream)?,
            };
            // Of the last checkpoint's promise nothing may be changed.
            if is_whole != (event == Event::End) && (ours.is_some() || is_whole) {
                return Err(Failed::Stream(damaged()));
            }
            match event {
                Event::End => return Ok(()),
                Event::Since(_) => return Err(Failed::Stream(damaged())),
                Event::Size(size) => self.resize(size)?,
                Event::Data(range) => {
                    self.expect(&range, ours.is_some(), has_gaps)?;
                    self.told.data += range.end - range.start;
                    self.data(wire, range, &mut buffer)?;
                }
                Event::Zeros(range) => {
                    self.expect(&range, ours.is_some(), has_gaps)?;
                    self.told.holes += range.end - range.start;
                    self.told.reached = range.end;
                    self.target.hole(range).map_err(Failed::Target)?;
                    (self.tell)(&self.told);
                }
                Event::Checkpoint(mark, stage) => {
                    is_whole = stage == Stage::Last;
                    self.checkpoint(mark, ours, verified, has_gaps, is_whole)?;
                    verified = mark.end;
                }
            }
        }
    }

    /// Whether a record may cover `range` now.
    fn expect(&self, range: &Range<u64>, is_ours: bool, has_gaps: bool) -> Result<(), Failed> {
        let is_next = range.start == self.told.reached;
        let is_later = has_gaps && range.start >= self.told.reached;
        if range.end > self.told.size.unwrap_or(0) || is_ours && !is_next && !is_later {
            return Err(Failed::Stream(damaged()));
        }
        Ok(())
    }

    fn resize(&mut self, size: u64) -> Result<(), Failed> {
        if size > crate::spec::MAX_SIZE {
            return Err(Failed::Stream(damaged()));
        }
        self.told.size = Some(size);
        self.state.size = size;
        self.target.set_size(size).map_err(Failed::Target)
    }

    fn data<R: Read>(
        &mut self,
        wire: &mut Wire<R>,
        range: Range<u64>,
        buffer: &mut [u8],
    ) -> Result<(), Failed> {
        let mut at = range.start;
        while at < range.end {
            let most = buffer.len() as u64;
            let len = usize::try_from((range.end - at).min(most)).unwrap_or(buffer.len());
            wire.bytes(&mut buffer[..len]).map_err(Failed::Stream)?;
            self.target.write(&buffer[..len], at).map_err(Failed::Target)?;
            at += len as u64;
            self.told.reached = at;
            (self.tell)(&self.told);
        }
        Ok(())
    }

    fn checkpoint(
        &mut self,
        mark: Mark,
        ours: Option<Mark>,
        verified: u64,
        has_gaps: bool,
        is_whole: bool,
    ) -> Result<(), Failed> {
        let is_reached =
            if has_gaps { mark.end >= self.told.reached } else { mark.end == self.told.reached };
        let is_its = ours
            .is_some_and(|first| (first.identity, first.origin) == (mark.identity, mark.origin));
        let is_all = !is_whole || Some(mark.end) == self.told.size;
        if !is_its || !is_reached || !is_all || mark.start != verified {
            return Err(Failed::Stream(damaged()));
        }
        self.told.reached = mark.end;
        self.target.settle().map_err(Failed::Target)?;
        self.is_verified = is_whole;
        self.state.offset = self.state.offset.max(mark.end);
        if let Some((_, keeper)) = &self.part
            && !is_whole
        {
            keeper.note(self.state.clone());
        }
        Ok(())
    }

    /// Takes plain bytes up to the end of the input.
    fn plain<R: Read>(&mut self, mut input: R) -> Result<(), Failed> {
        let mut buffer = vec![0; BUFFER];
        let mut at = 0;
        self.told.size = None;
        loop {
            let got = fill(&mut input, &mut buffer).map_err(Failed::Stream)?;
            for (run, holds) in runs(&buffer[..got], at) {
                let (start, end) = (at + run.start as u64, at + run.end as u64);
                let done = match holds {
                    Holds::Data => {
                        self.told.data += end - start;
                        self.target.write(&buffer[run], start)
                    }
                    Holds::Zeros => {
                        self.told.holes += end - start;
                        self.target.hole(start..end)
                    }
                };
                done.map_err(Failed::Target)?;
            }
            at += got as u64;
            self.told.reached = at;
            (self.tell)(&self.told);
            if got < BUFFER {
                self.told.size = Some(at);
                return self.target.set_size(at).map_err(Failed::Target);
            }
        }
    }

    /// Everything has arrived, or not.
    fn finish(mut self, read: Result<(), Failed>) -> Result<Received, TransferError> {
        let (told, is_verified) = (self.told, self.is_verified);
        let path = match &self.part {
            Some((part, _)) => part.path.clone(),
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
            let offset = State::load(&part.path, &part.file).map_or(0, |state| state.offset);
            kept.map_err(failed)?;
            return Err(explain(broken, &path, told, &Left::Part { name: &part.name, offset }));
        }
        keeper.end().map_err(failed)?;
        self.target.sync().map_err(failed)?;
        part.commit(self.replace)?;
        drop(self.file);
        Ok(Received { told, is_verified })
    }
}

/// Which end failed.
enum Failed {
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
        io::ErrorKind::InvalidData => format!("the stream is damaged at {at} or before"),
        _ => format!("cannot read the stream at {at}: {}", plain(&error)),
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

/// Whether this stream may go there.
fn check(plan: &ReceivePlan, head: &Head, place: &Place) -> Result<(), TransferError> {
    let refuse = |line: String| Err(TransferError::Refused(line));
    let shown = plan.path.display();
    let origin = head.mark.map_or(0, |mark| mark.origin);
    let old = match place {
        Place::File { state, .. } => state.as_ref(),
        Place::Device(_) => None,
    };
    match (&head.since, &plan.onto) {
        (Some(since), None) => {
            return refuse(format!(
                "the stream holds only what changed since '{since}': name the file that holds \
                 that snapshot, --onto OLD"
            ));
        }
        (None, Some(_)) => {
            return refuse(
                "the stream holds all of a disk: leave --onto out, it is for what 'send --since' \
                 makes"
                    .to_owned(),
            );
        }
        (Some(_), Some(_)) if matches!(place, Place::Device(_)) => {
            return refuse(format!("'{shown}' is a device: changes are received into a file"));
        }
        _ => {}
    }
    let Some(old) = old else {
        return match origin {
            0 => Ok(()),
            _ => refuse(format!(
                "the stream begins at byte {origin}, and there is nothing of '{shown}' before it: \
                 send all of it"
            )),
        };
    };
    let anew = "--overwrite without --resume begins anew";
    let Some(mark) = head.mark else {
        return refuse(format!(
            "the stream has no checkpoints, so '{shown}' cannot be resumed with it: {anew}"
        ));
    };
    if origin > old.offset {
        return refuse(format!(
            "the stream begins at byte {origin}, and '{shown}.part' has {}: send --from {0}",
            old.offset
        ));
    }
    let is_known = mark.identity != 0 || old.identity != 0;
    let is_other = mark.identity != old.identity || head.size != old.size;
    if is_known && is_other || head.since != old.since {
        return refuse(format!(
            "the stream is of another file, or of one that changed since '{shown}.part' was \
             begun: {anew}"
        ));
    }
    Ok(())
}

fn fill(input: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match input.read(&mut buffer[done..]) {
            Ok(0) => break,
            Ok(len) => done += len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}
