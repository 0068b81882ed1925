//! What a disk differs in: frozen at one moment, beside what it is compared with.
//!
//! ```text
//!                 |-- changed --|        |-changed-|
//!   layers above  |  data, zero |        |  data   |         of the frozen moment
//!   ------------------------------------------------------   `since` this snapshot, or the base
//! ```
//!
//! Two files that only who asked knows of: the disk as it is at that moment, and one that has data
//! where it was changed and holes elsewhere. They are there for a while, then as long as somebody
//! has them open. The layers they read stay open with them, whatever becomes of the disk.

use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::super::bottom::Bottom;
use super::super::{Disk, Layers, Top};
use super::LifeError;
use crate::extents::{Extent, Kind};
use crate::layer::{Copy, Layer, Wait};
use crate::overlay::sealed::Sealed;

/// What the files of a difference begin with; no snapshot's name can.
const PREFIX: &str = ".frozen-";
/// How long whoever asked has to look for them, and then to open them.
const KEPT: Duration = Duration::from_secs(30);
const OPENED: Duration = Duration::from_secs(2);

/// The base of a difference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Beneath {
    /// Zeros.
    Nothing,
    /// All of a file, and its format.
    File(PathBuf, String),
    /// A part of one: no other format has a name for that.
    Part,
}

/// What a disk differs in.
#[derive(Clone, Debug)]
pub struct Difference {
    /// The name, among the snapshots' files, of the disk as it is at that moment.
    pub file: String,
    /// The name of the file that has data where it was changed.
    pub changed: String,
    /// What it is a difference to, without `since`.
    pub base: Beneath,
}

/// A file of a difference.
pub(super) struct Held {
    uuid: Uuid,
    file: Arc<Disk>,
    /// It goes then, unless somebody has it open.
    until: Instant,
}

/// Data where `layers` have something to say, and holes elsewhere.
struct Marks {
    layers: Option<Sealed>,
    /// How much there is to differ from, in bytes: what lies behind it is zeros.
    below: u64,
    size: u64,
}

impl Layer for Marks {
    fn size(&self) -> u64 {
        self.size
    }

    fn extent_at(&self, range: Range<u64>, wait: Wait) -> io::Result<Extent> {
        let Some(layers) = &self.layers else { return Ok(Extent::new(range, Kind::Hole)) };
        let found = layers.extent_at(range, wait)?;
        if found.kind != Kind::Lower {
            return Ok(Extent::new(found.range, Kind::Data));
        }
        // Where it was cut off and is there again, what lies below does not show through.
        let (start, end) = (found.range.start, found.range.end);
        let hidden = layers.lower_limit()..self.below;
        let (kind, end) = if hidden.contains(&start) {
            (Kind::Data, end.min(hidden.end))
        } else if start < hidden.start && !hidden.is_empty() {
            (Kind::Hole, end.min(hidden.start))
        } else {
            (Kind::Hole, end)
        };
        Ok(Extent::new(start..end, kind))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<Extent> {
        let found = self.extent_at(offset..offset + buf.len() as u64, wait)?;
        let len = usize::try_from(found.len()).unwrap_or(usize::MAX).min(buf.len());
        if found.kind == Kind::Data {
            buf[..len].fill(0);
        }
        Ok(found)
    }

    fn lend_at(
        &self,
        range: Range<u64>,
        wait: Wait,
        _: Copy<'_>,
    ) -> io::Result<(Extent, Option<u64>)> {
        Ok((self.extent_at(range, wait)?, None))
    }
}

impl Disk {
    /// Freezes the disk, or takes it as it was at snapshot `until`, and tells what has changed
    /// since snapshot `since`, or since there was only its base.
    ///
    /// # Errors
    /// [`LifeError`]: there is no such snapshot, or the one does not stand on the other.
    pub fn difference(
        &self,
        since: Option<&str>,
        until: Option<&str>,
    ) -> Result<Difference, LifeError> {
        let _turn = self.begin("a comparison")?;
        let tree = self.tree("differences")?;
        let layer_of = |name: &str| {
            let found = tree.snapshot(name).map(|found| found.layer);
            found.ok_or_else(|| LifeError::Unknown(name.to_owned()))
        };
        let since = since.map(|name| Ok::<_, LifeError>((name, layer_of(name)?))).transpose()?;
        let until = until.map(layer_of).transpose()?;
        if let Some((name, old)) = since {
            // Refused before anything is frozen.
            let from = until.or_else(|| tree.top().map(|top| top.uuid));
            let chain = from.map_or_else(Vec::new, |from| tree.chain(from));
            if chain.iter().all(|record| record.uuid != old) {
                return Err(LifeError::Refused(format!(
                    "it does not stand on snapshot '{name}': it has gone back to another"
                )));
            }
        }
        let layer = match until {
            Some(layer) => layer,
            None if self.is_latched() => return Err(LifeError::Latched),
            None => self.freeze_top()?,
        };
        // Once nobody has it open any more, what was frozen for this may become one with the top.
        self.life.untidy.store(true, Ordering::SeqCst);
        let tree = self.tree("differences")?;
        let chain = self.open_chain(&tree, layer)?;
        let bottom = self.layers().bottom.clone();
        let records = tree.chain(layer);
        let (upper, below) = match since {
            None => (chain.len(), bottom.as_ref().map_or(0, |bottom| bottom.size())),
            Some((_, old)) => {
                let at = records.iter().position(|record| record.uuid == old);
                let at = at.ok_or(LifeError::NoOverlay("differences"))?;
                (at, chain.get(at).map_or(0, |layer| layer.size()))
            }
        };
        let size = chain.first().map_or(0, |top| top.size());
        let mtime = chain.first().and_then(|layer| layer.mtime()).map_or(0, |(mtime, _)| mtime);
        let marks = Marks { layers: Sealed::new(chain[..upper].to_vec()), below, size };
        let frozen = Layers::new(Top::Nothing, Sealed::new(chain).map(Arc::new), bottom);
        let marks = Layers::new(Top::Nothing, None, Some(Arc::new(marks)));
        let base = match &*self.bottom() {
            Bottom::File { view: Some(_), .. } => Beneath::Part,
            Bottom::File { path, format, .. } => Beneath::File(path.clone(), format.to_string()),
            Bottom::Blank(_) => Beneath::Nothing,
        };
        Ok(Difference { file: self.hold(frozen, mtime), changed: self.hold(marks, mtime), base })
    }

    /// Whether files of a difference are there to be read.
    pub(in crate::disk) fn is_compared(&self) -> bool {
        !self.life.held.lock().is_empty()
    }

    /// Shows `layers` as a file for a while, and tells its name.
    fn hold(&self, layers: Layers, mtime: i64) -> String {
        let uuid = Uuid::new_v4();
        let name = format!("{PREFIX}{uuid}");
        let file = self.show_snapshot(&name, (uuid, uuid), layers, mtime);
        let held = Held { uuid, file, until: Instant::now() + KEPT };
        self.life.held.lock().push(held);
        name
    }

    /// The file of a difference.
    pub(super) fn held_file(&self, name: &str) -> Option<Arc<Self>> {
        let uuid = Uuid::parse_str(name.strip_prefix(PREFIX)?).ok()?;
        let mut held = self.life.held.lock();
        let Held { file, until, .. } = held.iter_mut().find(|held| held.uuid == uuid)?;
        *until = Instant::now() + OPENED;
        // A change of the layers lets go of files that nobody has open.
        self.life.files.lock().entry(uuid).or_insert_with(|| Arc::clone(file));
        Some(Arc::clone(file))
    }

    /// Lets go of files of differences that were not opened in time, or are closed again.
    pub fn let_go(&self) {
        let mut held = self.life.held.lock();
        held.retain(|held| {
            let is_kept = held.file.openers() > 0 || Instant::now() < held.until;
            if !is_kept {
                self.life.files.lock().remove(&held.uuid);
            }
            is_kept
        });
    }
}
