//! Direct I/O (`O_DIRECT`) on host files, past the host's page cache.
//!
//! The descriptor is a second one for the same file: locks, holes, lengths and syncs stay with the
//! first. Direct I/O transfers whole units of the device, from and to memory that is aligned as
//! well:
//!
//! ```text
//!   units      |        |        |        |        |
//!   written         |xxxxxxxxxxxxxxxxxxxxx|              inner
//!   on device  |oooo xxxxxxxxxxxxxxxxxxxxx|              outer: the head is read first
//! ```
//!
//! The odd ends do not go through the cache: a unit that is written in part is read, filled and
//! written back. So no other write may touch that unit meanwhile, and a writer locks the units
//! around its range ([`DirectFile::lock_range`]). That keeps two writes of the same bytes in order,
//! too: a later write does not overtake one that the device holds up.
//!
//! Changes by others through the cache are seen. The kernel writes dirty pages of the range back
//! before a direct read or write, and drops the pages that a direct write has changed
//! (`iomap_dio_rw`, `generic_file_direct_write`). Two kinds of change by this daemon go through the
//! cache: holes and zeros that start or end inside a page, and copies inside the host.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt};

use parking_lot::{Condvar, Mutex};
use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};

use crate::aligned::{ALIGNMENT, AlignedBuf};
use crate::host::os_error;
use crate::pool::{ReplyHold, check_cancelled, hold_reply};

/// Size of the bounce buffer in bytes, 1 MiB: the largest request of the kernel.
const MAX_BOUNCE_LEN: u64 = 1 << 20;
/// Alignment in bytes that every device and file system accepts, for kernels that report none
/// (before Linux 6.1).
const SAFE_ALIGNMENT: u32 = 4096;

thread_local! {
    /// Per-thread bounce buffer for unaligned I/O.
    static BOUNCE: RefCell<AlignedBuf> = const { RefCell::new(AlignedBuf::new()) };
}

/// A file read and written past the host's page cache.
#[derive(Debug)]
pub(crate) struct DirectFile {
    file: File,
    /// Offsets and lengths on the device are multiples of this many bytes, a power of two.
    offset_align: u64,
    /// Memory buffers start at multiples of this many bytes.
    mem_align: usize,
    /// Write locks cover whole multiples of this many bytes: a unit, and the page that a change
    /// through the cache would touch.
    lock_grain: u64,
    write_lock: RangeLock,
}

impl DirectFile {
    /// Opens the file behind `file` a second time, with the same access mode.
    ///
    /// # Errors
    /// `EINVAL` when the file system has no direct I/O; else the host's errno.
    pub(crate) fn reopen(file: &File) -> io::Result<Self> {
        let access = rustix::fs::fcntl_getfl(file)? & OFlags::RWMODE;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let flags = access | OFlags::DIRECT | OFlags::CLOEXEC | OFlags::NOCTTY;
        let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
        let (unit, memory) = dio_alignment(&file)?;
        let fits = unit.is_power_of_two() && u64::from(unit) <= MAX_BOUNCE_LEN;
        if !fits || !memory.is_power_of_two() || memory as usize > ALIGNMENT {
            return Err(os_error(libc::EINVAL));
        }
        let (unit, page) = (u64::from(unit), rustix::param::page_size() as u64);
        let (memory, grain) = (memory as usize, unit.max(page));
        Ok(Self {
            file,
            offset_align: unit,
            mem_align: memory,
            lock_grain: grain,
            write_lock: RangeLock::default(),
        })
    }

    /// Whether the device can transfer `len` bytes at `offset` directly from or to `memory`.
    fn is_aligned(&self, memory: *const u8, offset: u64, len: usize) -> bool {
        offset.is_multiple_of(self.offset_align)
            && (len as u64).is_multiple_of(self.offset_align)
            && memory.align_offset(self.mem_align) == 0
    }

    /// Reads up to `buf.len()` bytes at `offset`; fewer only at the end of the file.
    ///
    /// # Errors
    /// The host's errno.
    pub(crate) fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            let (rest, at) = (&mut buf[done..], offset + done as u64);
            let whole = rest.len() - rest.len() % to_len(self.offset_align);
            let got = if whole > 0 && self.is_aligned(rest.as_ptr(), at, whole) {
                read_retrying(&self.file, &mut rest[..whole], at)?
            } else {
                self.read_bounced(rest, at)?
            };
            if got == 0 {
                break;
            }
            done += got;
        }
        Ok(done)
    }

    /// Reads the units around the start of `buf`, as many as the bounce buffer takes; returns 0 at
    /// the end.
    fn read_bounced(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let piece = AlignedPiece::first_of(self.offset_align, offset..offset + buf.len() as u64);
        let before = to_len(piece.inner.start - piece.outer.start);
        let len = to_len(piece.inner.end - piece.inner.start);
        BOUNCE.with_borrow_mut(|bounce| {
            let room = bounce.prepare(to_len(piece.outer.end - piece.outer.start));
            let got =
                read_retrying(&self.file, room, piece.outer.start)?.saturating_sub(before).min(len);
            buf[..got].copy_from_slice(&room[before..before + got]);
            Ok(got)
        })
    }

    /// Locks the units around `range` against all other writers until the returned guard is
    /// dropped.
    ///
    /// # Errors
    /// `EIO` when this thread's request has been given up; `EFBIG` past the largest offset.
    pub(crate) fn lock_range(&self, range: &Range<u64>) -> io::Result<RangeGuard<'_>> {
        let end = range.end.checked_next_multiple_of(self.lock_grain);
        let end = end.ok_or_else(|| os_error(libc::EFBIG))?;
        let range = range.start / self.lock_grain * self.lock_grain..end;
        self.write_lock.lock(&range)?;
        let mut alone = RangeGuard { file: self, range, reply_hold: None };
        alone.reply_hold = Some(hold_reply()?);
        Ok(alone)
    }

    /// Writes all of `parts`, one after the other, at `offset`. A file that grows then ends at the
    /// end of a whole unit.
    ///
    /// # Errors
    /// The host's errno; some of the bytes may have been written then.
    pub(crate) fn write_all_at(&self, parts: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        let total: usize = parts.iter().map(|part| part.len()).sum();
        let end = offset.checked_add(total as u64).ok_or_else(|| os_error(libc::EFBIG))?;
        self.lock_range(&(offset..end))?.write_all_at(parts, offset)
    }

    /// Reads the units at both ends of `piece` that are written only in part. Past the end of the
    /// file they read as zeros.
    fn read_edge_units(&self, room: &mut [u8], piece: &AlignedPiece) -> io::Result<()> {
        let unit = to_len(self.offset_align);
        let last = room.len().saturating_sub(unit);
        let (is_head, is_tail) =
            (piece.inner.start > piece.outer.start, piece.inner.end < piece.outer.end);
        let head = is_head.then_some(0);
        let tail = (is_tail && !(is_head && last == 0)).then_some(last);
        for at in [head, tail].into_iter().flatten() {
            let room = &mut room[at..at + unit];
            let got = read_retrying(&self.file, room, piece.outer.start + at as u64)?;
            room[got..].fill(0);
        }
        Ok(())
    }
}

/// An exclusive lock for writing near a range.
pub(crate) struct RangeGuard<'a> {
    file: &'a DirectFile,
    range: Range<u64>,
    /// The request waits for the end of the write, and is not answered `EIO` meanwhile.
    reply_hold: Option<ReplyHold>,
}

impl RangeGuard<'_> {
    /// The device's unit in bytes.
    #[must_use]
    pub(crate) fn offset_align(&self) -> u64 {
        self.file.offset_align
    }

    /// Writes as [`DirectFile::write_all_at`] does, inside the locked range.
    ///
    /// # Errors
    /// The host's errno; some of the bytes may have been written then.
    pub(crate) fn write_all_at(&self, parts: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        let Self { file, .. } = self;
        if let [only] = parts
            && file.is_aligned(only.as_ptr(), offset, only.len())
        {
            return file.file.write_all_at(only, offset);
        }
        let total: usize = parts.iter().map(|part| part.len()).sum();
        let end = offset + total as u64;
        let mut at = offset;
        BOUNCE.with_borrow_mut(|bounce| {
            while at < end {
                let piece = AlignedPiece::first_of(file.offset_align, at..end);
                let room = bounce.prepare(to_len(piece.outer.end - piece.outer.start));
                file.read_edge_units(room, &piece)?;
                let from = to_len(piece.inner.start - piece.outer.start);
                let to = to_len(piece.inner.end - piece.outer.start);
                copy_from_parts(&mut room[from..to], parts, to_len(at - offset));
                file.file.write_all_at(room, piece.outer.start)?;
                at = piece.inner.end;
            }
            Ok(())
        })
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        self.file.write_lock.unlock(&self.range);
        self.reply_hold = None;
    }
}

/// The first piece of a range, and the whole units around it.
#[derive(Debug, PartialEq, Eq)]
struct AlignedPiece {
    inner: Range<u64>,
    /// At most [`MAX_BOUNCE_LEN`] bytes.
    outer: Range<u64>,
}

impl AlignedPiece {
    /// Returns the first piece of `range`, which must not be empty.
    fn first_of(unit: u64, range: Range<u64>) -> Self {
        let start = range.start / unit * unit;
        let end = range.end.saturating_add(unit - 1) / unit * unit;
        let end = end.min(start.saturating_add(MAX_BOUNCE_LEN));
        Self { inner: range.start..range.end.min(end), outer: start..end }
    }
}

/// Fills `buf` with the bytes of `parts` after the first `skip`.
fn copy_from_parts(mut buf: &mut [u8], parts: &[IoSlice<'_>], mut skip: usize) {
    for part in parts {
        let rest = &part[skip.min(part.len())..];
        skip -= part.len() - rest.len();
        let len = rest.len().min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
        buf = &mut buf[len..];
    }
}

/// Reads once, and retries when interrupted.
fn read_retrying(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    loop {
        match file.read_at(buf, offset) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

/// Converts a length in memory.
#[expect(clippy::cast_possible_truncation, reason = "of a buffer, or a part of one")]
fn to_len(len: u64) -> usize {
    len as usize
}

/// Returns the alignment in bytes of offsets and of memory for direct I/O on `file` (statx(2),
/// since Linux 6.1 for files and 6.11 for devices).
fn dio_alignment(file: &File) -> io::Result<(u32, u32)> {
    let mask = StatxFlags::DIOALIGN | StatxFlags::BASIC_STATS;
    if let Ok(found) = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, mask)
        && found.stx_mask & StatxFlags::DIOALIGN.bits() != 0
    {
        // Zeros mean that this file has no direct I/O, whatever open(2) returned.
        return Ok((found.stx_dio_offset_align, found.stx_dio_mem_align));
    }
    if file.metadata()?.file_type().is_block_device() {
        let sector = rustix::fs::ioctl_blksszget(file)?;
        return Ok((sector, sector));
    }
    Ok((SAFE_ALIGNMENT, SAFE_ALIGNMENT))
}

/// The ranges that are being written, each by one thread.
#[derive(Debug, Default)]
struct RangeLock {
    locked: Mutex<Vec<Range<u64>>>,
    unlocked: Condvar,
}

impl RangeLock {
    /// Waits until no range that overlaps `range` is locked, then locks it.
    fn lock(&self, range: &Range<u64>) -> io::Result<()> {
        let meets = |other: &Range<u64>| other.start < range.end && range.start < other.end;
        let mut ranges = self.locked.lock();
        while ranges.iter().any(meets) {
            self.unlocked.wait(&mut ranges);
            check_cancelled()?;
        }
        ranges.push(range.clone());
        Ok(())
    }

    fn unlock(&self, range: &Range<u64>) {
        let mut ranges = self.locked.lock();
        if let Some(at) = ranges.iter().position(|other| other == range) {
            ranges.swap_remove(at);
        }
        drop(ranges);
        self.unlocked.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;
    use std::thread;

    use proptest::prelude::*;

    use super::*;

    /// Creates a file on a file system with direct I/O (`/var/tmp`). Uses units of `unit` bytes,
    /// which the kernel accepts even if it requires less.
    fn direct(unit: u64, size: u64) -> (File, DirectFile) {
        let file = tempfile::tempfile_in("/var/tmp").unwrap();
        file.set_len(size).unwrap();
        let mut direct = DirectFile::reopen(&file).unwrap();
        direct.offset_align = direct.offset_align.max(unit);
        direct.lock_grain = direct.lock_grain.max(unit);
        (file, direct)
    }

    #[derive(Debug, Clone)]
    struct Op {
        offset: u64,
        parts: Vec<usize>,
        fill: u8,
        /// Offset in memory at which a read begins.
        shift: usize,
    }

    fn op() -> impl Strategy<Value = Op> {
        let edge = || prop_oneof![Just(0), Just(512), Just(4096), 0_usize..20_000];
        let place = prop_oneof![0_u64..60_000, (0_u64..12).prop_map(|at| at * 4096)];
        (place, proptest::collection::vec(edge(), 1..4), 1_u8.., prop_oneof![Just(0), 0_usize..9])
            .prop_map(|(offset, parts, fill, shift)| Op { offset, parts, fill, shift })
    }

    /// Returns the bytes of each part of `op`.
    fn bytes(op: &Op) -> Vec<Vec<u8>> {
        let some = |len: &usize| (op.fill..=255).cycle().take(*len).collect();
        op.parts.iter().map(some).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn any_writes_and_reads_match_a_byte_array(
            unit in prop_oneof![Just(512_u64), Just(4096), Just(65_536)],
            size in 0_u64..100_000,
            ops in proptest::collection::vec(op(), 1..12),
        ) {
            let (file, direct) = direct(unit, size);
            let mut model = vec![0; to_len(size)];
            for op in &ops {
                let parts = bytes(op);
                let slices: Vec<_> = parts.iter().map(|part| IoSlice::new(part)).collect();
                direct.write_all_at(&slices, op.offset).unwrap();
                let (start, whole) = (to_len(op.offset), parts.concat());
                let end = start + whole.len();
                model.resize(model.len().max(end), 0);
                model[start..end].copy_from_slice(&whole);
                let mut memory = AlignedBuf::default();
                let room = &mut memory.prepare(op.shift + whole.len())[op.shift..];
                prop_assert_eq!(direct.read_at(room, op.offset).unwrap_or(0), room.len());
                prop_assert!(room == whole);
            }
            // The file may end at the end of a whole unit.
            let len = to_len(file.metadata().unwrap().len());
            model.resize(len, 0);
            let mut found = vec![1; len + 5000];
            prop_assert_eq!(direct.read_at(&mut found, 0).unwrap(), len);
            prop_assert!(found[..len] == model[..len]);
            let mut cached = vec![1; len];
            file.read_exact_at(&mut cached, 0).unwrap();
            prop_assert!(cached == model[..len]);
        }

        #[test]
        fn pieces_are_whole_units_and_cover_a_range_once(
            unit in prop_oneof![Just(512_u64), Just(4096)],
            start in 0_u64..3_000_000,
            len in 1_u64..3_000_000,
        ) {
            let mut at = start;
            while at < start + len {
                let piece = AlignedPiece::first_of(unit, at..start + len);
                prop_assert!(piece.outer.start.is_multiple_of(unit));
                prop_assert!(piece.outer.end.is_multiple_of(unit));
                prop_assert!(piece.outer.end - piece.outer.start <= MAX_BOUNCE_LEN);
                prop_assert!(piece.outer.start <= piece.inner.start);
                prop_assert!(piece.inner.end <= piece.outer.end);
                prop_assert!(piece.inner.start == at && piece.inner.end > at);
                // Only the two ends of the range are unaligned.
                prop_assert!(at == start || piece.inner.start == piece.outer.start);
                prop_assert!(piece.inner.end == start + len || piece.inner.end == piece.outer.end);
                at = piece.inner.end;
            }
            prop_assert_eq!(at, start + len);
        }
    }

    #[test]
    fn writers_of_one_unit_do_not_undo_each_other() {
        let (_file, direct) = direct(4096, 4096);
        let direct = Arc::new(direct);
        let writer = |at: u8| {
            let direct = Arc::clone(&direct);
            thread::spawn(move || {
                for round in 0..40 {
                    let part = [at * 40 + round; 600];
                    direct.write_all_at(&[IoSlice::new(&part)], u64::from(at) * 600).unwrap();
                    let mut got = [0; 600];
                    direct.read_at(&mut got, u64::from(at) * 600).unwrap();
                    assert_eq!(got, part);
                }
            })
        };
        let writers: Vec<_> = (0..6).map(writer).collect();
        writers.into_iter().for_each(|writer| writer.join().unwrap());
    }

    #[test]
    fn reopen_reports_a_file_system_without_direct_io() {
        let file = File::open("/proc/version").unwrap();
        let error = DirectFile::reopen(&file).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
        assert!(DirectFile::reopen(&File::open(Path::new("/dev/null")).unwrap()).is_err());
    }
}
