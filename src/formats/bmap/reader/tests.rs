//! Bmaps that `bmaptool` and we write are read; all others are refused with one line.

use std::process::Command;

use proptest::prelude::*;

use super::*;
use crate::formats::bmap::write;

const SUM: &str = "ad3ec83f9ae1f26b697e914dfe6a7a94addc1dc7a04f99743893dce2616bf88c";

/// A bmap of 10 blocks without checksums.
fn plain(ranges: &str) -> String {
    format!(
        "<?xml version=\"1.0\" ?><!-- -->\n<bmap version=\"2.0\"><ImageSize> 40000 </ImageSize>\
         <BlockSize> 4096 </BlockSize><BlocksCount>10</BlocksCount>\
         <MappedBlocksCount> 4   </MappedBlocksCount><BlockMap>{ranges}</BlockMap></bmap>"
    )
}

/// Gives `text` the checksum of itself, where it has `SELF`.
fn signed(text: &str) -> String {
    let sum = Sha256::digest(text.replace("SELF", &"0".repeat(SUM_LEN)));
    text.replace("SELF", &hex(&sum.into()))
}

/// A bmap of 10 blocks with checksums.
fn summed(ranges: &str) -> String {
    let kind = "<ChecksumType> sha256 </ChecksumType><BmapFileChecksum> SELF </BmapFileChecksum>";
    signed(&plain(ranges).replace("<BlockMap>", &format!("{kind}<BlockMap>")))
}

fn size(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap()
}

fn bytes_of(map: &Bmap) -> Vec<Range<u64>> {
    map.ranges.iter().map(|range| range.bytes.clone()).collect()
}

fn refusal(text: &str) -> String {
    let line = Bmap::parse(text.as_bytes()).unwrap_err().to_string();
    assert!(!line.contains('\n') && line.len() < 500, "{line}");
    line
}

#[test]
fn what_bmaptool_writes_is_read() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let run = |line: &str| {
        let output =
            Command::new("sh").args(["-ec", line]).current_dir(dir.path()).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        output.stdout
    };
    run("truncate -s 1000000 a
         dd if=/dev/urandom of=a bs=4k seek=3 count=5 conv=notrunc
         printf end | dd of=a bs=1 seek=999990 conv=notrunc");
    let map = Bmap::parse(&run("bmaptool create a")).unwrap();
    assert_eq!((map.image_size, map.block_size), (1_000_000, 4096));
    assert_eq!(bytes_of(&map), [12_288..32_768, 999_424..1_000_000]);
    let image = std::fs::read(dir.path().join("a")).unwrap();
    for range in &map.ranges {
        let data = &image[size(range.bytes.start)..size(range.bytes.end)];
        assert_eq!(range.sum, Some(Sha256::digest(data).into()));
    }
    let without = Bmap::parse(&run("bmaptool create --no-checksum a")).unwrap();
    assert_eq!(bytes_of(&without), bytes_of(&map));
    assert!(without.ranges.iter().all(|range| range.sum.is_none()));
    assert_ne!(without.digest, map.digest);
}

#[test]
fn what_we_write_is_read() {
    let image = vec![7; 50_000];
    let mut text = Vec::new();
    write(&mut text, 50_000, [4096..8192, 49_152..50_000], |at, buf| {
        buf.copy_from_slice(&image[size(at)..][..buf.len()]);
        Ok(())
    })
    .unwrap();
    let map = Bmap::parse(&text).unwrap();
    assert_eq!(bytes_of(&map), [4096..8192, 49_152..50_000]);
    assert_eq!(map.ranges[0].sum, Some(Sha256::digest(&image[..4096]).into()));
}

#[test]
fn older_versions_without_checksums_and_later_minor_ones_are_read() {
    let text = plain("<Range> 1-3 </Range><Range>9</Range>");
    for version in ["1.0", "1.1", "1.2", "1.4", "2.0", "2.7"] {
        let map = Bmap::parse(text.replace("\"2.0\"", &format!("'{version}'")).as_bytes()).unwrap();
        assert_eq!(bytes_of(&map), [4096..16_384, 36_864..40_000]);
    }
    let later = text.replace("<BlockMap>", "<New a='&b;'><Deep>x</Deep></New><New/><BlockMap>");
    assert_eq!(Bmap::parse(later.as_bytes()).unwrap().ranges.len(), 2);
    let none = text.replace("<BlockMap>", "<ChecksumType> none </ChecksumType><BlockMap>");
    Bmap::parse(none.as_bytes()).unwrap();
    let sums = format!("<Range chksum=\"{SUM}\"> 1-3 </Range><Range>9</Range>");
    let map = Bmap::parse(summed(&sums).as_bytes()).unwrap();
    assert!(map.ranges[0].sum.is_some() && map.ranges[1].sum.is_none());
}

#[test]
fn what_is_no_bmap_is_refused_with_one_line() {
    let good = plain("<Range> 1-3 </Range><Range>9</Range>");
    let with = |from: &str, to: &str| good.replace(from, to);
    let summed_good = summed("<Range> 1-3 </Range><Range>9</Range>");
    let many: String = (0..40).map(|at| format!(" a{at}='1'")).collect();
    for (text, hint) in [
        (String::new(), "it ends too early"),
        ("<bmap version='2.0'>".to_owned(), "it ends too early"),
        ("not XML".to_owned(), "the text 'not XML' is out of place"),
        ("<html></html>".to_owned(), "its outermost element is 'html'"),
        (format!("{good}<bmap version='2.0'/>"), "its outermost element is 'bmap'"),
        (with("</BlockMap>", "</Wrong>"), "it is no XML"),
        (format!("<!DOCTYPE x [<!ENTITY a 'b'>]>{good}"), "a document type"),
        (with("40000", "&a;"), "an entity"),
        (with("40000", "<![CDATA[40000]]>"), "a CDATA section"),
        (with("\"2.0\"", "\"3.0\""), "of version '3.0'"),
        (with("\"2.0\"", "\"2\""), "of version '2'"),
        (with(" version=\"2.0\">", ">"), "of version ''"),
        (with("\"2.0\"", &format!("\"2.0\"{many}")), "too many attributes"),
        (with("\"2.0\"", "\"2.0\" version=\"2.0\""), "is there twice"),
        (with("\"2.0\"", "\"1.3\""), "its checksums are SHA-1"),
        (
            with("<BlockMap>", "<ChecksumType>md5</ChecksumType><BlockMap>"),
            "its checksums are 'md5'",
        ),
        (
            with("<BlockMap>", "<ChecksumType>sha256</ChecksumType><BlockMap>"),
            "it has no BmapFileChecksum",
        ),
        (with("40000", "-1"), "ImageSize is no number: '-1'"),
        (with("40000", "99999999999999999999"), "ImageSize is no number"),
        (with("40000", "0"), "no image has 0 bytes"),
        (with("40000", "18446744073709551615"), "no image has"),
        (with("40000", &"1".repeat(300)), "is too long"),
        (with("40000", "50000"), "which are not 10 blocks of 4096"),
        (with("4096", "0"), "blocks of 0 bytes"),
        (with("4096", "4097"), "blocks of 4097 bytes"),
        (with("4096", "1099511627776"), "blocks of 1099511627776 bytes"),
        (with("<BlockSize> 4096 </BlockSize>", ""), "it has no BlockSize"),
        (with("<BlockSize>", "<ImageSize>1</ImageSize><BlockSize>"), "ImageSize is there twice"),
        (with("<BlockMap>", "<Map>").replace("</BlockMap>", "</Map>"), "it has no BlockMap"),
        (with("</BlockMap>", "</BlockMap><BlockMap></BlockMap>"), "'BlockMap' is out of place"),
        (with("<Range>9", "<Other>9</Other><Range>9"), "'Other' is out of place"),
        (with("<Range>9", "<Range><Range>9</Range>9"), "'Range' is out of place"),
        (with("1-3", "3-1"), "'3-1' is no range of blocks"),
        (with("1-3", "1-3-5"), "is no range of blocks"),
        (with("1-3", "+1-3"), "is no range of blocks"),
        (with("1-3", ""), "is no range of blocks"),
        (with("1-3", "0-18446744073709551615"), "is no range of blocks"),
        (with("1-3", "7-9"), "9-9 is out of order, or outside the image"),
        (with("<Range>9", "<Range>3"), "3-3 is out of order"),
        (with("<Range>9", "<Range>10"), "10-10 is out of order, or outside the image"),
        (with("1-3", "1-2"), "4 blocks are mapped, and names 3"),
        (with("<Range>9", &format!("<Range chksum='{SUM}'>9")), "does not say of which kind"),
        (with("<Range>9", "<Range chksum='x'>9"), "'x' is no SHA-256"),
        (with("<Range>9", &format!("<Range chksum='+{}'>9", &SUM[1..])), "is no SHA-256"),
        (
            format!("{}x</bmap>", "<bmap version='2.0'><a>".to_owned() + &"<b>".repeat(9)),
            "'b' is out of place",
        ),
        (summed_good.replace("1-3", "2-4"), "it does not have the checksum"),
        (format!("{summed_good}\n"), "it does not have the checksum"),
    ] {
        let line = refusal(&text);
        assert!(line.contains(hint), "{hint}: {line}");
    }
    assert_eq!(
        Bmap::parse(b"<bmap\xff/>").unwrap_err().to_string(),
        "it is no XML: it is not UTF-8"
    );
}

#[test]
fn a_hostile_bmap_takes_little_time_and_memory() {
    let begun = std::time::Instant::now();
    let long = size(MAX_FILE_LEN) - 1000;
    let attributes = plain("").replace("\"2.0\"", &format!("\"2.0\"{}", " a=''".repeat(long / 5)));
    assert!(refusal(&attributes).contains("too many attributes"));
    let deep = format!("<bmap version='2.0'>{}", "<a>".repeat(long / 3));
    assert!(refusal(&deep).contains("'a' is out of place"));
    let ranges: String = (0..1 << 19).map(|at| format!("<Range>{at}</Range>")).collect();
    assert_eq!(refusal(&plain(&ranges)), "it has more than 262144 ranges of blocks");
    let comment = format!("<!--{}-->{}", "-".repeat(long), plain("<Range>0-3</Range>"));
    Bmap::parse(comment.as_bytes()).unwrap();
    assert!(begun.elapsed().as_secs() < 20, "{:?}", begun.elapsed());
}

proptest! {
    /// Whatever is taken is in order and inside the image.
    #[test]
    fn a_changed_bmap_is_refused_or_sound(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3_u8), 1..6),
        is_summed in any::<bool>(),
    ) {
        let ranges = format!("<Range chksum=\"{SUM}\"> 1-3 </Range><Range>9</Range>");
        let mut bytes = match is_summed {
            true => summed(&ranges),
            false => plain("<Range> 1-3 </Range><Range>9</Range>"),
        }
        .into_bytes();
        for (place, byte, kind) in edits {
            let at = place.index(bytes.len());
            match kind {
                0 => bytes[at] = byte,
                1 => bytes.insert(at, byte),
                _ => drop(bytes.remove(at)),
            }
        }
        match Bmap::parse(&bytes) {
            Err(error) => prop_assert!(!error.to_string().contains('\n')),
            Ok(map) => map.assert_sound(),
        }
    }

    #[test]
    fn bytes_of_any_kind_are_refused_or_sound(text in "[<>/!&;\"' a-z0-9=-]{0,200}") {
        if let Ok(map) = Bmap::parse(text.as_bytes()) {
            map.assert_sound();
        }
    }
}
