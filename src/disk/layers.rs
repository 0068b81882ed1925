//! The layers of a disk, and the walk through them from top to bottom.
//!
//! ```text
//!   top       |   Data   |      |Zero|          |      overlay, reflink overlay, or none
//!   sealed    |     |  Data  |     |  Data |    |      the layers that never change again
//!   bottom    |           Data           | Hole |      the base, or zeros
//!
//!   disk      |   Data   |Data  |Zero|Data | H. |
//! ```

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use crate::extents::{Extent, ExtentKind};
use crate::host::os_error;
use crate::layer::{CopyFn, Layer, ReadBelow, Wait, WritableLayer};
use crate::overlay::Overlay;
use crate::overlay::reflink::Reflink;
use crate::overlay::sealed::Sealed;
use crate::pool::check_cancelled;

/// The layer that takes a disk's changes.
pub(super) enum Top {
    /// A copy-on-write layer.
    Overlay(Arc<Overlay>),
    /// A file that shares its blocks with the base (reflink).
    Reflink(Arc<Reflink>),
    /// The base itself (`mode=rw`), or an output stream.
    Writable(Arc<dyn WritableLayer>),
    /// No layer: the disk is read-only (`mode=ro`).
    Nothing,
}

impl Top {
    /// The overlay, if the top is one.
    pub(super) fn overlay(&self) -> Option<&Arc<Overlay>> {
        match self {
            Self::Overlay(overlay) => Some(overlay),
            Self::Reflink(_) | Self::Writable(_) | Self::Nothing => None,
        }
    }

    /// The reflink overlay, if the top is one.
    pub(super) fn reflink(&self) -> Option<&Arc<Reflink>> {
        match self {
            Self::Reflink(reflink) => Some(reflink),
            Self::Overlay(_) | Self::Writable(_) | Self::Nothing => None,
        }
    }

    /// The layer that takes changes; `None` for a read-only disk.
    fn writable(&self) -> Option<&dyn WritableLayer> {
        match self {
            Self::Overlay(overlay) => Some(&**overlay),
            Self::Reflink(reflink) => Some(&**reflink),
            Self::Writable(layer) => Some(&**layer),
            Self::Nothing => None,
        }
    }

    /// Makes all changes acknowledged before the call durable.
    ///
    /// # Errors
    /// The errors of [`WritableLayer::sync`].
    pub(super) fn sync(&self) -> io::Result<()> {
        self.writable().map_or(Ok(()), WritableLayer::sync)
    }

    /// Whether [`sync`](Self::sync) takes about as long as the device needs for a few blocks.
    pub(super) fn is_quick_to_sync(&self) -> bool {
        match self {
            Self::Nothing => true,
            Self::Overlay(overlay) => overlay.is_quick_to_sync(),
            // Others may have written to these files.
            Self::Reflink(_) | Self::Writable(_) => false,
        }
    }

    /// A number that grows with every change of the extents; `None` when nobody counts the changes.
    pub(super) fn revision(&self) -> Option<u64> {
        match self {
            Self::Overlay(overlay) => Some(overlay.revision()),
            Self::Nothing => Some(0),
            // Others may change these files.
            Self::Reflink(_) | Self::Writable(_) => None,
        }
    }

    /// The file of an overlay that holds the changed bytes.
    pub(super) fn data_file(&self) -> Option<File> {
        match self {
            Self::Overlay(overlay) => overlay.data_file(),
            Self::Reflink(reflink) => reflink.data().try_clone().ok(),
            Self::Writable(_) | Self::Nothing => None,
        }
    }

    /// Whether a commit was begun and is not finished.
    pub(super) fn is_committing(&self) -> bool {
        self.overlay().is_some_and(|overlay| overlay.is_committing())
    }
}

/// The layers of a disk at one moment, replaced as a whole: with the gate held exclusive, unless the
/// bytes stay the same.
pub(super) struct LayerStack {
    pub(super) top: Top,
    /// The sealed layers below the top.
    pub(super) sealed: Option<Arc<Sealed>>,
    /// The base below all other layers; with [`Top::Writable`] the top itself.
    pub(super) bottom: Option<Arc<dyn Layer>>,
    /// All layers from top to bottom, including `top` unless that is [`Top::Nothing`].
    all: Vec<Arc<dyn Layer>>,
}

impl LayerStack {
    /// Stacks `top`, the sealed layers `below`, top to bottom, and `bottom`.
    pub(super) fn new(top: Top, below: Vec<Arc<Overlay>>, bottom: Option<Arc<dyn Layer>>) -> Self {
        let sealed = Sealed::new(below).map(Arc::new);
        let first = match &top {
            Top::Overlay(overlay) => Some(Arc::clone(overlay) as Arc<dyn Layer>),
            Top::Reflink(reflink) => Some(Arc::clone(reflink) as Arc<dyn Layer>),
            Top::Writable(_) | Top::Nothing => None,
        };
        let middle = sealed.clone().map(|sealed| sealed as Arc<dyn Layer>);
        let all = first.into_iter().chain(middle).chain(bottom.clone()).collect();
        Self { top, sealed, bottom, all }
    }

    /// The same layers above `bottom`, which reads the same.
    pub(super) fn with_bottom(&self, top: Arc<Overlay>, bottom: Arc<dyn Layer>) -> Self {
        Self::new(Top::Overlay(top), self.sealed_layers().to_vec(), Some(bottom))
    }

    /// The layers of a read-only disk.
    pub(super) fn read_only(below: Vec<Arc<Overlay>>, bottom: Option<Arc<dyn Layer>>) -> Self {
        Self::new(Top::Nothing, below, bottom)
    }

    /// The same bottom with `top` and the sealed layers `below` above it.
    pub(super) fn with_top(&self, top: Arc<Overlay>, below: Vec<Arc<Overlay>>) -> Self {
        Self::new(Top::Overlay(top), below, self.bottom.clone())
    }

    /// The disk's size in bytes, which is the size of its topmost layer.
    pub(super) fn size(&self) -> u64 {
        self.all.first().map_or(0, |layer| layer.size())
    }

    /// Returns the layer that takes changes; `EROFS` without one.
    pub(super) fn writable(&self) -> io::Result<&dyn WritableLayer> {
        self.top.writable().ok_or_else(|| os_error(libc::EROFS))
    }

    /// The sealed layers, top to bottom.
    pub(super) fn sealed_layers(&self) -> &[Arc<Overlay>] {
        self.sealed.as_ref().map_or(&[], |sealed| sealed.layers())
    }

    /// The layers below the top.
    pub(super) fn below(&self) -> LowerLayers<'_> {
        LowerLayers(self.all.get(1..).unwrap_or_default())
    }

    /// Fills `buf` with the bytes from `offset` on.
    ///
    /// # Errors
    /// The errors of [`Layer::read_at`].
    pub(super) fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<()> {
        read_through(&self.all, buf, offset, wait)
    }

    /// Describes a prefix of `range`.
    ///
    /// # Errors
    /// The errors of [`Layer::extent_at`].
    pub(super) fn extent_at(&self, range: Range<u64>, wait: Wait) -> io::Result<Extent> {
        extent_through(&self.all, range, wait)
    }

    /// Describes a prefix of `range` and returns the depth of its layer: 0 is the top, the greatest
    /// number the base.
    ///
    /// # Errors
    /// The errors of [`Layer::extent_at`].
    pub(super) fn extent_with_depth(
        &self,
        range: Range<u64>,
        wait: Wait,
    ) -> io::Result<(Extent, u32)> {
        let mut depth = 0;
        let (extent, ()) = first_answer(&self.all, range, |layer, range| {
            let (extent, passed) = layer.extent_with_depth(range, wait)?;
            depth += passed;
            Ok((extent, ()))
        })?;
        Ok((extent, depth))
    }

    /// The pieces of `range` in ascending order, each with the depth of its layer. How many there are
    /// is for the layers to say, whose author may be an enemy: whoever looks at all of them looks for
    /// as long as somebody waits for the answer, and no longer.
    ///
    /// # Errors
    /// The errors of [`Layer::extent_at`]; `EIO` when this thread's request has been given up. The
    /// caller stops at the first one.
    pub(super) fn pieces(
        &self,
        range: Range<u64>,
        wait: Wait,
    ) -> impl Iterator<Item = io::Result<(Extent, u32)>> + '_ {
        let Range { start: mut at, end } = range;
        std::iter::from_fn(move || {
            (at < end).then(|| {
                check_cancelled()?;
                let piece = self.extent_with_depth(at..end, wait)?;
                at = piece.0.range.end;
                Ok(piece)
            })
        })
    }

    /// Lets the layer that has data for a prefix of `range` lend its file to `copy`. Returns the
    /// number of bytes copied: 0 without data, and when no single host file holds it.
    ///
    /// # Errors
    /// The errors of [`Layer::lend_at`] and of `copy`.
    pub(super) fn lend_at(&self, range: Range<u64>, copy: CopyFn<'_>) -> io::Result<u64> {
        let lend = |layer: &dyn Layer, range| layer.lend_at(range, Wait::Yes, &mut *copy);
        Ok(first_answer(&self.all, range, lend)?.1.unwrap_or(0))
    }
}

/// The layers below the one that is written.
pub(super) struct LowerLayers<'a>(&'a [Arc<dyn Layer>]);

impl ReadBelow for LowerLayers<'_> {
    fn read_below(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<()> {
        read_through(self.0, buf, offset, wait)
    }

    fn is_zero_below(&self, range: Range<u64>, wait: Wait) -> io::Result<bool> {
        let extent = extent_through(self.0, range.clone(), wait)?;
        Ok(extent.kind != ExtentKind::Data && extent.range.end >= range.end)
    }
}

/// Asks `layers` from top to bottom about `range`, each about the prefix that the layer above left
/// to it, and returns the first answer that is not [`ExtentKind::Lower`]. Below all layers is a
/// hole.
fn first_answer<T: Default>(
    layers: &[Arc<dyn Layer>],
    mut range: Range<u64>,
    mut ask: impl FnMut(&dyn Layer, Range<u64>) -> io::Result<(Extent, T)>,
) -> io::Result<(Extent, T)> {
    for layer in layers {
        let (extent, answer) = ask(&**layer, range)?;
        if extent.kind != ExtentKind::Lower {
            return Ok((extent, answer));
        }
        range = extent.range;
    }
    Ok((Extent::new(range, ExtentKind::Hole), T::default()))
}

/// Describes a prefix of `range` through `layers`, top to bottom.
fn extent_through(layers: &[Arc<dyn Layer>], range: Range<u64>, wait: Wait) -> io::Result<Extent> {
    Ok(first_answer(layers, range, |layer, range| Ok((layer.extent_at(range, wait)?, ())))?.0)
}

/// Fills `buf` through `layers`, top to bottom: each layer fills its own bytes and passes the rest
/// down. Unlike [`first_answer`] this does not return to the top for the next piece: a layer is
/// asked once about a range that the layers below have in several pieces.
fn read_through(
    layers: &[Arc<dyn Layer>],
    buf: &mut [u8],
    offset: u64,
    wait: Wait,
) -> io::Result<()> {
    let Some((layer, below)) = layers.split_first() else {
        buf.fill(0);
        return Ok(());
    };
    let mut done = 0;
    while done < buf.len() {
        let at = offset + done as u64;
        let rest = &mut buf[done..];
        let extent = layer.read_at(rest, at, wait)?;
        let len = usize::try_from(extent.len()).unwrap_or(usize::MAX).min(rest.len());
        match extent.kind {
            ExtentKind::Data => {}
            ExtentKind::Zero | ExtentKind::Hole => rest[..len].fill(0),
            ExtentKind::Lower => read_through(below, &mut rest[..len], at, wait)?,
        }
        done += len;
    }
    Ok(())
}
