//! The parser for disks, `[NAME=]SOURCE[,KEY[=VALUE]]...`: splits the text, and reads name and
//! source.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use super::error::escaped;
use super::keys;
use super::raw_value::{RawValue, absolute};
use super::{
    CacheMode, DiskSource, DiskSpec, Format, Partitions, RemoteAddress, RemoteSpec, SpecError,
    StreamSpec, format_size, parse_size, without_queries,
};
use crate::name::{self, NameError};

/// Parses a disk as written on the command line.
///
/// Relative paths are joined to `dir`, which should be absolute. `exists` is called only when the
/// disk is refused: perhaps the user meant a path with a comma in it.
///
/// # Errors
/// [`SpecError`], with the disk's text before it.
pub fn parse_disk(
    text: impl AsRef<OsStr>,
    dir: &Path,
    exists: &dyn Fn(&Path) -> bool,
) -> Result<DiskSpec, SpecError> {
    let text = text.as_ref();
    if text.is_empty() {
        return Err(SpecError::Missing("a disk is empty: write [NAME=]SOURCE[,KEY=VALUE]..."));
    }
    let (name, rest) = split_name_prefix(text);
    let pieces = split_commas(rest.as_bytes());
    RawSpec::from_pieces(name, &pieces).and_then(|spec| spec.build(dir)).map_err(|error| {
        let hint = comma_hint(name, &pieces, dir, exists);
        let shown = text.to_string_lossy();
        let place = format!("disk '{}'", escaped(&*without_queries(&shown)));
        hint.unwrap_or_else(|| error.within(place))
    })
}

/// Parses the base of a disk, given alone: a path or the address of an image on a server. Relative
/// paths are joined to `dir`.
///
/// # Errors
/// [`SpecError`] for another source.
pub fn parse_base(text: &OsStr, dir: &Path) -> Result<DiskSource, SpecError> {
    match text.to_str().filter(|text| RemoteAddress::is_one(text)) {
        Some(address) => {
            let address = RemoteAddress::parse(address)?;
            let mut remote = RemoteSpec::new(address);
            if remote.address.is_command() {
                dir.clone_into(&mut remote.dir);
            }
            Ok(DiskSource::Remote(Box::new(remote)))
        }
        None => Ok(DiskSource::File(dir.join(text))),
    }
}

/// Splits off `NAME=`, which is there only if no `/`, `:` or `,` precedes the first `=`.
fn split_name_prefix(text: &OsStr) -> (Option<&OsStr>, &OsStr) {
    let bytes = text.as_bytes();
    let end = bytes.iter().position(|byte| matches!(byte, b'=' | b'/' | b':' | b','));
    match end {
        Some(at) if bytes[at] == b'=' => {
            (Some(OsStr::from_bytes(&bytes[..at])), OsStr::from_bytes(&bytes[at + 1..]))
        }
        _ => (None, text),
    }
}

/// Splits at single commas. Two commas in a row, paired from the left, are one comma in the piece.
pub(super) fn split_commas(bytes: &[u8]) -> Vec<OsString> {
    let mut pieces = Vec::new();
    let mut piece = Vec::new();
    let mut bytes = bytes.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        if byte != b',' || bytes.next_if_eq(&b',').is_some() {
            piece.push(byte);
        } else {
            pieces.push(OsString::from_vec(std::mem::take(&mut piece)));
        }
    }
    pieces.push(OsString::from_vec(piece));
    pieces
}

/// Doubles the commas of one piece: the inverse of [`split_commas`].
fn double_commas(piece: &OsStr) -> OsString {
    let parts: Vec<&[u8]> = piece.as_bytes().split(|byte| *byte == b',').collect();
    OsString::from_vec(parts.join(&b",,"[..]))
}

/// Looks for the longest existing path made of the source, the pieces after it, and the commas
/// between them; returns an error that says how to write that path.
fn comma_hint(
    name: Option<&OsStr>,
    pieces: &[OsString],
    dir: &Path,
    exists: &dyn Fn(&Path) -> bool,
) -> Option<SpecError> {
    for count in (2..=pieces.len()).rev() {
        let source = pieces[..count].join(OsStr::new(","));
        let Ok(path) = absolute(&source, dir) else {
            continue;
        };
        if exists(&path) {
            let mut spec = name
                .map_or_else(OsString::new, |name| [name, OsStr::new("=")].into_iter().collect());
            spec.push(double_commas(&source));
            for piece in &pieces[count..] {
                spec.push(",");
                spec.push(double_commas(piece));
            }
            return Some(SpecError::Comma { path: escaped(path), spec: escaped(spec) });
        }
    }
    None
}

/// A disk split into its parts, the same for the command line and TOML.
pub(super) struct RawSpec {
    pub(super) name: Option<OsString>,
    pub(super) source: OsString,
    pub(super) keys: Vec<(String, RawValue)>,
}

impl RawSpec {
    /// Creates a `RawSpec` from the source and the keys after it, with or without a value.
    pub(super) fn from_pieces(
        name: Option<&OsStr>,
        pieces: &[OsString],
    ) -> Result<Self, SpecError> {
        let (source, rest) =
            pieces.split_first().map_or((OsStr::new(""), pieces), |(first, rest)| (first, rest));
        let keys = rest.iter().map(|piece| split_key(piece)).collect::<Result<_, _>>()?;
        Ok(Self { name: name.map(OsStr::to_owned), source: source.to_owned(), keys })
    }

    /// Builds the disk's spec, and checks it.
    pub(super) fn build(self, dir: &Path) -> Result<DiskSpec, SpecError> {
        let source = parse_source(&self.source, dir)?;
        let name = match (&self.name, &source) {
            (Some(name), _) => name.clone(),
            (None, DiskSource::File(_)) => default_name(&self.source)?,
            (None, DiskSource::Remote(remote)) => {
                let why = "needs a name";
                let given = escaped(remote.address.as_str());
                let hint = format!("{why}: write NAME={given}");
                return Err(SpecError::key(given, hint));
            }
            (None, DiskSource::Stream(_)) => {
                let why = "needs a name: write NAME=stream:SIZE";
                return Err(SpecError::Source { given: escaped(&self.source), why });
            }
            (None, DiskSource::Blank(_)) => {
                let why = "needs a name: write NAME=blank:SIZE";
                return Err(SpecError::Source { given: escaped(&self.source), why });
            }
        };
        let mut disk = DiskSpec::new(check_name(&name)?, source);
        keys::apply_keys(&mut disk, &self.keys, dir)?;
        Ok(disk)
    }
}

/// Splits `KEY=VALUE` or `KEY`.
fn split_key(piece: &OsStr) -> Result<(String, RawValue), SpecError> {
    let bytes = piece.as_bytes();
    let equals = bytes.iter().position(|byte| *byte == b'=');
    let key = &bytes[..equals.unwrap_or(bytes.len())];
    if key.is_empty() {
        let why = "no key after a comma: drop the comma, or write ,, for one in a path";
        return Err(SpecError::Missing(why));
    }
    let value = equals.map_or(RawValue::Bare, |at| {
        RawValue::Text(OsStr::from_bytes(&bytes[at + 1..]).to_owned())
    });
    // A key that is not UTF-8 is unknown anyway.
    Ok((String::from_utf8_lossy(key).into_owned(), value))
}

/// Parses a source: a path, an address, `blank:SIZE` or `stream:SIZE`. Other sources are refused.
fn parse_source(text: &OsStr, dir: &Path) -> Result<DiskSource, SpecError> {
    let bytes = text.as_bytes();
    let shown = text.to_string_lossy();
    // A scheme in capitals may have a query that is a secret, too.
    let shown = match url_scheme(bytes) {
        Some(_) => shown.split('?').next().unwrap_or_default(),
        None => &shown,
    };
    let refused = |why| Err(SpecError::Source { given: escaped(shown), why });
    if bytes.is_empty() {
        return Err(SpecError::Missing(
            "the source is empty: write a path, blank:SIZE or stream:SIZE",
        ));
    }
    if let Some(size) = bytes.strip_prefix(b"blank:") {
        let size = String::from_utf8_lossy(size);
        return parse_size(&size).map(DiskSource::Blank).map_err(|error| error.within("blank"));
    }
    if let Some(size) = bytes.strip_prefix(b"stream:") {
        let size = parse_size(&String::from_utf8_lossy(size));
        let size = size.map_err(|error| error.within("stream"))?;
        if size == 0 {
            return refused("is empty: a stream needs a size, as in stream:10G");
        }
        return Ok(DiskSource::Stream(Box::new(StreamSpec::new(size, dir.to_owned()))));
    }
    if text.to_str().is_some_and(RemoteAddress::is_one) {
        return parse_base(text, dir);
    }
    match url_scheme(bytes) {
        None => Ok(DiskSource::File(absolute(text, dir)?)),
        Some(b"s3") => {
            refused("is on the network, and such sources are not in this version of cowslip")
        }
        Some(_) => {
            refused("is not a source: write a path (with ./ before it), blank:SIZE or stream:SIZE")
        }
    }
}

/// Returns the part before `://`, if it looks like the scheme of a URL.
fn url_scheme(bytes: &[u8]) -> Option<&[u8]> {
    let end = bytes.windows(3).position(|window| window == b"://")?;
    let is_part = |byte: &u8| byte.is_ascii_alphanumeric() || b"+.-".contains(byte);
    let scheme = &bytes[..end];
    (scheme.first()?.is_ascii_alphabetic() && scheme.iter().all(is_part)).then_some(scheme)
}

/// Returns the basename of a path; the suffix of another format becomes `.img`, since the file in
/// the mount is raw.
fn default_name(path: &OsStr) -> Result<OsString, SpecError> {
    let path = Path::new(path);
    let Some(name) = path.file_name() else {
        let why = "has no file name at its end: write NAME=SOURCE";
        return Err(SpecError::Source { given: escaped(path), why });
    };
    let suffix = path.extension().and_then(OsStr::to_str).map(str::to_ascii_lowercase);
    match suffix.and_then(|suffix| suffix.parse().ok()) {
        None | Some(Format::Raw) => Ok(name.to_owned()),
        Some(_) => Ok(PathBuf::from(name).with_extension("img").into_os_string()),
    }
}

/// Returns `given` if it is a valid name for a file in the mount.
fn check_name(given: &OsStr) -> Result<String, SpecError> {
    let refused = |why| SpecError::Name { name: escaped(given), why };
    let text = given.to_str().ok_or_else(|| refused("it is not UTF-8: write NAME=SOURCE"))?;
    let why = match name::check_disk(text) {
        Err(NameError::Empty) => {
            "it is empty: write NAME=SOURCE, or ./=... for a file that starts with ="
        }
        Err(NameError::Directory) => "it is a directory's: take another",
        Err(NameError::Slash) => "it holds a /: take another",
        Err(NameError::ControlCharacter) => "it holds a control character: take another",
        Err(NameError::TooLong) => "it is longer than 255 bytes: take a shorter one",
        Err(NameError::Reserved) => "cowslip is controlled through it: take another",
        Ok(()) => return Ok(text.to_owned()),
    };
    Err(refused(why))
}

/// Checks that all disks have different names.
///
/// # Errors
/// [`SpecError::SameName`] for the first two disks with the same name.
pub fn check_names(disks: &[DiskSpec]) -> Result<(), SpecError> {
    let mut seen: HashMap<&str, &DiskSource> = HashMap::new();
    for disk in disks {
        if let Some(first) = seen.insert(&disk.name, &disk.source) {
            return Err(SpecError::SameName {
                name: escaped(&disk.name),
                first: source_text(first),
                second: source_text(&disk.source),
            });
        }
    }
    Ok(())
}

/// Checks that the cache mode is possible with every disk.
///
/// # Errors
/// [`SpecError`] for the first disk that does not allow it.
pub fn check_cache<'a>(
    disks: impl IntoIterator<Item = &'a DiskSpec>,
    cache: CacheMode,
) -> Result<(), SpecError> {
    let found = disks.into_iter().find(|disk| disk.partitions == Partitions::Shown);
    match found.filter(|_| cache == CacheMode::Writeback) {
        Some(disk) => {
            // Pages held back by the kernel for one file would be invisible in the other.
            let why = "does not go with --cache writeback, under which the disk and its partitions \
                       would differ: drop one of them";
            let place = format!("disk '{}'", escaped(&disk.name));
            Err(SpecError::key("partitions", why).within(place))
        }
        None => Ok(()),
    }
}

/// Describes a source in a message.
fn source_text(source: &DiskSource) -> String {
    match source {
        DiskSource::File(path) => escaped(path),
        DiskSource::Remote(remote) => escaped(remote.address.as_str()),
        DiskSource::Blank(size) => format!("blank, {}", format_size(*size)),
        DiskSource::Stream(stream) => format!("stream, {}", format_size(stream.size)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::CopyUp;
    use super::*;
    use crate::config::{DirectIo, Passthrough};
    use crate::config::{DiskMode, Locking, OverlayKind, Resize, SourcePart};

    const DIR: &str = "/home/me";

    fn read(text: &str) -> DiskSpec {
        parse_disk(text, Path::new(DIR), &|_| false).unwrap()
    }

    fn why(text: &str) -> String {
        parse_disk(text, Path::new(DIR), &|_| false).unwrap_err().to_string()
    }

    /// Returns the error message when `path` is the only file that exists.
    fn why_with(text: &str, path: &str) -> String {
        let exists = |asked: &Path| asked == Path::new(path);
        parse_disk(text, Path::new(DIR), &exists).unwrap_err().to_string()
    }

    fn file(path: &str) -> DiskSource {
        DiskSource::File(PathBuf::from(path))
    }

    #[test]
    fn path_alone_is_a_cow_disk_named_after_the_file() {
        let disk = read("vm.img");
        assert_eq!((disk.name.as_str(), disk.source), ("vm.img", file("/home/me/vm.img")));
        assert_eq!((disk.mode, disk.format, disk.overlay), (DiskMode::Cow, None, None));
        assert_eq!((disk.resize, disk.locking), (Resize::Follow, Locking::Qemu));
        assert_eq!(read("/srv/x/vm.img").source, file("/srv/x/vm.img"));
    }

    #[test]
    fn default_name_replaces_the_suffix_of_another_format_by_img() {
        for (path, name) in [
            ("vm.qcow2", "vm.img"),
            ("/srv/VM.QCOW2", "VM.img"),
            ("a.b.vmdk", "a.b.img"),
            ("w.vhd", "w.img"),
            ("w.vhdx", "w.img"),
            ("w.vdi", "w.img"),
            ("vm.raw", "vm.raw"),
            ("vm.img", "vm.img"),
            ("vm.iso", "vm.iso"),
            (".qcow2", ".qcow2"),
            ("qcow2", "qcow2"),
            ("/dev/sda", "sda"),
        ] {
            assert_eq!(read(path).name, name, "{path}");
        }
    }

    #[test]
    fn name_prefix_has_no_slash_colon_or_comma() {
        let disk = read("vm=/srv/a.img");
        assert_eq!((disk.name.as_str(), disk.source), ("vm", file("/srv/a.img")));
        assert_eq!(read("x=a=b.img").source, file("/home/me/a=b.img"));
        assert_eq!(read("./a=b.img").source, file("/home/me/a=b.img"));
        assert_eq!(read("./a=b.img").name, "a=b.img");
        assert_eq!(read("/srv/a=b.img").source, file("/srv/a=b.img"));
        assert_eq!(read("a:b=c.img").source, file("/home/me/a:b=c.img"));
        assert_eq!(read("vm.img,mode=ro").name, "vm.img");
        assert_eq!(read("a,,b=c.img").source, file("/home/me/a,b=c.img"));
    }

    #[test]
    fn doubled_comma_is_one_comma() {
        assert_eq!(read("a,,b.img").source, file("/home/me/a,b.img"));
        let disk = read("a,,,mode=ro");
        assert_eq!((disk.source, disk.mode), (file("/home/me/a,"), DiskMode::ReadOnly));
        assert_eq!(read("a,,,,b").source, file("/home/me/a,,b"));
        let disk = read("v=a,overlay=x,,y,block=4K");
        assert_eq!(disk.overlay, Some(PathBuf::from("/home/me/x,y")));
        assert_eq!(disk.block, Some(4096));
    }

    #[test]
    fn error_for_an_existing_path_with_a_comma_says_how_to_write_it() {
        assert_eq!(
            why_with("/srv/a,b.img", "/srv/a,b.img"),
            "'/srv/a,b.img' exists: write /srv/a,,b.img"
        );
        assert_eq!(
            why_with("a,b.img", "/home/me/a,b.img"),
            "'/home/me/a,b.img' exists: write a,,b.img"
        );
        assert_eq!(
            why_with("x=a,b,c/d.img,mode=ro", "/home/me/a,b,c/d.img"),
            "'/home/me/a,b,c/d.img' exists: write x=a,,b,,c/d.img,mode=ro"
        );
        assert_eq!(why_with("a,b=c", "/home/me/a,b=c"), "'/home/me/a,b=c' exists: write a,,b=c");
        assert_eq!(why_with("a,", "/home/me/a,"), "'/home/me/a,' exists: write a,,");
        assert_eq!(why_with("a,,b,c", "/home/me/a,b,c"), "'/home/me/a,b,c' exists: write a,,b,,c");
        assert!(why_with("a,b.img", "/home/me/a").contains("unknown key 'b.img'"));
    }

    #[test]
    fn parser_checks_no_path_for_a_valid_disk() {
        let exists = |_: &Path| panic!("a file was looked for");
        assert!(parse_disk("a,mode=ro", Path::new(DIR), &exists).is_ok());
    }

    #[test]
    fn blank_disk_needs_a_name_and_a_size() {
        let disk = read("b=blank:20G,limit=1G");
        assert_eq!((disk.name.as_str(), disk.source), ("b", DiskSource::Blank(20 << 30)));
        assert_eq!(
            why("blank:20G"),
            "disk 'blank:20G': 'blank:20G' needs a name: write NAME=blank:SIZE"
        );
        assert_eq!(
            why("b=blank:10MB"),
            "disk 'b=blank:10MB': blank: '10MB' is not a size: units are powers of 1024, write \
             10M or 10MiB"
        );
        assert!(why("b=blank:").contains("is not a size"));
        assert_eq!(read("./blank:20G").source, file("/home/me/blank:20G"));
    }

    #[test]
    fn unsupported_sources_are_refused_by_name() {
        for text in ["s=stream:", "s=stream:0,to=stdout", "stream:1G,to=stdout", "s=stream:1G"] {
            assert!(why(text).contains("stream"), "{text}");
        }
        for url in ["s3://b/k?c=d", "s3://b"] {
            assert!(why(url).contains("not in this version"), "{url}");
            assert!(why(&format!("n={url},mode=ro")).contains("not in this version"), "{url}");
        }
        assert!(why("ftp://h/x").contains("is not a source"));
        assert_eq!(read("./s3://b").source, file("/home/me/s3:/b"));
    }

    #[test]
    fn invalid_file_names_are_refused() {
        for text in ["=a", ".=a", "..=a", ".cowslip=a", "a\nb=a", "a\u{7f}=a", "a\u{85}=a", "a\0=a"]
        {
            let message = why(text);
            assert!(message.contains("cannot be a disk's name"), "{message}");
            assert!(!message.contains('\n'), "{message}");
        }
        assert!(why(&format!("{}=a", "n".repeat(256))).contains("longer than 255 bytes"));
        assert_eq!(read(&format!("{}=a", "n".repeat(255))).name.len(), 255);
        assert!(why(&format!("{}=a", "ü".repeat(128))).contains("longer than 255 bytes"));
        for text in ["/srv/.cowslip", "/srv/a\nb"] {
            assert!(why(text).contains("cannot be a disk's name"), "{text:?}");
        }
        for text in ["/", ".", "/srv/.."] {
            assert!(why(text).contains("write NAME=SOURCE"), "{text}");
        }
        assert!(check_name(OsStr::new("a/b")).is_err());
        assert!(check_name(OsStr::from_bytes(b"a\xff")).is_err());
        assert_eq!(check_name(OsStr::new("a, b:ü=.img")), Ok("a, b:ü=.img".to_owned()));
    }

    #[test]
    fn path_that_is_not_utf8_needs_an_explicit_name() {
        let read = |text| parse_disk(OsStr::from_bytes(text), Path::new("/"), &|_| false);
        assert!(read(b"a\xff").unwrap_err().to_string().contains("write NAME=SOURCE"));
        let source = DiskSource::File(PathBuf::from(OsStr::from_bytes(b"/a\xff")));
        assert_eq!(read(b"n=a\xff").unwrap().source, source);
    }

    #[test]
    fn empty_parts_are_refused() {
        assert_eq!(why(""), "a disk is empty: write [NAME=]SOURCE[,KEY=VALUE]...");
        for text in ["vm.img,", "vm.img,=1", "vm.img,mode=ro,", "vm.img,mode=ro,,,uid=1,"] {
            let message = why(text);
            assert!(message.contains("no key after a comma"), "{message}");
        }
        for text in ["vm=", "vm=,mode=ro", ",mode=ro"] {
            assert!(why(text).contains("the source is empty"), "{text}");
        }
    }

    #[test]
    fn two_disks_with_the_same_name_are_refused() {
        let disks = [read("/a/vm.img"), read("b=blank:1G"), read("/b/vm.img")];
        assert_eq!(check_names(&disks[..2]), Ok(()));
        assert_eq!(
            check_names(&disks).unwrap_err().to_string(),
            "two disks are called 'vm.img' (/a/vm.img and /b/vm.img): give one another name, \
             NAME=SOURCE"
        );
    }

    #[test]
    fn partitions_are_refused_with_writeback() {
        let disks = [read("a.img"), read("b.img,partitions")];
        for cache in [CacheMode::Auto, CacheMode::None] {
            assert_eq!(check_cache(&disks, cache), Ok(()));
        }
        assert_eq!(check_cache(&disks[..1], CacheMode::Writeback), Ok(()));
        let line = check_cache(&disks, CacheMode::Writeback).unwrap_err().to_string();
        assert!(
            line.starts_with("disk 'b.img': 'partitions' does not go with --cache writeback"),
            "{line}"
        );
    }

    /// Writes the disk as on the command line.
    fn to_spec(disk: &DiskSpec) -> OsString {
        let mut text = OsString::from(&disk.name);
        text.push("=");
        match &disk.source {
            DiskSource::File(path) => text.push(double_commas(path.as_os_str())),
            DiskSource::Blank(size) => text.push(format!("blank:{size}")),
            DiskSource::Remote(_) | DiskSource::Stream(_) => {
                unreachable!("not made by the strategy")
            }
        }
        let overlay = disk
            .overlay
            .as_ref()
            .map(|path| double_commas(path.as_os_str()).into_string().unwrap());
        let (offset, len) = match disk.part {
            SourcePart::Whole => (None, None),
            SourcePart::Bytes { offset, len } => {
                (Some(format!("offset={offset}")), len.map(|len| format!("len={len}")))
            }
            SourcePart::Partition(number) => (Some(format!("partition={number}")), None),
        };
        let keys = [
            (disk.mode != DiskMode::Cow).then(|| format!("mode={}", disk.mode)),
            disk.format.map(|format| format!("format={format}")),
            offset,
            len,
            overlay.map(|path| format!("overlay={path}")),
            disk.block.map(|block| format!("block={block}")),
            disk.limit.map(|limit| format!("limit={limit}")),
            disk.size.map(|size| format!("size={size}")),
            (disk.resize == Resize::Fixed).then(|| "resize=off".to_owned()),
            disk.copy_up.read.then(|| "cow-on-read".to_owned()),
            disk.copy_up.cache.then(|| "cow-on-cache=on".to_owned()),
            disk.uid.map(|uid| format!("uid={uid}")),
            disk.gid.map(|gid| format!("gid={gid}")),
            disk.perm.map(|perm| format!("perm={perm:04o}")),
            (disk.locking == Locking::Off).then(|| "lock=off".to_owned()),
            (disk.passthrough == Passthrough::On).then(|| "passthrough".to_owned()),
            (disk.direct == DirectIo::On).then(|| "direct".to_owned()),
            (disk.partitions == Partitions::Shown).then(|| "partitions".to_owned()),
        ];
        for key in keys.into_iter().flatten() {
            text.push(",");
            text.push(key);
        }
        text
    }

    prop_compose! {
        /// Keys that only a copy-on-write disk has.
        fn cow_keys()(
            overlay in proptest::option::of("/[a-z,= ]{1,12}"),
            block in proptest::option::of((9_u32..=21).prop_map(|power| 1 << power)),
            limit in proptest::option::of(0..=super::super::MAX_SIZE),
            size in proptest::option::of(0..=super::super::MAX_SIZE),
            fixed: bool,
        ) -> (Option<PathBuf>, Option<u32>, Option<u64>, Option<u64>, Resize) {
            let resize = if fixed { Resize::Fixed } else { Resize::Follow };
            (overlay.map(PathBuf::from), block, limit, size, resize)
        }
    }

    fn any_part() -> impl Strategy<Value = SourcePart> {
        let len = proptest::option::of(1..=super::super::MAX_SIZE);
        prop_oneof![
            Just(SourcePart::Whole),
            (0..1_u64 << 54, len)
                .prop_map(|(sector, len)| SourcePart::Bytes { offset: sector * 512, len }),
            (1..=u32::MAX).prop_map(SourcePart::Partition),
        ]
    }

    prop_compose! {
        fn any_disk()(
            name in "[a-z][^/:,=\\pC]{0,20}",
            path in proptest::option::of("/[a-z,=:ü ]{1,20}(/[a-z,=]{1,9})?"),
            mode in prop_oneof![Just(DiskMode::Cow), Just(DiskMode::ReadOnly), Just(DiskMode::ReadWrite)],
            format in proptest::option::of(prop_oneof![Just(Format::Raw), Just(Format::Vhd)]),
            part in any_part(),
            (overlay, block, limit, size, resize) in cow_keys(),
            uid in proptest::option::of(0..u32::MAX),
            gid in proptest::option::of(0..u32::MAX),
            perm in proptest::option::of(0_u16..=0o777),
            (unlocked, partitions, direct) in any::<(bool, bool, bool)>(),
            (read, cache, passed) in any::<(bool, bool, bool)>(),
        ) -> DiskSpec {
            let is_file = path.is_some();
            let source = path.map_or(DiskSource::Blank(4096), |path| DiskSource::File(path.into()));
            let mode = if is_file { mode } else { DiskMode::Cow };
            let is_cow = mode == DiskMode::Cow;
            DiskSpec {
                name, source, mode, uid, gid, perm,
                format: format.filter(|_| is_file),
                part: if is_file { part } else { SourcePart::Whole },
                partitions: if partitions { Partitions::Shown } else { Partitions::Hidden },
                overlay: overlay.filter(|_| is_cow),
                overlay_kind: OverlayKind::Blocks,
                block: block.filter(|_| is_cow),
                limit: limit.filter(|_| is_cow),
                size: size.filter(|_| is_cow),
                resize: if is_cow { resize } else { Resize::Follow },
                copy_up: CopyUp { read: read && is_cow, cache: cache && is_cow },
                locking: if is_file && unlocked { Locking::Off } else { Locking::Qemu },
                passthrough: match part {
                    SourcePart::Whole if passed && is_file && !is_cow && !partitions => Passthrough::On,
                    _ => Passthrough::Off,
                },
                direct: match format {
                    None | Some(Format::Raw) if direct && !passed => DirectIo::On,
                    _ => DirectIo::Off,
                },
            }
        }
    }

    proptest! {
        #[test]
        fn disk_spec_survives_a_round_trip(disk in any_disk()) {
            let text = to_spec(&disk);
            prop_assert_eq!(parse_disk(&text, Path::new(DIR), &|_| false), Ok(disk));
        }

        #[test]
        fn parser_survives_any_bytes(bytes: Vec<u8>, exists: bool) {
            if let Err(error) = parse_disk(OsStr::from_bytes(&bytes), Path::new(DIR), &|_| exists) {
                prop_assert!(!error.to_string().contains('\n'));
            }
        }

        #[test]
        fn parser_survives_any_disk_like_text(
            text in "([a-z.]{0,4}=)?(blank:|stream:|nbd://)?[a-z0-9/,=\n]{0,9}\
                     (,(mode|overlay|size|block|perm|lock|x)?=?[a-z0-9,]{0,4}){0,4}",
            exists: bool,
        ) {
            match parse_disk(&text, Path::new(DIR), &|_| exists) {
                Ok(disk) => {
                    prop_assert!(check_name(OsStr::new(&disk.name)).is_ok());
                    if let DiskSource::File(path) = disk.source {
                        prop_assert!(path.is_absolute());
                    }
                }
                Err(error) => prop_assert!(!error.to_string().contains('\n')),
            }
        }

        #[test]
        fn doubled_commas_survive_a_split(
            pieces in proptest::collection::vec("x[a,]{1,5}", 1..5),
        ) {
            // Pieces start with another byte: a comma there would pair with the separator before
            // it.
            let pieces: Vec<OsString> = pieces.into_iter().map(OsString::from).collect();
            let doubled: Vec<OsString> = pieces.iter().map(|piece| double_commas(piece)).collect();
            let text = doubled.join(OsStr::new(","));
            prop_assert_eq!(split_commas(text.as_bytes()), pieces);
        }
    }
}
