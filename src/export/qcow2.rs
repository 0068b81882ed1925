//! A qcow2 image of what changed, with the base as its backing file.
//!
//! The image's tables are the library's; whole clusters are composed here, for what surrounds a
//! changed block in its cluster belongs into it as well. Clusters that hold nothing changed are
//! not in the image.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use imago::format::builder::{FormatCreateBuilder, FormatDriverBuilder};
use imago::format::drivers::FormatDriverInstance;
use imago::{DenyImplicitOpenGate, StorageOpenOptions};

use super::{Kind, Run, Watch, copy, data_of};

/// The size of a cluster, QEMU's own choice: 64 KiB.
pub const CLUSTER: u64 = 64 << 10;

type Image = imago::qcow2::Qcow2<imago::file::File>;

/// What an image is a difference to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// The path as it is written into the image.
    pub name: String,
    /// `raw` or `qcow2`.
    pub format: String,
}

/// Writes the clusters that hold `runs` of `file`, a disk of `size` bytes, into the empty file `out`.
///
/// # Errors
/// The host's; those of the library as text.
pub fn write(
    out: &File,
    file: &File,
    runs: &[Run],
    size: u64,
    backing: Option<&Backing>,
    watch: Watch<'_>,
) -> io::Result<()> {
    let options = StorageOpenOptions::new().write(true);
    let storage = imago::file::File::from_open_file(out.try_clone()?, options)?;
    let cluster = usize::try_from(CLUSTER).map_err(io::Error::other)?;
    // QEMU counts in sectors.
    let builder =
        Image::create_builder(storage).cluster_size(cluster).size(size.next_multiple_of(512));
    let builder = match backing {
        Some(Backing { name, format }) => builder.backing(name.clone(), format.clone()),
        None => builder,
    };
    let image = builder.create_open(DenyImplicitOpenGate::default(), |storage| {
        Ok(Image::builder(storage).backing(None).write(true))
    })?;
    let runs = clusters(runs, size);
    let total = data_of(runs.iter().map(|run| (&run.range, run.kind == Kind::Data)));
    let (mut done, mut buf) = (0, Vec::new());
    for Run { range, kind } in runs {
        let mut at = range.start;
        while at < range.end {
            let left = range.end - at;
            if kind == Kind::Zero {
                // What is not in an image without a backing file reads as zeros.
                let (_, len) = match backing {
                    Some(_) => image.ensure_zero_mapping(at, left)?,
                    None => (at, left),
                };
                at += len.max(1).min(left);
                continue;
            }
            let (_, host, len) = image.ensure_data_mapping(at, left, true)?;
            let len = len.min(left);
            copy(file, at..at + len, &mut buf, |bytes, from| {
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

/// `runs` in whole clusters: one that holds data, or zeros only in part, is data.
fn clusters(runs: &[Run], size: u64) -> Vec<Run> {
    let mut all: Vec<Run> = Vec::new();
    let mut push = |start: u64, end: u64, kind: Kind| {
        let start = all.last().map_or(start, |last| start.max(last.range.end));
        let end = end.min(size);
        match all.last_mut() {
            _ if start >= end => {}
            Some(last) if last.kind == kind && last.range.end == start => last.range.end = end,
            _ => all.push(Run { range: start..end, kind }),
        }
    };
    for Run { range, kind } in runs {
        let outer = range.start - range.start % CLUSTER..range.end.next_multiple_of(CLUSTER);
        let first = range.start.next_multiple_of(CLUSTER);
        let last = if range.end == size { outer.end } else { range.end - range.end % CLUSTER };
        if *kind == Kind::Data || first >= last {
            push(outer.start, outer.end, Kind::Data);
            continue;
        }
        push(outer.start, first, Kind::Data);
        push(first, last, Kind::Zero);
        push(last, outer.end, Kind::Data);
    }
    all
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn zeros_that_fill_a_cluster_in_part_are_data() {
        let run = |start, end, kind| Run { range: start..end, kind };
        let size = 10 * CLUSTER + 5;
        let runs = [
            run(10, 20, Kind::Zero),
            run(20, 30, Kind::Data),
            run(CLUSTER + 1, 4 * CLUSTER, Kind::Zero),
            run(4 * CLUSTER, 4 * CLUSTER + 1, Kind::Data),
            run(9 * CLUSTER, size, Kind::Zero),
        ];
        let expected = [
            run(0, 2 * CLUSTER, Kind::Data),
            run(2 * CLUSTER, 4 * CLUSTER, Kind::Zero),
            run(4 * CLUSTER, 5 * CLUSTER, Kind::Data),
            run(9 * CLUSTER, size, Kind::Zero),
        ];
        assert_eq!(clusters(&runs, size), expected);
    }

    proptest! {
        #[test]
        fn each_cluster_is_what_its_bytes_are(
            lens in proptest::collection::vec((1..200_000u64, 0..3u8), 1..30)
        ) {
            let (mut at, mut runs) = (0, Vec::new());
            for (len, what) in lens {
                let kind = [None, Some(Kind::Data), Some(Kind::Zero)][usize::from(what)];
                if let Some(kind) = kind {
                    runs.push(Run { range: at..at + len, kind });
                }
                at += len;
            }
            let found = clusters(&runs, at);
            for start in (0..at.div_ceil(CLUSTER)).map(|cluster| cluster * CLUSTER) {
                let cluster = start..at.min(start + CLUSTER);
                let inside = |run: &&Run| run.range.start < cluster.end && run.range.end > start;
                let touched: Vec<&Run> = runs.iter().filter(inside).collect();
                let covered: u64 = touched.iter().map(|run| run.range.end.min(cluster.end) - run.range.start.max(start)).sum();
                let all_zero = touched.iter().all(|run| run.kind == Kind::Zero) && covered == cluster.end - start;
                let there = found.iter().find(|run| run.range.contains(&start)).map(|run| run.kind);
                let expected = match touched.is_empty() {
                    true => None,
                    false if all_zero => Some(Kind::Zero),
                    false => Some(Kind::Data),
                };
                // Several runs of zeros may make up one cluster, which is data then: the same bytes.
                let several = touched.len() > 1 && all_zero;
                prop_assert!(there == expected || (several && there == Some(Kind::Data)));
            }
        }
    }
}
