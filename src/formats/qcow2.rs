//! Writing qcow2 images: of the changes of a disk, with the base as the backing file, or of a whole
//! disk.
//!
//! The imago library writes the image's tables. This module composes whole clusters, because the
//! unchanged bytes around a changed block in its cluster belong into the image as well. Clusters
//! without a change are not in the image.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use imago::format::builder::{FormatCreateBuilder, FormatDriverBuilder};
use imago::format::drivers::FormatDriverInstance;
use imago::{DenyImplicitOpenGate, StorageOpenOptions};

use super::{ImageRun, RunContent};
use crate::host::COPY_CHUNK;

/// The cluster size in bytes: 64 KiB, the default of QEMU.
pub const CLUSTER_SIZE: u64 = 64 << 10;

type Qcow2Image = imago::qcow2::Qcow2<imago::file::File>;

/// The backing file of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingFile {
    /// The path as it is written into the image.
    pub name: String,
    /// `raw` or `qcow2`.
    pub format: String,
}

/// The unit in bytes in which QEMU measures disks.
const SECTOR_SIZE: u64 = 512;

/// A writer of an image. Its ranges are whole clusters ([`whole_clusters`]) in rising order.
///
/// A size that is no multiple of [`SECTOR_SIZE`] is rounded up, and the bytes that are added read as
/// zeros.
pub struct Qcow2Writer<'a> {
    out: &'a File,
    /// The size of the disk in bytes.
    size: u64,
    image: Qcow2Image,
    has_backing_file: bool,
    buf: Vec<u8>,
}

impl<'a> Qcow2Writer<'a> {
    /// Begins the image of a disk of `size` bytes in the empty file `out`.
    ///
    /// # Errors
    /// The host's errors, and those of the imago library as text; so for the other methods.
    pub fn create(out: &'a File, size: u64, backing: Option<&BackingFile>) -> io::Result<Self> {
        let options = StorageOpenOptions::new().write(true);
        let storage = imago::file::File::from_open_file(out.try_clone()?, options)?;
        let cluster = usize::try_from(CLUSTER_SIZE).map_err(io::Error::other)?;
        let builder = Qcow2Image::create_builder(storage)
            .cluster_size(cluster)
            .size(size.next_multiple_of(SECTOR_SIZE));
        let builder = match backing {
            Some(BackingFile { name, format }) => builder.backing(name.clone(), format.clone()),
            None => builder,
        };
        let image = builder.create_open(DenyImplicitOpenGate::default(), |storage| {
            Ok(Qcow2Image::builder(storage).backing(None).write(true))
        })?;
        Ok(Self { out, size, image, has_backing_file: backing.is_some(), buf: vec![0; COPY_CHUNK] })
    }

    /// Makes `range` read as zeros. Without a backing file, clusters missing from the image do.
    ///
    /// # Errors
    /// As for [`create`](Self::create).
    pub fn write_zeros(&mut self, range: Range<u64>) -> io::Result<()> {
        if !self.has_backing_file {
            return Ok(());
        }
        // What the image adds to the disk belongs to its last cluster.
        let end = match range.end == self.size {
            true => range.end.next_multiple_of(SECTOR_SIZE),
            false => range.end,
        };
        let mut at = range.start;
        while at < end {
            let left = end - at;
            let (_, len) = self.image.ensure_zero_mapping(at, left)?;
            at += len.max(1).min(left);
        }
        Ok(())
    }

    /// Writes `range`, whose bytes `read` returns: `read` fills its whole buffer with the bytes of
    /// the disk from the given offset on.
    ///
    /// # Errors
    /// As for [`create`](Self::create); the errors of `read`.
    pub fn write_data(
        &mut self,
        range: Range<u64>,
        mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut at = range.start;
        while at < range.end {
            let left = range.end - at;
            let (_, mut host, len) = self.image.ensure_data_mapping(at, left, true)?;
            let end = at + len.min(left);
            while at < end {
                let len = usize::try_from(end - at).unwrap_or(COPY_CHUNK).min(COPY_CHUNK);
                read(at, &mut self.buf[..len])?;
                self.out.write_all_at(&self.buf[..len], host)?;
                at += len as u64;
                host += len as u64;
            }
        }
        Ok(())
    }

    /// Completes the image and syncs it to the disk.
    ///
    /// # Errors
    /// As for [`create`](Self::create).
    pub fn finish(self) -> io::Result<()> {
        self.image.flush()?;
        self.image.sync()
    }
}

/// Rounds `runs` of a disk of `size` bytes to whole clusters. A cluster that contains data, or zeros
/// in only a part of it, is data.
#[must_use]
pub fn whole_clusters(runs: &[ImageRun], size: u64) -> Vec<ImageRun> {
    let mut all: Vec<ImageRun> = Vec::new();
    let mut push = |start: u64, end: u64, content: RunContent| {
        let start = all.last().map_or(start, |last| start.max(last.range.end));
        let end = end.min(size);
        match all.last_mut() {
            _ if start >= end => {}
            Some(last) if last.content == content && last.range.end == start => {
                last.range.end = end;
            }
            _ => all.push(ImageRun { range: start..end, content }),
        }
    };
    for ImageRun { range, content } in runs {
        let outer =
            range.start - range.start % CLUSTER_SIZE..range.end.next_multiple_of(CLUSTER_SIZE);
        let first = range.start.next_multiple_of(CLUSTER_SIZE);
        let last = if range.end == size { outer.end } else { range.end - range.end % CLUSTER_SIZE };
        if *content == RunContent::Data || first >= last {
            push(outer.start, outer.end, RunContent::Data);
            continue;
        }
        push(outer.start, first, RunContent::Data);
        push(first, last, RunContent::Zeros);
        push(last, outer.end, RunContent::Data);
    }
    all
}

/// Adds the last cluster of a disk of `size` bytes to `runs`, which are whole clusters, if an image of
/// it is longer than the disk. In place of the bytes that are added, a backing file may have others:
/// those that the disk had when it was longer.
pub fn add_last_cluster(runs: &mut Vec<ImageRun>, size: u64) {
    let is_covered = runs.last().is_some_and(|last| last.range.end == size);
    if !size.is_multiple_of(SECTOR_SIZE) && !is_covered {
        let range = size - size % CLUSTER_SIZE..size;
        runs.push(ImageRun { range, content: RunContent::Data });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_cluster_partly_filled_with_zeros_is_data() {
        let run = |start, end, content| ImageRun { range: start..end, content };
        let size = 10 * CLUSTER_SIZE + 5;
        let runs = [
            run(10, 20, RunContent::Zeros),
            run(20, 30, RunContent::Data),
            run(CLUSTER_SIZE + 1, 4 * CLUSTER_SIZE, RunContent::Zeros),
            run(4 * CLUSTER_SIZE, 4 * CLUSTER_SIZE + 1, RunContent::Data),
            run(9 * CLUSTER_SIZE, size, RunContent::Zeros),
        ];
        let expected = [
            run(0, 2 * CLUSTER_SIZE, RunContent::Data),
            run(2 * CLUSTER_SIZE, 4 * CLUSTER_SIZE, RunContent::Zeros),
            run(4 * CLUSTER_SIZE, 5 * CLUSTER_SIZE, RunContent::Data),
            run(9 * CLUSTER_SIZE, size, RunContent::Zeros),
        ];
        assert_eq!(whole_clusters(&runs, size), expected);
    }

    #[test]
    fn the_last_cluster_of_an_image_that_is_longer_than_its_disk_is_in_it() {
        let run = |start, end, content| ImageRun { range: start..end, content };
        let (start, size) = (3 * CLUSTER_SIZE, 3 * CLUSTER_SIZE + 700);
        for content in [RunContent::Data, RunContent::Zeros] {
            let mut covered = vec![run(CLUSTER_SIZE, size, content)];
            add_last_cluster(&mut covered, size);
            assert_eq!(covered.len(), 1);
            let mut runs = vec![run(0, start, content)];
            add_last_cluster(&mut runs, size);
            assert_eq!(runs[1..], [run(start, size, RunContent::Data)]);
        }
        for whole in [0, start, start + 512] {
            let mut runs = Vec::new();
            add_last_cluster(&mut runs, whole);
            assert_eq!(runs, []);
        }
    }

    proptest! {
        #[test]
        fn each_cluster_has_the_content_of_its_bytes(
            lens in proptest::collection::vec((1..200_000u64, 0..3u8), 1..30)
        ) {
            let (mut at, mut runs) = (0, Vec::new());
            for (len, what) in lens {
                let content = [None, Some(RunContent::Data), Some(RunContent::Zeros)][usize::from(what)];
                if let Some(content) = content {
                    runs.push(ImageRun { range: at..at + len, content });
                }
                at += len;
            }
            let found = whole_clusters(&runs, at);
            for start in (0..at.div_ceil(CLUSTER_SIZE)).map(|cluster| cluster * CLUSTER_SIZE) {
                let cluster = start..at.min(start + CLUSTER_SIZE);
                let inside = |run: &&ImageRun| run.range.start < cluster.end && run.range.end > start;
                let touched: Vec<&ImageRun> = runs.iter().filter(inside).collect();
                let covered: u64 = touched.iter().map(|run| run.range.end.min(cluster.end) - run.range.start.max(start)).sum();
                let all_zero = touched.iter().all(|run| run.content == RunContent::Zeros) && covered == cluster.end - start;
                let there = found.iter().find(|run| run.range.contains(&start)).map(|run| run.content);
                let expected = match touched.is_empty() {
                    true => None,
                    false if all_zero => Some(RunContent::Zeros),
                    false => Some(RunContent::Data),
                };
                // Several runs of zeros may fill one cluster, which then counts as data: the bytes
                // are the same.
                let several = touched.len() > 1 && all_zero;
                prop_assert!(there == expected || (several && there == Some(RunContent::Data)));
            }
        }
    }
}
