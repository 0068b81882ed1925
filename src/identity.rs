//! Identity of a base: enough to notice that the base changed under an overlay.
//!
//! An overlay holds only the differences from its base, so above another base it is garbage. Its
//! `stack` therefore records the base's size, mtime, inode and a hash of samples, which cost one
//! short read each however large the base is:
//!
//! ```text
//!   |first 64K|..4K....4K....4K....4K....4K....4K..|last 64K|      up to 64 samples between
//! ```
//!
//! A copy that was restored with its times is the same base: the inode alone proves nothing.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::checksum;
use crate::config::format_size;
use crate::host;

/// Bytes hashed at each end, where partition tables and superblocks are: 64 KiB, which includes the
/// superblocks of ext4, xfs, LVM and GPT (both copies).
const EDGE_LEN: usize = 64 << 10;
/// Bytes in a sample: one page, the least that is read from a disk.
const SAMPLE_LEN: usize = 4 << 10;
/// Number of samples between the ends. 64 seeks of a spinning disk take half a second, which is
/// acceptable for a mount.
const SAMPLE_COUNT: u64 = 64;

/// The identity of a base as the overlay last saw it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Size in bytes.
    pub size: u64,
    /// Time of last modification; `None` for a block device, whose node's time says nothing about
    /// its bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtime: Option<Mtime>,
    /// The inode number in decimal (TOML's integers are signed); for a block device its stable id,
    /// if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inode: Option<String>,
    /// Hash of the samples: `crc32c:` and eight hexadecimal digits. For an image whose server names its
    /// version, that: `etag:` and the strong ETag of HTTP, in its quotes.
    pub hash: String,
}

/// A time of last modification, as in stat(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mtime {
    /// Seconds since 1970, UTC.
    pub secs: i64,
    /// Nanoseconds within the second, below 10⁹.
    pub nanos: u32,
}

impl Identity {
    /// Determines the identity of `file`, a regular file or a block device; reads up to 384 KiB of
    /// it.
    ///
    /// # Errors
    /// The host's errno; `UnexpectedEof` when the file gets shorter meanwhile.
    pub fn of(file: &File) -> io::Result<Self> {
        let meta = file.metadata()?;
        let is_device = meta.file_type().is_block_device();
        let size = if is_device { host::file_size(file)? } else { meta.len() };
        let mtime =
            Mtime { secs: meta.mtime(), nanos: u32::try_from(meta.mtime_nsec()).unwrap_or(0) };
        Ok(Self {
            size,
            mtime: (!is_device).then_some(mtime),
            inode: match is_device {
                true => device_id(meta.rdev()),
                false => Some(meta.ino().to_string()),
            },
            hash: sampled_hash(file, size)?,
        })
    }

    /// Returns the version by which the server names the image; `None` when it is known by its samples.
    #[must_use]
    pub fn version(&self) -> Option<&str> {
        self.hash.strip_prefix("etag:")
    }

    /// Describes how `now` differs from the recorded base `self`, in one line for the user; `None`
    /// when it is the same base.
    #[must_use]
    pub fn differences(&self, now: &Self) -> Option<String> {
        let mut found = Vec::new();
        if self.size != now.size {
            found.push(format!("size {}", size_change(self.size, now.size)));
        }
        if let (Some(was), Some(is)) = (self.mtime, now.mtime)
            && was != is
        {
            found.push(format!("modified {is} (was {was})"));
        }
        // Another size moves the samples, which makes their hashes incomparable.
        if self.hash != now.hash && self.size == now.size {
            found.push(match (self.version(), now.version()) {
                (Some(was), Some(is)) => format!("version {is} (was {was})"),
                (Some(was), None) => format!("its server names no version (was {was})"),
                (None, Some(is)) => format!("version {is} (was known by samples)"),
                (None, None) => "its contents differ".to_owned(),
            });
        }
        (!found.is_empty()).then(|| found.join(", "))
    }

    /// Compares as [`differences`](Self::differences) does, but allows for a copied base, which may
    /// have another time of last modification. The same inode with another time was written to.
    #[must_use]
    pub fn differences_of_copy(&self, now: &Self) -> Option<String> {
        let mtime = if self.inode == now.inode { now.mtime } else { None };
        self.differences(&Self { mtime, ..now.clone() })
    }

    /// Describes why `now` is another file, whatever its contents; `None` when it is the same file,
    /// or a device without an id.
    #[must_use]
    pub fn file_difference(&self, now: &Self) -> Option<String> {
        match (&self.inode, &now.inode) {
            (Some(was), Some(is)) if was != is => {
                Some(format!("another file: inode {is}, was {was}"))
            }
            // Only some devices have an id.
            (None, None) | (Some(_), Some(_)) => None,
            (None, Some(_)) | (Some(_), None) if self.mtime.is_none() && now.mtime.is_none() => {
                None
            }
            (None, Some(_)) | (Some(_), None) => Some("a file, and a device".to_owned()),
        }
    }
}

/// Returns an id that tells the block device `rdev` from another that may later have its name: the
/// id of a mapped device, a world wide name, a serial number, or the file of a loop device. `None`
/// if the device has none.
fn device_id(rdev: u64) -> Option<String> {
    let (major, minor) = (rustix::fs::major(rdev), rustix::fs::minor(rdev));
    let dir = std::fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    let read = |dir: &Path, name: &str| {
        let text = std::fs::read_to_string(dir.join(name)).ok()?;
        Some(text.trim().to_owned()).filter(|text| !text.is_empty())
    };
    // A partition's directory lies inside its disk's, and contains the number.
    let (disk, part) = match read(&dir, "partition") {
        Some(number) => (dir.parent()?.to_owned(), format!(" partition {number}")),
        None => (dir, String::new()),
    };
    let names = ["dm/uuid", "wwid", "device/wwid", "serial", "device/serial", "loop/backing_file"];
    let found = names.iter().find_map(|name| Some(format!("{name} {}", read(&disk, name)?)))?;
    Some(found + &part)
}

/// The hash of the samples of a base, wherever its bytes are read from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SampleHash(u32);

impl SampleHash {
    /// Adds the bytes of the next of the [`sample_positions`].
    pub(crate) fn add(&mut self, sample: &[u8]) {
        self.0 = checksum::crc32c_append(self.0, sample);
    }

    /// Returns the hash of all samples, as in [`Identity::hash`].
    pub(crate) fn finish(self) -> String {
        format!("crc32c:{:08x}", self.0)
    }
}

fn sampled_hash(file: &File, size: u64) -> io::Result<String> {
    let mut hash = SampleHash::default();
    let mut buf = [0; EDGE_LEN];
    for (at, len) in sample_positions(size) {
        file.read_exact_at(&mut buf[..len], at)?;
        hash.add(&buf[..len]);
    }
    Ok(hash.finish())
}

/// Offsets and lengths in bytes (at most 64 KiB) of the samples of a base of `size` bytes: ascending,
/// disjoint and inside the base.
pub(crate) fn sample_positions(size: u64) -> Vec<(u64, usize)> {
    let edge = EDGE_LEN as u64;
    if size <= 2 * edge + SAMPLE_COUNT * SAMPLE_LEN as u64 {
        let whole = (0..size).step_by(EDGE_LEN);
        let rest = |at| usize::try_from(size - at).map_or(EDGE_LEN, |rest| rest.min(EDGE_LEN));
        return whole.map(|at| (at, rest(at))).collect();
    }
    // The middle is divided into SAMPLE_COUNT equal parts, with a sample at the start of each.
    let part = (size - 2 * edge) / SAMPLE_COUNT;
    let between = (0..SAMPLE_COUNT).map(|i| (edge + i * part, SAMPLE_LEN));
    let at_edge = |at| std::iter::once((at, EDGE_LEN));
    let (first, last) = (at_edge(0), at_edge(size - edge));
    first.chain(between).chain(last).collect()
}

/// Formats a change of size: `10 GiB -> 12 GiB`, or in bytes when the difference is too small for
/// that.
fn size_change(was: u64, is: u64) -> String {
    let (before, after) = (format_size(was), format_size(is));
    if before == after {
        return format!("{was} -> {is} bytes");
    }
    format!("{before} -> {after}")
}

/// Formats as `2026-11-21 01:46:02.5 UTC`.
impl std::fmt::Display for Mtime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (year, month, day) = civil_from_days(self.secs.div_euclid(86_400));
        let second = self.secs.rem_euclid(86_400);
        let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
        write!(f, "{year}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}")?;
        if self.nanos != 0 {
            let fraction = format!("{:09}", self.nanos);
            write!(f, ".{}", fraction.trim_end_matches('0'))?;
        }
        f.write_str(" UTC")
    }
}

/// Returns year, month and day of a day counted from 1970-01-01, by Howard Hinnant's
/// `civil_from_days`: years begin in March, so that the leap day is the last of its year.
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468; // 0000-03-01 is day 0
    let era = days.div_euclid(146_097); // 400 years
    let of_era = days.rem_euclid(146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153; // 0 is March
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use proptest::prelude::*;

    use super::*;

    fn file(size: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        set_mtime(&file, 1_700_000_000);
        file
    }

    fn set_mtime(file: &File, secs: u64) {
        let when = UNIX_EPOCH + Duration::from_secs(secs);
        file.set_modified(when).unwrap();
    }

    #[test]
    fn a_restored_copy_is_the_same_base() {
        let (original, copy) = (file(10 << 30), file(10 << 30));
        let one = Identity::of(&original).unwrap();
        let two = Identity::of(&copy).unwrap();
        assert_ne!(one.inode, two.inode);
        assert_eq!(one.differences(&two), None);
    }

    #[test]
    fn a_copy_may_have_another_mtime_but_the_same_inode_may_not() {
        let (original, copy) = (file(10 << 20), file(10 << 20));
        let was = Identity::of(&original).unwrap();
        set_mtime(&copy, 1_795_225_562);
        assert_eq!(was.differences_of_copy(&Identity::of(&copy).unwrap()), None);
        copy.write_all_at(b"x", 5).unwrap();
        let what = was.differences_of_copy(&Identity::of(&copy).unwrap());
        assert_eq!(what.unwrap(), "its contents differ");
        set_mtime(&original, 1_795_225_562);
        let what = was.differences_of_copy(&Identity::of(&original).unwrap()).unwrap();
        assert!(what.starts_with("modified 2026-11-21"), "{what}");
    }

    #[test]
    fn samples_that_were_read_elsewhere_give_the_hash_of_the_file() {
        for size in [0, 100, 65_536, 393_217, 10 << 20] {
            let bytes: Vec<u8> = (0..size).map(|at| u8::try_from(at % 251).unwrap()).collect();
            let file = file(size);
            file.write_all_at(&bytes, 0).unwrap();
            let mut hash = SampleHash::default();
            for (at, len) in sample_positions(size) {
                hash.add(&bytes[usize::try_from(at).unwrap()..][..len]);
            }
            assert_eq!(hash.finish(), Identity::of(&file).unwrap().hash);
        }
        // It is written down by every overlay: no version may change it.
        let (mut hash, samples) = (SampleHash::default(), sample_positions(1 << 40));
        samples.iter().for_each(|(at, _)| hash.add(&at.to_le_bytes()));
        assert_eq!((samples.len(), hash.finish().as_str()), (66, "crc32c:2019ce64"));
    }

    #[test]
    fn differences_are_described_in_one_line() {
        let file = file(10 << 30);
        let was = Identity::of(&file).unwrap();
        file.set_len(12 << 30).unwrap();
        set_mtime(&file, 1_795_225_562);
        let now = Identity::of(&file).unwrap();
        assert_eq!(
            was.differences(&now).unwrap(),
            "size 10 GiB -> 12 GiB, modified 2026-11-21 01:46:02 UTC (was 2023-11-14 22:13:20 UTC)"
        );
    }

    #[test]
    fn changed_bytes_at_either_end_or_in_a_sample_are_noticed() {
        let size = 10 << 30;
        let file = file(size);
        let was = Identity::of(&file).unwrap();
        let (sample, _) = sample_positions(size)[30];
        for at in [0, 65535, sample + 7, size - 65536, size - 1] {
            file.write_all_at(&[1], at).unwrap();
            set_mtime(&file, 1_700_000_000);
            let now = Identity::of(&file).unwrap();
            assert_eq!(was.differences(&now).unwrap(), "its contents differ");
            file.write_all_at(&[0], at).unwrap();
        }
    }

    #[test]
    fn an_identity_survives_a_round_trip_through_toml() {
        let was = Identity::of(&file(12345)).unwrap();
        let text = toml::to_string(&was).unwrap();
        assert_eq!(toml::from_str::<Identity>(&text).unwrap(), was);
        let device = Identity { mtime: None, inode: None, ..was };
        let text = toml::to_string(&device).unwrap();
        assert_eq!(toml::from_str::<Identity>(&text).unwrap(), device);
    }

    #[test]
    fn civil_from_days_returns_the_date() {
        for (days, date) in [
            (0, (1970, 1, 1)),
            (-1, (1969, 12, 31)),
            (11_016, (2000, 2, 29)),
            (11_017, (2000, 3, 1)),
            (47_540, (2100, 2, 28)),
            (47_541, (2100, 3, 1)),
        ] {
            assert_eq!(civil_from_days(days), date);
        }
    }

    proptest! {
        #[test]
        fn samples_are_ascending_disjoint_and_inside_the_file(size in prop_oneof![0..2_000_000u64, any::<u64>()]) {
            let samples = sample_positions(size);
            let mut end = 0;
            for (at, len) in samples {
                prop_assert!(at >= end && len > 0 && len <= EDGE_LEN);
                end = at + len as u64;
            }
            prop_assert_eq!(end, size);
        }
    }
}
