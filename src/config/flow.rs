//! The parser for `to=SINK` and `from=SOURCE`: where a stream goes or comes from.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::command_line::{self, CommandLineError};
use super::error::{escaped, hint};
use super::raw_value::{RawValue, absolute};
use super::stream::Programs;
use super::{Flow, Overwrite, SinkSpec, SourceSpec, SpecError, Spool};

/// Parses the value of `to=`.
pub(super) fn parse_to(value: &RawValue, dir: &Path) -> Result<Flow, SpecError> {
    let (kind, rest) = split_kind(value)?;
    let target = match kind.as_bytes() {
        b"fifo" => SinkSpec::Fifo(absolute(&path_value(&rest)?, dir)?),
        b"file" => {
            let path = absolute(&path_value(&rest)?, dir)?;
            SinkSpec::File { path, overwrite: Overwrite::No }
        }
        b"cmd" => SinkSpec::Command(parse_programs(&rest, "to")?),
        b"stdout" if rest.is_empty() => SinkSpec::Stdout,
        b"measure" if rest.is_empty() => SinkSpec::Measure,
        b"stdin" => return Err(SpecError::value(kind, "a sink: write from=stdin, or to=stdout")),
        _ => {
            return Err(unknown_kind("sink", &kind, &["fifo", "file", "cmd", "stdout", "measure"]));
        }
    };
    Ok(Flow::Out(target))
}

/// Parses the value of `from=`.
pub(super) fn parse_from(value: &RawValue, dir: &Path) -> Result<Flow, SpecError> {
    let (kind, rest) = split_kind(value)?;
    let source = match kind.as_bytes() {
        b"fifo" => SourceSpec::Fifo(absolute(&path_value(&rest)?, dir)?),
        b"file" => SourceSpec::File(absolute(&path_value(&rest)?, dir)?),
        b"cmd" => SourceSpec::Command(parse_programs(&rest, "from")?),
        b"stdin" if rest.is_empty() => SourceSpec::Stdin,
        b"stdout" | b"measure" => {
            return Err(SpecError::value(&kind, "a source: write to=, or from=stdin"));
        }
        _ => return Err(unknown_kind("source", &kind, &["fifo", "file", "cmd", "stdin"])),
    };
    Ok(Flow::In { source, spool: Spool::Off })
}

/// The part after `KIND:`.
enum FlowValue {
    Empty,
    Text(OsString),
    Words(Vec<OsString>),
}

impl FlowValue {
    fn is_empty(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Text(text) => text.is_empty(),
            Self::Words(_) => false,
        }
    }
}

/// Splits `KIND:REST`. In an array the first word starts with `KIND:`, and the other words belong
/// to REST.
fn split_kind(value: &RawValue) -> Result<(OsString, FlowValue), SpecError> {
    let cut = |text: &OsStr| {
        let bytes = text.as_bytes();
        let at = bytes.iter().position(|byte| *byte == b':')?;
        let part = |bytes: &[u8]| OsStr::from_bytes(bytes).to_owned();
        Some((part(&bytes[..at]), part(&bytes[at + 1..])))
    };
    match value {
        RawValue::Text(text) => Ok(match cut(text) {
            Some((kind, rest)) => (kind, FlowValue::Text(rest)),
            None => (text.clone(), FlowValue::Empty),
        }),
        RawValue::Array(words) => {
            let command = words.split_first().and_then(|(first, rest)| Some((cut(first)?, rest)));
            let Some(((kind, first), rest)) = command.filter(|((kind, _), _)| kind == "cmd") else {
                let why = "an array is for commands: write [\"cmd:zstd\", \"-19\"]";
                return Err(SpecError::Missing(why));
            };
            let first = (!first.is_empty()).then_some(first);
            Ok((kind, FlowValue::Words(first.into_iter().chain(rest.iter().cloned()).collect())))
        }
        _ => Err(SpecError::Missing("a text is missing")),
    }
}

fn path_value(rest: &FlowValue) -> Result<OsString, SpecError> {
    match rest {
        FlowValue::Text(path) if !path.is_empty() => Ok(path.clone()),
        _ => Err(SpecError::Missing("a path is missing: write file:PATH or fifo:PATH")),
    }
}

fn parse_programs(rest: &FlowValue, key: &str) -> Result<Programs, SpecError> {
    let split = match rest {
        FlowValue::Empty => Err(CommandLineError::NoProgram),
        FlowValue::Text(line) => command_line::split_command(line),
        FlowValue::Words(words) => command_line::join_words(words),
    };
    split.map_err(|fault| {
        SpecError::Command(match fault {
            CommandLineError::NeedsShell => {
                format!("cowslip runs no shell; write {key}=cmd:sh -c '...'")
            }
            CommandLineError::Unterminated => {
                "a quote or a backslash has no end in the command".to_owned()
            }
            CommandLineError::NoProgram => {
                format!("a program is missing: write {key}=cmd:COMMAND [ARG]...")
            }
        })
    })
}

fn unknown_kind(what: &'static str, kind: &OsStr, names: &[&str]) -> SpecError {
    let given = escaped(kind);
    let looks_like_a_path = given.contains('/') || given.contains('.');
    let hint = match looks_like_a_path {
        true => format!("for a file write file:{given}"),
        false => hint(&given, names),
    };
    SpecError::Unknown { what, given, hint }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::super::{
        DiskSource, DiskSpec, FinishWhen, Pad, SpillCompression, StreamFrames, StreamSpec,
        parse_config, parse_disk,
    };
    use super::*;

    fn read(keys: &str) -> StreamSpec {
        stream(parse_disk(format!("o=stream:10G,{keys}"), Path::new("/here"), &|_| false).unwrap())
    }

    fn stream(disk: DiskSpec) -> StreamSpec {
        match disk.source {
            DiskSource::Stream(stream) => *stream,
            other => panic!("{other:?}"),
        }
    }

    fn why(keys: &str) -> String {
        let text = format!("o=stream:10G,{keys}");
        parse_disk(text, Path::new("/here"), &|_| false).unwrap_err().to_string()
    }

    fn command(words: &[&[&str]]) -> Programs {
        Programs(words.iter().map(|words| words.iter().map(OsString::from).collect()).collect())
    }

    #[test]
    fn every_sink_and_source_is_parsed() {
        let file = |path: &str, overwrite| SinkSpec::File { path: path.into(), overwrite };
        for (text, target) in [
            ("fifo:p", SinkSpec::Fifo("/here/p".into())),
            ("file:/o.img", file("/o.img", Overwrite::No)),
            ("file:o:1.img,overwrite", file("/here/o:1.img", Overwrite::Yes)),
            ("cmd:zstd -c | cat", SinkSpec::Command(command(&[&["zstd", "-c"], &["cat"]]))),
            ("cmd:a b,,c", SinkSpec::Command(command(&[&["a", "b,c"]]))),
            ("stdout", SinkSpec::Stdout),
            ("measure:", SinkSpec::Measure),
            ("measure", SinkSpec::Measure),
        ] {
            assert_eq!(read(&format!("to={text}")).flow, Flow::Out(target), "{text}");
        }
        for (text, source, spool) in [
            ("fifo:p", SourceSpec::Fifo("/here/p".into()), Spool::Off),
            ("file:o.img", SourceSpec::File("/here/o.img".into()), Spool::Off),
            ("cmd:zstd -dc o", SourceSpec::Command(command(&[&["zstd", "-dc", "o"]])), Spool::Off),
            ("stdin,spool", SourceSpec::Stdin, Spool::On),
        ] {
            assert_eq!(read(&format!("from={text}")).flow, Flow::In { source, spool }, "{text}");
        }
    }

    #[test]
    fn every_key_sets_its_field_in_any_order() {
        let spec = read(
            "overwrite,window=64M,read-window=1M,spill=1G,spill-compress,finish=umount,pad=off,\
             frames=rbd,to=file:o",
        );
        assert_eq!((spec.size, spec.dir), (10 << 30, PathBuf::from("/here")));
        assert_eq!((spec.window, spec.read_window, spec.spill), (64 << 20, 1 << 20, Some(1 << 30)));
        assert_eq!((spec.compress, spec.finish), (SpillCompression::Lz4, FinishWhen::Umount));
        assert_eq!((spec.pad, spec.frames), (Pad::Highest, StreamFrames::Rbd));
        let plain = read("to=stdout");
        assert_eq!((plain.window, plain.read_window, plain.spill), (16 << 20, 0, None));
        assert_eq!(read("to=stdout,window=0").window, 0);
    }

    #[test]
    fn stream_has_exactly_one_direction() {
        assert!(why("window=1M").contains("needs to=SINK or from=SOURCE"));
        assert!(why("to=stdout,from=stdin").contains("flows one way"));
        for key in ["window=1M", "spill=1M", "finish=close", "pad=off", "frames=raw", "overwrite"] {
            let line = why(&format!("from=stdin,{key}"));
            assert!(line.contains("is for") && line.contains("drop it"), "{line}");
        }
        assert!(why("to=stdout,spool").contains("is for input streams"));
        assert!(why("to=stdout,overwrite").contains("is for to=file:PATH"));
        assert!(why("to=stdout,spill-compress").contains("needs spill=SIZE"));
    }

    #[test]
    fn error_for_formats_that_need_the_end_first_names_a_tool() {
        for (format, tool) in [("android-sparse", "img2simg PATH OUT"), ("tar", "tar -S")] {
            for to in ["stdout", "file:o", "fifo:o", "cmd:cat"] {
                let line = why(&format!("to={to},frames={format}"));
                assert!(line.contains(&format!("frames: '{format}' puts")), "{line}");
                assert!(line.contains("to=file:PATH") && line.contains(tool), "{line}");
                assert!(!line.contains('\n'), "{line}");
            }
        }
        assert!(why("to=stdout,frames=rdb").contains("did you mean 'rbd'?"));
    }

    #[test]
    fn keys_of_other_disks_are_refused_for_streams() {
        for key in [
            "overlay=d",
            "mode=ro",
            "format=raw",
            "block=4K",
            "limit=1G",
            "size=1G",
            "resize=off",
            "lock=off",
        ] {
            assert!(why(&format!("to=stdout,{key}")).contains("is not for streams"), "{key}");
        }
        read("to=stdout,uid=1,gid=1,perm=0644");
    }

    #[test]
    fn unknown_sink_error_suggests_a_correction() {
        assert!(why("to=fiel:o").contains("did you mean 'file'?"));
        assert!(why("to=/srv/o.img").contains("write file:/srv/o.img"));
        assert!(why("to=stdin").contains("write from=stdin"));
        assert!(why("from=measure:").contains("write to="));
        assert!(why("to=").contains("needs a value"));
        assert!(why("to=file:").contains("a path is missing"));
        assert!(why("to=cmd:").contains("a program is missing"));
    }

    #[test]
    fn shell_syntax_in_a_command_is_refused() {
        let line = why("to=cmd:zstd > o.zst");
        assert!(line.ends_with("cowslip runs no shell; write to=cmd:sh -c '...'"), "{line}");
        let line = why("from=cmd:cat $x");
        assert!(line.ends_with("cowslip runs no shell; write from=cmd:sh -c '...'"), "{line}");
    }

    #[test]
    fn toml_array_is_split_only_at_pipes() {
        let read = |value: &str| {
            let text = format!("[[disk]]\nname = 'o'\nsource = 'stream:1G'\nto = {value}\n");
            parse_config(&text, Path::new("/here")).map(|mut config| stream(config.disks.remove(0)))
        };
        let flow = |words| Flow::Out(SinkSpec::Command(command(words)));
        assert_eq!(
            read("['cmd:zstd', '-c', '|', 'sh', '-c', 'x > y']").unwrap().flow,
            flow(&[&["zstd", "-c"], &["sh", "-c", "x > y"]])
        );
        assert_eq!(read("['cmd:', 'a b']").unwrap().flow, flow(&[&["a b"]]));
        assert_eq!(read("'cmd:zstd -c'").unwrap().flow, flow(&[&["zstd", "-c"]]));
        for wrong in ["[]", "['file:x']", "['zstd']", "[1]", "['cmd:']"] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
