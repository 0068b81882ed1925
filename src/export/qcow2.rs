//! Export of the changes of a disk as a qcow2 image, with the base as its backing file.
//!
//! The imago library writes the image's tables. This module composes whole clusters, because the
//! unchanged bytes around a changed block in its cluster belong into the image as well. Clusters
//! without a change are not in the image.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use imago::format::builder::{FormatCreateBuilder, FormatDriverBuilder};
use imago::format::drivers::FormatDriverInstance;
use imago::{DenyImplicitOpenGate, StorageOpenOptions};

use super::{ExportKind, ExportRun, OnProgress, data_len, for_each_chunk};

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

/// Writes the clusters of `runs` of `file`, a disk of `size` bytes, into the empty file `out`.
///
/// # Errors
/// The host's errors, and those of the imago library as text.
pub fn write(
    out: &File,
    file: &File,
    runs: &[ExportRun],
    size: u64,
    backing: Option<&BackingFile>,
    watch: OnProgress<'_>,
) -> io::Result<()> {
    let options = StorageOpenOptions::new().write(true);
    let storage = imago::file::File::from_open_file(out.try_clone()?, options)?;
    let cluster = usize::try_from(CLUSTER_SIZE).map_err(io::Error::other)?;
    // QEMU measures disks in sectors.
    let builder =
        Qcow2Image::create_builder(storage).cluster_size(cluster).size(size.next_multiple_of(512));
    let builder = match backing {
        Some(BackingFile { name, format }) => builder.backing(name.clone(), format.clone()),
        None => builder,
    };
    let image = builder.create_open(DenyImplicitOpenGate::default(), |storage| {
        Ok(Qcow2Image::builder(storage).backing(None).write(true))
    })?;
    let runs = whole_clusters(runs, size);
    let total = data_len(runs.iter().map(|run| (&run.range, run.kind == ExportKind::Data)));
    let (mut done, mut buf) = (0, Vec::new());
    for ExportRun { range, kind } in runs {
        let mut at = range.start;
        while at < range.end {
            let left = range.end - at;
            if kind == ExportKind::Zero {
                // Without a backing file, clusters missing from the image read as zeros.
                let (_, len) = match backing {
                    Some(_) => image.ensure_zero_mapping(at, left)?,
                    None => (at, left),
                };
                at += len.max(1).min(left);
                continue;
            }
            let (_, host, len) = image.ensure_data_mapping(at, left, true)?;
            let len = len.min(left);
            for_each_chunk(file, at..at + len, &mut buf, |bytes, from| {
                out.write_all_at(bytes, host + (from - at))?;
                done += bytes.len() as u64;
                watch(done, total);
                Ok(())
            })?;
            at += len;
        }
    }
    image.flush()?;
    image.sync()
}

/// Rounds `runs` to whole clusters. A cluster that contains data, or zeros in only a part of it, is
/// data.
fn whole_clusters(runs: &[ExportRun], size: u64) -> Vec<ExportRun> {
    let mut all: Vec<ExportRun> = Vec::new();
    let mut push = |start: u64, end: u64, kind: ExportKind| {
        let start = all.last().map_or(start, |last| start.max(last.range.end));
        let end = end.min(size);
        match all.last_mut() {
            _ if start >= end => {}
            Some(last) if last.kind == kind && last.range.end == start => last.range.end = end,
            _ => all.push(ExportRun { range: start..end, kind }),
        }
    };
    for ExportRun { range, kind } in runs {
        let outer =
            range.start - range.start % CLUSTER_SIZE..range.end.next_multiple_of(CLUSTER_SIZE);
        let first = range.start.next_multiple_of(CLUSTER_SIZE);
        let last = if range.end == size { outer.end } else { range.end - range.end % CLUSTER_SIZE };
        if *kind == ExportKind::Data || first >= last {
            push(outer.start, outer.end, ExportKind::Data);
            continue;
        }
        push(outer.start, first, ExportKind::Data);
        push(first, last, ExportKind::Zero);
        push(last, outer.end, ExportKind::Data);
    }
    all
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_cluster_partly_filled_with_zeros_is_data() {
        let run = |start, end, kind| ExportRun { range: start..end, kind };
        let size = 10 * CLUSTER_SIZE + 5;
        let runs = [
            run(10, 20, ExportKind::Zero),
            run(20, 30, ExportKind::Data),
            run(CLUSTER_SIZE + 1, 4 * CLUSTER_SIZE, ExportKind::Zero),
            run(4 * CLUSTER_SIZE, 4 * CLUSTER_SIZE + 1, ExportKind::Data),
            run(9 * CLUSTER_SIZE, size, ExportKind::Zero),
        ];
        let expected = [
            run(0, 2 * CLUSTER_SIZE, ExportKind::Data),
            run(2 * CLUSTER_SIZE, 4 * CLUSTER_SIZE, ExportKind::Zero),
            run(4 * CLUSTER_SIZE, 5 * CLUSTER_SIZE, ExportKind::Data),
            run(9 * CLUSTER_SIZE, size, ExportKind::Zero),
        ];
        assert_eq!(whole_clusters(&runs, size), expected);
    }

    proptest! {
        #[test]
        fn each_cluster_has_the_kind_of_its_bytes(
            lens in proptest::collection::vec((1..200_000u64, 0..3u8), 1..30)
        ) {
            let (mut at, mut runs) = (0, Vec::new());
            for (len, what) in lens {
                let kind = [None, Some(ExportKind::Data), Some(ExportKind::Zero)][usize::from(what)];
                if let Some(kind) = kind {
                    runs.push(ExportRun { range: at..at + len, kind });
                }
                at += len;
            }
            let found = whole_clusters(&runs, at);
            for start in (0..at.div_ceil(CLUSTER_SIZE)).map(|cluster| cluster * CLUSTER_SIZE) {
                let cluster = start..at.min(start + CLUSTER_SIZE);
                let inside = |run: &&ExportRun| run.range.start < cluster.end && run.range.end > start;
                let touched: Vec<&ExportRun> = runs.iter().filter(inside).collect();
                let covered: u64 = touched.iter().map(|run| run.range.end.min(cluster.end) - run.range.start.max(start)).sum();
                let all_zero = touched.iter().all(|run| run.kind == ExportKind::Zero) && covered == cluster.end - start;
                let there = found.iter().find(|run| run.range.contains(&start)).map(|run| run.kind);
                let expected = match touched.is_empty() {
                    true => None,
                    false if all_zero => Some(ExportKind::Zero),
                    false => Some(ExportKind::Data),
                };
                // Several runs of zeros may fill one cluster, which then counts as data: the bytes
                // are the same.
                let several = touched.len() > 1 && all_zero;
                prop_assert!(there == expected || (several && there == Some(ExportKind::Data)));
            }
        }
    }
}
