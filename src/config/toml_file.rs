//! The parser for the TOML file: the options of a mount at the top, followed by `[[disk]]` tables.

use std::ffi::OsString;
use std::ops::Range;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::disk_parser::RawSpec;
use super::error::{escaped, hint};
use super::keys;
use super::raw_value::{RawValue, absolute};
use super::remote::without_query;
use super::{CacheMode, DiskSpec, ServerSpec, SpecError};

/// The contents of a TOML file. `None` or empty means that a key was not given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// The mountpoint; absolute.
    pub mountpoint: Option<PathBuf>,
    /// The directory of the store, in which new files are created; absolute.
    pub store: Option<PathBuf>,
    /// Directories below which an image may have its backing files; absolute.
    pub allow_backing: Vec<PathBuf>,
    /// Directories that are trusted although another user can write to them; absolute.
    pub trust: Vec<PathBuf>,
    /// The keys of servers.
    pub servers: Vec<ServerSpec>,
    /// The cache mode of the mount.
    pub cache: Option<CacheMode>,
    /// The log file; absolute.
    pub log: Option<PathBuf>,
    /// Mount options, one per item, still to be parsed by
    /// [`parse_mount_options`](super::parse_mount_options).
    pub options: Vec<String>,
    /// The disks, in file order. Names may still clash: [`check_names`](super::check_names) checks
    /// them together with those of the command line.
    pub disks: Vec<DiskSpec>,
}

/// Keys at the top of the file.
const TOP_KEYS: &[&str] =
    &["mountpoint", "store", "allow-backing", "trust", "server", "cache", "log", "options", "disk"];

/// Parses a configuration. Relative paths are joined to `dir`, the directory of the file.
///
/// A disk's `source` is taken literally: a comma is part of the path. Sizes, `uid` and `gid` may be
/// integers, switches booleans, `perm` a string or `0o644`.
///
/// # Errors
/// [`SpecError`] with the line number; the caller adds the name of the file.
pub fn parse_config(text: &str, dir: &Path) -> Result<Config, SpecError> {
    let table = DeTable::parse(text).map_err(|error| {
        let message = SpecError::Toml(escaped(error.message().replace('\n', ", ")));
        error.span().map_or(message.clone(), |span| at_line(text, &span, message))
    })?;
    let mut config = Config::default();
    for (key, value) in table.get_ref() {
        // Errors in disks already have the line of their table.
        if key.get_ref() == "disk" {
            config.disks = parse_disks(text, value, dir)?;
            continue;
        }
        set_top_key(&mut config, key.get_ref(), value.get_ref(), dir)
            .map_err(|error| at_line(text, &key.span(), error))?;
    }
    Ok(config)
}

/// Adds the line on which `span` starts to `error`.
fn at_line(text: &str, span: &Range<usize>, error: SpecError) -> SpecError {
    let before = text.bytes().take(span.start);
    let line = 1 + before.filter(|byte| *byte == b'\n').count();
    error.within(format!("line {line}"))
}

/// Stores one key from the top of the file.
fn set_top_key(
    config: &mut Config,
    key: &str,
    value: &DeValue<'_>,
    dir: &Path,
) -> Result<(), SpecError> {
    let path = || absolute(&string_value(key, value)?, dir).map_err(|error| error.within(key));
    match key {
        "mountpoint" => config.mountpoint = Some(path()?),
        "store" => config.store = Some(path()?),
        "log" => config.log = Some(path()?),
        "cache" => config.cache = Some(string_value(key, value)?.to_string_lossy().parse()?),
        "allow-backing" => config.allow_backing = path_values(key, value, dir)?,
        "trust" => config.trust = path_values(key, value, dir)?,
        "server" => {
            let servers = string_values(key, value)?;
            let servers = servers.iter().map(|text| ServerSpec::parse(text, dir));
            config.servers = servers.collect::<Result<_, _>>()?;
        }
        "options" => config.options = option_list(value)?,
        _ if keys::is_key(key) || matches!(key, "name" | "source") => {
            return Err(SpecError::key(key, "is a disk's key: write it under [[disk]]"));
        }
        _ => {
            let hint = hint(key, TOP_KEYS);
            return Err(SpecError::Unknown { what: "key", given: escaped(key), hint });
        }
    }
    Ok(())
}

/// Returns a value that must be a string.
fn string_value(key: &str, value: &DeValue<'_>) -> Result<OsString, SpecError> {
    match value {
        DeValue::String(text) => Ok(OsString::from(text.as_ref())),
        other => {
            let kind = other.type_str();
            Err(SpecError::key(key, format!("is a TOML {kind}: write it as a string, in quotes")))
        }
    }
}

/// Returns a path or an array of paths; relative ones are joined to `dir`.
fn path_values(key: &str, value: &DeValue<'_>, dir: &Path) -> Result<Vec<PathBuf>, SpecError> {
    let path = |name: &OsString| absolute(name, dir);
    let paths = string_values(key, value)?.iter().map(path).collect::<Result<_, _>>();
    paths.map_err(|error| error.within(key))
}

/// Returns a string or an array of strings.
fn string_values(key: &str, value: &DeValue<'_>) -> Result<Vec<OsString>, SpecError> {
    match value {
        DeValue::Array(items) => {
            items.iter().map(|item| string_value(key, item.get_ref())).collect()
        }
        value => Ok(vec![string_value(key, value)?]),
    }
}

/// Parses `"ro,nodev"` or `["ro", "nodev"]`.
fn option_list(value: &DeValue<'_>) -> Result<Vec<String>, SpecError> {
    let lists: Vec<&str> = match value {
        DeValue::String(text) => vec![text],
        DeValue::Array(items) => {
            let texts = items.iter().map(|item| item.get_ref().as_str());
            texts.collect::<Option<_>>().ok_or_else(options_type_error)?
        }
        _ => return Err(options_type_error()),
    };
    let all = lists.iter().flat_map(|list| list.split(','));
    Ok(all.filter(|option| !option.is_empty()).map(str::to_owned).collect())
}

fn options_type_error() -> SpecError {
    SpecError::key("options", "is a string or an array of them: write [\"ro\", \"nodev\"]")
}

/// Parses the `[[disk]]` tables.
fn parse_disks(
    text: &str,
    value: &Spanned<DeValue<'_>>,
    dir: &Path,
) -> Result<Vec<DiskSpec>, SpecError> {
    let refused = |span: Range<usize>| {
        let why = "is a table for each disk: write [[disk]] above name and source";
        at_line(text, &span, SpecError::key("disk", why))
    };
    let DeValue::Array(items) = value.get_ref() else {
        return Err(refused(value.span()));
    };
    let disk = |item: &Spanned<DeValue<'_>>| {
        let DeValue::Table(table) = item.get_ref() else {
            return Err(refused(item.span()));
        };
        parse_disk_table(table, dir).map_err(|error| at_line(text, &item.span(), error))
    };
    items.iter().map(disk).collect()
}

/// Parses one `[[disk]]` table.
fn parse_disk_table(table: &DeTable<'_>, dir: &Path) -> Result<DiskSpec, SpecError> {
    let mut name = None;
    let mut source = None;
    let mut keys = Vec::new();
    for (key, value) in table {
        match key.get_ref().as_ref() {
            "name" => name = Some(string_value("name", value.get_ref())?),
            "source" => source = Some(string_value("source", value.get_ref())?),
            other => keys.push((other.to_owned(), raw_value(value.get_ref()))),
        }
    }
    let Some(source) = source else {
        let place = name.map_or("disk".to_owned(), |name| format!("disk '{}'", escaped(name)));
        return Err(SpecError::Missing("source is missing: write source = \"PATH\"").within(place));
    };
    let shown = name.as_ref().unwrap_or(&source).to_string_lossy();
    let place = format!("disk '{}'", escaped(without_query(&shown)));
    RawSpec { name, source, keys }.build(dir).map_err(|error| error.within(place))
}

/// Converts a disk's value, which its key will check.
fn raw_value(value: &DeValue<'_>) -> RawValue {
    match value {
        DeValue::String(text) => RawValue::Text(text.as_ref().into()),
        DeValue::Boolean(on) => RawValue::Bool(*on),
        DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
            .map_or(RawValue::Other("that large a number"), |n| {
                RawValue::Integer(n, number.radix())
            }),
        DeValue::Float(_) => RawValue::Other("a fraction"),
        DeValue::Datetime(_) => RawValue::Other("a date"),
        DeValue::Array(items) => {
            let texts = items.iter().map(|item| item.get_ref().as_str().map(OsString::from));
            texts.collect::<Option<_>>().map_or(RawValue::Other("such an array"), RawValue::Array)
        }
        DeValue::Table(_) => RawValue::Other("a table"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::{DiskMode, DiskSource, Format, Locking, Partitions, Resize, parse_disk};
    use super::*;

    const DIR: &str = "/etc/cowslip";

    fn read(text: &str) -> Config {
        parse_config(text, Path::new(DIR)).unwrap()
    }

    fn why(text: &str) -> String {
        let message = parse_config(text, Path::new(DIR)).unwrap_err().to_string();
        assert!(!message.contains('\n'), "{message}");
        message
    }

    #[test]
    fn empty_file_is_the_default() {
        assert_eq!(read(""), Config::default());
        assert_eq!(read("# nothing\n"), Config::default());
    }

    #[test]
    fn every_top_level_key_sets_its_field() {
        let config = read(
            "mountpoint = '/mnt'\nstore = 'store'\ncache = 'writeback'\nlog = '../log'\n\
             options = ['ro', 'nodev,nosuid']\n",
        );
        assert_eq!(config.mountpoint, Some(PathBuf::from("/mnt")));
        assert_eq!(config.store, Some(PathBuf::from("/etc/cowslip/store")));
        assert_eq!(config.log, Some(PathBuf::from("/etc/cowslip/../log")));
        assert_eq!(config.cache, Some(CacheMode::Writeback));
        assert_eq!(config.options, ["ro", "nodev", "nosuid"]);
        assert_eq!(read("options = 'ro,io_timeout=5'").options, ["ro", "io_timeout=5"]);
    }

    #[test]
    fn table_and_command_line_give_the_same_disk() {
        let table = "[[disk]]\nname = 'vm'\nsource = 'a,b.qcow2'\nformat = 'qcow2'\n\
                     overlay = 'o,p'\nblock = 65536\nlimit = '1G'\nsize = 0x40000000\n\
                     resize = false\nuid = 1_000\ngid = '100'\nperm = '0640'\nlock = 'off'\n\
                     mode = 'cow'\n";
        let line = "vm=a,,b.qcow2,format=qcow2,overlay=o,,p,block=64K,limit=1G,size=1G,resize=off,\
                    uid=1000,gid=100,perm=0640,lock=off";
        let disk = parse_disk(line, Path::new(DIR), &|_| false).unwrap();
        assert_eq!(disk.resize, Resize::Fixed);
        assert_eq!((disk.locking, disk.format), (Locking::Off, Some(Format::Qcow2)));
        assert_eq!(read(table).disks, [disk]);
    }

    #[test]
    fn disks_keep_their_order_and_default_names() {
        let config = read(
            "[[disk]]\nsource = 'z.qcow2'\nmode = 'ro'\nlock = true\npartitions = true\n\
             [[disk]]\nname = 'b'\nsource = 'blank:1G'\n[[disk]]\nsource = '/a/a=b.img'\n",
        );
        let names: Vec<&str> = config.disks.iter().map(|disk| disk.name.as_str()).collect();
        assert_eq!(names, ["z.img", "b", "a=b.img"]);
        assert_eq!(config.disks[0].mode, DiskMode::ReadOnly);
        assert_eq!(config.disks[0].partitions, Partitions::Shown);
        assert_eq!(config.disks[1].source, DiskSource::Blank(1 << 30));
        assert_eq!(config.disks[0].source, DiskSource::File("/etc/cowslip/z.qcow2".into()));
    }

    #[test]
    fn perm_is_a_string_or_an_octal_integer() {
        let perm = |value: &str| {
            let text = format!("[[disk]]\nsource = 'a'\nperm = {value}\n");
            parse_config(&text, Path::new(DIR)).map(|config| config.disks[0].perm)
        };
        assert_eq!(perm("0o644"), Ok(Some(0o644)));
        assert_eq!(perm("'644'"), Ok(Some(0o644)));
        assert!(perm("0o1777").is_err());
        assert_eq!(
            perm("644").unwrap_err().to_string(),
            "line 1: disk 'a': 'perm' cannot be a number: write perm = \"0644\""
        );
    }

    #[test]
    fn unknown_key_error_has_the_line_and_the_nearest() {
        assert_eq!(
            why("# x\nmountpiont = '/mnt'\n"),
            "line 2: unknown key 'mountpiont'; did you mean 'mountpoint'?"
        );
        assert_eq!(
            why("[[disk]]\nsource = 'a'\n\n[[disk]]\nname = 'b'\nsource = 'b'\nmdoe = 'ro'\n"),
            "line 4: disk 'b': unknown key 'mdoe'; did you mean 'mode'?"
        );
        assert!(why("colour = 1").contains("known are mountpoint, store"));
        assert!(why("mode = 'ro'").contains("write it under [[disk]]"));
        assert!(why("source = 'a'").contains("write it under [[disk]]"));
    }

    #[test]
    fn rules_of_the_command_line_apply_to_toml() {
        let disk = |keys: &str| why(&format!("[[disk]]\nsource = 'a'\n{keys}\n"));
        assert!(disk("mode = 'ro'\noverlay = 'x'").contains("'overlay' is for mode=cow"));
        assert!(disk("to = ['a', 'b']").contains("only for streams"));
        assert!(disk("name = 'a/b'").contains("cannot be a disk's name"));
        assert!(disk("name = \"a\\nb\"").contains("cannot be a disk's name"));
        assert!(disk("block = 5000").contains("power of two"));
        assert!(disk("size = -1").contains("cannot be negative"));
        assert!(disk("size = '10MB'").contains("write 10M or 10MiB"));
        assert!(disk("overlay = ''").contains("needs a value"));
        assert!(disk("overlay = \"a\\u0000\"").contains("NUL"));
        assert!(disk("uid = -1").contains("number"));
    }

    #[test]
    fn values_of_the_wrong_type_are_refused() {
        let disk = |keys: &str| why(&format!("[[disk]]\nsource = 'a'\n{keys}\n"));
        assert!(disk("size = 1.5").contains("'size' cannot be a fraction"));
        assert!(disk("size = 99999999999999999999").contains("that large a number"));
        assert!(disk("size = true").contains("cannot be a boolean"));
        assert!(disk("mode = 1").contains("cannot be a number"));
        assert!(disk("lock = 1").contains("cannot be a number"));
        assert!(disk("overlay = ['x']").contains("cannot be an array"));
        assert!(disk("name = 1").contains("write it as a string"));
        assert!(why("store = 1").contains("line 1: 'store' is a TOML integer"));
        assert!(why("options = 1").contains("array"));
        assert!(why("options = [1]").contains("array"));
        assert!(why("cache = 'writebakc'").contains("did you mean 'writeback'?"));
        assert!(why("log = ''").contains("log: a path is missing"));
    }

    #[test]
    fn error_for_a_disk_that_is_no_table_says_how_to_write_one() {
        assert!(why("\n[disk]\nsource = 'a'").contains("line 2: 'disk' is a table for each"));
        assert!(why("disk = ['a']").contains("write [[disk]]"));
        assert!(why("disk = 'a'").contains("write [[disk]]"));
        assert_eq!(
            why("\n[[disk]]\nname = 'v'\n"),
            "line 2: disk 'v': source is missing: write source = \"PATH\""
        );
    }

    #[test]
    fn malformed_toml_error_has_the_line() {
        assert!(why("\nstore = \n").starts_with("line 2: not TOML: "));
        assert!(why("a = 1\na = 2\n").starts_with("line 2: not TOML: "));
        assert!(why("[[disk]]\nsource = 'a'\nsource = 'b'\n").starts_with("line 3: not TOML: "));
        assert!(why("[[disk]]\nsource = 'a'\nperm = 0644\n").starts_with("line 3: not TOML: "));
    }

    proptest! {
        #[test]
        fn parser_survives_any_text(
            text in "(?s:.{0,60})|((\\[\\[disk\\]\\]|\
                     [a-z]{1,6} = ('[a-z:0-9]{0,6}'|[0-9.tx]{1,4}|\\[1\\])|\
                     (source|name|mode|size|perm|options) = \
                     ('[a-z,:0-9]{0,6}'|0o[0-7]{3}|true))\n){0,6}",
        ) {
            if let Err(error) = parse_config(&text, Path::new(DIR)) {
                prop_assert!(!error.to_string().contains('\n'));
            }
        }
    }
}
